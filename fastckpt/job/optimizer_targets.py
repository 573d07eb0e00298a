"""Where the restored state of an optimizer goes: no step is taken to create what is to be filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastckpt.format import value
from fastckpt.job.modules import Place
from fastckpt.job.optimizer import TARGET_ONLY_OPTIONS
from fastckpt.job.values import from_plain, torch_dtype
from fastckpt.plan.restore_plan import Stored

if TYPE_CHECKING:
    from fastckpt.job.targets import Finding


def find_optimizer(finding: Finding, name: str, optimizer: torch.optim.Optimizer) -> None:
    """What restoring an optimizer takes."""
    found = finding.find_value(name)
    if found is None:
        return
    if not found.exact:
        finding.problem(f"{name}: its parameter groups differed between the ranks that saved them")
        return
    tree: Any = from_plain(value.decode(found.blob), {})
    ours = [[own for owned in members for own, _ in owned.places] for members in finding.parameters.of(optimizer)]

    def renamed(own: str) -> str:
        return finding.selection.renamed(f"{found.saved}.state.{own}.").removeprefix(f"{name}.state.")[:-1]

    theirs = [[renamed(own) for own in group["params"]] for group in tree["param_groups"]]
    if ours != theirs:
        finding.problem(_group_difference(name, theirs, ours))
        return
    for group, saved in zip(optimizer.param_groups, tree["param_groups"], strict=True):
        theirs_only = sorted(set(saved["options"]) - set(group))
        ours_only = sorted(set(group) - set(saved["options"]) - {"params"})
        if theirs_only and ours_only:  # either alone is a newer torch, or a scheduler's note
            finding.problem(f"{name}: another kind of optimizer was saved: it has {theirs_only}, this one {ours_only}")
            return
    _find_state(finding, name, optimizer, {renamed(own): state for own, state in tree["state"].items()})

    def restore_groups() -> None:
        for group, saved in zip(optimizer.param_groups, tree["param_groups"], strict=True):
            for option, setting in saved["options"].items():
                if option in TARGET_ONLY_OPTIONS:
                    continue
                ours = group.get(option)
                if isinstance(ours, torch.Tensor):
                    ours.copy_(torch.as_tensor(setting, dtype=ours.dtype).reshape(ours.shape))
                else:
                    group[option] = setting

    finding.targets.apply.append(restore_groups)


def _find_state(
    finding: Finding, name: str, optimizer: torch.optim.Optimizer, scalars: Mapping[str, Mapping[str, Any]]
) -> None:
    """Makes the optimizer's state what the snapshot has: no step is taken to create it, and what the snapshot has
    not is dropped, so that a warm optimizer can go back to a state before its first step."""
    stored: dict[str, dict[str, Stored]] = {}
    for rest, entry in finding.catalog.below(f"{name}.state.").items():
        own, _, key = rest.rpartition(".")
        stored.setdefault(own, {})[key] = entry
    for group, members in zip(optimizer.param_groups, finding.parameters.of(optimizer), strict=True):
        for owned in members:
            parameter, (own, place) = owned.parameter, owned.places[0]
            if finding.keep_missing and own not in stored and own not in scalars:
                continue
            state: dict[str, Any] = dict(scalars.get(own, {}))
            for key, entry in stored.get(own, {}).items():
                full = f"{name}.state.{own}.{key}"
                finding.targets.used.add(full)
                tensor = optimizer.state.get(parameter, {}).get(key)
                if not isinstance(tensor, torch.Tensor) or place.hold(full, tensor).shape != entry.shape:
                    tensor = _state_like(parameter, place, key, entry, group)
                state[key] = tensor
                finding.fill(place.hold(full, tensor), entry)
            finding.targets.install.append(_installer(optimizer, parameter, state))


def _state_like(
    parameter: torch.Tensor, place: Place, key: str, stored: Stored, group: Mapping[str, Any]
) -> torch.Tensor:
    """A state tensor such as the optimizer would have made for ``parameter``: sharded and laid out like it where it has
    its shape; a 0-d one on the CPU, as torch keeps step counters, unless the step runs on the device."""
    dtype = torch_dtype(stored.dtype)
    if stored.shape == place.shape and (stored.shape or key != "step"):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if not stored.shape:
        on_device = group.get("capturable") or group.get("fused")
        return torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False).new_zeros(stored.shape)


def _installer(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, state: dict[str, Any]) -> Callable[[], None]:
    def install() -> None:
        if state:
            optimizer.state[parameter] = state
        else:
            optimizer.state.pop(parameter, None)

    return install


def _group_difference(name: str, theirs: list[list[str]], ours: list[list[str]]) -> str:
    if len(theirs) != len(ours):
        return f"{name}: {len(theirs)} parameter groups in the snapshot, {len(ours)} in the state"
    for number, (saved, group) in enumerate(zip(theirs, ours, strict=True)):
        if saved != group:
            gone = [own for own in saved if own not in group][:4]
            new = [own for own in group if own not in saved][:4]
            what = f"only in the snapshot: {gone}; only in the state: {new}" if gone or new else "in another order"
            return f"{name}: the parameters of group {number} differ; {what}"
    raise AssertionError("the groups are equal")
