"""Dealing chunks to writers: of each class's holders how many write, which of them, and how much each.

prove     bytes for every holder (``placement``), by what the topology says they can carry: the bound that no plan beats
choose    enough writers, and no more than their objects are worth, in proportion to what leaves by each edge
          (``writers``)
place     bytes for each of them, less for ranks that were slow in the last saves (``rates``)
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
from fastckpt.plan.simulate import simulate
from fastckpt.plan.writers import Holders, Profile
from fastckpt.topology.topology import Tree

NAMES_SHOWN_MAX = 4
WORTH = 0.05
"""What part of a plan's time another must save for ranks to change what they write."""
UNEVEN = 1.5
"""Times as much as the others a writer may have of one class. Storage that is shared fairly gives it no more for it, so
that it ends after them."""
NEAR = 0.01
"""Writers are too few where all holders together would be faster by more than this."""
TRIES_MAX = 16
"""Of choosing more and more writers."""
STEP = 0.9
"""If a try takes more than this part of the time of the one before, all classes get more writers, not only those that
hold the others up."""
EXPECTED_TOLERANCE = 0.01
"""Of what is expected of ranks: far below what storage varies by."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dealt:
    """Who writes what, and how good that is. Seconds are by the topology's capacities; nan where it knows none."""

    runs: Integers
    """For each holder of each class, the number of chunks of its run."""
    written: Integers
    """(ranks,): bytes."""
    objects: int
    """That writers make: one a stream."""
    makespan_seconds: float
    """Of what is written."""
    bound_seconds: float
    """No placement is faster, whoever of all holders writes."""
    gap: float
    """makespan / bound - 1; where no capacity is known, of ranks that are all as fast."""
    binding: tuple[tuple[int, int], ...]
    """As of ``Placement``: what the bound follows from."""


@dataclass(frozen=True, eq=False)
class _Job:
    """What is to be dealt, and what does not depend on how fast ranks were."""

    given: ChunkedClasses
    alone: npt.NDArray[np.intp]
    """Classes of one rank."""
    shared: npt.NDArray[np.intp]
    """The others."""
    classes: Classes
    """The shared ones."""
    fixed: Integers
    """(ranks,): bytes that only this rank holds."""
    most: Integers
    """Of each shared class, how many can write."""
    holders: Holders | None
    """None if there are no shared classes."""
    best: Placement
    """On all holders, with all ranks as fast as the topology says."""


def by_level(binding: Sequence[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """The cut that gives the bound: levels, and the edges of each."""
    levels = itertools.groupby(binding, key=lambda pair: pair[0])
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
        self, tree: Tree, *, writers: int | None = None, streams: int | None = None, profile: Profile | None = None
    ) -> None:
        """``writers``: of one class at most; None for as many as ``profile`` finds enough. ``streams``: objects that
        each writer makes; None for as many as ``profile`` says."""
        self.tree = tree
        self.profile = profile or Profile()
        if streams is not None:
            self.profile = replace(self.profile, streams=streams)
        self.rates = Rates(len(tree.capacities[0]))
        self._writers = writers
        self._has_seconds = any(bool(np.isfinite(level).any()) for level in tree.capacities)
        ones = np.ones(len(tree.capacities[0]))
        self._tree = tree if self._has_seconds else replace(tree, capacities=(ones, *tree.capacities[1:]))
        """In which all ranks are as fast where nothing is known of anything."""
        self._last: tuple[_Job, Dealt, int] | None = None
        self._expected: npt.NDArray[np.float64] | None = None
        """Of what was dealt last."""

    def deal(self, given: ChunkedClasses) -> Dealt:
        """Runs for every class. ``ValueError`` if a rank is not in the tree."""
        job = self._prove(given)
        dealt = self._deal(job, self._measured(job))
        self._last, self._expected = (job, dealt, self.rates.version), None
        return dealt

    def outlook(self) -> dict[str, Any]:
        """What was dealt last, in plain values: how many ``writers`` there are, and where the topology knows capacities
        how long they take by it, how long making their ``objects`` takes by the profile, what no placement can be
        faster than, and for which edges."""
        if self._last is None:
            return {}
        dealt = self._last[1]
        found: dict[str, Any] = {"writers": int(np.count_nonzero(dealt.written)), "objects": dealt.objects}
        if self._has_seconds:
            found |= {
                "makespan_seconds": dealt.makespan_seconds,
                "object_seconds": dealt.objects / self.profile.objects_per_second,
                "bound_seconds": dealt.bound_seconds,
                "gap": dealt.gap,
                "binding": [name_edges(self.tree, *cut) for cut in by_level(dealt.binding)],
            }
        return found

    def learn(self, samples: npt.NDArray[np.uint16]) -> None:
        """Takes in what ``encode_rate`` made of each rank's share of a save as dealt last."""
        if self._last is None:
            return
        if self._expected is None:
            written = self._last[1].written
            with np.errstate(divide="ignore", invalid="ignore"):
                rates = written / simulate(self.tree, written, tolerance=EXPECTED_TOLERANCE).finish_seconds
            self._expected = np.where(np.isnan(rates), math.inf, rates)
        self.rates.add(samples, self._expected)

    def would_gain(self) -> bool:
        """Whether the same classes, dealt anew by what is known of the ranks' rates by now, would be written in a time
        shorter by ``WORTH`` of it."""
        if self._last is None or self._last[2] == self.rates.version:
            return False
        job, dealt, _ = self._last
        self._last = job, dealt, self.rates.version
        tree = self._measured(job)
        return makespan(tree, self._deal(job, tree).written) < makespan(tree, dealt.written) * (1 - WORTH)

    def _prove(self, given: ChunkedClasses) -> _Job:
        classes, ranks = given.classes, len(self.tree.capacities[0])
        outside = classes.holders[(classes.holders < 0) | (classes.holders >= ranks)]
        if len(outside):
            raise ValueError(f"rank {outside[0]} holds bytes and is not in the tree, which has {ranks} ranks")
        counts = np.diff(classes.starts)
        alone, shared = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
        fixed = np.zeros(ranks, np.int64)
        np.add.at(fixed, classes.holders[classes.starts[alone]], classes.bytes[alone])
        several = Classes(
            classes.bytes[shared],
            np.append(0, np.cumsum(counts[shared])),
            classes.holders[np.repeat(counts > 1, counts)],
        )
        most = np.minimum(self._most(given)[shared], counts[shared])
        holders = Holders(self.tree, several, most) if len(shared) else None
        return _Job(given, alone, shared, several, fixed, most, holders, place(self._tree, several, fixed))

    def _most(self, given: ChunkedClasses) -> Integers:
        """Of each class, how many can write: not more than there are chunks, where a small one is none."""
        most = np.ones(len(given.chunks), np.int64)
        for numbers, sizes in given.alike:
            most[numbers] = max(1, round(int(sizes.sum()) / max(1, int(sizes.max(initial=0)))))
        return most if self._writers is None else np.minimum(most, self._writers)

    def _measured(self, job: _Job) -> Tree:
        """The tree, with ranks that were slow as much slower than they would have to be for the plan that is best when
        nobody is. Slower than their own capacity would be too little: that may be more than others leave them."""
        slow = self.rates.slow()
        own = job.best.makespan_seconds
        written = job.fixed + np.bincount(job.classes.holders, job.best.shares, len(slow))
        slower = (slow < 1) & (written > 0)
        if not slower.any():
            return self._tree
        lowest, *above = self._tree.capacities
        limited = np.minimum(lowest, np.where(slower, slow * written / own, math.inf))
        return replace(self._tree, capacities=(limited, *above))

    def _deal(self, job: _Job, tree: Tree) -> Dealt:
        given, classes = job.given, job.given.classes
        counts = np.diff(classes.starts)
        shares = np.zeros(len(classes.holders), np.int64)
        shares[np.repeat(counts > 1, counts)] = self._place(job, tree)
        runs = np.zeros(len(classes.holders), np.int64)
        runs[classes.starts[job.alone]] = given.chunks[job.alone]
        phase = np.zeros(len(counts))
        phase[job.shared] = phases(len(job.shared))
        written = job.fixed.copy()
        for numbers, sizes in given.alike:
            at = classes.starts[numbers][:, None] + np.arange(counts[numbers[0]])
            # Where there are no more chunks than writers, each is to get one.
            is_tight = np.count_nonzero(shares[at], axis=1) * sizes.max(initial=0) > sizes.sum()
            runs[at] = cut_runs(sizes, shares[at], np.where(is_tight, 0.5, phase[numbers]))
            ends = np.concatenate([[0], np.cumsum(sizes)])[np.cumsum(runs[at], axis=1)]
            np.add.at(written, classes.holders[at], np.diff(ends, axis=1, prepend=0))
        chunks = np.zeros(len(written), np.int64)
        np.add.at(chunks, classes.holders, runs)
        seconds, bound = makespan(self._tree, written), job.best.bound_seconds
        return Dealt(
            runs=runs,
            written=written,
            objects=int(np.minimum(chunks, self.profile.streams).sum()),
            makespan_seconds=seconds if self._has_seconds else math.nan,
            bound_seconds=bound if self._has_seconds else math.nan,
            gap=seconds / bound - 1 if bound else 0.0,
            binding=job.best.binding,
        )

    def _place(self, job: _Job, tree: Tree) -> Integers:
        """Bytes of each holder of the shared classes: of as few writers as are enough, and of more for the classes that
        hold the others up, as long as that makes it faster and their objects are worth it."""
        if job.holders is None:
            return job.best.shares
        best = job.best if tree is self._tree else place(tree, job.classes, job.fixed)
        wanted, writers_max = self._wanted(job)
        found: list[Placement] = []
        while True:
            chosen = job.holders.choose(best.shares, wanted)
            if self._writers is None:
                chosen = self._with_writing(job, chosen)
            found.append(best if len(chosen) == len(best.shares) else _place_on(tree, job, chosen))
            is_near = found[-1].makespan_seconds <= best.bound_seconds * (1 + NEAR)
            if is_near or not self._has_seconds or len(found) == TRIES_MAX or len(_ranks(job, chosen)) >= writers_max:
                break
            # One class after the other may hold the others up.
            is_slow = len(found) > 1 and found[-1].makespan_seconds > STEP * found[-2].makespan_seconds
            grows = self._hold_up(job, chosen, found[-1]) | is_slow
            more = np.where(grows, np.minimum(2 * wanted, job.most), wanted)
            if (more == wanted).all():
                break
            wanted = more
        enough = min(each.makespan_seconds for each in found) * (1 + NEAR)
        return next(each.shares for each in found if each.makespan_seconds <= enough)

    def _hold_up(self, job: _Job, chosen: npt.NDArray[np.intp], placement: Placement) -> npt.NDArray[np.bool_]:
        """The classes that can only be written behind what binds."""
        is_behind = np.zeros(len(job.fixed), bool)
        binding = dict(by_level(placement.binding))
        for level, edges in enumerate(self._tree.edges_of_ranks()):
            is_behind |= np.isin(edges, binding.get(level, []))
        starts = np.searchsorted(chosen, job.classes.starts[:-1])
        return np.logical_and.reduceat(is_behind[job.classes.holders[chosen]], starts)

    def _with_writing(self, job: _Job, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Those chosen; but of classes that would be much to few, all holders that write something anyway, which makes
        no object more."""
        counts = np.diff(job.classes.starts)
        class_of = np.repeat(np.arange(len(counts)), counts)
        holders = job.classes.holders
        typical = (int(job.classes.bytes.sum()) + int(job.fixed.sum())) / len(_ranks(job, chosen))
        writers = np.bincount(class_of[chosen], minlength=len(counts))
        is_much = job.classes.bytes > UNEVEN * typical * writers
        writes = job.fixed > 0
        writes[holders[chosen[~is_much[class_of[chosen]]]]] = True
        is_much &= np.add.reduceat(writes[holders], job.classes.starts[:-1]) > writers
        is_chosen = np.zeros(len(holders), bool)
        is_chosen[chosen] = True
        return np.flatnonzero(np.where(is_much[class_of], writes[holders], is_chosen))

    def _wanted(self, job: _Job) -> tuple[Integers, int]:
        """By class how many writers would do, and how many ranks may write in all.

        Both follow from bytes and objects. What ranks can carry does not count: with more of it there would be fewer
        writers, and it would take longer.
        """
        size = job.classes.bytes
        is_idle = job.fixed[job.classes.holders] == 0
        idle, total = len(np.unique(job.classes.holders[is_idle])), int(size.sum())
        writing = int(np.count_nonzero(job.fixed))
        if self._writers is not None or not idle:
            return job.most, writing + idle
        used = [np.unique(edges[job.classes.holders]) for edges in self._tree.edges_of_ranks()]
        pool = min(float(level[which].sum()) for level, which in zip(self._tree.capacities[1:], used[1:], strict=True))
        narrow = replace(self.profile, bytes_per_second=min(pool, self.profile.bytes_per_second))
        count, most = narrow.enough_writers(total, idle), self.profile.most_writers(total, idle)
        # Who writes something anyway makes no object more.
        has_idle = np.logical_or.reduceat(is_idle, job.classes.starts[:-1])
        # Products of bytes do not fit into 64 bits.
        worth = np.maximum(-(-count * size.astype(object) // max(total, 1)), 1).astype(np.int64)
        wanted = np.where(has_idle & (count < idle), np.minimum(worth, job.most), job.most)
        return wanted, writing + max(count, most)


def _ranks(job: _Job, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Who writes."""
    return np.union1d(np.flatnonzero(job.fixed), job.classes.holders[chosen])


def _place_on(tree: Tree, job: _Job, chosen: npt.NDArray[np.intp]) -> Placement:
    """With these of the holders; shares are of all."""
    starts = np.searchsorted(chosen, job.classes.starts)
    placement = place(tree, Classes(job.classes.bytes, starts, job.classes.holders[chosen]), job.fixed)
    shares = np.zeros(len(job.classes.holders), np.int64)
    shares[chosen] = placement.shares
    return replace(placement, shares=shares)
