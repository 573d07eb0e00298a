"""The pull: every chunk is copied once and written, whatever the memory, and a failure ends the copying at once."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.buffers import Pool, Slot
from fastckpt.errors import AttemptAborted, StorageError
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.tables import Rows
from fastckpt.repository.pull import BATCH_BYTES, Pull, batch_bytes_of, pool_bytes, slot_bytes, streams_of
from fastckpt.repository.writer import ChunkWriter
from fastckpt.storage.deadline import DeadlineStore
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Bytes, ObjectWriter
from fastckpt.trace import Trace

ATTEMPT = "000000000001-0123456789abcdef-000001"
SECONDS = 20.0


class Run:
    """One pull of chunks of random bytes."""

    def __init__(self, sizes: list[int], pool: Pool, store: Any = None, streams: int = 2, codec: str = "raw") -> None:
        self.store = store or MemoryStore(secrets.token_hex(8))
        draw = random.Random(len(sizes))
        self.chunks = [draw.randbytes(size) if draw.random() < 0.8 else bytes(size) for size in sizes]
        self.copied: list[int] = []
        self.events: list[str] = []
        self.pool = pool
        count = streams_of(sizes, streams, pool)
        self.writer = ChunkWriter(self.store, ATTEMPT, 0, sizes, codec, Trace(), count, batch_bytes_of(count, pool))
        self.pull = Pull(
            self.writer,
            pool,
            Trace(),
            fill=self.fill,
            begin=lambda: self.events.append("begin"),
            on_copied=lambda: self.events.append("copied"),
            on_let_go=lambda: self.events.append("let go"),
        )

    def fill(self, row: int, view: memoryview) -> None:
        assert "let go" not in self.events
        self.copied.append(row)
        view[:] = self.chunks[row]

    def run(self) -> None:
        self.pull.run(self.store)

    def check(self) -> None:
        assert sorted(self.copied) == list(range(len(self.chunks)))
        assert sorted(self.events) == ["begin", "copied", "let go"]
        table = self.writer.table({})
        rows = Rows(table)
        for number, chunk in enumerate(self.chunks):
            place = rows.place(number)
            stored = bytearray(place.length)
            self.store.read_into(place.pack, place.offset, memoryview(stored))
            assert place.hash == chunk_hash(chunk)
            if not place.codec:
                assert stored == chunk
        self.pool.reset()  # asserts that every buffer was given back


@given(
    st.lists(st.integers(1, 30_000), max_size=40),
    st.integers(0, 40),
    st.integers(1, 5),
    st.sampled_from(["raw", "zstd"]),
)
def test_every_chunk_is_copied_once_and_written_whatever_the_memory(
    sizes: list[int], spare: int, streams: int, codec: str
) -> None:
    largest = slot_bytes(max(sizes, default=1))
    pool = Pool(min(largest + spare * 8192, pool_bytes(sizes, streams)))
    run = Run(sizes, pool, streams=streams, codec=codec)
    run.run()
    run.check()
    pool.close()


def test_with_one_buffer_chunks_are_copied_one_after_the_other_in_order() -> None:
    sizes = [5000] * 20
    run = Run(sizes, Pool(slot_bytes(5000)), streams=4)
    run.run()
    run.check()
    assert run.copied == list(range(20))


class Gated(MemoryStore):
    """Does not take a byte until the gate is open, or fails then."""

    def __init__(self) -> None:
        super().__init__(secrets.token_hex(8))
        self.gate = threading.Event()
        self.error: Exception | None = None

    def write(self, name: str, *, bytes_expected: int = 0) -> Any:
        return _GatedWriter(self, super().write(name, bytes_expected=bytes_expected))


class _GatedWriter:
    def __init__(self, store: Gated, writer: ObjectWriter) -> None:
        self._store = store
        self._writer = writer
        self.finish, self.abandon = writer.finish, writer.abandon

    def append(self, data: Bytes) -> int:
        assert self._store.gate.wait(SECONDS)
        if self._store.error is not None:
            raise self._store.error
        return self._writer.append(data)


def test_with_memory_for_all_everything_is_copied_while_the_storage_stands_still() -> None:
    sizes = [3000, 9000, 4096, 1, 12_288] * 8
    store = Gated()
    run = Run(sizes, Pool(pool_bytes(sizes, 2)), store)
    let_go = threading.Event()
    run.pull._on_let_go._function = let_go.set
    thread = threading.Thread(target=run.run, daemon=True)
    thread.start()
    assert let_go.wait(SECONDS)
    assert sorted(run.copied) == list(range(len(sizes)))
    store.gate.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
    run.events.append("let go")
    run.check()


def test_where_no_thread_can_be_started_the_caller_does_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    for spare in (0, 1 << 20):
        run = Run([5000] * 30, Pool(2 * slot_bytes(5000) + spare))
        run.run()
        run.check()


@pytest.mark.parametrize("failing_row", [0, 7, 29])
@pytest.mark.parametrize("spare", [0, 1 << 20])
def test_a_copy_that_fails_ends_the_copying_and_is_what_is_raised(failing_row: int, spare: int) -> None:
    run = Run([5000] * 30, Pool(2 * slot_bytes(5000) + spare))
    fill = run.fill

    def failing(row: int, view: memoryview) -> None:
        if row == failing_row:
            raise ZeroDivisionError
        fill(row, view)

    run.pull._fill = failing
    with pytest.raises(ZeroDivisionError):
        run.run()
    assert run.events.count("let go") == 1
    assert "copied" not in run.events
    run.pool.reset()
    assert run.writer.delete()  # the finished packs
    assert list(run.store.list("")) == [], "a pack that was begun is gone"


def test_a_write_that_fails_lets_go_of_what_is_not_copied_yet() -> None:
    store = Gated()
    store.error = StorageError("the disk is on fire")
    store.gate.set()
    run = Run([5000] * 200, Pool(2 * slot_bytes(5000) + 8192), store)
    with pytest.raises(StorageError, match="on fire"):
        run.run()
    assert run.events.count("let go") == 1
    assert len(run.copied) < 200
    run.pool.reset()


def test_a_cancelled_pool_ends_it() -> None:
    run = Run([5000] * 30, Pool(2 * slot_bytes(5000) + 8192))
    fill = run.fill

    def cancelling(row: int, view: memoryview) -> None:
        fill(row, view)
        run.pool.cancel()
        raise AttemptAborted("given up")

    run.pull._fill = cancelling
    with pytest.raises(AttemptAborted):
        run.run()
    run.pool.reset()


def test_nothing_to_write_is_no_trouble() -> None:
    run = Run([], Pool(1))
    run.run()
    run.check()


def test_the_last_check_fails_the_pull() -> None:
    run = Run([100] * 3, Pool(pool_bytes([100] * 3, 2)))
    calls: list[Callable[[], None]] = []

    def changed() -> None:
        calls.append(changed)
        raise ValueError("changed while it was staged")

    run.pull._on_copied = changed
    with pytest.raises(ValueError, match="changed while"):
        run.run()
    assert len(calls) == 1
    assert run.events.count("let go") == 1


def test_memory_is_given_back_if_the_fence_gives_up_between_two_buffers() -> None:
    class GivenUp(Pool):
        taken = 0

        def take(self, size: int | None = None) -> Slot:
            self.taken += 1
            if self.taken == 2:
                self.cancel()
            return super().take(size)

    sizes = [5000] * 8
    pool = GivenUp(pool_bytes(sizes, 2))
    with pytest.raises(AttemptAborted):
        Run(sizes, pool, streams=2)
    pool.reset()  # asserts that every buffer was given back


def test_a_copy_made_by_a_worker_that_was_left_behind_is_given_back() -> None:
    sizes = [BATCH_BYTES // 2 + 1] * 3  # a batch each
    store = Gated()
    deadline = DeadlineStore(store, 0.2)
    run = Run(sizes, Pool(pool_bytes(sizes, 1)), deadline, streams=1)
    copying, go_on = threading.Event(), threading.Event()
    fill = run.fill

    def slow(row: int, view: memoryview) -> None:
        if threading.current_thread().name == "fastckpt-write-1":  # the one that copies ahead
            copying.set()
            assert go_on.wait(SECONDS)
        fill(row, view)

    run.events.append("begin")
    run.pull._fill = slow
    run.pull._on_let_go._function = lambda: None
    with pytest.raises(StorageError, match="has not answered"):
        run.run()
    assert copying.is_set()
    store.error = StorageError("too late")
    store.gate.set()
    go_on.set()
    end = time.monotonic() + SECONDS
    while deadline.busy:
        assert time.monotonic() < end
        time.sleep(0.01)
    run.pool.reset()  # asserts that every buffer was given back
