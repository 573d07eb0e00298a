"""Pulling a rank's chunks from where they are into its packs.

for each stream of packs, a worker:  copy -> hash -> codec -> write, row by row
beside them, one more:               copies rows ahead of the workers, as long as there is memory to spare

A worker that comes to a row nobody has copied yet copies it itself, and hashes and writes it while it is in the cache:
that is how it goes with little memory. With much, live tensors are let go of as fast as memory can be copied.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

from fastckpt.buffers import Pool, Slot, in_pages
from fastckpt.errors import AttemptAborted
from fastckpt.repository.writer import ChunkWriter, PackStream
from fastckpt.storage.deadline import run_workers
from fastckpt.storage.store import BLOCK_BYTES, Store
from fastckpt.trace import Trace


def slot_bytes(size: int) -> int:
    """Of the buffer for a chunk of ``size`` bytes, wherever in a block of its pack it begins."""
    return in_pages(size + BLOCK_BYTES - 1)


def pool_bytes(sizes: Sequence[int], streams: int) -> int:
    """Memory with which all chunks of these sizes can be copied ahead of ``streams`` workers."""
    return sum(map(slot_bytes, sizes)) + streams * slot_bytes(max(sizes, default=1))


def streams_of(sizes: Sequence[int], streams_max: int, pool: Pool) -> int:
    """How many streams there is work, and a buffer each, for."""
    return min(streams_max, len(sizes), pool.bytes // slot_bytes(max(sizes, default=1)))


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
        self._claimed = bytearray(len(writer.sizes))
        """By row: whether somebody copies it or has."""
        self._copies: dict[int, Slot] = {}
        """By row: made ahead, and not yet taken by a worker."""
        self._left = len(writer.sizes)
        """Rows not copied."""
        self._copying = 0
        """Copies under way."""
        self._failure: BaseException | None = None
        self._stopped = False
        # Taken before anything is copied ahead: a worker never waits for memory that the copies of later rows are in.
        self._own: list[Slot] = []
        try:
            for _ in writer.streams:
                self._own.append(pool.take(slot_bytes(max(writer.sizes))))
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
        """Writes the rows of a stream. ``own`` is the worker's buffer for what nobody has copied."""
        try:
            for row in stream.rows:
                slot = self._copy_of(row)
                if slot is None:
                    self._copy(row, own)
                try:
                    self._begin()
                    with self._part(row, slot or own) as raw:
                        stream.write(row, raw)
                finally:
                    if slot is not None:
                        self._give(slot)
            stream.close()
        except BaseException as error:
            self._fail(error)
        finally:
            self._give(own)

    def _copy_of(self, row: int) -> Slot | None:
        """The copy of a row; None if it is for the caller to make it."""
        with self._changed:
            while not self._stopped:
                if not self._claimed[row]:
                    self._claimed[row] = True
                    return None
                if row in self._copies:
                    return self._copies.pop(row)
                self._changed.wait()
        raise AttemptAborted("another stream failed")

    def _copy_ahead(self) -> None:
        try:
            for row in self._in_turn():
                slot = self._claim(row)
                if slot is not None:
                    try:
                        self._copy(row, slot)
                    except BaseException:
                        self._pool.give(slot)
                        raise
                    with self._changed:
                        is_wanted = not self._stopped
                        if is_wanted:
                            self._copies[row] = slot
                            self._changed.notify_all()
                    if not is_wanted:  # and perhaps nobody comes to give it back: this worker may be left behind
                        self._pool.give(slot)
        except BaseException as error:
            self._fail(error)

    def _in_turn(self) -> Iterator[int]:
        """All rows: the first of each stream, the second of each, and so on."""
        for rows in itertools.zip_longest(*(stream.rows for stream in self._writer.streams)):
            yield from (row for row in rows if row is not None)

    def _claim(self, row: int) -> Slot | None:
        """A buffer for the copy of a row, as soon as there is one; None if a worker copies the row."""
        with self._changed:
            while not self._claimed[row] and not self._stopped:
                slot = self._pool.try_take(slot_bytes(self._writer.sizes[row]))
                if slot is not None:
                    self._claimed[row] = True
                    return slot
                self._changed.wait()
        return None

    def _copy(self, row: int, slot: Slot) -> None:
        with self._changed:
            if self._stopped:
                raise AttemptAborted("another stream failed")
            self._copying += 1
        try:
            with self._trace.span("stage", self._writer.sizes[row]), self._part(row, slot) as part:
                self._fill(row, part)
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

    def _part(self, row: int, slot: Slot) -> memoryview:
        """Where in its buffer a chunk is: where it is to be in a block of its pack."""
        phase = self._writer.phases[row]
        return slot.view[phase : phase + self._writer.sizes[row]]

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
