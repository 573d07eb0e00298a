"""What a state needs from a snapshot: by this a snapshot is chosen, before any is looked into closely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastckpt.job.modules import Parameters, describe_modules
from fastckpt.job.tensors import Held, Shard
from fastckpt.plan.restore_plan import Selection


@dataclass(frozen=True)
class Asked:
    """What a restore has found of a state before it knows the snapshot, to go on with when it does."""

    names: list[str]
    """The keys of modules, tensors and ``Shard`` items, and the names of plain values. Not what optimizers keep, which
    they may not have made yet, and not the tensors of a ``Stateful``."""
    parameters: Parameters
    modules: Mapping[str, tuple[list[Held], dict[str, nn.Module]]]
    """As ``describe_modules`` has them, by name; those with something that is selected."""


def ask(state: Mapping[str, Any], selection: Selection) -> Asked:
    """Looks at a state. ``TypeError`` or ``ValueError`` naming the key of what can be neither saved nor restored."""
    names: list[str] = []
    parameters = Parameters(state)
    modules: dict[str, tuple[list[Held], dict[str, nn.Module]]] = {}
    for name, item in state.items():
        if not selection.may_have(name):
            continue
        if isinstance(item, nn.Module):
            held, extra = modules[name] = describe_modules(name, item, parameters.declared)
            names += [*(key for entry in held for key in _keys(entry)), *extra]
        elif not (isinstance(item, Shard) and parameters.declares(item)):
            names.append(name)
    return Asked([name for name in names if selection.has(name)], parameters, modules)


def _keys(held: Held) -> Iterator[str]:
    yield held.key  # of a tensor that was taken apart, its record has this name
    for part in held.parts:
        yield from _keys(part)
