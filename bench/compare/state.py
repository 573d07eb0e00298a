"""What the benchmarks save: the state of a training job, of any size and never round.

Parameters of random sizes with two moments each, in two optimizers; float32 and bfloat16, an int64 and a bool buffer,
0-d and zero-size tensors, and a loader that is a ``Stateful``. On several ranks every parameter is a DTensor, sharded
in rows, as FSDP2 leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from blake3 import blake3
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bench.compare.harness import world

BFLOAT16_EVERY = 7
BUFFER_ELEMENTS = 100_003


class Loader:
    """A data loader's position: values and a tensor of its own."""

    def __init__(self) -> None:
        self.order = torch.randperm(40_009)
        self.position = 17

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position, "epoch": 3}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]


class State:
    """Parts of a training job by name; each has ``state_dict`` and ``load_state_dict``."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.parts = parts

    def state_dicts(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dicts(self, saved: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """This rank's tensors by name, shards of what is sharded; they share memory with the state."""
        return dict(_tensors(self.state_dicts(), ""))

    def bytes(self) -> int:
        """On this rank."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def digest(self) -> str:
        """Of every byte of every tensor of this rank."""
        hasher = blake3(max_threads=blake3.AUTO)
        for name, tensor in sorted(self.tensors().items()):
            hasher.update(name.encode())
            if tensor.numel():
                hasher.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return hasher.hexdigest()

    def clear(self) -> None:
        for tensor in self.tensors().values():
            tensor.zero_()


def random_state(size: int, parameters: int) -> State:
    """About ``size`` bytes over all ranks, in ``parameters`` parameters and what goes with them; the same in every
    process of the same world."""
    ranks, rank = world()
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(parameters, generator=generator).add_(0.1)
    weights /= weights.sum()
    content = torch.Generator().manual_seed(11 + rank)
    mesh = init_device_mesh("cpu", (ranks,)) if ranks > 1 else None

    def filled(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        if mesh is None:
            return torch.empty(rows, columns, dtype=dtype).normal_(generator=content)
        each = -(-rows // ranks)
        mine = max(0, min(each, rows - rank * each))
        local = torch.empty(mine, columns, dtype=dtype).normal_(generator=content)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=(rows, columns), stride=(columns, 1))

    module = torch.nn.Module()
    optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(()))]) for _ in range(2)]
    for optimizer in optimizers:
        optimizer.param_groups[0]["params"].clear()
    for number in range(parameters):
        dtype = torch.bfloat16 if number % BFLOAT16_EVERY == 3 else torch.float32
        columns = int(torch.randint(5, 700, (), generator=generator))
        rows = max(1, int(size * float(weights[number]) / (3 * dtype.itemsize * columns)))
        if number == 1:
            rows = 0
        parameter = torch.nn.Parameter(filled(rows, columns, dtype))
        module.register_parameter(f"weight_{number}", parameter)
        optimizer = optimizers[number % 2]
        optimizer.param_groups[0]["params"].append(parameter)
        optimizer.state[parameter] = {
            "step": torch.tensor(float(number)),
            "exp_avg": filled(rows, columns, dtype),
            "exp_avg_sq": filled(rows, columns, dtype),
        }
    shared = torch.Generator().manual_seed(3)  # what is not sharded is equal on all ranks
    module.register_buffer("counts", torch.randint(0, 2**40, (BUFFER_ELEMENTS,), generator=shared))
    module.register_buffer("mask", torch.rand(BUFFER_ELEMENTS, generator=shared) > 0.5)
    module.register_buffer("scale", torch.tensor(0.25))
    torch.manual_seed(7)
    return State({"model": module, "optimizer": optimizers[0], "second_optimizer": optimizers[1], "loader": Loader()})


def local(value: Any) -> Any:
    """``value`` with every DTensor in it replaced by this rank's shard."""
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, Mapping):
        return {key: local(item) for key, item in value.items()}
    if isinstance(value, list):
        return [local(item) for item in value]
    return value


def _tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, local(value.detach())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}" if name else str(key))


def total(number: int) -> int:
    """The sum over all ranks."""
    summed = torch.tensor(number)
    if world()[0] > 1:
        dist.all_reduce(summed)
    return int(summed)
