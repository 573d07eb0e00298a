"""The simulator against what was measured, against its rules, and against a simulation by other means."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.plan.simulate import TOLERANCE, _merge, _rates, simulate
from fastckpt.topology.topology import Tree

MB = 10**6


def tree(
    parents: Sequence[Sequence[int]],
    capacities: Sequence[Sequence[float]],
    levels: Sequence[str] = ("rank", "node", "supernode", "gateway", "storage"),
) -> Tree:
    """``parents[k]`` and ``capacities[k]`` of level k; the last level is the storage."""
    names = (*levels[: len(capacities) - 1], "storage")
    return Tree(
        names,
        tuple(np.array(level, np.intp) for level in parents),
        tuple(np.array(level, np.float64) for level in capacities),
        tuple([f"{name} {n}" for n in range(len(level))] for name, level in zip(names, capacities, strict=True)),
    )


def spread(writers: Sequence[int], rank: float, supernode: float, storage: float) -> Tree:
    """``writers[s]`` ranks in supernode s, each on a node of its own."""
    above = [number for number, count in enumerate(writers) for _ in range(count)]
    ranks = len(above)
    return tree(
        [range(ranks), above, [0] * len(writers)],
        [[rank] * ranks, [math.inf] * ranks, [supernode] * len(writers), [storage]],
    )


# --- the measured table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writers", "expected"),
    [(4, 8), (8, 16), (12, 24), (16, 32), (20, 40), (24, 40), (32, 40), (48, 40)],
)
def test_enough_writers_fill_the_storage_and_fewer_do_not(writers: int, expected: float) -> None:
    paths = spread([writers // 4] * 4, 2 * MB, 12.5 * MB, 40 * MB)
    result = simulate(paths, np.full(writers, 4 * MB))
    assert writers * 4 / result.makespan_seconds == pytest.approx(expected)


@pytest.mark.parametrize(
    ("writers", "expected"),
    [
        ((16, 0, 0, 0), 12.5),
        ((8, 8, 0, 0), 25),
        ((10, 2, 2, 2), 20),
        ((8, 4, 2, 2), 25),
        ((6, 6, 2, 2), 32),
        ((4, 4, 4, 4), 32),
    ],
)
def test_writers_crowded_in_few_supernodes_get_only_their_uplinks(writers: Sequence[int], expected: float) -> None:
    result = simulate(spread(writers, 2 * MB, 12.5 * MB, 40 * MB), np.full(16, 4 * MB))
    assert 16 * 4 / result.makespan_seconds == pytest.approx(expected)


def test_writers_by_a_soft_knee_rise_past_the_hard_one() -> None:
    """Lustre as Dell measured it: one client writes 0.645 GB/s, and 24 get 5.5, 48 get 6.0 of about 6."""
    rates = []
    for writers in (1, 10, 24, 48):
        paths = tree([[0] * writers], [[math.inf] * writers, [6e9]])
        result = simulate(paths, np.full(writers, 10**9), writer_bytes_per_second=0.645e9)
        rates.append(writers / result.makespan_seconds)
    assert rates == pytest.approx([0.61, 3.95, 5.55, 5.97], abs=0.01)


# --- the rules of max-min fairness ---------------------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn, ranks_max: int = 12) -> Tree:
    depth = draw(st.integers(2, 5))
    sizes = [draw(st.integers(1, ranks_max))]
    for _ in range(depth - 2):
        sizes.append(draw(st.integers(1, sizes[-1])))
    sizes.append(1)
    capacity = st.one_of(st.integers(1, 40).map(float), st.just(math.inf))
    parents = [
        draw(st.lists(st.integers(0, above - 1), min_size=below, max_size=below))
        for below, above in itertools.pairwise(sizes)
    ]
    capacities = [draw(st.lists(capacity, min_size=size, max_size=size)) for size in sizes]
    return tree(parents, capacities)


@settings(max_examples=100, deadline=None)
@given(trees(), st.randoms(use_true_random=False))
def test_rates_are_max_min_fair_and_waste_no_capacity(paths: Tree, chance: random.Random) -> None:
    ranks = len(paths.capacities[0])
    writing = np.array([chance.random() < 0.8 for _ in range(ranks)])
    rates = np.zeros(ranks)
    if writing.any():
        writers = np.flatnonzero(writing)
        flows, flow_of, _ = _merge(paths, writers, np.ones(len(writers)), 0.0)
        rates[writers] = _rates(paths, flows, None)[flow_of]
    assert (rates[~writing] == 0).all()
    bottleneck = np.isinf(rates) | ~writing
    for edge, capacity in zip(paths.edges_of_ranks(), paths.capacities, strict=True):
        carried = np.bincount(edge, rates, len(capacity))
        assert (carried <= capacity * (1 + 1e-9)).all()
        largest = np.zeros(len(capacity))
        np.maximum.at(largest, edge, rates)
        full = carried >= capacity * (1 - 1e-9)
        # Full, and nobody on it has more: then more for this flow would take from one that has no more than it.
        bottleneck |= full[edge] & (rates >= largest[edge] * (1 - 1e-9)) & np.isfinite(rates)
    assert bottleneck.all()
    unlimited = np.full(ranks, True)
    for edge, capacity in zip(paths.edges_of_ranks(), paths.capacities, strict=True):
        unlimited &= np.isinf(capacity[edge])
    assert (np.isinf(rates) == (unlimited & writing)).all()


def progressively_filled(paths: Tree, loads: Sequence[int]) -> list[float]:
    """Finishing times by the textbook: raise all rates alike, freeze those whose edge is full; then the next event."""
    edges = [edge.tolist() for edge in paths.edges_of_ranks()]
    left = {rank: float(size) for rank, size in enumerate(loads) if size}
    finish, now = [0.0] * len(loads), 0.0
    while left:
        rates: dict[int, float] = {}
        room = [list(capacity) for capacity in paths.capacities]
        while len(rates) < len(left):
            users: dict[tuple[int, int], list[int]] = {}
            for rank in left.keys() - rates.keys():
                for level, edge in enumerate(edges):
                    users.setdefault((level, edge[rank]), []).append(rank)
            shares = {where: room[where[0]][where[1]] / len(ranks) for where, ranks in users.items()}
            least = min(shares.values())
            for where, share in shares.items():
                if share <= least * (1 + 1e-12):
                    for rank in users[where]:
                        if rank not in rates:
                            rates[rank] = least
                            for level, edge in enumerate(edges):
                                room[level][edge[rank]] -= 0 if math.isinf(least) else least
        step = min(left[rank] / rates[rank] for rank in left)
        now += step
        for rank in list(left):
            if left[rank] / rates[rank] <= step * (1 + 1e-12):
                finish[rank] = now
                del left[rank]
            else:
                left[rank] -= rates[rank] * step
    return finish


@settings(max_examples=100, deadline=None)
@given(trees(), st.data())
def test_finishing_times_are_those_of_progressive_filling(paths: Tree, data: st.DataObject) -> None:
    ranks = len(paths.capacities[0])
    loads = data.draw(st.lists(st.integers(0, 10**6), min_size=ranks, max_size=ranks))
    if not any(np.isfinite(capacity).any() for capacity in paths.capacities):
        assert math.isnan(simulate(paths, np.array(loads)).makespan_seconds)
        return
    expected = progressively_filled(paths, loads)
    exact = simulate(paths, np.array(loads), tolerance=0)
    assert exact.finish_seconds.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert exact.makespan_seconds == pytest.approx(max(expected), rel=1e-6, abs=1e-12)
    near = simulate(paths, np.array(loads))
    assert near.makespan_seconds == pytest.approx(max(expected), rel=TOLERANCE, abs=1e-12)


def test_many_flows_of_different_sizes_finish_within_the_tolerance() -> None:
    chance = np.random.default_rng(1)
    ranks, nodes, supernodes = 2000, 250, 5
    paths = tree(
        [np.arange(ranks) // 8, chance.integers(0, supernodes, nodes), [0] * supernodes],
        [
            chance.uniform(1, 3, ranks),
            chance.uniform(5, 20, nodes),
            chance.uniform(100, 400, supernodes),
            [900.0],
        ],
    )
    loads = chance.integers(1, 10_000, ranks)
    exact = simulate(paths, loads, tolerance=0)
    near = simulate(paths, loads)
    assert near.makespan_seconds == pytest.approx(exact.makespan_seconds, rel=TOLERANCE)
    off = TOLERANCE * exact.makespan_seconds
    np.testing.assert_allclose(near.finish_seconds, exact.finish_seconds, rtol=0, atol=off)


def test_flows_that_differ_in_nothing_but_their_sizes_are_merged_only_within_the_tolerance() -> None:
    sizes = np.random.default_rng(2).integers(1_000_000, 1_050_000, 500)
    paths = tree([[0] * 500], [[math.inf] * 500, [1e6]])
    exact = simulate(paths, sizes, tolerance=0)
    assert exact.makespan_seconds == pytest.approx(sizes.sum() / 1e6)
    off = TOLERANCE * exact.makespan_seconds
    np.testing.assert_allclose(simulate(paths, sizes).finish_seconds, exact.finish_seconds, rtol=0, atol=off)


# --- the edges of it -----------------------------------------------------------------------------------------------


def test_nothing_to_write_takes_no_time() -> None:
    paths = spread([2, 2], 1, 1, 1)
    result = simulate(paths, np.zeros(4, np.int64))
    assert result.makespan_seconds == 0
    assert result.finish_seconds.tolist() == [0] * 4


def test_a_rank_with_no_limit_on_its_way_is_done_at_once_and_hinders_nobody() -> None:
    paths = tree([[0, 1], [0, 0]], [[math.inf, 1.0], [math.inf, math.inf], [math.inf]])
    assert simulate(paths, np.array([5, 5])).finish_seconds.tolist() == [0, 5]


def test_without_any_capacity_the_time_is_not_known() -> None:
    paths = spread([2, 2], math.inf, math.inf, math.inf)
    assert math.isnan(simulate(paths, np.ones(4, np.int64)).makespan_seconds)


@pytest.mark.parametrize(
    ("loads", "message"),
    [([1, 2, 3], "loads have shape .3.; give one for each of the tree's 4"), ([1, 2, -3, 4], "rank 2 is -3 bytes")],
)
def test_loads_that_are_not_loads_are_refused(loads: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(spread([2, 2], 1, 1, 1), np.array(loads))


def test_rates_and_tolerances_that_are_none_are_refused() -> None:
    for wrong in ({"writer_bytes_per_second": 0}, {"writer_bytes_per_second": math.nan}, {"tolerance": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            simulate(spread([2, 2], 1, 1, 1), np.ones(4, np.int64), **wrong)
