"""What the ranks of a job hold, as far as placing it needs: bytes by the set of ranks that hold them.

From a layout file (``layout_file``), or from the layout of a snapshot, as far as that tells.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastckpt.format.families import Spread
from fastckpt.format.tables import Chunks
from fastckpt.plan.placement import Classes, starts_of

BYTES_MAX = 2**62
"""Of everything that is held, each replica counted once."""


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of each class, which are what planners that do not split shards deal out."""

    starts: npt.NDArray[np.intp]
    """(classes + 1,)"""
    bytes: npt.NDArray[np.int64]
    """(starts[-1],): different sizes of the shards of a class."""
    counts: npt.NDArray[np.int64]
    """(starts[-1],): how many shards of a class have that size."""


@dataclass(frozen=True, eq=False)
class Holdings:
    """Everything a job saves, each byte once."""

    classes: Classes
    """What two or more ranks hold."""
    shards: Shards
    """Of the classes; their bytes are those of the class."""
    fixed: npt.NDArray[np.int64]
    """(ranks,): bytes only this rank holds."""

    @property
    def ranks(self) -> int:
        return len(self.fixed)

    @property
    def shared_bytes(self) -> int:
        """Bytes that two or more ranks hold."""
        return int(self.classes.bytes.sum())

    @property
    def bytes(self) -> int:
        """All bytes, each replica counted once."""
        return self.shared_bytes + int(self.fixed.sum())

    def loads(self, shares: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bytes each rank writes, of which ``shares`` are those of the classes, in the order of their holders."""
        loads = self.fixed.copy()
        np.add.at(loads, self.classes.holders, shares)  # bincount would add as float64
        return loads


@dataclass(frozen=True, eq=False)
class Alike:
    """Sets of ranks that each hold shards of the same sizes."""

    holders: npt.NDArray[np.intp]
    """(sets, ranks of each), ascending in each set."""
    shards: Mapping[int, int]
    """Size in bytes -> how many shards of it every set holds."""


def gather(ranks: int, parts: Sequence[Alike], fixed: npt.NDArray[np.int64] | None = None) -> Holdings:
    """All parts as one; sets of one rank, and the bytes by rank in ``fixed``, become what only one rank holds.

    Raises ``ValueError`` if it is more than 2^62 bytes.
    """
    held = [sum(size * count for size, count in part.shards.items()) for part in parts]
    alone = np.zeros(ranks, np.int64) if fixed is None else fixed.copy()
    total = sum(len(part.holders) * size for part, size in zip(parts, held, strict=True)) + int(alone.sum())
    if total > BYTES_MAX:
        raise ValueError(f"{total} bytes in all are more than 2^62")
    shared = []
    for part, size in zip(parts, held, strict=True):
        if part.holders.shape[1] == 1:
            np.add.at(alone, part.holders[:, 0], size)
        elif size:
            shared.append((part, size))
    sets = [len(part.holders) for part, _ in shared]
    widths = np.repeat([part.holders.shape[1] for part, _ in shared], sets)
    kinds = np.repeat([len(part.shards) for part, _ in shared], sets)
    classes = Classes(
        bytes=np.repeat(np.array([size for _, size in shared], np.int64), sets),
        starts=starts_of(widths),
        holders=np.concatenate([np.empty(0, np.intp), *(part.holders.ravel() for part, _ in shared)]),
    )
    shards = Shards(
        starts=starts_of(kinds),
        bytes=_tiled([part.shards.keys() for part, _ in shared], sets),
        counts=_tiled([part.shards.values() for part, _ in shared], sets),
    )
    return Holdings(classes, shards, alone)


def _tiled(rows: Sequence[Iterable[int]], times: Sequence[int]) -> npt.NDArray[np.int64]:
    tiles = [np.tile(np.array([*row], np.int64), count) for row, count in zip(rows, times, strict=True)]
    return np.concatenate([np.empty(0, np.int64), *tiles])


def holdings_of_layout(chunks: Chunks) -> Holdings:
    """What a snapshot's layout tells of who held what.

    Of families it says who does. Of a listed unit it says who wrote each chunk, and not who else could have: a run of
    chunks lies in one class, and so does a unit; hence ranks that share a unit hold all that is in the runs between
    them. What one rank wrote and no unit connects with another's counts as held by it alone.
    """
    layout = chunks.layout
    parts = [*_listed(chunks), *itertools.chain.from_iterable(map(_of_family, chunks.spreads))]
    return gather(len(layout.rank_nodes), parts)


def _listed(chunks: Chunks) -> Iterator[Alike]:
    layout = chunks.layout
    units = list(itertools.islice(chunks.units(), len(layout.units)))
    firsts = [unit.first for unit in units]
    ends = list(itertools.accumulate(count for _, count in layout.writers))
    writers: dict[int, None] = {}
    number = 0
    for (rank, _), end in zip(layout.writers, ends, strict=True):
        writers[rank] = None
        after = bisect.bisect_left(firsts, end)
        if end < chunks.listed and firsts[min(after, len(firsts) - 1)] != end:
            continue  # the next run begins inside this unit
        shards = itertools.chain.from_iterable(unit.shards for unit in units[number:after])
        yield Alike(np.array([sorted(writers)], np.intp), Counter(map(layout.shard_bytes, shards)))
        writers, number = {}, after


def _of_family(spread: Spread) -> Iterator[Alike]:
    for classes, sizes in spread.shards_alike():
        yield Alike(spread.ranks[classes].astype(np.intp, copy=False), Counter(sizes[sizes > 0].tolist()))
