"""What differs between two snapshots is what differs between the tensors that were saved, however they were cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastckpt.errors import SnapshotDamaged
from fastckpt.plan.save_plan import KNOWN
from fastckpt.repository import compare as module
from fastckpt.repository.compare import Comparison, Form, compare
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.repository import Repository
from fastckpt.storage.memory import MemoryStore
from tests.crash import numpy_job
from tests.crash.numpy_job import CHUNK_BYTES, Job, Spec, Tensor, full_spec, stored_tensors

SPEC = full_spec(4)
Whole = Callable[..., npt.NDArray[Any]]


def saved(store: MemoryStore, step: int, size: int, spec: Spec = SPEC) -> Snapshot:
    job = Job([store] * size, spec=spec).run([step])
    assert job.reported == {step}, job.outcomes
    return Repository(store).snapshots()[-1]


def delete_packs(store: MemoryStore) -> None:
    for info in list(store.list("packs")):
        store.delete(info.name)


def changing(whole: Whole, **at: int) -> Whole:
    """The oracle, but for one element of the tensors named; ``__`` stands for a dot."""

    def changed(key: str, *args: Any, **settings: Any) -> npt.NDArray[Any]:
        array = whole(key, *args, **settings)
        if (name := key.replace(".", "__")) in at:
            array = array.copy()
            array.reshape(-1)[at[name]] += 1
        return array

    return changed


def expected_bytes(a: dict[str, npt.NDArray[Any]], b: dict[str, npt.NDArray[Any]]) -> dict[str, int]:
    """By key, the bytes of the elements that differ."""
    counts = {}
    for key in a.keys() & b.keys():
        x, y = (array.reshape(-1).view((np.void, array.itemsize)) for array in (a[key], b[key]))
        counts[key] = sum(one.tobytes() != other.tobytes() for one, other in zip(x, y, strict=True)) * x.itemsize
    return {key: count for key, count in counts.items() if count}


def check(found: Comparison, a: dict[str, npt.NDArray[Any]], b: dict[str, npt.NDArray[Any]]) -> None:
    expected = expected_bytes(a, b)
    assert {one.key for one in found.changed} == set(expected)
    for one in found.changed:
        if one.by == "bytes":
            assert one.changed_bytes == expected[one.key]
        else:
            assert expected[one.key] <= one.changed_bytes <= a[one.key].nbytes
    assert found.same == len(a.keys() & b.keys()) - len(expected)
    assert (set(found.removed), set(found.added)) == (a.keys() - b.keys(), b.keys() - a.keys())


@pytest.mark.parametrize(("ranks_a", "ranks_b"), list(itertools.product((1, 2, 4), repeat=2)))
def test_any_two_world_sizes_are_compared_element_by_element_or_by_hashes(
    ranks_a: int, ranks_b: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPARED_BYTES_MAX", 3 * CHUNK_BYTES)  # many batches
    store = MemoryStore("compare")
    a, b = saved(store, 1, ranks_a), saved(store, 2, ranks_b)
    check(compare(a, b), stored_tensors(SPEC, 1, ranks_a), stored_tensors(SPEC, 2, ranks_b))


@pytest.mark.parametrize("ranks", [1, 2])
def test_of_one_world_size_what_is_in_chunks_of_its_own_is_compared_without_reading(ranks: int) -> None:
    store = MemoryStore("compare")
    large = {key: tensor for key, tensor in SPEC.items() if np.prod(tensor.shape) > 1000}
    a, b = saved(store, 1, ranks, large), saved(store, 2, ranks, large)
    delete_packs(store)
    found = compare(a, b)
    assert {one.by for one in found.changed} == {"hashes"}
    check(found, stored_tensors(large, 1, ranks), stored_tensors(large, 2, ranks))


def test_bundles_that_are_equal_are_not_read_though_the_layout_is_another() -> None:
    store = MemoryStore("compare")
    more = {**SPEC, "zz.new": Tensor("float32", (40, 64), KNOWN)}
    a, b = saved(store, 1, 2), saved(store, 1, 2, more)
    delete_packs(store)
    assert a.index.layout != b.index.layout
    assert compare(a, a) == Comparison({}, {}, {}, [], len(a.keys()))
    assert compare(a, b) == Comparison({"zz.new": Form("float32", (40, 64))}, {}, {}, [], len(a.keys()))
    assert compare(b, a).removed == compare(a, b).added


def test_equal_bundles_decide_nothing_about_a_tensor_that_lies_elsewhere_in_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = MemoryStore("compare")
    small = Tensor("uint8", (4,), KNOWN)
    for step, content in ((1, {"b": 1, "c": 2}), (2, {"a": 1, "b": 2})):
        monkeypatch.setattr(numpy_job, "whole", lambda key, *_, c=content: np.full(4, c[key], "uint8"))
        saved(store, step, 1, dict.fromkeys(content, small))
    a, b = Repository(store).snapshots()
    assert a.place(0).hash == b.place(0).hash
    assert [(one.key, one.changed_bytes) for one in compare(a, b).changed] == [("b", 4)]


def test_one_element_counts_as_its_chunk_by_hashes_and_as_itself_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore("compare")
    a, split = saved(store, 1, 1), saved(store, 1, 2)
    # In the second of three chunks (model.tied is tied to it), in a bundle, and in a tensor that two ranks divide.
    other = changing(numpy_job.whole, model__weight=1500, model__bias=3, model__embedding=700)
    monkeypatch.setattr(numpy_job, "whole", other)
    b = saved(store, 1, 1)
    whole_chunks = [("model.tied", CHUNK_BYTES, "hashes"), ("model.weight", CHUNK_BYTES, "hashes")]
    assert [(one.key, one.changed_bytes, one.by) for one in compare(a, b).changed] == [
        ("model.bias", 4, "bytes"),
        ("model.embedding", CHUNK_BYTES, "hashes"),
        *whole_chunks,
    ]
    assert [(one.key, one.changed_bytes, one.by) for one in compare(split, b).changed] == [
        ("model.bias", 4, "bytes"),
        ("model.embedding", 4, "bytes"),
        *whole_chunks,
    ]


def test_another_shape_or_dtype_is_named_and_not_compared() -> None:
    store = MemoryStore("compare")
    other = {**SPEC, "model.scale": Tensor("float64", (3, 5), KNOWN), "model.bias": Tensor("float32", (2, 4), KNOWN)}
    found = compare(saved(store, 1, 1), saved(store, 1, 1, other))
    assert found.other_form == {
        "model.bias": (Form("float32", (8,)), Form("float32", (2, 4))),
        "model.scale": (Form("float16", (3, 5)), Form("float64", (3, 5))),
    }
    assert (found.same, found.changed) == (len(SPEC) - 2, [])


def test_not_a_number_equals_itself_and_the_two_zeros_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore("compare")
    spec = {"x": Tensor("float32", (4,), KNOWN), "y": Tensor("float32", (4,), KNOWN)}
    for number, zero in ((1, 0.0), (2, -0.0)):
        arrays = {"x": np.array([np.nan, 1, 2, 3], "float32"), "y": np.array([zero, 1, 2, 3], "float32")}
        monkeypatch.setattr(numpy_job, "whole", lambda key, *_, arrays=arrays: arrays[key])
        saved(store, number, 1, spec)
    assert [(one.key, one.changed_bytes) for one in compare(*Repository(store).snapshots()).changed] == [("y", 4)]


def test_bytes_that_must_be_read_and_are_damaged_raise_and_name_the_key() -> None:
    store = MemoryStore("compare")
    a, b = saved(store, 1, 1), saved(store, 1, 2)
    delete_packs(store)
    with pytest.raises(SnapshotDamaged, match="is missing") as raised:
        compare(a, b)
    assert raised.value.key in a.keys()  # noqa: SIM118 - a snapshot is no dict


def test_what_is_held_at_once_is_a_few_chunks_however_large_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore("compare")
    spec = {"rows": Tensor("float32", (1024, 64), KNOWN, split=0), "wide": Tensor("uint8", (2, 65536), KNOWN, split=1)}
    a, b = saved(store, 1, 1, spec), saved(store, 2, 4, spec)
    held: list[int] = []
    read = module._read

    def watched(*args: Any) -> Any:
        arrays = read(*args)
        held.append(sum(array.nbytes for group in arrays for array in group))
        return arrays

    monkeypatch.setattr(module, "COMPARED_BYTES_MAX", 2 * CHUNK_BYTES)
    monkeypatch.setattr(module, "_read", watched)
    progress: list[tuple[int, int]] = []
    check(compare(a, b, lambda *at: progress.append(at)), stored_tensors(spec, 1, 1), stored_tensors(spec, 2, 4))
    total = 1024 * 64 * 4 + 2 * 65536
    assert max(held) <= 2 * CHUNK_BYTES
    assert sum(held) == 2 * total
    assert progress[-1] == (total, total)
    assert len(progress) >= total // (2 * CHUNK_BYTES)
