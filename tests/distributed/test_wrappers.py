"""Wrappers around a model change no name, and what FSDP2 keeps elsewhere or in full precision resumes to the bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from jobs import prints
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastckpt import Checkpointer, Options

pytestmark = pytest.mark.distributed

SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)


class Net(nn.Module):
    """Its own modules have the names that wrappers give to what they wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 4)
        self._orig_mod = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self._fsdp_wrapped_module = nn.Linear(4, 4)
        self._checkpoint_wrapped_module = nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self._orig_mod(self.module(x)))
        return self._checkpoint_wrapped_module(self._fsdp_wrapped_module(x))


def compiled(module: nn.Module) -> nn.Module:
    wrapper: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    assert wrapper is not module
    return wrapper


def sharded(module: nn.Module, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True, **options)


def inside(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def apply(net: nn.Module) -> nn.Module:
        net.module, net._orig_mod = wrap(net.module), wrap(net._orig_mod)
        return net

    return apply


WRAPPERS: dict[str, list[Callable[[nn.Module], nn.Module]]] = {
    "compiled": [compiled],
    "parts compiled and checkpointed": [inside(checkpoint_wrapper), inside(compiled), checkpoint_wrapper],
    "offloaded": [inside(offload_wrapper), offload_wrapper],
    "data parallel": [nn.DataParallel, compiled],
    "ddp of compiled": [compiled, DistributedDataParallel],
    "compiled ddp of checkpointed": [inside(checkpoint_wrapper), DistributedDataParallel, compiled],
    "fsdp2 of compiled and checkpointed": [inside(checkpoint_wrapper), inside(compiled), fully_shard],
    "compiled fsdp2": [inside(fully_shard), fully_shard, compiled],
    "fsdp1 of checkpointed": [inside(checkpoint_wrapper), inside(sharded), sharded],
    "checkpointed fsdp1 of compiled": [compiled, sharded, checkpoint_wrapper],
    "compiled fsdp1": [inside(sharded), sharded, compiled],
}


def wrap_all(url: str) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    expected = prints(dict(Net().state_dict()))
    for number, (kind, wrappers) in enumerate(WRAPPERS.items()):
        torch.manual_seed(1)
        model: nn.Module = Net()
        for wrap in wrappers:
            model = wrap(model)
        with Checkpointer(f"{url}/{number}", options=SMALL) as ckpt:
            ckpt.save(1, {"model": model})
            plain = Net()
            assert ckpt.restore({"model": plain}) == 1
            assert prints(dict(plain.state_dict())) == expected, kind
            with torch.no_grad():
                model.eval()(torch.ones(2, 3))  # what is compiled is compiled now
            assert ckpt.restore({"model": model}) == 1
            assert torch.equal(model.eval()(torch.ones(2, 3)), plain.eval()(torch.ones(2, 3))), kind


def test_no_wrapper_changes_a_name_and_no_module_loses_its_own(tmp_path: Path) -> None:
    ranks.run(2, wrap_all, str(tmp_path))


def averages(url: str) -> None:
    torch.manual_seed(1)
    net = nn.Linear(2, 2)
    averaged = AveragedModel(net)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"average": averaged})
        n_averaged, weight = torch.tensor(7), torch.zeros(2, 2)
        ckpt.restore({"module": net}, rename={"average.module.": "module."}, only=("module.*",))
        ckpt.restore({"average.n_averaged": n_averaged, "average.module.weight": weight})
    assert n_averaged == 0
    assert torch.equal(weight, net.weight)


def test_an_averaged_model_is_no_wrapper(tmp_path: Path) -> None:
    ranks.run(1, averages, str(tmp_path))


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    options: dict[str, Any] = {}
    if "offloaded" in kind:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if "mixed" in kind:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if kind != "plain":
        fully_shard(net[0], **options)
        fully_shard(net, **options)
    return net, torch.optim.AdamW(net.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(torch.full((2, 3), 1.0 + step)).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    found = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for number, parameter in enumerate(model.parameters()):
        found |= {f"{number}.{entry}": tensor for entry, tensor in optimizer.state[parameter].items()}
    return prints({k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in found.items()})


def resumes(url: str) -> None:
    for kind in ("offloaded", "mixed", "offloaded mixed"):
        model, optimizer = build(kind, seed=1)
        with Checkpointer(f"{url}/{kind}", options=SMALL) as ckpt:
            train(model, optimizer, range(2))
            ckpt.save(2, {"model": model, "optimizer": optimizer}).wait()
            saved = whole(model, optimizer)
            train(model, optimizer, range(2, 4))
            expected = whole(model, optimizer)
            model, optimizer = build(kind, seed=2)
            with torch.no_grad():
                model(torch.ones(2, 3))  # and no backward: parameters stay gathered, in low precision
            ckpt.restore({"model": model, "optimizer": optimizer})
            assert whole(model, optimizer) == saved, kind
            train(model, optimizer, range(2, 4))
            assert whole(model, optimizer) == expected, kind
            plain, plain_optimizer = build("plain", seed=3)
            ckpt.restore({"model": plain, "optimizer": plain_optimizer})
            assert whole(plain, plain_optimizer) == saved, kind


def test_offloaded_and_mixed_precision_fsdp2_resumes_exactly_in_full_precision(tmp_path: Path) -> None:
    ranks.run(2, resumes, str(tmp_path))


def parts_of_a_unit(url: str) -> list[list[str]]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(fully_shard(model, reshard_after_forward=False).parameters(), foreach=False)
    state = {"body": model[0], "head": model[1], "optimizer": optimizer}
    inputs = torch.ones(1, 4)
    model(inputs).sum().backward()
    optimizer.step()
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, state).wait()
        with torch.no_grad():
            model(inputs)
        ckpt.save(2, state).wait()
        with torch.no_grad():
            model(inputs)
        assert ckpt.restore(state, only=["head", "optimizer"]) == 2
        return [snapshot.keys() for snapshot in ckpt.snapshots()]


def test_what_a_unit_left_gathered_that_is_not_in_the_state_is_let_go_of(tmp_path: Path) -> None:
    before, after = ranks.run(2, parts_of_a_unit, str(tmp_path))[0]
    assert "optimizer.state.head.weight.exp_avg" in before
    assert after == before
