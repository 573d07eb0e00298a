"""Shares and runs where the answer is known: one way only, equal capacities, nothing to deal, nothing known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bench.placement.layouts import NAMES, layout
from fastckpt.plan.placement import Classes, Placement, cut_runs, makespan, place
from fastckpt.topology.topology import Tree

GB = 10**9


def tree(supernode_of_node: list[int], node_of_rank: list[int], capacities: list[list[float]]) -> Tree:
    parents = (np.array(node_of_rank), np.array(supernode_of_node), np.zeros(max(supernode_of_node) + 1, np.intp))
    names = tuple([str(edge) for edge in range(len(level))] for level in capacities)
    levels = ("rank", "node", "supernode", "storage")
    return Tree(levels, parents, tuple(np.array(level, float) for level in capacities), names)


def flat(rank_capacities: list[float], storage: float = math.inf) -> Tree:
    """Ranks directly below the storage."""
    capacities = (np.array(rank_capacities, float), np.array([storage]))
    names = ([str(rank) for rank in range(len(rank_capacities))], ["storage"])
    return Tree(("rank", "storage"), (np.zeros(len(rank_capacities), np.intp),), capacities, names)


def classes(*held: tuple[int, list[int]]) -> Classes:
    """Bytes, and who holds them."""
    starts = np.cumsum([0, *(len(holders) for _, holders in held)])
    holders = [rank for _, ranks in held for rank in ranks]
    return Classes(np.array([size for size, _ in held], np.int64), starts, np.array(holders, np.intp))


def dealt(on: Tree, given: Classes, fixed: list[int] | None = None) -> Placement:
    return place(on, given, np.array(fixed or [0] * len(on.capacities[0]), np.int64))


# --- shares --------------------------------------------------------------------------------------------------------


def test_equal_holders_get_equal_bytes() -> None:
    placed = dealt(flat([2e9] * 4), classes((8 * GB, [0, 1, 2, 3])))
    assert placed.shares.tolist() == [2 * GB] * 4
    assert (placed.makespan_seconds, placed.bound_seconds, placed.gap) == (1.0, 1.0, 0.0)
    assert placed.binding == ((0, 0), (0, 1), (0, 2), (0, 3))


def test_bytes_that_do_not_divide_are_dealt_within_one_byte() -> None:
    shares = dealt(flat([1e9] * 3), classes((10, [0, 1, 2]))).shares
    assert sum(shares) == 10
    assert max(shares) - min(shares) <= 1


def test_shares_are_proportional_to_capacities_that_bind() -> None:
    placed = dealt(flat([1e9, 2e9, 5e9]), classes((8 * GB, [0, 1, 2])))
    assert placed.shares / GB == pytest.approx([1, 2, 5], rel=0.01)
    assert placed.bound_seconds == pytest.approx(1.0)


def test_where_the_storage_binds_shares_stay_equal() -> None:
    placed = dealt(flat([1e9, 2e9, 5e9], storage=1e9), classes((9 * GB, [0, 1, 2])))
    assert placed.shares.tolist() == [3 * GB] * 3
    assert placed.binding == ((1, 0),)


def test_of_all_plans_as_fast_the_least_skewed_is_taken() -> None:
    # Only the first rank is in the way of equal shares; the capacities of the others leave many plans as fast.
    placed = dealt(flat([5e8, 9e9, 4e9, 7e9, 5e9], storage=1e10), classes((10 * GB, [0, 1, 2, 3, 4])))
    assert placed.shares[0] / GB == pytest.approx(0.5, rel=0.01)
    assert np.ptp(placed.shares[1:]) <= 1
    assert placed.binding == ((1, 0),)


def test_a_crowded_supernode_is_relieved_by_the_holders_elsewhere() -> None:
    # Three nodes behind one uplink, one behind the other.
    on = tree([0, 0, 0, 1], [0, 1, 2, 3], [[9e9] * 4, [9e9] * 4, [3e9, 3e9], [math.inf]])
    placed = dealt(on, classes((6 * GB, [0, 1, 2, 3])))
    assert placed.shares / GB == pytest.approx([1, 1, 1, 3], rel=0.01)
    assert placed.makespan_seconds == pytest.approx(1.0, rel=0.005)
    assert placed.binding == ((2, 0), (2, 1))


def test_what_only_one_rank_holds_is_counted_before_the_rest_is_dealt() -> None:
    placed = dealt(flat([1e9] * 4), classes((9 * GB, [0, 1, 2, 3])), [3 * GB, 0, 0, 0])
    assert placed.shares / GB == pytest.approx([0, 3, 3, 3], abs=0.03)
    assert placed.bound_seconds == pytest.approx(3.0)


def test_where_no_capacity_is_known_ranks_get_equal_bytes_and_no_time_is_told() -> None:
    on = tree([0, 0, 1], [0, 0, 1, 1, 2, 2], [[math.inf] * 6, [math.inf] * 3, [math.inf] * 2, [math.inf]])
    placed = dealt(on, classes((6 * GB, [0, 1, 2]), (5 * GB, [2, 3, 4, 5])), [0, 0, 0, GB, 0, 0])
    written = np.bincount([0, 1, 2, 2, 3, 4, 5], placed.shares)
    written[3] += GB
    assert written / GB == pytest.approx([2] * 6, rel=0.02)
    assert math.isnan(placed.makespan_seconds)
    assert math.isnan(placed.bound_seconds)
    assert placed.gap <= 0.005
    assert math.isnan(makespan(on, written))


def test_one_holder_writes_all() -> None:
    placed = dealt(flat([1e9, 1e9]), classes((7, [1]), (5 * GB, [0])))
    assert placed.shares.tolist() == [7, 5 * GB]
    assert placed.gap == 0
    assert placed.binding == ((0, 0),)


def test_only_fixed_bytes_take_the_time_of_the_slowest_edge() -> None:
    placed = dealt(flat([1e9, 2e9]), classes(), [3 * GB, 4 * GB])
    assert placed.shares.tolist() == []
    assert (placed.makespan_seconds, placed.bound_seconds) == (3.0, 3.0)
    assert placed.binding == ((0, 0),)


def test_nothing_to_write_takes_no_time() -> None:
    for given in (classes(), classes((0, [0, 1]), (0, []))):
        placed = dealt(flat([1e9, 1e9]), given)
        assert placed.shares.tolist() == [0] * len(given.holders)
        assert (placed.makespan_seconds, placed.bound_seconds, placed.gap) == (0.0, 0.0, 0.0)
        assert placed.binding == ()


def test_classes_without_bytes_change_nothing() -> None:
    shares = dealt(flat([1e9] * 3), classes((0, [0, 1]), (6, [0, 1, 2]), (0, []), (4, [1, 2]), (0, [2]))).shares
    assert shares.tolist()[:2] == [0, 0]
    assert sum(shares[2:5]) == 6
    assert sum(shares[5:7]) == 4
    assert shares.tolist()[7:] == [0]


def test_bytes_that_can_pass_all_limits_by_do() -> None:
    placed = dealt(flat([1e9, math.inf, math.inf]), classes((6 * GB, [0, 1, 2])))
    assert placed.shares.tolist() == [0, 3 * GB, 3 * GB]
    assert (placed.makespan_seconds, placed.bound_seconds, placed.gap) == (0.0, 0.0, 0.0)


def test_capacities_that_differ_a_million_times_are_used_in_proportion() -> None:
    placed = dealt(flat([1e4, 1e10, 1e7]), classes((10_010_010_000, [0, 1, 2])))
    assert placed.shares / np.array([1e4, 1e10, 1e7]) == pytest.approx([1, 1, 1], rel=0.02)
    assert placed.gap <= 0.005


def test_a_tree_of_many_levels_is_no_different() -> None:
    depth = 20
    same = np.arange(2)
    on = Tree(
        (*(f"level {level}" for level in range(depth)), "storage"),
        (*[same] * (depth - 1), np.zeros(2, np.intp)),
        (*[np.array([2e9, 1e9])] * depth, np.array([9e9])),
        (*[["0", "1"]] * depth, ["storage"]),
    )
    placed = dealt(on, classes((3 * GB, [0, 1])))
    assert placed.shares / GB == pytest.approx([2, 1], rel=0.01)


def test_more_bytes_than_a_float_counts_are_dealt_to_the_last() -> None:
    sizes = [2**60 + 1, 3, 2**59 + 7, 5, 2**57 + 1]
    given = classes(*((size, list(range(7))) for size in sizes))
    shares = dealt(flat([1e-6, *[1e9] * 6]), given).shares
    assert min(shares) >= 0
    assert [sum(shares[first : first + 7].tolist()) for first in given.starts[:-1]] == sizes


def test_a_search_that_ends_early_says_how_far_it_came() -> None:
    # Each rank must write what it alone could pass on, which is approached ever more slowly.
    nested = classes(*((GB, list(range(number + 1))) for number in range(60)))
    placed = dealt(flat([1e9] * 60), nested)
    assert placed.bound_seconds == pytest.approx(1.0)
    assert placed.gap > 0.005
    assert placed.makespan_seconds == pytest.approx(1 + placed.gap)


@pytest.mark.parametrize(
    ("given", "fixed", "message"),
    [
        (classes((5, [])), [0, 0], "class 0 has 5 bytes that no rank holds"),
        (classes((5, [0, 2])), [0, 0], "rank 2 holds bytes and is not in the tree, which has 2 ranks"),
        (classes((5, [0])), [0, 0, 0], "fixed has 3 ranks and the tree 2"),
    ],
)
def test_what_does_not_fit_the_tree_is_refused(given: Classes, fixed: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dealt(flat([1e9, 1e9]), given, fixed)


@pytest.mark.parametrize("name", NAMES)
def test_the_layouts_of_the_benchmark_are_solved_within_the_gap(name: str) -> None:
    given = layout(name, nodes=512, shards=50_000)
    totals = np.bincount(given.class_of, given.sizes).astype(np.int64)
    placed = place(given.tree, Classes(totals, given.classes.starts, given.classes.holders), given.fixed)
    assert placed.gap <= 0.005


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "shares", "runs"),
    [
        ([], [1, 1, 1], [0, 0, 0]),
        ([], [0, 0], [0, 0]),
        ([7], [7], [1]),
        ([1, 1, 1, 1], [2, 2], [2, 2]),
        ([1, 1, 1, 1, 1, 1], [2, 2, 2], [2, 2, 2]),
        ([1, 1, 1, 1, 1, 1], [1, 1, 1], [2, 2, 2]),
        ([1, 1, 1, 1, 1, 1], [1, 3, 2], [1, 3, 2]),
        ([1, 1, 1, 1, 1, 1], [0, 6, 0], [0, 6, 0]),
        ([10, 1, 1, 1], [1, 1], [1, 3]),
        ([1, 1, 1, 10], [1, 1], [3, 1]),
        ([5], [1, 1], [0, 1]),
        ([4, 4, 4], [1, 10, 1], [0, 3, 0]),
        ([3, 3, 0], [1, 1], [1, 2]),
        ([0, 0], [1, 1], [0, 2]),
    ],
)
def test_runs_end_at_the_chunk_boundary_next_to_where_the_shares_do(
    sizes: list[int], shares: list[int], runs: list[int]
) -> None:
    assert cut_runs(sizes, shares).tolist() == runs


def test_bytes_without_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="5 bytes are to be written and all shares are 0"):
        cut_runs([5], [0, 0])
