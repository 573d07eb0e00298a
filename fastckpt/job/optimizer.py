"""An optimizer of the state: the tensors it keeps for each parameter, and the rest as a plain value."""

from __future__ import annotations

from typing import Any

import torch

from fastckpt.job.modules import Parameters
from fastckpt.job.tensors import Held

TARGET_ONLY_OPTIONS = frozenset({"capturable", "differentiable", "foreach", "fused"})
"""Options of a parameter group that say how a step is computed, not what it computes: a restore keeps the target's."""


def describe_optimizer(
    name: str, optimizer: torch.optim.Optimizer, parameters: Parameters
) -> tuple[list[Held], dict[str, Any]]:
    """The tensors of an optimizer's state, and its parameter groups with the state that is no tensor."""
    held: list[Held] = []
    scalars: dict[str, dict[str, object]] = {}
    groups: list[dict[str, object]] = []
    for group, members in zip(optimizer.param_groups, parameters.of(optimizer), strict=True):
        for owned in members:
            for own, place in owned.places:
                for entry, value in optimizer.state.get(owned.parameter, {}).items():
                    key = f"{name}.state.{own}.{entry}"
                    if not isinstance(entry, str) or "." in entry:
                        raise TypeError(f"{key}: names of optimizer state are strings without dots, not {entry!r}")
                    if isinstance(value, torch.Tensor):
                        held.append(place.hold(key, value))
                    elif value is None or isinstance(value, bool | int | float | str):
                        scalars.setdefault(own, {})[entry] = value
                    else:
                        raise TypeError(
                            f"{key}: optimizer state may be tensors and numbers; "
                            f"a {type(value).__name__} cannot be saved yet"
                        )
        names = [own for owned in members for own, _ in owned.places]
        groups.append({"params": names, "options": {entry: group[entry] for entry in group if entry != "params"}})
    return held, {"param_groups": groups, "state": scalars}


def broken_step_hook_reason(optimizers: list[torch.optim.Optimizer]) -> str | None:
    """Why the optimizer-step hook cannot be relied on for these optimizers, or None."""
    for optimizer in optimizers:
        if any(group.get("capturable") for group in optimizer.param_groups):
            return "a capturable optimizer may step inside a captured graph, which runs no hooks"
    return None
