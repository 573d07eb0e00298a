"""What a state is described as: keys, ties, wrappers; and what is refused, by key and with a way out."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import fastckpt
from fastckpt import Checkpointer, Shard, Snapshot


def saved(state: dict[str, Any]) -> Snapshot:
    url = f"memory://{secrets.token_hex(8)}"
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state)
    return fastckpt.open(url).snapshot()


def refused(state: dict[str, Any]) -> str:
    with Checkpointer(f"memory://{secrets.token_hex(8)}") as ckpt:
        with pytest.raises((TypeError, ValueError)) as caught:
            ckpt.save(1, state)
        assert ckpt.snapshots() == []
        ckpt.save(1, {}).wait()
    assert type(caught.value) in (TypeError, ValueError)
    return str(caught.value)


class OwnTensor(torch.Tensor):
    """Does not say what plain tensors it is made of."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


REFUSED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "meta": (lambda: torch.ones(3, device="meta"), "on the meta device; materialise it first"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "of layout torch.sparse_coo; save its indices and values"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "of layout torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "of layout torch.jagged",
    ),
    "quantized": (quantized, "quantized"),
    "a subclass": (lambda: torch.ones(3).as_subclass(OwnTensor), "OwnTensor; save the plain tensors it is made of"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_tensor_that_is_no_plain_array_is_refused_wherever_it_is(kind: str) -> None:
    make, reason = REFUSED[kind]
    assert refused({"t": make()}).startswith("t: cannot save a tensor ")
    assert reason in refused({"t": make()})
    module = nn.Sequential(nn.Identity())
    module[0].register_buffer("odd", make())
    assert refused({"model": module}).startswith("model.0.odd: cannot save a tensor ")
    assert refused({"loader": {"a": [make()]}}).startswith("loader['a'][0]: ")
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    optimizer.state[optimizer.param_groups[0]["params"][1]]["odd"] = make()
    assert refused({"optimizer": optimizer}).startswith("optimizer.state.0.1.odd: cannot save a tensor ")


def test_an_uninitialized_lazy_parameter_is_refused_by_name() -> None:
    assert refused({"model": nn.LazyLinear(3)}).startswith("model.weight: cannot save a tensor")


def test_a_partial_dtensor_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
        assert refused({"sums": partial}).startswith("sums: a Partial DTensor holds sums not yet made")
        whole = partial.redistribute(placements=[torch.distributed.tensor.Replicate()])
        assert saved({"sums": whole}).read("sums").tolist() == [1, 1, 1]
        text = refused({"x": Shard(whole, offsets=(0,), shape=(3,))})
        assert text.startswith("x: a Shard of a DTensor; a DTensor knows its own boxes")
    finally:
        dist.destroy_process_group()
    assert not os.environ.get("WORLD_SIZE")


def test_names_that_would_be_mixed_up_are_refused() -> None:
    assert refused({"m": nn.Linear(2, 2), "m.weight": torch.ones(2)}).startswith(
        "m.weight: two things in the state have this key"
    )
    assert "names in the state are non-empty strings" in refused({"": 1})


def test_column_views_of_one_matrix_are_tensors_of_their_own() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    snapshot = saved({"left": matrix[:, :2], "right": matrix[:, 2:]})
    assert snapshot.read("left").tolist() == matrix[:, :2].tolist()
    assert snapshot.read("right").tolist() == matrix[:, 2:].tolist()


@pytest.mark.parametrize(
    "views",
    [
        lambda m: (m[:, :3], m[:, 2:]),
        lambda m: (m[:2], m[1:]),
        lambda m: (m, m.view(torch.int32)),
        lambda m: (m, m.t()),
        lambda m: (m, m.flatten()[1:2]),
    ],
    ids=["columns", "rows", "another dtype", "transposed", "one element"],
)
def test_views_that_share_part_of_their_memory_are_refused_naming_both(
    views: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    one, other = views(torch.arange(12.0).reshape(3, 4))
    text = refused({"one": one, "other": other, "apart": torch.ones(2)})
    assert "share part of their memory" in text
    assert "one" in text.split("share")[0]
    assert "other" in text.split("share")[0]
    assert "clone it" in text


def test_the_same_tensor_under_several_names_is_stored_once() -> None:
    tensor = torch.randn(100)
    snapshot = saved({"a": tensor, "b": tensor, "c": tensor.view(100)})
    assert snapshot.keys() == ["a", "b", "c"]
    assert snapshot.layout.bytes() == 400
    assert snapshot.read("c").tolist() == tensor.tolist()


def test_empty_tensors_and_scalars_have_their_shape() -> None:
    state = {"none": torch.zeros(0), "flat": torch.zeros(3, 0, 2), "scalar": torch.tensor(5), "one": torch.ones(1, 1)}
    snapshot = saved(state)
    for key, tensor in state.items():
        assert snapshot.read(key).shape == tuple(tensor.shape)
        assert snapshot.read(key).tolist() == tensor.tolist()


def test_keys_are_the_names_of_the_modules_without_their_wrappers() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    inner.register_buffer("scratch", torch.ones(2), persistent=False)
    plain = saved({"model": inner}).keys()
    assert plain == [
        *("model.0.bias", "model.0.weight", "model.1.bias", "model.1.num_batches_tracked"),
        *("model.1.running_mean", "model.1.running_var", "model.1.weight"),
    ]
    assert saved({"model": torch.compile(inner, backend="eager")}).keys() == plain
    wrapped = nn.Sequential(checkpoint_wrapper(inner[0]), torch.compile(inner[1], backend="eager"))
    assert saved({"model": wrapped}).keys() == plain


def test_a_module_whose_own_names_look_like_wrappers_keeps_them() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(1, 1)
            self._orig_mod = nn.Linear(1, 1)

    keys = saved({"model": Odd()}).keys()
    assert keys == ["model._orig_mod.bias", "model._orig_mod.weight", "model.module.bias", "model.module.weight"]


def test_a_buffer_by_its_own_class_is_an_ordinary_buffer() -> None:
    module = nn.Module()
    module.table = nn.Buffer(torch.ones(3))
    module.scratch = nn.Buffer(torch.ones(3), persistent=False)
    assert saved({"model": module}).keys() == ["model.table"]


def test_optimizer_state_is_named_after_the_parameters_of_the_same_state() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)

    def keys(optimizer: torch.optim.Optimizer, **modules: nn.Module) -> list[str]:
        for parameter in (*model.parameters(), *other.parameters()):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return [key for key in saved({**modules, "o": optimizer}).keys() if key.startswith("o.")]  # noqa: SIM118

    def sgd(*parameters: nn.Parameter) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    assert keys(sgd(*model.parameters()), model=model) == [
        "o.state.bias.momentum_buffer",
        "o.state.weight.momentum_buffer",
    ]
    assert keys(sgd(model.weight, other.weight), a=model, b=other) == [
        "o.state.a.weight.momentum_buffer",
        "o.state.b.weight.momentum_buffer",
    ]
    assert keys(sgd(model.weight, other.weight)) == ["o.state.0.0.momentum_buffer", "o.state.0.1.momentum_buffer"]


def test_shards_of_one_rank_must_hold_the_whole_tensor() -> None:
    half = torch.ones(2, 3)
    text = refused({"x": Shard(half, offsets=(0, 0), shape=(4, 3))})
    assert text.startswith("x: ranks hold 6 of the 12 elements")
    with pytest.raises(ValueError, match="Shard"):
        Shard(half, offsets=(3, 0), shape=(4, 3))
    with pytest.raises(ValueError, match="Shard"):
        Shard(half, offsets=(0,), shape=(4, 3))
    assert saved({"x": Shard(half, offsets=(0, 0), shape=(2, 3))}).read("x").shape == (2, 3)


def test_describing_takes_no_step_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    steps: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    random = torch.get_rng_state()
    saved({"model": model, "optimizer": optimizer, "numpy": np.arange(3)})
    assert steps == []
    assert optimizer.state == {}
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == before
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
