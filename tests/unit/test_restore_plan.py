"""Planning a read: only the chunks that are needed, and exactly what is wanted of them."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.format.shard import Box
from fastckpt.format.tables import SHARED, Chunks, Layout, Piece
from fastckpt.plan.restore_plan import Catalog, Fit, Selection, Want, fit, misfits, plan_reads, regions
from fastckpt.plan.save_plan import COMPARED, Offer, RankOffer, plan_save


def chunks_of(*tensors: tuple[str, list[int], str]) -> Chunks:
    offers = [
        Offer(key, "float32", shape, [([0] * len(shape), shape)], COMPARED, 0, alias) for key, shape, alias in tensors
    ]
    layout, _ = plan_save({0: RankOffer(offers, [])}, {0: {}}, [0], 4096)
    return Chunks(layout)


def test_only_chunks_that_hold_something_wanted_are_read() -> None:
    chunks = chunks_of(("a", [8, 1024], ""), ("b", [4, 1024], ""))
    reads = plan_reads(chunks, [Want(0, Box((2, 10), (2, 5)), 7)])
    assert [read.chunk for read in reads] == [2, 3]
    assert [(delivery.target, delivery.box) for read in reads for delivery in read.deliveries] == [
        (7, Box((2, 10), (2, 5)))
    ] * 2
    assert {read.raw_bytes for read in reads} == {4096}


def test_nothing_wanted_is_nothing_read() -> None:
    assert plan_reads(chunks_of(("a", [8, 1024], "")), []) == []


def test_a_chunk_wanted_twice_is_read_once() -> None:
    whole = Box((0,), (1024,))
    (read,) = plan_reads(chunks_of(("a", [1024], "")), [Want(0, whole, 0), Want(0, whole, 1)])
    assert [delivery.target for delivery in read.deliveries] == [0, 1]


def test_a_tied_key_is_read_from_the_tensor_that_holds_its_bytes() -> None:
    chunks = chunks_of(("a", [1024], ""), ("b", [1024], "a"))
    wanted = Box((3,), (4,))
    assert plan_reads(chunks, [Want(1, wanted, 0)]) == plan_reads(chunks, [Want(0, wanted, 0)])


def test_of_a_bundle_only_the_wanted_shard_is_delivered() -> None:
    chunks = chunks_of(("a", [3], ""), ("b", [5], ""), ("c", [2], ""))
    (read,) = plan_reads(chunks, [Want(1, Box((1,), (2,)), 0)])
    assert read.raw_bytes == 40
    assert [delivery.piece for delivery in read.deliveries] == [Piece(1, 0, 5, 12)]


def test_a_chunk_inside_a_row_is_skipped_if_its_columns_are_not_wanted() -> None:
    chunks = chunks_of(("a", [2, 2048], ""))  # each row is two chunks
    reads = plan_reads(chunks, [Want(0, Box((0, 1500), (2, 10)), 0)])
    assert [read.chunk for read in reads] == [1, 3]


def test_regions_say_where_wanted_elements_lie_in_a_piece() -> None:
    shard = Box((10, 0), (4, 6))
    piece = Piece(0, 4, 14, 0)  # the end of row 10, row 11, the start of row 12
    assert list(regions(shard, piece, Box((10, 5), (3, 1)))) == [
        (Box((10, 5), (1, 1)), Box((10, 4), (1, 2)), 0),
        (Box((11, 5), (1, 1)), Box((11, 0), (1, 6)), 2),
    ]


# --- what ranks judge together --------------------------------------------------------------------------------------

KEYS = [("a.w", SHARED), ("a.x", SHARED), ("b.own", 0), ("b.own", 1), ("b.w", SHARED), ("c.w", SHARED)]


def layout_of(keys: list[tuple[str, int]]) -> Layout:
    """Of two ranks."""
    return Layout(
        chunk_bytes=4096,
        keys=[key for key, _ in keys],
        owners=[owner for _, owner in keys],
        dtypes=["float32"] * len(keys),
        shapes=[[1]] * len(keys),
        aliases=[],
        shard_keys=[],
        shard_offsets=[],
        shard_sizes=[],
        units=[],
        writers=[],
        rank_nodes=[0, 0],
    )


def judged(*ranks: tuple[list[str], set[str], list[str]], only: tuple[str, ...] = ()) -> list[str]:
    """For two ranks: top-level names of the state, names that have a place, problems."""
    layout, selection = layout_of(KEYS), Selection(only)
    fits = {
        rank: fit(Catalog(layout, rank, 2, selection), asked, used, [], problems)
        for rank, (asked, used, problems) in enumerate(ranks)
    }
    sent = {rank: msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=Fit) for rank, one in fits.items()}
    return misfits(sent, layout, selection)


def extra(*names: str) -> list[str]:
    return [f"{name}: in the snapshot but not in the state" for name in names]


def test_what_any_rank_has_a_place_for_is_no_mismatch() -> None:
    everything = ["a", "b", "c"]
    assert judged((everything, {"a.w", "b.own"}, []), (everything, {"a.x", "b.own", "b.w", "c.w"}, [])) == []
    assert judged((everything, {"a.w", "b.own"}, []), (everything, {"a.w", "b.own", "c.w"}, [])) == extra("a.x", "b.w")


def test_what_no_rank_asked_for_may_stay_where_it_is() -> None:
    assert judged((["a"], {"a.w", "a.x"}, []), (["a"], {"a.w"}, [])) == []
    assert judged((["a"], {"a.w", "a.x"}, []), (["a", "c"], {"a.w", "a.x"}, [])) == extra("c.w")


def test_a_ranks_own_tensor_needs_a_place_on_that_rank() -> None:
    b = {"b.own", "b.w"}
    assert judged((["b"], b, []), (["b"], b, [])) == []
    assert judged((["b"], b, []), (["b"], {"b.w"}, [])) == extra("b.own")


def test_what_is_not_selected_is_not_judged() -> None:
    assert judged((["a", "b"], {"a.w"}, []), (["a", "b"], set(), []), only=("a.w",)) == []
    assert judged((["a", "b"], set(), []), (["a", "b"], set(), []), only=("z.*",)) == [
        "only=['z.*'] selects nothing that is both in the state and the snapshot"
    ]


def test_a_problem_names_the_ranks_that_have_it_unless_all_do() -> None:
    everything = {"a.w", "a.x"}
    assert judged((["a"], everything, ["both", "one"]), (["a"], everything, ["both"])) == ["both", "one (on rank 0)"]


@given(st.lists(st.sets(st.integers(0, 5)), min_size=2, max_size=2))
def test_extra_names_are_those_in_no_ranks_use(used: list[set[int]]) -> None:
    layout = layout_of([(f"k{number}", SHARED) for number in range(6)])
    names = list(layout.keys)
    fits = {
        rank: fit(Catalog(layout, rank, 2, Selection()), names, {names[number] for number in own}, [], [])
        for rank, own in enumerate(used)
    }
    assert misfits(fits, layout, Selection()) == extra(*(names[n] for n in range(6) if n not in used[0] | used[1]))


@pytest.mark.parametrize(
    ("unused", "wrong"),
    [([["v"], []], []), ([["v"], ["v"]], ["v"]), ([["v", "o.g"], ["o.g"]], ["o.g"]), ([["z"], ["z"]], [])],
)
def test_a_value_that_no_rank_has_a_place_for_is_a_mismatch(unused: list[list[str]], wrong: list[str]) -> None:
    layout = layout_of([])
    fits = {
        rank: fit(Catalog(layout, rank, 2, Selection()), ["v", "o"], set(), names, [])
        for rank, names in enumerate(unused)
    }
    assert misfits(fits, layout, Selection()) == extra(*wrong)
