"""Layouts, parts and indexes: each rule has a case that breaks it, and only it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import document
from fastckpt.format.chunk import CHUNKS_MAX
from fastckpt.format.shard import Box
from fastckpt.format.tables import (
    KEY_BYTES_MAX,
    Chunks,
    Index,
    Layout,
    PackInfo,
    Part,
    PartInfo,
    Piece,
    RankTable,
    Rows,
    check_layout,
    decode_index,
    decode_layout,
    decode_part,
)

ATTEMPT = "000000000001-0123456789abcdef-000001"
PACK = f"packs/{ATTEMPT}/00/0-0.pack"

# a: 2 chunks; b: tied to a; c and d: tiny, bundled; e: rank 1's own, 1 chunk; z: without elements.
LAYOUT = Layout(
    chunk_bytes=4096,
    keys=["a", "b", "c", "d", "e", "z"],
    owners=[-1, -1, -1, -1, 1, -1],
    dtypes=["float32", "float32", "int8", "float64", "int8", "int8"],
    shapes=[[8, 256], [8, 256], [], [2, 2], [300], [0, 4]],
    aliases=[(1, 0)],
    shard_keys=[0, 0, 2, 3, 4],
    shard_offsets=[[0, 0], [4, 0], [], [0, 0], [0]],
    shard_sizes=[[4, 256], [4, 256], [], [2, 2], [300]],
    units=[[0], [1], [2, 3], [4]],
    writers=[(0, 2), (1, 1), (0, 1)],
    rank_nodes=[0, 1],
)


def changed(**columns: Any) -> Layout:
    return msgspec.structs.replace(LAYOUT, **columns)


def put(column: str, position: int, value: Any) -> Layout:
    values = list(getattr(LAYOUT, column))
    values[position] = value
    return changed(**{column: values})


def test_the_layout_that_all_these_cases_are_made_from_is_right_and_comes_back() -> None:
    check_layout(LAYOUT, "x")
    data = document.pack_table(LAYOUT)
    assert decode_layout(data, document.digest(data)).layout == LAYOUT
    assert LAYOUT.bytes() == 8 * 256 * 4 + 1 + 32 + 300
    assert [LAYOUT.label(key) for key in range(6)] == ["a", "b", "c", "d", "e@1", "z"]


def test_chunks_are_numbered_by_unit_and_dealt_out_by_runs() -> None:
    chunks = Chunks(LAYOUT)
    assert len(chunks) == chunks.dealt == 4
    assert [chunks.row_count(rank) for rank in (0, 1)] == [3, 1]
    assert [chunks.writer(chunk) for chunk in range(4)] == [(0, 0), (0, 1), (1, 0), (0, 2)]
    units = list(chunks.units())
    assert [(unit.first, unit.count) for unit in units] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert chunks.pieces(units[2]) == [[Piece(2, 0, 1, 0), Piece(3, 0, 4, 1)]]
    assert chunks.raw_bytes(chunks.pieces(units[2])[0]) == 33
    assert [number for number, _ in chunks.of_rank(0)] == [0, 1, 3]
    assert [number for number, _ in chunks.of_rank(1)] == [2]
    assert list(chunks.of_rank(7)) == []


def test_a_run_may_end_inside_a_unit() -> None:
    layout = changed(
        shard_keys=[0, 2, 3, 4],
        shard_offsets=[[0, 0], [], [0, 0], [0]],
        shard_sizes=[[8, 256], [], [2, 2], [300]],
        units=[[0], [1, 2], [3]],
        writers=[(0, 1), (1, 2), (0, 1)],
    )
    check_layout(layout, "x")
    chunks = Chunks(layout)
    assert [(number, pieces[0]) for number, pieces in chunks.of_rank(1)] == [
        (1, Piece(0, 1024, 2048, 0)),
        (2, Piece(1, 0, 1, 0)),
    ]
    assert layout.box(0) == Box((0, 0), (8, 256))


BAD_LAYOUTS: dict[str, tuple[Layout, type[FormatError]]] = {
    "owners too short": (changed(owners=[-1] * 5), FormatError),
    "dtypes too long": (changed(dtypes=[*LAYOUT.dtypes, "int8"]), FormatError),
    "shapes too short": (changed(shapes=LAYOUT.shapes[:5]), FormatError),
    "an empty key": (put("keys", 0, ""), LimitExceeded),
    "a long key": (put("keys", 5, "z" * (KEY_BYTES_MAX + 1)), LimitExceeded),
    "a key long in bytes only": (put("keys", 5, "é" * (KEY_BYTES_MAX // 2 + 1)), LimitExceeded),
    "an owner beyond the ranks": (put("owners", 4, 2), FormatError),
    "an unknown dtype": (put("dtypes", 5, "float128"), FormatError),
    "65 dimensions": (put("shapes", 5, [0] * 65), LimitExceeded),
    "a huge shape": (put("shapes", 5, [2**32, 2**32]), LimitExceeded),
    "a huge shape behind a zero": (put("shapes", 5, [2**62, 2**62, 0]), LimitExceeded),
    "a product that wraps to zero": (put("shapes", 5, [2**32, 2**32, 4]), LimitExceeded),
    "more than 2**62 bytes behind a zero": (
        changed(shapes=[*LAYOUT.shapes[:5], [2**61, 0]], dtypes=[*LAYOUT.dtypes[:5], "float32"]),
        LimitExceeded,
    ),
    "a negative size": (put("shapes", 5, [-1, 0]), FormatError),
    "keys out of order": (changed(keys=["a", "b", "d", "c", "e", "z"]), FormatError),
    "a key twice": (put("keys", 5, "e"), FormatError),
    "shard offsets too short": (changed(shard_offsets=LAYOUT.shard_offsets[:4]), FormatError),
    "shard sizes too long": (changed(shard_sizes=[*LAYOUT.shard_sizes, [1]]), FormatError),
    "a key tied twice": (changed(aliases=[(1, 0), (1, 0)]), FormatError),
    "a tied key that is not there": (changed(aliases=[(1, 0), (6, 0)]), FormatError),
    "tied to a key that is not there": (changed(aliases=[(1, 6)]), FormatError),
    "tied to itself": (changed(aliases=[(1, 1)]), FormatError),
    "tied to a tied key": (changed(aliases=[(1, 5), (5, 0)]), FormatError),
    "tied to another shape": (changed(aliases=[(1, 0), (5, 2)]), FormatError),
    "tied to another dtype": (put("dtypes", 1, "int32"), FormatError),
    "a shard of no key": (put("shard_keys", 4, 6), FormatError),
    "a shard of a tied key": (put("shard_keys", 1, 1), FormatError),
    "a shard with too few dimensions": (
        changed(shard_offsets=[[0], *LAYOUT.shard_offsets[1:]], shard_sizes=[[4], *LAYOUT.shard_sizes[1:]]),
        FormatError,
    ),
    "a shard outside its tensor": (put("shard_offsets", 1, [5, 0]), FormatError),
    "a shard at a huge offset": (put("shard_offsets", 1, [2**62, 0]), FormatError),
    "a shard at a negative offset": (put("shard_offsets", 1, [-4, 0]), FormatError),
    "a shard without elements": (put("shard_sizes", 1, [0, 256]), FormatError),
    "a hole": (put("shard_sizes", 1, [3, 256]), FormatError),
    "an overlap": (put("shard_offsets", 1, [3, 0]), FormatError),
    "an overlap beside a hole": (put("shard_offsets", 1, [0, 0]), FormatError),
    "a key without shards": (
        changed(
            shard_keys=LAYOUT.shard_keys[:4],
            shard_offsets=LAYOUT.shard_offsets[:4],
            shard_sizes=LAYOUT.shard_sizes[:4],
            units=LAYOUT.units[:3],
            writers=[(0, 2), (1, 1)],
        ),
        FormatError,
    ),
    "a unit with a shard that is not there": (put("units", 3, [5]), FormatError),
    "a shard in two units": (changed(units=[*LAYOUT.units, [4]], writers=[(0, 2), (1, 1), (0, 2)]), FormatError),
    "a shard twice in a unit": (put("units", 2, [2, 2, 3]), FormatError),
    "a shard in no unit": (changed(units=LAYOUT.units[:3], writers=[(0, 2), (1, 1)]), FormatError),
    "an empty unit": (changed(units=[*LAYOUT.units, []]), FormatError),
    "a bundle of shards that are not tiny": (
        changed(units=[[0], [1], [2, 3, 4]], writers=[(0, 2), (1, 1)]),
        LimitExceeded,
    ),
    "a node beyond the ranks": (changed(rank_nodes=[0, 2]), FormatError),
    "writers that leave a chunk": (changed(writers=[(0, 2), (1, 1)]), FormatError),
    "writers beyond the chunks": (changed(writers=[(0, 2), (1, 1), (0, 2)]), FormatError),
    "writers by the 2**62": (changed(writers=[(0, 2**62)] * 4), FormatError),
    "a writer that is no rank": (changed(writers=[(0, 2), (2, 1), (0, 1)]), FormatError),
}


@pytest.mark.parametrize("rule", BAD_LAYOUTS)
def test_a_layout_that_breaks_one_rule_is_refused(rule: str) -> None:
    layout, error = BAD_LAYOUTS[rule]
    with pytest.raises(error) as caught:
        check_layout(layout, "the layout")
    assert type(caught.value) is error
    data = document.pack_table(layout)
    with pytest.raises(FormatError):  # the decoder may refuse it before: counts are not negative
        decode_layout(data, document.digest(data))


def many_tiny(count: int, size: int) -> Layout:
    return Layout(
        chunk_bytes=4096,
        keys=[f"{number:03}" for number in range(count)],
        owners=[-1] * count,
        dtypes=["int8"] * count,
        shapes=[[size]] * count,
        aliases=[],
        shard_keys=list(range(count)),
        shard_offsets=[[0]] * count,
        shard_sizes=[[size]] * count,
        units=[list(range(count))],
        writers=[(0, 1)],
        rank_nodes=[0],
    )


def test_a_bundle_of_a_quarter_chunk_is_taken_and_a_larger_one_refused() -> None:
    check_layout(many_tiny(16, 64), "x")
    with pytest.raises(LimitExceeded, match="a bundle of 1088 bytes"):
        check_layout(many_tiny(17, 64), "x")
    with pytest.raises(LimitExceeded, match="a bundle of 130 bytes"):
        check_layout(many_tiny(2, 65), "x")


def test_more_chunks_than_the_limit_are_refused_before_any_of_them_is_made() -> None:
    def rows(count: int) -> Layout:
        one = many_tiny(1, 4096)
        return msgspec.structs.replace(
            one, shapes=[[count, 4096]], shard_offsets=[[0, 0]], shard_sizes=[[count, 4096]], writers=[(0, count)]
        )

    check_layout(rows(CHUNKS_MAX), "x")
    for count in (CHUNKS_MAX + 1, 2**50):
        with pytest.raises(LimitExceeded, match="chunks, at most"):
            check_layout(rows(count), "x")


@pytest.mark.parametrize("chunk_bytes", [0, 1, 3])
def test_a_layout_with_an_impossible_chunk_size_is_refused(chunk_bytes: int) -> None:
    one = msgspec.structs.replace(many_tiny(1, 64), dtypes=["float64"], chunk_bytes=chunk_bytes)
    with pytest.raises(FormatError):
        check_layout(one, "x")


@pytest.mark.parametrize("chunk_bytes", [4097, 2048, 2**27])
def test_a_layout_with_a_chunk_size_outside_the_format_is_refused(chunk_bytes: int) -> None:
    one = many_tiny(1, 64)
    with pytest.raises(FormatError):
        check_layout(msgspec.structs.replace(one, chunk_bytes=chunk_bytes), "x")


def test_a_shard_whose_offsets_and_sizes_have_different_lengths_is_refused() -> None:
    with pytest.raises(FormatError):
        check_layout(put("shard_offsets", 0, [0]), "x")


def test_a_layout_without_ranks_is_refused() -> None:
    empty = {column: [] for column in LAYOUT.__struct_fields__ if column != "chunk_bytes"}
    with pytest.raises(FormatError):
        check_layout(Layout(chunk_bytes=4096, **empty), "x")


@pytest.mark.parametrize("nodes", [[1, 0], [1, 1]])
def test_a_layout_whose_nodes_are_not_numbered_by_their_lowest_rank_is_refused(nodes: list[int]) -> None:
    with pytest.raises(FormatError):
        check_layout(changed(rank_nodes=nodes), "x")


def test_a_layout_under_another_digest_is_damaged() -> None:
    data = document.pack_table(LAYOUT)
    with pytest.raises(FormatError, match="damaged"):
        decode_layout(data[:-1], document.digest(data))


# --- parts ---------------------------------------------------------------------------------------------------------


def table(**columns: Any) -> RankTable:
    """Rank 0's three chunks in one pack: raw, zstd, raw."""
    fields: dict[str, Any] = {
        "rank": 0,
        "packs": [PackInfo(PACK, 5000)],
        "pack": np.array([0, 0, 0], "<u4").tobytes(),
        "offset": np.array([0, 4096, 4100], "<u8").tobytes(),
        "length": np.array([4096, 4, 300], "<u4").tobytes(),
        "codec": bytes([0, 1, 0]),
        "hashes": bytes(range(96)),
        "stored_hashes": b"s" * 32,
        "values": {"step": b"v" * 32},
    }
    return RankTable(**{**fields, **columns})


def part(**fields: Any) -> Part:
    values: dict[str, Any] = {"attempt": ATTEMPT, "node": 0, "layout": "f" * 64, "tables": [table()], "blobs": [b"b"]}
    return Part(**{**values, **fields})


def decode(written: Part, change: Callable[[bytes], bytes] = bytes, layout: Layout = LAYOUT) -> Part:
    data = document.pack_table(written)
    info = PartInfo(0, document.digest(data), len(data))
    return decode_part(change(data), info, ATTEMPT, layout, "f" * 64, Chunks(layout))


def test_a_part_comes_back_and_says_where_each_chunk_lies() -> None:
    decoded = decode(part())
    assert decoded == part()
    rows = Rows(decoded.tables[0])
    places = [rows.place(row) for row in range(3)]
    assert [(place.pack, place.offset, place.length, place.codec) for place in places] == [
        (PACK, 0, 4096, 0),
        (PACK, 4096, 4, 1),
        (PACK, 4100, 300, 0),
    ]
    assert [place.stored_hash for place in places] == [None, b"s" * 32, None]
    assert b"".join(place.hash for place in places) == bytes(range(96))


def test_a_rank_that_writes_nothing_has_an_empty_table() -> None:
    layout = changed(writers=[(1, 4)])
    empty = table(packs=[], pack=b"", offset=b"", length=b"", codec=b"", hashes=b"", stored_hashes=b"")
    assert decode(part(tables=[empty]), layout=layout).tables == [empty]


def column(dtype: str, *values: int) -> bytes:
    return np.array(values, dtype).tobytes()


BAD_PARTS: dict[str, tuple[Part, type[FormatError]]] = {
    "another attempt": (part(attempt=ATTEMPT[:-1] + "2"), FormatError),
    "another node": (part(node=1), FormatError),
    "another layout": (part(layout="e" * 64), FormatError),
    "no table": (part(tables=[]), FormatError),
    "a table twice": (part(tables=[table(), table()]), FormatError),
    "the table of another node's rank": (part(tables=[table(rank=1)]), FormatError),
    "a pack column too short": (part(tables=[table(pack=bytes(8))]), FormatError),
    "an offset column of another width": (part(tables=[table(offset=bytes(12))]), FormatError),
    "a length column too long": (part(tables=[table(length=column("<u4", 4096, 4, 300, 1))]), FormatError),
    "a codec column too short": (part(tables=[table(codec=b"\0\1")]), FormatError),
    "a hash missing": (part(tables=[table(hashes=bytes(64))]), FormatError),
    "a value digest of another length": (part(tables=[table(values={"step": b"v" * 31})]), FormatError),
    "a pack with another name": (part(tables=[table(packs=[PackInfo("FORMAT", 5000)])]), FormatError),
    "a pack that leads elsewhere": (
        part(tables=[table(packs=[PackInfo(f"packs/{ATTEMPT}/00/../../../0-0.pack", 5000)])]),
        FormatError,
    ),
    "more packs than chunks": (part(tables=[table(packs=[PackInfo(PACK, 5000)] * 4)]), LimitExceeded),
    "an unknown codec": (part(tables=[table(codec=bytes([0, 1, 2]), stored_hashes=b"s" * 64)]), FormatError),
    "a stored hash missing": (part(tables=[table(stored_hashes=b"")]), FormatError),
    "a stored hash too many": (part(tables=[table(stored_hashes=b"s" * 64)]), FormatError),
    "a pack that is not listed": (part(tables=[table(pack=column("<u4", 0, 1, 0))]), FormatError),
    "chunks but no pack": (part(tables=[table(packs=[])]), FormatError),
    "a chunk of no bytes": (part(tables=[table(length=column("<u4", 4096, 0, 300))]), FormatError),
    "a chunk too long": (
        part(tables=[table(length=column("<u4", 6000, 4, 300), packs=[PackInfo(PACK, 10**6)])]),
        FormatError,
    ),
    "a chunk beyond the end of its pack": (part(tables=[table(packs=[PackInfo(PACK, 4399)])]), FormatError),
    "a chunk whose end overflows": (
        part(tables=[table(offset=column("<u8", 0, 2**64 - 2, 4100))]),
        FormatError,
    ),
    "a value too large": (part(blobs=[bytes(64 * 2**20 + 1)]), LimitExceeded),
}


@pytest.mark.parametrize("rule", BAD_PARTS)
def test_a_part_that_breaks_one_rule_is_refused(rule: str) -> None:
    written, error = BAD_PARTS[rule]
    with pytest.raises(error, match=r"part-000000|not the name of a pack") as caught:
        decode(written)
    assert type(caught.value) is error


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data[1:]])
def test_a_part_other_than_its_index_names_is_damaged(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(FormatError, match="damaged"):
        decode(part(), change)


# --- the index -----------------------------------------------------------------------------------------------------


def index(**fields: Any) -> Index:
    values: dict[str, Any] = {
        "attempt": ATTEMPT,
        "step": 5,
        "layout": "a" * 64,
        "layout_bytes": 100,
        "parts": [PartInfo(0, "b" * 64, 10), PartInfo(1, "c" * 64, 20)],
        "bytes": 1000,
        "stored_bytes": 900,
        "environment": {"torch": "2.13", "gpus": [1, 2.5, None, {"x": True}]},
    }
    return Index(**{**values, **fields})


def read_index(written: Index) -> Index:
    data = document.seal(written)
    return decode_index(data, document.digest(data), ATTEMPT)


def test_an_index_comes_back() -> None:
    assert read_index(index()) == index()


BAD_INDEXES: dict[str, tuple[Index, type[FormatError]]] = {
    "another attempt": (index(attempt=ATTEMPT[:-1] + "2"), FormatError),
    "parts out of order": (index(parts=[PartInfo(1, "b" * 64, 1), PartInfo(0, "b" * 64, 1)]), FormatError),
    "a part missing": (index(parts=[PartInfo(0, "b" * 64, 1), PartInfo(2, "b" * 64, 1)]), FormatError),
    "a part twice": (index(parts=[PartInfo(0, "b" * 64, 1)] * 2), FormatError),
    "a layout digest that is none": (index(layout="A" * 64), FormatError),
    "a part digest that is none": (index(parts=[PartInfo(0, "../FORMAT", 1)]), FormatError),
    "a part too large": (index(parts=[PartInfo(0, "b" * 64, document.TABLE_BYTES_MAX + 1)]), LimitExceeded),
    "a negative size": (index(bytes=-1), FormatError),
    "a size beyond 2**62": (index(bytes=2**62 + 1), FormatError),
}


@pytest.mark.parametrize("rule", BAD_INDEXES)
def test_an_index_that_breaks_one_rule_is_refused(rule: str) -> None:
    written, error = BAD_INDEXES[rule]
    with pytest.raises(error, match="/index: ") as caught:
        read_index(written)
    assert type(caught.value) is error


def test_an_index_under_another_digest_is_damaged() -> None:
    with pytest.raises(FormatError, match="damaged"):
        decode_index(document.seal(index()), "0" * 64, ATTEMPT)
