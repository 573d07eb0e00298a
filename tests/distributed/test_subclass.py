"""Distributed tensors of classes of their own: what has the shape of the whole is resharded with it, anything else of a
rank goes back to the same box of the whole or is refused by name."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import fastckpt
from fastckpt import Checkpointer, StateMismatch

pytestmark = pytest.mark.distributed

SHAPE = (5, 6)


def whole(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def on_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def local_of_two(seed: int, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """A DTensor whose local tensor is made of two."""
    a, b = (distribute_tensor(whole(seed + at), mesh, [placement], src_data_rank=None).to_local() for at in (0, 1))
    return DTensor.from_local(
        TwoTensor(a.contiguous(), b.contiguous()),
        mesh,
        [placement],
        run_check=False,
        shape=torch.Size(SHAPE),
        stride=(6, 1),
    )


def two_of_dtensors(seed: int, mesh: DeviceMesh, placement: Placement) -> TwoTensor:
    a, b = (distribute_tensor(whole(seed + at), mesh, [placement], src_data_rank=None) for at in (0, 1))
    return TwoTensor(a, b)


def plain_two(seed: int, mesh: DeviceMesh, placement: Placement) -> TwoTensor:
    return TwoTensor(whole(seed), whole(seed + 1))


FORMS = {"local": local_of_two, "inner": two_of_dtensors, "plain": plain_two}


def parts_of(tensor: Any) -> list[list[Any]]:
    two = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return [(part.to_local() if isinstance(part, DTensor) else part).tolist() for part in (two.a, two.b)]


def leg(url: str, number: int) -> None:
    choose, mesh = random.Random(f"forms {number}"), on_mesh()
    made = {name: (choose.choice(list(FORMS)), choose.choice([Shard(0), Shard(1), Replicate()])) for name in "uvwxyz"}
    made |= {f"{form} {at}": (form, placement) for form in FORMS for at, placement in enumerate([Shard(0), Shard(1)])}
    with Checkpointer(url) as ckpt:
        if number:
            state = {name: FORMS[form](100, mesh, placement) for name, (form, placement) in made.items()}
            assert ckpt.restore(state) == number - 1
            for seed, (name, (form, placement)) in enumerate(made.items()):
                assert parts_of(state[name]) == parts_of(FORMS[form](seed, mesh, placement)), (name, form, placement)
        ckpt.save(
            number,
            {name: FORMS[form](seed, mesh, placement) for seed, (name, (form, placement)) in enumerate(made.items())},
        )


def test_parts_of_the_shape_of_the_whole_restore_into_any_placement_on_any_number_of_ranks(tmp_path: Path) -> None:
    for number, world in enumerate([2, 3, 1, 2]):
        ranks.run(world, leg, str(tmp_path), number)
    snapshot = fastckpt.open(str(tmp_path)).snapshot()
    assert snapshot.read("u.b").tolist() == whole(1).tolist()


def still_under_way(url: str) -> None:
    mesh = on_mesh()

    def gathered(seed: int) -> DTensor:
        return distribute_tensor(whole(seed), mesh, [Shard(0)], src_data_rank=None).redistribute(
            placements=[Replicate()], async_op=True
        )

    tensor, target = gathered(1), gathered(2)
    assert type(tensor._local_tensor) is type(target._local_tensor) is AsyncCollectiveTensor
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {"t": tensor})
        assert ckpt.restore({"t": target}) == 1
    assert target.to_local().tolist() == whole(1).tolist()


def test_a_tensor_that_a_collective_still_fills_is_what_it_will_be(tmp_path: Path) -> None:
    ranks.run(2, still_under_way, str(tmp_path))
    assert fastckpt.open(str(tmp_path)).snapshot().keys() == ["t"]


class Numbered(TwoTensor):
    """Each rank has a context of its own."""

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["a", "b"], dist.get_rank()


def numbered(url: str) -> str:
    mesh = on_mesh()
    local = distribute_tensor(whole(1), mesh, [Shard(0)], src_data_rank=None).to_local()
    tensor = DTensor.from_local(
        Numbered(local, local + 1), mesh, [Shard(0)], run_check=False, shape=torch.Size(SHAPE), stride=(6, 1)
    )
    with Checkpointer(url) as ckpt:
        if mesh.size() == 1:
            with pytest.raises(StateMismatch) as caught:
                ckpt.restore({"t": tensor})
            return str(caught.value)
        ckpt.save(1, {"t": tensor})
        assert ckpt.restore({"t": tensor}) == 1
        return ""


def test_what_was_not_made_alike_on_all_ranks_is_not_put_together_from_them(tmp_path: Path) -> None:
    ranks.run(2, numbered, str(tmp_path))
    (refusal,) = ranks.run(1, numbered, str(tmp_path))
    assert "t: of class " in refusal
    assert "Numbered, but not made alike on the 2 ranks that saved it" in refusal


def declared(url: str) -> None:
    rank = dist.get_rank()
    module = nn.Module()
    module.rows = nn.Parameter(TwoTensor(whole(rank), whole(rank + 2)))
    module.same = nn.Parameter(TwoTensor(whole(8), whole(9)))
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {"m": module, "rows": fastckpt.Shard(module.rows, (5 * rank, 0), (10, 6))})


def test_a_parameter_made_of_others_may_be_declared_a_box_and_the_others_are_not(tmp_path: Path) -> None:
    ranks.run(2, declared, str(tmp_path))
    snapshot = fastckpt.open(str(tmp_path)).snapshot()
    assert snapshot.read("m.rows.b").tolist() == [*whole(2).tolist(), *whole(3).tolist()]
    assert snapshot.read("m.same.a").tolist() == whole(8).tolist()


def state_of_two(url: str, save: bool) -> None:
    mesh = on_mesh()
    parameter = nn.Parameter(distribute_tensor(whole(1), mesh, [Shard(0)], src_data_rank=None))
    optimizer = torch.optim.AdamW([parameter])
    with Checkpointer(url) as ckpt:
        if save:
            optimizer.state[parameter]["exp_avg"] = local_of_two(1, mesh, Shard(0))
            ckpt.save(1, {"o": optimizer})
            optimizer = torch.optim.AdamW([parameter])
        assert ckpt.restore({"o": optimizer}) == 1
    state = optimizer.state[parameter]["exp_avg"]
    assert isinstance(state, DTensor)
    assert state.to_local().shape == parameter.to_local().shape
    assert parts_of(state) == parts_of(local_of_two(1, mesh, Shard(0)))


def test_state_made_of_others_is_made_for_a_fresh_optimizer_sharded_like_its_parameter(tmp_path: Path) -> None:
    for world, save in ((2, True), (3, False), (1, False)):
        ranks.run(world, state_of_two, str(tmp_path), save)


def three_rows(url: str, save: bool) -> None:
    """On four ranks: the last has no elements, and there the state is plain, as torchao's optimizers make it."""
    mesh, rows = on_mesh(), torch.arange(18.0).view(3, 6)
    parameter = nn.Parameter(distribute_tensor(rows, mesh, [Shard(0)], src_data_rank=None))
    local = parameter.detach().to_local()
    two = TwoTensor(local, local + 1) if local.numel() else local
    shape = torch.Size((3, 6))
    state = DTensor.from_local(two, mesh, [Shard(0)], run_check=False, shape=shape, stride=(6, 1))
    optimizer = torch.optim.AdamW([parameter])
    with Checkpointer(url) as ckpt:
        if save:
            optimizer.state[parameter]["exp_avg"] = state
            ckpt.save(1, {"o": optimizer, "t": state})
            optimizer = torch.optim.AdamW([parameter])
            assert ckpt.restore({"t": state}) == 1
        assert ckpt.restore({"o": optimizer}) == 1
    made = optimizer.state[parameter]["exp_avg"]
    assert made.shape == (3, 6)
    if local.numel():
        assert parts_of(made) == [local.tolist(), (local + 1).tolist()]


def test_a_rank_without_elements_need_not_know_what_the_others_have_taken_apart(tmp_path: Path) -> None:
    for world, save in ((4, True), (5, False), (2, False)):
        ranks.run(world, three_rows, str(tmp_path), save)


def eight_bit(mesh: DeviceMesh, placement: Placement, seed: int) -> tuple[DTensor, Any]:
    """State of torchao's 8-bit optimizers as they make it for a parameter of FSDP2: each rank has scales of its own."""
    from torchao.optim.subclass_8bit import OptimState8bit

    shard = (64 // mesh.size(), 128) if placement == Shard(0) else (64, 128 // mesh.size())
    made = torch.Generator().manual_seed(seed + dist.get_rank())
    local = OptimState8bit.zeros(shard)
    local.codes.copy_(torch.randint(256, shard, generator=made))
    local.scale.copy_(torch.rand(local.scale.shape, generator=made))
    tensor = DTensor.from_local(local, mesh, [placement], run_check=False, shape=torch.Size((64, 128)), stride=(128, 1))
    return tensor, tensor._local_tensor


def float8_weights(mesh: DeviceMesh, seed: int, scale: float) -> nn.Module:
    """Weights that FSDP2 gathers as float8, with the scale that torchao computes ahead for the whole of one."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 48, bias=False))
    convert_to_float8_training(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
    fully_shard(model, mesh=mesh)
    model[0].weight._local_tensor._precomputed_scale = torch.tensor(scale)
    return model


def columns_of_float8(mesh: DeviceMesh) -> Any:
    """The same, sharded in another way."""
    local = float8_weights(mesh, 3, 1.0)[0].weight._local_tensor
    part = type(local)(torch.zeros(48, 16 // mesh.size()), local._linear_mm_config, local._dtype)
    tensor = DTensor.from_local(part, mesh, [Shard(1)], run_check=False, shape=torch.Size((48, 16)), stride=(16, 1))
    tensor._local_tensor._precomputed_scale = torch.tensor(1.0)
    return tensor


def of_torchao(url: str, save: bool) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.float8
        import torchao.optim  # noqa: F401
    mesh = on_mesh()
    saved, saved_local = eight_bit(mesh, Shard(0), 1)
    weights = {"m": float8_weights(mesh, 1, 3.0), "own": float8_weights(mesh, 2, 4.0 + dist.get_rank())}
    refusals = []
    with Checkpointer(url) as ckpt:
        if save:
            ckpt.save(1, {"t": saved, **weights})
        for name, model in weights.items():
            new = float8_weights(mesh, 3, 1.0)
            local, expected = new[0].weight._local_tensor, model[0].weight._local_tensor
            assert type(local).__name__ == "WeightWithDynamicFloat8CastTensor"
            try:
                assert ckpt.restore({name: new}) == 1
            except StateMismatch as error:
                refusals.append(str(error).partition("\n")[2].strip())
            else:
                assert torch.equal(local._tensor, expected._tensor)
                assert torch.equal(local._precomputed_scale, expected._precomputed_scale)
        for name in weights:
            tensor = columns_of_float8(mesh)
            try:
                assert ckpt.restore({"w": tensor}, rename={f"{name}.0.weight": "w"}) == 1
            except StateMismatch as error:
                refusals.append(str(error).partition("\n")[2].strip())
            else:
                assert tensor._local_tensor._precomputed_scale.item() == 3
        for placement in (Shard(0), Shard(1)):
            tensor, local = eight_bit(mesh, placement, 5)
            before = local.scale.tolist()
            try:
                assert ckpt.restore({"t": tensor}) == 1
            except StateMismatch as error:
                refusals.append(str(error).partition("\n")[2].strip())
                assert local.scale.tolist() == before
            else:
                assert torch.equal(local.codes, saved_local.codes)
                assert torch.equal(local.scale, saved_local.scale)
    return refusals


def test_one_scale_for_all_reshards_with_its_tensor_and_others_go_back_to_their_own_box_or_nowhere(
    tmp_path: Path,
) -> None:
    pytest.importorskip("torchao")
    for refusals in ranks.run(2, of_torchao, str(tmp_path), True):  # refused only where sharded in another way
        assert [refusal.partition(":")[0] for refusal in refusals] == ["w", "t"]
        for refusal in refusals:
            assert ": parts of it are each rank's own, and belong to the boxes " in refusal
            assert "restore it with the placements and on the number of ranks it was saved with" in refusal
    assert fastckpt.open(str(tmp_path)).snapshot().keys() == [
        *("m.0.weight._precomputed_scale", "m.0.weight._tensor"),
        *("own.0.weight._precomputed_scale@0", "own.0.weight._precomputed_scale@1", "own.0.weight._tensor"),
        *("t.codes", "t.qmap", "t.scale@0", "t.scale@1"),
    ]
    (refusals,) = ranks.run(1, of_torchao, str(tmp_path), False)
    assert [refusal.partition(":")[0] for refusal in refusals] == ["own.0.weight", "w", "t", "t"]
    assert all("parts of it are each rank's own" in refusal for refusal in refusals)
