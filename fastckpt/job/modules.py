"""The modules of a state: their parameters and buffers by name, wrappers left out, and where each lies on this rank."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._flat_param import FlatParameter
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastckpt.format.shard import Box
from fastckpt.job.dtensor import local_boxes
from fastckpt.job.fsdp1 import FlatPlace, Range, buffer_dtypes, check_not_stray, ranges
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

    @property
    def has_state(self) -> bool:
        """Whether an optimizer keeps anything for it on this rank. It keeps nothing, and a restore must leave it so,
        for a parameter that FSDP1 gives no gradient here, because none of its elements are here."""

    @property
    def boxes(self) -> list[Box] | None:
        """Which boxes of it this rank holds; None for all of it."""

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

    @property
    def has_state(self) -> bool:
        return True

    @property
    def boxes(self) -> list[Box] | None:
        return [box for box, _ in local_boxes(self.parameter, self.path)] if type(self.parameter) is DTensor else None

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

    @property
    def has_state(self) -> bool:
        return True

    @property
    def boxes(self) -> list[Box] | None:
        return [Box(tuple(self.shard.offsets), tuple(self.shard.tensor.shape))]

    def hold(self, key: str, tensor: torch.Tensor) -> Held:
        if tensor.shape != self.shard.tensor.shape:
            return hold(key, tensor, sharing=OWN)
        return hold_shard(key, Shard(tensor, self.shard.offsets, self.shard.shape))


def declared_shards(state: Mapping[str, Any]) -> Declared:
    """What the ``Shard`` items of a state say about tensors that may also be parameters of its modules."""
    return {memory(item.tensor): item for item in state.values() if isinstance(item, Shard)}


def places(root: nn.Module, declared: Declared) -> Iterator[tuple[torch.Tensor, Place]]:
    """Every parameter below ``root`` as an optimizer is given it, once for each of its names."""
    for visited in walk_modules(root):
        yield from _own_places(visited, declared)


def _own_places(visited: Visited, declared: Declared) -> Iterator[tuple[torch.Tensor, Place]]:
    for own, flat in visited.ranges.items():
        yield flat.parameter, FlatPlace(visited.prefix + own, flat)
    for own, parameter in visited.module._parameters.items():
        if parameter is not None and own not in visited.ranges and not isinstance(parameter, FlatParameter):
            path = visited.prefix + own
            yield parameter, _place(path, parameter, visited.replicas.of(path), declared)


def _place(path: str, parameter: torch.Tensor, among: tuple[int, ...], declared: Declared) -> Place:
    if (shard := _declared(parameter, declared)) is not None:
        return Boxed(path, shard)
    return Whole(path, parameter, among)


def _declared(tensor: torch.Tensor, declared: Declared) -> Shard | None:
    return declared.get(memory(tensor)) if declared and not isinstance(tensor, DTensor) else None


def describe_modules(name: str, root: nn.Module, declared: Declared) -> tuple[list[Held], dict[str, nn.Module]]:
    """The parameters and persistent buffers below a module, and the modules that have an extra state, by its key."""
    held: list[Held] = []
    extra: dict[str, nn.Module] = {}
    for visited in walk_modules(root):
        module, prefix = visited.module, f"{name}.{visited.prefix}"
        held += [place.hold(f"{name}.{place.path}", parameter) for parameter, place in _own_places(visited, declared)]
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                if (shard := _declared(buffer, declared)) is not None:
                    held.append(hold_shard(prefix + own, shard, volatile=True))
                    continue
                held.append(hold(prefix + own, buffer, sharing=LOWEST, volatile=True))
                if (dtype := visited.buffer_dtypes.get(visited.prefix + own)) is not None:
                    held[-1] = dataclasses.replace(held[-1], dtype=str(dtype).removeprefix("torch."))
        if has_extra_state(type(module)):
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
    module's name comes before it. A parameter in no module of the state has the name it has in the state itself; one
    that is nowhere in it is named by group and position.

    Parameters that a forward under FSDP2 left gathered are let go of.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        _let_go_of_gathered(state)
        self.declared = declared_shards(state)
        self._found: dict[int, tuple[str, dict[int, Place]]] = {}
        """By the id of a parameter: the module's name, and the places by their position in a flat parameter."""
        self._boxed: set[tuple[Any, ...]] = set()
        self._items: dict[int, str] = {}
        """By the id of a tensor of the state: its name."""
        for name, root in state.items():
            if isinstance(root, torch.Tensor | Shard):
                self._items.setdefault(id(root.tensor if isinstance(root, Shard) else root), name)
            if isinstance(root, nn.Module):
                for parameter, place in places(root, self.declared):
                    if isinstance(place, Boxed):
                        self._boxed.add(memory(parameter))
                    _, found = self._found.setdefault(id(parameter), (name, {}))
                    found.setdefault(place.range.position if isinstance(place, FlatPlace) else 0, place)

    def declares(self, shard: Shard) -> bool:
        """Whether a ``Shard`` item of the state says of a parameter of a module what it is."""
        return memory(shard.tensor) in self._boxed

    def of(self, optimizer: torch.optim.Optimizer) -> list[list[Owned]]:
        """For each parameter group its parameters."""
        groups = [group["params"] for group in optimizer.param_groups]
        modules = {self._found[id(each)][0] for group in groups for each in group if id(each) in self._found}

        def owned(number: int, position: int, parameter: torch.Tensor) -> Owned:
            if id(parameter) not in self._found:
                path = self._items.get(id(parameter), f"{number}.{position}")
                return Owned(parameter, ((path, _place(path, parameter, (), self.declared)),))
            module, found = self._found[id(parameter)]
            prefix = f"{module}." if len(modules) > 1 else ""
            return Owned(parameter, tuple((f"{prefix}{place.path}", place) for place in found.values()))

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


@dataclass(frozen=True)
class Visited:
    """A module that a walk has come to."""

    path: str
    """Wrappers left out."""
    module: nn.Module
    replicas: Replicas
    """What DDP keeps equal here."""
    ranges: Mapping[str, Range]
    """Of its parameters by name those that lie in the flat parameter of an FSDP1 unit."""
    buffer_dtypes: Mapping[str, torch.dtype]
    """By path, what dtype buffers had before FSDP1 lowered it for its computations: they are saved in that."""

    @property
    def prefix(self) -> str:
        """Of the paths of what the module has."""
        return f"{self.path}." if self.path else ""


def walk_modules(root: nn.Module) -> Iterator[Visited]:
    """Every module below ``root``, wrappers left out.

    A module reached by two paths comes twice: its tensors then are tied.
    """
    flat: dict[nn.Module, dict[str, Range]] = {}
    dtypes: dict[str, torch.dtype] = {}

    def visit(path: str, module: nn.Module, replicas: Replicas, in_unit: bool) -> Iterator[Visited]:
        while (inner := _unwrapped(module)) is not None:
            if isinstance(module, DistributedDataParallel):
                replicas = Replicas(kept_equal(module), path, frozenset(module.parameters_to_ignore))
            elif isinstance(module, FullyShardedDataParallel):
                in_unit = True
                for holder, own, part in ranges(path, module):
                    flat.setdefault(holder, {})[own] = part
                dtypes.update(buffer_dtypes(path, module))
            module = inner
        visited = Visited(path, module, replicas, flat.get(module, {}), dtypes)
        check_not_stray(path, module, visited.ranges, in_unit)
        yield visited
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(visited.prefix + name, child, replicas, in_unit)

    return visit("", root, Replicas(), False)


def _let_go_of_gathered(state: Mapping[str, Any]) -> None:
    """Has units of FSDP2 let go of parameters of the state that a forward without backward left gathered: an optimizer
    has the sharded ones. The unit may be above the modules of the state, or a wrapper."""
    if units := [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]:
        held = {module for item in state.values() if isinstance(item, nn.Module) for module in item.modules()}
        for unit in units:
            if not held.isdisjoint(unit.modules()):
                unit.reshard()


_EQUAL_HOOKS = frozenset({"default_hooks", "powerSGD_hook", "quantization_hooks", "mixed_precision_hooks"})
"""Modules of torch whose communication hooks give every rank the same gradients; local SGD, or a user's, may not."""


def kept_equal(module: DistributedDataParallel) -> tuple[int, ...]:
    """The ranks that DDP keeps equal; none if a communication hook does what nothing here knows of."""
    for hook, _ in module._comm_hooks:
        if getattr(hook, "__module__", "").rpartition(".")[2] not in _EQUAL_HOOKS:
            return ()
    return tuple(torch.distributed.get_process_group_ranks(module.process_group))


def has_extra_state(kind: type[nn.Module]) -> bool:
    """Whether modules of a type have something to say beside their tensors."""
    return kind.get_extra_state is not nn.Module.get_extra_state


def _unwrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, told by the wrapper's type; None for a module that is no wrapper."""
    name = inner_name(type(module))
    inner = None if name is None else getattr(module, name)
    return inner if isinstance(inner, nn.Module) else None


def inner_name(kind: type[nn.Module]) -> str | None:
    """Under which attribute a wrapper has what it wraps; None for types that are no wrappers."""
    if issubclass(kind, DistributedDataParallel | nn.DataParallel):
        return "module"
    if issubclass(kind, FullyShardedDataParallel):
        return "_fsdp_wrapped_module"
    if issubclass(kind, ActivationWrapper):
        return "_checkpoint_wrapped_module"
    # What torch.compile makes, if anybody has called it: asking torch for the type would import the whole compiler.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    return "_orig_mod" if compiler is not None and issubclass(kind, compiler.OptimizedModule) else None
