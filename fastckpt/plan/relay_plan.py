"""Which rank of a node reads which of the chunks that several of its ranks want. Pure functions.

A chunk that one rank alone wants stays with it. Each set of ranks that want the same chunks divides these among itself,
in runs, so that what is stored together is read together: more for those that have less to read so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

ROUNDS = 8


class Wanted(msgspec.Struct, array_like=True, frozen=True):
    """The chunks that one rank wants."""

    runs: bytes
    """Pairs (start, stop) of chunk numbers, ascending, as little-endian uint32."""
    raw_bytes: int
    """Of all of them."""


class Portion(msgspec.Struct, array_like=True, frozen=True):
    """Chunks that one rank reads for itself and for others."""

    reader: int
    ranks: tuple[int, ...]
    """All that want them, ``reader`` among them, ascending."""
    runs: list[tuple[int, int]]
    """Pairs (start, stop) of chunk numbers, ascending."""


def runs_of(numbers: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Ascending numbers as runs (start, stop)."""
    array = np.asarray(numbers, np.int64)
    if not len(array):
        return np.empty((0, 2), np.int64)
    gaps = np.flatnonzero(np.diff(array) != 1)
    return np.stack([array[np.r_[0, gaps + 1]], array[np.r_[gaps, len(array) - 1]] + 1], axis=1)


def wanted(numbers: Sequence[int], raw_bytes: int) -> Wanted:
    """What a rank says that wants the chunks of these numbers, ascending."""
    return Wanted(runs_of(numbers).astype("<u4").tobytes(), raw_bytes)


def plan_relay(by_rank: Mapping[int, Wanted], sizes: Callable[[Iterable[int]], Iterable[int]]) -> list[Portion]:
    """Deals out the chunks that several ranks want; ``sizes`` gives the raw bytes of each
    of some chunks, whose numbers ascend."""
    ranks = sorted(by_rank)
    runs = [np.frombuffer(by_rank[rank].runs, "<u4").reshape(-1, 2).astype(np.int64) for rank in ranks]
    edges = np.unique(np.concatenate(runs))
    held = np.zeros((len(ranks), len(edges)), bool)  # of each rank, whether it wants what lies behind an edge
    for row, mine in zip(held, runs, strict=True):
        change = np.zeros(len(edges), np.int64)
        change[np.searchsorted(edges, mine[:, 0])] += 1
        change[np.searchsorted(edges, mine[:, 1])] -= 1
        row[:] = np.cumsum(change) > 0
    several = np.flatnonzero(held.sum(axis=0) > 1)
    if not len(several):
        return []
    sets, which = np.unique(held[:, several], axis=1, return_inverse=True)
    groups: list[tuple[list[int], npt.NDArray[Any], npt.NDArray[Any]]] = []
    loads = {rank: by_rank[rank].raw_bytes for rank in ranks}
    for number, column in enumerate(sets.T):
        between = [(int(edges[at]), int(edges[at + 1])) for at in several[which.reshape(-1) == number]]
        members = [rank for rank, is_one in zip(ranks, column, strict=True) if is_one]
        chunks = np.concatenate([np.arange(start, stop) for start, stop in between])
        weights = np.fromiter(sizes(chunks.tolist()), np.int64)
        groups.append((members, chunks, weights))
        for rank in members:
            loads[rank] -= int(weights.sum())
    groups.sort(key=lambda group: (len(group[0]), group[0]))
    parts = _equal_parts(loads, [(members, int(weights.sum())) for members, _, weights in groups])
    portions = []
    for (members, chunks, weights), shares in zip(groups, parts, strict=True):
        # A chunk goes to whom its middle belongs to.
        cuts = np.searchsorted(np.cumsum(weights) - weights / 2, np.cumsum(shares)[:-1])
        for rank, start, stop in zip(members, (0, *cuts), (*cuts, len(chunks)), strict=True):
            if start < stop:
                dealt = runs_of(chunks[start:stop]).tolist()
                portions.append(Portion(rank, tuple(members), [(first, end) for first, end in dealt]))
    return portions


def _equal_parts(loads: Mapping[int, float], groups: Sequence[tuple[Sequence[int], int]]) -> list[list[float]]:
    """How the members of each group divide its bytes among themselves, so that ranks end with loads as equal as can
    be: group by group, given what the others do, a few times over, which comes close."""
    loads = dict(loads)
    parts = [[0.0] * len(members) for members, _ in groups]
    for _ in range(ROUNDS):
        for (members, amount), part in zip(groups, parts, strict=True):
            others = [loads[rank] - mine for rank, mine in zip(members, part, strict=True)]
            part[:] = _levelled(others, amount)
            loads.update((rank, other + mine) for rank, other, mine in zip(members, others, part, strict=True))
    return parts


def _levelled(loads: Sequence[float], amount: float) -> list[float]:
    """What of ``amount`` each is given, so that the least loaded become equal and no more loaded than the others."""
    level = 0.0
    for count, nth in enumerate(ordered := sorted(loads)):
        if count and level <= nth:
            break
        level = (sum(ordered[: count + 1]) + amount) / (count + 1)
    return [max(0.0, level - load) for load in loads]
