"""How many write, which, and how much: from classes and a tree to runs of chunks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fastckpt.plan import rates
from fastckpt.plan.classes import of_sizes
from fastckpt.plan.deal import Dealer
from fastckpt.plan.placement import Classes, makespan, place
from fastckpt.plan.rates import FORGET_SAVES, Rates, encode_rate
from fastckpt.plan.simulate import simulate
from fastckpt.plan.writers import WRITERS_MIN, Profile
from fastckpt.topology.topology import Topology, Tree

MIB = 1 << 20


def topology(supernodes: int, nodes: int, ranks: int, **capacities: str) -> Topology:
    """``supernodes`` of ``nodes`` of ``ranks`` each."""
    levels: dict[str, dict[str, Any]] = {
        "node": {"count": supernodes * nodes, "ranks": ranks},
        "supernode": {"count": supernodes, "nodes": nodes},
    }
    for level, capacity in capacities.items():
        levels.setdefault(level, {})["capacity"] = capacity
    return Topology.parse(levels)


def flat(ranks: int) -> Tree:
    return Topology.from_hosts(["a"] * ranks).tree()


def written(dealer: Dealer, *classes: tuple[Sequence[int], list[int]]) -> list[int]:
    """Bytes by rank of classes, which are ranks and the bytes of their chunks; checked against the runs."""
    dealt = dealer.deal(of_sizes(classes))
    by_rank = np.zeros(len(dealer.tree.capacities[0]), np.int64)
    runs = dealt.runs.tolist()
    for ranks, sizes in classes:
        counts, runs = runs[: len(ranks)], runs[len(ranks) :]
        assert len(counts) == len(ranks)
        assert sum(counts) == len(sizes)
        ends = np.concatenate([[0], np.cumsum(sizes)])
        cuts = np.concatenate([[0], np.cumsum(counts)])
        np.add.at(by_rank, list(ranks), ends[cuts[1:]] - ends[cuts[:-1]])
    assert not runs
    assert by_rank.tolist() == dealt.written.tolist()
    return by_rank.tolist()


@pytest.mark.parametrize("numbering", ["block", "cyclic", "shuffled"])
@pytest.mark.parametrize("chunks", [1, 3, 40, 150])
def test_with_equal_capacities_every_supernode_gets_equally_many_writers_and_equal_bytes_within_one_chunk_a_writer(
    numbering: str, chunks: int
) -> None:
    """8 supernodes of 8 nodes of 4 ranks; 16 classes, each held by 16 ranks, equally many in each supernode."""
    ranks, class_count = 256, 16
    order = {
        "block": np.arange(ranks),
        "cyclic": np.arange(ranks).reshape(4, 64).T.ravel(),
        "shuffled": np.random.default_rng(0).permutation(ranks),
    }[numbering]  # by place in the machine, the rank there
    place_of = np.argsort(order)
    paths = [(str(place // 4), str(place // 32)) for place in place_of]
    capacities = {"rank": "2 GB/s", "node": "8 GB/s", "supernode": "32 GB/s", "storage": "256 GB/s"}
    tree = Topology.from_paths(paths, capacities=capacities).tree()
    supernode_of = place_of // 32
    held: list[list[int]] = [[] for _ in range(class_count)]
    for supernode in range(8):
        for position, rank in enumerate(np.flatnonzero(supernode_of == supernode)):
            held[position % class_count].append(int(rank))
    by_rank = written(Dealer(tree), *((sorted(holders), [MIB] * chunks) for holders in held))
    check_rule(supernode_of, by_rank, MIB)


def check_rule(supernode_of: np.ndarray, by_rank: Sequence[int], chunk: int) -> None:
    """Equally many writers, and bytes equal within one chunk for each of them."""
    writers = np.bincount(supernode_of, np.array(by_rank) > 0)
    bytes_ = np.bincount(supernode_of, by_rank)
    assert len(set(writers)) == 1
    assert np.ptp(bytes_) <= chunk * writers[0]


@pytest.mark.parametrize("storage", ["4 GB/s", "50 GB/s", "2 TB/s"])
@pytest.mark.parametrize("chunks", [5, 7, 64, 500, 2003])
@pytest.mark.parametrize(("supernodes", "nodes", "ranks"), [(2, 4, 8), (3, 16, 1), (3, 5, 3), (4, 8, 8), (5, 3, 2)])
def test_the_rule_holds_for_awkward_numbers_of_supernodes_and_chunks(
    supernodes: int, nodes: int, ranks: int, chunks: int, storage: str
) -> None:
    tree = topology(supernodes, nodes, ranks, rank="2 GB/s", supernode="20 GB/s", storage=storage).tree()
    supernode_of = np.arange(supernodes * nodes * ranks) // (nodes * ranks)
    for options in ({}, {"writers": 11}, {"streams": 1}):
        by_rank = written(Dealer(tree, **options), (range(len(supernode_of)), [4 * MIB] * chunks))
        check_rule(supernode_of, by_rank, 4 * MIB)


@pytest.mark.parametrize("supernodes", [3, 4])
def test_the_rule_holds_for_several_classes_and_families(supernodes: int) -> None:
    """A class held by all, and a family of 24 classes, each held by two ranks of each supernode."""
    tree = topology(supernodes, 12, 4, rank="2 GB/s", supernode="20 GB/s").tree()
    supernode_of = np.arange(supernodes * 48) // 48
    family = [np.flatnonzero(np.arange(supernodes * 48) % 48 // 2 == number).tolist() for number in range(24)]
    for sizes, own in (([4 * MIB] * 700, 23), ([4 * MIB] * 96, 2), ([4 * MIB] * 96, 60)):
        listed = [(range(supernodes * 48), sizes), *((ranks, [4 * MIB] * own) for ranks in family)]
        check_rule(supernode_of, written(Dealer(tree), *listed), 4 * MIB)
        given = of_sizes(listed)
        alike = [given.alike[0], (np.arange(1, 25), np.full(own, 4 * MIB))]
        dealt = Dealer(tree).deal(dataclasses.replace(given, alike=alike))
        assert dealt.written.tolist() == Dealer(tree).deal(given).written.tolist()


def test_with_faster_ranks_a_plan_is_not_slower_for_having_fewer_writers() -> None:
    random = np.random.default_rng(7)
    for _ in range(40):
        nodes = random.integers(2, 60, 3).tolist()
        uplinks = {str(edge): float(10 ** random.uniform(9, 10.5)) for edge in range(3)}
        rank, storage, chunks = (
            10 ** random.uniform(8.5, 9.5),
            10 ** random.uniform(9.5, 11),
            random.integers(500, 2000),
        )
        seconds = []
        for capacity in (rank, 1.001 * rank, 2 * rank):
            tree = Topology.parse(
                {
                    "rank": {"capacity": float(capacity)},
                    "node": {"ranks": 1},
                    "supernode": {"nodes": nodes, "capacities": uplinks},
                    "storage": {"capacity": float(storage)},
                }
            ).tree()
            seconds.append(outlook(Dealer(tree), (range(sum(nodes)), [4 * MIB] * int(chunks)))["makespan_seconds"])
        assert seconds[1] <= seconds[0] * 1.01
        assert seconds[2] <= seconds[0] * 1.02


def test_of_as_many_chunks_as_writers_each_gets_one() -> None:
    sizes = [4 * MIB] * 7 + [3 * MIB]
    pairs = [(range(8 * number, 8 * number + 8), sizes) for number in range(4)]
    assert sorted(written(Dealer(flat(32), writers=8), *pairs)) == [3 * MIB] * 4 + [4 * MIB] * 28


def test_classes_of_one_writer_take_turns_behind_equal_edges() -> None:
    """However many ranks are behind an edge."""
    tree = Topology.parse({"node": {"ranks": 1}, "supernode": {"nodes": [3, 3, 1], "capacity": "1 GB/s"}}).tree()
    supernode_of = np.array([0, 0, 0, 1, 1, 1, 2])
    by_rank = written(Dealer(tree), *[(range(7), [MIB])] * 21)
    assert np.bincount(supernode_of, by_rank).tolist() == [7 * MIB] * 3
    by_rank = written(Dealer(tree, writers=3), (range(7), [MIB] * 90))
    assert np.bincount(supernode_of, by_rank).tolist() == [30 * MIB] * 3


def test_a_class_that_all_hold_is_written_by_those_who_write_anyway() -> None:
    """Two thousand pairs, in different supernodes, and one large class of all."""
    tree = topology(8, 500, 1, rank="2 GB/s", storage="100 GB/s").tree()
    pairs = [([rank, rank + 2000], [64 * MIB] * 90) for rank in range(2000)]
    by_rank = np.array(written(Dealer(tree), *pairs, (range(4000), [64 * MIB] * 1800)))
    assert (by_rank > 0).reshape(8, 500).sum(axis=1).tolist() == [250] * 8
    assert by_rank.max() <= 91 * 64 * MIB


def outlook(dealer: Dealer, *classes: tuple[Sequence[int], list[int]]) -> dict[str, Any]:
    dealer.deal(of_sizes(classes))
    return dealer.outlook()


def test_the_bound_is_of_all_holders_whoever_was_chosen() -> None:
    tree = Topology.parse(
        {"node": {"count": 4, "ranks": 1}, "supernode": {"nodes": 2, "capacities": {"0": "1 GB/s", "1": "3 GB/s"}}}
    ).tree()
    job = (range(4), [MIB] * 128)
    every, one = outlook(Dealer(tree), job), outlook(Dealer(tree, writers=1), job)
    assert one["bound_seconds"] == every["bound_seconds"] == pytest.approx(128 * MIB / 4e9)
    assert every["makespan_seconds"] == pytest.approx(every["bound_seconds"], rel=0.02)
    assert one["makespan_seconds"] == pytest.approx(128 * MIB / 3e9)
    assert one["gap"] == pytest.approx(one["makespan_seconds"] / one["bound_seconds"] - 1) == pytest.approx(1 / 3)
    assert one["binding"] == ["all 2 supernodes"]
    assert (one["writers"], one["objects"], one["object_seconds"]) == (1, 4, 0.004)


def test_there_are_enough_writers_for_what_the_edges_carry() -> None:
    """Unequal uplinks, and a storage that needs more writers than the profile would think of."""
    tree = Topology.parse(
        {
            "rank": {"capacity": "1 GB/s"},
            "node": {"count": 48, "ranks": 1},
            "supernode": {"nodes": 16, "capacities": {"0": "2 GB/s", "1": "8 GB/s", "2": "14 GB/s"}},
        }
    ).tree()
    for chunks in (100, 500, 2000):
        found = outlook(Dealer(tree), (range(48), [4 * MIB] * chunks))
        assert found["bound_seconds"] == pytest.approx(chunks * 4 * MIB / 24e9)
        assert found["gap"] <= 0.03
        assert found["writers"] < 48


def test_unequal_uplinks_get_bytes_in_proportion() -> None:
    tree = Topology.parse(
        {
            "node": {"count": 4, "ranks": 1},
            "supernode": {"names": ["slow", "fast"], "nodes": 2, "capacities": {"slow": "1 GB/s", "fast": "3 GB/s"}},
        }
    ).tree()
    by_rank = written(Dealer(tree), ([0, 1, 2, 3], [MIB] * 400))
    assert sum(by_rank[:2]) / sum(by_rank) == pytest.approx(1 / 4, abs=0.01)


def test_what_one_rank_alone_holds_counts_as_its_own() -> None:
    by_rank = written(Dealer(flat(2)), ([0], [MIB] * 30), ([0, 1], [MIB] * 50))
    assert by_rank == [40 * MIB, 40 * MIB]


def test_a_class_of_fewer_chunks_than_holders_is_written_by_as_many_spread_over_the_supernodes() -> None:
    by_rank = np.array(written(Dealer(topology(4, 4, 4).tree()), (range(64), [MIB] * 4)))
    assert (by_rank > 0).reshape(4, 16).sum(axis=1).tolist() == [1, 1, 1, 1]


def test_options_pin_the_writers_of_a_class() -> None:
    by_rank = np.array(written(Dealer(topology(4, 4, 4).tree(), writers=8), (range(64), [MIB] * 400)))
    assert (by_rank > 0).reshape(4, 16).sum(axis=1).tolist() == [2, 2, 2, 2]


def test_many_ranks_with_little_to_write_are_not_all_writers_and_with_much_they_are() -> None:
    tree = topology(16, 16, 8).tree()
    little = np.array(written(Dealer(tree, streams=4), (range(2048), [4 * MIB] * 4096)))
    assert WRITERS_MIN <= np.count_nonzero(little) < 512
    assert np.ptp((little > 0).reshape(16, 128).sum(axis=1)) <= 1
    much = np.array(written(Dealer(tree, streams=4), (range(2048), [64 * MIB] * 300_000)))
    assert np.count_nonzero(much) > 1800


def test_who_writes_its_own_shard_anyway_writes_replicas_too() -> None:
    tree = topology(16, 16, 8).tree()
    own = [([rank], [MIB]) for rank in range(2048)]
    by_rank = np.array(written(Dealer(tree, streams=4), *own, (range(2048), [MIB] * 4096)))
    assert set(by_rank.tolist()) == {3 * MIB}


@pytest.mark.parametrize(
    ("profile", "size", "ranks"),
    [
        (
            Profile(stream_bytes_per_second=0.645e9, bytes_per_second=6e9, objects_per_second=math.inf, streams=1),
            10**12,
            48,
        ),
        (Profile(stream_bytes_per_second=1e9, objects_per_second=100, streams=1), 10**10, 4096),
    ],
)
def test_enough_writers_are_the_fewest_that_are_nearly_as_fast_as_the_best(
    profile: Profile, size: int, ranks: int
) -> None:
    enough = profile.enough_writers(size, ranks)
    seconds = [profile.seconds(size, count, count) for count in range(1, ranks + 1)]
    assert min(seconds) * 1.04 >= seconds[enough - 1]
    assert seconds[max(0, int(enough * 0.9) - 2)] > min(seconds) * 1.02


def test_the_knee_is_that_of_a_published_curve() -> None:
    """Lustre, 24 targets: one client 0.645 GB/s, about 6 GB/s together; writes rise until about 48 threads."""
    profile = Profile(stream_bytes_per_second=0.645e9, bytes_per_second=6e9)
    rates = [1e9 / profile.seconds(10**9, writers, 0) / 1e9 for writers in (1, 24, 48)]
    assert rates == pytest.approx([0.61, 5.55, 5.97], abs=0.01)


def test_classes_whose_chunks_are_alike_are_dealt_as_if_each_was_listed() -> None:
    random = np.random.default_rng(5)
    holders = np.stack([random.choice(40, 4, replace=False) for _ in range(60)])
    kinds = [np.array([3, 1, 4, 1, 5]) * MIB, np.array([9, 2]) * MIB, np.array([6] * 40) * MIB]
    kind_of = random.integers(0, 3, 60)
    listed = of_sizes([(ranks, kinds[kind].tolist()) for ranks, kind in zip(holders.tolist(), kind_of, strict=True)])
    alike = [(np.flatnonzero(kind_of == kind), sizes) for kind, sizes in enumerate(kinds)]
    found = [Dealer(flat(40)).deal(classes) for classes in (listed, dataclasses.replace(listed, alike=alike))]
    assert found[0].runs.tolist() == found[1].runs.tolist()
    assert found[0].written.tolist() == found[1].written.tolist()


def test_holders_that_are_not_in_the_tree_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 4 holds bytes and is not in the tree, which has 4 ranks"):
        Dealer(flat(4)).deal(of_sizes([([4], [MIB]), ([0, 1], [MIB])]))


def test_classes_without_bytes_are_dealt() -> None:
    assert written(Dealer(flat(40)), (range(40), []), (range(20), []), ([3], [MIB])) == [0] * 3 + [MIB] + [0] * 36


# --- rates ---------------------------------------------------------------------------------------------------------


def sample(*rates: float) -> np.ndarray:
    return np.array([encode_rate(int(rate), 1.0) for rate in rates], np.uint16)


def unknown(ranks: int) -> np.ndarray:
    return np.full(ranks, math.inf)


def test_a_rate_survives_its_encoding_within_a_third_of_a_percent() -> None:
    found = Rates(4)
    found.add(sample(4e9, 2e9, 2.5e9, 4e8), np.full(4, 4e9))
    assert found.slow() == pytest.approx([1, 0.8, 1, 0.16], rel=0.003)  # the typical one is 1.6 times slower


def test_small_writes_say_nothing() -> None:
    assert encode_rate(rates.SAMPLE_BYTES_MIN - 1, 1e-3) == 0
    found = Rates(2)
    found.add(np.zeros(2, np.uint16), unknown(2))
    assert found.version == 0
    assert found.slow().tolist() == [1, 1]


def test_only_those_are_slow_who_wrote_less_than_was_to_be_expected_beyond_noise() -> None:
    expected = np.array([1e9, 1e9, 1e9, 4e9, math.inf])
    for wrote, slow in (
        ((1e9, 1e9, 1e9, 4e9, 1e9), [1, 1, 1, 1, 1]),
        ((0.93e9, 1e9, 1e9, 3.7e9, 9e9), [1, 1, 1, 1, 1]),
        ((0.5e9, 0.5e9, 0.5e9, 2e9, 9e9), [1, 1, 1, 1, 1]),  # so is the storage
        ((0.5e9, 0.5e9, 0.5e9, 0.5e9, 0.5e9), [1, 1, 1, 1, 1]),  # nobody is faster by himself
        ((3e9, 3e9, 1.1e9, 12e9, 9e9), [1, 1, 1, 1, 1]),  # the topology promises no more
        ((1e9, 1e9, 0.5e9, 4e9, 1e9), [1, 1, 0.5, 1, 1]),
        ((1e9, 1e9, 1e9, 1e9, 1e9), [1, 1, 1, 1, 1]),
        ((1e9, 1e9, 1e9, 1e9, 4e9), [1, 1, 1, 0.25, 1]),
    ):
        found = Rates(5)
        found.add(sample(*wrote), expected)
        assert found.slow() == pytest.approx(slow, rel=0.01), wrote


def test_a_slow_writer_is_given_less_as_soon_as_that_gains_a_twentieth() -> None:
    dealer = Dealer(flat(4))
    job = ([0, 1, 2, 3], [MIB] * 4000)
    assert written(dealer, job) == [1000 * MIB] * 4
    assert not dealer.would_gain()
    dealer.learn(sample(1e9, 1e9, 1e9, 0.99e9))
    assert not dealer.would_gain()
    dealer.learn(sample(1e9, 1e9, 1e9, 0.2e9))
    assert dealer.would_gain()
    less = written(dealer, job)
    assert less[3] < 900 * MIB
    assert max(less[:3]) - min(less[:3]) <= 2 * MIB
    for _ in range(20):
        dealer.learn(sample(1e9, 1e9, 1e9, 0.2e9))
    assert dealer.would_gain()
    assert written(dealer, job)[3] / MIB == pytest.approx(4000 * 0.2 / 3.2, rel=0.02)
    assert not dealer.would_gain()


def test_what_is_not_confirmed_is_forgotten() -> None:
    dealer = Dealer(flat(2))
    job = ([0, 1], [MIB] * 1000)
    written(dealer, job)
    dealer.learn(sample(1e9, 1e8))
    assert dealer.would_gain()
    assert written(dealer, job)[1] < 100 * MIB
    for _ in range(FORGET_SAVES):
        assert not dealer.would_gain()
        dealer.learn(sample(1e9, 0))
    assert dealer.would_gain()
    assert written(dealer, job) == [500 * MIB] * 2


def save(dealer: Dealer, truth: Tree, *classes: tuple[Sequence[int], list[int]]) -> np.ndarray:
    """A save on a network that is as ``truth`` says; bytes by rank."""
    by_rank = np.array(written(dealer, *classes))
    seconds = simulate(truth, by_rank, tolerance=0).finish_seconds
    samples = [encode_rate(*one) if one[0] else 0 for one in zip(by_rank, seconds, strict=True)]
    dealer.learn(np.array(samples, np.uint16))
    return by_rank


def test_who_shares_its_way_to_the_storage_with_others_is_not_slow() -> None:
    """Two equal uplinks. Of the first, four ranks write, of the second one: when one of each is to write, they get
    equal bytes all the same."""
    tree = topology(2, 4, 1, supernode="2 GB/s").tree()
    dealer = Dealer(tree)
    save(dealer, tree, ([0, 1, 2, 3], [4 * MIB] * 2000), ([4], [4 * MIB] * 2000))
    assert written(dealer, ([0, 4], [4 * MIB] * 2000))[::4] == [4000 * MIB] * 2


def test_where_nobody_is_slow_a_new_layout_is_dealt_as_at_the_beginning() -> None:
    random = np.random.default_rng(3)
    for _ in range(15):
        uplinks = {str(edge): float(10 ** random.uniform(9, 10)) for edge in range(3)}
        tree = Topology.parse(
            {"node": {"count": 12, "ranks": 1}, "supernode": {"nodes": 4, "capacities": uplinks}}
        ).tree()
        dealer = Dealer(tree)

        def classes(width: int) -> list[tuple[list[int], list[int]]]:
            return [
                (np.sort(random.choice(12, width, replace=False)).tolist(), [4 * MIB] * int(random.integers(300, 1500)))
                for _ in range(3)
            ]

        before, after = classes(6), classes(4)
        for _ in range(3):
            save(dealer, tree, *before)
            assert not dealer.would_gain()
        assert written(dealer, *after) == written(Dealer(tree), *after)


@pytest.mark.parametrize("uplinks", [("20 GB/s", "20 GB/s"), ("2 GB/s", "2 GB/s"), ("1 GB/s", "3 GB/s")])
@pytest.mark.parametrize("rank_capacity", ["1 GB/s", "0.1 GB/s", math.inf])
def test_a_rank_that_is_slow_is_given_less_after_one_save_and_then_plans_stay(
    uplinks: tuple[str, str], rank_capacity: str | float
) -> None:
    document: dict[str, Any] = {
        "node": {"count": 8, "ranks": 1},
        "supernode": {"nodes": 4, "capacities": dict(zip("01", uplinks, strict=True))},
    }
    if rank_capacity != math.inf:
        document["rank"] = {"capacity": rank_capacity}
    tree = Topology.parse(document).tree()
    slow = tree.capacities[0].copy()
    job = (range(8), [4 * MIB] * 4000)
    fresh = np.array(written(Dealer(tree), job))
    slow[5] = 0.3 * fresh[5] / makespan(tree, fresh)
    truth = dataclasses.replace(tree, capacities=(slow, *tree.capacities[1:]))
    dealer = Dealer(tree)
    first = save(dealer, truth, job)
    assert dealer.would_gain()
    for _ in range(4):
        then = save(dealer, truth, job)
        assert then[5] < 0.5 * first[5]
        assert makespan(truth, then) <= 0.6 * makespan(truth, first)
        assert not dealer.would_gain()
    told = dealer.outlook()
    assert told["bound_seconds"] == pytest.approx(place_all(tree, job))
    assert told["makespan_seconds"] == pytest.approx(makespan(tree, then))


def place_all(tree: Tree, job: tuple[Sequence[int], list[int]]) -> float:
    ranks, sizes = job
    classes = Classes(np.array([sum(sizes)]), np.array([0, len(ranks)]), np.array(ranks))
    return place(tree, classes, np.zeros(len(tree.capacities[0]), np.int64)).bound_seconds
