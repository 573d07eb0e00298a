"""Every bit of the metadata of a small repository is flipped, its packs are damaged in many ways, and objects are cut,
lost, swapped and replaced. Nothing wrong is ever restored, and what is damaged is named.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import pytest

from fastckpt.errors import FormatError, ObjectNotFound, SnapshotDamaged, StorageError
from fastckpt.format import document, names
from fastckpt.format.tables import ChunkPlace
from fastckpt.options import Options
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.repository import Repository
from fastckpt.repository.verify import check_history, verify
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Capabilities, ObjectInfo
from tests.crash.numpy_job import (
    CHUNK_BYTES,
    UNTOUCHED,
    Job,
    read_all,
    snapshot_violations,
    stored_tensors,
    tiny_spec,
)
from tests.crash.volatile_store import BYTES_MAX

SIZE = 2
SPEC = tiny_spec(SIZE)
PACK_FLIPS = 500


class FrozenStore:
    """Objects of a repository, to be read only."""

    def __init__(self, objects: Mapping[str, bytes]) -> None:
        self.objects = dict(objects)
        self.url = "memory://frozen"
        self.capabilities = Capabilities(durable=False, create_if_absent=True)

    def having(self, changed: Mapping[str, bytes | None]) -> FrozenStore:
        """The same with some objects' bytes changed; None: the object is missing."""
        together = {**self.objects, **changed}
        return FrozenStore({name: content for name, content in together.items() if content is not None})

    def read(self, name: str, *, size_max: int) -> bytes:
        content = self._find(name)
        if len(content) > size_max:
            raise StorageError(f"{name} has {len(content)} bytes, at most {size_max} are allowed")
        return content

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        content = self._find(name)[offset : offset + len(buffer)]
        if len(content) < len(buffer):
            raise StorageError(f"{name} is too short")
        buffer[:] = content

    def size(self, name: str) -> int:
        return len(self._find(name))

    def children(self, prefix: str) -> Iterator[str]:
        start = len(prefix) + 1 if prefix else 0
        return iter(sorted({info.name[start:].partition("/")[0] for info in self.list(prefix)}))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        below = prefix + "/" if prefix else ""
        found = sorted(name for name in self.objects if name.startswith(below))
        return iter([ObjectInfo(name, len(self.objects[name])) for name in found])

    def _find(self, name: str) -> bytes:
        if name not in self.objects:
            raise ObjectNotFound(f"no {name}")
        return self.objects[name]

    def create(self, name: str, data: object) -> NoReturn:
        raise AssertionError("reading does not write")

    def write(self, name: str) -> NoReturn:
        raise AssertionError("reading does not write")

    def delete(self, name: str) -> NoReturn:
        raise AssertionError("reading does not delete")


def a_repository(codec: str, steps: tuple[int, ...]) -> FrozenStore:
    """Written by two ranks on two nodes."""
    store = MemoryStore("job")
    options = Options(chunk_bytes=CHUNK_BYTES, codec=codec)  # type: ignore[arg-type]
    job = Job([store] * SIZE, spec=SPEC, nodes=("a", "b"), options=options).run(steps)
    assert job.reported == set(steps), job.outcomes
    return FrozenStore({info.name: store.read(info.name, size_max=BYTES_MAX) for info in store.list("")})


@pytest.fixture(scope="module")
def raw() -> FrozenStore:
    return a_repository("raw", (1, 2))


@pytest.fixture(scope="module")
def zstd() -> FrozenStore:
    return a_repository("zstd", (1,))


@pytest.fixture(scope="module")
def foreign() -> FrozenStore:
    """Another repository with the same steps: other bytes, since ids are random, and valid."""
    return a_repository("raw", (1, 2))


def kind_of(name: str) -> str:
    if name.startswith("attempts/"):
        return name.rpartition("/")[2].partition("-")[0]  # "index" or "part"
    return name.partition("/")[0]


def metadata(store: FrozenStore) -> list[str]:
    return [name for name in store.objects if kind_of(name) != "packs"]


def packs(store: FrozenStore) -> list[str]:
    return [name for name in store.objects if kind_of(name) == "packs"]


# --- how damage is seen -------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What became of opening a damaged repository, restoring all of it, and verifying it."""

    restored: bool
    """Everything, bit for bit."""
    names: set[str]
    """Objects named as damaged."""
    wrong: list[str]
    """What must not happen."""
    texts: str


def look(store: FrozenStore, *, name: str, steps: set[int], verify_too: bool = False) -> Seen:
    """Opens and restores; and verifies, if asked to or if restoring did not name the damaged object."""
    seen = Seen(False, set(), [], "")
    try:
        for snapshot in Repository(store).snapshots():
            snapshot.check()
            arrays: dict[str, npt.NDArray[np.uint8]] = {}
            try:
                read_all(snapshot, arrays)
            finally:
                seen.wrong += wrong_bytes(snapshot.step, arrays)
            seen.wrong += snapshot_violations(snapshot, snapshot.step, SIZE, SPEC)
            steps = steps - {snapshot.step}
        seen.restored = not steps
    except (SnapshotDamaged, FormatError) as error:
        note(seen, error)
    except Exception as error:
        seen.wrong.append(f"restoring raised {error!r}")
    if verify_too or name not in seen.names:
        try:
            opened = Repository(store)
            damages = verify(opened, [*readable(opened)], lambda progress: None)
            seen.names |= {damage.object for damage in damages}
            seen.texts += "\n".join(str(damage) for damage in damages)
        except (SnapshotDamaged, FormatError) as error:
            note(seen, error)
        except Exception as error:
            seen.wrong.append(f"verify raised {error!r}")
    return seen


def readable(opened: Repository) -> list[Snapshot]:
    try:
        return opened.snapshots()
    except (SnapshotDamaged, FormatError):
        return []  # verify names the decision all the same


def note(seen: Seen, error: Exception) -> None:
    seen.texts += f"{type(error).__name__}: {error}\n"
    named = getattr(error, "object", None)
    if named is not None:
        seen.names.add(named)
    seen.names |= {word.strip(":,;") for word in str(error).split()}


def wrong_bytes(step: int, arrays: dict[str, npt.NDArray[np.uint8]]) -> list[str]:
    """Bytes in sinks that are neither what was saved nor what was there before."""
    expected = stored_tensors(SPEC, step, SIZE)
    found = []
    for key, array in arrays.items():
        if key not in expected:
            found.append(f"step {step}: restored a tensor {key} that was never saved")
            continue
        right = np.frombuffer(expected[key].tobytes(), np.uint8)
        flat = array.reshape(-1)
        if len(flat) != len(right) or not bool(((flat == right) | (flat == UNTOUCHED)).all()):
            found.append(f"step {step}: {key} got bytes that were never saved")
    return found


def must_be_named(
    store: FrozenStore, changed: Mapping[str, bytes | None], why: str, also: frozenset[str] = frozenset()
) -> None:
    """Damaged like this, at least one of the changed objects (or of ``also``) is named, and nothing wrong happens."""
    damaged = store.having(changed)
    seen = look(damaged, name=next(iter(changed)), steps={1, 2}, verify_too=True)
    assert not seen.wrong, (why, seen)
    assert seen.names & (set(changed) | also), (why, seen)


def flipped(content: bytes, bit: int) -> bytes:
    byte = bit // 8
    return content[:byte] + bytes([content[byte] ^ 1 << bit % 8]) + content[byte + 1 :]


# --- intact -------------------------------------------------------------------------------------------------------


def test_an_intact_repository_restores_and_verifies_without_a_false_alarm(raw: FrozenStore, zstd: FrozenStore) -> None:
    for store, steps in ((raw, {1, 2}), (zstd, {1})):
        seen = look(store, name="nothing", steps=steps, verify_too=True)
        assert seen.restored
        assert not seen.names
        assert not seen.wrong
    assert {kind_of(name) for name in raw.objects} == {"FORMAT", "decisions", "layouts", "index", "part", "packs"}


# --- single bits --------------------------------------------------------------------------------------------------


def detect_metadata_flip(store: FrozenStore, name: str) -> str:
    """What a flip in a metadata object says: opening and checking all snapshots; then the whole history. The cheapest
    way that goes through the front door."""
    try:
        opened = Repository(store)
        for snapshot in opened.snapshots():
            snapshot.check()
        return " ".join(str(damage) for damage in check_history(opened))
    except (SnapshotDamaged, FormatError) as error:
        return f"{getattr(error, 'object', None)} {error}"


def flip_everything(store: FrozenStore, chosen: list[str], *, whole_look_every: int) -> int:
    count = 0
    steps = {snapshot.step for snapshot in Repository(store).snapshots()}
    for name in chosen:
        content = store.objects[name]
        damaged = store.having({})
        for bit in range(8 * len(content)):
            damaged.objects[name] = flipped(content, bit)
            said = detect_metadata_flip(damaged, name)
            assert name in said, f"{name}, bit {bit}: {said or 'nothing was found'}"
            if count % whole_look_every == 0:
                seen = look(damaged, name=name, steps=steps, verify_too=True)
                assert name in seen.names, (name, bit, seen)
                assert not seen.wrong, (name, bit, seen)
            count += 1
    return count


def test_every_flipped_bit_of_every_metadata_object_is_found_and_named(raw: FrozenStore) -> None:
    count = flip_everything(raw, metadata(raw), whole_look_every=97)
    print(f"{count} flips in {len(metadata(raw))} objects")
    assert count > 30_000


def test_every_flipped_bit_of_a_part_that_describes_zstd_chunks_is_found_and_named(zstd: FrozenStore) -> None:
    count = flip_everything(zstd, [name for name in metadata(zstd) if kind_of(name) == "part"], whole_look_every=97)
    print(f"{count} flips")
    assert count > 5_000


@dataclass(frozen=True)
class Stored:
    """A chunk as the repository places it, and the tensors that have a piece in it."""

    place: ChunkPlace
    keys: frozenset[str]


def chunks_by_pack(snapshot: Snapshot) -> dict[str, list[Stored]]:
    layout, found = snapshot.layout, {}  # type: ignore[var-annotated]
    for unit in range(len(layout.units)):
        for chunk, pieces in zip(snapshot.chunks.unit_chunks(unit), snapshot.chunks.unit_pieces(unit), strict=True):
            place = snapshot.place(chunk)
            keys = frozenset(layout.label(layout.shard_keys[piece.shard]) for piece in pieces)
            found.setdefault(place.pack, []).append(Stored(place, keys))
    return found


def check_pack_flip(store: FrozenStore, stored: dict[str, list[Stored]], name: str, bit: int) -> None:
    """A flip in a chunk: exactly the tensors that have a piece of it are refused, naming key, shard, object and offset;
    all others restore. A flip behind the chunks: everything restores, and verify names the pack."""
    damaged = store.having({name: flipped(store.objects[name], bit)})
    hit = [s for s in stored[name] if s.place.offset <= bit // 8 < s.place.offset + s.place.length]
    where = f"{name}, bit {bit}"
    opened = Repository(damaged)
    for snapshot in opened.snapshots():
        snapshot.check()
        expected = stored_tensors(SPEC, snapshot.step, SIZE)
        refused = hit[0].keys if hit and name.split("/")[1] == snapshot.attempt else frozenset()
        for key, array in expected.items():
            caught = None
            try:
                assert snapshot.read(key).tobytes() == array.tobytes(), where
            except SnapshotDamaged as error:
                caught = error
            assert (caught is not None) == (key in refused), f"{where}: reading {key}: {caught}"
            if caught is not None:
                assert (caught.key, caught.object, caught.offset) == (key, name, hit[0].place.offset), where
                assert caught.shard, where
                assert all(text in str(caught) for text in (key, name, str(caught.offset))), where
        arrays: dict[str, npt.NDArray[np.uint8]] = {}
        caught = None
        try:
            read_all(snapshot, arrays)
        except SnapshotDamaged as error:
            caught = error
        assert (caught is not None) == bool(refused), where
        assert caught is None or (caught.key in refused and caught.object == name), where
        assert not wrong_bytes(snapshot.step, arrays), where
    damages = verify(opened, opened.snapshots(), lambda progress: None)
    assert damages, f"{where}: verify found nothing"
    assert {damage.object for damage in damages} == {name}, (where, damages)
    if hit:
        assert {damage.key for damage in damages} == hit[0].keys, (where, damages)
        assert {damage.offset for damage in damages} == {hit[0].place.offset}, (where, damages)


def flip_in_packs(store: FrozenStore, seed: int, count: int) -> tuple[int, int]:
    """Flips random bits; half of them in footers. Returns how many were in chunks and how many behind them."""
    generator = random.Random(seed)
    stored = {}
    for snapshot in Repository(store).snapshots():
        stored |= chunks_by_pack(snapshot)
    assert set(stored) == set(packs(store))
    chunk_ends = {name: max(s.place.offset + s.place.length for s in found) for name, found in stored.items()}
    in_footers = 0
    for number in range(count):
        name = generator.choice(packs(store))
        start, end = (0, chunk_ends[name]) if number % 2 else (chunk_ends[name], len(store.objects[name]))
        in_footers += not number % 2
        check_pack_flip(store, stored, name, generator.randrange(8 * start, 8 * end))
    return count - in_footers, in_footers


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_flipped_bit_of_a_pack_is_found_and_named(codec: str, seed: int, request: pytest.FixtureRequest) -> None:
    in_chunks, in_footers = flip_in_packs(request.getfixturevalue(codec), seed, PACK_FLIPS)
    assert in_chunks >= PACK_FLIPS // 3
    assert in_footers >= PACK_FLIPS // 3


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_many_flipped_bits_of_packs_are_found_and_named(codec: str, seed: int, request: pytest.FixtureRequest) -> None:
    flip_in_packs(request.getfixturevalue(codec), seed, 20_000)


# --- cut, zeroed, missing -------------------------------------------------------------------------------------------


def test_every_metadata_object_and_every_pack_cut_to_any_length_is_found_and_named(raw: FrozenStore) -> None:
    for name, content in raw.objects.items():
        damaged = raw.having({})
        for length in range(len(content)):
            damaged.objects[name] = content[:length]
            said = detect_metadata_flip(damaged, name)
            assert name in said, f"{name} cut to {length} bytes: {said or 'nothing was found'}"


def test_an_object_with_bytes_added_is_found_and_named(raw: FrozenStore) -> None:
    for name, content in raw.objects.items():
        for added in (b"\0", b"\n", content, bytes(70_000)):
            must_be_named(raw, {name: content + added}, f"{name} with {len(added)} bytes added")


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_zeroed_block_of_512_bytes_is_found_and_named(codec: str, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(codec)
    for name, content in store.objects.items():
        for start in range(0, len(content), 512):
            end = min(start + 512, len(content))
            damaged = content[:start] + bytes(end - start) + content[end:]
            if damaged != content:
                must_be_named(store, {name: damaged}, f"{name} zeroed from {start} to {end}")


def newest_decision(store: FrozenStore) -> str:
    return max(name for name in store.objects if kind_of(name) == "decisions")


def test_a_missing_object_is_found_and_named(raw: FrozenStore) -> None:
    for name in raw.objects:
        if name != newest_decision(raw):
            must_be_named(raw, {name: None}, f"{name} missing")


def test_without_the_newest_decision_the_repository_is_as_it_was_before_it(raw: FrozenStore) -> None:
    """Nothing in a store can tell a history that lost its end from one that had not come that far. What must not
    happen is a state that never was."""
    seen = look(raw.having({newest_decision(raw): None}), name="nothing", steps={1}, verify_too=True)
    assert seen.restored
    assert not seen.wrong


# --- in the wrong place ---------------------------------------------------------------------------------------------


def same_kind(store: FrozenStore) -> Iterator[tuple[str, str]]:
    for one, other in itertools.permutations(store.objects, 2):
        if kind_of(one) == kind_of(other):
            yield one, other


def test_two_swapped_objects_are_found_and_named(raw: FrozenStore) -> None:
    for one, other in same_kind(raw):
        swapped = {one: raw.objects[other], other: raw.objects[one]}
        must_be_named(raw, swapped, f"{one} and {other} swapped")


def test_an_object_with_the_content_of_another_or_an_older_one_is_found_and_named(raw: FrozenStore) -> None:
    for one, other in same_kind(raw):
        must_be_named(raw, {one: raw.objects[other]}, f"{one} holds what {other} should")


def test_an_object_of_another_repository_is_found_and_named(raw: FrozenStore, foreign: FrozenStore) -> None:
    for name in raw.objects:
        for other in foreign.objects:
            if kind_of(name) == kind_of(other) and foreign.objects[other] != raw.objects[name]:
                # A decision and the one after it disagree, and nobody can say which of them is the foreign one.
                after = frozenset()
                if kind_of(name) == "decisions":
                    after = frozenset({names.decision(int(name[-12:]) + 1)})
                must_be_named(raw, {name: foreign.objects[other]}, f"{name} holds {other} of another repository", after)


def test_a_document_that_was_altered_and_sealed_again_is_found_and_named(raw: FrozenStore) -> None:
    """What names a document names its digest too; only for FORMAT and the newest decision nothing does."""
    altered = 0
    for name in metadata(raw):
        if kind_of(name) in ("decisions", "index") and name != newest_decision(raw):
            fields = json.loads(raw.objects[name].partition(b"\n")[0])
            place, key = (fields, "created") if kind_of(name) == "decisions" else (fields["environment"], "python")
            place[key] = "2001-01-01T00:00:00.000Z"
            after = frozenset[str]()
            if kind_of(name) == "decisions":  # either it or the next one is wrong
                after = frozenset({names.decision(int(name[-12:]) + 1)})
            must_be_named(raw, {name: document.seal(fields)}, f"{name} sealed again", after)
            altered += 1
    assert altered == 4


def test_restoring_a_damaged_pack_fails_for_what_is_in_it_only(raw: FrozenStore) -> None:
    """Two packs of equal size swapped: what is read from others is not affected."""
    for one, other in itertools.combinations(packs(raw), 2):
        damaged = raw.having({one: raw.objects[other], other: raw.objects[one]})
        for snapshot in Repository(damaged).snapshots():
            bad = {key for pack in (one, other) for s in chunks_by_pack(snapshot).get(pack, []) for key in s.keys}
            for key, array in stored_tensors(SPEC, snapshot.step, SIZE).items():
                if key not in bad:
                    assert snapshot.read(key).tobytes() == array.tobytes(), (one, other, key)
                    continue
                with pytest.raises(SnapshotDamaged, match="pack"):
                    snapshot.read(key)
