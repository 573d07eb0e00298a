"""Where the restored state of an optimizer goes: no step is taken to create what is to be filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastckpt.format import value
from fastckpt.format.dtype import item_bytes
from fastckpt.format.shard import Box
from fastckpt.job import subclass
from fastckpt.job.modules import Boxed, Owned, Whole
from fastckpt.job.optimizer import TARGET_ONLY_OPTIONS, StateKeeper, placement, state_keeper, without_tensors
from fastckpt.job.optimizer_saved import NoOptimizer, RanksDiffer, SavedOptimizer, SavedParameter, same
from fastckpt.job.tensors import Held, hold
from fastckpt.job.values import from_plain, references, torch_dtype
from fastckpt.plan.restore_plan import Stored, Want
from fastckpt.repository.reader import ArraySink, Snapshot

if TYPE_CHECKING:
    from fastckpt.job.targets import Finding

NAMES_SHOWN_MAX = 4


def find_optimizer(finding: Finding, name: str, optimizer: torch.optim.Optimizer) -> None:
    """What restoring an optimizer takes."""
    keeper = state_keeper(name, optimizer)
    found = finding.find_value(name)
    if found is None:
        return
    members = finding.asked.parameters.of(optimizer)
    if (placed := finding.values.get(f"{name}.placement")) is not None:
        finding.targets.used.add(f"{name}.placement")
    ours = [[own for owned in owners for own, _ in owned.places] for owners in members]
    wanted = {own for owns in ours for own in owns}
    try:
        saved = SavedOptimizer(name, found, wanted, finding.selection, _Directly(finding, name))
        if placed is not None:
            saved.moved_from(value.decode(placed.blob), placement(members))
        filling = _Filling(finding, name, keeper, saved)
        filling.check_order(optimizer, ours)
        filling.check_schedulers(optimizer, ours)
        options = [filling.options(number, group, ours) for number, group in enumerate(optimizer.param_groups)]
        for group, owners in zip(optimizer.param_groups, members, strict=True):
            for owned in owners:
                filling.parameter(owned, group)
        filling.common()
        filling.check_counters(found.value.snapshot)
    except (NoOptimizer, RanksDiffer, Unfit) as problem:
        finding.problem(str(problem))
        # The rest of it is not said to be in the snapshot alone.
        finding.targets.used.update(f"{name}.{rest}" for rest in finding.catalog.below(f"{name}."))
        return
    finding.unused_names += [f"{name}.param_groups.{own}" for own in saved.unused]

    def restore_groups() -> None:
        for group, settings in zip(optimizer.param_groups, options, strict=True):
            for option, setting in settings.items():
                group[option] = _taken_over(group.get(option), setting)

    finding.targets.apply.append(restore_groups)


class Unfit(Exception):
    """Why an optimizer cannot be restored, for the user."""


class _Directly:
    """The entries of a parameter that are tensors of their own, told by their keys."""

    def __init__(self, finding: Finding, name: str) -> None:
        self._finding = finding
        self._name = name
        self._found: dict[str, list[str]] | None = None

    def __call__(self, own: str) -> Sequence[str]:
        if self._found is None:
            self._found = {}
            for rest in self._finding.catalog.below(f"{self._name}.state."):
                owner, _, entry = rest.rpartition(".")
                self._found.setdefault(owner, []).append(entry)
        return self._found.get(own, [])


def _taken_over(ours: object, setting: object) -> object:
    """An option as its group is to have it: a tensor is filled in place, and a number stays a number."""
    if isinstance(ours, torch.Tensor):
        return ours.copy_(torch.as_tensor(setting, dtype=ours.dtype).reshape(ours.shape))
    if isinstance(ours, int | float) and isinstance(setting, torch.Tensor) and setting.numel() == 1:
        return setting.item()
    return setting


@dataclass
class _Filling:
    """What is done to one optimizer."""

    finding: Finding
    name: str
    keeper: StateKeeper
    saved: SavedOptimizer
    counters: list[list[tuple[str, Stored]]] = field(default_factory=list)
    """Tensors that one tensor of the state takes the place of: they must be equal."""

    def check_order(self, optimizer: torch.optim.Optimizer, ours: list[list[str]]) -> None:
        """Where something is kept for all parameters together it is in their order, and they must be the same."""
        if not isinstance(optimizer, torch.optim.LBFGS) and not self.saved.one_for_all:
            return
        if not self.saved.exact:
            raise Unfit(
                f"{self.name}: keeps one state for all its parameters, of which ranks saved different ones; restore it "
                "on the number of ranks it was saved with"
            )
        if ours != self.saved.groups:
            raise Unfit(_group_difference(self.name, self.saved.groups, ours))

    def check_schedulers(self, optimizer: torch.optim.Optimizer, ours: list[list[str]]) -> None:
        """A learning-rate scheduler keeps a rate for each group, by number, and would give it to another group."""
        moved: str | None = None
        for name, item in self.finding.state.items():
            if not isinstance(item, torch.optim.lr_scheduler.LRScheduler) or item.optimizer is not optimizer:
                continue
            if self.finding.selection.has(name) and name in self.finding.values:
                moved = moved or self.saved.regrouped(ours)
                if moved is not None or (self.saved.exact and len(ours) != len(self.saved.groups)):
                    what = f"{moved} was saved in a group of another number" if moved else "their number is another"
                    raise Unfit(
                        f"{self.name}: {what}, and {name}, a scheduler of it, knows its groups by number; group the "
                        f"parameters as they were saved, or leave {name} out of the state"
                    )

    def options(self, number: int, group: Mapping[str, Any], ours: list[list[str]]) -> dict[str, Any]:
        """What a group of the state takes over: the options that its parameters had."""
        found = {own: options for own in ours[number] if (options := self.saved.options(own)) is not None}
        missing = [own for own in ours[number] if own not in found]
        if missing and not self.finding.keep_missing:
            raise Unfit(_missing(self.name, number, missing, self.saved.groups, ours))
        first = next(iter(found), "")
        for own, options in found.items():
            if not same(options, found[first]):
                raise Unfit(
                    f"{self.name}: {first} and {own} are in one group, but were saved with different options: "
                    f"{_option_difference(found[first], options)}; put them into groups of their own"
                )
        chosen = found.get(first)
        if chosen is None:  # a group without parameters
            groups = self.saved.groups
            if not self.saved.exact or number >= len(groups) or ours[number] or groups[number]:
                return {}
            chosen = self.saved.group_options(number)
        theirs_only = sorted(set(chosen) - set(group))
        ours_only = sorted(set(group) - set(chosen) - {"params", "param_names"})
        if theirs_only and ours_only:  # either alone is a newer torch, or a scheduler's note
            raise Unfit(f"{self.name}: another kind of optimizer was saved: it has {theirs_only}, this one {ours_only}")
        taken = {option: setting for option, setting in chosen.items() if option not in TARGET_ONLY_OPTIONS}
        restored: dict[str, Any] = self.tree(taken, {}, None, group)
        return {} if restored is _NOTHING else restored

    def parameter(self, owned: Owned, group: Mapping[str, Any]) -> None:
        """Makes what is kept for a parameter what the snapshot has: what is missing is created, and what the snapshot
        has not is dropped, so that a warm optimizer can go back to a state before its first step."""
        found = {own: self.saved.kept(own) for own, _ in owned.places}
        whole = {own: kept for own, kept in found.items() if kept is not None}
        if len(whole) < len(found):  # missing="keep", or it would have been a problem before
            return
        first = next(iter(whole.values()))
        for own, kept in whole.items():
            if set(kept.entries or ()) != set(first.entries or ()):
                raise Unfit(
                    f"{self.name}: {next(iter(whole))} and {own} are one flat parameter in the state, but the snapshot "
                    f"has {list(first.entries or ())} for the one and {list(kept.entries or ())} for the other"
                )
        if not self.keeper.keeps(owned.parameter) or not owned.places[0][1].has_state:
            for own, kept in whole.items():
                self.leave(own, kept)
            return
        current = self.keeper.state.get(owned.parameter, {})
        state: dict[Any, Any] = {}
        for entry in first.entries or ():
            restored = self.entry(entry, owned, whole, current.get(entry), group)
            if restored is not _NOTHING:
                state[entry] = restored
        self.finding.targets.install.append(_installer(self.keeper.state, owned.parameter, state))

    def entry(
        self,
        entry: object,
        owned: Owned,
        found: Mapping[str, SavedParameter],
        current: object,
        group: Mapping[str, Any],
    ) -> object:
        """One thing that is kept for a parameter; ``_NOTHING`` if, which is noted, it cannot be restored."""
        (own, _), *others = owned.places
        full = f"{self.name}.state.{own}.{entry}"
        if entry in found[own].trees:
            tree = found[own].trees[entry]
            if any(not same(found[other].trees.get(entry), tree) for other, _ in others):
                raise Unfit(f"{full}: {_DIFFERS.format(others=', '.join(other for other, _ in others))}")
            _, existing = without_tensors(current, full)
            return self.tree(tree, dict(existing), owned, group)
        if others:
            return self.flat_tensor(str(entry), owned, current, group)
        return self.tensor(full, current, owned, group)

    def tree(
        self, tree: object, existing: Mapping[str, torch.Tensor], owned: Owned | None, group: Mapping[str, Any]
    ) -> Any:
        """A plain value, with tensors of the state where those it refers to are to be filled."""
        tensors: dict[str, torch.Tensor] = {}
        if owned is not None and isinstance(owned.places[0][1], Boxed):  # which what is inside is not a box of
            own, place = owned.places[0]
            owned = Owned(owned.parameter, ((own, Whole(place.path, owned.parameter, ())),))
        for key in references(tree):
            full = self.finding.selection.renamed(key)
            tensor = self.tensor(full, existing.get(full), owned, group)
            if tensor is _NOTHING:
                return _NOTHING
            tensors[key] = tensor
        return from_plain(tree, tensors)

    def tensor(self, full: str, current: object, owned: Owned | None, group: Mapping[str, Any]) -> Any:
        """The tensor that is filled with what was saved under ``full``: ``current`` where that fits, or a new one."""
        finding = self.finding
        stored, record = finding.catalog.tensors.get(full), self.record(full)
        if stored is not None and self.is_others(stored):
            raise Unfit(
                f"{full}: each rank that saved it had its own, for the part of the parameter that it held, which is "
                "not the part that this rank holds; restore it with the placements it was saved with"
            )
        if stored is None and record is None:
            if owned is not None and finding.elsewhere(_held(full, owned.parameter, owned)):
                finding.targets.used.add(full)
                return torch.zeros_like(owned.parameter, requires_grad=False)
            finding.missing(full)
            return current if isinstance(current, torch.Tensor) else _NOTHING
        if isinstance(current, torch.Tensor) and self.fits(held := _held(full, current, owned), stored):
            finding.tensor(held)
            return current
        tensor: torch.Tensor | None = None
        if stored is not None:
            tensor = self.new(full, stored, owned, group)
        if tensor is None:
            like = torch.empty(0) if owned is None else owned.parameter
            try:
                tensor = subclass.make(full, like, self.record, finding.catalog.tensors)
            except ValueError as error:
                raise Unfit(str(error)) from None
        finding.tensor(_held(full, tensor, owned))
        return tensor

    def is_others(self, stored: Stored) -> bool:
        """Whether a tensor is this rank's own, but belongs to other parts of the parameters than it holds now."""
        return self.saved.moved and not self.finding.catalog.is_shared(stored.number)

    def fits(self, held: Held, stored: Stored | None) -> bool:
        if stored is None:
            return held.form is not None and subclass.difference(self.record(held.key), held.form) is None
        if held.form is not None or held.shape != stored.shape:
            return False
        # One tensor kept for several parameters stays one as long as they have the same content.
        earlier = self.finding.filled.get(held.identity)
        return earlier is None or self.finding.catalog.same_tensor(earlier[1], stored.number)

    def record(self, full: str) -> object:
        """What the snapshot says of a tensor of a class that was taken apart."""
        found = self.finding.values.get(full)
        return None if found is None else value.decode(found.blob)

    def new(self, full: str, stored: Stored, owned: Owned | None, group: Mapping[str, Any]) -> torch.Tensor:
        """A tensor such as the optimizer would have made: on the parameter's device, and sharded and laid out like the
        parameter where it has its shape; a step counter on the CPU, as torch keeps it, unless the step runs on the
        device."""
        dtype = torch_dtype(stored.dtype)
        if owned is None:
            return torch.zeros(stored.shape, dtype=dtype)
        parameter, shape = owned.parameter, owned.places[0][1].shape
        if not stored.shape and full.endswith(".step"):
            on_device = group.get("capturable") or group.get("fused")
            return torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
        number = not stored.shape and shape and full not in self.saved.distributed
        if number or full in self.saved.local:
            return torch.zeros(stored.shape, dtype=dtype, device=parameter.device)
        alike = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        return alike if stored.shape == shape else alike.new_zeros(stored.shape)

    def flat_tensor(self, entry: str, owned: Owned, current: object, group: Mapping[str, Any]) -> object:
        """The tensor that is kept for a flat parameter, and filled with what was saved for those it is made of."""
        finding, tensors = self.finding, self.finding.catalog.tensors
        keys = {f"{self.name}.state.{own}.{entry}": place for own, place in owned.places}
        if absent := [full for full in keys if full not in tensors]:
            for full in absent:
                finding.missing(full)
            return current if isinstance(current, torch.Tensor) else _NOTHING
        counts = all(not tensors[full].shape for full in keys)
        if counts and (entry == "step" or any(place.shape for place in keys.values())):
            self.counters.append([(full, tensors[full]) for full in keys])
            finding.targets.used.update(keys)
            return self.tensor(next(iter(keys)), current, owned, group)
        for full, place in keys.items():
            if tensors[full].shape != place.shape:
                raise Unfit(
                    f"{full}: of shape {list(tensors[full].shape)} in the snapshot, for a parameter of shape "
                    f"{list(place.shape)}; what is not kept for each element cannot be kept for a flat parameter: use "
                    "FullyShardedDataParallel(..., use_orig_params=True)"
                )
        if not isinstance(current, torch.Tensor) or current.shape != owned.parameter.shape:
            first = next(iter(keys))
            current = self.new(first, tensors[first], owned, group)
        for full, place in keys.items():
            finding.tensor(place.hold(full, current))
        return current

    def leave(self, own: str, kept: SavedParameter) -> None:
        """Notes as used what is restored on other ranks only."""
        for entry in kept.entries or ():
            full = f"{self.name}.state.{own}.{entry}"
            keys = references(kept.trees[entry]) if entry in kept.trees else [full]
            for key in map(self.finding.selection.renamed, keys):
                self.finding.targets.used.add(key)
                if key not in self.finding.catalog.tensors:  # of a class that was taken apart
                    self.finding.targets.used.update(f"{key}.{rest}" for rest in self.finding.catalog.below(f"{key}."))

    def common(self) -> None:
        """What is kept for no one parameter."""
        state = self.keeper.state
        restored: dict[Any, Any] = {}
        for key, tree in self.saved.common.items():
            _, existing = without_tensors(state.get(key), f"{self.name}.common.{key}")
            restored[key] = self.tree(tree, dict(existing), None, {})

        def install() -> None:
            for key in [key for key in state if not isinstance(key, torch.Tensor)]:
                del state[key]
            state.update(restored)

        self.finding.targets.install.append(install)

    def check_counters(self, snapshot: Snapshot) -> None:
        """Reads what must be equal to become one tensor."""
        different = [
            (full, stored)
            for counters in self.counters
            for full, stored in counters
            if not self.finding.catalog.same_tensor(stored.number, counters[0][1].number)
        ]
        if not different:
            return
        numbers = {stored.number: stored for counters in self.counters for _, stored in counters}
        read = {number: np.empty((item_bytes(stored.dtype),), np.uint8) for number, stored in numbers.items()}
        box = Box((), ())
        wants = [Want(number, box, at) for at, number in enumerate(read)]
        snapshot.read_into(wants, [ArraySink(box, array) for array in read.values()])
        for (first, one), *others in self.counters:
            for full, other in others:
                if read[one.number].tobytes() != read[other.number].tobytes():
                    raise Unfit(
                        f"{full}: differs from {first} in the snapshot; the two are of one flat parameter in the "
                        "state, which has one for both. Use FullyShardedDataParallel(..., use_orig_params=True)"
                    )


_NOTHING: Any = object()
_DIFFERS = "in the snapshot it is not that of {others}; they are one flat parameter in the state"


def _held(full: str, tensor: torch.Tensor, owned: Owned | None) -> Held:
    return hold(full, tensor) if owned is None else owned.places[0][1].hold(full, tensor)


def _installer(state: Any, parameter: torch.Tensor, restored: Mapping[Any, Any]) -> Callable[[], None]:
    def install() -> None:
        if restored:
            state[parameter] = restored
        else:
            state.pop(parameter, None)

    return install


def _missing(name: str, number: int, missing: list[str], theirs: list[list[str]], ours: list[list[str]]) -> str:
    more = f" and {len(missing) - NAMES_SHOWN_MAX} more" if len(missing) > NAMES_SHOWN_MAX else ""
    text = f"{name}: no rank saved parameters of group {number}: {missing[:NAMES_SHOWN_MAX]}{more}"
    if len(theirs) == len(ours):
        return text
    return f"{text}; {len(theirs)} parameter groups in the snapshot, {len(ours)} in the state"


def _option_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    for option in dict.fromkeys((*a, *b)):
        if option not in a or option not in b:
            return f"only one has {option}"
        if not same(a[option], b[option]):
            return f"{option} is {_short(a[option])} and {_short(b[option])}"
    raise AssertionError("the options are equal")


def _short(setting: object) -> str:
    text = repr(setting)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _group_difference(name: str, theirs: list[list[str]], ours: list[list[str]]) -> str:
    if len(theirs) != len(ours):
        return f"{name}: {len(theirs)} parameter groups in the snapshot, {len(ours)} in the state"
    for number, (saved, group) in enumerate(zip(theirs, ours, strict=True)):
        if saved != group:
            gone = [own for own in saved if own not in group][:NAMES_SHOWN_MAX]
            new = [own for own in group if own not in saved][:NAMES_SHOWN_MAX]
            what = f"only in the snapshot: {gone}; only in the state: {new}" if gone or new else "in another order"
            return f"{name}: the parameters of group {number} differ; {what}"
    raise AssertionError("the groups are equal")
