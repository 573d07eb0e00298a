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
from fastckpt.job.modules import Parameters, describe_modules
from fastckpt.job.optimizer_targets import find_optimizer
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
    finding = Finding(state, catalog, values, selection, keep_missing, cast, rank, Parameters(state))
    for name, item in state.items():
        finding.item(name, item)
    finding.note_extra()
    return finding.targets


@dataclass
class Finding:
    """One walk over a state, noting what goes where and what does not fit."""

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
            find_optimizer(self, name, item)
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
