"""Dealing chunks to writers: of each class's holders how many write, which of them, and how much each.

choose    enough writers, and no more than their objects are worth; spread over the tree, elsewhere for each class
place     bytes for each of them (``placement``), by what the topology and the last saves say they can carry
cut       the class's chunks into one run for each, at chunk boundaries

The coordinator deals, and publishes the runs: one number for each writer of a class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.plan.classes import ChunkedClasses
from fastckpt.plan.placement import Classes, Placement, cut_runs, makespan, phases, place
from fastckpt.plan.rates import Rates
from fastckpt.topology.topology import Tree

NAMES_SHOWN_MAX = 4
WORTH = 0.05
"""What part of a plan's time another must save for ranks to change what they write."""
WRITERS_MIN = 16
"""So few objects cost less than what one save differs from the next by, on any storage."""
GAIN_MIN = 0.03
"""Writers are enough where more would make the save so little faster."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a storage does with streams and objects."""

    stream_bytes_per_second: float = 0.6e9
    """Of one writer alone. The default is what one client of a parallel file system reached (Lustre with 24 targets,
    0.645 GB/s; a Dell/Intel white paper)."""
    bytes_per_second: float = math.inf
    """Of all writers together. By default the topology says."""
    objects_per_second: float = 1000.0
    """Created and made durable, of all writers together. The default is a cautious one."""

    def seconds(self, size: int, writers: int, objects: int) -> float:
        """How long ``writers`` streams take for ``size`` bytes, and for making ``objects``.

        Streams get in each other's way before they reach what the storage can: B(M) = W (1 - exp(-M c / W)).
        """
        alone = writers * self.stream_bytes_per_second
        pool = self.bytes_per_second
        together = alone if math.isinf(pool) else -pool * math.expm1(-alone / pool)
        return size / together + objects / self.objects_per_second

    def enough_writers(self, size: int, writers_max: int, objects_each: int) -> int:
        """The fewest writers of ``size`` bytes that are within ``GAIN_MIN`` of the best number up to ``writers_max``,
        where each makes ``objects_each`` objects."""
        if writers_max <= WRITERS_MIN:
            return writers_max
        counts: list[int] = np.unique(np.geomspace(WRITERS_MIN, writers_max, 256).astype(int)).tolist()
        seconds = [self.seconds(size, count, count * objects_each) for count in counts]
        limit = min(seconds) * (1 + GAIN_MIN)
        return next(count for count, each in zip(counts, seconds, strict=True) if each <= limit)


@dataclass(frozen=True, eq=False)
class Dealt:
    """Who writes what, and how good that is."""

    runs: npt.NDArray[np.int64]
    """For each holder of each class, the number of chunks of its run."""
    placement: Placement
    """Of the classes of several ranks, on those chosen to write; before runs were cut at chunk boundaries."""
    written: npt.NDArray[np.int64]
    """(ranks,): bytes."""
    makespan_seconds: float
    """Of what is written; nan where no capacity is known."""


def by_level(placement: Placement) -> list[tuple[int, list[int]]]:
    """The cut that gives the bound: levels, and the edges of each."""
    levels = itertools.groupby(placement.binding, key=lambda pair: pair[0])
    return [(level, [edge for _, edge in pairs]) for level, pairs in levels]


def name_edges(tree: Tree, level: int, edges: Sequence[int]) -> str:
    """What edges of a level are called together: the first few by name."""
    count, kind = len(tree.capacities[level]), tree.levels[level]
    if count == 1:
        return kind
    if len(edges) == count:
        return f"all {count} {kind}s"
    more = len(edges) - NAMES_SHOWN_MAX
    return ", ".join(tree.names[level][edge] for edge in edges[:NAMES_SHOWN_MAX]) + (
        f" and {more} more" if more > 0 else ""
    )


class Dealer:
    """Deals what the ranks of a job hold, save after save. One thread at a time."""

    def __init__(
        self, tree: Tree, *, writers: int | None = None, streams: int = 1, profile: Profile | None = None
    ) -> None:
        """``writers``: of one class at most; None for as many as ``profile`` finds enough. ``streams``: packs that each
        writer makes."""
        self.tree = tree
        self._writers = writers
        self._streams = streams
        self._profile = _known(profile or Profile(), tree)
        self.rates = Rates(len(tree.capacities[0]))
        self._order = _places(tree)
        self._last: tuple[ChunkedClasses, Dealt, int] | None = None

    def deal(self, classes: ChunkedClasses) -> Dealt:
        """Runs for every class. ``ValueError`` if a rank is not in the tree."""
        dealt = self._deal(classes)
        self._last = classes, dealt, self.rates.version
        return dealt

    def outlook(self) -> dict[str, Any]:
        """What was dealt last, in plain values: how many ``writers`` there are, and where capacities are known how long
        they take, by what was known then, and which edges no placement could do without."""
        if self._last is None:
            return {}
        dealt, bound_seconds = self._last[1], self._last[1].placement.bound_seconds
        found: dict[str, Any] = {"writers": int(np.count_nonzero(dealt.written))}
        if math.isfinite(dealt.makespan_seconds):
            found |= {
                "makespan_seconds": dealt.makespan_seconds,
                "bound_seconds": bound_seconds,
                "gap": dealt.makespan_seconds / bound_seconds - 1 if bound_seconds else 0.0,
                "binding": [name_edges(self.tree, *cut) for cut in by_level(dealt.placement)],
            }
        return found

    def would_gain(self) -> bool:
        """Whether the same classes, dealt anew by what is known of the ranks' rates by now, would be written in a time
        shorter by ``WORTH`` of it."""
        if self._last is None or self._last[2] == self.rates.version:
            return False
        classes, dealt, _ = self._last
        self._last = classes, dealt, self.rates.version
        anew = self._deal(classes)
        now = makespan(self._measured(), dealt.written)
        return anew.makespan_seconds < now * (1 - WORTH)

    def _measured(self) -> Tree:
        """The tree, with ranks as fast as they were in their last saves where that is less than it says."""
        slowest, *above = self.tree.capacities
        return replace(self.tree, capacities=(self.rates.limit(slowest), *above))

    def _deal(self, given: ChunkedClasses) -> Dealt:
        tree, classes = self._measured(), given.classes
        ranks = len(tree.capacities[0])
        outside = classes.holders[(classes.holders < 0) | (classes.holders >= ranks)]
        if len(outside):
            raise ValueError(f"rank {outside[0]} holds bytes and is not in the tree, which has {ranks} ranks")
        counts = np.diff(classes.starts)
        alone, shared = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
        fixed = np.zeros(ranks, np.int64)
        np.add.at(fixed, classes.holders[classes.starts[alone]], classes.bytes[alone])
        phase = np.zeros(len(counts))
        phase[shared] = phases(len(shared))
        chosen = self._choose(given, shared, phase[shared], fixed)
        starts = np.append(np.searchsorted(chosen, classes.starts[shared]), len(chosen))
        placement = place(tree, Classes(classes.bytes[shared], starts, classes.holders[chosen]), fixed)
        shares = np.zeros(len(classes.holders), np.int64)
        shares[chosen] = placement.shares
        runs = np.zeros(len(classes.holders), np.int64)
        runs[classes.starts[alone]] = given.chunks[alone]
        written = fixed.copy()
        for numbers, sizes in given.alike:
            at = classes.starts[numbers][:, None] + np.arange(counts[numbers[0]])
            runs[at] = cut_runs(sizes, shares[at], phase[numbers])
            ends = np.concatenate([[0], np.cumsum(sizes)])[np.cumsum(runs[at], axis=1)]
            np.add.at(written, classes.holders[at], np.diff(ends, axis=1, prepend=0))
        return Dealt(runs, placement, written, makespan(tree, written))

    def _choose(
        self,
        given: ChunkedClasses,
        shared: npt.NDArray[np.intp],
        phase: npt.NDArray[np.float64],
        fixed: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.intp]:
        """Which holders of the ``shared`` classes are to write, as positions among all holders, ascending.

        Those of a class are evenly spaced by their places in the tree. Where each class begins differs, by its
        ``phase``, so that classes of few chunks do not meet at the same ranks.
        """
        if not len(shared):
            return np.empty(0, np.intp)
        classes = given.classes
        counts = np.diff(classes.starts)[shared]
        firsts = np.cumsum(counts) - counts
        class_of, at = _ragged(counts)
        holding = classes.starts[shared][class_of] + at
        ranks = classes.holders[holding]
        is_idle = fixed[ranks] == 0
        size = classes.bytes[shared]
        total, everybody = int(size.sum()), len(np.unique(ranks[is_idle]))
        enough = self._profile.enough_writers(total, everybody, self._streams) if everybody else 0
        most = counts
        if self._writers is not None:
            most = np.minimum(counts, self._writers)
        elif enough < everybody:
            # Products of bytes do not fit into 64 bits.
            worth = -(-enough * size.astype(object) // max(total, 1)).astype(np.int64)
            # Who writes something anyway makes no object more.
            most = np.where(np.logical_or.reduceat(is_idle, firsts), np.minimum(counts, worth), counts)
        most = np.maximum(np.minimum(most, given.chunks[shared]), 1)
        writing, step = _ragged(most)
        spot = ((step + phase[writing]) * counts[writing] / most[writing]).astype(np.intp) % counts[writing]
        by_place = np.lexsort([self._order[ranks], class_of])
        return np.unique(holding[by_place[firsts[writing] + spot]])


def _ragged(counts: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Numbers of rows of these lengths, one for each entry, and its position in the row."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)


def _places(tree: Tree) -> npt.NDArray[np.intp]:
    """By rank: its place among all ranks when those that share edges near the storage follow each other."""
    order = np.lexsort([*tree.edges_of_ranks()])
    places = np.empty(len(order), np.intp)
    places[order] = np.arange(len(order))
    return places


def _known(profile: Profile, tree: Tree) -> Profile:
    """The profile, with what the topology says of streams and storage where it says something."""
    ranks = tree.capacities[0][np.isfinite(tree.capacities[0])]
    pool = float(tree.capacities[-1].sum())
    return replace(
        profile,
        stream_bytes_per_second=float(np.median(ranks)) if len(ranks) else profile.stream_bytes_per_second,
        bytes_per_second=min(pool, profile.bytes_per_second),
    )
