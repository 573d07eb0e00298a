"""One model in every layout a job may have: the same tensors by the same names, however they lie on the ranks.

What restores is compared with ``Trainee.whole``, which puts tensors together with torch's means alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - as everybody does
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastckpt

VOCABULARY = 11
CONTEXT = 5
WIDTH = 8
HEADS = 2
EXPERTS = 8

WORLDS = {
    "single": 1,
    "ddp": 4,
    "fsdp1": 4,
    "fsdp1 flat": 4,
    "fsdp2": 4,
    "hsdp": 4,
    "tp x fsdp": 4,
    "ep": 4,
    "ep dtensor": 4,
    "hsdp x tp": 8,
}
"""Ranks that a layout of a test has, unless the test says otherwise. "fsdp1 flat" is with ``use_orig_params=False``;
"ep" has its experts as plain parameters that the state declares to be a ``fastckpt.Shard``."""


class _Enter(torch.autograd.Function):
    """Where each rank of a group goes on to a share of the work: the gradients of all shares are added."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        context.group = group
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=context.group)
        return gradient, None


class _Leave(torch.autograd.Function):
    """Where the shares of all ranks of a group are added."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.join = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (of(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for of in (self.query, self.key, self.value))
        query, key, value = heads
        weights = (query @ key.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        return self.join((weights @ value).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    """All experts weighted by the router. A rank may hold a few of them, or a few of the hidden units of all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 3) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 3, WIDTH) / 3)
        self.first = 0
        """Of the experts that this rank holds."""
        self.group: dist.ProcessGroup | None = None
        """The ranks that hold them all together."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if self.group is not None:
            x, chosen = _Enter.apply(x, self.group), _Enter.apply(chosen, self.group)
        up, down = (each.to_local() if isinstance(each, DTensor) else each for each in (self.up, self.down))
        hidden = torch.relu(torch.einsum("btw,ewh->bteh", x, up))
        mine = chosen[..., self.first : self.first + len(up)]
        out = torch.einsum("bteh,ehw,bte->btw", hidden, down, mine)
        return out if self.group is None else _Leave.apply(out, self.group)


class Block(nn.Module):
    """Ten hidden units: five a tensor-parallel rank, which do not divide by two again. One gate: most have nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, 10), "down": nn.Linear(10, WIDTH)})
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts()
        self.gate = nn.Parameter(torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + F.dropout(self.attention(self.norm(x)), 0.1, self.training)
        x = x + self.mlp["down"](torch.relu(self.mlp["up"](x)))
        return x + self.gate * self.experts(x, self.router(x).softmax(-1))


class Low(nn.Module):
    """In bfloat16, all through training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.bfloat16()).float()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList([Block()])
        self.low = Low()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("scale", torch.rand(WIDTH))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        x = self.tokens(text) + self.positions(torch.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head((x + self.low(x)) * self.scale)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())


@dataclass
class Trainee:
    """A model and its optimizer in some layout."""

    kind: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data_rank: int
    """Which of the ``data_size`` shares of a batch this rank has."""
    data_size: int

    @property
    def state(self) -> dict[str, Any]:
        """What is saved and restored."""
        declared = {}
        if self.kind == "ep":
            for number, block in enumerate(self._net.blocks):
                for name in ("up", "down"):
                    mine = getattr(block.experts, name)
                    whole = (EXPERTS, *mine.shape[1:])
                    declared[f"{name} {number}"] = fastckpt.Shard(mine, (block.experts.first, 0, 0), whole)
        return {**declared, "model": self.model, "optimizer": self.optimizer}

    @property
    def _net(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def step(self, text: torch.Tensor) -> torch.Tensor:
        """One step of training on this rank's share of a batch; its loss."""
        self.optimizer.zero_grad()
        loss: torch.Tensor = self.model(text)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, steps: range) -> None:
        """Steps on data that depends on the step and the share alone."""
        for step in steps:
            generator = torch.Generator().manual_seed(1000 * step + self.data_rank)
            self.step(torch.randint(VOCABULARY, (2, CONTEXT), generator=generator))

    def whole(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state by name, put together from all ranks."""
        if isinstance(self.model, FullyShardedDataParallel):
            return self._whole_fsdp1()
        found: dict[str, torch.Tensor] = {}
        names = {}
        for name, parameter in self.model.named_parameters():
            names[parameter] = name.removeprefix("module.")
            found[names[parameter]] = parameter
        for name, buffer in self.model.named_buffers():
            found[name.removeprefix("module.")] = buffer
        for parameter, state in self.optimizer.state.items():
            found |= {f"{names[parameter]}/{entry}": value for entry, value in state.items()}
        return {name: self._gathered(name, tensor.detach()) for name, tensor in sorted(found.items())}

    def _gathered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor):
            return tensor.full_tensor()
        if self.kind == "ep" and ".experts." in name and tensor.ndim:
            parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, tensor)
            return torch.cat(parts)
        return tensor.clone()

    def _whole_fsdp1(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        with FullyShardedDataParallel.summon_full_params(self.model):
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                found[_unwrapped(name)] = tensor.detach().clone()
        if self.kind == "fsdp1":  # of these torch's own function returns one tensor's memory for another's
            names = {parameter: _unwrapped(name) for name, parameter in self.model.named_parameters()}
            states = {names[parameter]: state for parameter, state in self.optimizer.state.items()}
            everywhere: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, states)
            for name, entry in sorted(
                {(at, key) for part in everywhere for at, state in part.items() for key in state}
            ):
                parts = [part[name][entry] for part in everywhere if name in part]
                whole = torch.cat(parts).view(found[name].shape) if parts[0].ndim else parts[0]
                found[f"{name}/{entry}"] = whole
        else:
            gathered = FullyShardedDataParallel.optim_state_dict(self.model, self.optimizer)
            for name, state in gathered["state"].items():
                found |= {f"{name}/{entry}": value.clone() for entry, value in state.items()}
        return dict(sorted(found.items()))


def _unwrapped(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def build(kind: str, seed: int) -> Trainee:
    """A ``Net`` in one of the layouts of ``WORLDS``, on all ranks of the job. Other seeds, other values."""
    torch.manual_seed(seed)
    model, rank, size = _BUILDERS[kind](Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, foreach=False)
    return Trainee(kind, model, optimizer, rank, size)


def _whole(net: Net) -> tuple[nn.Module, int, int]:
    return net, 0, 1


def _ranks() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def _ddp(net: Net) -> tuple[nn.Module, int, int]:
    # Otherwise DDP lays out its buckets anew after the first step, and with them the order in which more than two ranks
    # are summed: a job that starts in the middle would differ from one that does not, in the last bit.
    return DistributedDataParallel(net, forward_sync_buffers=False, find_unused_parameters=True), *_ranks()


def _fsdp1(net: Net, use_orig_params: bool) -> tuple[nn.Module, int, int]:
    wrapped = FullyShardedDataParallel(
        net,
        auto_wrap_policy=ModuleWrapPolicy({Block, Low}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )
    return wrapped, *_ranks()


def _fully_shard(net: Net, **options: Any) -> nn.Module:
    for unit in (*net.blocks, net.low):
        fully_shard(unit, **options)
    return fully_shard(net, **options)


def _fsdp2(net: Net) -> tuple[nn.Module, int, int]:
    return _fully_shard(net), *_ranks()


def _hsdp(net: Net) -> tuple[nn.Module, int, int]:
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (2, half), mesh_dim_names=("copies", "parts"))
    return _fully_shard(net, mesh=mesh), *_ranks()


def _tensor_parallel(net: Net, mesh: Any) -> None:
    """Every dimension is cut somewhere: rows and columns of matrices, the hidden units of experts."""
    parallelize_module(
        net,
        mesh,
        {
            "tokens": RowwiseParallel(input_layouts=Replicate()),
            "positions": ColwiseParallel(output_layouts=Replicate()),
            "head": ColwiseParallel(output_layouts=Replicate()),
            **{f"blocks.*.attention.{name}": ColwiseParallel() for name in ("query", "key", "value")},
            "blocks.*.attention.join": RowwiseParallel(),
            "blocks.*.mlp.up": ColwiseParallel(),
            "blocks.*.mlp.down": RowwiseParallel(),
        },
    )
    for block in net.blocks:
        _distribute(block.experts, mesh, up=2, down=1)
    net.head.weight = net.tokens.weight


def _distribute(experts: Experts, mesh: Any, **dims: int) -> None:
    for name, dim in dims.items():
        whole = getattr(experts, name).detach()
        setattr(experts, name, nn.Parameter(distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)))
    experts.group = mesh.get_group()


def _tp_fsdp(net: Net) -> tuple[nn.Module, int, int]:
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (half, 2), mesh_dim_names=("dp", "tp"))
    _tensor_parallel(net, mesh["tp"])
    return _fully_shard(net, mesh=mesh["dp"]), mesh["dp"].get_local_rank(), half


def _hsdp_tp(net: Net) -> tuple[nn.Module, int, int]:
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("copies", "parts", "tp"))
    _tensor_parallel(net, mesh["tp"])
    return _fully_shard(net, mesh=mesh["copies", "parts"]), dist.get_rank() // 2, 4


def _ep(net: Net, as_dtensor: bool) -> tuple[nn.Module, int, int]:
    """All ranks see the same data. DDP keeps equal what is not the experts'."""
    rank, size = _ranks()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    for block in net.blocks:
        experts = block.experts
        if as_dtensor:
            _distribute(experts, mesh, up=0, down=0)
        else:
            experts.up, experts.down = (
                nn.Parameter(each.detach().chunk(size)[rank].clone()) for each in (experts.up, experts.down)
            )
            experts.group = mesh.get_group()
        experts.first = rank * (EXPERTS // size)
    ignored = [name for name, _ in net.named_parameters() if ".experts." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ignored)
    return DistributedDataParallel(net, forward_sync_buffers=False), 0, 1


_BUILDERS: Mapping[str, Any] = {
    "single": _whole,
    "ddp": _ddp,
    "fsdp1": functools.partial(_fsdp1, use_orig_params=True),
    "fsdp1 flat": functools.partial(_fsdp1, use_orig_params=False),
    "fsdp2": _fsdp2,
    "hsdp": _hsdp,
    "tp x fsdp": _tp_fsdp,
    "hsdp x tp": _hsdp_tp,
    "ep": functools.partial(_ep, as_dtensor=False),
    "ep dtensor": functools.partial(_ep, as_dtensor=True),
}
