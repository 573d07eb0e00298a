"""Dealing out what several ranks of a node want, or several nodes: each chunk to one, and as much to each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from fastckpt.plan.relay_plan import Portion, all_wanted, plan_fanout, plan_node, plan_relay, runs_of, wanted
from fastckpt.topology.topology import Topology


def numbers_of(portion: Portion) -> list[int]:
    return [number for start, stop in portion.runs for number in range(start, stop)]


def plan(by_rank: dict[int, set[int]], sizes: dict[int, int]) -> list[Portion]:
    def give(numbers: Iterable[int]) -> list[int]:
        listed = list(numbers)
        assert listed == sorted(listed)
        return [sizes[number] for number in listed]

    said = {
        rank: wanted(sorted(numbers), sum(sizes[number] for number in numbers)) for rank, numbers in by_rank.items()
    }
    return plan_relay(said, give)


def loads(by_rank: dict[int, set[int]], sizes: dict[int, int], portions: list[Portion]) -> dict[int, int]:
    """Bytes that each rank reads."""
    dealt = {number: portion.reader for portion in portions for number in numbers_of(portion)}
    return {
        rank: sum(sizes[number] for number in numbers if dealt.get(number, rank) == rank)
        for rank, numbers in by_rank.items()
    }


@given(
    st.dictionaries(st.integers(0, 9), st.sets(st.integers(0, 40)), min_size=1),
    st.lists(st.integers(1, 10**9), min_size=41, max_size=41),
)
def test_each_chunk_that_several_ranks_want_is_read_by_one_of_them_for_all_of_them(
    by_rank: dict[int, set[int]], sizes: list[int]
) -> None:
    portions = plan(by_rank, dict(enumerate(sizes)))
    dealt: dict[int, Portion] = {}
    for portion in portions:
        assert portion.reader in portion.ranks
        for number in numbers_of(portion):
            assert number not in dealt, "read twice"
            dealt[number] = portion
    everything = set().union(*by_rank.values())
    for number in everything:
        wanting = tuple(sorted(rank for rank, numbers in by_rank.items() if number in numbers))
        assert (number in dealt) == (len(wanting) > 1)
        assert number not in dealt or dealt[number].ranks == wanting
    assert set(dealt) <= everything


@given(st.integers(2, 9), st.integers(1, 300), st.integers(1, 100))
def test_what_all_ranks_want_is_read_in_equal_parts_each_in_one_run(ranks: int, chunks: int, size: int) -> None:
    by_rank = {rank: set(range(5, 5 + chunks)) for rank in range(ranks)}
    portions = plan(by_rank, dict.fromkeys(range(5, 5 + chunks), size))
    assert all(len(portion.runs) == 1 for portion in portions)
    counts = [len(numbers_of(portion)) for portion in portions]
    assert sum(counts) == chunks
    assert max(counts) <= -(-chunks // ranks)


def test_who_has_less_to_read_of_its_own_reads_more_for_others() -> None:
    """Four shards of 12 chunks, now three: the middle rank has nothing that it alone wants."""
    by_rank = {0: set(range(24)), 1: set(range(12, 36)), 2: set(range(24, 48))}
    sizes = dict.fromkeys(range(48), 7)
    assert loads(by_rank, sizes, plan(by_rank, sizes)) == dict.fromkeys(range(3), 16 * 7)


def test_nobody_reads_for_others_what_nobody_else_wants() -> None:
    assert plan({0: {1, 2}, 1: {3}, 2: set()}, dict.fromkeys(range(9), 1)) == []


@given(st.sets(st.integers(0, 50)))
def test_runs_are_the_numbers(numbers: set[int]) -> None:
    runs = runs_of(sorted(numbers)).tolist()
    assert [number for start, stop in runs for number in range(start, stop)] == sorted(numbers)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(runs)), "two runs that are one"


# --- between nodes --------------------------------------------------------------------------------------------------


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[int, list[int]], dict[int, set[int]]]:
    """The ranks of each node, and the chunks that each rank wants."""
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    order = iter(draw(st.permutations(range(sum(counts)))))
    node_ranks = {node: sorted(next(order) for _ in range(count)) for node, count in enumerate(counts)}
    by_rank = {rank: draw(st.sets(st.integers(0, 40))) for rank in range(sum(counts))}
    return node_ranks, by_rank


@given(jobs(), st.lists(st.integers(1, 10**9), min_size=41, max_size=41))
def test_each_chunk_is_read_once_in_the_job_and_comes_to_every_rank_that_wants_it(
    job: tuple[dict[int, list[int]], dict[int, set[int]]], sizes: list[int]
) -> None:
    node_ranks, by_rank = job

    def give(numbers: Iterable[int]) -> list[int]:
        return [sizes[number] for number in numbers]

    said = {
        rank: wanted(sorted(numbers), sum(sizes[number] for number in numbers)) for rank, numbers in by_rank.items()
    }
    on_node = {node: {rank: said[rank] for rank in members} for node, members in node_ranks.items()}
    by_node = {node: all_wanted(mine, give) for node, mine in on_node.items()}
    tree = Topology.from_hosts([str(n) for r in sorted(by_rank) for n, m in node_ranks.items() if r in m]).tree()
    fanout = plan_fanout(by_node, node_ranks, give, tree)
    portions = {node: plan_node(on_node[node], node, members, fanout, give) for node, members in node_ranks.items()}
    read: dict[int, list[int]] = {}
    for node, members in node_ranks.items():
        here = [portion for portion in portions[node] if portion.source < 0]
        come = [(portion, number) for portion in portions[node] for number in numbers_of(portion)]
        assert len({number for _, number in come}) == len(come), "it comes twice"
        dealt = {number: portion for portion, number in come}
        for rank in members:
            for number in by_rank[rank]:
                assert number not in dealt or rank in dealt[number].ranks
                if number not in dealt:
                    assert sum(number in by_rank[other] for other in members) == 1
                    read.setdefault(number, []).append(rank)
        for portion in here:
            for number in numbers_of(portion):
                read.setdefault(number, []).append(portion.reader)
        for portion in portions[node]:
            assert portion.reader in portion.ranks
            assert set(portion.ranks) <= set(members)
            if portion.carried >= 0:
                carried = fanout.carried[portion.carried]
                assert (portion.runs, node in fanout.nodes[carried.nodes]) == (carried.runs, True)
                assert portion.source == (-1 if carried.reader in members else carried.reader)
                assert portion.reader == carried.reader or carried.reader not in members
    assert sorted(read) == sorted(set().union(*by_rank.values()))
    assert all(len(readers) == 1 for readers in read.values())


def test_nodes_that_want_the_same_read_equal_parts_of_it() -> None:
    node_ranks = {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    everything = wanted(range(600), 600)
    tree = Topology.from_hosts(["0", "0", "1", "1", "2", "2"]).tree()
    fanout = plan_fanout(dict.fromkeys(node_ranks, everything), node_ranks, lambda numbers: [1 for _ in numbers], tree)
    assert fanout.nodes == [(0, 1, 2)]
    assert [(carried.reader, carried.runs) for carried in fanout.carried] == [
        (rank, [(100 * rank, 100 * rank + 100)]) for rank in range(6)
    ]
