"""A snapshot of more nodes than an index names has rolls, and the page is enough to read them."""

from __future__ import annotations

from pathlib import Path

import independent_reader
import numpy as np
import pytest
from independent_reader import BadRepository

import fastckpt
from fastckpt.errors import SnapshotDamaged
from fastckpt.format import value
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.document import digest, pack_table
from fastckpt.format.families import mesh_of
from fastckpt.format.roll import NODES_MAX
from fastckpt.format.tables import check_layout
from fastckpt.plan.save_plan import KNOWN, Offer, RankOffer, plan_save
from fastckpt.plan.value_kinds import find_differences, value_kinds
from fastckpt.repository.repository import create
from fastckpt.repository.verify import verify
from fastckpt.repository.writer import ChunkWriter, Committer, Contents, write_part
from fastckpt.storage.local import LocalStore
from fastckpt.trace import Trace

NODES = NODES_MAX + 44
CONTENT = np.arange(NODES * 3 * 5, dtype="int32").reshape(NODES * 3, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor, three rows on each of many nodes of a rank; a value that is the same on all, and one that is not."""
    path = tmp_path_factory.mktemp("rolls") / "repository"
    store = LocalStore(path)
    committer = Committer(store, create(store, 4096).format_digest)
    committer.open()
    attempt = committer.next_attempt()
    mesh = mesh_of(np.arange(NODES))
    offer = RankOffer([Offer("w", "int32", list(CONTENT.shape), [], KNOWN, 0, "", 0, [(0, 0)])], [[]], [mesh])
    layout, _ = plan_save(dict.fromkeys(range(NODES), offer), {}, list(range(NODES)), 4096)
    chunks, data = check_layout(layout, "x"), pack_table(layout)
    parts, tables = [], []
    for rank in range(NODES):
        values = {"epoch": value.encode(3), "own": value.encode(rank)}
        ((_, (piece,)),) = chunks.of_rank(rank)
        rows = CONTENT[layout.box(piece.shard).slices()].tobytes()
        writer = ChunkWriter(store, attempt, rank, [len(rows)], "raw", Trace())
        (stream,) = writer.streams
        stream.write(stream.batches[0], memoryview(rows))
        stream.close()
        table = writer.table({name: chunk_hash(blob) for name, blob in values.items()})
        parts.append(write_part(store, attempt, rank, digest(data), [table], values.values()))
        tables.append(table.values)
    kinds = value_kinds(["epoch", "own"], [find_differences(sorted(tables[0].items()), tables)])
    size = CONTENT.nbytes + sum(len(value.encode(rank)) for rank in range(NODES)) + len(value.encode(3))
    contents = Contents(
        attempt=attempt,
        step=7,
        layout=data,
        parts=parts[::-1],
        bytes=size,
        stored_bytes=CONTENT.nbytes,
        values=kinds,
        environment={},
        metrics={},
        note="",
    )
    committer.commit(contents, Trace())
    return path


def test_a_snapshot_of_many_nodes_is_read_by_both_readers(folder: Path) -> None:
    snapshot = fastckpt.open(str(folder)).snapshot()
    assert snapshot.index.parts == []
    assert len(snapshot.index.rolls) == 2
    assert snapshot.index.values == {"epoch": "same", "own": "own"}
    assert np.array_equal(snapshot.read("w"), CONTENT)
    assert [snapshot.value("own", rank) for rank in (0, 255, 256, NODES - 1)] == [0, 255, 256, NODES - 1]
    assert verify(fastckpt.open(str(folder)), [snapshot], lambda progress: None) == []
    repository = independent_reader.Repository(folder)
    other = repository.open(repository.snapshots[-1])
    assert np.array_equal(other.tensors()["w", -1], CONTENT)
    assert [values["own"] for values in other.values()] == list(range(NODES))


def test_who_wants_some_rows_reads_one_roll_and_the_parts_that_have_them(folder: Path) -> None:
    snapshot = fastckpt.open(str(folder)).snapshot()
    assert np.array_equal(snapshot.read("w", np.s_[-4:]), CONTENT[-4:])
    assert list(snapshot._rolls) == [1]
    assert sorted(snapshot._parts) == [NODES - 2, NODES - 1]


def test_a_damaged_roll_is_named_once_and_refused(folder: Path) -> None:
    (path,) = (folder / "attempts").glob("*/roll-000001")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        snapshot = fastckpt.open(str(folder)).snapshot()
        assert np.array_equal(snapshot.read("w", np.s_[:3]), CONTENT[:3])
        with pytest.raises(SnapshotDamaged, match="roll-000001: damaged"):
            snapshot.read("w")
        found = verify(fastckpt.open(str(folder)), [snapshot], lambda progress: None)
        assert [damage.object for damage in found] == [str(path.relative_to(folder))]
        repository = independent_reader.Repository(folder)
        with pytest.raises(BadRepository):
            repository.open(repository.snapshots[-1])
    finally:
        path.write_bytes(whole)
