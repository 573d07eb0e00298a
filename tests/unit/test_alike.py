"""Replies that are alike travel once a node and are looked at once."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fastckpt.plan.alike import by_rank, each, merged, runs_of
from fastckpt.plan.value_kinds import find_differences, value_kinds


@given(st.lists(st.lists(st.sampled_from([b"", b"a", b"bb"]), min_size=1, max_size=5), min_size=1, max_size=5))
def test_what_ranks_said_comes_back_by_rank_and_equal_replies_are_one_object(nodes: list[list[bytes]]) -> None:
    said: dict[int, bytes] = {}
    lines = []
    for replies in nodes:
        node = {len(said) + at: bytes(bytearray(reply)) for at, reply in enumerate(replies)}
        said |= node
        lines.append(merged(node))
    found = by_rank(lines)
    assert found == said
    assert len({id(reply) for reply in found.values()}) == len(set(said.values()))


def test_a_node_whose_ranks_say_the_same_says_it_in_one_line_however_many_they_are() -> None:
    one, many = merged({8: b"x" * 70}), merged(dict.fromkeys(range(8, 264), b"x" * 70))
    assert len(many) <= len(one) + 2


def test_each_reply_is_looked_at_once() -> None:
    seen: list[bytes] = []
    reply = b"same"
    found = each({0: reply, 1: b"other", 2: reply}, lambda data: seen.append(data) or data.decode())
    assert found == {0: "same", 1: "other", 2: "same"}
    assert seen == [b"same", b"other"]


@given(st.lists(st.integers(0, 30), unique=True).map(sorted))
def test_runs_hold_the_ranks_they_are_made_of(ranks: list[int]) -> None:
    runs = runs_of(ranks)
    assert [rank for start, stop in runs for rank in range(start, stop)] == ranks
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(runs))


values = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([b"1", b"2"]))


@given(st.lists(st.lists(values, min_size=1, max_size=3), min_size=1, max_size=4))
def test_kinds_of_values_found_node_by_node_are_those_of_all_ranks(nodes: list[list[dict[str, bytes]]]) -> None:
    first = sorted(nodes[0][0].items())
    kinds = value_kinds([name for name, _ in first], [find_differences(first, node) for node in nodes])
    ranks = [rank for node in nodes for rank in node]
    assert list(kinds) == sorted({name for rank in ranks for name in rank})
    for name, kind in kinds.items():
        found = [rank.get(name) for rank in ranks]
        assert kind == ("some" if None in found else "same" if len(set(found)) == 1 else "own")
