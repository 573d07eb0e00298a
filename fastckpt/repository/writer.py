"""Writing a snapshot: chunks into packs, packs into parts, parts into an index, the index into the history.

Order is everything: packs, then parts, then layout and index, then the decision; each durable before the next begins.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastckpt.errors import AnotherWriter, FormatError, ObjectExists, OutOfSpace, SaveError, StorageError
from fastckpt.format import codec, document, names, pack
from fastckpt.format.chunk import HASH_BYTES, chunk_hash
from fastckpt.format.decision import Live
from fastckpt.format.roll import make_rolls
from fastckpt.format.tables import Index, PackInfo, Part, PartInfo, RankTable, RollInfo, ValueKind
from fastckpt.plan.placement import cut_runs
from fastckpt.repository.history import History, now
from fastckpt.storage.store import BLOCK_BYTES, ObjectWriter, Store
from fastckpt.trace import Trace

log = logging.getLogger("fastckpt")

PACK_BYTES_MAX = 1024 * 1024 * 1024
"""A stream starts a new pack when the current one would grow beyond this."""


class Batch(NamedTuple):
    """Rows that are copied into one buffer and written at once."""

    rows: range
    phase: int
    """Where in a block of its pack the first chunk is going to begin, if it is stored raw."""
    bytes: int


class ChunkWriter:
    """The packs of one rank in one attempt, and the table of what is in them."""

    def __init__(
        self,
        store: Store,
        attempt: str,
        rank: int,
        sizes: Sequence[int],
        codec_name: str,
        trace: Trace,
        stream_count: int = 1,
        batch_bytes: int = 0,
    ) -> None:
        """``sizes``: raw bytes of the chunk of each row of the table. Each stream gets a run of rows, of nearly equal
        bytes, and takes them in batches: rows that follow each other in a pack and have ``batch_bytes`` at most, or
        one."""
        self._store = store
        self.sizes = sizes
        self.attempt = attempt
        self._rank = rank
        self._codec = codec.CODECS[codec_name]
        self._trace = trace
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._packs: list[PackInfo] = []
        ends = itertools.accumulate(cut_runs(sizes, [1] * stream_count).tolist(), initial=0)
        runs = [range(first, end) for first, end in itertools.pairwise(ends)]
        self.streams = [PackStream(self, rows, batch_bytes) for rows in runs if rows]
        # Rows are written by whichever stream has the chunk, each once.
        self._pack = np.zeros(len(sizes), "<u4")
        self._offset = np.zeros(len(sizes), "<u8")
        self._length = np.zeros(len(sizes), "<u4")
        self._codecs = np.zeros(len(sizes), "u1")
        self._hashes = np.zeros((len(sizes), HASH_BYTES), "u1")
        self._stored: dict[int, bytes] = {}

    def table(self, values: Mapping[str, bytes]) -> RankTable:
        """The rank's table, once every stream is closed. ``values`` are digests by name."""
        with self._lock:
            order = sorted(range(len(self._packs)), key=lambda position: self._packs[position].name)
            renumbered = np.argsort(np.array(order, "<u4")).astype("<u4")
            return RankTable(
                rank=self._rank,
                packs=[self._packs[position] for position in order],
                pack=renumbered[self._pack].tobytes() if order else b"",
                offset=self._offset.tobytes(),
                length=self._length.tobytes(),
                codec=self._codecs.tobytes(),
                hashes=self._hashes.tobytes(),
                stored_hashes=b"".join(self._stored[row] for row in sorted(self._stored)),
                values=dict(values),
            )

    @property
    def stored_bytes(self) -> int:
        """Bytes of the finished packs."""
        with self._lock:
            return sum(info.size for info in self._packs)

    def abandon(self) -> None:
        """Gives up what is still being written. Finished packs stay until the attempt is known to be aborted."""
        for stream in self.streams:
            stream.abandon()

    def delete(self) -> bool:
        """Deletes the finished packs, and says whether all are gone. Only for an attempt whose ABORT is in the
        history."""
        with self._lock:
            packs = list(self._packs)
        try:
            for info in packs:
                self._store.delete(info.name)
        except StorageError:
            return False
        return True


class PackStream:
    """A sequence of packs written by one thread. After an error only ``abandon`` may follow."""

    def __init__(self, writer: ChunkWriter, rows: range, batch_bytes: int) -> None:
        self._writer = writer
        self._object: ObjectWriter | None = None
        self.batches: list[Batch] = []
        """What this stream is to write, in order."""
        # Stored raw, as most chunks are, it is known beforehand where each will be.
        self._expected = [0]
        """For each pack the bytes of its chunks."""
        first, batch = rows.start, 0
        for row in rows:
            size, packed = writer.sizes[row], self._expected[-1]
            is_new_pack = bool(packed) and packed + size > PACK_BYTES_MAX
            if batch and (is_new_pack or batch + size > batch_bytes):
                self.batches.append(Batch(range(first, row), (packed - batch) % BLOCK_BYTES, batch))
                first, batch = row, 0
            if is_new_pack:
                self._expected.append(0)
            self._expected[-1] += size
            batch += size
        if rows:
            self.batches.append(Batch(range(first, rows.stop), (self._expected[-1] - batch) % BLOCK_BYTES, batch))

    def write(self, batch: Batch, raw: memoryview) -> None:
        """Hashes, encodes and appends the chunks of a batch, which lie in ``raw`` one behind the other, and enters them
        in the table."""
        writer = self._writer
        ends = list(itertools.accumulate((writer.sizes[row] for row in batch.rows), initial=0))
        chunks = [raw[start:end] for start, end in itertools.pairwise(ends)]
        with writer._trace.span("hash", len(raw)):
            ids = [chunk_hash(chunk) for chunk in chunks]
        if writer._codec == codec.RAW:
            offset = self._append(raw)
            for row, at, chunk, chunk_id in zip(batch.rows, ends, chunks, ids, strict=False):
                self._enter(row, offset + at, len(chunk), codec.RAW, chunk_id)
            return
        for row, chunk, chunk_id in zip(batch.rows, chunks, ids, strict=True):
            with writer._trace.span("codec", len(chunk)):
                frame = codec.encode_zstd(chunk)
            if len(frame) < len(chunk):
                self._enter(row, self._append(frame), len(frame), codec.ZSTD, chunk_id)
                writer._stored[row] = chunk_hash(frame)
            else:  # what does not shrink is stored as it is
                self._enter(row, self._append(chunk), len(chunk), codec.RAW, chunk_id)

    def _append(self, stored: bytes | memoryview) -> int:
        """Where it begins in the current pack, or in a new one where it would grow too large."""
        if self._object is not None and self._bytes + len(stored) > PACK_BYTES_MAX:
            self.close()
        with self._writer._trace.span("write", len(stored)):
            if self._object is None:
                self._begin()
            assert self._object is not None
            return self._object.append(stored)

    def _enter(self, row: int, offset: int, length: int, kind: int, chunk_id: bytes) -> None:
        writer = self._writer
        writer._pack[row] = self._position
        writer._offset[row] = offset
        writer._length[row] = length
        writer._codecs[row] = kind
        writer._hashes[row] = np.frombuffer(chunk_id, "u1")
        self._bytes += length
        self._lengths.append(length)
        self._kinds.append(kind)
        self._ids.append(chunk_id)

    def close(self) -> None:
        """Closes the current pack, if any, with its footer and makes it durable."""
        if self._object is None:
            return
        writer = self._writer
        footer = pack.Footer(
            attempt=writer.attempt,
            writer=writer._rank,
            number=self._number,
            lengths=np.array(self._lengths, "<u4").tobytes(),
            codecs=bytes(self._kinds),
            hashes=b"".join(self._ids),
        )
        with writer._trace.span("sync"):
            self._object.append(pack.encode_footer(footer))
            size = self._object.finish()
        self._object = None
        with writer._lock:
            writer._packs[self._position] = PackInfo(self._name, size)

    def abandon(self) -> None:
        if self._object is not None:
            self._object.abandon()

    def _begin(self) -> None:
        writer = self._writer
        self._number = next(writer._numbers)
        self._name = names.pack(writer.attempt, writer._rank, self._number)
        expected = self._expected.pop(0) if writer._codec == codec.RAW and self._expected else 0
        self._object = writer._store.write(self._name, bytes_expected=expected)
        self._bytes = 0
        self._lengths: list[int] = []
        self._kinds: list[int] = []
        self._ids: list[bytes] = []
        with writer._lock:
            self._position = len(writer._packs)
            writer._packs.append(PackInfo(self._name, 0))


def write_part(
    store: Store, attempt: str, node: int, layout_digest: str, tables: Sequence[RankTable], blobs: Iterable[bytes]
) -> PartInfo:
    """Writes the part of a node, durably, and returns what the index says of it."""
    part = Part(
        attempt=attempt,
        node=node,
        layout=layout_digest,
        tables=sorted(tables, key=lambda table: table.rank),
        blobs=list(blobs),
    )
    data = document.pack_table(part)
    store.create(names.part(attempt, node), data)
    return PartInfo(node, document.digest(data), len(data))


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a snapshot is made of, at the moment of its commit."""

    attempt: str
    step: int
    layout: bytes
    """The layout object."""
    parts: Sequence[PartInfo]
    bytes: int
    stored_bytes: int
    values: dict[str, ValueKind] | None
    """As in ``Index``. None in a repository whose readers know neither these nor rolls."""
    environment: Mapping[str, Any]
    metrics: Mapping[str, float]
    note: str


class Committer:
    """The one who appends decisions for a job: its coordinator. Any thread may call; calls wait for each other."""

    def __init__(self, store: Store, format_digest: str = "") -> None:
        self._store = store
        self.format_digest = format_digest
        self._history = History(store, format_digest)
        self._lock = threading.RLock()
        self._counter = 0
        # Attempts that are to be aborted and cleaned away, which storage that fails may prevent for a while.
        self._unsettled: set[str] = set()
        # Attempts whose COMMIT was tried.
        self._submitted: set[str] = set()
        self._is_short_of_room = False
        self._layout_created = ""
        """The layout object that this committer knows to be durable: the one of the last commit."""
        self.writer = ""
        """The id of this writer once it is open."""

    def open(self) -> None:
        """Appends OPEN: from now on no earlier writer can commit."""
        with self._lock:
            self._history.load()
            self.writer = self._history.append_open()

    def next_attempt(self) -> str:
        """An attempt id that was never used. What earlier attempts left on a disk that was full goes first, since the
        next one may need the room."""
        with self._lock:
            for earlier in sorted(self._unsettled):
                with contextlib.suppress(StorageError):  # the one after tries again
                    self.abort(earlier)
            self._counter += 1
            return names.attempt(self.writer, self._counter)

    def commit(self, contents: Contents, trace: Trace) -> Live:
        """Makes the attempt a snapshot; its packs and parts are durable already. Raises what made it impossible, and
        then the attempt is aborted if the store still answers."""
        with self._lock:
            with trace.span("index"):
                layout_digest = self._create_layout(contents.layout)
                parts = sorted(contents.parts, key=lambda info: info.node)
                rolls = self._create_rolls(contents.attempt, parts) if contents.values is not None else []
                index = Index(
                    attempt=contents.attempt,
                    step=contents.step,
                    layout=layout_digest,
                    layout_bytes=len(contents.layout),
                    parts=[] if rolls else parts,
                    bytes=contents.bytes,
                    stored_bytes=contents.stored_bytes,
                    environment=dict(contents.environment),
                    values=contents.values,
                    rolls=rolls,
                )
                data = document.seal(index)
                self._store.create(names.index(contents.attempt), data)
            with trace.span("decision"):
                live = self._decide(contents, document.digest(data))
            metadata_bytes = len(data) + len(contents.layout) + sum(info.size for info in contents.parts)
            self._warn_if_short_of_room(contents.stored_bytes + metadata_bytes)
            return live

    def _create_rolls(self, attempt: str, parts: Sequence[PartInfo]) -> list[RollInfo]:
        """What the index says of the rolls of many nodes, which are durable then."""
        found: list[RollInfo] = []
        for roll in make_rolls(attempt, parts):
            data = document.pack_table(roll)
            self._store.create(names.roll(attempt, roll.number), data)
            found.append(RollInfo(document.digest(data), len(data)))
        return found

    def _decide(self, contents: Contents, index_digest: str) -> Live:
        self._submitted.add(contents.attempt)
        commit = self._history.append_commit(
            self.writer,
            lambda number: Live(
                step=contents.step,
                attempt=contents.attempt,
                decision=number,
                created=now(),
                bytes=contents.bytes,
                index=index_digest,
                metrics=dict(contents.metrics),
                note=contents.note,
            ),
        )
        self._submitted.discard(contents.attempt)
        return commit.snapshot

    def _warn_if_short_of_room(self, needed_bytes: int) -> None:
        """Says so once when another save of this size will not fit; again only after there has been room."""
        free_bytes = self._store.free_bytes()
        is_short = free_bytes is not None and free_bytes < needed_bytes
        if is_short and not self._is_short_of_room:
            log.warning(
                "%s: the next save will not fit: there is room for %d bytes, and the last one stored %d. Free space "
                "there, or have the job save elsewhere",
                self._store.url,
                free_bytes,
                needed_bytes,
            )
        self._is_short_of_room = is_short

    def abort(self, attempt: str) -> None:
        """Appends ABORT, so that the attempt's packs can be deleted by those who wrote them, and deletes its parts. A
        fenced writer's attempts need neither. If it fails, ``next_attempt`` tries again."""
        with self._lock:
            again = attempt in self._unsettled
            self._unsettled.add(attempt)
            try:
                self._history.append_abort(self.writer, attempt)
            except AnotherWriter:
                self._settled(attempt)
                return
            except OutOfSpace:
                if attempt in self._submitted:
                    raise  # until there is an ABORT, its COMMIT may come to light
                # Nobody else can commit it, and we never will: what it wrote makes room for the ABORT.
                self._delete_all(f"packs/{attempt}", f"attempts/{attempt}")
                self._history.append_abort(self.writer, attempt)
            if not self._history.committed(attempt):
                # Later on, those who wrote its packs have forgotten them.
                self._delete_all(f"attempts/{attempt}", *([f"packs/{attempt}"] if again else []))
            self._settled(attempt)

    def _settled(self, attempt: str) -> None:
        self._unsettled.discard(attempt)
        self._submitted.discard(attempt)

    def _delete_all(self, *prefixes: str) -> int:
        count = 0
        for prefix in prefixes:
            for info in list(self._store.list(prefix)):
                self._store.delete(info.name)
                count += 1
        return count

    def clean(self) -> int:
        """Deletes what uncommitted attempts and dead processes of earlier writers left behind; returns how much.

        Safe at any time after ``open``: those attempts can never commit, and later writers' are left alone.
        """
        with self._lock:
            self._history.refresh()
            own = names.writer_open_number(self.writer)
            committed = {snapshot.attempt for snapshot in self._history.live}
        deleted = 0
        for folder in ("packs", "attempts"):
            for child in list(self._store.children(folder)):
                try:
                    opened = names.writer_open_number(names.attempt_writer(child))
                except FormatError:
                    continue  # not ours to judge
                if opened >= own or child in committed:
                    continue
                deleted += self._delete_all(f"{folder}/{child}")
        return deleted + self._store.sweep(names.FOLDERS)

    def _create_layout(self, data: bytes) -> str:
        digest = document.digest(data)
        name = names.layout(digest)
        if name != self._layout_created:
            with contextlib.suppress(ObjectExists):
                self._store.create(name, data)
                self._layout_created = name
                return digest
        # Written by an earlier snapshot. A damaged one must not become part of this snapshot too.
        if self._store.read(name, size_max=document.TABLE_BYTES_MAX + 1024) != data:
            raise SaveError(
                f"{self._store.url}: {name} is damaged, and every snapshot of this layout needs it; "
                "run `fastckpt verify --all`, and save to a new repository"
            )
        self._layout_created = name
        return digest


@dataclass(frozen=True)
class Outcome:
    """What became of an attempt, as the history tells."""

    committed: Live | None
    aborted: bool
    fenced: bool
    """A later job has opened the repository: nothing of this writer can be committed any more."""


def outcome(store: Store, attempt: str, format_digest: str = "") -> Outcome:
    """Reads the history to learn what became of an attempt."""
    history = History(store, format_digest)
    history.load()
    live = next((snapshot for snapshot in history.live if snapshot.attempt == attempt), None)
    # ABORTs before the last list of live snapshots are not read by load(): look for them only when it matters.
    if live is None and not history.aborted(attempt):
        history = History(store, format_digest)
        history.refresh()
    if live is not None:
        history.confirm(live.decision)
    return Outcome(live, history.aborted(attempt), history.fenced(names.attempt_writer(attempt)))
