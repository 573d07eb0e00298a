"""What the user's state holds: names, shapes and boxes of its tensors as they lie on this rank, and its plain values.

Describing only looks. It takes no optimizer step, runs no collective and copies no tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fastckpt.job.aliases import find_aliases
from fastckpt.job.modules import Parameters, describe_modules
from fastckpt.job.optimizer import describe_optimizer
from fastckpt.job.per_rank import PerRank
from fastckpt.job.rng import RNGState
from fastckpt.job.tensors import Held, Shard, hold, hold_shard
from fastckpt.job.values import to_plain
from fastckpt.plan.save_plan import KNOWN, OWN


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state: schedulers, data loaders, samplers, scalers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass
class Description:
    """The state of this rank. ``values`` are trees that ``format/value.py`` can encode."""

    held: dict[str, Held]
    aliases: dict[str, str]
    """Keys that are the same tensor as an earlier key of ``held``."""
    values: dict[str, object]
    optimizers: list[torch.optim.Optimizer]
    mesh: DeviceMesh | None


def describe(state: Mapping[str, Any]) -> Description:
    """Describes a user's state. ``ValueError`` or ``TypeError`` naming the key of anything that cannot be saved."""
    walk = _Walk(state)
    for name in state:
        if not isinstance(name, str) or not name:
            raise TypeError(f"names in the state are non-empty strings, not {name!r}")
    # The first state_dict of a data loader draws a random number.
    for name in sorted(state, key=lambda name: not is_rng(state[name])):
        walk.item(name, state[name])
    aliases = find_aliases(walk.held)
    for alias, target in aliases.items():
        # A Shard item may only say what a parameter is, which nothing but a step changes.
        if walk.held.pop(alias).volatile and not walk.held[target].volatile and alias not in walk.shards:
            walk.held[target] = dataclasses.replace(walk.held[target], volatile=True)
    return Description(walk.held, aliases, walk.values, walk.optimizers, first_mesh(state))


def is_rng(item: object) -> bool:
    """Whether an item of the state is the state of the random number generators."""
    return isinstance(item.obj if isinstance(item, PerRank) else item, RNGState)


def first_mesh(state: Mapping[str, Any]) -> DeviceMesh | None:
    """The device mesh of the first distributed parameter, for the environment record."""
    modules = (item for item in state.values() if isinstance(item, nn.Module))
    parameters = (parameter for module in modules for parameter in module.parameters())
    return next((parameter.device_mesh for parameter in parameters if isinstance(parameter, DTensor)), None)


class _Walk:
    def __init__(self, state: Mapping[str, Any]) -> None:
        self.held: dict[str, Held] = {}
        self.values: dict[str, object] = {}
        self.shards: set[str] = set()
        """Names of ``Shard`` items."""
        self.optimizers: list[torch.optim.Optimizer] = []
        self.parameters = Parameters(state)

    def item(self, name: str, item: Any) -> None:
        if isinstance(item, nn.Module):
            self.module(name, item)
        elif isinstance(item, torch.optim.Optimizer):
            self.optimizers.append(item)
            held, tree, placement = describe_optimizer(name, item, self.parameters)
            for entry in held:
                self.add(entry)
            self.value(name, tree)
            if placement is not None:
                self.add_value(f"{name}.placement", placement)
        elif isinstance(item, Shard):
            self.shards.add(name)
            self.add(hold_shard(name, item, volatile=True))
        elif isinstance(item, torch.Tensor):
            self.add(hold(name, item, volatile=True))
        else:
            own = item.obj if isinstance(item, PerRank) else item
            self.value(name, own.state_dict() if isinstance(own, Stateful) else own)

    def add(self, held: Held) -> None:
        if held.parts:
            self.add_value(held.key, held.form)
            for part in held.parts:
                self.add(part)
            return
        if held.sharing == KNOWN and not held.pieces and 0 not in held.shape:
            return  # the ranks that hold its elements may have taken it apart; here is nothing to tell its class by
        if held.key in self.held:
            raise ValueError(f"{held.key}: two things in the state have this key; rename one")
        self.held[held.key] = held

    def module(self, name: str, root: nn.Module) -> None:
        held, extra = describe_modules(name, root, self.parameters.declared)
        for entry in held:
            self.add(entry)
        for key, module in extra.items():
            self.value(key, module.get_extra_state())

    def value(self, name: str, value: object) -> None:
        tree, tensors = to_plain(value, name)
        for key, tensor in tensors:
            self.add(hold(key, tensor, sharing=OWN, volatile=True))
        self.add_value(name, tree)

    def add_value(self, name: str, tree: object) -> None:
        if name in self.values:
            raise ValueError(f"{name}: two things in the state have this name; rename one")
        self.values[name] = tree
