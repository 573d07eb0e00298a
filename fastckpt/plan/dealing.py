"""Who writes which chunks of a layout: the bytes that each holder is given, as one run of consecutive chunks.

How many bytes that is, of what several ranks hold, is a ``Share``'s to say: evenly as long as nobody knows better.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastckpt.format.families import Spread, Unit
from fastckpt.format.tables import Chunks

Ints = npt.NDArray[np.int64]

Share: TypeAlias = Callable[[Ints, Ints, Ints, Ints], Ints]
"""Called with the bytes of each class; where in the next array its holders begin, and at last its length; the holders,
ascending in each class; and for each rank the bytes that only it holds. Returns the bytes that each holder writes:
they add up to those of its class."""


def deal(
    chunks: Chunks,
    listed: Sequence[tuple[Sequence[int], int]],
    spreads: Sequence[Spread],
    world_size: int,
    share: Share | None,
) -> tuple[list[tuple[int, int]], list[bytes]]:
    """The writers of the listed units, and the counts of families.

    ``listed``: the classes of the units of ``chunks``, in order: ranks, and the number of units. Each class is split at
    chunk boundaries: no rank is further from its share than one chunk.
    """
    units = chunks.units()
    sizes = [_sizes(chunks, list(itertools.islice(units, count)), len(ranks)) for ranks, count in listed]
    holders = [np.array([ranks], np.int64) for ranks, _ in listed]
    shares = _ask(share, [*zip(holders, sizes, strict=True)], spreads, world_size)
    writers: list[tuple[int, int]] = []
    for (ranks, _), each in zip(listed, sizes, strict=True):
        given = next(shares, None)
        if len(ranks) == 1:
            writers.append((ranks[0], len(each)))
            continue
        (counts,) = cut_runs(each, given, len(ranks))
        writers += [(rank, int(count)) for rank, count in zip(ranks, counts, strict=True) if count]
    return writers, [_family_counts(spread, next(shares, None)) for spread in spreads]


def _sizes(chunks: Chunks, units: Sequence[Unit], ranks: int) -> Sequence[int]:
    """Bytes of each chunk of a class; if one rank has it, it does not matter which bytes are in which."""
    if ranks == 1:
        count, size = (
            sum(unit.count for unit in units),
            sum(chunks.layout.shard_bytes(s) for u in units for s in u.shards),
        )
        return [size, *[0] * (count - 1)]
    return [chunks.raw_bytes(pieces) for unit in units for pieces in chunks.pieces(unit)]


def _family_counts(spread: Spread, shares: Ints | None) -> bytes:
    counts = np.zeros((spread.classes, spread.replicas), "<u4")
    if spread.replicas == 1:
        counts[:, 0] = spread.totals()
        return counts.tobytes()
    for classes, sizes in spread.alike():
        counts[classes] = cut_runs(sizes, None if shares is None else shares[classes], spread.replicas)
    return counts.tobytes()


def _ask(
    share: Share | None, listed: Sequence[tuple[Ints, Sequence[int]]], spreads: Sequence[Spread], world_size: int
) -> Iterator[Ints]:
    """For each listed class and each family, an array of shares by class and rank. Nothing without a ``share``."""
    if share is None:
        return
    blocks = [(ranks, np.array([sum(sizes)], np.int64)) for ranks, sizes in listed]
    blocks += [(spread.ranks, spread.class_bytes()) for spread in spreads]
    fixed = np.zeros(world_size, np.int64)
    for ranks, size in blocks:
        if ranks.shape[1] == 1:
            fixed[ranks[:, 0]] += size
    asked = [(ranks, size) for ranks, size in blocks if ranks.shape[1] > 1]
    found: list[Ints] = []
    if asked:
        orders = [np.argsort(ranks, axis=1) for ranks, _ in asked]
        holders = [np.take_along_axis(ranks, order, 1) for (ranks, _), order in zip(asked, orders, strict=True)]
        counts = np.concatenate([np.full(len(ranks), ranks.shape[1], np.int64) for ranks, _ in asked])
        starts = np.concatenate([[0], np.cumsum(counts)])
        flat = share(
            np.concatenate([size for _, size in asked]),
            starts,
            np.concatenate([each.reshape(-1) for each in holders]),
            fixed,
        )
        begin = 0
        for (ranks, _), order in zip(asked, orders, strict=True):
            given = np.empty(ranks.shape, np.int64)
            np.put_along_axis(given, order, flat[begin : begin + ranks.size].reshape(ranks.shape), 1)
            begin += ranks.size
            found.append(given)
    several = iter(found)
    for ranks, size in blocks:
        yield size[:, None] if ranks.shape[1] == 1 else next(several)


def cut_runs(sizes: Sequence[int], shares: Ints | None, writers: int) -> Ints:
    """Cuts consecutive chunks of the given sizes into one run for each writer, for each row of ``shares``; one row, of
    equal shares, without them. Returns the number of chunks of each run. No run ends further from where the shares do
    than half a chunk."""
    ends = np.cumsum(np.array(sizes, np.int64))
    if not len(ends):
        return np.zeros((1 if shares is None else len(shares), writers), np.int64)
    if shares is None:
        targets = (int(ends[-1]) * np.arange(1, writers) / writers)[None, :]
    else:
        targets = np.cumsum(shares, axis=1)[:, :-1].astype(np.float64)
    at = np.searchsorted(ends, targets)
    # The boundary before or after the target, whichever is nearer.
    before = np.where(at > 0, ends[at - 1], 0)
    after = ends[np.minimum(at, len(ends) - 1)]
    at = np.minimum(np.where(after - targets < targets - before, at + 1, at), len(ends))
    cuts = np.pad(np.maximum.accumulate(at, axis=1), ((0, 0), (1, 1)))
    cuts[:, -1] = len(ends)
    return np.diff(cuts, axis=1)
