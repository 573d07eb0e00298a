"""What the user's state holds: names, shapes and boxes of its tensors as they lie on this rank, and its plain values.

Describing only looks. It takes no optimizer step, runs no collective and copies no tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fastckpt.job.aliases import find_aliases
from fastckpt.job.modules import Parameters, describe_modules
from fastckpt.job.optimizer import describe_optimizer, with_options
from fastckpt.job.outline import Outline, make_outline
from fastckpt.job.per_rank import PerRank
from fastckpt.job.rng import RNGState
from fastckpt.job.survey import Survey, tensor_forms
from fastckpt.job.tensors import Held, Shard, hold, hold_shard
from fastckpt.job.values import NamedTensors, to_plain
from fastckpt.plan.save_plan import KNOWN, OWN


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state: schedulers, data loaders, samplers, scalers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True)
class Description:
    """The state of this rank at one moment."""

    outline: Outline
    views: list[torch.Tensor]
    """The live memory of the elements, as ``outline`` numbers it."""
    values: dict[str, object]
    """Trees that ``format/value.py`` can encode."""
    optimizers: list[torch.optim.Optimizer]
    mesh: DeviceMesh | None


class Describer:
    """Describes a state for one save after another.

    What was found of modules, tensors and optimizers is used again as long as a ``Survey`` finds the same; values are
    read each time. Between saves it keeps no tensor. Not for several threads at once.
    """

    def __init__(self, copy: Sequence[str] = ()) -> None:
        """``copy``: globs of keys whose tensors are copied before ``save`` returns."""
        self._copy = copy
        self._known: _Known | None = None

    def describe(self, state: Mapping[str, Any]) -> Description:
        """``ValueError`` or ``TypeError`` naming the key of anything that cannot be saved."""
        for name in state:
            if not isinstance(name, str) or not name:
                raise TypeError(f"names in the state are non-empty strings, not {name!r}")
        known, self._known = self._known, None
        survey = Survey(state)
        facts = survey.facts()
        walk = _Walk(state) if known is None or facts is None or known.facts != facts else None
        fixed = known.fixed if known is not None and walk is None else (walk := walk or _Walk(state)).fixed()
        values, tensors = _read_values(state, fixed, iter(survey.extra))
        # Where they are does not matter, but whether there is another tensor.
        memory, forms = tensor_forms([tensor for _, tensor in tensors], pointers=False)
        memory = [*survey.tensors, *memory]
        forms = None if forms is None else [[key for key, _ in tensors], _ties(memory, len(survey.tensors)), *forms]
        optimizers = [item for item in state.values() if isinstance(item, torch.optim.Optimizer)]
        if known is not None and walk is None and known.forms == forms:
            self._known = known
            return Description(known.outline, known.cuts.views(memory), values, optimizers, known.mesh)
        walk = walk or _Walk(state)
        walk.values = values
        for key, tensor in tensors:
            walk.add(hold(key, tensor, sharing=OWN, volatile=True))
        outline, mesh = make_outline(walk.held, walk.take_aliases(), self._copy), first_mesh(state)
        if facts is not None and forms is not None and (cuts := _cuts(walk.held, memory)) is not None:
            self._known = _Known(facts, forms, fixed, outline, cuts, mesh)
        views = [view for held in walk.held.values() for _, view in held.pieces]
        return Description(outline, views, values, optimizers, mesh)


@dataclass(frozen=True)
class _Fixed:
    """What a state has beside tensors that does not change from one save to the next."""

    extra: Mapping[str, Sequence[str]]
    """By the name of a module, the keys of the extra states below it."""
    trees: Mapping[str, Mapping[str, Any]]
    """By the name of an optimizer, its value but for the options."""
    values: Mapping[str, object]


@dataclass(frozen=True)
class _Known:
    """The last description, without its tensors."""

    facts: list[object]
    """The survey's."""
    forms: list[object]
    """Keys and forms of the tensors that values refer to."""
    fixed: _Fixed
    outline: Outline
    cuts: _Cuts
    mesh: DeviceMesh | None


@dataclass(frozen=True)
class _Cuts:
    """How the views come from the tensors of a survey."""

    sources: list[int]
    """For each view the number of its tensor."""
    parts: list[tuple[int, tuple[int, ...], tuple[int, ...], int]]
    """For those that are not all of it: number of the view, sizes, strides, and first element counted from the
    tensor's."""

    def views(self, memory: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        detached = list(map(torch.Tensor.detach, memory))
        views = [detached[source] for source in self.sources]
        for number, sizes, strides, skip in self.parts:
            view = views[number]
            views[number] = view.as_strided(sizes, strides, view.storage_offset() + skip)
        return views


def _ties(memory: Sequence[torch.Tensor], start: int) -> list[int]:
    """For each tensor from ``start`` on, the number of the first that lies where it does."""
    if start == len(memory):
        return []
    first: dict[int, int] = {}
    return [first.setdefault(tensor.data_ptr(), number) for number, tensor in enumerate(memory)][start:]


def _cuts(held: Mapping[str, Held], memory: Sequence[torch.Tensor]) -> _Cuts | None:
    """None if some view is of a tensor that is not in ``memory``."""
    numbers = {id(tensor): number for number, tensor in enumerate(memory)}
    cuts = _Cuts([], [])
    for entry in held.values():
        for _, view in entry.pieces:
            if entry.local is None or id(entry.local) not in numbers:
                return None
            form, whole = ((tuple(each.shape), each.stride(), each.storage_offset()) for each in (view, entry.local))
            if form != whole:
                cuts.parts.append((len(cuts.sources), *form[:2], int(form[2] - whole[2])))
            cuts.sources.append(numbers[id(entry.local)])
    return cuts


def is_rng(item: object) -> bool:
    """Whether an item of the state is the state of the random number generators."""
    return isinstance(item.obj if isinstance(item, PerRank) else item, RNGState)


def first_mesh(state: Mapping[str, Any]) -> DeviceMesh | None:
    """The device mesh of the first distributed parameter, for the environment record."""
    modules = (item for item in state.values() if isinstance(item, nn.Module))
    parameters = (parameter for module in modules for parameter in module.parameters())
    return next((parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)), None)


class _Walk:
    """Modules, tensors and optimizers of a state, looked at in full."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self.held: dict[str, Held] = {}
        self.values: dict[str, object] = {}
        self._shards: set[str] = set()
        """Names of ``Shard`` items."""
        self._extra: dict[str, list[str]] = {}
        self._trees: dict[str, dict[str, Any]] = {}
        parameters = Parameters(state)
        for name, item in state.items():
            if isinstance(item, nn.Module):
                held, extra = describe_modules(name, item, parameters.declared)
                self._extra[name] = list(extra)
                for entry in held:
                    self.add(entry)
            elif isinstance(item, torch.optim.Optimizer):
                held, self._trees[name], placement = describe_optimizer(name, item, parameters)
                for entry in held:
                    self.add(entry)
                if placement is not None:
                    _add_value(self.values, f"{name}.placement", placement)
            elif isinstance(item, Shard):
                self._shards.add(name)
                self.add(hold_shard(name, item, volatile=True))
            elif isinstance(item, torch.Tensor):
                self.add(hold(name, item, volatile=True))

    def add(self, held: Held) -> None:
        if held.parts:
            _add_value(self.values, held.key, held.form)
            for part in held.parts:
                self.add(part)
            return
        if held.sharing == KNOWN and not held.pieces and 0 not in held.shape:
            return  # the ranks that hold its elements may have taken it apart; here is nothing to tell its class by
        if held.key in self.held:
            raise ValueError(f"{held.key}: two things in the state have this key; rename one")
        self.held[held.key] = held

    def fixed(self) -> _Fixed:
        return _Fixed(self._extra, self._trees, dict(self.values))

    def take_aliases(self) -> dict[str, str]:
        """Takes keys that are the same tensor as another one out of ``held``."""
        aliases = find_aliases(self.held)
        for alias, target in aliases.items():
            # A Shard item may only say what a parameter is, which nothing but a step changes.
            if self.held.pop(alias).volatile and not self.held[target].volatile and alias not in self._shards:
                self.held[target] = dataclasses.replace(self.held[target], volatile=True)
        return aliases


def _read_values(
    state: Mapping[str, Any], fixed: _Fixed, extra: Iterator[nn.Module]
) -> tuple[dict[str, object], NamedTensors]:
    """All values, and the tensors that they refer to. ``extra``: the modules that have an extra state."""
    values: dict[str, object] = dict(fixed.values)
    found: NamedTensors = []

    def read(name: str, value: object) -> None:
        tree, tensors = to_plain(value, name)
        found.extend(tensors)
        _add_value(values, name, tree)

    # The first state_dict of a data loader draws a random number.
    for name in sorted(state, key=lambda name: not is_rng(state[name])):
        item = state[name]
        if isinstance(item, nn.Module):
            for key, module in zip(fixed.extra[name], extra, strict=False):
                read(key, module.get_extra_state())
        elif isinstance(item, torch.optim.Optimizer):
            read(name, with_options(fixed.trees[name], item))
        elif not isinstance(item, Shard | torch.Tensor):
            own = item.obj if isinstance(item, PerRank) else item
            read(name, own.state_dict() if isinstance(own, Stateful) else own)
    return values, found


def _add_value(values: dict[str, object], name: str, tree: object) -> None:
    if name in values:
        raise ValueError(f"{name}: two things in the state have this name; rename one")
    values[name] = tree
