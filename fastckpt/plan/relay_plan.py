"""Which rank reads what several ranks want. Pure functions.

A chunk that one rank alone wants stays with it. Each set of ranks of a node that want the same chunks divides these
among itself, in runs, so that what is stored together is read together: more for those that have less to read so far.

Where the whole job reads each byte once, what several nodes want is dealt before, to the ranks of these nodes, by the
solver that places writers (``deal``). All of them read: each sends its part to every other node of the set, so that the
nodes send each as much as they receive, and the fewer read the more each would have to send.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from fastckpt.plan.classes import of_sizes
from fastckpt.plan.deal import Dealer
from fastckpt.topology.topology import Tree

ROUNDS = 8

Runs = npt.NDArray[np.int64]
"""(n, 2): chunk numbers (start, stop), ascending."""
Sizes = Callable[[Iterable[int]], Iterable[int]]
"""Gives the raw bytes of each of some chunks, whose numbers ascend."""


class Wanted(msgspec.Struct, array_like=True, frozen=True):
    """The chunks that one rank wants."""

    data: bytes
    """Their runs, as little-endian uint32."""
    raw_bytes: int
    """Of all of them."""

    @property
    def runs(self) -> Runs:
        return np.frombuffer(self.data, "<u4").reshape(-1, 2).astype(np.int64)


class Portion(msgspec.Struct, array_like=True, frozen=True):
    """Chunks that one rank reads for itself and for others."""

    reader: int
    ranks: tuple[int, ...]
    """All of the node that want them, and ``reader``, ascending."""
    runs: list[tuple[int, int]]
    """Pairs (start, stop) of chunk numbers, ascending."""
    source: int = -1
    """The rank of another node from which ``reader`` fetches them; -1 if it reads them from storage."""
    carried: int = -1
    """Position in ``Fanout.carried``; -1 if no other node wants them."""


class Carried(msgspec.Struct, array_like=True, frozen=True):
    """Chunks that one rank reads for several nodes."""

    reader: int
    nodes: int
    """Position in ``Fanout.nodes``."""
    runs: list[tuple[int, int]]
    """Pairs (start, stop) of chunk numbers, ascending."""


class Fanout(msgspec.Struct, array_like=True, frozen=True):
    """What is read for several nodes."""

    nodes: list[tuple[int, ...]]
    """Sets of nodes that want the same chunks, each ascending."""
    carried: list[Carried]


def runs_of(numbers: Sequence[int] | npt.NDArray[Any]) -> Runs:
    """Ascending numbers as runs (start, stop)."""
    array = np.asarray(numbers, np.int64)
    if not len(array):
        return np.empty((0, 2), np.int64)
    gaps = np.flatnonzero(np.diff(array) != 1)
    return np.stack([array[np.r_[0, gaps + 1]], array[np.r_[gaps, len(array) - 1]] + 1], axis=1)


def wanted(numbers: Sequence[int], raw_bytes: int) -> Wanted:
    """What a rank says that wants the chunks of these numbers, ascending."""
    return Wanted(runs_of(numbers).astype("<u4").tobytes(), raw_bytes)


def all_wanted(by_rank: Mapping[int, Wanted], sizes: Sizes) -> Wanted:
    """What any of these ranks wants."""
    numbers = _numbers(_united([one.runs for one in by_rank.values()]))
    return wanted(numbers, sum(sizes(numbers)))


def plan_relay(by_rank: Mapping[int, Wanted], sizes: Sizes) -> list[Portion]:
    """Deals out the chunks that several ranks of a node want."""
    ranks = sorted(by_rank)
    loads = {rank: by_rank[rank].raw_bytes for rank in ranks}
    groups: list[tuple[list[int], npt.NDArray[Any], npt.NDArray[Any]]] = []
    for positions, runs in _held_by_several([by_rank[rank].runs for rank in ranks]):
        members, numbers = [ranks[position] for position in positions], _numbers(runs)
        weights = np.fromiter(sizes(numbers), np.int64)
        groups.append((members, np.array(numbers), weights))
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
                portions.append(Portion(rank, tuple(members), _as_list(runs_of(chunks[start:stop]))))
    return portions


def plan_fanout(
    by_node: Mapping[int, Wanted], node_ranks: Mapping[int, Sequence[int]], sizes: Sizes, tree: Tree
) -> Fanout:
    """Deals out the chunks that several nodes want, to ranks of these nodes. ``ValueError`` if a rank is not in the
    tree."""
    nodes = sorted(by_node)
    left = {node: by_node[node].raw_bytes for node in nodes}
    sets: list[tuple[int, ...]] = []
    chunks: list[npt.NDArray[Any]] = []
    held: list[tuple[Sequence[int], Sequence[int]]] = []
    for positions, runs in _held_by_several([by_node[node].runs for node in nodes]):
        numbers = _numbers(runs)
        weights = list(sizes(numbers))
        sets.append(tuple(nodes[position] for position in positions))
        chunks.append(np.array(numbers))
        held.append(([rank for node in sets[-1] for rank in node_ranks[node]], weights))
        for node in sets[-1]:
            left[node] -= sum(weights)
    if not sets:
        return Fanout([], [])
    # What one node alone wants, its ranks read as they then agree; about equally much each.
    own = [((rank,), (left[node] // len(node_ranks[node]),)) for node in nodes for rank in node_ranks[node]]
    dealer = Dealer(tree, writers=len(tree.capacities[0]))
    counts = iter(dealer.deal(of_sizes([*held, *own])).runs.tolist())
    carried = []
    for number, (ranks, _) in enumerate(held):
        start = 0
        for rank, count in zip(ranks, itertools.islice(counts, len(ranks)), strict=True):
            if count:
                carried.append(Carried(rank, number, _as_list(runs_of(chunks[number][start : start + count]))))
                start += count
    return Fanout(sets, carried)


def plan_node(
    by_rank: Mapping[int, Wanted], node: int, ranks: Sequence[int], fanout: Fanout, sizes: Sizes
) -> list[Portion]:
    """Deals out what several ranks of a node want, and what comes to it from other nodes or goes there."""
    loads = dict.fromkeys(ranks, 0)
    portions = []
    here = [node in nodes for nodes in fanout.nodes]
    for number, carried in enumerate(fanout.carried):
        if not here[carried.nodes]:
            continue
        runs = np.array(carried.runs, np.int64)
        takers = {rank for rank, one in by_rank.items() if _meet(one.runs, runs)}
        is_source = carried.reader in loads
        reader = carried.reader if is_source else min(takers, key=lambda rank: (loads[rank], rank))
        loads[reader] += int((runs[:, 1] - runs[:, 0]).sum())
        source = -1 if is_source else carried.reader
        portions.append(Portion(reader, tuple(sorted({reader, *takers})), carried.runs, source, number))
    if not portions:
        return plan_relay(by_rank, sizes)
    elsewhere = _united([np.array(portion.runs, np.int64) for portion in portions])
    rest = {}
    for rank, one in by_rank.items():
        numbers = _numbers(_without(one.runs, elsewhere))
        rest[rank] = wanted(numbers, sum(sizes(numbers)))
    return portions + plan_relay(rest, sizes)


def _numbers(runs: Runs) -> list[int]:
    return [number for start, stop in runs.tolist() for number in range(start, stop)]


def _as_list(runs: Runs) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop in runs.tolist()]


def _held_by_several(each: Sequence[Runs]) -> list[tuple[list[int], Runs]]:
    """For each set of holders that have the same chunks, if they are several: their positions, and the chunks.

    Holders have random numbers, and a chunk the sum of those of its holders, which tells sets apart: a table of all
    holders by all runs would not fit into memory where both are many.
    """
    edges = np.unique(np.concatenate(each))
    marks = np.random.default_rng(0).integers(0, 2**64, (len(each), 2), np.uint64)
    marks = np.concatenate([marks, np.ones((len(each), 1), np.uint64)], axis=1)
    held = np.zeros((len(edges), 3), np.uint64)  # the change at an edge, then what lies behind it
    for mark, runs in zip(marks, each, strict=True):
        np.add.at(held, np.searchsorted(edges, runs[:, 0]), mark)
        np.subtract.at(held, np.searchsorted(edges, runs[:, 1]), mark)
    np.cumsum(held, axis=0, out=held)
    several = np.flatnonzero(held[:, 2] > 1)
    if not len(several):
        return []
    _, firsts, which = np.unique(held[several], axis=0, return_index=True, return_inverse=True)
    samples = edges[several[firsts]]
    members: list[list[int]] = [[] for _ in samples]
    for position, runs in enumerate(each):
        for number in np.flatnonzero(_contains(runs, samples)):
            members[number].append(position)
    spans = np.stack([edges[several], edges[several + 1]], axis=1)
    order = np.argsort(which.reshape(-1), kind="stable")
    parts = np.split(spans[order], np.cumsum(np.bincount(which.reshape(-1)))[:-1])
    return sorted(zip(members, parts, strict=True), key=lambda pair: pair[0])


def _contains(runs: Runs, numbers: Runs) -> npt.NDArray[np.bool_]:
    if not len(runs):
        return np.zeros(len(numbers), bool)
    at = np.searchsorted(runs[:, 0], numbers, side="right") - 1
    found: npt.NDArray[np.bool_] = (at >= 0) & (numbers < runs[np.maximum(at, 0), 1])
    return found


def _meet(a: Runs, b: Runs) -> bool:
    """Whether any number is in both."""
    return bool((_contains(a, b[:, 0]) | (np.searchsorted(a[:, 0], b[:, 1]) > np.searchsorted(a[:, 0], b[:, 0]))).any())


def _united(each: Sequence[Runs]) -> Runs:
    runs = np.concatenate(each)
    edges = np.unique(runs)
    change = np.zeros(len(edges), np.int64)
    np.add.at(change, np.searchsorted(edges, runs[:, 0]), 1)
    np.subtract.at(change, np.searchsorted(edges, runs[:, 1]), 1)
    return _where(edges, np.cumsum(change) > 0)


def _without(runs: Runs, others: Runs) -> Runs:
    edges = np.unique(np.concatenate([runs, others]))
    return _where(edges, _contains(runs, edges) & ~_contains(others, edges))


def _where(edges: npt.NDArray[np.int64], holds: npt.NDArray[np.bool_]) -> Runs:
    """What lies behind the edges at which something holds, as runs; it does not at the last one."""
    change = np.diff(np.concatenate([[False], holds]).astype(np.int8))
    return np.stack([edges[change == 1], edges[change == -1]], axis=1)


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
