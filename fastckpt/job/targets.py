"""Where restored bytes go: for a user's state and a snapshot, the sinks to fill and what to do before and after.

Nothing is changed here. What does not fit is collected, so that one error can name all of it.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from fastckpt.buffers import address
from fastckpt.errors import RestoreError
from fastckpt.format import value
from fastckpt.format.dtype import item_bytes
from fastckpt.format.shard import Box
from fastckpt.format.tables import SHARED
from fastckpt.job import subclass
from fastckpt.job.aliases import find_aliases
from fastckpt.job.asked import Asked
from fastckpt.job.optimizer_targets import find_optimizer
from fastckpt.job.per_rank import Merge, PerRank, merged
from fastckpt.job.rng import RNGState
from fastckpt.job.staging import BITS, bits
from fastckpt.job.state import Stateful, is_rng
from fastckpt.job.tensors import Held, Shard, hold, hold_shard, storage_bytes
from fastckpt.job.values import from_plain, references, to_plain, torch_dtype
from fastckpt.plan.restore_plan import Catalog, Fit, Selection, Stored, Want, fit, heads
from fastckpt.plan.save_plan import OWN

if TYPE_CHECKING:
    from fastckpt.restore import SavedValue

log = logging.getLogger("fastckpt")

Load: TypeAlias = Callable[[Any], object]
"""Takes a value over: ``load_state_dict``, or what puts it where the old one was."""

_WAYS_OUT: Final = "Give fastckpt.PerRank(obj, merge=...) to make new ones of them, or leave it out with only=..."


class TensorSink:
    """Fills a live tensor in place, converting from the stored dtype if that is another."""

    def __init__(self, key: str, box: Box, tensor: torch.Tensor, stored_dtype: str) -> None:
        self._key = key
        self._box = box
        self._tensor = tensor.detach()
        self._dtype = torch_dtype(stored_dtype)
        self._stored_bytes = item_bytes(stored_dtype)
        kept = self._tensor
        self._storage_bytes = storage_bytes(kept)
        self._is_plain = (
            kept.device.type == "cpu"
            and kept.dtype == self._dtype
            and not (kept.is_conj() or kept.is_neg() or kept.is_inference() or kept._is_zerotensor())
        )

    @torch.no_grad()
    def place(self, offsets: tuple[int, ...], sizes: tuple[int, ...], data: memoryview) -> None:
        """``RestoreError`` if the tensor's storage was made smaller."""
        if self._tensor.untyped_storage().nbytes() < self._storage_bytes:
            raise RestoreError(f"{self._key} lost memory of its storage while it was being restored")
        target = self._tensor[Box(offsets, sizes).relative_to(self._box).slices()]
        if self._is_plain and target.is_contiguous():
            # Wherever the bytes lie, by one thread and without the interpreter's lock: torch's copy wants them aligned,
            # and each of the threads that read would have it start as many as there are cores.
            if len(data) != target.nbytes:
                raise RestoreError(f"{self._key}: {len(data)} bytes for the {target.nbytes} of {Box(offsets, sizes)}")
            ctypes.memmove(target.data_ptr(), address(data), len(data))
            increment_version(target)  # who has kept the tensor for a backward is to hear of it
            return
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

    value: SavedValue
    exact: bool
    """It is this rank's own, or all ranks that saved it had the same. Otherwise it is the lowest rank's of them, of a
    world of another size."""
    world_size: int
    """Ranks of the job that saved it."""
    saved: str
    """The name it was saved under."""

    @property
    def blob(self) -> bytes:
        """Encoded."""
        return self.value.blob

    def by_rank(self) -> list[object]:
        """What the ranks that saved it saved, decoded, each content once."""
        snapshot = self.value.snapshot
        digests = {rank: snapshot.value_digests(rank).get(self.saved) for rank in range(snapshot.world_size)}
        ranks = {digest: rank for rank, digest in digests.items() if digest is not None}
        return [value.decode(snapshot.value_blob(self.saved, rank)) for rank in ranks.values()]

    @property
    def resized(self) -> bool:
        """The job that saved it had another number of ranks than this one."""
        return self.world_size != self.value.world_size


@dataclass
class Targets:
    """What a restore does on this rank."""

    wants: list[Want] = field(default_factory=list)
    sinks: list[TensorSink] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    install: list[Callable[[], None]] = field(default_factory=list)
    """Run before any byte is read: gives optimizers the state tensors that are to be filled."""
    apply: list[Callable[[], object]] = field(default_factory=list)
    """Run once all bytes are in place: plain values, schedulers, loaders, random number generators. None refers to what
    leads back to it: the state would outlive its last use."""
    used: set[str] = field(default_factory=set)
    """Names of the snapshot's tensors and values that are restored."""
    fit: Fit | None = None
    """What the ranks have to judge together; set once all is found."""


def find_targets(
    state: dict[str, Any],
    catalog: Catalog,
    values: Mapping[str, RestoredValue],
    selection: Selection,
    asked: Asked,
    *,
    keep_missing: bool,
    cast: bool,
    rank: int,
) -> Targets:
    """Everything that restoring a snapshot into ``state`` takes, and every reason why it cannot be done."""
    finding = Finding(state, catalog, values, selection, asked, keep_missing, cast, rank)
    # Random number generators last: what is done to the others may draw.
    for name in sorted(state, key=lambda name: is_rng(state[name])):
        finding.item(name, state[name])
    finding.check_apart()
    finding.note_extra()
    if not finding.targets.problems:
        finding.run_merges()
    return finding.targets


@dataclass
class Finding:
    """One walk over a state, noting what goes where and what does not fit."""

    state: dict[str, Any]
    catalog: Catalog
    values: Mapping[str, RestoredValue]
    selection: Selection
    asked: Asked
    keep_missing: bool
    cast: bool
    rank: int
    targets: Targets = field(default_factory=Targets)
    merges: list[tuple[str, Merge, RestoredValue]] = field(default_factory=list)
    merged: dict[str, Any] = field(default_factory=dict)
    """What ``merges`` made, by name."""
    filled: dict[tuple[Any, ...], tuple[str, int]] = field(default_factory=dict)
    """For each tensor of the state, the first key it is filled under, and the number of the stored one."""
    to_fill: dict[str, Held] = field(default_factory=dict)
    """What is to be filled, by key: no two of them may lie in the same memory in part."""
    unused_names: list[str] = field(default_factory=list)
    """Saved parameters of optimizers that the state has not got."""

    def item(self, name: str, item: Any) -> None:
        if isinstance(item, nn.Module):
            held, extra = self.asked.modules.get(name, ([], {}))
            for entry in held:
                self.tensor(entry)
            for key, module in extra.items():
                self.value(key, module.set_extra_state)
        elif isinstance(item, torch.optim.Optimizer):
            find_optimizer(self, name, item)
        elif isinstance(item, torch.Tensor):
            self.tensor(hold(name, item))
        elif isinstance(item, Shard):
            # Where it only says what a parameter is, the snapshot need not say so too: the parameter is filled as such.
            if name in self.catalog.tensors or not self.asked.parameters.declares(item):
                self.tensor(hold_shard(name, item))
        elif isinstance(item, RNGState):
            self.rng(name, item)
        elif isinstance(item, PerRank):
            self.per_rank(name, item)
        elif isinstance(item, Stateful):
            self.value(name, item.load_state_dict, item.state_dict)
        else:
            state = self.state
            self.value(name, lambda tree: state.__setitem__(name, tree))

    def tensor(self, held: Held) -> None:
        if not self.selection.has(held.key) or not self.alike(held):
            return
        if held.parts:
            for part in held.parts:
                self.tensor(part)
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

    def alike(self, held: Held) -> bool:
        """Whether a tensor is taken apart in the state as in the snapshot, or in neither; notes what is not."""
        found = self.values.get(held.key)
        record = None if found is None else value.decode(found.blob)
        stored = self.catalog.tensors.get(held.key)
        if held.form is None and not subclass.is_record(record):
            if elsewhere := stored is None and self.elsewhere(held):
                self.targets.used.add(held.key)
            return not elsewhere
        if found is None and stored is None:
            self.missing(held.key)
            return False
        problem: str | None
        if held.form is None:
            problem = f"{subclass.describe(record)} in the snapshot, a plain {held.dtype} tensor in the state"
        elif found is None:
            problem = f"a plain tensor in the snapshot, {subclass.describe(held.form)} in the state"
        else:
            anywhere = self.fits_anywhere(held, found)
            records = found.by_rank() if anywhere else [record]
            differences = (subclass.difference(each, held.form, cast=self.cast, anywhere=anywhere) for each in records)
            problem = next(filter(None, differences), None)
            if problem is None and not anywhere and not found.exact:
                problem = (
                    f"{subclass.describe(record)}, but not made alike on the {found.world_size} ranks that saved it"
                )
        self.targets.used.add(held.key)
        if problem is None:
            return True
        self.targets.used.update(f"{held.key}.{rest}" for rest in self.catalog.below(f"{held.key}."))
        self.targets.used.update(name for name in self.values if name.startswith(f"{held.key}."))
        if held.pieces or held.parts:  # a rank with none of the elements has nothing to tell their class by
            self.problem(f"{held.key}: {problem}")
        return False

    def elsewhere(self, held: Held) -> bool:
        """Whether all elements are on other ranks, which have taken the tensor apart: here there was nothing to tell
        its class by."""
        return not held.pieces and 0 not in held.shape and bool(self.catalog.below(f"{held.key}."))

    def fits_anywhere(self, held: Held, found: RestoredValue) -> bool:
        """Whether what each rank has of its own beside its box is single numbers that all ranks had alike: a scale of
        the whole tensor, which goes with any box of it."""
        own = [part for part in held.parts if part.sharing == OWN]
        stored = [self.catalog.tensors.get(part.key) for part in own]
        owners = found.value.snapshot.layout.owners
        return bool(own) and all(
            not part.parts and math.prod(part.shape) == 1 and entry is not None and owners[entry.number] == SHARED
            for part, entry in zip(own, stored, strict=True)
        )

    def fill(self, held: Held, stored: Stored) -> None:
        if stored.shape != held.shape:
            self.problem(f"{held.key}: shape {list(stored.shape)} in the snapshot, {list(held.shape)} in the state")
        elif stored.dtype != held.dtype and not self.cast:
            self.problem(f"{held.key}: {stored.dtype} in the snapshot, {held.dtype} in the state (cast=True converts)")
        elif any(_is_expanded(view) for _, view in held.pieces):
            self.problem(f"{held.key}: its elements share memory (an expanded tensor); clone() it before restoring")
        else:
            self.to_fill[held.key] = held
            for box, view in held.pieces:
                self.targets.wants.append(Want(stored.number, box, len(self.targets.sinks)))
                self.targets.sinks.append(TensorSink(held.key, box, view, stored.dtype))

    def check_apart(self) -> None:
        """Notes tensors that share part of their memory: each would be filled over the other, by whoever is last."""
        try:
            find_aliases(self.to_fill)
        except ValueError as problem:
            self.problem(str(problem))

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

    def value(self, name: str, load: Load, template: Callable[[], Any] | None = None) -> None:
        found = self.find_value(name)
        if found is None:
            return
        if found.exact:
            self.load(name, found, load, template)
        else:
            self.problem(
                f"{name}: its value differed between the {found.world_size} ranks that saved it, and this job has "
                f"{found.value.world_size}. {_WAYS_OUT}"
            )

    def load(self, name: str, found: RestoredValue, load: Load, template: Callable[[], Any] | None = None) -> None:
        tree = value.decode(found.blob)
        tensors = self.referenced(name, tree, template)
        self.targets.apply.append(lambda: load(from_plain(tree, tensors)))

    def rng(self, name: str, rng: RNGState) -> None:
        found = self.find_value(name)
        if found is None:
            return
        report = log.warning if self.rank == 0 else log.debug
        if found.exact:

            def go_on(state: Any) -> None:
                rng.load_state_dict(state)
                if unlike := rng.unlike(state):
                    report("%s: not all random numbers go on where they were: %s", name, unlike)

            self.load(name, found, go_on)
            return
        text = (
            f"{name}: saved by {found.world_size} ranks, each with random numbers of its own; in this job of "
            f"{found.value.world_size} they continue in new streams, derived from those of rank 0"
        )
        blob, rank = found.blob, self.rank

        def derive() -> None:
            rng.derive(blob, rank)
            report("%s", text)

        self.targets.apply.append(derive)

    def per_rank(self, name: str, item: PerRank) -> None:
        found = self.find_value(name)
        if found is None:
            return
        own = item.obj
        load: Load = own.load_state_dict if isinstance(own, Stateful) else lambda tree: setattr(item, "obj", tree)
        if not found.resized:
            self.load(name, found, load, own.state_dict if isinstance(own, Stateful) else None)
        elif item.merge is None:
            self.problem(
                f"{name}: each of the {found.world_size} ranks that saved it had its own, and this job has "
                f"{found.value.world_size}. {_WAYS_OUT}"
            )
        else:
            self.targets.used.update(f"{name}.{rest}" for rest in self.catalog.below(f"{name}."))
            self.merges.append((name, item.merge, found))
            merged = self.merged
            self.targets.apply.append(lambda: load(merged[name]))

    def run_merges(self) -> None:
        """Calls what users gave to ``PerRank``: while nothing has been changed on any rank."""
        for name, merge, found in self.merges:
            self.merged[name] = merged(name, merge, found.value, self.rank)

    def referenced(self, name: str, tree: object, template: Callable[[], Any] | None) -> dict[str, torch.Tensor]:
        """New tensors for those a value refers to; distributed like the target's where that one is a DTensor."""
        tensors: dict[str, torch.Tensor] = {}
        existing: dict[str, torch.Tensor] = {}
        for key in references(tree):
            renamed = self.selection.renamed(key)
            stored = self.catalog.tensors.get(renamed)
            if ranks := self.catalog.lost.get(renamed):
                self.problem(
                    f"{key}: a tensor in {name}; each of the {ranks} ranks that saved it had its own, and this job has "
                    f"another number of ranks. {_WAYS_OUT}"
                )
                continue
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
            self.targets.used.add(renamed)
            self.fill(hold(key, tensors[key]), stored)
        return tensors

    def note_extra(self) -> None:
        """What the snapshot has below the names that were asked for, and the state has no place for: for the ranks
        together to judge, since another may have one."""
        names = [name for name in self.values if self.selection.has(name) and name not in self.targets.used]
        unused = [name for name in (*names, *self.unused_names) if not set(heads(name)).isdisjoint(self.state)]
        self.targets.fit = fit(self.catalog, list(self.state), self.targets.used, unused, self.targets.problems)


def _is_expanded(view: torch.Tensor) -> bool:
    """Whether elements may share memory: some stride does not step over all that smaller strides reach."""
    reach = 0
    for stride, size in sorted(zip(view.stride(), view.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
