"""The modules of a state: their parameters and buffers by name, wrappers left out, and where each lies on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastckpt.job.tensors import Held, Shard, hold, hold_shard, memory
from fastckpt.plan.save_plan import COMPARED, KNOWN, LOWEST, OWN

Declared: TypeAlias = Mapping[tuple[Any, ...], Shard]
"""The boxes that the state declares its tensors to be, by ``memory``."""


class Place(Protocol):
    """Where the elements of one parameter lie on this rank, be it the parameter itself or what an optimizer keeps."""

    @property
    def path(self) -> str:
        """Its name in its module, wrappers left out."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""

    def hold(self, key: str, tensor: torch.Tensor) -> Held:
        """``tensor``, which is the parameter or a state tensor kept for it, as this rank holds it under ``key``."""


@dataclass(frozen=True)
class Whole:
    """A parameter that is a tensor, plain or distributed."""

    path: str
    parameter: torch.Tensor
    among: tuple[int, ...]
    """Ranks known to hold it equal; none if nothing is known."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.parameter.shape)

    def hold(self, key: str, tensor: torch.Tensor) -> Held:
        # What is kept for the local part of a distributed tensor, such as a step counter, need not be equal elsewhere.
        unknown = OWN if isinstance(self.parameter, DTensor) else COMPARED
        return hold(key, tensor, sharing=KNOWN if self.among else unknown, among=self.among)


@dataclass(frozen=True)
class Boxed:
    """A parameter that the state declares to be a box of a larger tensor."""

    path: str
    shard: Shard

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.shard.shape)

    def hold(self, key: str, tensor: torch.Tensor) -> Held:
        if tensor.shape != self.shard.tensor.shape:
            return hold(key, tensor, sharing=OWN)
        return hold_shard(key, Shard(tensor, self.shard.offsets, self.shard.shape))


def declared_shards(state: Mapping[str, Any]) -> Declared:
    """What the ``Shard`` items of a state say about tensors that may also be parameters of its modules."""
    return {memory(item.tensor): item for item in state.values() if isinstance(item, Shard)}


def places(root: nn.Module, declared: Declared) -> Iterator[tuple[nn.Parameter, Place]]:
    """Every parameter below ``root``, once for each of its names."""
    for path, module, replicas in walk_modules(root):
        for own, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{path}.{own}" if path else own
                yield parameter, _place(full, parameter, replicas.of(full), declared)


def _place(path: str, parameter: torch.Tensor, among: tuple[int, ...], declared: Declared) -> Place:
    if declared and not isinstance(parameter, DTensor) and (shard := declared.get(memory(parameter))) is not None:
        return Boxed(path, shard)
    return Whole(path, parameter, among)


def describe_modules(name: str, root: nn.Module, declared: Declared) -> tuple[list[Held], dict[str, nn.Module]]:
    """The parameters and persistent buffers below a module, and the modules that have an extra state, by its key."""
    held = [place.hold(f"{name}.{place.path}", parameter) for parameter, place in places(root, declared)]
    extra: dict[str, nn.Module] = {}
    for path, module, _ in walk_modules(root):
        prefix = f"{name}.{path}." if path else f"{name}."
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                held.append(hold(prefix + own, buffer, sharing=LOWEST, volatile=True))
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra[f"{prefix}_extra_state"] = module
    return held, extra


@dataclass(frozen=True)
class Owned:
    """A parameter of an optimizer, by the names its state is kept under."""

    parameter: torch.Tensor
    places: tuple[tuple[str, Place], ...]
    """Name and place; several where one tensor of the optimizer holds several parameters of a module."""


class Parameters:
    """The parameters an optimizer works on, by the names they have in the modules of the same state.

    The name is the parameter's name in its module; where an optimizer works on several modules of the state, the
    module's name comes before it; a parameter in no module of the state is named by group and position.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.declared = declared_shards(state)
        self._found: dict[int, tuple[str, list[Place]]] = {}
        for name, root in state.items():
            if isinstance(root, nn.Module):
                for parameter, place in places(root, self.declared):
                    self._found.setdefault(id(parameter), (name, [place]))

    def of(self, optimizer: torch.optim.Optimizer) -> list[list[Owned]]:
        """For each parameter group its parameters."""
        groups = [group["params"] for group in optimizer.param_groups]
        modules = {self._found[id(each)][0] for group in groups for each in group if id(each) in self._found}

        def owned(number: int, position: int, parameter: torch.Tensor) -> Owned:
            if id(parameter) not in self._found:
                path = f"{number}.{position}"
                return Owned(parameter, ((path, _place(path, parameter, (), self.declared)),))
            module, found = self._found[id(parameter)]
            prefix = f"{module}." if len(modules) > 1 else ""
            return Owned(parameter, tuple((f"{prefix}{place.path}", place) for place in found))

        return [
            [owned(number, position, parameter) for position, parameter in enumerate(group)]
            for number, group in enumerate(groups)
        ]


@dataclass(frozen=True)
class Replicas:
    """The ranks DDP keeps parameters equal on, except those it was told to ignore."""

    ranks: tuple[int, ...] = ()
    root: str = ""
    """Path of the module that DDP wraps."""
    ignored: frozenset[str] = frozenset()

    def of(self, path: str) -> tuple[int, ...]:
        """The ranks that are known to hold the parameter at ``path`` equal; none if nothing is known."""
        own = path.removeprefix(f"{self.root}.") if self.root else path
        return () if own in self.ignored else self.ranks


def walk_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module, Replicas]]:
    """Every module below ``root`` with its path, wrappers left out, and what DDP keeps equal there.

    A module reached by two paths comes twice: its tensors then are tied.
    """

    def visit(path: str, module: nn.Module, replicas: Replicas) -> Iterator[tuple[str, nn.Module, Replicas]]:
        while (inner := _unwrapped(module)) is not None:
            if isinstance(module, DistributedDataParallel):
                ranks = tuple(torch.distributed.get_process_group_ranks(module.process_group))
                replicas = Replicas(ranks, path, frozenset(module.parameters_to_ignore))
            module = inner
        if isinstance(module, FullyShardedDataParallel):
            raise TypeError(
                f"{path or 'the module'}: FSDP1 (FullyShardedDataParallel) is not supported yet; use "
                "torch.distributed.fsdp.fully_shard, whose snapshots any layout can restore"
            )
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without backward the parameters still are the gathered ones
        yield path, module, replicas
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(f"{path}.{name}" if path else name, child, replicas)

    return visit("", root, Replicas())


def _unwrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, told by the wrapper's type; None for a module that is no wrapper."""
    inner: Any = None
    if isinstance(module, DistributedDataParallel):
        inner = module.module
    elif isinstance(module, ActivationWrapper):
        inner = module._checkpoint_wrapped_module
    elif isinstance(module, torch._dynamo.OptimizedModule):
        inner = module._orig_mod
    return inner if isinstance(inner, nn.Module) else None
