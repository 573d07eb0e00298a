"""Any classes on any tree: all bytes are dealt once, to holders, in a time that an exact solver hardly betters, and
what is said of the plan is true. The oracles are a linear program and sums in plain Python."""

from __future__ import annotations

import itertools
import math
import os
import secrets
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bench.placement.exact import least_seconds
from fastckpt.plan.classes import ChunkedClasses, of_sizes
from fastckpt.plan.deal import NEAR, Dealer
from fastckpt.plan.placement import Classes, Placement, cut_runs, makespan, place
from fastckpt.topology.topology import Tree

SOAK_ROUNDS = int(os.environ.get("SOAK_ROUNDS", "20"))
GAP_MAX = 0.005
LEVELS = ("rank", "node", "supernode", "gateway", "room", "storage")

seeds = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Job:
    tree: Tree
    classes: Classes
    fixed: np.ndarray

    @property
    def known(self) -> bool:
        return any(np.isfinite(capacities).any() for capacities in self.tree.capacities)

    def place(self) -> Placement:
        placed = place(self.tree, self.classes, self.fixed)
        assert placed.gap <= GAP_MAX, "the limit on sweeps was reached"
        return placed

    def path(self, rank: int) -> list[tuple[int, int]]:
        path = [(0, rank)]
        for level, parents in enumerate(self.tree.parents):
            path.append((level + 1, int(parents[path[-1][1]])))
        return path

    def holders(self, number: int) -> list[int]:
        return self.classes.holders[self.classes.starts[number] : self.classes.starts[number + 1]].tolist()


def classes_of(sizes: np.ndarray, holders: list[np.ndarray]) -> Classes:
    counts = [len(each) for each in holders]
    return Classes(sizes, np.cumsum([0, *counts]), np.concatenate([np.empty(0, np.intp), *holders]))


def random_job(seed: int) -> Job:
    """Up to 24 ranks below up to four levels of edges and the storage; capacities all alike, a little different,
    different by up to a million times, or known in part."""
    random = np.random.default_rng(seed)
    widths = [int(random.integers(1, 25))]
    for _ in range(random.integers(0, 5)):
        widths.append(int(random.integers(1, widths[-1] + 1)))
    widths.append(1)
    parents = tuple(random.integers(0, above, below) for below, above in itertools.pairwise(widths))
    kind = random.choice(["alike", "near", "far", "some"])

    def capacities(level: int, width: int) -> np.ndarray:
        base = np.full(width, 1e9 * 1.6**level)
        if kind != "alike":
            base *= random.uniform(0.2, 3, width)
        if kind == "far":
            base *= 10 ** random.uniform(-3, 3, width)
        return np.where(random.random(width) < 0.4, math.inf, base) if kind == "some" else base

    tree = Tree(
        (*LEVELS[: len(widths) - 1], "storage"),
        parents,
        tuple(capacities(level, width) for level, width in enumerate(widths)),
        tuple([str(edge) for edge in range(width)] for width in widths),
    )
    count, ranks = int(random.integers(0, 8)), widths[0]
    holders = [
        np.sort(random.choice(ranks, random.integers(1, random.integers(1, ranks + 1) + 1), replace=False))
        for _ in range(count)
    ]
    sizes = random.integers(0, 10**10, count) * (random.random(count) < 0.9)
    fixed = random.integers(0, 3 * 10**9, ranks) * (random.random(ranks) < 0.3)
    return Job(tree, classes_of(sizes, holders), fixed)


def seconds_by_hand(job: Job, shares: np.ndarray) -> float:
    loads: dict[tuple[int, int], int] = defaultdict(int)
    for rank, size in [
        *enumerate(job.fixed.tolist()),
        *zip(job.classes.holders.tolist(), shares.tolist(), strict=True),
    ]:
        for edge in job.path(rank):
            loads[edge] += size
    return max(load / job.tree.capacities[level][edge] for (level, edge), load in loads.items())


def check_all_bytes_are_dealt_once_in_the_least_time(seed: int) -> None:
    job = random_job(seed)
    placed = job.place()
    assert placed.shares.dtype == np.int64
    assert placed.shares.shape == job.classes.holders.shape
    assert placed.shares.min(initial=0) >= 0
    for number, size in enumerate(job.classes.bytes):
        assert placed.shares[job.classes.starts[number] : job.classes.starts[number + 1]].sum() == size
    if not job.known:
        assert math.isnan(placed.makespan_seconds)
        assert math.isnan(placed.bound_seconds)
        return
    least = least_seconds(job.tree, job.classes, job.fixed)
    assert placed.makespan_seconds == pytest.approx(seconds_by_hand(job, placed.shares))
    assert placed.bound_seconds <= least * (1 + 1e-6) + 1e-9
    assert placed.makespan_seconds <= least * 1.01
    assert placed.makespan_seconds <= placed.bound_seconds * (1 + GAP_MAX)


def check_the_binding_cut_gives_the_bound(seed: int) -> None:
    job = random_job(seed)
    placed = job.place()
    if not job.known:
        return
    cut = set(placed.binding)
    behind = {rank for rank in range(len(job.fixed)) if cut & set(job.path(rank))}
    size = sum(job.fixed[rank].item() for rank in behind)
    size += sum(
        total for number, total in enumerate(job.classes.bytes.tolist()) if behind.issuperset(job.holders(number))
    )
    capacity = sum(job.tree.capacities[level][edge] for level, edge in cut)
    assert placed.bound_seconds == pytest.approx(size / capacity if cut else 0.0)


def check_more_capacity_is_never_slower(seed: int) -> None:
    """By more than the gap that a plan is allowed: the bound says that no plan at all can be."""
    job = random_job(seed)
    random = np.random.default_rng(seed)
    more = replace(
        job.tree,
        capacities=tuple(
            np.where(random.random(len(level)) < 0.3, level * random.uniform(1, 5, len(level)), level)
            for level in job.tree.capacities
        ),
    )
    if not job.known:
        return
    before, after = job.place(), replace(job, tree=more).place()
    assert after.bound_seconds <= before.makespan_seconds * (1 + 1e-9)
    assert after.makespan_seconds <= before.makespan_seconds * (1 + GAP_MAX)


def check_relabelling_ranks_never_changes_the_time(seed: int) -> None:
    """But for the rounding of sums in another order, and of shares to whole bytes."""
    job = random_job(seed)
    random = np.random.default_rng(seed)
    old = random.permutation(len(job.fixed))
    new = np.argsort(old)
    tree = replace(
        job.tree,
        parents=(job.tree.parents[0][old], *job.tree.parents[1:]),
        capacities=(job.tree.capacities[0][old], *job.tree.capacities[1:]),
    )
    order = random.permutation(len(job.classes.bytes))
    classes = classes_of(job.classes.bytes[order], [np.sort(new[job.holders(number)]) for number in order])
    before, after = job.place(), Job(tree, classes, job.fixed[old]).place()
    assert after.bound_seconds == pytest.approx(before.bound_seconds, rel=1e-9, nan_ok=True)
    assert after.makespan_seconds == pytest.approx(before.makespan_seconds, rel=1e-6, nan_ok=True)


CHUNK = 4 * 2**20


def large_job(seed: int) -> tuple[Tree, ChunkedClasses]:
    """Up to five supernodes of up to eight nodes, of up to four ranks each, perhaps below gateways, and classes of up
    to three thousand chunks; ranks are enough for not all to write."""
    random = np.random.default_rng(seed)
    supernodes = int(random.integers(1, 6))
    nodes = random.integers(1, 9, supernodes)
    counts = [np.full(nodes.sum(), random.integers(1, 5)), nodes]
    if random.random() < 0.3:
        counts.append(np.bincount(random.integers(0, 3, supernodes)))
    counts.append(np.array([len(counts[-1])]))
    parents = [np.repeat(np.arange(len(count)), count) for count in counts]
    widths = [len(parents[0]), *map(len, counts)]
    capacities = []
    for level, width in enumerate(widths):
        base = np.full(width, 10 ** random.uniform(8.5, 9.5) * 2.5**level)
        if random.random() < 0.5:
            base *= random.uniform(0.1, 2, width)
        capacities.append(np.full(width, math.inf) if random.random() < 0.3 else base)
    capacities[-1] = np.minimum(capacities[-1], 1e12)
    names = tuple([str(edge) for edge in range(width)] for width in widths)
    held = []
    for _ in range(random.integers(1, 5)):
        width = widths[0] if random.random() < 0.5 else int(random.integers(1, widths[0] + 1))
        ranks = np.sort(random.choice(widths[0], width, replace=False))
        held.append((ranks.tolist(), [CHUNK] * int(10 ** random.uniform(0, 3.5))))
    return Tree(("rank", *LEVELS[1 : len(widths) - 1], "storage"), tuple(parents), tuple(capacities), names), of_sizes(
        held
    )


def check_more_capacity_never_makes_a_dealt_plan_slower(seed: int) -> None:
    """By more than the gap it is allowed, and one chunk for each run."""
    tree, given = large_job(seed)
    random = np.random.default_rng(seed)
    more = replace(
        tree,
        capacities=tuple(
            level * np.where(random.random(len(level)) < random.choice([0.3, 1.0]), random.uniform(1, 3), 1.0)
            for level in tree.capacities
        ),
    )
    before, after = Dealer(tree).deal(given), Dealer(more).deal(given)
    runs = np.bincount(given.classes.holders, after.runs > 0, len(tree.capacities[0]))
    assert after.bound_seconds <= before.makespan_seconds * (1 + 1e-9)
    assert after.makespan_seconds <= before.makespan_seconds * (1 + NEAR + GAP_MAX) + makespan(more, CHUNK * runs)


def check_a_dealt_plan_is_as_far_from_the_least_time_as_it_says(seed: int) -> None:
    """Whoever of the holders writes, and however slow they have been."""
    tree, given = large_job(seed)
    random = np.random.default_rng(seed)
    dealer = Dealer(tree, writers=[None, 1, 3][seed % 3])
    dealer.rates.add(random.integers(5000, 5500, len(tree.capacities[0])).astype(np.uint16), tree.capacities[0])
    dealt = dealer.deal(given)
    counts = np.diff(given.classes.starts)
    fixed = np.zeros(len(tree.capacities[0]), np.int64)
    np.add.at(fixed, given.classes.holders[given.classes.starts[:-1][counts == 1]], given.classes.bytes[counts == 1])
    classes = classes_of(
        given.classes.bytes[counts > 1],
        [given.classes.holders[slice(*given.classes.starts[[n, n + 1]])] for n in np.flatnonzero(counts > 1)],
    )
    least = least_seconds(tree, classes, fixed)
    assert dealt.written.sum() == given.classes.bytes.sum()
    assert dealt.makespan_seconds == pytest.approx(makespan(tree, dealt.written))
    assert least * (1 - GAP_MAX) <= dealt.bound_seconds <= least * (1 + 1e-6)
    assert dealt.gap == pytest.approx(dealt.makespan_seconds / dealt.bound_seconds - 1)


CHECKS = [
    check_more_capacity_never_makes_a_dealt_plan_slower,
    check_a_dealt_plan_is_as_far_from_the_least_time_as_it_says,
    check_all_bytes_are_dealt_once_in_the_least_time,
    check_the_binding_cut_gives_the_bound,
    check_more_capacity_is_never_slower,
    check_relabelling_ranks_never_changes_the_time,
]


@settings(max_examples=100)
@given(seeds)
def test_all_bytes_are_dealt_once_to_holders_within_a_hundredth_of_the_least_time(seed: int) -> None:
    check_all_bytes_are_dealt_once_in_the_least_time(seed)


@settings(max_examples=50)
@given(seeds)
def test_the_binding_cut_gives_the_bound(seed: int) -> None:
    check_the_binding_cut_gives_the_bound(seed)


@settings(max_examples=50)
@given(seeds)
def test_more_capacity_is_never_slower(seed: int) -> None:
    check_more_capacity_is_never_slower(seed)


@settings(max_examples=50)
@given(seeds)
def test_relabelling_ranks_never_changes_the_time(seed: int) -> None:
    check_relabelling_ranks_never_changes_the_time(seed)


@settings(max_examples=60)
@example(633)
@example(7000039)
@given(seeds)
def test_more_capacity_never_makes_a_dealt_plan_slower(seed: int) -> None:
    check_more_capacity_never_makes_a_dealt_plan_slower(seed)


@settings(max_examples=40)
@given(seeds)
def test_a_dealt_plan_is_as_far_from_the_least_time_as_it_says(seed: int) -> None:
    check_a_dealt_plan_is_as_far_from_the_least_time_as_it_says(seed)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_thousands_of_placements_are_what_they_say() -> None:
    first = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**32))
    print(f"TEST_SEED={first}")
    for seed in range(first, first + 100 * SOAK_ROUNDS):
        for check in CHECKS:
            try:
                check(seed)
            except BaseException:
                print(f"{check.__name__}({seed})")
                raise


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(0, 50)), max_size=40), st.data())
def test_runs_are_all_chunks_in_order_each_within_one_chunk_of_its_share(
    drawn: list[tuple[int, int]], data: st.DataObject
) -> None:
    sizes = [size for size, _ in drawn]
    shares = data.draw(st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any))
    phase = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.875]))
    runs = cut_runs(sizes, shares, phase).tolist()
    assert len(runs) == len(shares)
    assert min(runs) >= 0
    assert sum(runs) == len(sizes)
    ends = np.cumsum([0, *sizes])[np.cumsum([0, *runs])]
    wanted = np.cumsum([0, *shares]) * (sum(sizes) / sum(shares))
    assert (wanted - ends).max() <= max(1 - phase, 0) * max(sizes, default=0) + 1
    assert (ends - wanted).max() <= phase * max(sizes, default=0) + 1
    assert all(run == 0 for run, share in zip(runs, shares, strict=True) if share == 0)


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 5), st.data())
def test_classes_whose_chunks_are_alike_are_cut_as_each_by_itself(
    sizes: list[int], writers: int, data: st.DataObject
) -> None:
    one = st.lists(st.integers(0, 1000), min_size=writers, max_size=writers).filter(any)
    drawn = data.draw(st.lists(st.tuples(one, st.sampled_from([0.0, 0.25, 0.5, 0.875])), min_size=1, max_size=4))
    shares, phases = zip(*drawn, strict=True)
    together = cut_runs(sizes, shares, phases)
    assert together.tolist() == [cut_runs(sizes, *each).tolist() for each in drawn]


def test_shares_are_exact_beyond_what_64_bits_hold() -> None:
    assert cut_runs([2**60, 2**60, 2**60], [2**60 + 1, 2**61 - 1]).tolist() == [1, 2]
    assert cut_runs([2**60, 2**60, 2**60], [2**60 + 1, 2**61 - 1], 1.0).tolist() == [2, 1]


@settings(max_examples=50)
@given(seeds)
def test_the_same_input_gives_the_same_shares(seed: int) -> None:
    job = random_job(seed)
    assert job.place().shares.tolist() == job.place().shares.tolist()


@settings(max_examples=50)
@given(seeds)
def test_makespan_is_that_of_the_slowest_edge(seed: int) -> None:
    job = random_job(seed)
    if job.known:
        assert makespan(job.tree, job.fixed) == pytest.approx(
            seconds_by_hand(job, np.zeros(len(job.classes.holders), int))
        )
