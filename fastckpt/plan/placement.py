"""Who writes how much of what several ranks hold: shares that take the least time, and the proof of how near they are.

A plan takes as long as its slowest edge: the largest load / capacity over all edges of the tree from the ranks to the
storage. The least such time is a linear program, and a flow: bytes go from each class to the ranks that hold it and up
the tree. Two facts follow:

* *The proof.* If all holders of some bytes lie behind a set of edges, these bytes must pass it: no plan is faster than
  those bytes / the capacity of those edges. Of the best such cut some plan is as fast (max-flow min-cut; Ford and
  Fulkerson 1956).
* *The solver.* Give each edge a price. Each class is dealt to its holders in proportion to exp(-price of the path). An
  edge that is loaded beyond what a target time allows becomes dearer by log(load / allowed), any other cheaper by as
  much, down to nothing; level by level, over and over. This ends at the shares that meet the target and are nearest to
  equal ones, by relative entropy: of all plans that are as fast, the least skewed. Cuts follow from the prices: all
  that is dearer than a threshold, for every threshold.

The solver is iterative scaling (Deming and Stephan 1940; Sinkhorn 1967; that it projects: Csiszar 1975), over-relaxed
(Thibault, Chizat, Dossal and Papadakis 2021). That it deals near-optimally to holders with capacities: Agrawal,
Zadimoghaddam and Mirrokni, ICML 2018; by matrix scaling: arXiv 2510.01107. Shares become chunks by wrapping around
(McNaughton 1959): a class's chunks in a row, one run for each writer.

Pure functions. The same input gives the same shares on one machine; across machines exp and log may differ in the last
bit, so one rank solves and the others are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastckpt.topology.topology import Tree

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]
Levels = Sequence[Floats]
"""One number for each edge, by level of the tree."""

SWEEPS_MAX = 4000
SWEPT_MAX = 100_000_000
"""Holders times sweeps: what ends the search on large trees. A limit on time would make the plan depend on it."""
CHECK_SWEEPS = 4
"""Sweeps between two looks at the time and the bound, which cost as much as a sweep."""
RELAXATION = 1.5
"""How far beyond what would just meet the target a price goes: it takes a third of the sweeps away."""
STEP_MAX = 1e9
"""Factor by which one sweep may change an edge's weight."""
PROHIBITIVE = 1000.0
"""A price that nothing is worth: exp(-1000) is 0."""


@dataclass(frozen=True, eq=False)
class Classes:
    """Bytes that several ranks hold, by the set of ranks that hold them."""

    bytes: Integers
    """(classes,)"""
    starts: Indices
    """(classes + 1,): the holders of class g are ``holders[starts[g]:starts[g + 1]]``."""
    holders: Indices
    """(starts[-1],) ranks, each once in a class, in the order in which they write consecutive bytes of it."""


def starts_of(counts: npt.ArrayLike) -> Indices:
    """Where rows of these lengths start, one after the other, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.intp)


@dataclass(frozen=True, eq=False)
class Placement:
    """Bytes for each holder of each class, and how good that is."""

    shares: Integers
    """(starts[-1],): bytes that ``holders[j]`` writes; those of a class sum to its bytes."""
    makespan_seconds: float
    """Of these shares and what only one rank holds; nan where no capacity is known."""
    bound_seconds: float
    """No placement is faster; nan where no capacity is known."""
    gap: float
    """makespan / bound - 1"""
    binding: tuple[tuple[int, int], ...]
    """(level, edge) of the edges behind which all holders of the bytes lie that give the bound; none without bytes."""


@dataclass(frozen=True, eq=False)
class _Cut:
    seconds: float
    edges: tuple[Indices, ...]
    """By level."""


class _Job:
    """The classes that have bytes, over a tree that has capacities."""

    def __init__(self, tree: Tree, classes: Classes, fixed: Integers) -> None:
        self.tree = tree
        self.fixed = fixed
        self.fixed_loads = loads(tree, fixed)
        has_bytes = classes.bytes > 0
        counts = np.diff(classes.starts)
        self.entries = np.repeat(has_bytes, counts)
        """Which of the given holders belong to a class that has bytes."""
        counts = counts[has_bytes]
        self.bytes = classes.bytes[has_bytes]
        self.starts = np.cumsum(counts) - counts
        self.class_of = np.repeat(np.arange(len(counts)), counts)
        self.holders = classes.holders[self.entries]

    def deal(self, prices: Levels) -> Floats:
        """Bytes by holder: of each class, in proportion to exp(-price of the holder's path)."""
        price = _reach(self.tree, prices)[0][self.holders]
        least = np.minimum.reduceat(price, self.starts)
        weights: Floats = np.exp(least[self.class_of] - price)
        weights *= (self.bytes / np.add.reduceat(weights, self.starts))[self.class_of]
        return weights

    def loads(self, shares: npt.NDArray[np.float64] | Integers) -> list[Floats]:
        return loads(self.tree, self.fixed + np.bincount(self.holders, shares, len(self.fixed)))

    def round(self, shares: Floats) -> Integers:
        """Integers next to the shares that sum to each class's bytes, by rounding where each share ends."""
        ends = np.cumsum(shares)
        ends -= (ends[self.starts] - shares[self.starts])[self.class_of]
        whole = np.minimum(np.rint(ends).astype(np.int64), self.bytes[self.class_of])
        lasts = np.append(self.starts[1:], len(shares)) - 1
        whole[lasts] = self.bytes
        before = np.roll(whole, 1)
        before[self.starts] = 0
        return whole - before

    def cut(self, prices: Levels) -> _Cut:
        """The best of the cuts between what is dearer than a threshold and the storage, over all thresholds."""
        reach = _reach(self.tree, prices)
        tops = _tops(self.tree, reach)
        priced = [end > top for top, end in zip(tops, reach, strict=True)]
        top, end, capacity = (
            np.concatenate([level[which] for level, which in zip(levels, priced, strict=True)])
            for levels in (tops, reach, self.tree.capacities)
        )
        nothing = _Cut(0.0, tuple(np.empty(0, np.intp) for _ in reach))
        if not len(top):
            return nothing
        class_price = np.minimum.reduceat(reach[0][self.holders], self.starts)
        price = np.concatenate([class_price, reach[0]])
        demand = np.concatenate([self.bytes, self.fixed])
        # Between two thresholds where edges end the capacity can only grow and the bytes can only shrink.
        thresholds = np.unique(np.append(end, 0.0))[:-1]
        bytes_behind = _above(thresholds, price, demand)
        crossing = _above(thresholds, end, capacity) - _above(thresholds, top, capacity)
        # What is left of a large sum after a larger was subtracted may be wrong: the one chosen is added up anew.
        usable = crossing > 1e-12 * capacity.sum()
        if not usable.any():
            return nothing
        threshold = thresholds[usable][np.argmax(bytes_behind[usable] / crossing[usable])]
        edges = tuple(
            np.flatnonzero((top <= threshold) & (threshold < end)) for top, end in zip(tops, reach, strict=True)
        )
        total = sum(float(level[cut].sum()) for level, cut in zip(self.tree.capacities, edges, strict=True))
        behind = float(demand[price > threshold].sum())
        return _Cut(behind / total, edges) if behind else nothing


def _reach(tree: Tree, prices: Levels) -> list[Floats]:
    """By edge: the price from the edge, itself included, to the storage."""
    reach = [prices[-1]]
    for parents, price in zip(reversed(tree.parents), reversed(prices[:-1]), strict=True):
        reach.append(price + reach[-1][parents])
    return reach[::-1]


def _tops(tree: Tree, reach: Levels) -> list[Floats]:
    """By edge: the price from its upper end to the storage."""
    tops: list[Floats] = [above[parents] for parents, above in zip(tree.parents, reach[1:], strict=True)]
    return [*tops, np.zeros(len(reach[-1]))]


def _above(thresholds: Floats, at: Floats, amounts: npt.NDArray[np.float64] | Integers) -> Floats:
    """For each threshold, the amounts that lie above it."""
    order = np.argsort(at)
    below: Floats = np.concatenate([[0.0], np.cumsum(amounts[order], dtype=np.float64)])
    above: Floats = below[-1] - below[np.searchsorted(at[order], thresholds, side="right")]
    return above


def loads(tree: Tree, written: npt.NDArray[np.float64] | Integers) -> list[Floats]:
    """Bytes that pass each edge, by level, where rank r writes ``written[r]`` bytes."""
    levels: list[Floats] = [np.asarray(written, np.float64)]
    for parents, capacities in zip(tree.parents, tree.capacities[1:], strict=True):
        levels.append(np.bincount(parents, levels[-1], len(capacities)).astype(np.float64, copy=False))
    return levels


def _seconds(tree: Tree, levels: Levels) -> float:
    return max(float((load / capacity).max()) for load, capacity in zip(levels, tree.capacities, strict=True))


def makespan(tree: Tree, written: npt.NDArray[np.float64] | Integers) -> float:
    """Seconds until all is written where rank r writes ``written[r]`` bytes: those of the slowest edge. nan where no
    capacity is known."""
    return _seconds(tree, loads(tree, written)) if _has_capacities(tree) else float("nan")


def _has_capacities(tree: Tree) -> bool:
    return any(bool(np.isfinite(capacities).any()) for capacities in tree.capacities)


def place(tree: Tree, classes: Classes, fixed: Integers, *, gap_max: float = 0.005) -> Placement:
    """Deals each class to its holders, beside the ``fixed`` bytes (by rank) that no other rank holds.

    Seeks the least time until it is proven to be within ``gap_max`` of it, or the limits on sweeps are reached; the
    result says how near it came. Shares are whole bytes. Where no capacity is known, all ranks count as equally fast.

    Raises ValueError if a class has bytes and no holder, or if ranks are not those of the tree.
    """
    _check(tree, classes, fixed)
    known = _has_capacities(tree)
    if not known:
        ranks = len(tree.capacities[0])
        tree = Tree(tree.levels, tree.parents, (np.ones(ranks), *tree.capacities[1:]), tree.names)
    job = _Job(tree, classes, fixed)
    shares, cut = _solve(job, gap_max) if len(job.bytes) else (np.empty(0), _first_cut(job))
    placed = np.zeros(len(classes.holders), np.int64)
    placed[job.entries] = job.round(shares) if len(job.bytes) else 0
    seconds = makespan(tree, fixed + np.bincount(classes.holders, placed, len(fixed)))
    return Placement(
        shares=placed,
        makespan_seconds=seconds if known else float("nan"),
        bound_seconds=cut.seconds if known else float("nan"),
        gap=seconds / cut.seconds - 1 if seconds else 0.0,
        binding=tuple((level, int(edge)) for level, edges in enumerate(cut.edges) for edge in edges),
    )


def _check(tree: Tree, classes: Classes, fixed: Integers) -> None:
    ranks = len(tree.capacities[0])
    if len(fixed) != ranks:
        raise ValueError(f"fixed has {len(fixed)} ranks and the tree {ranks}")
    if len(classes.holders) and not 0 <= classes.holders.min() <= classes.holders.max() < ranks:
        wrong = classes.holders[(classes.holders < 0) | (classes.holders >= ranks)][0]
        raise ValueError(f"rank {wrong} holds bytes and is not in the tree, which has {ranks} ranks")
    orphans = np.flatnonzero((classes.bytes > 0) & (np.diff(classes.starts) == 0))
    if len(orphans):
        raise ValueError(f"class {orphans[0]} has {classes.bytes[orphans[0]]} bytes that no rank holds")


def _solve(job: _Job, gap_max: float) -> tuple[Floats, _Cut]:
    """The best shares found, not yet whole, and the best cut."""
    capacities = job.tree.capacities
    prices = [np.zeros(len(level)) for level in capacities]
    limited = [level for level, known in enumerate(capacities) if np.isfinite(known).any()]
    cut = _first_cut(job)
    if not cut.seconds:
        # Every byte has a way past all limits.
        return job.deal([np.where(np.isfinite(level), PROHIBITIVE, 0.0) for level in capacities]), cut
    shares = job.deal(prices)
    levels = job.loads(shares)
    best, best_seconds = shares, _seconds(job.tree, levels)
    for sweep in range(1, min(SWEEPS_MAX, SWEPT_MAX // len(job.holders)) + 1):
        if best_seconds <= cut.seconds * (1 + gap_max):
            break
        target = max(cut.seconds * (1 + gap_max / 4), (cut.seconds * best_seconds) ** 0.5)
        for level in limited:
            allowed = capacities[level] * target
            room = np.maximum(allowed - job.fixed_loads[level], allowed / STEP_MAX)
            step = np.log(np.clip((levels[level] - job.fixed_loads[level]) / room, 1 / STEP_MAX, STEP_MAX))
            price = np.maximum(prices[level] + RELAXATION * step, 0.0)
            if (price != prices[level]).any():
                prices[level] = price
                shares = job.deal(prices)
                levels = job.loads(shares)
        if sweep % CHECK_SWEEPS == 0:
            seconds = _seconds(job.tree, levels)
            if seconds < best_seconds:
                best, best_seconds = shares, seconds
            cut = max(cut, job.cut(prices), key=lambda each: each.seconds)
    return best, cut


def _first_cut(job: _Job) -> _Cut:
    """The best of the cuts that need no search: each level, the highest limits, and the edges most loaded with what
    nobody else holds."""
    finite = [np.isfinite(level).astype(np.float64) for level in job.tree.capacities]
    candidates = [finite]
    for level, capacity in enumerate(job.tree.capacities):
        for prices in (finite[level], job.fixed_loads[level] / capacity):
            candidates.append([prices if own == level else np.zeros_like(one) for own, one in enumerate(finite)])
    return max((job.cut(prices) for prices in candidates), key=lambda cut: cut.seconds)


def phases(count: int) -> Floats:
    """Numbers in (0, 1) of which any that follow each other are far apart: 1/2, 1/4, 3/4, 1/8, ... (van der Corput
    1935)."""
    phases = np.zeros(count)
    numbers = np.arange(1, count + 1)
    digit = 0.5
    while numbers.any():
        phases += digit * (numbers & 1)
        numbers >>= 1
        digit /= 2
    return phases


def cut_runs(sizes: npt.ArrayLike, shares: npt.ArrayLike, phase: npt.ArrayLike = 0.5) -> Integers:
    """Cuts consecutive chunks of the given sizes into consecutive runs, one a writer, in proportion to ``shares``.

    Returns the number of chunks of each run. ``shares`` are those of one class, or (classes, writers) for classes whose
    chunks are of the same sizes; then there may be a ``phase`` for each. Where shares end inside a chunk, the cut is
    behind it if more than 1 - ``phase`` of the chunk lies before, else before it: classes of equal sizes with different
    phases are not all off at the same writers. The bytes of a writer, as those of writers next to each other together,
    are off by one chunk at most. ``ValueError`` if there are bytes and all shares of a class are 0.
    """
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    count, total = len(ends) - 1, int(ends[-1])
    # Products of bytes and shares do not fit into 64 bits.
    given = np.cumsum(np.asarray(shares, object), axis=-1)
    whole = given[..., -1:]
    if total and not whole.all():
        raise ValueError(f"{total} bytes are to be written and all shares are 0")
    if not count:
        return np.zeros(given.shape, np.int64)
    targets = (given * total // np.maximum(whole, 1)).astype(np.int64)
    cuts = np.searchsorted(ends[1:], targets)
    start, end = ends[cuts], ends[cuts + 1]
    before = 1 - np.asarray(phase, np.float64)[..., None]
    cuts += (start < targets) & ((targets == end) | (targets - start > before * (end - start)))
    cuts = np.maximum.accumulate(cuts, axis=-1)
    cuts[..., -1] = count
    return np.diff(cuts, axis=-1, prepend=0).astype(np.int64, copy=False)
