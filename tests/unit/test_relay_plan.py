"""Dealing out to the ranks of a node what several of them want: each chunk to one, and as much to each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from fastckpt.plan.relay_plan import Portion, plan_relay, runs_of, wanted


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
