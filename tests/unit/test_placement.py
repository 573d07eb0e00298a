"""Even dealing: consecutive runs, each within one chunk of an equal share."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.plan.placement import even_runs


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_runs_are_all_chunks_in_order_each_within_one_chunk_of_an_equal_share(sizes: list[int], writers: int) -> None:
    runs = even_runs(sizes, writers)
    assert len(runs) == writers
    assert min(runs) >= 0
    assert sum(runs) == len(sizes)
    ends = list(itertools.accumulate(runs))
    for run, end in zip(runs, ends, strict=True):
        share = sum(sizes[end - run : end])
        assert abs(share - sum(sizes) / writers) <= max(sizes, default=0)


@pytest.mark.parametrize(
    ("sizes", "writers", "runs"),
    [
        ([], 3, [0, 0, 0]),
        ([7], 1, [1]),
        ([1, 1, 1, 1], 2, [2, 2]),
        ([1, 1, 1, 1, 1, 1], 3, [2, 2, 2]),
        ([10, 1, 1, 1], 2, [1, 3]),
        ([1, 1, 1, 10], 2, [3, 1]),
        ([5], 2, [0, 1]),
    ],
)
def test_equal_chunks_are_dealt_equally(sizes: list[int], writers: int, runs: list[int]) -> None:
    assert even_runs(sizes, writers) == runs
