"""verify finds all damage, wherever it is, and blames the right tensor; and it finds nothing where nothing is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from fastckpt.agreement import Attempt, offer_digest
from fastckpt.buffers import Pool
from fastckpt.errors import StorageError
from fastckpt.format import names, pack, value
from fastckpt.format.shard import Box
from fastckpt.group import Group, SoloGroup
from fastckpt.options import Options
from fastckpt.plan.save_plan import KNOWN, Offer, RankOffer
from fastckpt.repository.chunk_reader import READ_THREADS
from fastckpt.repository.repository import Repository
from fastckpt.repository.verify import Damage, Progress, readable_snapshots, strays, verify
from fastckpt.save import Labels, Saves
from fastckpt.storage.local import LocalStore
from fastckpt.storage.store import Store
from fastckpt.testing import FaultyStore, ThreadGroup
from fastckpt.trace import Trace

CHUNK_BYTES = 4096
Arrays = Mapping[str, npt.NDArray[Any]]


class Held:
    """What one rank holds: whole arrays, and plain values."""

    def __init__(self, arrays: Arrays, values: Mapping[str, object]) -> None:
        self._arrays = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        shapes = {key: list(array.shape) for key, array in arrays.items()}
        self.offer = RankOffer(
            [
                Offer(key, array.dtype.name, shapes[key], [([0] * array.ndim, shapes[key])], KNOWN, 0, "")
                for key, array in self._arrays.items()
            ],
            [list(range(8))],
        )
        self.digest = offer_digest(self.offer)
        self.values = {name: value.encode(item) for name, item in values.items()}

    def sampled(self, keys: Sequence[str], *, whole: bool = False) -> dict[str, bytes]:
        return {}

    def source(self, key: str, box: Box) -> ArraySource:
        return ArraySource(self._arrays[key])

    def check_unchanged(self) -> None:
        pass


class ArraySource:
    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._data = memoryview(array.reshape(-1).view("uint8"))  # type: ignore[arg-type]
        self.bytes = len(self._data)

    def fill(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]


def save(store: Store, step: int, held: Held, group: Group | None = None, codec: Any = "raw") -> Attempt:
    saves = Saves(store, group or SoloGroup(), Options(chunk_bytes=CHUNK_BYTES, codec=codec, commit_seconds_max=30))
    pool = Pool(2 * CHUNK_BYTES, 4)
    attempt = saves.agree(step, held, Trace())
    writer = saves.write(attempt, held, pool, Trace(), lambda: None)
    saves.commit(attempt, writer, held.values, Labels(), Trace())
    pool.close()
    return attempt


def arrays(seed: int) -> dict[str, npt.NDArray[Any]]:
    generator = np.random.default_rng(seed)
    return {
        "big": generator.integers(0, 9, (40, 256)).astype("float32"),  # ten chunks
        "wide": generator.integers(0, 9, (2, 3000)).astype("float64"),  # rows longer than a chunk
        "tiny.a": np.arange(4, dtype="int16"),  # these two share a bundle
        "tiny.b": np.arange(5, dtype="uint8"),
    }


def run(path: Path, every: bool = True) -> list[Damage]:
    repository = Repository(LocalStore(path))
    snapshots = readable_snapshots(repository)
    return verify(repository, snapshots if every else snapshots[-1:], lambda progress: None)


@pytest.fixture(params=["raw", "zstd"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A repository of two snapshots."""
    for step in (1, 2):
        save(LocalStore(tmp_path), step, Held(arrays(step), {"epoch": step}), codec=request.param)
    return tmp_path


def objects(path: Path, pattern: str) -> list[Path]:
    return sorted(path.glob(pattern))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def chunk_offset(path: Path, key: str, nth: int = 0) -> tuple[Path, int]:
    """Where the nth chunk of a key of the newest snapshot lies."""
    snapshot = Repository(LocalStore(path)).snapshots()[-1]
    number = snapshot.key_number(key)
    place = snapshot.place(next(snapshot.chunks.places(number)).first + nth)
    return path / place.pack, place.offset


def test_a_whole_repository_has_no_damage_and_progress_reaches_its_end(path: Path) -> None:
    seen: list[Progress] = []
    repository = Repository(LocalStore(path))
    assert verify(repository, repository.snapshots(), seen.append) == []
    for snapshot in repository.snapshots():
        last = [progress for progress in seen if progress.step == snapshot.step][-1]
        size = sum(file.stat().st_size for file in objects(path, f"packs/{snapshot.attempt}/*/*"))
        assert (last.bytes_done, last.bytes_total) == (size, size)


def test_every_flipped_chunk_is_found_and_named(path: Path) -> None:
    places = [chunk_offset(path, "big", 0), chunk_offset(path, "big", 3), chunk_offset(path, "wide", 1)]
    for file, offset in places:
        flip(file, offset)
    found = run(path)
    assert {(d.key, d.object, d.offset) for d in found} == {
        (key, str(file.relative_to(path)), offset)
        for key, (file, offset) in zip(("big", "big", "wide"), places, strict=True)
    }
    assert {d.step for d in found} == {2}
    assert {d.shard for d in found if d.key == "big"} == {"[0:40, 0:256]"}


def test_a_flipped_bundle_names_every_tensor_in_it(path: Path) -> None:
    file, offset = chunk_offset(path, "tiny.a")
    flip(file, offset)
    assert [d.key for d in run(path)] == ["tiny.a", "tiny.b"]


def test_only_the_snapshots_asked_for_are_read(path: Path) -> None:
    first = Repository(LocalStore(path)).snapshots()[0]
    file = objects(path, f"packs/{first.attempt}/*/*")[0]
    flip(file, 0)
    assert run(path, every=False) == []
    assert [d.step for d in run(path)] == [1]


def test_every_single_flipped_byte_of_a_pack_is_found(path: Path) -> None:
    """Chunks, footer and trailer: no byte of a pack is unchecked."""
    file, _ = chunk_offset(path, "tiny.a")
    size = file.stat().st_size
    generator = np.random.default_rng(5)
    positions = {*range(size - 60, size), *generator.integers(0, size, 60).tolist()}
    for at in positions:
        flip(file, at)
        assert run(path, every=False), f"byte {at} of {size}"
        flip(file, at)
    assert run(path) == []


def test_a_missing_pack_names_every_tensor_it_held(path: Path) -> None:
    file, _ = chunk_offset(path, "big")
    snapshot = Repository(LocalStore(path)).snapshots()[-1]
    held = {
        snapshot.layout.keys[snapshot.layout.shard_key(piece.shard)]
        for unit in snapshot.chunks.units()
        for number, pieces in enumerate(snapshot.chunks.pieces(unit), unit.first)
        for piece in pieces
        if snapshot.place(number).pack == str(file.relative_to(path))
    }
    file.unlink()
    found = run(path)
    assert {d.key for d in found} == held
    assert {d.what for d in found} == {"is missing"}
    assert {d.object for d in found} == {str(file.relative_to(path))}


def test_a_cut_pack_loses_only_what_was_cut(path: Path) -> None:
    file, offset = chunk_offset(path, "big", 9)
    data = file.read_bytes()
    file.write_bytes(data[: offset + 1])
    snapshot = Repository(LocalStore(path)).snapshots()[-1]
    found = run(path)
    assert ("big", offset) in {(d.key, d.offset) for d in found}
    assert any(d.key is None and "were written" in d.what for d in found)
    lost = [d.offset for d in found if d.key is not None]
    assert all(at is not None and at >= offset for at in lost)
    assert {d.step for d in found} == {snapshot.step}


def test_a_pack_with_more_bytes_than_were_written_is_damage(path: Path) -> None:
    file, _ = chunk_offset(path, "big")
    file.write_bytes(file.read_bytes() + b"x")
    (one,) = run(path)
    assert one.object == str(file.relative_to(path))
    assert "bytes where" in one.what


def test_swapped_packs_are_told_from_their_footers(path: Path) -> None:
    newest = Repository(LocalStore(path)).snapshots()[-1]
    packs = objects(path, f"packs/{newest.attempt}/*/*")
    other = next(file for file in objects(path, "packs/*/*/*") if newest.attempt not in str(file))
    mine = packs[0]
    a, b = mine.read_bytes(), other.read_bytes()
    mine.write_bytes(b)
    other.write_bytes(a)
    found = run(path)
    for file, holds in ((mine, other), (other, mine)):
        about = [d for d in found if d.object == str(file.relative_to(path))]
        assert about
        assert all(str(holds.relative_to(path)) in d.what for d in about)
        assert all(d.key for d in about), "a whole pack of lost chunks names the tensors"


def test_a_footer_that_is_whole_but_says_something_else_than_the_part_is_damage(path: Path) -> None:
    file, _ = chunk_offset(path, "big")
    data = file.read_bytes()
    trailer = data[-pack.TRAILER_BYTES :]
    start = len(data) - pack.TRAILER_BYTES - pack.footer_bytes(trailer, len(data), "x")
    footer = pack.decode_footer(data[start : -pack.TRAILER_BYTES], trailer, start, "x")
    other = bytes([footer.hashes[0] ^ 1]) + footer.hashes[1:]
    harmed = data[:start] + pack.encode_footer(msgspec.structs.replace(footer, hashes=other))
    assert len(harmed) == len(data), "else the size alone would tell"
    file.write_bytes(harmed)
    (one,) = run(path)
    assert (one.object, one.key) == (str(file.relative_to(path)), None)
    assert "do not agree" in one.what


@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
@pytest.mark.parametrize("pattern", ["attempts/{}/part-000000", "attempts/{}/index", "layouts/{}"])
def test_damaged_metadata_is_named_and_hides_no_other_snapshot(path: Path, pattern: str, harm: str) -> None:
    first, newest = Repository(LocalStore(path)).snapshots()
    file = path / pattern.format(newest.index.layout if "layouts" in pattern else newest.attempt)
    data = file.read_bytes()
    if harm == "flip":
        flip(file, len(data) // 2)
    elif harm == "cut":
        file.write_bytes(data[:-1])
    else:
        file.unlink()
    flip(objects(path, f"packs/{first.attempt}/*/*")[0], 0)
    found = run(path)
    named = {(d.step, d.object) for d in found}
    assert (2, str(file.relative_to(path))) in named
    # The layout is shared, and without it no chunk can be understood.
    assert any(d.step == 1 and (d.key or "layouts" in pattern) for d in found)


def test_a_damaged_decision_is_named_and_the_snapshots_are_checked_all_the_same(path: Path) -> None:
    decisions = objects(path, "decisions/*")
    file, offset = chunk_offset(path, "big")
    flip(decisions[0], 10)
    flip(file, offset)
    found = run(path)
    assert {d.object for d in found} == {"decisions/000000000001", str(file.relative_to(path))}


def test_every_damaged_and_missing_decision_is_named(path: Path) -> None:
    decisions = objects(path, "decisions/*")
    assert len(decisions) == 4
    flip(decisions[1], 10)
    decisions[2].unlink()
    found = run(path)
    assert [d.object for d in found if d.step is None] == ["decisions/000000000002", "decisions/000000000003"]


def test_a_history_that_was_put_together_is_found(tmp_path: Path) -> None:
    """Each decision is whole, but they are not of one history."""
    for name in ("a", "b"):
        for step in (1, 2):
            save(LocalStore(tmp_path / name), step, Held(arrays(step), {}))
    (tmp_path / "a/decisions/000000000002").write_bytes((tmp_path / "b/decisions/000000000002").read_bytes())
    found = run(tmp_path / "a")
    assert any(d.object.startswith("decisions/") for d in found)


def test_a_missing_part_of_one_node_does_not_hide_damage_on_another(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    ThreadGroup(2, ["a", "b"]).run(
        lambda group: save(store, 7, Held(arrays(1), {"rank": group.rank, "same": "x"}), group).id
    )
    snapshot = Repository(store).snapshots()[-1]
    assert run(tmp_path) == []
    pack = snapshot.table(1).packs[0].name
    flip(tmp_path / pack, 0)
    (tmp_path / names.part(snapshot.attempt, 0)).unlink()
    found = run(tmp_path)
    assert {d.object for d in found} == {names.part(snapshot.attempt, 0), pack}


def test_a_sector_that_cannot_be_read_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), 1, Held(arrays(1), {}))
    file, bad = chunk_offset(tmp_path, "big", 4)

    class BadSector(LocalStore):
        def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
            if name == str(file.relative_to(tmp_path)) and offset <= bad < offset + len(buffer):
                raise StorageError("Input/output error")
            super().read_into(name, offset, buffer)

    repository = Repository(BadSector(tmp_path))
    (one,) = verify(repository, repository.snapshots(), lambda progress: None)
    assert (one.key, one.offset) == ("big", bad)
    assert "cannot be read" in one.what


def test_a_failure_that_may_pass_is_no_damage(tmp_path: Path) -> None:
    save(LocalStore(tmp_path), 1, Held(arrays(1), {}))
    faulty = FaultyStore(
        LocalStore(tmp_path),
        fail_at=1,
        error=StorageError("try again", transient=True),
        persistent=True,
        only=lambda operation, name: operation == "read_into",
    )
    repository = Repository(faulty)
    with pytest.raises(StorageError, match="try again"):
        verify(repository, repository.snapshots(), lambda progress: None)


def test_strays_are_what_no_decision_names(path: Path) -> None:
    repository = Repository(LocalStore(path))
    assert strays(repository) == {}
    dead, alive = "000000000001-00000000000000ab-000001", "000000000003-00000000000000ab-000001"
    for attempt in (dead, alive):
        (path / f"packs/{attempt}/00").mkdir(parents=True)
        (path / f"packs/{attempt}/00/0-0.pack").write_bytes(b"x")
    (path / "notes.txt").write_text("hello")
    assert set(strays(repository)) == {f"packs/{dead}/00/0-0.pack", "notes.txt"}


def test_memory_does_not_grow_with_the_pack(tmp_path: Path) -> None:
    """A pack larger than all buffers together is checked a piece at a time."""
    import tracemalloc

    from fastckpt.repository import verify as module

    size = 48 * 1024 * 1024
    save(LocalStore(tmp_path), 1, Held({"w": np.ones(size, "uint8")}, {}))
    repository = Repository(LocalStore(tmp_path))
    snapshots = repository.snapshots()
    limit = 1024 * 1024
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "READ_BYTES_MAX", limit)
    tracemalloc.start()
    try:
        assert verify(repository, snapshots, lambda progress: None) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        patch.undo()
    tables = 100 * size // CHUNK_BYTES
    assert peak < 2 * READ_THREADS * limit + 4 * tables + 4 * limit
    assert peak < size // 2
