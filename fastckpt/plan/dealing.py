"""Who writes which chunks of a layout: its classes, as whoever deals them out is to see them, and what was dealt.

Ranks that hold the same are a class, whether their units are listed or follow from a family. A class's chunks are dealt
to its ranks in runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fastckpt.format.families import Spread
from fastckpt.format.tables import Chunks
from fastckpt.plan.placement import even_runs


@dataclass(frozen=True, eq=False)
class Class:
    """Consecutive chunks, and the ranks that hold all of them."""

    ranks: Sequence[int]
    """In the order in which they write runs of the chunks."""
    sizes: Sequence[int]
    """Bytes by chunk; classes that are alike have one list. Of one rank's class, only their sum is right."""


Dealer: TypeAlias = Callable[[Sequence[Class]], Sequence[Sequence[int]]]
"""For each class, and each of its ranks, the number of chunks of its run."""


def deal_evenly(classes: Sequence[Class]) -> list[list[int]]:
    """Nearly equal bytes for all ranks of a class."""
    known: dict[tuple[int, int], list[int]] = {}
    for each in classes:
        key = (id(each.sizes), len(each.ranks))
        if key not in known:
            known[key] = even_runs(each.sizes, len(each.ranks))
    return [known[id(each.sizes), len(each.ranks)] for each in classes]


def deal(
    chunks: Chunks, listed: Sequence[tuple[Sequence[int], int]], spreads: Sequence[Spread], dealer: Dealer
) -> tuple[list[tuple[int, int]], list[bytes]]:
    """The writers of the listed units, and the counts of families. ``listed``: the classes of the units of ``chunks``,
    in order: ranks, and the number of units."""
    classes = list(_listed(chunks, listed))
    count = len(classes)
    for spread in spreads:
        classes += _ruled(spread)
    counts = dealer(classes)
    runs = (zip(each.ranks, own, strict=True) for each, own in zip(classes[:count], counts, strict=False))
    writers = [(rank, length) for run in runs for rank, length in run if length]
    of_families: list[bytes] = []
    for spread in spreads:
        of_families.append(np.array(counts[count : count + spread.classes], "<u4").tobytes())
        count += spread.classes
    return writers, of_families


def _listed(chunks: Chunks, listed: Sequence[tuple[Sequence[int], int]]) -> Iterator[Class]:
    units = chunks.units()
    for ranks, count in listed:
        mine = list(itertools.islice(units, count))
        if len(ranks) == 1:
            size = sum(chunks.layout.shard_bytes(shard) for unit in mine for shard in unit.shards)
            yield Class(ranks, _sizes(size, sum(unit.count for unit in mine)))
        else:
            yield Class(ranks, [chunks.raw_bytes(pieces) for unit in mine for pieces in chunks.pieces(unit)])


def _ruled(spread: Spread) -> list[Class]:
    ranks = spread.ranks.tolist()
    sizes: dict[int, Sequence[int]] = {}
    if spread.replicas > 1:
        for alike, same in spread.alike():
            sizes |= dict.fromkeys(alike.tolist(), same)
    else:
        pairs = list(zip(spread.class_bytes().tolist(), spread.totals().tolist(), strict=True))
        different = {pair: _sizes(*pair) for pair in set(pairs)}
        sizes = {number: different[pair] for number, pair in enumerate(pairs)}
    return [Class(ranks[number], sizes[number]) for number in range(spread.classes)]


def _sizes(size: int, count: int) -> list[int]:
    """So many chunks of so many bytes in all, where it does not matter which has how many."""
    return [size, *[0] * (count - 1)] if count else []
