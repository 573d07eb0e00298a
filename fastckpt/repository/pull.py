"""Pulling a rank's chunks from where they are into its packs.

for each stream of packs, a worker:  copy -> hash -> codec -> write, batch by batch
beside them, one more:               copies batches ahead of the workers, as long as there is memory to spare

A worker that comes to a batch nobody has copied yet copies it itself, and hashes and writes it while it is in the
cache: that is how it goes with little memory. With much, live tensors are let go of as fast as memory can be copied.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

from fastckpt.buffers import Pool, Slot, in_pages
from fastckpt.errors import AttemptAborted
from fastckpt.repository.writer import Batch, ChunkWriter, PackStream
from fastckpt.storage.deadline import run_workers
from fastckpt.storage.store import BLOCK_BYTES, Store
from fastckpt.trace import Trace

BATCH_BYTES = 8 * 1024 * 1024
"""Chunks are copied and written together up to this many bytes: most tensors have one chunk, and a small one."""


def slot_bytes(size: int) -> int:
    """Of the buffer for ``size`` bytes, wherever in a block of a pack they begin."""
    return in_pages(size + BLOCK_BYTES - 1)


def pool_bytes(sizes: Sequence[int], streams: int) -> int:
    """Memory with which all chunks of these sizes can be copied ahead of ``streams`` workers."""
    batch_bytes = min(sum(sizes), max(BATCH_BYTES, max(sizes, default=1)))
    return sum(map(slot_bytes, sizes)) + streams * slot_bytes(batch_bytes)


def streams_of(sizes: Sequence[int], streams_max: int, pool: Pool) -> int:
    """How many streams there is work, and a buffer each, for."""
    return min(streams_max, len(sizes), pool.bytes // slot_bytes(max(sizes, default=1)))


def batch_bytes_of(streams: int, pool: Pool) -> int:
    """How large batches may be: the workers' own buffers are to leave half of the pool for what is copied ahead."""
    return min(BATCH_BYTES, pool.bytes // (2 * max(1, streams)) - BLOCK_BYTES)


class Pull:
    """One attempt's chunks on their way, each copied once, by whoever comes to it first.

    With a pool of one buffer there is one stream, and chunks are copied one after the other in the order of rows.
    """

    def __init__(
        self,
        writer: ChunkWriter,
        pool: Pool,
        trace: Trace,
        *,
        fill: Callable[[int, memoryview], None],
        begin: Callable[[], None],
        on_copied: Callable[[], None],
        on_let_go: Callable[[], None],
    ) -> None:
        """``fill`` copies the chunk of a row; ``begin`` is called before the first byte is written, ``on_copied`` after
        the last chunk was copied, and ``on_let_go`` once, when no chunk is going to be copied any more, be it for a
        failure."""
        self._writer = writer
        self._pool = pool
        self._trace = trace
        self._fill = fill
        self._begin = _Once(begin)
        self._on_copied = on_copied
        self._on_let_go = _Once(on_let_go)
        self._changed = threading.Condition()
        self._claimed: set[Batch] = set()
        """What somebody copies, or has."""
        self._copies: dict[Batch, Slot] = {}
        """Made ahead, and not yet taken by a worker."""
        self._left = sum(len(stream.batches) for stream in writer.streams)
        """Batches not copied."""
        self._copying = 0
        """Copies under way."""
        self._failure: BaseException | None = None
        self._stopped = False
        # Taken before anything is copied ahead: a worker never waits for memory that copies for later are in.
        self._own: list[Slot] = []
        try:
            for stream in writer.streams:
                self._own.append(pool.take(slot_bytes(max(batch.bytes for batch in stream.batches))))
        except BaseException:  # the fence gave the attempt up: the memory is wanted whole by the next
            for slot in self._own:
                pool.give(slot)
            raise

    def run(self, store: Store) -> None:
        """Writes everything; the packs are durable on return. Raises the first thing that went wrong."""
        pairs = zip(self._writer.streams, self._own, strict=True)
        workers: list[Callable[[], None]] = [functools.partial(self._write, stream, own) for stream, own in pairs]
        try:
            if not workers:
                self._begin()
                self._on_copied()
            # Copying ahead comes last: where no thread is to be had, one after the other does all there is to do.
            run_workers(store, [*workers, self._copy_ahead], "fastckpt-write")
        except BaseException as error:
            self._fail(error)
        self._on_let_go()
        with self._changed:
            failure, self._failure = self._failure, None
            copies, self._copies = self._copies, {}
        for slot in copies.values():
            self._pool.give(slot)
        if failure is not None:
            self._writer.abandon()
            raise failure

    def _write(self, stream: PackStream, own: Slot) -> None:
        """Writes what a stream is to. ``own`` is the worker's buffer for what nobody has copied."""
        try:
            for batch in stream.batches:
                slot = self._copy_of(batch)
                if slot is None:
                    self._copy(batch, own)
                try:
                    self._begin()
                    with _part(batch, slot or own) as raw:
                        stream.write(batch, raw)
                finally:
                    if slot is not None:
                        self._give(slot)
            stream.close()
        except BaseException as error:
            self._fail(error)
        finally:
            self._give(own)

    def _copy_of(self, batch: Batch) -> Slot | None:
        """The copy of a batch; None if it is for the caller to make it."""
        with self._changed:
            while not self._stopped:
                if batch not in self._claimed:
                    self._claimed.add(batch)
                    return None
                if batch in self._copies:
                    return self._copies.pop(batch)
                self._changed.wait()
        raise AttemptAborted("another stream failed")

    def _copy_ahead(self) -> None:
        try:
            for batch in self._in_turn():
                slot = self._claim(batch)
                if slot is not None:
                    try:
                        self._copy(batch, slot)
                    except BaseException:
                        self._pool.give(slot)
                        raise
                    with self._changed:
                        is_wanted = not self._stopped
                        if is_wanted:
                            self._copies[batch] = slot
                            self._changed.notify_all()
                    if not is_wanted:  # and perhaps nobody comes to give it back: this worker may be left behind
                        self._pool.give(slot)
        except BaseException as error:
            self._fail(error)

    def _in_turn(self) -> Iterator[Batch]:
        """The first batch of each stream, the second of each, and so on."""
        for batches in itertools.zip_longest(*(stream.batches for stream in self._writer.streams)):
            yield from filter(None, batches)

    def _claim(self, batch: Batch) -> Slot | None:
        """A buffer for the copy of a batch, as soon as there is one; None if a worker copies it."""
        with self._changed:
            while batch not in self._claimed and not self._stopped:
                slot = self._pool.try_take(slot_bytes(batch.bytes))
                if slot is not None:
                    self._claimed.add(batch)
                    return slot
                self._changed.wait()
        return None

    def _copy(self, batch: Batch, slot: Slot) -> None:
        with self._changed:
            if self._stopped:
                raise AttemptAborted("another stream failed")
            self._copying += 1
        try:
            with self._trace.span("stage", batch.bytes), _part(batch, slot) as part:
                at = 0
                for row in batch.rows:
                    size = self._writer.sizes[row]
                    with part[at : at + size] as chunk:
                        self._fill(row, chunk)
                    at += size
        finally:
            self._end_copy()
        with self._changed:
            self._left -= 1
            is_last = not self._left
        if is_last:
            self._on_copied()
            self._on_let_go()

    def _end_copy(self) -> None:
        with self._changed:
            self._copying -= 1
            is_left = self._stopped and not self._copying
        if is_left:
            self._on_let_go()

    def _give(self, slot: Slot) -> None:
        self._pool.give(slot)
        with self._changed:
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        """The first failure counts; everybody stops."""
        with self._changed:
            if not self._stopped:
                self._failure, self._stopped = error, True
            is_left = not self._copying
            self._changed.notify_all()
        self._pool.cancel()
        if is_left:
            self._on_let_go()


def _part(batch: Batch, slot: Slot) -> memoryview:
    """Where in its buffer a batch is: where it is to be in a block of its pack."""
    return slot.view[batch.phase : batch.phase + batch.bytes]


class _Once:
    """Calls ``function`` until it has returned once; who calls meanwhile waits for that."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._called = False

    def __call__(self) -> None:
        with self._lock:
            if not self._called:
                self._function()
                self._called = True
