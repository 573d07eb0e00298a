"""What the jobs of these tests train and compare: a model that is awkward to shard, fingerprints of whole states."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

WIDTH = 6


class Block(nn.Module):
    """A unit inside a unit. Five rows do not divide by two, three or four; one row leaves most ranks with nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 5)
        self.down = nn.Linear(5, WIDTH, bias=False)
        self.gate = nn.Parameter(torch.rand(1))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gate * self.norm(self.down(torch.relu(self.up(x))))


class Net(nn.Module):
    """Mixed precision, a frozen parameter, and buffers of many dtypes, 0-d and empty ones included."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.low = nn.Linear(WIDTH, 3, dtype=torch.bfloat16)
        self.frozen = nn.Parameter(torch.rand(7, 2), requires_grad=False)
        self.register_buffer("count", torch.tensor(int(torch.randint(1 << 40, ()))))
        self.register_buffer("mask", torch.rand(11) > 0.5)
        self.register_buffer("phase", torch.randn(3, 2, dtype=torch.complex64))
        self.register_buffer("table", torch.randn(2, 3).half())
        self.register_buffer("scale", torch.rand(()))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("scratch", torch.rand(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.low(x.bfloat16()).float() + self.frozen.sum()


def build(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A ``Net`` with its optimizer: "plain", "ddp", "fsdp" or "hsdp". Equal on all ranks; other seeds, other values."""
    torch.manual_seed(seed)
    model: nn.Module = Net()
    if kind == "ddp":
        model = DistributedDataParallel(model, broadcast_buffers=False)
    if kind in ("fsdp", "hsdp"):
        shape = (2, 2) if kind == "hsdp" else (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "parts")[-len(shape) :])
        for block in (*model.blocks, model.low):  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    """Steps on data that depends on the step alone."""
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of the state by name, gathered from all ranks: with torch's means alone."""
    found: dict[str, torch.Tensor] = {}
    names = {}
    for name, parameter in model.named_parameters():
        names[parameter] = name.removeprefix("module.")
        found[names[parameter]] = parameter.detach()
    for name, buffer in model.named_buffers():
        found[name.removeprefix("module.")] = buffer
    found.pop("scratch", None)
    for parameter, state in optimizer.state.items() if optimizer else ():
        found |= {f"{names[parameter]}/{entry}": value for entry, value in state.items()}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in sorted(found.items())
    }


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def prints(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Dtype, shape and hash of the bytes of each tensor."""
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(raw(tensor)).hexdigest()[:16]}"
        for name, tensor in tensors.items()
    }


def same(results: list[Any]) -> Any:
    """What every rank returned, once."""
    assert all(result == results[0] for result in results), results
    return results[0]


def rank() -> int:
    return dist.get_rank()
