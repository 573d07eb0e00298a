"""Whatever bytes a store returns, a decoder either returns what they say or raises ``FormatError``, and nothing else.

Bytes that merely are damaged stop at a digest. So most cases here carry digests that match: valid metadata with pieces
replaced, cut or doubled, sealed again, as a bug or an attacker would write it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastckpt.errors import FormatError
from fastckpt.format import codec, document, pack, value
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.decision import Abort, Commit, Format, Live, Open, decode_decision, decode_format
from fastckpt.format.tables import (
    Chunks,
    Index,
    Layout,
    PackInfo,
    Part,
    PartInfo,
    RankTable,
    Rows,
    decode_index,
    decode_layout,
    decode_part,
)

WRITER = "000000000001-0123456789abcdef"
ATTEMPT = f"{WRITER}-000001"
DIGEST = "f" * 64

LAYOUT = Layout(
    chunk_bytes=4096,
    keys=["a", "b", "c", "d"],
    owners=[-1, -1, -1, 1],
    dtypes=["float32", "float32", "int8", "float64"],
    shapes=[[8, 256], [8, 256], [], [2, 2]],
    aliases=[(1, 0)],
    shard_keys=[0, 0, 2, 3],
    shard_offsets=[[0, 0], [4, 0], [], [0, 0]],
    shard_sizes=[[4, 256], [4, 256], [], [2, 2]],
    units=[[0], [1], [2, 3]],
    writers=[(0, 2), (1, 1)],
    rank_nodes=[0, 1],
)
TABLE = RankTable(
    rank=0,
    packs=[PackInfo(f"packs/{ATTEMPT}/00/0-0.pack", 5000)],
    pack=np.array([0, 0], "<u4").tobytes(),
    offset=np.array([0, 4096], "<u8").tobytes(),
    length=np.array([4096, 4], "<u4").tobytes(),
    codec=bytes([0, 1]),
    hashes=bytes(64),
    stored_hashes=bytes(32),
    values={"step": bytes(32)},
)
PART = Part(attempt=ATTEMPT, node=0, layout=DIGEST, tables=[TABLE], blobs=[value.encode(3)])
INDEX = Index(
    attempt=ATTEMPT,
    step=5,
    layout=DIGEST,
    layout_bytes=100,
    parts=[PartInfo(0, DIGEST, 10), PartInfo(1, DIGEST, 20)],
    bytes=1000,
    stored_bytes=900,
    environment={"torch": "2.13", "gpus": [1, 2.5, None]},
)
LIVE = Live(
    step=5, attempt=ATTEMPT, decision=2, created="now", bytes=9, index=DIGEST, metrics={"loss": 0.5}, note="note"
)
HEAD: dict[str, Any] = {
    "number": 2,
    "previous": DIGEST,
    "writer": WRITER,
    "created": "now",
    "live": [LIVE],
    "live_at": 2,
}
DECISIONS = [
    Open(**{**HEAD, "writer": "000000000002-0123456789abcdef"}),
    Commit(**HEAD, snapshot=LIVE),
    Abort(**HEAD, attempt=ATTEMPT),
]
FORMAT = Format(version=1, features=[], id="0" * 32, chunk_bytes=2**22, created="now")
FOOTER = pack.Footer(
    attempt=ATTEMPT, writer=0, number=0, lengths=np.array([4096], "<u4").tobytes(), codecs=b"\0", hashes=bytes(32)
)


def seal(line: bytes) -> bytes:
    return line + b"\n" + document.digest(line).encode() + b"\n"


def table(raw: bytes) -> bytes:
    return document.TABLE_MAGIC + len(raw).to_bytes(8, "little") + codec.encode_zstd(raw)


def read_layout(data: bytes) -> object:
    layout = decode_layout(data, document.digest(data))
    # What passed can be used: every chunk has pieces, a size and a writer.
    chunks = Chunks(layout)
    for unit in range(min(len(layout.units), 8)):
        for number, pieces in zip(chunks.unit_chunks(unit)[:8], chunks.unit_pieces(unit)[:8], strict=False):
            assert 0 < chunks.raw_bytes(pieces) <= layout.chunk_bytes
            assert chunks.writer(number)[0] < len(layout.rank_nodes)
    return layout


def read_part(data: bytes) -> object:
    info = PartInfo(0, document.digest(data), len(data))
    part = decode_part(data, info, ATTEMPT, LAYOUT, DIGEST, Chunks(LAYOUT))
    for rank_table in part.tables:
        rows = Rows(rank_table)
        for row in range(len(rank_table.codec)):
            place = rows.place(row)
            assert place.length > 0
            assert place.offset + place.length <= rank_table.packs[int(rows.pack[row])].size
            assert len(place.hash) == 32
            assert place.stored_hash is None or len(place.stored_hash) == 32
    return part


def read_index(data: bytes) -> object:
    return decode_index(data, document.digest(data), ATTEMPT)


def read_decision(data: bytes) -> object:
    return decode_decision(data, 2)


def read_pack(end: bytes) -> object:
    body, trailer = end[: -pack.TRAILER_BYTES], end[-pack.TRAILER_BYTES :]
    size = pack.footer_bytes(trailer, 4096 + len(end), "x")
    return pack.decode_footer(body[-size:], trailer, 4096, "x")


def close(raw: bytes) -> bytes:
    body = len(raw).to_bytes(4, "little") + codec.encode_zstd(raw)
    return body + len(body).to_bytes(4, "little") + chunk_hash(body) + pack.MAGIC


def close_value(raw: bytes) -> bytes:
    return len(raw).to_bytes(8, "little") + raw


to_json, to_msgpack = msgspec.json.encode, msgspec.msgpack.encode

# Each decoder, what closes raw bytes so that its digests match, how those are encoded, and valid contents.
KINDS: dict[str, tuple[Callable[[bytes], object], Callable[[bytes], bytes], Callable[[Any], bytes], list[Any]]] = {
    "FORMAT": (decode_format, seal, to_json, [FORMAT]),
    "decision": (read_decision, seal, to_json, DECISIONS),
    "layout": (read_layout, table, to_msgpack, [LAYOUT]),
    "part": (read_part, table, to_msgpack, [PART]),
    "index": (read_index, seal, to_json, [INDEX]),
    "footer": (read_pack, close, to_msgpack, [FOOTER]),
    "value": (value.decode, close_value, to_msgpack, [["dict", 1, "str", "k", "list", 2, 1, 2.5]]),
}
each_kind = pytest.mark.parametrize("kind", KINDS)

numbers = st.integers(-2, 12) | st.sampled_from(
    [255, 256, 4096, 2**31, 2**32, 2**53, 2**62, 2**62 + 1, 2**63, 2**64 - 1]
)
junk = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([WRITER, ATTEMPT, DIGEST, "float64", "int4", f"packs/{ATTEMPT}/00/1-1.pack", "../x", "kind"])
    | st.binary(max_size=9)
    | st.sampled_from([[], {}, [[]], [0, 0], [[1]], {"a": 1}, [0] * 65])
)


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one to three places replaced, removed, doubled or added to."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        at = tree
        while True:
            places = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(at[place], (dict, list)) and at[place] and draw(st.integers(0, 3)):
                at = at[place]
                continue
            what = draw(st.sampled_from(["replace", "near", "remove", "double"]))
            if what == "remove":
                del at[place]
            elif what == "near" and type(at[place]) is int:
                at[place] += draw(st.sampled_from([-1, 1]))
            elif what == "near" and isinstance(at[place], bytes) and at[place]:
                position = draw(st.integers(0, len(at[place]) - 1))
                at[place] = at[place][:position] + draw(st.binary(max_size=2)) + at[place][position + 1 :]
            elif what == "double" and isinstance(at, list):
                at.insert(place, copy.deepcopy(at[place]))
            else:
                at[place] = copy.deepcopy(draw(junk))  # sampled_from hands out one and the same list
            break
    return tree


def builtins(thing: Any) -> Any:
    def plain(at: Any) -> Any:
        if isinstance(at, dict):
            return {key: plain(inner) for key, inner in at.items()}
        return [plain(inner) for inner in at] if isinstance(at, list | tuple) else at

    return plain(msgspec.to_builtins(thing, builtin_types=(bytes,)))


def survives(kind: str, data: bytes) -> None:
    with contextlib.suppress(FormatError):
        KINDS[kind][0](data)


@each_kind
def test_valid_metadata_is_read(kind: str) -> None:
    read, close_raw, encode, valid = KINDS[kind]
    for thing in valid:
        read(close_raw(encode(thing)))


@each_kind
@given(st.binary(max_size=300))
@example(b"")
def test_garbage_is_refused_by_format_error_only(kind: str, data: bytes) -> None:
    survives(kind, data)


@each_kind
@given(st.binary(max_size=300) | junk.map(to_msgpack) | st.text(max_size=20).map(str.encode))
def test_garbage_under_a_matching_digest_is_refused_by_format_error_only(kind: str, raw: bytes) -> None:
    survives(kind, KINDS[kind][1](raw))


@each_kind
@given(data=st.data())
@settings(max_examples=100)
def test_changed_bytes_under_a_matching_digest_raise_format_error_only(kind: str, data: st.DataObject) -> None:
    _, close_raw, encode, valid = KINDS[kind]
    raw = bytearray(encode(data.draw(st.sampled_from(valid))))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        stop = data.draw(st.integers(start, min(len(raw), start + 4)))
        raw[start:stop] = data.draw(st.binary(max_size=4))
    survives(kind, close_raw(bytes(raw)))


@each_kind
@given(data=st.data())
@settings(max_examples=250)
def test_changed_contents_under_a_matching_digest_raise_format_error_only(kind: str, data: st.DataObject) -> None:
    _, close_raw, encode, valid = KINDS[kind]
    tree = data.draw(changed(builtins(data.draw(st.sampled_from(valid)))))
    try:
        raw = encode(tree)
    except (TypeError, OverflowError):  # what JSON or msgpack cannot hold cannot be stored
        return
    survives(kind, close_raw(raw))
