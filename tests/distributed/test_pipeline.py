"""Ranks with different parameters and different optimizer state: pipeline stages, sharded optimizers, flat parameters.

What fits is judged by all ranks together, and parameters are found by name on whichever rank they were.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from jobs import prints, rank, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastckpt
from fastckpt import Checkpointer, Options, StateMismatch

pytestmark = pytest.mark.distributed

SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)
LAYERS = 4
Prints = dict[str, str]


class Layer(nn.Linear):
    """Says at every save what it has seen, as modules with an extra state do."""

    def __init__(self, number: int) -> None:
        super().__init__(3 + number, 4 + number)
        self.seen = number

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state


def stage(numbers: range, seed: int) -> nn.ModuleDict:
    """Some layers of the whole model; with the same seed each layer is the same wherever it is."""
    layers = {}
    for number in numbers:
        torch.manual_seed(100 * seed + number)
        layers[f"layer{number}"] = Layer(number)
    return nn.ModuleDict(layers)


def make(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    weights = [parameter for name, parameter in model.named_parameters() if name.endswith("weight")]
    return kind([{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.2}], lr=9.0)  # type: ignore[call-arg]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Gradients that depend on the step and the parameter alone, so that they are those of any other layout."""
    for step in steps:
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(step * 1000 + int(name.removeprefix("module.")[5]))
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Prints, dict[str, Any]]:
    """What this rank has, by name: tensors, and options and seen numbers."""
    tensors, rest = {}, {}
    for name, parameter in model.named_parameters():
        own = name.removeprefix("module.")
        tensors[own] = parameter.detach()
        tensors |= {f"{own}/{entry}": tensor for entry, tensor in optimizer.state[parameter].items()}
        (group,) = (g for g in optimizer.param_groups if any(parameter is each for each in g["params"]))
        rest[own] = group["lr"]
    rest |= {f"{name} has seen": module.seen for name, module in model.named_modules() if isinstance(module, Layer)}
    return prints(tensors), {name.removeprefix("module."): item for name, item in rest.items()}


def built(stages: int, seed: int, kind: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The stage of this rank, with data parallelism among the ranks of a stage."""
    world, per_stage = dist.get_world_size(), LAYERS // stages
    copies = world // stages
    groups = [dist.new_group([*range(at * copies, (at + 1) * copies)]) for at in range(stages)]
    at = rank() // copies
    model: nn.Module = stage(range(at * per_stage, (at + 1) * per_stage), seed)
    if copies > 1:
        model = DistributedDataParallel(model, process_group=groups[at])
    return model, make(kind, model)


def pipeline_leg(stages: int, number: int, folder: str, kinds: list[type[torch.optim.Optimizer]]) -> list[Any]:
    """Restores what the leg before saved, and saves; with every kind of optimizer. Returns what is on this rank."""
    found = []
    for kind in kinds:
        model, optimizer = built(stages, number, kind)
        state = {"model": model, "optimizer": optimizer}
        with Checkpointer(f"{folder}/{kind.__name__}", options=SMALL) as ckpt:
            if number:
                assert ckpt.restore(state) == number - 1
            else:
                for module in model.modules():
                    if isinstance(module, Layer):
                        module.seen += 10
                train(model, optimizer, range(3))
            found.append(whole(model, optimizer))
            ckpt.save(number, state)
    return found


def joined(found: list[list[Any]]) -> list[Any]:
    """What all ranks have together; ranks that have the same name must have the same under it."""
    result = []
    for each in zip(*found, strict=True):
        tensors, rest = {}, {}
        for own, other in each:
            assert all(tensors.get(name, text) == text for name, text in own.items())
            tensors |= own
            rest |= other
        result.append((tensors, rest))
    return result


def test_a_pipeline_restores_as_one_model_and_as_other_pipelines(tmp_path: Path) -> None:
    kinds = [torch.optim.AdamW, torch.optim.SGD]
    saved: list[Any] | None = None
    for number, (world, stages) in enumerate([(4, 2), (4, 1), (2, 2), (4, 4), (1, 1)]):
        now = joined(ranks.run(world, pipeline_leg, stages, number, str(tmp_path), kinds))
        assert saved in (None, now)
        saved = now
    assert saved is not None
    assert len(saved[0][0]) == LAYERS * 2 * 4
    assert saved[0][1]["layer3 has seen"] == 13
    assert {saved[1][1][f"layer{at}.{own}"] for at in range(LAYERS) for own in ("weight", "bias")} == {0.1, 0.2}


def meets_too_little(url: str) -> list[str]:
    """Both stages of two, but neither has the third layer; then it is there, but one stage has a layer too many."""
    texts = []
    for stages, extra in (([range(2), range(3, 4)], False), ([range(2), range(2, 4)], True)):
        model = stage(stages[rank()], seed=5)
        if extra and rank() == 1:
            model["more"] = nn.Linear(1, 1)
        optimizer = make(torch.optim.SGD, model)
        kept = prints(dict(model.named_parameters()))
        with Checkpointer(url, options=SMALL) as ckpt, pytest.raises(StateMismatch) as caught:
            ckpt.restore({"model": model, "optimizer": optimizer})
        assert prints(dict(model.named_parameters())) == kept
        texts.append(str(caught.value))
    return texts


def test_a_key_that_no_stage_has_is_a_mismatch_on_every_rank(tmp_path: Path) -> None:
    ranks.run(1, pipeline_leg, 1, 0, str(tmp_path), [torch.optim.SGD])
    missing, too_many = same(ranks.run(2, meets_too_little, f"{tmp_path}/SGD"))
    lines = missing.splitlines()[1:]
    assert [line.strip() for line in lines if line.endswith("in the snapshot but not in the state")] == [
        f"{name}: in the snapshot but not in the state"
        for name in (
            *("model.layer2._extra_state", "model.layer2.bias", "model.layer2.weight"),
            *("optimizer.param_groups.layer2.bias", "optimizer.param_groups.layer2.weight"),
        )
    ]
    assert "model.more.weight: in the state but not in the snapshot (on rank 1)" in too_many
    assert "layer2" not in too_many


# --- optimizers that share their state out --------------------------------------------------------------------------


def zero(seed: int) -> tuple[nn.Module, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(stage(range(LAYERS), seed))
    return model, ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1 * (seed + 1))


def sharded_optimizer_leg(kind: str, number: int, url: str) -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, optimizer = zero(number) if kind == "zero" else built(1, number, torch.optim.AdamW)
    if kind != "zero":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.7)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(url, options=SMALL) as ckpt:
        if number:
            assert ckpt.restore(state) == number - 1
        else:
            train(model, optimizer, range(2))
        inner = optimizer.optim if kind == "zero" else optimizer
        tensors = {name.removeprefix("module."): parameter.detach() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            kept = inner.state.get(parameter, {})
            tensors |= {f"{name.removeprefix('module.')}/{entry}": tensor for entry, tensor in kept.items()}
        own = sum(parameter in inner.state for parameter in model.parameters())
        ckpt.save(number, state)
        assert optimizer.param_groups[0]["lr"] == 0.1
        return [(prints(tensors), {"states": own})]


def test_a_zero_redundancy_optimizer_keeps_what_is_its_own_and_restores_anywhere(tmp_path: Path) -> None:
    saved = None
    for number, (kind, world) in enumerate([("zero", 2), ("zero", 2), ("ddp", 2), ("zero", 3)]):
        found = ranks.run(world, sharded_optimizer_leg, kind, number, str(tmp_path))
        counts = [one[0][1]["states"] for one in found]
        assert sum(counts) == (2 * LAYERS) * (1 if kind == "zero" else world)
        tensors = joined(found)[0][0]
        assert saved in (None, tensors)
        assert "layer3.weight/exp_avg" in tensors
        saved = tensors


# --- state beside distributed parameters ----------------------------------------------------------------------------


class Mixed(torch.optim.Optimizer):
    """For each parameter a nest of tensors: like the parameter, plain and equal, and plain and this rank's own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["nest"] = {"like": [torch.zeros_like(parameter)], "table": (torch.arange(5.0), 1)}
                state["table"] = torch.arange(7.0)
                if isinstance(parameter, DTensor):
                    state["nest"]["own"] = [torch.full((2 + rank(),), float(rank()))]
                    state["total"] = parameter.grad.sum().full_tensor()
                    state["count"] = distribute_tensor(torch.tensor(3.0), parameter.device_mesh)
            state["nest"]["like"][0].add_(parameter.grad)
            parameter.sub_(0.1 * state["nest"]["like"][0])


def mixed(kind: str, seed: int) -> tuple[nn.Module, Mixed]:
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, Mixed(model.parameters())


def mixed_prints(model: nn.Module, optimizer: Mixed) -> tuple[Prints, list[Any]]:
    tensors: dict[str, torch.Tensor] = {}
    own = []
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        like, short = state["nest"]["like"][0], name.removeprefix("module.")
        assert isinstance(like, DTensor) == isinstance(parameter, DTensor)
        assert type(state["table"]) is type(state["nest"]["table"][0]) is torch.Tensor
        if isinstance(parameter, DTensor):
            assert type(state["total"]) is torch.Tensor
            assert type(state["count"]) is DTensor
            tensors |= {f"{short}/total": state["total"], f"{short}/count": state["count"].full_tensor()}
        tensors |= {f"{short}/like": like.full_tensor() if isinstance(like, DTensor) else like}
        tensors |= {f"{short}/table": state["table"], f"{short}/nested": state["nest"]["table"][0]}
        own.append([tensor.tolist() for tensor in state["nest"].get("own", [])])
    return prints(tensors), own


def save_mixed(kind: str, url: str) -> tuple[Prints, list[Any]]:
    model, optimizer = mixed(kind, 1)
    for step in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer})
    return mixed_prints(model, optimizer)


def restore_mixed(kind: str, url: str) -> tuple[Prints, list[Any]] | str:
    model, optimizer = mixed(kind, 2)
    with Checkpointer(url, options=SMALL) as ckpt:
        try:
            ckpt.restore({"model": model, "optimizer": optimizer})
        except StateMismatch as error:
            assert optimizer.state == {}
            return str(error)
    return mixed_prints(model, optimizer)


def test_nested_state_of_distributed_parameters_reshards_and_what_is_a_ranks_own_goes_back_to_it(
    tmp_path: Path,
) -> None:
    fsdp, ddp = ranks.run(2, save_mixed, "fsdp", f"{tmp_path}/fsdp"), ranks.run(2, save_mixed, "ddp", f"{tmp_path}/ddp")
    assert fsdp[0][1] != fsdp[1][1]
    assert ranks.run(2, restore_mixed, "fsdp", f"{tmp_path}/fsdp") == fsdp
    refused = same(ranks.run(3, restore_mixed, "fsdp", f"{tmp_path}/fsdp"))
    assert "optimizer.state.0.weight.nest.own.0: each of the 2 ranks that saved it had its own" in refused
    assert ranks.run(2, restore_mixed, "ddp", f"{tmp_path}/ddp") == ddp
    assert ranks.run(1, restore_mixed, "plain", f"{tmp_path}/ddp") == ddp[:1]


def unequal(what: str, number: int, url: str) -> Any:
    """Ranks whose optimizers differ though their parameters do not: in an option, or in a number that is kept."""
    model = stage(range(1), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    state = {"model": model, "optimizer": optimizer}
    mine = optimizer.param_groups[0] if what == "options" else optimizer.state[model["layer0"].bias]
    with Checkpointer(url, options=SMALL) as ckpt:
        if number == 0:
            mine["lr"] = rank() + 1
            ckpt.save(0, state)
            return None
        try:
            ckpt.restore(state)
        except StateMismatch as error:
            return str(error).splitlines()[1:]
        mine = optimizer.param_groups[0] if what == "options" else optimizer.state[model["layer0"].bias]
        return mine["lr"]


@pytest.mark.parametrize("what", ["options", "state"])
def test_where_ranks_differ_each_has_its_own_back_and_another_number_of_ranks_is_refused(
    tmp_path: Path, what: str
) -> None:
    ranks.run(2, unequal, what, 0, str(tmp_path))
    assert ranks.run(2, unequal, what, 1, str(tmp_path)) == [1, 2]
    (lines,) = ranks.run(1, unequal, what, 1, str(tmp_path))
    assert len(lines) == 1
    assert f"optimizer: ranks saved different {what} for parameter layer0." in lines[0]


# --- flat parameters ------------------------------------------------------------------------------------------------


def save_for_flat(url: str) -> Prints:
    model = stage(range(2), 1)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tensors |= {f"{n}/{e}": t.clone() for n, p in model.named_parameters() for e, t in optimizer.state[p].items()}
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer}).wait()
        optimizer.state[model["layer1"].bias]["step"] += 1
        ckpt.save(2, {"model": model, "optimizer": optimizer}).wait()
        del optimizer.state[model["layer1"].bias]["exp_avg_sq"]
        ckpt.save(3, {"model": model, "optimizer": optimizer}).wait()
        optimizer.state[model["layer1"].bias]["exp_avg_sq"] = torch.zeros(2)
        ckpt.save(4, {"model": model, "optimizer": optimizer}).wait()
    return prints(tensors)


def into_flat(url: str) -> tuple[Prints, list[str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(stage(range(2), 3), device_id=torch.device("cpu"), use_orig_params=False)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    texts = []
    with Checkpointer(url, options=SMALL) as ckpt:
        for step in (2, 3, 4):
            with pytest.raises(StateMismatch) as caught:
                ckpt.restore(state, step=step)
            assert optimizer.state == {}
            texts.append(str(caught.value).splitlines()[1].strip())
        ckpt.restore(state, step=1)
        (kept,) = optimizer.state.values()
        assert kept["step"].item() == 2
        ckpt.save(5, state).wait()
        snapshot = ckpt.snapshots()[-1]
    found = {}
    for key in snapshot.keys():  # noqa: SIM118
        name, _, entry = key.removeprefix("optimizer.state.").removeprefix("model.").rpartition(".")
        own = f"{name}/{entry}" if key.startswith("optimizer") else f"{name}.{entry}"
        found[own.partition("@")[0]] = torch.from_numpy(snapshot.read(key).copy())
    return prints(found), texts


def test_a_flat_parameter_is_filled_piece_by_piece_and_has_one_counter_for_all(tmp_path: Path) -> None:
    (saved,) = ranks.run(1, save_for_flat, str(tmp_path))
    restored, texts = same(ranks.run(2, into_flat, str(tmp_path)))
    assert {name: restored[name] for name in saved} == saved
    counter, entries, shape = texts
    assert "layer1.bias.step: differs from optimizer.state.layer0.weight.step in the snapshot" in counter
    assert "layer0.weight and layer1.bias are one flat parameter in the state, but the snapshot has" in entries
    assert "layer1.bias.exp_avg_sq: of shape [2] in the snapshot, for a parameter of shape [5]" in shape
    assert fastckpt.open(str(tmp_path)).snapshot().step == 5
