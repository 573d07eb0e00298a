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
from fastckpt.plan.deal import WRITERS_MIN, Dealer, Profile
from fastckpt.plan.rates import FORGET_SAVES, Rates, encode_rate
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
    dealer = Dealer(tree, writers=ranks)
    by_rank = written(dealer, *((sorted(holders), [MIB] * chunks) for holders in held))
    of_supernode = np.bincount(supernode_of, by_rank) / MIB
    writers = np.bincount(supernode_of, np.array(by_rank) > 0)
    mean = chunks * class_count / 8
    assert set(writers) == {min(chunks * class_count, ranks) // 8}
    assert max(abs(of_supernode - mean)) <= 8  # of 32 writers
    assert max(by_rank) - min(by_rank) <= (2 if chunks > 16 else 1) * MIB


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
        (Profile(stream_bytes_per_second=0.645e9, bytes_per_second=6e9, objects_per_second=math.inf), 10**12, 48),
        (Profile(stream_bytes_per_second=1e9, objects_per_second=100), 10**10, 4096),
    ],
)
def test_enough_writers_are_the_fewest_that_are_nearly_as_fast_as_the_best(
    profile: Profile, size: int, ranks: int
) -> None:
    enough = profile.enough_writers(size, ranks, 1)
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


def test_a_rate_survives_its_encoding_within_a_third_of_a_percent() -> None:
    found = Rates(3)
    found.add(sample(1e8, 2.5e9, 4e11))
    assert found.limit(np.full(3, math.inf)) == pytest.approx([1e8, 2.5e9, 4e11], rel=0.003)


def test_small_writes_say_nothing() -> None:
    assert encode_rate(rates.SAMPLE_BYTES_MIN - 1, 1e-3) == 0
    found = Rates(2)
    found.add(np.zeros(2, np.uint16))
    assert found.version == 0
    assert found.limit(np.array([5.0, math.inf])).tolist() == [5.0, math.inf]


def test_a_slow_writer_is_given_less_as_soon_as_that_gains_a_twentieth() -> None:
    dealer = Dealer(flat(4))
    job = ([0, 1, 2, 3], [MIB] * 4000)
    assert written(dealer, job) == [1000 * MIB] * 4
    assert not dealer.would_gain()
    dealer.rates.add(sample(1e9, 1e9, 1e9, 0.99e9))
    assert not dealer.would_gain()
    dealer.rates.add(sample(1e9, 1e9, 1e9, 0.2e9))
    assert dealer.would_gain()
    less = written(dealer, job)
    assert less[3] < 900 * MIB
    assert max(less[:3]) - min(less[:3]) <= 2 * MIB
    for _ in range(20):
        dealer.rates.add(sample(1e9, 1e9, 1e9, 0.2e9))
    assert dealer.would_gain()
    assert written(dealer, job)[3] / MIB == pytest.approx(4000 * 0.2 / 3.2, rel=0.02)
    assert not dealer.would_gain()


def test_a_rate_that_is_not_confirmed_is_forgotten() -> None:
    dealer = Dealer(flat(2))
    job = ([0, 1], [MIB] * 1000)
    written(dealer, job)
    dealer.rates.add(sample(1e9, 1e8))
    assert dealer.would_gain()
    assert written(dealer, job)[1] < 100 * MIB
    for _ in range(FORGET_SAVES):
        assert not dealer.would_gain()
        dealer.rates.add(sample(1e9, 0))
    assert dealer.would_gain()
    assert written(dealer, job) == [500 * MIB] * 2
