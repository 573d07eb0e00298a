"""Reading chunks: from storage to sinks. No byte reaches a sink before it is verified.

each of a few workers, until there is nothing left to do:
    what another rank of the node has read for this one  ->  place it           (``relay``; only in a restore)
    what this rank is to read for others too             ->  read, verify, decode, pass on, place
    what it reads for itself                             ->  read, verify, decode, place
each of a few others, which may have to wait for other nodes:
    what a rank of another node has read for this one    ->  fetch, verify, pass on, place
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from fastckpt.buffers import Pool, Sink, in_pages
from fastckpt.errors import FormatError, ObjectNotFound, RestoreError, SaveError, SnapshotDamaged, StorageError
from fastckpt.format import codec
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.tables import ChunkPlace, Chunks
from fastckpt.plan.restore_plan import ChunkRead, regions
from fastckpt.storage.deadline import run_workers
from fastckpt.storage.store import BLOCK_BYTES, Store
from fastckpt.trace import Trace

READ_BYTES_MAX = 8 * 1024 * 1024
"""Neighbouring chunks are read together up to this many bytes, of which ``READ_THREADS`` buffers are enough for every
storage that was measured; more only take memory, which is slow where it is fresh."""
READ_THREADS = 4
FETCH_THREADS = 4
GAP_BYTES_MAX = 64 * 1024
"""So much that nobody wants is read along rather than asking twice, as long as it is a small part of what is read."""
GAP_SHARE = 1 / 32
POLL_SECONDS = 0.001
"""How long a worker that has nothing to do waits before it looks again what other ranks have done."""
_MOMENT_SECONDS = 0.25


class PlacedChunk(NamedTuple):
    """A chunk to read, and where it lies."""

    read: ChunkRead
    place: ChunkPlace


@dataclass(frozen=True)
class Run:
    """Chunks of one pack that are read together."""

    pack: str
    offset: int
    length: int
    chunks: tuple[PlacedChunk, ...]

    @property
    def raw_bytes(self) -> int:
        return sum(chunk.read.raw_bytes for chunk in self.chunks)

    @property
    def is_raw(self) -> bool:
        """Whether the bytes of all chunks are stored as they are."""
        return all(chunk.place.codec == codec.RAW for chunk in self.chunks)

    def in_buffer(self, buffer: memoryview) -> memoryview:
        """Where in a buffer the stored bytes go: at the same place in a block as in the pack, so that storage can bring
        them there itself."""
        start = self.offset % BLOCK_BYTES
        return buffer[start : start + self.length]

    def raw_views(self, buffer: memoryview) -> list[memoryview]:
        """Where in a buffer that ranks share the raw bytes of each chunk are: as they were read, or else one behind the
        other."""
        if self.is_raw:
            stored = self.in_buffer(buffer)
            starts = [place.offset - self.offset for _, place in self.chunks]
            return [stored[at : at + read.raw_bytes] for at, (read, _) in zip(starts, self.chunks, strict=True)]
        ends = list(itertools.accumulate(read.raw_bytes for read, _ in self.chunks))
        return [buffer[end - read.raw_bytes : end] for end, (read, _) in zip(ends, self.chunks, strict=True)]

    @property
    def buffer_bytes(self) -> int:
        """Of a buffer for the stored bytes, and for the raw ones too."""
        return in_pages(max(self.length, self.raw_bytes) + BLOCK_BYTES - 1)


def runs_of(chunks: Iterable[PlacedChunk]) -> list[Run]:
    """The runs in which chunks are read, in the order in which they are stored."""
    runs: list[Run] = []
    mine: list[PlacedChunk] = []
    pack, start, end, raw_bytes, gap_bytes = "", 0, 0, 0, 0

    def close() -> None:
        if mine:
            runs.append(Run(pack, start, end - start, tuple(mine)))

    for chunk in sorted(chunks, key=lambda chunk: (chunk.place.pack, chunk.place.offset)):
        place = chunk.place
        gap = max(0, place.offset - end)
        stop = max(end, place.offset + place.length)
        raw_bytes += chunk.read.raw_bytes
        if (
            place.pack == pack
            and max(stop - start, raw_bytes) <= READ_BYTES_MAX
            and gap <= GAP_BYTES_MAX
            and gap_bytes + gap <= (end - start) * GAP_SHARE
        ):
            mine.append(chunk)
            end, gap_bytes = stop, gap_bytes + gap
            continue
        close()
        mine = [chunk]
        pack, start, end = place.pack, place.offset, place.offset + place.length
        raw_bytes, gap_bytes = chunk.read.raw_bytes, 0
    close()
    return runs


class Passed(NamedTuple):
    """A run that another rank has read for this one."""

    reader: int
    slot: int
    number: int
    run: Run
    buffer: memoryview
    """Holds the raw bytes of its chunks, verified."""


class Passing(NamedTuple):
    """A run that this rank is to read, or to fetch, for others and for itself."""

    slot: int
    number: int
    run: Run
    buffer: memoryview


class Fetch(NamedTuple):
    """Fills buffers with the raw bytes of a run's chunks, as a rank of another node has read them."""

    source: int
    """That rank."""
    call: Callable[[Sequence[memoryview]], None]


class Relay(Protocol):
    """What the ranks of a node, and nodes, read for each other, as one rank sees it. One thread calls at a time."""

    passing_runs: Sequence[Run]
    """All that this rank is to read and pass on."""
    passed_count: int
    """How many runs this rank is passed."""
    fetched_count: int
    """How many runs this rank fetches from ranks of other nodes."""
    seconds_max: float
    """How long this rank waits for others while it has nothing to do."""

    def next(self) -> Passed | Passing | None:
        """Something to do, which is then the caller's; None if there is nothing now. ``CommitTimeout`` if another rank
        has given up."""

    def next_fetch(self) -> tuple[Passing, Fetch] | None:
        """A run to fetch, which is then the caller's; None if there is no room for it now, or none left."""

    @property
    def all_fetched(self) -> bool:
        """Whether there is no run left to fetch."""

    @property
    def finished(self) -> bool:
        """Whether nothing more will come, and others have what this rank read for them."""

    @property
    def progress(self) -> int:
        """Changes whenever others have taken something that they wait for, and no worker here had a part in it."""

    def publish(self, task: Passing) -> None:
        """The raw bytes of its chunks are in its buffer, as ``raw_views`` has them, and verified."""

    def done(self, task: Passed | Passing) -> None:
        """This rank needs the buffer no more."""

    def raise_late(self) -> None:
        """``CommitTimeout`` naming the ranks that are waited for."""

    def give_up(self, error: BaseException) -> None:
        """Tells the other ranks that nothing more will come from this one."""


class ChunkReader:
    """Reads some chunks of one snapshot into sinks, once."""

    def __init__(self, store: Store, step: int, chunks: Chunks, sinks: Sequence[Sink], trace: Trace) -> None:
        self._store = store
        self._step = step
        self._chunks = chunks
        self._layout = chunks.layout
        self._sinks = sinks
        self._trace = trace
        self._alone: deque[Run] = deque()
        self._relay: Relay | None = None
        self._pool: Pool | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._at_work = 0
        """Workers that have something to do."""
        self._placing = 0
        """Those of them that are filling sinks."""
        self._idle_seconds = 0.0
        """For how long no worker has had anything to do."""
        self._looked = 0.0
        self._progress = 0

    def read(self, chunks: Iterable[PlacedChunk], relay: Relay | None = None) -> None:
        """Reads ``chunks``, and does what ``relay`` has to do, on ``READ_THREADS`` threads; each has a buffer of
        ``READ_BYTES_MAX``, or of one chunk if that is larger. What comes from other nodes is fetched on
        ``FETCH_THREADS`` more. When this has raised, nothing is placed any more.

        ``RestoreError`` if there is no memory for the buffers.
        """
        self._alone.extend(runs_of(chunks))
        self._relay = relay
        # What is stored compressed is decoded from a worker's own buffer into the one that other ranks see.
        decoded = (run for run in (relay.passing_runs if relay else ()) if not run.is_raw)
        fetches = relay.fetched_count if relay else 0
        tasks = len(self._alone) + fetches + (len(relay.passing_runs) + relay.passed_count if relay else 0)
        workers = min(READ_THREADS, tasks)
        fetchers = min(FETCH_THREADS, fetches)
        try:
            self._make_pool(max((run.buffer_bytes for run in (*self._alone, *decoded)), default=0), workers)
            self._looked = time.monotonic()
            run_workers(self._store, [self._work] * workers + [self._fetch_all] * fetchers, "fastckpt-read")
        except BaseException as error:
            self._stop(error)
            with self._changed:  # also a worker that was left behind in the storage may be back by now
                self._changed.wait_for(lambda: not self._placing)
            raise
        finally:
            if self._pool is not None:
                self._pool.close()  # what a worker that was left behind still uses goes with it

    def _make_pool(self, slot_bytes: int, count: int) -> None:
        if slot_bytes:
            try:
                self._pool = Pool(slot_bytes, count)
            except SaveError as error:
                raise RestoreError(
                    f"step {self._step}: cannot get {slot_bytes * count} bytes of memory to read into: "
                    f"{error.__cause__}; raise the limits on memory and open files that the job runs under"
                ) from error.__cause__

    def _stop(self, error: BaseException) -> None:
        """Nothing more is begun."""
        with self._changed:
            if not self._stopped and self._relay is not None:
                self._relay.give_up(error)
            self._stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        slot = None if self._pool is None else self._pool.take()
        try:
            while (task := self._claim()) is not None:
                self._do(task, slot.view if slot is not None else memoryview(b""))
                with self._changed:
                    self._at_work -= 1
                    self._changed.notify_all()
        except BaseException as error:
            self._stop(error)
            raise

    def _fetch_all(self) -> None:
        """Apart from the others, who must not wait for other nodes: these may be waiting for what is taken here."""
        try:
            while (task := self._claim_fetch()) is not None:
                self._fetch_run(*task)
                with self._changed:
                    self._idle_seconds = 0.0
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                if self._stopped:  # which is what ended the fetch; why, another worker tells
                    return
            self._stop(error)
            raise

    def _claim_fetch(self) -> tuple[Passing, Fetch] | None:
        with self._changed:
            relay = self._relay
            while relay is not None and not self._stopped and not relay.all_fetched:
                if (task := relay.next_fetch()) is not None:
                    return task
                self._changed.wait(POLL_SECONDS)
            return None

    def _fetch_run(self, task: Passing, fetch: Fetch) -> None:
        shared = task.run.raw_views(task.buffer)
        with self._trace.span("fetch", task.run.raw_bytes):
            fetch.call(shared)
        for (_, place), raw in zip(task.run.chunks, shared, strict=True):
            if self._hash(raw) != place.hash:
                raise RestoreError(
                    f"step {self._step}: what rank {fetch.source} read of {place.pack} at offset {place.offset} came "
                    "here with other bytes: the memory of a node, or the network between them, is not to be trusted"
                )
        self._publish(task, shared)

    def _claim(self) -> Run | Passed | Passing | None:
        """Something to do; waits for it. None if there is nothing left."""
        with self._changed:
            while not self._stopped:
                task: Run | Passed | Passing | None = None if self._relay is None else self._relay.next()
                if task is None and self._alone:
                    task = self._alone.popleft()
                if task is not None:
                    self._at_work += 1
                    return task
                if self._relay is None or self._relay.finished:
                    return None
                self._check_idle(self._relay)
                self._changed.wait(POLL_SECONDS)
            return None

    def _check_idle(self, relay: Relay) -> None:
        now = time.monotonic()
        is_busy, self._progress = self._at_work or relay.progress != self._progress, relay.progress
        # No more than a moment each time: while this process was stopped, it could not see what others did.
        self._idle_seconds = 0.0 if is_busy else self._idle_seconds + min(now - self._looked, _MOMENT_SECONDS)
        self._looked = now
        if self._idle_seconds > relay.seconds_max:
            relay.raise_late()

    def _do(self, task: Run | Passed | Passing, buffer: memoryview) -> None:
        if isinstance(task, Run):
            self._place(task, self._read_run(task, buffer))
        elif isinstance(task, Passed):
            # Verified by its reader, which is as good as verified here: a process of the same user and job.
            with self._trace.span("shared", task.run.raw_bytes):
                self._place(task.run, task.run.raw_views(task.buffer))
            self._done(task)
        else:
            self._pass_on(task, buffer)

    def _pass_on(self, task: Passing, buffer: memoryview) -> None:
        run = task.run
        shared = run.raw_views(task.buffer)
        if run.is_raw:
            self._read_run(run, task.buffer)
        else:
            for view, raw in zip(shared, self._read_run(run, buffer), strict=True):
                np.copyto(np.frombuffer(view, np.uint8), np.frombuffer(raw, np.uint8))
        self._publish(task, shared)

    def _publish(self, task: Passing, shared: Sequence[memoryview]) -> None:
        with self._changed:
            if self._stopped or self._relay is None:
                return
            self._relay.publish(task)
        self._place(task.run, shared)
        self._done(task)

    def _done(self, task: Passed | Passing) -> None:
        with self._changed:
            if self._relay is not None and not self._stopped:
                self._relay.done(task)

    def _read_run(self, run: Run, buffer: memoryview) -> list[memoryview]:
        """The raw bytes of each chunk, verified; those stored as they are lie in ``buffer``."""
        stored = run.in_buffer(buffer)
        with self._trace.span("read", run.length):
            self._fetch(run, stored)
        starts = [chunk.place.offset - run.offset for chunk in run.chunks]
        return [
            self._verified(read, place, stored[at : at + place.length])
            for at, (read, place) in zip(starts, run.chunks, strict=True)
        ]

    def _fetch(self, run: Run, buffer: memoryview) -> None:
        read, place = run.chunks[0]
        try:
            self._store.read_into(run.pack, run.offset, buffer)
        except ObjectNotFound as error:
            raise self._damage(read, place, "is missing") from error
        except StorageError as error:
            if error.transient:
                raise
            raise self._damage(read, place, f"cannot be read ({error})") from error

    def _verified(self, read: ChunkRead, place: ChunkPlace, stored: memoryview) -> memoryview:
        """The raw bytes of a chunk from its stored ones; ``SnapshotDamaged`` unless they are what was saved."""
        if place.codec == codec.RAW:
            if place.length != read.raw_bytes or self._hash(stored) != place.hash:
                raise self._damage(read, place, "has other bytes than were saved")
            return stored
        if self._hash(stored) != place.stored_hash:
            raise self._damage(read, place, "has other bytes than were saved")
        try:
            with self._trace.span("decode", read.raw_bytes):
                raw = memoryview(codec.decode_zstd(stored, read.raw_bytes, place.pack))
        except FormatError as error:
            raise self._damage(read, place, str(error)) from error
        if self._hash(raw) != place.hash:
            raise self._damage(read, place, "decodes to other bytes than were saved")
        return raw

    def _hash(self, data: memoryview) -> bytes:
        with self._trace.span("verify", len(data)):
            return chunk_hash(data)

    def _damage(self, read: ChunkRead, place: ChunkPlace, what: str) -> SnapshotDamaged:
        if read.deliveries:
            shard, shard_box = read.deliveries[0].piece.shard, read.deliveries[0].shard
        else:  # only other ranks want it
            unit = self._chunks.unit_at(read.chunk)
            shard = self._chunks.pieces(unit)[read.chunk - unit.first][0].shard
            shard_box = self._layout.box(shard)
        key, box = self._layout.label(self._layout.shard_key(shard)), str(shard_box)
        return SnapshotDamaged(
            f"step {self._step}: {key} {box}: {place.pack} {what} at offset {place.offset} ({place.length} bytes). "
            "Nothing of it was used. Restore an earlier step, or run `fastckpt verify` to see what else is damaged",
            key=key,
            shard=box,
            object=place.pack,
            offset=place.offset,
        )

    def _place(self, run: Run, raws: Sequence[memoryview]) -> None:
        with self._changed:
            if self._stopped:
                return
            self._placing += 1
        try:
            for (read, _), raw in zip(run.chunks, raws, strict=True):
                with self._trace.span("place", len(raw)):
                    self._deliver(read, raw)
        finally:
            with self._changed:
                self._placing -= 1
                self._changed.notify_all()

    def _deliver(self, read: ChunkRead, raw: memoryview) -> None:
        for delivery in read.deliveries:
            piece, shard, sink = delivery.piece, delivery.shard, self._sinks[delivery.target]
            size = self._layout.item_bytes(piece.shard)
            if shard == delivery.box and piece.stop - piece.start == shard.elements:
                sink.place(shard.offsets, shard.sizes, raw[piece.byte : piece.byte + shard.elements * size])
                continue
            for region, run, at in regions(shard, piece, delivery.box):
                start = piece.byte + at * size
                data = raw[start : start + run.elements * size]
                if region != run:
                    elements = np.frombuffer(data, np.dtype((np.void, size))).reshape(run.sizes)
                    cut = np.ascontiguousarray(elements[region.relative_to(run).slices()])
                    data = memoryview(cut.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
                sink.place(region.offsets, region.sizes, data)
