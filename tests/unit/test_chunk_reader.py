"""Chunks from storage to sinks: what is read together, and that nothing is placed once a reading has failed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastckpt
from fastckpt import Checkpointer, Options, RestoreError, StorageError
from fastckpt.buffers import Pool
from fastckpt.errors import SaveError
from fastckpt.format import codec
from fastckpt.format.shard import Box
from fastckpt.format.tables import ChunkPlace
from fastckpt.plan.restore_plan import ChunkRead, Want
from fastckpt.repository import chunk_reader
from fastckpt.repository.chunk_reader import GAP_BYTES_MAX, GAP_SHARE, READ_BYTES_MAX, PlacedChunk, Run, runs_of
from fastckpt.repository.reader import Snapshot
from fastckpt.storage.deadline import DeadlineStore
from fastckpt.storage.local import LocalStore

MIB = 1024 * 1024
BUFFER = memoryview(bytearray(READ_BYTES_MAX + MIB))


def chunk(number: int, pack: str, offset: int, length: int, raw_bytes: int | None = None) -> PlacedChunk:
    kind = codec.RAW if raw_bytes is None else codec.ZSTD
    place = ChunkPlace(pack, offset, length, kind, b"", None)
    return PlacedChunk(ChunkRead(number, length if raw_bytes is None else raw_bytes, ()), place)


def spans(runs: list[Run]) -> list[tuple[str, int, int, list[int]]]:
    return [(run.pack, run.offset, run.length, [one.read.chunk for one in run.chunks]) for run in runs]


def test_neighbours_are_read_together_up_to_the_limit() -> None:
    chunks = [chunk(n, "p", n * 3 * MIB, 3 * MIB) for n in (2, 0, 1, 3)]
    assert spans(runs_of(chunks)) == [("p", 0, 6 * MIB, [0, 1]), ("p", 6 * MIB, 6 * MIB, [2, 3])]


def test_a_chunk_larger_than_the_limit_is_read_alone() -> None:
    chunks = [chunk(0, "p", 0, 10), chunk(1, "p", 10, 20 * MIB), chunk(2, "p", 10 + 20 * MIB, 10)]
    assert [run.length for run in runs_of(chunks)] == [10, 20 * MIB, 10]


def test_a_small_gap_is_read_along_but_not_one_that_is_large_for_what_is_read() -> None:
    wide = [chunk(0, "p", 0, 4 * MIB), chunk(1, "p", 4 * MIB + GAP_BYTES_MAX, 10)]
    assert [run.length for run in runs_of(wide)] == [4 * MIB + GAP_BYTES_MAX + 10]
    assert len(runs_of([wide[0], chunk(1, "p", 4 * MIB + GAP_BYTES_MAX + 1, 10)])) == 2
    assert len(runs_of([chunk(0, "p", 0, 4096), chunk(1, "p", 8192, 4096)])) == 2


def test_chunks_that_grow_when_they_are_decoded_make_short_runs() -> None:
    chunks = [chunk(n, "p", n * 100, 100, raw_bytes=READ_BYTES_MAX // 2) for n in range(4)]
    assert [run.raw_bytes for run in runs_of(chunks)] == [READ_BYTES_MAX] * 2


@given(
    st.lists(
        st.tuples(
            st.sampled_from("pq"), st.integers(0, 5 * MIB), st.integers(1, 5 * MIB), st.none() | st.integers(1, MIB)
        )
    )
)
def test_every_chunk_is_in_one_run_that_holds_its_bytes_and_little_else(
    places: list[tuple[str, int, int, int | None]],
) -> None:
    at = {"p": 0, "q": 0}
    chunks = []
    for number, (pack, gap, length, raw_bytes) in enumerate(places):
        at[pack] += gap if gap % 3 else 0
        chunks.append(chunk(number, pack, at[pack], length, raw_bytes))
        at[pack] += length
    runs = runs_of(reversed(chunks))
    assert sorted(one.read.chunk for run in runs for one in run.chunks) == list(range(len(places)))
    for run in runs:
        wanted = sum(one.place.length for one in run.chunks)
        assert run.length - wanted <= run.length * GAP_SHARE
        assert len(run.chunks) == 1 or max(run.length, run.raw_bytes) <= READ_BYTES_MAX
        buffer = BUFFER[: run.buffer_bytes]
        assert len(run.in_buffer(buffer)) == run.length
        assert [len(view) for view in run.raw_views(buffer)] == [one.read.raw_bytes for one in run.chunks]
        for one in run.chunks:
            assert one.place.pack == run.pack
            assert run.offset <= one.place.offset <= one.place.offset + one.place.length <= run.offset + run.length


class Silent(LocalStore):
    """Brings what is asked for, or all but the first bytes of a pack, only once it is let to."""

    def __init__(self, path: Path, *, silent_behind_first: bool = False) -> None:
        super().__init__(path)
        self.silent_behind_first = silent_behind_first
        self.may_answer = threading.Event()
        self.answered = threading.Event()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if offset or not self.silent_behind_first:
            self.may_answer.wait(60)
        super().read_into(name, offset, buffer)
        self.answered.set()


class NotingSink:
    def __init__(self) -> None:
        self.placed = 0
        self.placing = threading.Event()
        self.may_place = threading.Event()

    def place(self, offsets: Any, sizes: Any, data: memoryview) -> None:
        self.placing.set()
        self.may_place.wait(60)
        self.placed += len(data)


def saved(path: Path) -> Snapshot:
    with Checkpointer(path, options=Options(chunk_bytes=4096)) as ckpt:
        ckpt.save(1, {"x": torch.arange(5000.0)}).wait()
    return fastckpt.open(str(path)).snapshot()


def test_what_storage_brings_after_the_reading_has_failed_reaches_no_sink(tmp_path: Path) -> None:
    silent = Silent(tmp_path)
    live = saved(tmp_path).live
    snapshot = Snapshot(DeadlineStore(silent, 0.2), live)
    sink = NotingSink()
    try:
        with pytest.raises(StorageError, match="has not answered"):
            snapshot.read_into([Want(0, Box((0,), (5000,)), 0)], [sink])
    finally:
        silent.may_answer.set()
    assert silent.answered.wait(60)
    for thread in threading.enumerate():
        if thread.name.startswith("fastckpt-read"):
            thread.join(60)
    assert sink.placed == 0


def test_a_reading_fails_only_when_nothing_is_being_placed_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_reader, "READ_BYTES_MAX", 4096)
    silent = Silent(tmp_path, silent_behind_first=True)
    snapshot = Snapshot(DeadlineStore(silent, 0.2), saved(tmp_path).live)
    sink = NotingSink()
    failures: list[StorageError] = []

    def read() -> None:
        try:
            snapshot.read_into([Want(0, Box((0,), (5000,)), 0)], [sink])
        except StorageError as error:
            failures.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    try:
        assert sink.placing.wait(60)
        reading.join(1.0)  # longer than the storage may be silent
        assert reading.is_alive(), "it has raised, and its sink is still being filled"
    finally:
        sink.may_place.set()
        reading.join(60)
        silent.may_answer.set()
    assert len(failures) == 1


def test_memory_that_cannot_be_had_is_said_to_be_that_of_a_restore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = saved(tmp_path)

    class NoPool(Pool):
        def __init__(self, *_: Any) -> None:
            raise SaveError("no staging buffers") from OSError("Too many open files")

    monkeypatch.setattr(chunk_reader, "Pool", NoPool)
    with pytest.raises(RestoreError, match=r"step 1: cannot get \d+ bytes of memory to read into: Too many open"):
        snapshot.read("x")
