"""The placements of others: what each is by its own rule, and that they place the same bytes as the planner."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.plan import rivals
from fastckpt.plan.holdings import Alike, Holdings, gather
from fastckpt.plan.placement import place
from fastckpt.plan.simulate import simulate
from fastckpt.topology.topology import Tree

MB = 10**6


def supernodes(of_ranks: list[int], uplink: float = 12.5 * MB, storage: float = 40 * MB) -> Tree:
    """Ranks by their supernode, each on a node of its own, with nothing known of ranks and nodes."""
    ranks, count = len(of_ranks), max(of_ranks) + 1
    return Tree(
        ("rank", "node", "supernode", "storage"),
        (np.arange(ranks), np.array(of_ranks), np.zeros(count, np.intp)),
        (np.full(ranks, np.inf), np.full(ranks, np.inf), np.full(count, uplink), np.array([storage])),
        tuple([f"{level} {edge}" for edge in range(ranks)] for level in ("rank", "node", "supernode", "storage")),
    )


def held(ranks: int, *sets: tuple[list[int], dict[int, int]]) -> Holdings:
    return gather(ranks, [Alike(np.array([holders]), shards) for holders, shards in sets])


def written(holdings: Holdings, shares: npt.NDArray[np.int64]) -> list[int]:
    return holdings.loads(shares).tolist()


# --- each by its rule ----------------------------------------------------------------------------------------------


def test_the_table_that_was_measured_on_shaped_links() -> None:
    """16 ranks in supernodes of 8, 4, 2 and 2; four sets of four replicas, 8 MB each. On network namespaces with shaped
    links this took 2.8, 1.35, 0.96 and 0.88 seconds."""
    of_ranks = [0] * 8 + [1] * 4 + [2] * 2 + [3] * 2
    tree = supernodes(of_ranks)
    holdings = held(16, *(([one, one + 4, one + 8, one + 12], {MB: 8}) for one in range(4)))

    def seconds(shares: npt.NDArray[np.int64]) -> float:
        return simulate(tree, holdings.loads(shares)).makespan_seconds

    # A planner that does not know of the storage's limit skews more than is good for it.
    without_storage = place(supernodes(of_ranks, storage=np.inf), holdings.classes, holdings.fixed)
    planned = place(tree, holdings.classes, holdings.fixed)
    assert seconds(rivals.first_replica(holdings.classes)) == pytest.approx(2.56)
    assert seconds(rivals.even(holdings.classes)) == pytest.approx(1.28)
    assert seconds(without_storage.shares) == pytest.approx(0.896, rel=0.005)
    assert seconds(planned.shares) == pytest.approx(0.80, rel=0.005)


def test_the_first_replica_is_the_lowest_rank_that_holds_it() -> None:
    holdings = held(4, ([1, 2, 3], {6: 1}), ([0, 3], {5: 2}), ([2], {7: 1}))
    assert written(holdings, rivals.first_replica(holdings.classes)) == [10, 6, 7, 0]


def test_even_gives_each_holder_the_same_to_the_byte() -> None:
    holdings = held(4, ([1, 2, 3], {8: 1}), ([0, 3], {5: 1}))
    assert written(holdings, rivals.even(holdings.classes)) == [3, 3, 3, 4]


def test_too_few_writers_are_one_behind_each_edge() -> None:
    tree = supernodes([0, 0, 1, 1, 2, 2])
    holdings = held(6, ([0, 1], {12: 1}), ([1, 2, 3], {11: 1}), ([5], {10: 1}))
    assert rivals.too_few(tree, holdings, 2).tolist() == [11, 0, 11, 0, 11, 0]


def test_crowded_writers_are_all_of_the_first_eighth_of_the_edges() -> None:
    holdings = held(20, ([0, 1], {12: 1}), ([1, 2, 3], {11: 1}), ([5], {10: 1}))
    for count, writers in ((1, 20), (4, 5), (10, 4)):
        loads = rivals.crowded(supernodes((np.arange(20) * count // 20).tolist()), holdings, 2)
        assert (loads > 0).tolist() == [True] * writers + [False] * (20 - writers)
        assert loads.sum() == 33
        assert np.ptp(loads[:writers]) <= 1


def test_whole_shards_go_to_the_least_loaded_and_of_equals_to_the_lowest() -> None:
    holdings = held(3, ([0, 1, 2], {10: 1, 6: 1, 5: 3}), ([1], {4: 1}))
    # 10 to rank 0, 6 to rank 2 (rank 1 has 4 already), 5 to rank 1, 5 to rank 2, 5 to rank 1.
    assert written(holdings, rivals.whole_shards(holdings)) == [10, 14, 11]


# --- all of them ---------------------------------------------------------------------------------------------------


@st.composite
def jobs(draw: st.DrawFn) -> Holdings:
    ranks = draw(st.integers(2, 9))
    holders = st.sets(st.integers(0, ranks - 1), min_size=1).map(sorted)
    shards = st.dictionaries(st.integers(0, 8), st.integers(0, 9), max_size=3)
    sets = draw(st.lists(st.tuples(holders, shards), max_size=6))
    return gather(
        ranks,
        [Alike(np.array([each]), sizes) for each, sizes in sets],
        np.array(draw(st.lists(st.integers(0, 30), min_size=ranks, max_size=ranks))),
    )


@settings(max_examples=100, deadline=None)
@given(jobs())
def test_every_way_places_every_byte_once_and_only_on_holders(holdings: Holdings) -> None:
    classes = holdings.classes
    for shares in (
        rivals.first_replica(classes),
        rivals.even(classes),
        rivals.whole_shards(holdings),
    ):
        assert shares.shape == classes.holders.shape
        assert (shares >= 0).all()
        sums = [shares[start:end].sum() for start, end in zip(classes.starts, classes.starts[1:], strict=False)]
        assert sums == classes.bytes.tolist()
        assert holdings.loads(shares).sum() == holdings.bytes


def one_by_one(holdings: Holdings) -> list[int]:
    """Bytes by rank of the greedy way, as it is told: one shard after the other."""
    classes, shards = holdings.classes, holdings.shards
    sets = [set(classes.holders[s:e].tolist()) for s, e in zip(classes.starts, classes.starts[1:], strict=False)]
    turns: list[int] = []
    for number, ranks in enumerate(sets):
        turns.append(max((turns[other] + 1 for other in range(number) if sets[other] & ranks), default=0))
    loads = holdings.fixed.tolist()
    order = [
        (-int(shards.bytes[kind]), turns[number], number, int(shards.counts[kind]))
        for number in range(len(sets))
        for kind in range(shards.starts[number], shards.starts[number + 1])
    ]
    for size, _, number, count in sorted(order):
        for _ in range(count):
            loads[min(sets[number], key=lambda rank: (loads[rank], rank))] -= size
    return loads


@settings(max_examples=100, deadline=None)
@given(jobs())
def test_whole_shards_are_dealt_as_one_by_one(holdings: Holdings) -> None:
    assert written(holdings, rivals.whole_shards(holdings)) == one_by_one(holdings)


def test_a_job_without_replicas_leaves_nothing_to_choose() -> None:
    holdings = held(3, ([0], {5: 1}), ([2], {7: 2}))
    assert holdings.shared_bytes == 0
    for shares in (
        rivals.first_replica(holdings.classes),
        rivals.even(holdings.classes),
        rivals.whole_shards(holdings),
    ):
        assert written(holdings, shares) == [5, 0, 14]
