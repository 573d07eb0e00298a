"""A snapshot written to a .safetensors file is what the safetensors package reads back, whatever its shards were."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fastckpt.agreement import offer_digest
from fastckpt.buffers import Pool
from fastckpt.errors import SnapshotDamaged, StateMismatch
from fastckpt.format.shard import Box
from fastckpt.group import SoloGroup
from fastckpt.options import Options
from fastckpt.plan.save_plan import KNOWN, Offer, RankOffer
from fastckpt.repository import chunk_reader
from fastckpt.repository.export import DTYPES, plan_file, runs, write_file
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.repository import Repository
from fastckpt.save import Labels, Saves
from fastckpt.storage.local import LocalStore
from fastckpt.trace import Trace

CHUNK_BYTES = 4096
Array = npt.NDArray[Any]


class Held:
    """Arrays by key, each in the boxes that ``cuts`` gives, and keys tied to others. ``dtypes`` rename element types
    that numpy lacks."""

    values: Mapping[str, bytes] = {}

    def __init__(
        self,
        arrays: Mapping[str, Array],
        cuts: Mapping[str, Sequence[Box]] | None = None,
        ties: Mapping[str, str] | None = None,
        dtypes: Mapping[str, str] | None = None,
    ) -> None:
        self._arrays = dict(arrays)
        offers = []
        for key, array in arrays.items():
            boxes = (cuts or {}).get(key, [Box.whole(array.shape)] if array.size else [])
            form = ((dtypes or {}).get(key, array.dtype.name), list(array.shape))
            offers.append(Offer(key, *form, [(list(b.offsets), list(b.sizes)) for b in boxes], KNOWN, 0, ""))
            offers += [Offer(tied, *form, [], KNOWN, 0, key) for tied, to in (ties or {}).items() if to == key]
        self.offer = RankOffer(offers, [[0]])
        self.digest = offer_digest(self.offer)

    def sampled(self, keys: Sequence[str], *, whole: bool = False) -> dict[str, bytes]:
        return {}

    def source(self, key: str, box: Box) -> ArraySource:
        return ArraySource(self._arrays[key][box.slices()])

    def check_unchanged(self) -> None:
        pass


class ArraySource:
    def __init__(self, array: Array) -> None:
        self._data = memoryview(np.ascontiguousarray(array).reshape(-1).view("uint8"))  # type: ignore[arg-type]
        self.bytes = len(self._data)

    def fill(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]


def saved(path: Path, held: Held) -> Snapshot:
    store = LocalStore(path / "repository")
    saves = Saves(store, SoloGroup(), Options(chunk_bytes=CHUNK_BYTES, codec="zstd"))
    pool = Pool(2 * CHUNK_BYTES, 4)
    attempt = saves.agree(3, held, Trace())
    saves.commit(attempt, saves.write(attempt, held, pool, Trace(), lambda: None), {}, Labels(), Trace())
    pool.close()
    return Repository(store).snapshot()


def written(path: Path, snapshot: Snapshot, only: Sequence[str] = (), strip: str = "") -> Path:
    target = path / "out.safetensors"
    write_file(plan_file(snapshot, only, strip), snapshot, str(target))
    return target


def raw(array: Array) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def raw_tensor(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def some(shape: tuple[int, ...], dtype: Any = "float32", seed: int = 0) -> Array:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 2, size, "uint8").view(dtype).reshape(shape)


@given(st.data())
def test_the_runs_of_a_region_are_its_elements_in_order(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=4))
    offsets = [data.draw(st.integers(0, size - 1)) for size in shape]
    sizes = [data.draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    box = Box(tuple(offsets), tuple(sizes))
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    found = list(runs(shape, offsets, sizes))
    assert [n for first, count in found for n in range(first, first + count)] == numbers[box.slices()].ravel().tolist()
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(found)), "neighbours are one run"


def test_every_dtype_safetensors_has_comes_back_with_its_bytes_shape_and_name(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {}
    for number, dtype in enumerate(DTYPES):
        kind = np.dtype(dtype) if dtype in np.sctypeDict else np.dtype(getattr(ml_dtypes, dtype))
        arrays[f"k.{dtype}"] = some((3, 5 + number), kind, number)
    snapshot = saved(tmp_path, Held({**arrays, "scalar": some((), "int64"), "empty": some((0, 7))}))
    target = written(tmp_path, snapshot)
    seen = dict(safetensors.deserialize(target.read_bytes()))
    assert seen["scalar"]["shape"] == []
    assert seen["empty"]["shape"] == [0, 7]
    for key, array in arrays.items():
        assert bytes(seen[key]["data"]) == raw(array)
        assert seen[key]["shape"] == list(array.shape)
        assert seen[key]["dtype"] == DTYPES[key[2:]]
    loaded = load_file(written(tmp_path / "repository", snapshot, only=["k.[!f]*", "k.float[136]*", "scalar", "empty"]))
    for key, tensor in loaded.items():
        if key.startswith("k."):
            assert str(tensor.dtype) == f"torch.{key[2:]}"
            assert raw_tensor(tensor) == raw(arrays[key])


def test_tensors_are_aligned_and_without_holes(tmp_path: Path) -> None:
    arrays = {f"k{n}": some((n,), dtype) for n, dtype in enumerate(["uint8", "int64", "int16", "float64", "bool"], 1)}
    target = written(tmp_path, saved(tmp_path, Held(arrays)))
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
    plan = plan_file(Repository(LocalStore(tmp_path / "repository")).snapshot())
    assert len(plan.head) % 8 == 0
    at = len(plan.head)
    for tensor in plan.tensors:
        assert tensor.start == at
        assert tensor.start % np.dtype(tensor.dtype).itemsize == 0
        at += tensor.bytes
    assert at == plan.file_bytes == target.stat().st_size


CUTS = {
    "rows": [Box((0, 0, 0), (4, 30, 20)), Box((4, 0, 0), (6, 30, 20))],
    "columns": [Box((0, 0, 0), (10, 30, 7)), Box((0, 0, 7), (10, 30, 13))],
    "middle": [Box((0, 0, 0), (10, 11, 20)), Box((0, 11, 0), (10, 19, 20))],
    "blocks": [Box((r, 0, c), (5, 30, 10)) for r in (0, 5) for c in (0, 10)],
}


@pytest.mark.parametrize("cut", CUTS)
def test_shards_of_any_cut_come_together_as_the_whole_tensor(tmp_path: Path, cut: str) -> None:
    array = some((10, 30, 20), "int32", 4)
    target = written(tmp_path, saved(tmp_path, Held({"w": array}, {"w": CUTS[cut]})))
    assert raw_tensor(load_file(target)["w"]) == raw(array)


def test_tied_tensors_are_written_in_full_under_every_name(tmp_path: Path) -> None:
    array = some((40, 50))
    target = written(tmp_path, saved(tmp_path, Held({"embed": array}, ties={"head": "embed", "head2": "embed"})))
    loaded = load_file(target)
    assert {key: raw_tensor(tensor) for key, tensor in loaded.items()} == dict.fromkeys(
        ["embed", "head", "head2"], raw(array)
    )


def test_only_and_strip_choose_and_rename(tmp_path: Path) -> None:
    keys = ["model.a.weight", "model.b.weight", "optimizer.x"]
    snapshot = saved(tmp_path, Held({key: some((3,), seed=n) for n, key in enumerate(keys)}))
    assert [t.name for t in plan_file(snapshot, only=["model.*"], strip="model.").tensors] == ["a.weight", "b.weight"]
    assert [t.name for t in plan_file(snapshot, only=["*.x", "model.b*"]).tensors] == ["model.b.weight", "optimizer.x"]


def test_names_that_would_be_the_same_are_refused_and_named(tmp_path: Path) -> None:
    snapshot = saved(tmp_path, Held({"w": some((3,)), "model.w": some((3,)), "model.": some((1,))}))
    with pytest.raises(StateMismatch, match=r"model\.w and w would both be called 'w'"):
        plan_file(snapshot, only=["*w"], strip="model.")
    with pytest.raises(StateMismatch, match="would be called ''"):
        plan_file(snapshot, only=["model."], strip="model.")


def test_a_dtype_without_a_name_is_refused_naming_the_key(tmp_path: Path) -> None:
    snapshot = saved(tmp_path, Held({"phase": some((4,), "complex128"), "w": some((4,))}))
    with pytest.raises(StateMismatch, match=r"phase: .*complex128.*--only"):
        plan_file(snapshot)
    assert [t.name for t in plan_file(snapshot, only=["w"]).tensors] == ["w"]


def test_what_is_there_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    snapshot = saved(tmp_path, Held({"w": some((4,))}))
    target = tmp_path / "mine"
    target.write_text("precious")
    plan = plan_file(snapshot)
    with pytest.raises(FileExistsError, match="--force"):
        write_file(plan, snapshot, str(target))
    assert target.read_text() == "precious"
    write_file(plan, snapshot, str(target), force=True)
    assert list(load_file(target)) == ["w"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "repository"]


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    snapshot = saved(tmp_path, Held({"w": some((4,))}))
    target = tmp_path / "mine"
    with pytest.raises(FileExistsError):
        write_file(plan_file(snapshot), snapshot, str(target), on_progress=lambda done, all_: target.write_text("new"))
    assert target.read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "repository"]


def test_a_damaged_snapshot_leaves_nothing_behind(tmp_path: Path) -> None:
    snapshot = saved(tmp_path, Held({"w": some((4000,))}))
    pack = next((tmp_path / "repository/packs").rglob("*.pack"))
    data = bytearray(pack.read_bytes())
    data[0] ^= 1
    pack.write_bytes(data)
    with pytest.raises(SnapshotDamaged, match="w "):
        write_file(plan_file(snapshot), snapshot, str(tmp_path / "out"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["repository"]


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restoring a tensor takes buffers, not the tensor: measured as what Python and numpy allocate."""
    import tracemalloc

    size = 64 * 1024 * 1024
    array = np.ones((size // 4096, 4096), "uint8")
    snapshot = saved(tmp_path, Held({"w": array}, {"w": [Box((0, 0), (len(array), 4096))]}))
    monkeypatch.setattr(chunk_reader, "READ_BYTES_MAX", 1024 * 1024)
    plan = plan_file(snapshot)
    tracemalloc.start()
    try:
        write_file(plan, snapshot, str(tmp_path / "out"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size // 2
    assert os.path.getsize(tmp_path / "out") == plan.file_bytes


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    snapshot = saved(tmp_path, Held({"w": some((100, 100)), "e": some((0,))}, ties={"t": "w"}))
    seen: list[tuple[int, int]] = []
    lock = threading.Lock()
    plan = plan_file(snapshot)

    def on_progress(done: int, total: int) -> None:
        assert lock.acquire(blocking=False), "calls come one at a time"
        seen.append((done, total))
        lock.release()

    write_file(plan, snapshot, str(tmp_path / "out"), on_progress=on_progress)
    assert seen[-1] == (80000, 80000)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
