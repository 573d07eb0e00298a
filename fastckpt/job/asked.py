"""What a state needs from a snapshot: by this a snapshot is chosen, before any is looked into closely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fastckpt.job.modules import Parameters, describe_modules
from fastckpt.job.tensors import Held, Shard
from fastckpt.plan.restore_plan import Selection


def asked_names(state: Mapping[str, Any], selection: Selection) -> list[str]:
    """The keys of modules, tensors and ``Shard`` items of the state, and the names of its plain values.

    Not what optimizers keep, which they may not have made yet, and not the tensors of a ``Stateful``.
    """
    names: list[str] = []
    parameters = Parameters(state)
    for name, item in state.items():
        if not selection.may_have(name):
            continue
        if isinstance(item, nn.Module):
            held, extra = describe_modules(name, item, {})
            names += [*(key for entry in held for key in _keys(entry)), *extra]
        elif not (isinstance(item, Shard) and parameters.declares(item)):
            names.append(name)
    return [name for name in names if selection.has(name)]


def _keys(held: Held) -> Iterator[str]:
    yield held.key  # of a tensor that was taken apart, its record has this name
    for part in held.parts:
        yield from _keys(part)
