"""Planning a read: only the chunks that are needed, and exactly what is wanted of them."""

from __future__ import annotations

from fastckpt.format.shard import Box
from fastckpt.format.tables import Chunks, Piece
from fastckpt.plan.restore_plan import Want, plan_reads, regions
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
