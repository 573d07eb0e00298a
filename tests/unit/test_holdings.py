"""What is held by whom: sets of one rank, equal sizes, and what a snapshot's layout tells."""

from __future__ import annotations

import numpy as np
import pytest

from fastckpt.format.families import mesh_of
from fastckpt.format.tables import Chunks, Layout, check_layout
from fastckpt.plan.deal import Dealer
from fastckpt.plan.holdings import Alike, Holdings, gather, holdings_of_layout
from fastckpt.plan.save_plan import COMPARED, KNOWN, Offer, RankOffer, plan_save
from fastckpt.topology.topology import Topology

KIB = 1024


def layout(writers: list[tuple[int, int]], ranks: int = 4) -> Chunks:
    """Tensors of 16, 16 and 4 KiB in units of their own and chunks of 4 KiB, and a bundle of two tiny ones."""
    rows = [4096, 4096, 1024, 8, 8]
    found = Layout(
        chunk_bytes=4 * KIB,
        keys=["a", "b", "c", "d", "e"],
        owners=[-1] * 5,
        dtypes=["float32"] * 5,
        shapes=[[count] for count in rows],
        aliases=[],
        shard_keys=[0, 1, 2, 3, 4],
        shard_offsets=[[0]] * 5,
        shard_sizes=[[count] for count in rows],
        units=[[0], [1], [2], [3, 4]],
        writers=writers,
        rank_nodes=[0] * ranks,
    )
    return check_layout(found, "x")


def sets(holdings: Holdings) -> dict[tuple[int, ...], int]:
    classes = holdings.classes
    return {
        tuple(classes.holders[classes.starts[number] : classes.starts[number + 1]].tolist()): int(size)
        for number, size in enumerate(classes.bytes)
    }


def test_ranks_that_share_a_unit_hold_all_that_their_runs_reach() -> None:
    holdings = holdings_of_layout(layout([(3, 3), (0, 3), (2, 2), (1, 2)]))
    assert sets(holdings) == {(0, 2, 3): 32 * KIB}
    assert holdings.fixed.tolist() == [0, 4 * KIB + 64, 0, 0]
    assert holdings.shards.bytes.tolist() == [16 * KIB]
    assert holdings.shards.counts.tolist() == [2]


def test_what_one_rank_wrote_alone_counts_as_held_by_it_alone() -> None:
    holdings = holdings_of_layout(layout([(0, 4), (1, 4), (0, 1), (0, 1)]))
    assert sets(holdings) == {}
    assert holdings.fixed.tolist() == [20 * KIB + 64, 16 * KIB, 0, 0]


def test_runs_that_only_meet_at_a_border_of_units_are_not_one_set() -> None:
    holdings = holdings_of_layout(layout([(0, 2), (1, 2), (0, 1), (2, 3), (3, 2)]))
    assert sets(holdings) == {(0, 1): 16 * KIB, (0, 2): 16 * KIB}
    assert holdings.fixed.tolist() == [0, 0, 0, 4 * KIB + 64]


def test_who_holds_the_tensors_of_a_mesh_is_known_whoever_wrote_them() -> None:
    """Rows of ``a`` are split between the columns of a mesh of 2 x 3, the last of which has one row less; ``b`` between
    all six ranks, of which two get nothing; ``c`` is listed."""
    mesh = mesh_of(np.arange(6).reshape(2, 3))
    offers = []
    for rank in range(6):
        tensors = [Offer("a", "float32", [8, 1024], [], KNOWN, 0, "", 0, [(0, 1)])]
        if rank not in (2, 5):
            tensors.append(Offer("b", "float32", [4, 16], [], KNOWN, 0, "", 0, [(0, 0), (0, 1)]))
        offers.append(RankOffer([*tensors, Offer("c", "int64", [3], [([0], [3])], COMPARED, 0, "")], [[]], [mesh]))
    digests = {rank: {"c": b"same"} for rank in range(6)}
    dealer = Dealer(Topology.from_hosts(["a"] * 6).tree(), writers=1)
    found, _ = plan_save(dict(enumerate(offers)), digests, [0] * 6, 4 * KIB, dealer=dealer)
    holdings = holdings_of_layout(check_layout(found, "x"))
    assert sets(holdings) == {(0, 3): 12 * KIB, (1, 4): 12 * KIB, (2, 5): 8 * KIB}
    assert holdings.fixed.tolist() == [64 + 24, 64, 0, 64, 64, 0]
    assert (holdings.shards.bytes.tolist(), holdings.shards.counts.tolist()) == ([12 * KIB, 12 * KIB, 8 * KIB], [1] * 3)


def test_a_layout_of_nothing_holds_nothing() -> None:
    nothing = Layout(
        chunk_bytes=4 * KIB,
        **{name: [] for name in ("keys", "owners", "dtypes", "shapes", "aliases", "shard_keys", "shard_offsets")},
        shard_sizes=[],
        units=[],
        writers=[],
        rank_nodes=[0, 0],
    )
    holdings = holdings_of_layout(check_layout(nothing, "x"))
    assert (holdings.bytes, holdings.ranks) == (0, 2)


def test_sets_of_one_rank_and_loads_by_rank_are_what_only_one_holds() -> None:
    holdings = gather(
        3,
        [Alike(np.array([[0], [2]]), {5: 2}), Alike(np.array([[0, 1], [1, 2]]), {7: 1, 3: 2})],
        np.array([100, 0, 0]),
    )
    assert holdings.fixed.tolist() == [110, 0, 10]
    assert sets(holdings) == {(0, 1): 13, (1, 2): 13}
    assert holdings.bytes == 146
    assert holdings.shared_bytes == 26
    assert holdings.loads(np.array([13, 0, 6, 7])).tolist() == [123, 6, 17]


def test_loads_are_exact_beyond_what_a_float_holds() -> None:
    holdings = gather(2, [Alike(np.array([[0, 1]]), {2**60 + 1: 1})])
    assert holdings.loads(np.array([2**60 + 1, 0])).tolist() == [2**60 + 1, 0]


def test_a_set_without_bytes_is_none() -> None:
    assert sets(gather(3, [Alike(np.array([[0, 1]]), {0: 3}), Alike(np.array([[1, 2]]), {})])) == {}


def test_more_bytes_than_can_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match=r"9223372036854775808 bytes in all are more than 2\^62"):
        gather(2, [Alike(np.array([[0, 1], [0, 1]]), {2**62: 1})])
