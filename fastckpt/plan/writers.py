"""How many of the holders of what several ranks hold write it, and which.

Enough writers, and no more than their objects are worth: that says a profile of the storage. Of each class they are
taken by systematic sampling: its holders lie in a row, in the order of the tree, each as long as its part of the bytes
in the plan in which everybody writes, and whoever is hit by one of m marks at equal distances writes. So of every edge,
at every level, as many holders write as fit what leaves through it, but for one. Where the edges of a class carry
equally much, equally many behind each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastckpt.plan.placement import Classes, phases
from fastckpt.topology.topology import Tree

WRITERS_MIN = 16
"""So few objects cost less than what one save differs from the next by, on any storage."""
GAIN_MIN = 0.03
"""Writers are enough where more would make the save so little faster."""
WORTH_MAX = 2.0
"""More than enough may write where only so it is as fast as the topology allows; as long as their number makes the
profile's time no longer than this many times the shortest."""
TURNS = 16
"""Each edge comes so often that once more or less does not matter."""
ADDED_MAX = 0.5
"""Of all writers: so many may be added for classes of fewer writers than edges to have equally many behind each."""
ALIKE = 0.01
"""Edges that carry equally much but for so much are to have equally many writers."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]


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
    streams: int = 4
    """Of a writer: each makes an object of its own. Four were the fastest in ``bench/compare``, on a local device of
    4 GB/s."""

    def seconds(self, size: int, writers: int, objects: int) -> float:
        """How long ``writers`` take for ``size`` bytes, and for making ``objects``.

        Writers get in each other's way before they reach what the storage can: B(M) = W (1 - exp(-M c / W)).
        """
        alone = writers * self.stream_bytes_per_second
        pool = self.bytes_per_second
        together = alone if math.isinf(pool) else -pool * math.expm1(-alone / pool)
        return size / together + objects / self.objects_per_second

    def enough_writers(self, size: int, writers_max: int) -> int:
        """The fewest writers of ``size`` bytes that are within ``GAIN_MIN`` of the best number up to
        ``writers_max``."""
        return min(self._within(size, writers_max, 1 + GAIN_MIN))

    def most_writers(self, size: int, writers_max: int) -> int:
        """The most writers of ``size`` bytes that are within ``WORTH_MAX`` times the best number up to
        ``writers_max``."""
        return max(self._within(size, writers_max, WORTH_MAX))

    def _within(self, size: int, writers_max: int, factor: float) -> list[int]:
        if writers_max <= WRITERS_MIN:
            return [writers_max]
        counts: list[int] = np.unique(np.geomspace(WRITERS_MIN, writers_max, 256).astype(int)).tolist()
        seconds = [self.seconds(size, count, count * self.streams) for count in counts]
        limit = min(seconds) * factor
        return [count for count, each in zip(counts, seconds, strict=True) if each <= limit]


class Holders:
    """The holders of classes, in the order of a tree, from whom to choose."""

    def __init__(self, tree: Tree, classes: Classes, most: Integers) -> None:
        """``most``: of each class, how many may write: 1 or more."""
        ways = list(tree.edges_of_ranks())
        counts = np.diff(classes.starts)
        class_of = np.repeat(np.arange(len(counts)), counts)
        # Edges near the storage count first.
        self._order = np.lexsort([*(edges[classes.holders] for edges in ways), class_of])
        self._class_of = class_of[self._order]
        self._holders = classes.holders[self._order]
        self._ranks = len(tree.capacities[0])
        edges = ways[_level(tree)][self._holders]
        first = np.append(True, (np.diff(self._class_of) != 0) | (np.diff(edges) != 0))
        self._starts = np.flatnonzero(first)
        """Of groups: the holders of one class behind one edge."""
        self._group_of = np.cumsum(first) - 1
        self._group_class = self._class_of[self._starts]
        self._class_starts = np.searchsorted(self._group_class, np.arange(len(counts)))
        sizes = np.diff(np.append(self._starts, len(self._order)))
        self._counts = counts
        self._edges = np.bincount(self._group_class, minlength=len(counts))
        """By class."""
        self._each_most = np.minimum.reduceat(sizes, self._class_starts)
        """By class: of one edge, how many writers there can be behind each."""
        self._most = most
        # Classes that are held behind the same edges get the same number.
        marks = np.random.default_rng(0).integers(0, 2**64, len(tree.capacities[_level(tree)]), np.uint64)
        self._behind = np.add.reduceat(marks[edges[self._starts]], self._class_starts)

    def choose(self, shares: Integers, wanted: Integers) -> Indices:
        """Positions of those who are to write, ascending. ``shares``: bytes of all holders where all of them may write;
        ``wanted``: of each class, how many writers would do."""
        share = shares[self._order].astype(np.float64)
        flows, is_even = _evened(np.add.reduceat(share, self._starts), self._class_starts, self._group_class)
        numbers, is_rounded = self._numbers(np.minimum(wanted, self._most), is_even)
        lengths = (numbers / np.add.reduceat(flows, self._class_starts))[self._group_class] * flows
        parts, is_flat = _evened(share, self._starts, self._group_of)
        parts *= (lengths / np.add.reduceat(parts, self._starts))[self._group_of]
        is_hit = self._hit(numbers, lengths, parts)
        # Behind each edge there are to be as many writers in all: who takes turns for one class is spared by those that
        # have equally many everywhere, as far as there are others.
        is_busy = np.zeros(self._ranks, bool)
        is_busy[self._holders[is_hit & ~is_rounded[self._class_of]]] = True
        spared = is_busy[self._holders] & (is_rounded[self._group_class] & is_flat)[self._group_of]
        order = self._order
        if spared.any():
            by_turn = np.lexsort([spared, self._group_of])
            order, spared = order[by_turn], spared[by_turn]
            busy = np.bincount(self._group_of, spared, len(self._starts))
            idle = np.bincount(self._group_of, ~spared, len(self._starts))
            each_idle = np.minimum(lengths / np.maximum(idle, 1), 1.0)
            each_busy = np.maximum(lengths - idle, 0.0) / np.maximum(busy, 1)
            parts = np.where(
                (busy > 0)[self._group_of],
                np.where(spared, each_busy[self._group_of], each_idle[self._group_of]),
                parts[by_turn],
            )
            is_hit = self._hit(numbers, lengths, parts)
        return np.sort(order[is_hit])

    def _hit(self, numbers: Integers, lengths: Floats, parts: Floats) -> npt.NDArray[np.bool_]:
        """Who of the holders in a row is hit by a mark. ``lengths``: of groups; ``parts``: of their holders."""
        # Sums of each group by itself: groups that are alike then have the same marks, to the last bit.
        before = _sums(lengths, self._class_starts, self._group_class) - lengths
        ends = _sums(parts, self._starts, self._group_of) + before[self._group_of]
        marks = np.floor(ends + self._offsets(numbers)[self._class_of])
        is_hit = np.append(True, marks[1:] > marks[:-1])
        firsts = self._starts[self._class_starts]
        is_hit[firsts] = marks[firsts] > 0
        is_hit |= (numbers >= self._counts)[self._class_of]
        return is_hit

    def _numbers(self, wanted: Integers, is_even: npt.NDArray[np.bool_]) -> tuple[Integers, npt.NDArray[np.bool_]]:
        """How many writers each class gets: a multiple of its edges where these carry equally much, rounded up if so
        many are possible, else down. Also which are multiples.

        Fewer than edges stay fewer where enough classes take turns for all edges to have nearly equally many, and where
        more would be many.
        """
        edges = self._edges
        kind, _ = self._kinds(wanted)
        together = np.bincount(kind)[kind] * wanted
        more, less = -(-wanted // edges) * edges, self._most // edges * edges
        numbers = np.where(more > self._most, less, more)
        is_equal = (together % edges == 0) | (together >= TURNS * edges)
        added = int((numbers - wanted)[(wanted < edges) & ~is_equal].sum())
        is_many = (edges > np.maximum(WRITERS_MIN, 2 * wanted)) | (added > ADDED_MAX * int(wanted.sum()))
        takes_turns = (wanted < edges) & (is_equal | is_many)
        is_rounded = is_even & (self._most >= edges) & (numbers <= edges * self._each_most) & ~takes_turns
        # Where all are wanted, nobody is left out.
        is_rounded &= numbers >= np.where(wanted >= self._counts, wanted, 0)
        return np.where(is_rounded, numbers, wanted), is_rounded

    def _kinds(self, numbers: Integers) -> tuple[Indices, Indices]:
        """Classes with equally many writers behind the same edges: for each class the number of its kind, and its
        position there."""
        pairs = np.stack([self._behind, numbers.astype(np.uint64)])
        order = np.lexsort(pairs)
        first = np.append(True, (pairs[:, order[1:]] != pairs[:, order[:-1]]).any(axis=0))
        sorted_kind = np.cumsum(first) - 1
        kind, position = np.empty_like(order), np.empty_like(order)
        kind[order] = sorted_kind
        position[order] = np.arange(len(order)) - np.flatnonzero(first)[sorted_kind]
        return kind, position

    def _offsets(self, numbers: Integers) -> Floats:
        """Where each class has its first mark, in (0, 1): those of classes with equally many writers behind the same
        edges are equally far apart, so that over all of them each edge gets as much as it should."""
        kind, position = self._kinds(numbers)
        count = np.bincount(kind)
        offsets = (position + 0.5) / count[kind] + phases(len(count))[kind] - 0.5
        offsets %= 1
        # Of two ranks in the middle the second writes alone, where no class evens it out: the first may be the
        # coordinator, which has most to do.
        offsets[(numbers == 1) & (count[kind] == 1) & (offsets == 0.5)] -= 2**-16
        # Never next to an integer: what decides must not be the rounding of sums.
        found: Floats = (np.floor(offsets * 2**16) + 0.5) / 2**16
        return found


def _level(tree: Tree) -> int:
    """The level whose edges are to have equally many writers where they carry equally much: supernodes, or else
    nodes."""
    return max(0, min(2, len(tree.levels) - 2))


def _evened(values: Floats, starts: Indices, row_of: Indices) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Values in rows that begin at ``starts``; all 1 in rows in which they are equal but for ``ALIKE``. Which these
    are."""
    is_even = np.maximum.reduceat(values, starts) <= np.minimum.reduceat(values, starts) * (1 + ALIKE)
    return np.where(is_even[row_of], 1.0, values), is_even


def _sums(values: Floats, starts: Indices, row_of: Indices) -> Floats:
    """Running sums of rows that begin at ``starts``."""
    sums = np.cumsum(values)
    found: Floats = sums - (sums[starts] - values[starts])[row_of]
    return found
