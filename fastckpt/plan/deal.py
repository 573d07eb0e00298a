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
class Class:
    """Consecutive chunks, and the ranks that hold all of them."""

    ranks: Sequence[int]
    """In the order in which they write runs of the chunks."""
    sizes: Sequence[int]
    """Bytes by chunk."""


@dataclass(frozen=True, eq=False)
class Dealt:
    """Who writes what, and how good that is."""

    counts: list[list[int]]
    """For each class, and each of its ranks, the number of chunks of its run."""
    placement: Placement
    """Before runs were cut at chunk boundaries."""
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
        self._last: tuple[Sequence[Class], Dealt, float] | None = None

    def deal(self, classes: Sequence[Class]) -> Dealt:
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

    def _deal(self, classes: Sequence[Class]) -> Dealt:
        tree = self._measured()
        fixed = np.zeros(len(tree.capacities[0]), np.int64)
        for each in classes:
            if len(each.ranks) == 1:
                fixed[each.ranks[0]] += sum(each.sizes)
        shared = [each for each in classes if len(each.ranks) > 1]
        chosen = self._choose(shared, fixed)
        placement = place(tree, chosen, fixed)
        shares = iter(np.split(placement.shares, chosen.starts[1:-1]) if shared else [])
        offsets = iter(phases(len(shared)))
        written = fixed.copy()
        counts: list[list[int]] = []
        starts = iter(np.split(chosen.holders, chosen.starts[1:-1]) if shared else [])
        for each in classes:
            if len(each.ranks) == 1:
                counts.append([len(each.sizes)])
                continue
            own = dict(zip(next(starts).tolist(), next(shares).tolist(), strict=True))
            runs = cut_runs(each.sizes, [own.get(rank, 0) for rank in each.ranks], next(offsets))
            counts.append(runs)
            ends = np.concatenate([[0], np.cumsum(np.array(each.sizes, np.int64))])
            cuts = np.concatenate([[0], np.cumsum(runs)])
            written[np.array(each.ranks, np.intp)] += ends[cuts[1:]] - ends[cuts[:-1]]
        return Dealt(counts, placement, written, makespan(tree, written))

    def _choose(self, shared: Sequence[Class], fixed: npt.NDArray[np.int64]) -> Classes:
        """The holders of each class that are to write, by their places in the tree evenly spaced; where each class
        begins differs, so that classes of few chunks do not meet at the same ranks."""
        sizes = [sum(each.sizes) for each in shared]
        everybody = {rank for each in shared for rank in each.ranks if not fixed[rank]}
        enough = self._profile.enough_writers(sum(sizes), len(everybody), self._streams) if everybody else 0
        holders: list[npt.NDArray[np.intp]] = []
        for each, size, phase in zip(shared, sizes, phases(len(shared)), strict=True):
            ranks = np.array(each.ranks, np.intp)
            most = len(ranks)
            # Who writes something anyway makes no object more.
            if self._writers is not None:
                most = min(most, self._writers)
            elif enough < len(everybody) and not fixed[ranks].all():
                most = min(most, max(1, math.ceil(enough * size / sum(sizes))))
            count = max(1, min(most, len(each.sizes)))
            ranks = ranks[np.argsort(self._order[ranks], kind="stable")]
            at = ((np.arange(count) + phase) * len(ranks) / count).astype(np.intp) % len(ranks)
            holders.append(ranks[np.unique(at)])
        starts = np.cumsum([0, *map(len, holders)]).astype(np.intp)
        return Classes(np.array(sizes, np.int64), starts, np.concatenate([np.empty(0, np.intp), *holders]))


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
