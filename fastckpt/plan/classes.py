"""The classes of a layout, as the ``Dealer`` is to see them, and how the layout keeps what was dealt.

A class is a set of ranks and the consecutive chunks that all of them hold, whether its units are listed or follow from
a family. Each of its ranks writes one run of the chunks, which may be empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastckpt.format.families import Spread
from fastckpt.format.tables import Chunks
from fastckpt.plan.holdings import Holdings
from fastckpt.plan.placement import Classes, starts_of

CHUNKS_MAX = 2**18
"""Of a class without a job: enough to tell plans apart."""


@dataclass(frozen=True, eq=False)
class ChunkedClasses:
    """Classes, and the chunks of each."""

    classes: Classes
    """Ranks in the order in which they write runs."""
    chunks: npt.NDArray[np.int64]
    """(classes,): how many."""
    alike: Sequence[tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]]
    """Sets of classes of equally many ranks whose chunks are of equal sizes: numbers of classes, and bytes by chunk.
    Every class of several ranks is in one set, and no class of one rank."""


def of_sizes(held: Iterable[tuple[Sequence[int], Sequence[int]]]) -> ChunkedClasses:
    """Classes by their ranks, and the bytes of their chunks."""
    return _of_rows([(ranks, sum(sizes), len(sizes), sizes) for ranks, sizes in held])


def of_layout(chunks: Chunks, listed: Iterable[tuple[Sequence[int], int]], spreads: Iterable[Spread]) -> ChunkedClasses:
    """The classes of the listed units, then those of families. ``listed``: of the units of ``chunks``, in order: ranks,
    and the number of units."""
    parts = [_of_rows(list(_rows(chunks, listed))), *map(_of_family, spreads)]
    counts = np.concatenate([np.diff(part.classes.starts) for part in parts])
    firsts = itertools.accumulate((len(part.chunks) for part in parts), initial=0)
    return ChunkedClasses(
        Classes(
            np.concatenate([part.classes.bytes for part in parts]),
            starts_of(counts),
            np.concatenate([part.classes.holders for part in parts]),
        ),
        np.concatenate([part.chunks for part in parts]),
        [(first + numbers, sizes) for first, part in zip(firsts, parts, strict=False) for numbers, sizes in part.alike],
    )


def of_holdings(held: Holdings, chunk_bytes: int) -> ChunkedClasses:
    """As a save would see them: classes of several ranks, then those of one. Chunks are all of ``chunk_bytes``, but for
    the last of a class; larger ones where a class would have more than ``CHUNKS_MAX``."""
    alone = np.flatnonzero(held.fixed)
    classes, shared = held.classes, len(held.classes.bytes)
    sizes = np.concatenate([classes.bytes, held.fixed[alone]])
    widths = np.concatenate([np.diff(classes.starts), np.ones(len(alone), np.intp)])
    each = np.maximum(chunk_bytes, -(-sizes // CHUNKS_MAX))
    kinds: dict[tuple[int, int], list[int]] = {}
    for number, kind in enumerate(zip(sizes[:shared].tolist(), widths[:shared].tolist(), strict=True)):
        kinds.setdefault(kind, []).append(number)
    return ChunkedClasses(
        Classes(sizes, starts_of(widths), np.concatenate([classes.holders, alone])),
        -(-sizes // each),
        [(np.array(numbers), _chunks(size, int(each[numbers[0]]))) for (size, _), numbers in kinds.items()],
    )


def as_written(
    given: ChunkedClasses, runs: npt.NDArray[np.int64], spreads: Sequence[Spread]
) -> tuple[list[tuple[int, int]], list[bytes]]:
    """What a layout keeps of the runs of ``of_layout``'s classes: the writers of the listed units, and the counts of
    each family. ``runs``: chunks by holder."""
    listed = len(runs) - sum(spread.ranks.size for spread in spreads)
    ends = itertools.accumulate((spread.ranks.size for spread in spreads), initial=listed)
    writes = np.flatnonzero(runs[:listed])
    writers = zip(given.classes.holders[writes].tolist(), runs[writes].tolist(), strict=True)
    return list(writers), [runs[first:end].astype("<u4").tobytes() for first, end in itertools.pairwise(ends)]


def _rows(
    chunks: Chunks, listed: Iterable[tuple[Sequence[int], int]]
) -> Iterable[tuple[Sequence[int], int, int, Sequence[int]]]:
    units = chunks.units()
    for ranks, count in listed:
        own = list(itertools.islice(units, count))
        sizes: list[int] = []
        if len(ranks) > 1:
            sizes = [chunks.raw_bytes(pieces) for unit in own for pieces in chunks.pieces(unit)]
        size = sum(sizes) or sum(chunks.layout.shard_bytes(shard) for unit in own for shard in unit.shards)
        yield ranks, size, sum(unit.count for unit in own), sizes


def _of_rows(rows: Sequence[tuple[Sequence[int], int, int, Sequence[int]]]) -> ChunkedClasses:
    """``rows``: ranks, bytes, the number of chunks, and for several ranks the bytes by chunk."""
    holders = [np.array(ranks, np.intp) for ranks, _, _, _ in rows]
    return ChunkedClasses(
        Classes(
            np.array([size for _, size, _, _ in rows], np.int64),
            starts_of([len(ranks) for ranks in holders]),
            np.concatenate([np.empty(0, np.intp), *holders]),
        ),
        np.array([count for _, _, count, _ in rows], np.int64),
        [
            (np.array([number], np.intp), np.array(sizes, np.int64))
            for number, (ranks, _, _, sizes) in enumerate(rows)
            if len(ranks) > 1
        ],
    )


def _of_family(spread: Spread) -> ChunkedClasses:
    return ChunkedClasses(
        Classes(
            spread.class_bytes(),
            np.arange(spread.classes + 1, dtype=np.intp) * spread.replicas,
            spread.ranks.reshape(-1).astype(np.intp, copy=False),
        ),
        spread.totals(),
        [(numbers, np.array(sizes, np.int64)) for numbers, sizes in spread.alike()] if spread.replicas > 1 else [],
    )


def _chunks(size: int, each: int) -> npt.NDArray[np.int64]:
    whole, rest = divmod(size, each)
    return np.array([each] * whole + [rest] * (rest > 0), np.int64)
