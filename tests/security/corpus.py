"""Repositories that somebody else wrote to do harm, each a small change to a valid one, and what must come of it.

All digests fit, up to the history, so that each is refused for what it says and not for being damaged; except where
damage is the point. Reading the newest snapshot fails with one kind of error and a message that names the reason, or
returns the right bytes.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zstandard

from fastckpt.format import document, names, value
from fastckpt.format.chunk import chunk_hash
from tests.property.metadata_objects import frame, seal
from tests.security.author import OLD, Author

ESCAPES = "\x1b[2J\x1b]0;owned\x07\r\u202e"
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Attack:
    name: str
    change: Callable[[Author], object]
    says: str
    """Found in the message of the error; empty: there is none, and what is read is right."""
    error: str = "SnapshotDamaged"
    verify: int | tuple[int, ...] = 14
    """Exit code of ``fastckpt verify``."""
    declared_bytes: int = 0
    """What it declares to hold and does hold, so that reading may take that much memory."""
    need_root: bool = False


ATTACKS: list[Attack] = []


def attack(says: str, **expected: Any) -> Callable[[Callable[[Author], object]], None]:
    """The function's name is the attack's."""

    def add(change: Callable[[Author], object]) -> None:
        ATTACKS.append(Attack(change.__name__.replace("_", " "), change, says, **expected))

    return add


def set_to(tree: str, *way: Any, to: Any) -> Callable[[Author], None]:
    """Replaces what is at the end of the way into one of the author's trees."""

    def change(author: Author) -> None:
        place: Any = getattr(author, tree)
        for step in way[:-1]:
            place = place[step]
        if way:
            place[way[-1]] = to
        else:
            setattr(author, tree, to)

    return change


def each(prefix: str, says: str, changes: dict[str, Callable[[Author], object]], **expected: Any) -> None:
    ATTACKS.extend(Attack(f"{prefix} {name}", change, says, **expected) for name, change in changes.items())


ATTACKS.append(Attack("a valid repository", lambda author: None, "", verify=0))

# --- things that are no ints where ints are due --------------------------------------------------------------------

NO_INTS = {"true": True, "a float": 2.0, "a string": "2", "null": None, "a list": [2]}
each("a step that is", "Expected `int`", {n: lambda a, v=v: a.label(step=v) for n, v in NO_INTS.items()})
each("an index step that is", "Expected `int`", {n: set_to("index", "step", to=v) for n, v in NO_INTS.items()})
each(
    "a size of a shape that is",
    "Expected `int`",
    {n: set_to("layout", "shapes", 4, 0, to=v) for n, v in NO_INTS.items()},
)
each(
    "an offset of a box that is",
    "Expected `int`",
    {n: set_to("layout", "shard_offsets", 5, 0, to=v) for n, v in NO_INTS.items()},
)
each(
    "a rank of a table that is",
    "Expected `int`",
    {n: lambda a, v=v: a.table().update(rank=v) for n, v in NO_INTS.items()},
)
each(
    "a pack size that is",
    "Expected `int`",
    {n: lambda a, v=v: a.table()["packs"][0].update(size=v) for n, v in NO_INTS.items()},
)
each(
    "a number too large for",
    "Expected `int` <= 4611686018427387904|out of range|beyond|2\\*\\*53",
    {
        "a step": lambda a: a.label(step=2**53 + 1),
        "a step of 64 bits": lambda a: a.label(step=2**63),
        "a step of thousands of digits": lambda a: a.contents.update(
            decision=lambda line: line.replace(b'"step":2,', b'"step":' + b"9" * 5000 + b",")
        ),
        "the bytes of an index": set_to("index", "bytes", to=2**62 + 1),
        "a shape": set_to("layout", "shapes", 4, 0, to=2**63),
        "an offset": set_to("layout", "shard_offsets", 5, 0, to=2**64 - 1),
        "the size of a pack": lambda a: a.table()["packs"][0].update(size=2**64 - 1),
        "the size of a part": lambda a: a.index["parts"][0].update(size=2**64),
        "an environment": lambda a: a.contents.update(
            index=lambda line: line.replace(b'"environment":{}', b'"environment":{"a":' + b"9" * 5000 + b"}")
        ),
        "an environment's float": lambda a: a.contents.update(
            index=lambda line: line.replace(b'"environment":{}', b'"environment":{"a":1e999}')
        ),
    },
)
each(
    "a negative",
    "Expected `int` >=",
    {
        "step": lambda a: a.label(step=-1),
        "size": set_to("layout", "shapes", 4, 0, to=-8),
        "offset": set_to("layout", "shard_offsets", 5, 0, to=-4),
        "size of a box": set_to("layout", "shard_sizes", 5, 0, to=-4),
        "owner": set_to("layout", "owners", 1, to=-2),
        "chunk count": set_to("layout", "writers", 0, to=[0, -2]),
        "node": set_to("layout", "rank_nodes", 0, to=-1),
        "size of a pack": lambda a: a.table()["packs"][0].update(size=-1),
        "node of a part": lambda a: a.index["parts"][0].update(node=-1),
    },
)

# --- FORMAT --------------------------------------------------------------------------------------------------------


def json_edit(label: str, old: bytes, new: bytes) -> Callable[[Author], object]:
    def change(author: Author) -> None:
        def edit(line: bytes) -> bytes:
            assert old in line, line
            return line.replace(old, new, 1)

        author.contents[label] = edit

    return change


each(
    "a format",
    "needs features|format version",
    {
        "with a feature nobody knows": set_to("format", "features", to=["dedup"]),
        "of a later version": set_to("format", "version", to=2),
        "of a version of 30 digits": json_edit("FORMAT", b'"version":1', b'"version":' + b"9" * 30),
        "with a feature that moves the cursor": set_to("format", "features", to=[ESCAPES]),
    },
    error="UnsupportedVersion",
    verify=15,
)
each(
    "a format",
    "FORMAT",
    {
        "of version zero": set_to("format", "version", to=0),
        "of version true": set_to("format", "version", to=True),
        "of version 1.0": json_edit("FORMAT", b'"version":1', b'"version":1.0'),
        "of a version of thousands of digits": json_edit("FORMAT", b'"version":1', b'"version":' + b"9" * 5000),
        "with its version twice": json_edit("FORMAT", b'"version":1', b'"version":9,"version":1'),
        "with features deep inside each other": json_edit("FORMAT", b'["compact"]', b"[" * 980 + b"]" * 980),
        "with features deeper than any stack": json_edit("FORMAT", b'["compact"]', b"[" * 20_000 + b"]" * 20_000),
        "with an unknown field": json_edit("FORMAT", b'"created"', b'"evil":1,"created"'),
        "without an id": json_edit("FORMAT", b'"id"', b'"ID"'),
        "with a path for an id": set_to("format", "id", to="../../../../../../../etc/passwd.."),
        "with chunks of 3 bytes": set_to("format", "chunk_bytes", to=3),
        "with chunks of 2^62 bytes": set_to("format", "chunk_bytes", to=2**62),
        "with no chunk bytes": set_to("format", "chunk_bytes", to=0),
        "with spaces between its fields": json_edit("FORMAT", b",", b", "),
        "with a byte order mark": json_edit("FORMAT", b"{", b"\xef\xbb\xbf{"),
        "with a half of a surrogate pair": json_edit("FORMAT", b'"created":"', b'"created":"\\ud800'),
        "with bytes that are no UTF-8": json_edit("FORMAT", b'"created":"', b'"created":"\xff'),
        "that is a list": lambda a: a.contents.update(FORMAT=lambda line: b"[" + line + b"]"),
        "that is empty": lambda a: a.stored.update(FORMAT=lambda data: b""),
        "with bytes after its seal": lambda a: a.stored.update(FORMAT=lambda data: data + b"\n"),
        "larger than any": lambda a: a.stored.update(FORMAT=lambda data: data + b" " * 70_000),
        "sealed for something else": lambda a: a.stored.update(
            FORMAT=lambda data: data.replace(b'"features"', b'"Features"')
        ),
    },
)

# --- decisions -----------------------------------------------------------------------------------------------------


def history(change: Callable[[Any, Author], object]) -> Callable[[Author], object]:
    """Changes the COMMIT of the newest snapshot, and its copy in the list."""
    return lambda author: change(author.commit, author)


each(
    "a decision",
    "decisions/",
    {
        "of a kind nobody knows": history(lambda d, a: d.update(kind="prune")),
        "under another number": history(lambda d, a: d.update(number=2)),
        "without the digest of its predecessor": history(lambda d, a: d.update(previous="")),
        "whose predecessor is a path": history(lambda d, a: d.update(previous="../../etc/passwd")),
        "by a writer that opens later": history(lambda d, a: d.update(writer="000000000009-ffffffffffffffff")),
        "by a writer that is a path": history(lambda d, a: d.update(writer="../../../etc-0000000000000000")),
        "with live snapshots listed further on": history(lambda d, a: d.update(live=None, live_at=4)),
        "with live snapshots listed in itself but none": history(lambda d, a: d.update(live=None)),
        "with live snapshots listed before the first": history(lambda d, a: d.update(live=None, live_at=0)),
        "of 2^62": history(lambda d, a: d.update(number=2**62)),
        "that commits another writer's attempt": lambda a: a.label(attempt="000000000001-0000000000000000-000001"),
        "that commits a path": lambda a: a.label(attempt="../../outside"),
        "that commits an absolute path": lambda a: a.label(attempt="/etc/passwd"),
        "that commits an attempt with NUL": lambda a: a.label(attempt=a.attempt + "\0"),
        "that commits an attempt with a line end": lambda a: a.label(attempt=a.attempt + "\n"),
        "that commits an attempt in other digits": lambda a: a.label(attempt=a.attempt.replace("1", "\u0661")),
        "whose index is a path": lambda a: a.label(index="../" * 21 + "x"),
        "whose index has capital digits": lambda a: a.label(index="F" * 64),
        "whose snapshot is of a later one": lambda a: a.label(decision=9),
        "with a metric that is infinite": lambda a: (
            a.label(metrics={"loss": 0.5}),
            json_edit("decision", b"0.5", b"1e999")(a),
        ),
        "with a metric that is no number": lambda a: a.label(metrics={"loss": None}),
        "with a metric that is a NaN": lambda a: (
            a.label(metrics={"loss": 0.5}),
            json_edit("decision", b"0.5", b"NaN")(a),
        ),
        "with a thousand metrics": lambda a: a.label(metrics={str(number): 0.0 for number in range(1000)}),
        "with a metric's name of a mebibyte": lambda a: a.label(metrics={"x" * MEBIBYTE: 0.0}),
        "with a metric twice": lambda a: (
            a.label(metrics={"loss": 0.5}),
            json_edit("decision", b'"loss":0.5', b'"loss":0.5,"loss":0.5')(a),
        ),
        "with a note of a mebibyte": lambda a: a.label(note="x" * MEBIBYTE),
        "with its note twice": json_edit("decision", b'"note":', b'"note":"a","note":'),
        "with its kind twice": json_edit("decision", b'"kind":"commit"', b'"kind":"open","kind":"commit"'),
        "with text where there must be a list": history(lambda d, a: d.update(live="none")),
        "deeper than any stack": json_edit(
            "decision", b'"metrics":{', b'"metrics":{"a":' + b"[" * 50_000 + b"]" * 50_000 + b","
        ),
        "that is empty": lambda a: a.stored.update(decision=lambda data: b""),
        "cut in half": lambda a: a.stored.update(decision=lambda data: data[: len(data) // 2]),
        "with another sealed document behind it": lambda a: a.stored.update(decision=lambda data: data + seal(b"{}")),
        "that is FORMAT": lambda a: a.stored.update(decision=lambda data: a.valid["FORMAT"]),
    },
)

# Reading begins at the newest list of live snapshots; what comes before it is for ``verify``.
each(
    "a decision with a list of live snapshots",
    "",
    {
        "that does not follow its predecessor": history(lambda d, a: d.update(previous="0" * 64)),
        "by a writer that never opened": history(lambda d, a: d.update(writer="000000000001-ffffffffffffffff")),
    },
)


@attack("lists live snapshots that do not follow")
def a_list_of_live_snapshots_with_one_that_was_never_committed(author: Author) -> None:
    # The list itself is believed where reading begins, so it is put further on.
    author.decisions[1]["live"], author.decisions[1]["live_at"] = None, 1
    author.commit.update(live=None, live_at=1)
    added = {**author.commit["snapshot"], "attempt": author.writer + "-000009", "index": "0" * 64}
    author.decisions.append(an_open(4, live=[*an_end(author), added], live_at=4))
    author.decisions.append(an_open(5, live=None, live_at=1))


@attack("live_at 5 does not fit")
def live_lists_that_point_at_each_other(author: Author) -> None:
    author.decisions.append(an_open(4, live=None, live_at=5))
    author.decisions.append(an_open(5, live=None, live_at=4))


@attack("points to no list")
def a_history_whose_end_points_at_a_decision_without_a_list(author: Author) -> None:
    author.commit.update(live=None, live_at=2)
    author.decisions[1].update(live=None, live_at=1)


@attack("aborted or committed before|committed before")
def an_attempt_committed_twice(author: Author) -> None:
    author.decisions[1].update(live=None, live_at=1)
    author.commit.update(live=None, live_at=1)
    again = {**author.commit, "number": 4, "snapshot": {**author.commit["snapshot"], "decision": 4}}
    author.decisions.append(again)


@attack("aborts an attempt of another writer, or one that is committed")
def an_abort_of_what_is_committed(author: Author) -> None:
    author.decisions[1].update(live=None, live_at=1)
    author.commit.update(live=None, live_at=1)
    head = {key: author.commit[key] for key in ("number", "previous", "writer", "created", "live", "live_at")}
    author.decisions.append({"kind": "abort", **head, "number": 4, "attempt": author.attempt})


@attack("fenced, or never opened")
def a_commit_by_a_writer_that_was_fenced(author: Author) -> None:
    author.decisions[1].update(live=None, live_at=1)
    author.decisions.insert(2, an_open(3, live=None, live_at=1))
    author.commit.update(number=4, live=None, live_at=1)
    author.label(decision=4)


@attack("fenced, or never opened")
def two_opens_of_the_same_number(author: Author) -> None:
    # The second writer claims the first one's number: its id differs in the random digits only.
    author.commit.update(live=None, live_at=2, writer="000000000001-ffffffffffffffff")
    author.label(attempt=author.attempt)


@attack("is missing from the history")
def a_history_with_a_gap(author: Author) -> None:
    author.extra[names.decision(2)] = None


@attack("is missing from the history")
def a_history_with_an_entry_of_a_far_future(author: Author) -> None:
    author.extra["decisions/999999999999"] = author.valid[names.decision(2)]


@attack("not the name of a decision")
def a_decision_of_number_zero(author: Author) -> None:
    author.extra["decisions/000000000000"] = author.valid[names.decision(1)]


@attack("not the name of a decision")
def a_decision_that_is_a_directory(author: Author) -> None:
    author.extra["decisions/x/000000000004"] = b"{}"


@attack("holds no snapshot", error="SnapshotNotFound", verify=0)
def a_history_without_a_snapshot(author: Author) -> None:
    del author.decisions[1:]


@attack("does not carry the digest of FORMAT")
def a_history_that_belongs_to_another_FORMAT(author: Author) -> None:
    author.decisions[0]["previous"] = "1" * 64


def an_open(number: int, live: Any, live_at: int) -> dict[str, Any]:
    writer = names.writer(number, f"{number:016x}")
    return {
        "kind": "open",
        "number": number,
        "previous": None,
        "writer": writer,
        "created": "now",
        "live": live,
        "live_at": live_at,
    }


def an_end(author: Author) -> list[Any]:
    """The live snapshots of a valid history of this author."""
    first = author.decisions[1]["snapshot"]
    return [first, {**author.commit["snapshot"]}]


# --- what terminals and files make of text -------------------------------------------------------------------------

each(
    "terminal escapes in",
    "",
    {
        "a note": lambda a: a.label(note=ESCAPES),
        "a metric's name": lambda a: a.label(metrics={ESCAPES: 0.5}),
        "a time": lambda a: a.label(created=ESCAPES),
        "an environment": lambda a: a.index.update(environment={ESCAPES: ESCAPES, "b": [ESCAPES, {ESCAPES: 1}]}),
    },
    verify=0,
)


def key(name: str) -> Callable[[Author], object]:
    """Calls the last tensor, which is the largest, something else."""

    def change(author: Author) -> None:
        author.layout["keys"][-1] = name
        assert author.layout["keys"] == sorted(author.layout["keys"])

    return change


each(
    "a tensor called",
    "",
    {
        "by terminal escapes": key("w" + ESCAPES),
        "a way up": key("w/../../../outside"),
        "an absolute path": lambda a: a.layout["keys"].__setitem__(0, "/etc/passwd"),
        "with NUL and line ends": key("w\0\n\r"),
        "with backslashes": key("w\\..\\..\\c:con"),
        "by 4096 bytes": key("w" * 4096),
        "by characters that look alike": key("w\u0430\u200b\ufeff"),
        "like one rank's own": key("w@0"),
        "like another key but for normal form": key("w\u00e9e\u0301"),
    },
    verify=0,
)
each(
    "a tensor called",
    "a key of|keys are not sorted",
    {
        "nothing": lambda a: a.layout["keys"].__setitem__(0, ""),
        "by 4097 bytes": key("w" * 4097),
        "as another is": lambda a: a.layout["keys"].__setitem__(3, "w"),
        "out of order": lambda a: a.layout["keys"].__setitem__(0, "z"),
    },
)


@attack("", verify=0)
def a_tensor_called_as_the_metadata_of_the_file(author: Author) -> None:
    author.layout["keys"][0] = "__metadata__"


# --- layouts -------------------------------------------------------------------------------------------------------


def layout(**columns: Any) -> Callable[[Author], object]:
    return lambda author: author.layout.update(columns)


def boxes(*changed: tuple[str, int, list[int]]) -> Callable[[Author], object]:
    def change(author: Author) -> None:
        for column, shard, numbers in changed:
            author.layout[column][shard] = numbers

    return change


each(
    "a layout with",
    "layouts/",
    {
        "two boxes that overlap": boxes(("shard_offsets", 5, [3, 0])),
        "two boxes that are the same": boxes(("shard_offsets", 5, [0, 0])),
        "boxes that overlap here and leave a gap there": boxes(
            ("shard_offsets", 5, [2, 0]), ("shard_sizes", 1, [4, 16]), ("shard_sizes", 5, [4, 16])
        ),
        "a gap between boxes": boxes(("shard_sizes", 5, [3, 16])),
        "a box outside its tensor": boxes(("shard_offsets", 5, [5, 0])),
        "a box whose end is beyond 2^62": boxes(("shard_offsets", 5, [2**62, 0])),
        "a box of no elements": boxes(("shard_sizes", 5, [0, 16])),
        "a box of fewer dimensions": boxes(("shard_sizes", 5, [4]), ("shard_offsets", 5, [4])),
        "a box of more dimensions": boxes(("shard_sizes", 5, [4, 16, 1]), ("shard_offsets", 5, [4, 0, 0])),
        "a tensor that nobody holds": boxes(("shard_sizes", 2, [7])),
        "a shard of a tensor that is not there": set_to("layout", "shard_keys", 5, to=99),
        "a shape whose product is 2^64": set_to("layout", "shapes", 4, to=[2**32, 2**32]),
        "a shape whose product is zero but for 2^64": set_to("layout", "shapes", 4, to=[2**32, 2**32, 0]),
        "a shape of 2^63 bytes": set_to("layout", "shapes", 4, to=[2**61]),
        "65 dimensions": set_to("layout", "shapes", 4, to=[1] * 65),
        "a hundred thousand dimensions": set_to("layout", "shapes", 4, to=[1] * 100_000),
        "a dtype nobody knows": set_to("layout", "dtypes", 4, to="float31"),
        "a dtype that is a class": set_to("layout", "dtypes", 4, to="os.system"),
        "an alias of itself": layout(aliases=[[4, 4]]),
        "aliases of each other": layout(aliases=[[3, 4], [4, 3]]),
        "an alias of a tensor that is not there": layout(aliases=[[4, 99]]),
        "an alias that is not there": layout(aliases=[[99, 4]]),
        "an alias of another shape": layout(aliases=[[0, 4]]),
        "an alias that has shards of its own": layout(aliases=[[2, 1]]),
        "the same alias twice": layout(aliases=[[2, 1], [2, 1]]),
        "an alias of three": layout(aliases=[[1, 2, 3]]),
        "fewer dtypes than keys": lambda a: a.layout["dtypes"].pop(),
        "fewer boxes than shards": lambda a: a.layout["shard_sizes"].pop(),
        "a tensor of a rank that is not there": set_to("layout", "owners", 1, to=7),
        "a shard in two units": set_to("layout", "units", 4, to=[0]),
        "a shard in no unit": lambda a: a.layout["units"].pop(),
        "a shard twice in one unit": set_to("layout", "units", 2, to=[2, 3, 3]),
        "an empty unit": lambda a: a.layout["units"].append([]),
        "a unit of a shard that is not there": set_to("layout", "units", 4, to=[99]),
        "a bundle larger than any": lambda a: a.layout["units"].__setitem__(slice(None), [[0, 1, 2, 3, 4, 5]]),
        "fewer chunks dealt out than there are": layout(writers=[[0, 2], [1, 2]]),
        "more chunks dealt out than there are": layout(writers=[[0, 2], [1, 2**40]]),
        "chunks dealt to a rank that is not there": layout(writers=[[0, 2], [1, 1], [9, 2]]),
        "chunks of no bytes": layout(chunk_bytes=0),
        "chunks of 2^40 bytes": layout(chunk_bytes=2**40),
        "chunks of a size that is no power of two": layout(chunk_bytes=4097),
        "no ranks": layout(rank_nodes=[]),
        "nodes out of order": layout(rank_nodes=[1, 0]),
        "a node left out": layout(rank_nodes=[0, 2]),
        "a node of number 2^62": layout(rank_nodes=[0, 2**62]),
        "more nodes than the index has parts": layout(rank_nodes=[0, 1, 2]),
        "an unknown column": layout(strides=[[1]]),
        "a column left out": lambda a: a.layout.pop("aliases"),
        "text instead of a column": layout(keys="bootw"),
        "more chunks than there may be": lambda a: a.one_tensor([2**40], writers=[[0, 2**28]]),
    },
)


def msgpack_edit(label: str, change: Callable[[bytes], bytes]) -> Callable[[Author], object]:
    return lambda author: author.contents.update({label: change})


def doubled(raw: bytes) -> bytes:
    """The msgpack of a map, with its first field once more before it."""
    tree = msgspec.msgpack.decode(raw)
    field, inner = next(iter(tree.items()))
    body = raw[1 if raw[0] < 0x90 else 3 :]
    extra = msgspec.msgpack.encode(field) + msgspec.msgpack.encode(inner)
    return bytes([0x80 | len(tree) + 1]) + extra + body


BAD_MSGPACK: dict[str, Callable[[bytes], bytes]] = {
    "its first field twice": doubled,
    "its fields in another order": lambda raw: msgspec.msgpack.encode(
        dict(reversed(msgspec.msgpack.decode(raw).items()))
    ),
    "ints longer than they need be": lambda raw: (
        raw.replace(b"\xa4node\x00", b"\xa4node\xcd\x00\x00")
        .replace(b"\xa6owners\x95\xff", b"\xa6owners\x95\xd0\xff")
        .replace(b"\xa4rank\x00", b"\xa4rank\xcc\x00")
    ),
    "bytes behind it": lambda raw: raw + b"\0",
    "its end cut off": lambda raw: raw[:-1],
    "a list that claims 2^32 entries": lambda raw: b"\x81\xa4keys\xdd\xff\xff\xff\xff",
    "a map that claims 2^32 entries": lambda raw: b"\xdf\xff\xff\xff\xff",
    "text that claims 4 GiB": lambda raw: b"\x81\xdb\xff\xff\xff\xff",
    "lists deeper than any stack": lambda raw: b"\x81\xa6shapes" + b"\x91" * 100_000,
    "an extension type": lambda raw: b"\x81\xa4keys\xc7\x04\x01abcd",
    "a timestamp": lambda raw: b"\x81\xa4keys\xd6\xff\0\0\0\0",
    "nothing in it": lambda raw: b"",
    "a number for a map": lambda raw: b"\x01",
}
for what in ("layout", "part"):
    each(f"a {what} with", f"{what}s?[/-]", {n: msgpack_edit(what, change) for n, change in BAD_MSGPACK.items()})
each(
    "a key with",
    "layouts/",
    {
        "bytes that are no UTF-8": msgpack_edit("layout", lambda raw: raw.replace(b"\xa1w", b"\xa1\xff")),
        "half of a surrogate pair": msgpack_edit("layout", lambda raw: raw.replace(b"\xa1w", b"\xa3\xed\xa0\x80")),
    },
)

# --- envelopes and frames ------------------------------------------------------------------------------------------


def reframed(make: Callable[[bytes], bytes]) -> Callable[[Author], object]:
    """The layout in another zstd frame."""
    return lambda a: a.stored.update(layout=lambda data: data[:16] + make(msgspec.msgpack.encode(a.layout)))


def open_frame(raw: bytes, *, window: int, size: bytes) -> bytes:
    """A frame of one raw block with a window descriptor."""
    flag = {0: 0x00, 4: 0x80, 8: 0xC0}[len(size)]
    return b"\x28\xb5\x2f\xfd" + bytes([flag, window]) + size + (len(raw) << 3 | 1).to_bytes(3, "little") + raw


def zeros(count: int) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(count))


each(
    "a table with",
    "layouts/",
    {
        "another magic": lambda a: a.stored.update(layout=lambda data: b"PK\3\4" + data[4:]),
        "nothing but magic": lambda a: a.stored.update(layout=lambda data: data[:8]),
        "a raw length of 2^63": lambda a: a.stored.update(
            layout=lambda data: data[:8] + (2**63).to_bytes(8, "little") + data[16:]
        ),
        "a raw length too small by one": lambda a: a.stored.update(
            layout=lambda data: data[:8] + (int.from_bytes(data[8:16], "little") - 1).to_bytes(8, "little") + data[16:]
        ),
        "a frame of 64 MiB where a few bytes are due": reframed(lambda raw: zeros(64 * MEBIBYTE)),
        "a frame that claims less than it holds": reframed(
            lambda raw: frame(raw)[:5] + len(raw).to_bytes(4, "little") + zeros(64 * MEBIBYTE)[9:]
        ),
        "a frame that does not say its size": reframed(lambda raw: open_frame(raw, window=0x50, size=b"")),
        "a frame that claims 2^62 bytes": reframed(
            lambda raw: open_frame(raw, window=0x50, size=(2**62).to_bytes(8, "little"))
        ),
        "a frame that needs a window of 2 GiB": reframed(
            lambda raw: open_frame(raw, window=(31 - 10) << 3, size=len(raw).to_bytes(4, "little"))
        ),
        "a frame that needs a window of 3 TiB": reframed(
            lambda raw: open_frame(raw, window=0xFF, size=len(raw).to_bytes(4, "little"))
        ),
        "two frames": reframed(lambda raw: frame(raw) + frame(raw)),
        "a frame that is skipped before its own": reframed(lambda raw: b"\x50\x2a\x4d\x18\4\0\0\0evil" + frame(raw)),
        "a frame that is skipped behind its own": reframed(lambda raw: frame(raw) + b"\x50\x2a\x4d\x18\4\0\0\0evil"),
        "bytes behind its frame": reframed(lambda raw: frame(raw) + b"PK\5\6"),
        "its frame cut short": reframed(lambda raw: frame(raw)[:-1]),
        "a frame with a dictionary": reframed(lambda raw: b"\x28\xb5\x2f\xfd\xa1" + b"\x07" + frame(raw)[5:]),
        "a gzip stream": reframed(lambda raw: b"\x1f\x8b\x08\0\0\0\0\0"),
        "nothing but 20 MiB of zeros": lambda a: a.stored.update(
            layout=lambda data: document.TABLE_MAGIC + (20 * MEBIBYTE).to_bytes(8, "little") + zeros(20 * MEBIBYTE)
        ),
    },
)
each(
    "metadata that is",
    "damaged|missing|more than the",
    {
        "a layout with one bit flipped": lambda a: a.on_disk.append(lambda d: flip(the_layout(a, d))),
        "a layout cut short": lambda a: a.on_disk.append(lambda d: cut(the_layout(a, d))),
        "a layout with bytes behind it": lambda a: a.on_disk.append(lambda d: grow(the_layout(a, d), b"x")),
        "a layout that is missing": lambda a: a.on_disk.append(lambda d: the_layout(a, d).unlink()),
        "a layout of a terabyte": lambda a: a.on_disk.append(lambda d: os.truncate(the_layout(a, d), 2**40)),
        "an index with one bit flipped": lambda a: a.on_disk.append(lambda d: flip(d / names.index(a.attempt))),
        "an index of a terabyte": lambda a: a.on_disk.append(lambda d: os.truncate(d / names.index(a.attempt), 2**40)),
        "an index that is missing": lambda a: a.extra.update({names.index(a.attempt): None}),
        "a part with one bit flipped": lambda a: a.on_disk.append(lambda d: flip(d / names.part(a.attempt, 0))),
        "a part of a terabyte": lambda a: a.on_disk.append(lambda d: os.truncate(d / names.part(a.attempt, 0), 2**40)),
        "a part that is missing": lambda a: a.extra.update({names.part(a.attempt, 1): None}),
        "a decision of a terabyte": lambda a: a.on_disk.append(lambda d: os.truncate(d / names.decision(3), 2**40)),
        "a FORMAT of a terabyte": lambda a: a.on_disk.append(lambda d: os.truncate(d / "FORMAT", 2**40)),
    },
)


def the_layout(author: Author, directory: Path) -> Path:
    (own,) = [path for path in (directory / "layouts").iterdir() if f"layouts/{path.name}" not in author.valid]
    return own


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path, tail: bytes) -> None:
    path.write_bytes(path.read_bytes() + tail)


# --- index and parts -----------------------------------------------------------------------------------------------

each(
    "an index",
    "index",
    {
        "of another attempt": set_to("index", "attempt", to="000000000001-0000000000000000-000001"),
        "of another step": set_to("index", "step", to=OLD),
        "of another size": set_to("index", "bytes", to=10**9),
        "whose layout is a path": set_to("index", "layout", to="../FORMAT"),
        "whose layout is an absolute path": set_to("index", "layout", to="/etc/passwd"),
        "whose layout has a line end": set_to("index", "layout", to="0" * 64 + "\n"),
        "whose parts are in another order": lambda a: a.index["parts"].reverse(),
        "with a part twice": lambda a: a.index["parts"].append(a.index["parts"][0]),
        "with a part whose digest is a path": lambda a: a.index["parts"][0].update(digest="../" * 21 + "x"),
        "with a part of 2^60 bytes": lambda a: a.index["parts"][0].update(size=2**60),
        "with a field twice": json_edit("index", b'"step":2', b'"step":1,"step":2'),
        "with an environment 17 deep": json_edit("index", b"{}", b'{"a":' * 17 + b"1" + b"}" * 17),
        "with an environment 900 deep": json_edit("index", b"{}", b'{"a":' * 900 + b"1" + b"}" * 900),
        "with an environment deeper than any stack": json_edit(
            "index", b"{}", b'{"a":' * 90_000 + b"1" + b"}" * 90_000
        ),
        "with the same name twice in its environment": json_edit(
            "index", b'"environment":{', b'"environment":{"a":1,"a":2'
        ),
        "that is a decision": lambda a: a.stored.update(index=lambda data: a.valid[names.decision(1)]),
    },
)
each(
    "an index with",
    "layouts/|part-",
    {
        "a part left out": lambda a: a.index["parts"].pop(),
        "no parts": lambda a: a.index["parts"].clear(),
        "a part too many": lambda a: a.index["parts"].append({"node": 2, "digest": "0" * 64, "size": 1}),
        "the digest of another part": lambda a: a.index["parts"][0].update(digest="0" * 64),
        "the wrong size of a part": lambda a: a.index["parts"][0].update(size=10**6),
        "the size of a part too small": lambda a: a.index["parts"][0].update(size=1),
    },
)


each(
    "an index that says of values",
    "index",
    {
        "a kind nobody knows": set_to("index", "values", "rng", to="some of them"),
        "their names out of order": set_to("index", "values", to={"rng": "own", "progress": "same"}),
        "a list of them": set_to("index", "values", to=["progress", "rng"]),
        "rolls beside parts": set_to("index", "rolls", to=[{"digest": "0" * 64, "size": 1}]),
        "no rolls in a list": set_to("index", "rolls", to=[]),
    },
)
each(
    "an index that says wrongly of values",
    "/index says",
    {
        "that they are equal": set_to("index", "values", "rng", to="same"),
        "that there are none": set_to("index", "values", to={}),
        "that all ranks have others": set_to("index", "values", to={"more": "own", "progress": "same", "rng": "own"}),
    },
)
each(  # less than it could: nothing wrong comes of it
    "an index that wrongly says of values",
    "",
    {
        "that they are not equal": set_to("index", "values", "progress", to="own"),
        "that some ranks lack them": set_to("index", "values", "progress", to="some"),
        "that some have others": set_to("index", "values", to={"more": "some", "progress": "same", "rng": "own"}),
    },
)
each(
    "an index with rolls",
    "rolls|missing",
    {
        "of a few nodes": lambda a: a.index.update(parts=[], rolls=[{"digest": "0" * 64, "size": 1}]),
        "of a great many": lambda a: a.index.update(parts=[], rolls=[{"digest": "0" * 64, "size": 1}] * 100),
    },
)


def part(**fields: Any) -> Callable[[Author], object]:
    return lambda author: author.parts[0].update(fields)


def row(**fields: Any) -> Callable[[Author], object]:
    return lambda author: author.table().update(fields)


def pack_called(name: str) -> Callable[[Author], object]:
    return lambda author: author.table()["packs"][0].update(name=name.replace("ATTEMPT", author.attempt))


each(
    "a part",
    "part-",
    {
        "of another attempt": part(attempt="000000000001-0000000000000000-000001"),
        "of another node": part(node=1),
        "of another layout": part(layout="0" * 64),
        "of the snapshot before": lambda a: a.stored.update(
            part=lambda data: a.valid[names.part(a.attempt[:-1] + "1", 0)]
        ),
        "without a table": part(tables=[]),
        "with a table twice": lambda a: a.parts[0]["tables"].append(a.table()),
        "with another rank's table": lambda a: a.parts[0].update(tables=a.parts[1]["tables"]),
        "with a table of a rank that is not there": row(rank=99),
        "with a column too short": lambda a: a.table().update(offset=a.table()["offset"][:-1]),
        "with a row too many": lambda a: a.table().update(pack=a.table()["pack"] + bytes(4)),
        "with empty columns": row(pack=b"", offset=b"", length=b"", codec=b"", hashes=b""),
        "with text for a column": row(codec="ab"),
        "with numbers for a column": row(offset=[0, 1]),
        "with a codec nobody knows": lambda a: a.cell("codec", 0, 2),
        "with codec 255": lambda a: a.cell("codec", 1, 255),
        "with a hash for what is not compressed": row(stored_hashes=bytes(32)),
        "with no hash for what is compressed": lambda a: a.cell("codec", 0, 1),
        "with half a hash": lambda a: a.table().update(hashes=a.table()["hashes"][:-16]),
        "with a pack it does not list": lambda a: a.cell("pack", 0, 1),
        "with a pack of number 2^32 - 1": lambda a: a.cell("pack", 0, 2**32 - 1),
        "with no packs": row(packs=[]),
        "with more packs than chunks": lambda a: a.table().update(packs=a.table()["packs"] * 3),
        "with a chunk behind the end of its pack": lambda a: a.cell("offset", 1, 10_000),
        "with a chunk at 2^63": lambda a: a.cell("offset", 1, 2**63),
        "with a chunk whose end wraps around 2^64": lambda a: a.cell("offset", 1, 2**64 - 1),
        "with a chunk of no bytes": lambda a: a.cell("length", 0, 0),
        "with a chunk of 4 GiB": lambda a: a.cell("length", 0, 2**32 - 1),
        "with a value's digest of one byte": row(values={"progress": b"x"}),
        "with a value that is a path": row(values={"../../outside": b"x"}),
        "with a value larger than any": lambda a: a.parts[0].update(blobs=[bytes(65 * MEBIBYTE)]),
        "with a pack that is a way up": pack_called("../../../../etc/passwd"),
        "with a pack that is a way up in the middle": pack_called("packs/ATTEMPT/../../../outside.pack"),
        "with a pack that is an absolute path": pack_called("/etc/passwd"),
        "with a pack that is another object": pack_called("FORMAT"),
        "with a pack with NUL": pack_called("packs/ATTEMPT/00/0-0.pack\0"),
        "with a pack with a line end": pack_called("packs/ATTEMPT/00/0-0.pack\n"),
        "with a pack with a backslash": pack_called("packs\\ATTEMPT\\00\\0-0.pack"),
        "with a pack with a dot in its way": pack_called("packs/ATTEMPT/./0-0.pack"),
        "with a pack with an empty component": pack_called("packs/ATTEMPT//0-0.pack"),
        "with a pack with a name of 5000 bytes": pack_called("packs/ATTEMPT/00/" + "0" * 5000 + "-0.pack"),
        "with a pack in digits of another script": pack_called("packs/ATTEMPT/\u0660\u0660/0-0.pack"),
        "with a pack in wide characters": pack_called("packs/ATTEMPT/\uff10\uff10/0-0.pack"),
        "with a pack with terminal escapes": pack_called("packs/ATTEMPT/00/0-0.pack" + ESCAPES),
        "with no name for a pack": pack_called(""),
    },
    declared_bytes=4 * 65 * MEBIBYTE,  # the largest: as stored, as decoded, as read, and as encoded to compare
)
each(
    "a part with",
    "with a pack that is of another size|missing|does not hold|bytes where",
    {
        "a pack that is not there": pack_called("packs/ATTEMPT/00/7-7.pack"),
        "a pack of an attempt that is not there": pack_called("packs/000000000001-0000000000000000-000001/00/0-0.pack"),
        "a value that is nowhere": row(values={"progress": bytes(32)}),
    },
)

# --- plain values --------------------------------------------------------------------------------------------------


def encoded(tokens: list[Any] | bytes, data: bytes = b"") -> Callable[[Author], object]:
    """The first value of rank 0 becomes these tokens."""

    def change(author: Author) -> None:
        packed = tokens if isinstance(tokens, bytes) else msgspec.msgpack.encode(tokens)
        blob = len(packed).to_bytes(8, "little") + packed + data
        author.parts[0]["blobs"].append(blob)
        author.table()["values"]["evil"] = chunk_hash(blob)

    return change


# Python hashes an int modulo 2^61 - 1.
ONE_HASH = sorted(((2**61 - 1) * (2**40 + number)).to_bytes(13, "little") for number in range(100_000))

each(
    "a value with",
    "plain value",
    {
        "lists deeper than any stack": encoded(["list", 1] * 100_000 + [None]),
        "33 lists inside each other": encoded(["list", 1] * 33 + [None]),
        "dicts as keys": encoded(["dict", 1, "dict", 0, 1]),
        "a tuple of lists as a key": encoded(["dict", 1, "tuple", 1, "list", 0, 1]),
        "the same key twice": encoded(["dict", 2, 1, 2, 1, 3]),
        "keys that are equal": encoded(["dict", 3, 1, 2, 1.0, 3, True, 4]),
        "the same member twice": encoded(["set", 2, 1, 1]),
        "members out of order": encoded(["set", 2, 2, 1]),
        "a count of 2^63": encoded(["list", 2**63]),
        "a negative count": encoded(["list", -1]),
        "true for a count": encoded(["list", True, 1]),
        "bytes beyond its end": encoded(["bytes", 10], b"123"),
        "2^62 bytes": encoded(["bytes", 2**62]),
        "an array of 2^62 elements": encoded(["array", "float64", 1, 2**62]),
        "an array whose size overflows": encoded(["array", "float64", 2, 2**32, 2**32]),
        "an empty array whose other sizes overflow": encoded(["array", "float64", 3, 2**32, 2**32, 0]),
        "an array of 33 dimensions": encoded(["array", "uint8", 33, *([1] * 33)], b"x"),
        "a tensor of 65 dimensions": encoded(["tensor", "uint8", "cpu", 65, *([1] * 65)], b"x"),
        "an array of objects": encoded(["array", "object", 1, 1], bytes(8)),
        "a scalar of a dtype nobody knows": encoded(["scalar", "O"], bytes(8)),
        "a device that is a path": encoded(["torch_device", "/dev/nvidia0"]),
        "a device with a line end": encoded(["torch_device", "cpu\n"]),
        "a dtype that is a class": encoded(["torch_dtype", "__class__"]),
        "a tag nobody knows": encoded(["object", "os.system", "id"]),
        "a pickle": encoded(b"\x80\x04\x95\x0c\0\0\0\0\0\0\0\x8c\x02os\x94."),
        "a token left over": encoded([1, 2]),
        "data left over": encoded([1], b"x"),
        "a token missing": encoded(["list", 2, 1]),
        "nothing in it": encoded(b""),
        "tokens that claim 2^32 entries": encoded(b"\xdd\xff\xff\xff\xff" + b"\0" * 100),
        "tokens that hold an array": encoded(b"\x91\x91\x01"),
        "an int not in its shortest form": encoded(b"\x91\xcd\0\1"),
        "an int that needed no data": encoded(["int", 1], b"\1"),
        "text of another encoding": encoded(b"\x92\xa3str\xa1\xff"),
        "a deque longer than itself": encoded(["deque", 1, 2, 1, 2]),
        "a deque of negative length": encoded(["deque", -1, 0]),
        "a size of 2^63": encoded(["torch_size", 1, 2**63]),
        "a hundred thousand keys of one hash": encoded(
            ["dict", len(ONE_HASH), *(["int", 13, None] * len(ONE_HASH))], b"".join(ONE_HASH)
        ),
        "a hundred thousand members of one hash": encoded(
            ["set", len(ONE_HASH), *(["int", 13] * len(ONE_HASH))], b"".join(ONE_HASH)
        ),
    },
)


@attack("plain value")
def a_value_whose_length_is_beyond_its_end(author: Author) -> None:
    blob = (2**63).to_bytes(8, "little") + b"\x90"
    author.parts[0]["blobs"].append(blob)
    author.table()["values"]["evil"] = chunk_hash(blob)


@attack("", verify=0)
def a_value_with_terminal_escapes(author: Author) -> None:
    blob = value.encode({ESCAPES: [ESCAPES, b"\x1b", np.float32(1)]})
    author.parts[0]["blobs"].append(blob)
    author.table()["values"][ESCAPES] = chunk_hash(blob)


@attack("", verify=0)
def a_value_that_refers_to_itself(author: Author) -> None:
    blob = value.encode({"a": value.TensorReference("evil.a"), "b": value.TensorReference("../../x")})
    author.parts[0]["blobs"].append(blob)
    author.table()["values"]["evil"] = chunk_hash(blob)


@attack("", verify=0, declared_bytes=64 * MEBIBYTE)
def a_value_of_a_million_lists(author: Author) -> None:
    encoded(["list", 500_000, *(["list", 0] * 500_000)])(author)


# --- packs ---------------------------------------------------------------------------------------------------------

BOMB = zeros(256 * MEBIBYTE)


@attack("a zstd frame of")
def a_chunk_that_decodes_to_256_MiB(author: Author) -> None:
    author.write_chunks([BOMB[:4096], author.chunks()[1]], [bytes(100), author.chunks()[1]], b"\1\0")


@attack("not one whole zstd frame|a zstd frame of")
def a_chunk_that_claims_its_size_and_decodes_to_more(author: Author) -> None:
    bomb = b"\x28\xb5\x2f\xfd\xa0" + (100).to_bytes(4, "little") + zeros(4096)[6:]
    author.write_chunks([bomb, author.chunks()[1]], [bytes(100), author.chunks()[1]], b"\1\0")


@attack("needs a window of")
def a_chunk_with_a_window_of_2_GiB(author: Author) -> None:
    raw = author.chunks()
    author.write_chunks(
        [open_frame(raw[0], window=(31 - 10) << 3, size=(100).to_bytes(4, "little")), raw[1]], raw, b"\1\0"
    )


@attack("a zstd frame of")
def a_chunk_that_does_not_say_its_size(author: Author) -> None:
    raw = author.chunks()
    author.write_chunks([open_frame(raw[0], window=0x50, size=b""), raw[1]], raw, b"\1\0")


@attack("not one whole zstd frame")
def a_chunk_of_two_frames(author: Author) -> None:
    raw = author.chunks()
    author.write_chunks([frame(raw[0]) + frame(b"evil"), raw[1]], raw, b"\1\0")


@attack("", verify=0)
def a_chunk_in_a_frame_of_another_writer(author: Author) -> None:
    raw = author.chunks()
    author.write_chunks([frame(raw[0]), raw[1]], raw, b"\1\0")


@attack("decodes to other bytes")
def a_chunk_that_decodes_to_other_bytes(author: Author) -> None:
    raw = author.chunks()
    author.write_chunks([frame(bytes(100)), raw[1]], raw, b"\1\0")


@attack("has other bytes")
def a_chunk_that_is_longer_than_its_tensor(author: Author) -> None:
    raw = author.chunks()
    author.write_chunks([raw[0] + b"x", raw[1]])


@attack("has other bytes")
def a_chunk_that_is_shorter_than_its_tensor(author: Author) -> None:
    raw = author.chunks()
    author.write_chunks([raw[0][:-1], raw[1]])


@attack("has other bytes")
def chunks_that_changed_places(author: Author) -> None:
    raw = author.chunks()
    hashes = author.table()["hashes"]
    author.write_chunks([raw[0][:50] + raw[0][:50], raw[1]])
    author.table()["hashes"] = hashes


each(
    "a footer",
    "",
    {
        "of another attempt": lambda a: refoot(a, attempt="000000000001-0000000000000000-000001"),
        "of another rank": lambda a: refoot(a, writer=1),
        "of another number": lambda a: refoot(a, number=7),
        "that is a path": lambda a: refoot(a, attempt="../../etc"),
        "with offsets that overlap": lambda a: refoot(a, lengths=np.array([150, 206], "<u4").tobytes()),
        "with lengths beyond its pack": lambda a: refoot(a, lengths=np.array([2**32 - 1, 2**32 - 1], "<u4").tobytes()),
        "with lengths that wrap around": lambda a: refoot(a, lengths=np.array([2**32 - 1, 357], "<u4").tobytes()),
        "with a chunk too few": lambda a: refoot(
            a, lengths=np.array([356], "<u4").tobytes(), codecs=b"\0", hashes=bytes(32)
        ),
        "with columns of different lengths": lambda a: refoot(a, codecs=b"\0"),
        "with a codec nobody knows": lambda a: refoot(a, codecs=b"\0\7"),
        "with other hashes": lambda a: refoot(a, hashes=bytes(64)),
        "with an unknown field": lambda a: refoot(a, evil=1),
        "with a rank of true": lambda a: refoot(a, writer=True),
        "with a rank of 2^62": lambda a: refoot(a, writer=2**62),
        "cut off": lambda a: repacked(a, lambda data: data[:-1]),
        "with another magic": lambda a: repacked(a, lambda data: data[:-1] + b"2"),
        "longer than its pack": lambda a: repacked(a, lambda data: data[:-44] + b"\xff\xff\xff\x7f" + data[-40:]),
        "of no bytes": lambda a: repacked(a, lambda data: data[:-44] + bytes(4) + data[-40:]),
        "with one bit flipped": lambda a: repacked(a, lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]),
        "twice": lambda a: repacked(a, lambda data: data + data[356:]),
        "before a zip's end": lambda a: repacked(a, lambda data: data + b"PK\5\6" + bytes(18)),
    },
)


def refoot(author: Author, **fields: Any) -> None:
    data = b"".join(author.chunks())
    author.write_footer({**author.footer(), **fields}, data)


def repacked(author: Author, change: Callable[[bytes], bytes]) -> None:
    name = author.pack_name()
    author.packs[name] = change(author.packs[name])
    author.table()["packs"][0]["size"] = len(author.packs[name])


# --- expansion -----------------------------------------------------------------------------------------------------


@attack("", verify=0, declared_bytes=16 * MEBIBYTE)
def one_chunk_that_is_named_four_thousand_times(author: Author) -> None:
    author.one_tensor([4096, 4096])
    author.fill(4096, bytes(4096))


@attack("has not one entry for each of")
def a_tensor_of_a_GiB_that_no_table_describes(author: Author) -> None:
    author.one_tensor([2**18, 4096])


@attack("has not one entry for each of")
def a_tensor_of_40_GB_that_no_table_describes(author: Author) -> None:
    author.one_tensor([10**7, 4096])


@attack("chunks, at most")
def a_tensor_of_2_to_the_62_bytes(author: Author) -> None:
    author.one_tensor([2**62], writers=[[0, 2**50]])


@attack("does not fit into an array", error="LimitExceeded", verify=0)
def a_tensor_of_64_dimensions(author: Author) -> None:
    author.one_tensor([1] * 63 + [16])
    author.fill(1, bytes(16))


@attack("", verify=0)
def a_tensor_without_elements_and_with_large_sizes(author: Author) -> None:
    author.one_tensor([2**31, 0, 2**31], shard_keys=[], shard_offsets=[], shard_sizes=[], units=[], writers=[])
    author.write_chunks([])
    author.table()["packs"] = []


@attack("do not cover it exactly once", declared_bytes=64 * MEBIBYTE)
def twenty_thousand_boxes_that_are_hard_to_compare(author: Author) -> None:
    count = 20_000
    steps = range(count)
    author.one_tensor(
        [count, count],
        shard_keys=[0] * count,
        shard_offsets=[[step, step] for step in steps],
        shard_sizes=[[count - step, 1] for step in steps],
        units=[[step] for step in steps],
        writers=[],
    )


@attack("do not cover it exactly once", declared_bytes=64 * MEBIBYTE)
def boxes_that_are_hard_to_compare_and_of_the_right_size(author: Author) -> None:
    count = 12_000
    elements = count * (count + 1) // 2
    author.one_tensor(
        [count, (count + 1) // 2 * 2],
        shard_keys=[0] * (count + 1),
        shard_offsets=[*([step, step] for step in range(count)), [0, 0]],
        shard_sizes=[*([count - step, 1] for step in range(count)), [1, 1]],
        units=[[step] for step in range(count + 1)],
        writers=[],
    )
    missing = math.prod(author.layout["shapes"][0]) - elements
    author.layout["shard_sizes"][-1] = [missing // (count // 2), count // 2]
    whole = author.layout["shard_sizes"]
    rest = math.prod(author.layout["shapes"][0]) - sum(math.prod(sizes) for sizes in whole)
    author.layout["shard_keys"].append(0)
    author.layout["shard_offsets"].append([0, 0])
    author.layout["shard_sizes"].append([1, max(rest, 1)])
    author.layout["units"].append([count + 1])


def family(**changes: Any) -> dict[str, Any]:
    """One rank's, of one tensor."""
    mesh = {"sizes": [1], "start": 0, "strides": [1], "ranks": []}
    found = {"mesh": mesh, "sharded": [0], "tensors": [0], "splits": [[[0, 0]]], "counts": b"\1\0\0\0"}
    return {**found, **{key: value for key, value in changes.items() if key in found}} | {
        "mesh": {**mesh, **{key: value for key, value in changes.items() if key in mesh}}
    }


def ruled(author: Author, shape: list[int], families: list[dict[str, Any]], **columns: Any) -> None:
    """One tensor that a mesh holds by rule, or as many as ``columns`` say."""
    nothing: dict[str, Any] = {"shard_keys": [], "shard_offsets": [], "shard_sizes": [], "units": [], "writers": []}
    author.one_tensor(shape, **nothing, families=families, **columns)


@attack("", verify=0)
def a_tensor_that_a_mesh_holds(author: Author) -> None:
    ruled(author, [16], [family()])
    author.fill(1, bytes(16))


each(
    "a family with",
    "layouts/",
    {
        "a mesh of ranks that are not there": lambda a: ruled(a, [16], [family(start=1)]),
        "a mesh of 2^62 ranks": lambda a: ruled(a, [16], [family(sizes=[2**31, 2**31], strides=[0, 0])]),
        "a mesh of one rank many times": lambda a: ruled(
            a, [16], [family(sizes=[4], strides=[0], counts=bytes(16))], rank_nodes=[0] * 4
        ),
        "a stride of 2^62": lambda a: ruled(
            a, [16], [family(sizes=[2], strides=[2**62], counts=bytes(8))], rank_nodes=[0] * 2
        ),
        "a tensor of 2^62 bytes": lambda a: ruled(a, [2**62], [family(counts=b"\xff" * 4)]),
        "counts of other chunks": lambda a: ruled(a, [16], [family(counts=b"\2\0\0\0")]),
        "a tensor of another": lambda a: ruled(a, [16], [family()] * 2),
        "an empty list of others": lambda a: ruled(a, [16], []),
        "a field nobody knows": lambda a: ruled(a, [16], [{**family(), "order": 1}]),
    },
)


@attack("more than 4096 families", declared_bytes=32 * MEBIBYTE)
def very_many_families(author: Author) -> None:
    ruled(author, [16], [family()] * 20_000)


@attack("ways to split")
def a_family_of_very_many_different_shards(author: Author) -> None:
    count = 5_000
    names = sorted(f"w{number}" for number in range(count))
    one = family(
        sizes=[count], tensors=list(range(count)), splits=[[[0, 0]]] * count, counts=bytes(4 * count), strides=[1]
    )
    columns = {"keys": names, "owners": [-1] * count, "dtypes": ["uint8"] * count, "rank_nodes": [0] * count}
    ruled(author, [16], [one], **columns, shapes=[[1000 + number] for number in range(count)])


@attack("too many different sizes of shards", declared_bytes=64 * MEBIBYTE)
def families_of_many_tensors_of_different_shards(author: Author) -> None:
    count, ranks = 40_000, 2_000
    names = sorted(f"w{number:05}" for number in range(count))
    shapes = [[number] if number < 2_000 else [1] for number in range(count)]
    one = family(
        sizes=[ranks], tensors=list(range(count)), splits=[[[0, 0]]] * count, counts=bytes(4 * ranks), strides=[1]
    )
    columns = {"keys": names, "owners": [-1] * count, "dtypes": ["uint8"] * count, "rank_nodes": [0] * ranks}
    ruled(author, [16], [one], **columns, shapes=shapes)


@attack("", verify=0, declared_bytes=96 * MEBIBYTE)
def ten_thousand_ranks_on_one_node(author: Author) -> None:
    count = 10_000
    author.one_tensor([16], rank_nodes=[0] * count)
    author.fill(1, bytes(16))
    first = {**author.table(), "values": {}}
    empty = {**first, "packs": [], "pack": b"", "offset": b"", "length": b"", "codec": b"", "hashes": b""}
    author.parts[0]["tables"] = [first, *({**empty, "rank": rank} for rank in range(1, count))]


@attack("has not one entry for each of")
def tied_tensors_of_more_bytes_than_a_number_holds(author: Author) -> None:
    count = 14_000
    author.one_tensor(
        [10**7, 2**26],
        chunk_bytes=2**26,
        keys=sorted(f"w{number}" for number in range(count)),
        owners=[-1] * count,
        dtypes=["uint8"] * count,
        shapes=[[10**7, 2**26]] * count,
        aliases=[[number, 0] for number in range(1, count)],
    )


# --- what lies in the directory ------------------------------------------------------------------------------------


def on_disk(change: Callable[[Path], object]) -> Callable[[Author], object]:
    return lambda author: author.on_disk.append(change)


def in_place_of(label: str, put: Callable[[Path], object]) -> Callable[[Author], object]:
    """Removes an object and puts something else where it was. The object itself stays beside the repository."""

    def change(author: Author) -> None:
        def swap(directory: Path) -> None:
            path = directory / {
                "FORMAT": "FORMAT",
                "decision": names.decision(len(author.decisions)),
                "index": names.index(author.attempt),
                "part": names.part(author.attempt, 0),
                "pack": author.pack_name(),
                "decisions": "decisions",
                "packs": "packs",
                "attempts": "attempts",
                "layouts": "layouts",
            }.get(label, label)
            path = the_layout(author, directory) if label == "layout" else path
            path.rename(directory.parent / "moved")
            put(path)

        author.on_disk.append(swap)

    return change


def moved(path: Path) -> Path:
    return next(parent / "moved" for parent in path.parents if (parent / "moved").exists())


def to_outside(path: Path) -> None:
    """A link to the very object, outside: following it would restore the right bytes."""
    path.symlink_to(moved(path))


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        before = os.open(".", os.O_RDONLY)
        try:
            os.chdir(path.parent)  # the path of a socket has few bytes
            unix.bind(path.name)
        finally:
            os.fchdir(before)
            os.close(before)


def device(minor: int) -> Callable[[Path], object]:
    return lambda path: os.mknod(path, 0o600 | 0o020000, os.makedev(1, minor))


FOLDERS = ("decisions", "layouts", "attempts", "packs")
PLACES = ("FORMAT", "decision", "index", "layout", "part", "pack")
NO_FILES: dict[str, Callable[[Path], object]] = {
    "a link to the outside": to_outside,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a FIFO": os.mkfifo,
    "a socket": listening,
}
DEVICES = {"an endless device": device(5), "a random device": device(8), "a full device": device(7)}
REFUSED = "not a regular file|symbolic link"


def instead(what: str, place: str, put: Callable[[Path], object], says: str, error: str, **expected: Any) -> None:
    ATTACKS.append(Attack(f"{what} for {place}", in_place_of(place, put), says, error, **expected))


for place in PLACES:
    # It is the store that refuses; what cannot be read of a pack is damage of that pack.
    kind = "SnapshotDamaged" if place == "pack" else "StorageError"
    for what, put in NO_FILES.items():
        instead(what, place, put, REFUSED, kind, verify=(1, 14))
    for what, put in DEVICES.items():
        instead(what, place, put, REFUSED, kind, verify=(1, 14), need_root=True)
    if place not in ("FORMAT", "decision"):
        instead("a directory", place, os.mkdir, "is missing", "SnapshotDamaged")
for place in FOLDERS:
    kind = "SnapshotDamaged" if place == "packs" else "StorageError"
    instead("a link to the outside", place, to_outside, "symbolic link", kind, verify=(1, 14))
    instead("a link to itself", place, NO_FILES["a link to itself"], "symbolic link", kind, verify=(1, 14))
instead("a directory", "FORMAT", os.mkdir, "FORMAT object is missing", "RepositoryNotFound", verify=10)
instead("an empty directory", "decision", os.mkdir, "", "", verify=0)  # the history ends before it
instead("a FIFO", "decisions", os.mkfifo, "no snapshot", "SnapshotNotFound", verify=0)
each(
    "a directory with",
    "",
    {
        "a hard link to a file outside": in_place_of("pack", lambda path: os.link(moved(path), path)),
        "temporary files of dead writers": on_disk(
            lambda d: (d / "decisions" / ".000000000004.0123").write_bytes(b"x")
        ),
        "a FIFO that nobody names": on_disk(lambda d: os.mkfifo(d / "packs" / "fifo")),
        "a file that nobody names": on_disk(lambda d: (d / "packs" / "x.pack").write_bytes(b"x")),
        "names that are not to be printed": on_disk(lambda d: (d / "layouts" / ESCAPES).write_bytes(b"x")),
        "a way of a hundred directories": on_disk(lambda d: (d / "layouts").joinpath(*["d"] * 60).mkdir(parents=True)),
    },
    verify=0,
)
