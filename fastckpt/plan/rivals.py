"""Placements that others would choose for the same bytes, to compare with ``placement.place``.

Most give shares as that does: for each holder of each class the bytes it writes. None looks at capacities.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from fastckpt.plan.holdings import Holdings, Shards
from fastckpt.plan.placement import Classes
from fastckpt.topology.topology import Tree

Shares = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.intp]
Chosen = npt.NDArray[np.bool_]
Loads = npt.NDArray[np.int64]

CROWDED = 1 / 8
"""Of the supernodes that have writers, where they are crowded."""


def first_replica(classes: Classes) -> Shares:
    """Every byte by the lowest rank that holds it."""
    return _split(classes, classes.holders == _lowest(classes)[_class_of(classes)])


def even(classes: Classes) -> Shares:
    """Each class equally by all its holders."""
    return _split(classes, np.full(len(classes.holders), True))


def too_few(tree: Tree, held: Holdings, level: int) -> Loads:
    """Bytes by rank where one rank behind each edge of ``level`` writes, all of them equally much. What they do not
    hold they are given by others, at no cost."""
    return _gathered(held, np.unique(_edges(tree, level), return_index=True)[1])


def crowded(tree: Tree, held: Holdings, level: int) -> Loads:
    """Bytes by rank where all ranks behind an eighth of the edges of ``level`` write, the first ones, all of them
    equally much. What they do not hold they are given by others, at no cost."""
    return _gathered(held, np.flatnonzero(_edges(tree, level) < len(tree.capacities[level]) * CROWDED))


def whole_shards(holdings: Holdings) -> Shares:
    """Whole shards, largest first, each to the holder with the fewest bytes so far, of equal ones to the lowest rank.

    Bytes that only one rank holds count from the beginning. Shards of equal size that classes share no rank for are
    dealt out together, so that the work is by different sizes and holders, not by shards.
    """
    classes, shards = holdings.classes, holdings.shards
    shares = np.zeros(len(classes.holders), np.int64)
    loads = holdings.fixed.copy()
    turn = _turns(classes, holdings.ranks)
    class_of_size = np.repeat(np.arange(len(classes.bytes)), np.diff(shards.starts))
    order = np.lexsort((turn[class_of_size], -shards.bytes))
    keys = np.stack([-shards.bytes[order], turn[class_of_size[order]]])
    for same in np.split(order, np.flatnonzero((np.diff(keys) != 0).any(axis=0)) + 1):
        _deal(classes, class_of_size[same], shards, same, shares, loads)
    return shares


def _deal(classes: Classes, dealt: Numbers, shards: Shards, which: Numbers, shares: Shares, loads: Loads) -> None:
    """Deals shards of one size to the holders of the classes ``dealt``, which have no rank in common.

    One after the other to the least loaded is the same as this: of all loads that holders could come by in steps of the
    size, the least ``count`` are taken.
    """
    if not len(dealt) or not shards.bytes[which[0]]:
        return
    size = int(shards.bytes[which[0]])
    order = np.argsort(dealt)
    dealt, count = dealt[order], shards.counts[which[order]]
    widths = classes.starts[dealt + 1] - classes.starts[dealt]
    first = np.concatenate([[0], np.cumsum(widths)[:-1]])
    of = np.repeat(np.arange(len(dealt)), widths)
    entries = np.arange(len(of)) - first[of] + classes.starts[dealt][of]
    ranks = classes.holders[entries]
    own = loads[ranks]

    def below(bar: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Shards after which each holder first has ``bar`` bytes."""
        shards_below: npt.NDArray[np.int64] = np.maximum(0, -(-(bar[of] - own) // size))
        return shards_below

    low = np.minimum.reduceat(own, first)
    high = np.maximum.reduceat(own, first) + size * (count // widths + 1)
    while (high - low > 1).any():  # the highest bar below which no more than ``count`` shards fit
        middle = (low + high) // 2
        fits = np.add.reduceat(below(middle), first) <= count
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    given = below(low)
    # What is left goes to holders that stand exactly at the bar, the lowest ranks first.
    left = count - np.add.reduceat(given, first)
    at_bar = own + given * size == low[of]
    by_rank = np.lexsort((ranks, of))
    before = np.cumsum(at_bar[by_rank]) - at_bar[by_rank]
    given[by_rank] += at_bar[by_rank] & (before - before[first[of]] < left[of])
    shares[entries] += given * size
    loads[ranks] += given * size


def _turns(classes: Classes, ranks: int) -> Numbers:
    """A number for each class, so that classes of one number share no rank."""
    after = np.zeros(ranks, np.intp)
    turns = np.zeros(len(classes.bytes), np.intp)
    for number, (start, end) in enumerate(zip(classes.starts[:-1].tolist(), classes.starts[1:].tolist(), strict=True)):
        holders = classes.holders[start:end]
        turns[number] = after[holders].max(initial=0)
        after[holders] = turns[number] + 1
    return turns


def _edges(tree: Tree, level: int) -> Numbers:
    """Of ``level``, by rank."""
    *_, edges = itertools.islice(tree.edges_of_ranks(), level + 1)
    return edges


def _gathered(held: Holdings, writers: Numbers) -> Loads:
    loads = np.zeros(held.ranks, np.int64)
    each, over = divmod(held.bytes, len(writers))
    loads[writers] = each
    loads[writers[:over]] += 1
    return loads


def _split(classes: Classes, chosen: Chosen) -> Shares:
    """Each class equally by its chosen holders; bytes that are left over, one each to the first of them."""
    class_of = _class_of(classes)
    writers = np.bincount(class_of[chosen], minlength=len(classes.bytes))
    each, over = np.divmod(classes.bytes, np.maximum(writers, 1))
    before = np.concatenate([[0], np.cumsum(chosen)])
    position = before[:-1] - before[classes.starts[:-1]][class_of]
    shares: Shares = np.where(chosen, each[class_of] + (position < over[class_of]), 0)
    return shares


def _class_of(classes: Classes) -> Numbers:
    return np.repeat(np.arange(len(classes.bytes)), np.diff(classes.starts))


def _lowest(classes: Classes) -> Numbers:
    """By class; all have holders."""
    if not len(classes.bytes):
        return np.empty(0, np.intp)
    return np.minimum.reduceat(classes.holders, classes.starts[:-1])
