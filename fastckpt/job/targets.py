"""Where restored bytes go: for a user's state and a snapshot, the sinks to fill and what to do before and after.

Nothing is changed here. What does not fit is collected, so that one error can name all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastckpt.format import value
from fastckpt.format.dtype import item_bytes
from fastckpt.format.shard import Box
from fastckpt.job.modules import Parameters, Place, describe_modules
from fastckpt.job.optimizer import TARGET_ONLY_OPTIONS
from fastckpt.job.rng import RNGState
from fastckpt.job.staging import BITS, bits
from fastckpt.job.state import Stateful
from fastckpt.job.tensors import Held, Shard, hold, hold_shard
from fastckpt.job.values import from_plain, to_plain, torch_dtype
from fastckpt.plan.restore_plan import Catalog, Selection, Stored, Want


class TensorSink:
    """Fills a live tensor in place, converting from the stored dtype if that is another."""

    def __init__(self, box: Box, tensor: torch.Tensor, stored_dtype: str) -> None:
        self._box = box
        self._tensor = tensor.detach()
        self._dtype = torch_dtype(stored_dtype)
        self._stored_bytes = item_bytes(stored_dtype)

    @torch.no_grad()
    def place(self, offsets: tuple[int, ...], sizes: tuple[int, ...], data: memoryview) -> None:
        target = self._tensor[Box(offsets, sizes).relative_to(self._box).slices()]
        raw = torch.frombuffer(data if not data.readonly else bytearray(data), dtype=torch.uint8)
        if raw.data_ptr() % self._stored_bytes:  # inside a bundle, behind tensors of another width
            raw = raw.clone()
        if self._dtype == target.dtype:
            width = BITS[self._stored_bytes]
            if target.is_conj() or target.is_neg():  # its memory does not hold its values
                target.copy_(raw.view(self._dtype).view(sizes))
            else:
                bits(target).copy_(raw.view(width).view(sizes))
        else:
            target.copy_(raw.view(self._dtype).view(sizes))


@dataclass(frozen=True)
class RestoredValue:
    """A plain value as this rank may restore it."""

    blob: bytes
    """Encoded."""
    exact: bool
    """It is this rank's own, or all ranks had the same. Otherwise it is rank 0's, of a world of another size."""
    world_size: int
    """Ranks of the job that saved it."""
    saved: str
    """The name it was saved under."""


@dataclass
class Targets:
    """What a restore does on this rank."""

    wants: list[Want] = field(default_factory=list)
    sinks: list[TensorSink] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    install: list[Callable[[], None]] = field(default_factory=list)
    """Run before any byte is read: gives optimizers the state tensors that are to be filled."""
    apply: list[Callable[[], None]] = field(default_factory=list)
    """Run once all bytes are in place: plain values, schedulers, loaders, random number generators."""
    used: set[str] = field(default_factory=set)
    """Names of the snapshot's tensors and values that are restored."""


def find_targets(
    state: dict[str, Any],
    catalog: Catalog,
    values: Mapping[str, RestoredValue],
    selection: Selection,
    *,
    keep_missing: bool,
    cast: bool,
    rank: int,
) -> Targets:
    """Everything that restoring a snapshot into ``state`` takes, and every reason why it cannot be done."""
    finding = _Finding(state, catalog, values, selection, keep_missing, cast, rank, Parameters(state))
    for name, item in state.items():
        finding.item(name, item)
    finding.note_extra()
    return finding.targets


@dataclass
class _Finding:
    state: dict[str, Any]
    catalog: Catalog
    values: Mapping[str, RestoredValue]
    selection: Selection
    keep_missing: bool
    cast: bool
    rank: int
    parameters: Parameters
    targets: Targets = field(default_factory=Targets)
    filled: dict[tuple[Any, ...], tuple[str, int]] = field(default_factory=dict)
    """For each tensor of the state, the first key it is filled under, and the number of the stored one."""

    def item(self, name: str, item: Any) -> None:
        if isinstance(item, nn.Module):
            held, extra = describe_modules(name, item, self.parameters.declared)
            for entry in held:
                self.tensor(entry)
            for key, module in extra.items():
                self.value(key, module.set_extra_state)
        elif isinstance(item, torch.optim.Optimizer):
            self.optimizer(name, item)
        elif isinstance(item, torch.Tensor):
            self.tensor(hold(name, item))
        elif isinstance(item, Shard):
            self.tensor(hold_shard(name, item))
        elif isinstance(item, RNGState):
            self.value(name, item.load_state_dict, rng=item)
        elif isinstance(item, Stateful):
            self.value(name, item.load_state_dict, template=item.state_dict)
        else:
            self.value(name, lambda tree: self.state.__setitem__(name, tree))

    def tensor(self, held: Held) -> None:
        if not self.selection.has(held.key):
            return
        stored = self.catalog.tensors.get(held.key)
        if stored is None:
            self.missing(held.key)
            return
        self.targets.used.add(held.key)
        earlier = self.filled.setdefault(held.identity, (held.key, stored.number))
        if earlier[0] != held.key:  # tied: filled once
            if not self.catalog.same_tensor(earlier[1], stored.number):
                self.problem(f"{held.key}: is the same tensor as {earlier[0]} in the state, but not in the snapshot")
            return
        self.fill(held, stored)

    def fill(self, held: Held, stored: Stored) -> None:
        if stored.shape != held.shape:
            self.problem(f"{held.key}: shape {list(stored.shape)} in the snapshot, {list(held.shape)} in the state")
        elif stored.dtype != held.dtype and not self.cast:
            self.problem(f"{held.key}: {stored.dtype} in the snapshot, {held.dtype} in the state (cast=True converts)")
        elif any(_is_expanded(view) for _, view in held.pieces):
            self.problem(f"{held.key}: its elements share memory (an expanded tensor); clone() it before restoring")
        else:
            for box, view in held.pieces:
                self.targets.wants.append(Want(stored.number, box, len(self.targets.sinks)))
                self.targets.sinks.append(TensorSink(box, view, stored.dtype))

    def problem(self, text: str) -> None:
        self.targets.problems.append(text)

    def missing(self, key: str) -> None:
        if key in self.catalog.lost:
            self.problem(
                f"{key}: each of the {self.catalog.lost[key]} ranks that saved it had its own; they cannot be told "
                "apart at another world size. Leave it out with only=..."
            )
        elif not self.keep_missing:
            self.problem(f"{key}: in the state but not in the snapshot")

    def find_value(self, name: str) -> RestoredValue | None:
        """The value to restore under a name; None if it is not selected or, which is noted, not in the snapshot."""
        if not self.selection.has(name):
            return None
        found = self.values.get(name)
        if found is None:
            self.missing(name)
        else:
            self.targets.used.add(name)
        return found

    def value(
        self,
        name: str,
        load: Callable[[Any], Any],
        *,
        template: Callable[[], Any] | None = None,
        rng: RNGState | None = None,
    ) -> None:
        found = self.find_value(name)
        if found is None:
            return
        if not found.exact:
            if rng is None:
                self.problem(
                    f"{name}: its value differed between the {found.world_size} ranks that saved it, and this job has "
                    "another number of ranks. Leave it out with only=..., or start it afresh"
                )
            else:
                self.targets.apply.append(lambda: rng.derive(found.blob, self.rank))
            return
        tree = value.decode(found.blob)
        tensors = self.referenced(name, tree, template)
        self.targets.apply.append(lambda: load(from_plain(tree, tensors)))

    def referenced(self, name: str, tree: object, template: Callable[[], Any] | None) -> dict[str, torch.Tensor]:
        """New tensors for those a value refers to; distributed like the target's where that one is a DTensor."""
        tensors: dict[str, torch.Tensor] = {}
        existing: dict[str, torch.Tensor] = {}
        for key in references(tree):
            stored = self.catalog.tensors.get(self.selection.renamed(key))
            if stored is None:  # keeping what is there cannot be asked of load_state_dict
                self.problem(f"{key}: {name} refers to it, but it is not among what is to be restored")
                continue
            if template is not None and not existing:
                existing = dict(to_plain(template(), name)[1])
            like, dtype = existing.get(key), torch_dtype(stored.dtype)
            if isinstance(like, DTensor):
                tensors[key] = torch.empty_like(like, dtype=dtype)
            else:
                device = "cpu" if like is None else like.device
                tensors[key] = torch.empty(stored.shape, dtype=dtype, device=device)
            self.targets.used.add(self.selection.renamed(key))
            self.fill(hold(key, tensors[key]), stored)
        return tensors

    def optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        found = self.find_value(name)
        if found is None:
            return
        if not found.exact:
            self.problem(f"{name}: its parameter groups differed between the ranks that saved them")
            return
        tree: Any = from_plain(value.decode(found.blob), {})
        ours = [[own for owned in members for own, _ in owned.places] for members in self.parameters.of(optimizer)]

        def renamed(own: str) -> str:
            return self.selection.renamed(f"{found.saved}.state.{own}.").removeprefix(f"{name}.state.")[:-1]

        theirs = [[renamed(own) for own in group["params"]] for group in tree["param_groups"]]
        if ours != theirs:
            self.problem(_group_difference(name, theirs, ours))
            return
        for group, saved in zip(optimizer.param_groups, tree["param_groups"], strict=True):
            theirs_only = sorted(set(saved["options"]) - set(group))
            ours_only = sorted(set(group) - set(saved["options"]) - {"params"})
            if theirs_only and ours_only:  # either alone is a newer torch, or a scheduler's note
                self.problem(f"{name}: another kind of optimizer was saved: it has {theirs_only}, this one {ours_only}")
                return
        self.optimizer_state(name, optimizer, {renamed(own): state for own, state in tree["state"].items()})

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

        self.targets.apply.append(restore_groups)

    def optimizer_state(
        self, name: str, optimizer: torch.optim.Optimizer, scalars: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Makes the optimizer's state what the snapshot has: no step is taken to create it, and what the snapshot has
        not is dropped, so that a warm optimizer can go back to a state before its first step."""
        stored: dict[str, dict[str, Stored]] = {}
        for rest, entry in self.catalog.below(f"{name}.state.").items():
            own, _, key = rest.rpartition(".")
            stored.setdefault(own, {})[key] = entry
        for group, members in zip(optimizer.param_groups, self.parameters.of(optimizer), strict=True):
            for owned in members:
                parameter, (own, place) = owned.parameter, owned.places[0]
                if self.keep_missing and own not in stored and own not in scalars:
                    continue
                state: dict[str, Any] = dict(scalars.get(own, {}))
                for key, entry in stored.get(own, {}).items():
                    full = f"{name}.state.{own}.{key}"
                    self.targets.used.add(full)
                    tensor = optimizer.state.get(parameter, {}).get(key)
                    if not isinstance(tensor, torch.Tensor) or place.hold(full, tensor).shape != entry.shape:
                        tensor = _state_like(parameter, place, key, entry, group)
                    state[key] = tensor
                    self.fill(place.hold(full, tensor), entry)
                self.targets.install.append(_installer(optimizer, parameter, state))

    def note_extra(self) -> None:
        """What the snapshot has below the names that were asked for, and the state has no place for."""
        if self.selection.only and not self.targets.used and not self.targets.problems:
            self.problem(f"only={list(self.selection.only)} selects nothing that is both in the state and the snapshot")
        asked = tuple(f"{name}." for name in self.state)
        for key in sorted({*self.catalog.tensors, *(name for name in self.values if self.selection.has(name))}):
            if key not in self.targets.used and (key in self.state or key.startswith(asked)):
                self.problem(f"{key}: in the snapshot but not in the state")


def references(tree: object) -> list[str]:
    """The keys of the tensors that a value refers to."""
    if isinstance(tree, value.TensorReference):
        return [tree.key]
    if isinstance(tree, Mapping):
        return [key for item in tree.values() for key in references(item)]
    if isinstance(tree, list | tuple | deque):
        return [key for item in tree for key in references(item)]
    return []


def _is_expanded(view: torch.Tensor) -> bool:
    """Whether elements may share memory: some stride does not step over all that smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


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
