"""One valid object of every kind, how its content is closed so that digests match, and how it is read.

Whoever makes bad metadata begins here: bytes that merely are damaged stop at a digest.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from fastckpt.format import document, pack, value
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.decision import Abort, Commit, Format, Live, Open, decode_decision, decode_format
from fastckpt.format.families import Family, Mesh
from fastckpt.format.roll import Roll, decode_roll, make_rolls
from fastckpt.format.tables import (
    Chunks,
    Index,
    Layout,
    PackInfo,
    Part,
    PartInfo,
    RankTable,
    RollInfo,
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
RULED = Layout(
    chunk_bytes=4096,
    keys=["a", "b", "c", "d"],
    owners=[-1] * 4,
    dtypes=["float32", "float32", "int8", "float64"],
    shapes=[[8, 256], [5, 3], [], [2, 2]],
    aliases=[],
    shard_keys=[3],
    shard_offsets=[[0, 0]],
    shard_sizes=[[2, 2]],
    units=[[0]],
    writers=[(1, 1)],
    rank_nodes=[0, 0, 1, 1],
    families=[
        Family(
            mesh=Mesh(sizes=[2, 2], start=0, strides=[1, 2], ranks=[]),
            sharded=[1],
            tensors=[0, 1],
            splits=[[(0, 1)], [(1, 1)]],
            counts=np.array([1, 1, 1, 1], "<u4").tobytes(),
        ),
        Family(
            mesh=Mesh(sizes=[3], start=0, strides=[], ranks=[3, 0, 1]),
            sharded=[],
            tensors=[2],
            splits=[[]],
            counts=np.array([0, 1, 0], "<u4").tobytes(),
        ),
    ],
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
ROLLED = msgspec.structs.replace(
    INDEX, parts=[], values={"a": "same", "b": "own", "c": "some"}, rolls=[RollInfo(DIGEST, 10), RollInfo(DIGEST, 20)]
)
ROLL = make_rolls(ATTEMPT, [PartInfo(node, DIGEST, 10 + node) for node in range(300)])[1]
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
VALUES = [
    {"epoch": 3, "order": [1, 2.5, None, True], 7: ("text", b"bytes", 2**70, -(2**64), 1 + 2j)},
    [{1, "a", (2, frozenset({3}))}, deque([1, 2], 3), OrderedDict(a=1), Counter("aab")],
    [np.float32(0.5), np.arange(6, dtype="int16").reshape(2, 3), np.empty((0, 4), "bool")],
    [value.TensorValue("bfloat16", (2, 1), b"abcd", "cuda:1"), value.TorchSize((1, -2)), value.TensorReference("m.w")],
    (value.TorchDtype("float8_e5m2"), value.TorchDevice("cpu")),
]


# --- closing -------------------------------------------------------------------------------------------------------


def seal(line: bytes) -> bytes:
    return line + b"\n" + document.digest(line).encode() + b"\n"


def frame(raw: bytes) -> bytes:
    """A zstd frame that states its content size and holds ``raw`` as it is, in as little time as can be."""
    header = b"\x28\xb5\x2f\xfd\xa0" + len(raw).to_bytes(4, "little")  # one segment, size in four bytes
    blocks = [raw[at : at + 2**16] for at in range(0, len(raw), 2**16)] or [b""]
    return header + b"".join(
        (len(block) << 3 | (number == len(blocks) - 1)).to_bytes(3, "little") + block
        for number, block in enumerate(blocks)
    )


def table(raw: bytes) -> bytes:
    return document.TABLE_MAGIC + len(raw).to_bytes(8, "little") + frame(raw)


def close(raw: bytes) -> bytes:
    """The end of a pack."""
    body = len(raw).to_bytes(4, "little") + frame(raw)
    return body + len(body).to_bytes(4, "little") + chunk_hash(body) + pack.MAGIC


def tokens_and_data(plain: object) -> dict[str, Any]:
    """A plain value as a tree that can be changed."""
    encoded = value.encode(plain)
    end = 8 + int.from_bytes(encoded[:8], "little")
    return {"tokens": msgspec.msgpack.decode(encoded[8:end]), "data": encoded[end:]}


def join(tree: dict[str, Any]) -> bytes:
    tokens = msgspec.msgpack.encode(tree.get("tokens"))
    return len(tokens).to_bytes(8, "little") + tokens + memoryview(tree.get("data", b"")).tobytes()


# --- reading -------------------------------------------------------------------------------------------------------


def read_layout(data: bytes) -> Layout:
    chunks = decode_layout(data, document.digest(data))
    layout = chunks.layout
    # What passed can be used: every chunk has pieces, a size and a writer.
    for unit in itertools.islice(chunks.units(), 8):
        if unit.count > 1000:
            continue
        for number, pieces in enumerate(chunks.pieces(unit)[:8], unit.first):
            assert 0 < chunks.raw_bytes(pieces) <= layout.chunk_bytes
            assert chunks.writer(number)[0] < len(layout.rank_nodes)
    aliases = {key for key, _ in layout.aliases}
    for key, shape in enumerate(layout.shapes):
        if len(shape) <= 32 and math.prod(shape) <= 4096:
            held = np.zeros(shape, "u1")
            for place in chunks.places(key) if key not in aliases else ():
                held[layout.box(place.shard).slices()] += 1
            assert (held == (key not in aliases)).all()
    return layout


_CHUNKS = Chunks(LAYOUT)


def read_part(data: bytes) -> Part:
    info = PartInfo(0, document.digest(data), len(data))
    part = decode_part(data, info, ATTEMPT, LAYOUT, DIGEST, _CHUNKS)
    for rank_table in part.tables:
        rows = Rows(rank_table)
        for row in range(len(rank_table.codec)):
            place = rows.place(row)
            assert place.length > 0
            assert place.offset + place.length <= rank_table.packs[int(rows.pack[row])].size
            assert len(place.hash) == 32
            assert place.stored_hash is None or len(place.stored_hash) == 32
    return part


def read_index(data: bytes) -> Index:
    return decode_index(data, document.digest(data), ATTEMPT)


def read_roll(data: bytes) -> Roll:
    parts = decode_roll(data, RollInfo(document.digest(data), len(data)), ATTEMPT, 1, 300)
    assert [info.node for info in parts] == list(range(256, 300))
    return document.unpack_table(data, Roll, "x")


def read_decision(data: bytes) -> object:
    return decode_decision(data, 2)


def read_pack(end: bytes) -> pack.Footer:
    """The footer in the end of a pack whose chunks take 4096 bytes."""
    body, trailer = end[: -pack.TRAILER_BYTES], end[-pack.TRAILER_BYTES :]
    size = pack.footer_bytes(trailer, 4096 + len(end), "x")
    return pack.decode_footer(body[-size:], trailer, 4096, "x")


@dataclass(frozen=True)
class Kind:
    read: Callable[[bytes], object]
    """The object in these bytes, checked and used; ``FormatError``."""
    close: Callable[[bytes], bytes]
    """Content to object, with digests that match."""
    encode: Callable[[Any], bytes]
    """What was read, or something like it, to content."""
    valid: list[Any]


_json, _msgpack = msgspec.json.encode, msgspec.msgpack.encode

KINDS = {
    "FORMAT": Kind(decode_format, seal, _json, [FORMAT]),
    "decision": Kind(read_decision, seal, _json, DECISIONS),
    "layout": Kind(read_layout, table, _msgpack, [LAYOUT, RULED]),
    "part": Kind(read_part, table, _msgpack, [PART]),
    "index": Kind(read_index, seal, _json, [INDEX, ROLLED]),
    "roll": Kind(read_roll, table, _msgpack, [ROLL]),
    "footer": Kind(read_pack, close, _msgpack, [FOOTER]),
    "value": Kind(value.decode, bytes, join, [tokens_and_data(plain) for plain in VALUES]),
}


def tree_of(thing: Any) -> Any:
    """What is encoded, as maps, lists and leaves that may be replaced by anything."""

    def plain(at: Any) -> Any:
        if isinstance(at, dict):
            return {key: plain(inner) for key, inner in at.items()}
        return [plain(inner) for inner in at] if isinstance(at, list | tuple) else at

    return plain(msgspec.to_builtins(thing, builtin_types=(bytes,)))
