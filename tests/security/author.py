"""Writes repositories as their author chooses. Whoever publishes a checkpoint decides on every byte of it, so after a
change all digests are made to fit again, up to the history: what is refused then is refused for what it says.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np

from fastckpt import save
from fastckpt.format import document, names, pack
from fastckpt.format.chunk import HASH_BYTES, chunk_hash
from fastckpt.format.codec import RAW
from fastckpt.format.decision import decode_decision
from fastckpt.format.tables import Chunks, Layout
from fastckpt.options import Options
from fastckpt.plan.value_kinds import find_differences, value_kinds
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.repository import Repository
from fastckpt.storage.memory import MemoryStore
from tests.crash.numpy_job import CHUNK_BYTES, Job, tiny_spec
from tests.crash.volatile_store import BYTES_MAX
from tests.property.metadata_objects import close, seal, table, tree_of

SIZE = 2
SPEC = tiny_spec(SIZE)
OLD, NEW = 1, 2
"""Steps of the two snapshots. The newer one is what authors change."""

Change = Callable[[bytes], bytes]
COLUMNS = {"pack": "<u4", "offset": "<u8", "length": "<u4", "codec": "u1"}


def written() -> dict[str, bytes]:
    """The objects of a valid repository, written by two ranks on two nodes."""
    store = MemoryStore("job")
    options = Options(chunk_bytes=CHUNK_BYTES, codec="raw")
    with mock.patch.object(save, "STREAMS", 1):  # all that a rank writes in one pack
        job = Job([store] * SIZE, spec=SPEC, nodes=("a", "b"), options=options).run([OLD, NEW])
    assert job.reported == {OLD, NEW}, job.outcomes
    return {info.name: store.read(info.name, size_max=BYTES_MAX) for info in store.list("")}


class Author:
    """A repository as trees of maps, lists and leaves. ``objects`` makes digests and sizes fit where they are None, and
    what the index says of values where it was not changed."""

    def __init__(self, valid: dict[str, bytes]) -> None:
        self.valid = valid
        store = MemoryStore("valid")
        for name, data in valid.items():
            store.create(name, data)
        repository = Repository(store)
        snapshot: Snapshot = repository.snapshot(NEW)
        self.attempt = snapshot.attempt
        self.writer = names.attempt_writer(self.attempt)
        self.format: Any = tree_of(repository.format)
        self.index: Any = {**tree_of(snapshot.index), "layout": None, "layout_bytes": None, "environment": {}}
        self._valid_kinds = dict(self.index["values"])
        self.layout: Any = tree_of(snapshot.layout)
        self.parts: list[Any] = [{**tree_of(snapshot.part(node)), "layout": None} for node in range(SIZE)]
        for info in self.index["parts"]:
            info.update(digest=None, size=None)
        self.decisions: list[Any] = []
        for number in itertools.count(1):
            if names.decision(number) not in valid:
                break
            decision = tree_of(decode_decision(valid[names.decision(number)], number))
            decision["previous"] = None
            for live in self._lives(decision):
                live["index"] = None
            self.decisions.append(decision)
        self.others = {name: data for name, data in valid.items() if not self._is_mine(name)}
        self.packs = {name: data for name, data in valid.items() if name.startswith(f"packs/{self.attempt}/")}
        self.contents: dict[str, Change] = {}
        """What is done to the content of an object before it is closed: JSON or msgpack. By label."""
        self.stored: dict[str, Change] = {}
        """What is done to an object, before its digest is taken. By label: ``FORMAT``, ``decision``, ``layout``,
        ``index``, ``part`` (the newest or first of its kind), or the object's name."""
        self.extra: dict[str, bytes | None] = {}
        """Objects added, replaced or (None) left out in the end, whatever digests say."""
        self.on_disk: list[Callable[[Path], object]] = []
        """What is done to the directory in the end."""

    def _is_mine(self, name: str) -> bool:
        return name.startswith(("FORMAT", "decisions/", "layouts/")) or name.split("/")[1] == self.attempt

    def _lives(self, decision: Any) -> list[Any]:
        live = decision["live"] if isinstance(decision["live"], list) else ()
        lives = [*live, *([decision["snapshot"]] if "snapshot" in decision else [])]
        return [live for live in lives if live["attempt"] == self.attempt]

    # What authors change.

    @property
    def commit(self) -> Any:
        """The newest decision."""
        return self.decisions[-1]

    def label(self, **changes: Any) -> None:
        """Changes what the newest snapshot is labelled with, in its COMMIT and in all lists."""
        for decision in self.decisions:
            for live in self._lives(decision):
                live.update(changes)

    def table(self, rank: int = 0) -> Any:
        return self.parts[rank]["tables"][0]

    def cell(self, column: str, row: int, number: int, rank: int = 0) -> None:
        """Changes one number of a rank's table."""
        numbers = np.frombuffer(self.table(rank)[column], COLUMNS[column]).copy()
        numbers[row] = number
        self.table(rank)[column] = numbers.tobytes()

    def pack_name(self, rank: int = 0) -> str:
        return str(self.table(rank)["packs"][0]["name"])

    def chunks(self, rank: int = 0) -> list[bytes]:
        """The stored bytes of a rank's chunks."""
        columns = {name: np.frombuffer(self.table(rank)[name], kind) for name, kind in COLUMNS.items()}
        data = self.packs[self.pack_name(rank)]
        return [data[int(o) : int(o) + int(n)] for o, n in zip(columns["offset"], columns["length"], strict=True)]

    def write_chunks(
        self, stored: list[bytes], raw: list[bytes] | None = None, codecs: bytes = b"", rank: int = 0
    ) -> None:
        """Writes a rank's pack and table anew. ``raw``: what the chunks claim to decode to."""
        codecs = codecs or bytes(len(stored))
        rank_table, raw = self.table(rank), raw or stored
        lengths = np.array([len(chunk) for chunk in stored], "<u4")
        hashes = b"".join(chunk_hash(chunk) for chunk in raw)
        rank_table["length"] = lengths.tobytes()
        rank_table["offset"] = (np.cumsum(lengths, dtype="<u8") - lengths).astype("<u8").tobytes()
        rank_table["pack"] = bytes(4 * len(stored))
        rank_table["codec"], rank_table["hashes"] = codecs, hashes
        rank_table["stored_hashes"] = b"".join(
            chunk_hash(chunk) for chunk, kind in zip(stored, codecs, strict=True) if kind != RAW
        )
        footer = {"attempt": self.attempt, "writer": rank, "number": 0}
        footer |= {"lengths": lengths.tobytes(), "codecs": codecs, "hashes": hashes}  # type: ignore[dict-item]
        self.write_footer(footer, b"".join(stored), rank)

    def write_footer(self, footer: Any, data: bytes, rank: int = 0) -> None:
        name = self.pack_name(rank)
        self.packs[name] = data + close(msgspec.msgpack.encode(footer))
        self.table(rank)["packs"] = [{"name": name, "size": len(self.packs[name])}]

    def footer(self, rank: int = 0) -> Any:
        data = self.packs[self.pack_name(rank)]
        size = pack.footer_bytes(data[-pack.TRAILER_BYTES :], len(data), "x")
        end = len(data) - pack.TRAILER_BYTES
        return tree_of(pack.decode_footer(data[end - size : end], data[end:], end - size, "x"))

    def one_tensor(
        self, shape: list[int], dtype: str = "uint8", *, chunk_bytes: int = CHUNK_BYTES, **columns: Any
    ) -> None:
        """Another layout: one tensor, one rank, one shard; its table has one row until ``fill`` writes another."""
        self.layout = {
            **self.layout,
            "chunk_bytes": chunk_bytes,
            "keys": ["w"],
            "owners": [-1],
            "dtypes": [dtype],
            "shapes": [shape],
            "aliases": [],
            "shard_keys": [0],
            "shard_offsets": [[0] * len(shape)],
            "shard_sizes": [shape],
            "units": [[0]],
            "writers": [[0, 1]],
            "rank_nodes": [0],
            **columns,
        }
        if "writers" not in columns:
            self.layout["writers"] = [[0, len(Chunks(msgspec.convert(self.layout, Layout)))]]
        self.parts, self.index["parts"] = self.parts[:1], self.index["parts"][:1]
        self.write_chunks([b"x"])

    def fill(self, count: int, raw: bytes, stored: bytes | None = None, codec: int = RAW) -> None:
        """A table of ``count`` rows which all name one and the same chunk."""
        stored = raw if stored is None else stored
        self.write_chunks([stored], [raw], bytes([codec]))
        for column in ("pack", "offset", "length", "codec", "hashes", "stored_hashes"):
            self.table()[column] *= count
        assert len(self.table()["hashes"]) == count * HASH_BYTES

    # Writing.

    def objects(self) -> dict[str, bytes]:
        """All objects, from packs up to the history."""
        found = {**self.others, **self.packs}

        def put(label: str, name: str, content: bytes, close_content: Change) -> bytes:
            changed = self.contents.get(label, bytes)(content)
            data = found[name] = self.stored.get(label, bytes)(close_content(changed))
            return data

        layout = put("layout", "layout", msgspec.msgpack.encode(self.layout), table)
        digest = document.digest(layout)
        found[names.layout(digest)] = found.pop("layout")
        for node, part in enumerate(self.parts):
            data = put(
                "part" if node == 0 else f"part-{node}",
                names.part(self.attempt, node),
                msgspec.msgpack.encode(_filled(part, layout=digest)),
                table,
            )
            if node < len(self.index["parts"]) and isinstance(self.index["parts"][node], dict):
                info = self.index["parts"][node]
                self.index["parts"][node] = _filled(info, digest=document.digest(data), size=len(data))
        index = _filled(self.index, layout=digest, layout_bytes=len(layout))
        values = index.get("values")
        if isinstance(values, dict) and list(values.items()) == list(self._valid_kinds.items()):
            with contextlib.suppress(LookupError, TypeError, AttributeError):  # tables that are none are refused anyway
                index["values"] = self._kinds()
        data = put("index", names.index(self.attempt), msgspec.json.encode(index), seal)
        above = put("FORMAT", names.FORMAT, msgspec.json.encode(self.format), seal)
        for number, decision in enumerate(self.decisions, 1):
            for live in self._lives(decision):
                live.update(_filled(live, index=document.digest(data)))
            label = "decision" if decision is self.commit else f"decision-{number}"
            content = msgspec.json.encode(_filled(decision, previous=document.digest(above)))
            above = put(label, names.decision(number), content, seal)
        # The snapshot before needs its own layout, if that is another one.
        found |= {name: data for name, data in self.valid.items() if name.startswith("layouts/") and name not in found}
        for name, replaced in self.extra.items():
            found.pop(name, None)
            if replaced is not None:
                found[name] = replaced
        return found

    def _kinds(self) -> dict[str, str]:
        """What an index rightly says of the values in the tables as they are now."""
        tables = [rank_table["values"] for part in self.parts for rank_table in part["tables"]]
        first = sorted(tables[0].items())
        return {**value_kinds([name for name, _ in first], [find_differences(first, tables)])}

    def write(self, directory: Path) -> None:
        for name, data in self.objects().items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(data)
        for change in self.on_disk:
            change(directory)


def _filled(tree: Any, **digests: Any) -> Any:
    return {**tree, **{key: found for key, found in digests.items() if tree.get(key, "") is None}}
