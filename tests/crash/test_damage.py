"""Every bit of a small repository is flipped; its objects are cut, lost, swapped, replaced, and overwritten with blocks
of others; a larger one is damaged at random. Nothing wrong is ever restored, and what is damaged is named.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest

from fastckpt.errors import FormatError, ObjectNotFound, SnapshotDamaged, StorageError
from fastckpt.format import document, names
from fastckpt.format.tables import ChunkPlace
from fastckpt.options import Options
from fastckpt.plan.save_plan import KNOWN, OWN
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.repository import Repository
from fastckpt.repository.verify import check_history, verify
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Capabilities, ObjectInfo
from tests.crash.numpy_job import (
    CHUNK_BYTES,
    UNTOUCHED,
    Job,
    Spec,
    Tensor,
    read_all,
    snapshot_violations,
    stored_tensors,
    tiny_spec,
)

SIZE = 2
SPEC = tiny_spec(SIZE)
LARGE_SIZE = 4
LARGE_SPEC = {
    "w": Tensor("float32", (768, 4096), KNOWN, split=0),
    "v": Tensor("float32", (2048, 512), KNOWN),
    "h": Tensor("float64", (4, 8192 * LARGE_SIZE), KNOWN, split=1),  # rows longer than a chunk
    "o": Tensor("uint8", (1_000_000,), OWN),
    "b": Tensor("float32", (8,), KNOWN),
    "t": Tensor("int16", (3,), KNOWN),
}
LARGE_CHUNK_BYTES = 65_536
LARGE_FLIPS = 2_500


class FrozenStore:
    """Objects of a repository, to be read only."""

    def __init__(self, objects: Mapping[str, bytes | bytearray]) -> None:
        self.objects = dict(objects)
        self.url = "memory://frozen"
        self.capabilities = Capabilities(durable=False, create_if_absent=True)

    def having(self, changed: Mapping[str, bytes | bytearray | None]) -> FrozenStore:
        """The same with some objects' bytes changed; None: the object is missing."""
        together = {**self.objects, **changed}
        return FrozenStore({name: content for name, content in together.items() if content is not None})

    def read(self, name: str, *, size_max: int) -> bytes:
        content = self._find(name)
        if len(content) > size_max:
            raise StorageError(f"{name} has {len(content)} bytes, at most {size_max} are allowed")
        return bytes(content)

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

    def _find(self, name: str) -> bytes | bytearray:
        if name not in self.objects:
            raise ObjectNotFound(f"no {name}")
        return self.objects[name]

    def free_bytes(self) -> None:
        return None

    def sweep(self, folders: object) -> NoReturn:
        raise AssertionError("reading does not write")

    def create(self, name: str, data: object) -> NoReturn:
        raise AssertionError("reading does not write")

    def write(self, name: str, *, bytes_expected: int = 0) -> NoReturn:
        raise AssertionError("reading does not write")

    def delete(self, name: str) -> NoReturn:
        raise AssertionError("reading does not delete")


def a_repository(
    codec: str, steps: tuple[int, ...], size: int = SIZE, spec: Spec = SPEC, chunk_bytes: int = CHUNK_BYTES
) -> FrozenStore:
    """Written by ranks on two nodes."""
    store = MemoryStore("job")
    options = Options(chunk_bytes=chunk_bytes, codec=codec)  # type: ignore[arg-type]
    job = Job([store] * size, spec=spec, nodes=("a", "b") * (size // 2), options=options).run(steps)
    assert job.reported == set(steps), job.outcomes
    return FrozenStore({info.name: store.read(info.name, size_max=info.size) for info in store.list("")})


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
                expected = stored_tensors(SPEC, snapshot.step, SIZE)
                seen.wrong += [f"step {snapshot.step}: {wrong}" for wrong in wrong_bytes(arrays, expected)]
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


def wrong_bytes(arrays: dict[str, npt.NDArray[np.uint8]], expected: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """Bytes in sinks that are neither what was saved nor what was there before."""
    found = []
    for key, array in arrays.items():
        if key not in expected:
            found.append(f"restored a tensor {key} that was never saved")
            continue
        right = np.frombuffer(expected[key].tobytes(), np.uint8)
        flat = array.reshape(-1)
        if len(flat) != len(right) or not bool(((flat == right) | (flat == UNTOUCHED)).all()):
            found.append(f"{key} got bytes that were never saved")
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


# --- packs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What a chunk holds of one shard."""

    key: str
    shard: str
    at: tuple[slice, ...]
    """Its first element, in the tensor: reading it reads the chunk, and no other."""


@dataclass(frozen=True)
class Stored:
    """A chunk as the repository places it."""

    place: ChunkPlace
    contents: tuple[Content, ...]

    @property
    def keys(self) -> set[str]:
        return {content.key for content in self.contents}

    @property
    def end(self) -> int:
        return self.place.offset + self.place.length


def chunks_by_pack(snapshot: Snapshot) -> dict[str, list[Stored]]:
    """In order of offset."""
    layout, found = snapshot.layout, {}  # type: ignore[var-annotated]
    for unit in snapshot.chunks.units():
        for chunk, pieces in enumerate(snapshot.chunks.pieces(unit), unit.first):
            contents = []
            for piece in pieces:
                box = layout.box(piece.shard)
                inside = np.unravel_index(piece.start, box.sizes) if box.sizes else ()
                at = tuple(slice(low + int(i), low + int(i) + 1) for low, i in zip(box.offsets, inside, strict=True))
                contents.append(Content(layout.label(layout.shard_key(piece.shard)), str(box), at))
            place = snapshot.place(chunk)
            found.setdefault(place.pack, []).append(Stored(place, tuple(contents)))
    return {pack: sorted(chunks, key=lambda stored: stored.place.offset) for pack, chunks in found.items()}


class Opened:
    """A repository that is open while its packs are overwritten, in place, and put right again.

    Nothing of a pack is kept by a reader, so each damage is seen as by one that has just come; and only what is near
    the damage has to be read to see it.
    """

    def __init__(self, store: FrozenStore, spec: Spec, size: int) -> None:
        self.store = store.having({name: bytearray(store.objects[name]) for name in packs(store)})
        self.packs = packs(store)
        self._repository = Repository(self.store)
        self.snapshot_of: dict[str, Snapshot] = {}
        self.chunks: dict[str, list[Stored]] = {}
        for snapshot in self._repository.snapshots():
            snapshot.check()
            found = chunks_by_pack(snapshot)
            self.chunks |= found
            self.snapshot_of |= dict.fromkeys(found, snapshot)
        assert set(self.chunks) == set(self.packs)
        self._expected = {s.step: stored_tensors(spec, s.step, size) for s in self.snapshot_of.values()}

    def check_intact(self) -> None:
        """No alarm where nothing is wrong."""
        self._check_everything(self.packs[0], set(), "intact")
        assert verify(self._repository, self._repository.snapshots(), lambda progress: None) == []

    def footer(self, name: str) -> int:
        """Where the chunks of a pack end."""
        return self.chunks[name][-1].end

    def check_flip(self, name: str, bit: int, *, all_of_it: bool = False) -> None:
        byte = bit // 8
        self.check(name, byte, bytes([self.store.objects[name][byte] ^ 1 << bit % 8]), all_of_it=all_of_it)

    def check(self, name: str, start: int, block: bytes, *, all_of_it: bool = False) -> None:
        """Overwritten with ``block``, exactly the chunks that changed are refused, naming key, shard, object and
        offset; their neighbours are read. A change behind the chunks keeps nothing from being read, and verify names
        the pack. ``all_of_it``: so it is with everything else in the repository, too, and verify agrees."""
        content = self.store.objects[name]
        assert isinstance(content, bytearray)
        before = bytes(content[start : start + len(block)])
        changed = [start + i for i, (old, new) in enumerate(zip(before, block, strict=True)) if old != new]
        if not changed:
            return
        content[start : start + len(block)] = block
        try:
            self._check(name, changed, f"{name}: {len(block)} bytes at {start}", all_of_it)
        finally:
            content[start : start + len(block)] = before

    def _check(self, name: str, changed: list[int], where: str, all_of_it: bool) -> None:
        chunks, snapshot = self.chunks[name], self.snapshot_of[name]
        numbers = [bisect.bisect_right(chunks, at, key=lambda stored: stored.place.offset) - 1 for at in changed]
        hit = sorted({number for number, at in zip(numbers, changed, strict=True) if at < chunks[number].end})
        for number in hit:
            for content in chunks[number].contents:
                said = self._refused(snapshot, content, where)
                assert (said.key, said.shard, said.object) == (content.key, content.shard, name), where
                assert said.offset == chunks[number].place.offset, where
                assert all(text in str(said) for text in (content.key, content.shard, name, str(said.offset))), where
        near = {number + step for number in hit for step in (-1, 1)} - set(hit)
        for number in near & set(range(len(chunks))):
            for content in chunks[number].contents:
                right = self._expected[snapshot.step][content.key][content.at]
                assert snapshot.read(content.key, content.at).tobytes() == right.tobytes(), (where, content)
        if all_of_it:
            self._check_everything(name, {key for number in hit for key in chunks[number].keys}, where)
        if all_of_it or not hit:
            damages = verify(self._repository, [snapshot], lambda progress: None)
            assert {damage.object for damage in damages} == {name}, (where, damages)
            found = {(damage.key, damage.shard, damage.offset) for damage in damages}
            if changed[-1] < self.footer(name):
                assert found == {
                    (content.key, content.shard, chunks[number].place.offset)
                    for number in hit
                    for content in chunks[number].contents
                }, where

    @staticmethod
    def _refused(snapshot: Snapshot, content: Content, where: str) -> SnapshotDamaged:
        try:
            snapshot.read(content.key, content.at)
        except SnapshotDamaged as error:
            return error
        raise AssertionError(f"{where}: {content} was read")

    def _check_everything(self, name: str, refused: set[str], where: str) -> None:
        """Opened anew: all but the refused tensors can be read, and reading all at once leaves nothing wrong."""
        for snapshot in Repository(self.store).snapshots():
            snapshot.check()
            mine = refused if snapshot.attempt == self.snapshot_of[name].attempt else set()
            for key, array in self._expected[snapshot.step].items():
                if key not in mine:
                    assert snapshot.read(key).tobytes() == array.tobytes(), (where, key)
            arrays: dict[str, npt.NDArray[np.uint8]] = {}
            caught = None
            try:
                read_all(snapshot, arrays)
            except SnapshotDamaged as error:
                caught = error
            assert (caught is not None) == bool(mine), where
            assert caught is None or (caught.key in mine and caught.object == name), where
            assert not wrong_bytes(arrays, self._expected[snapshot.step]), where


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_every_flipped_bit_of_every_pack_is_found_and_named(codec: str, request: pytest.FixtureRequest) -> None:
    opened = Opened(request.getfixturevalue(codec), SPEC, SIZE)
    count = 0
    for name in opened.packs:
        for bit in range(8 * len(opened.store.objects[name])):
            opened.check_flip(name, bit, all_of_it=count % 97 == 0)
            count += 1
    print(f"{count} flips")
    assert count > 6_000


# --- a larger one, at random --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["raw", "zstd"])
def large(request: pytest.FixtureRequest) -> Opened:
    """Tens of MiB of four ranks, two snapshots."""
    store = a_repository(request.param, (1, 2), LARGE_SIZE, LARGE_SPEC, LARGE_CHUNK_BYTES)
    opened = Opened(store, LARGE_SPEC, LARGE_SIZE)
    print(f"{sum(map(len, store.objects.values())):,} bytes, {sum(map(len, opened.chunks.values()))} chunks")
    return opened


def damage_at_random(opened: Opened, seed: int, flips: int) -> None:
    """Flips bits of packs, each byte as likely as any other, and of metadata and footers; and puts blocks of other
    packs and places into packs."""
    generator = random.Random(seed)
    sizes = [len(opened.store.objects[name]) for name in opened.packs]

    def any_pack() -> str:
        return generator.choices(opened.packs, sizes)[0]

    for number in range(flips):
        name = any_pack()
        opened.check_flip(name, generator.randrange(8 * len(opened.store.objects[name])), all_of_it=number % 250 == 0)
    for _ in range(flips // 100):
        name = any_pack()
        opened.check_flip(name, generator.randrange(8 * opened.footer(name), 8 * len(opened.store.objects[name])))
    for number in range(flips // 10):
        name, other = any_pack(), any_pack()
        content, source = opened.store.objects[name], opened.store.objects[other]
        length = generator.choice([512, 4096, 65_536])
        start = generator.randrange(0, min(len(content), len(source)), 512)
        # At the same offset, as after a misdirected or a lost write; now and then at another.
        at = start if number % 4 else generator.randrange(0, len(source), 512)
        block = bytes(source[at : at + length])[: len(content) - start]
        opened.check(name, start, block, all_of_it=number % 50 == 0)
    named = metadata(opened.store)
    damaged = opened.store.having({})
    for _ in range(flips // 10):
        name = generator.choice(named)
        content = opened.store.objects[name]
        damaged.objects[name] = flipped(bytes(content), generator.randrange(8 * len(content)))
        assert name in detect_metadata_flip(damaged, name), name
        damaged.objects[name] = content


def test_random_damage_to_a_larger_repository_is_found_and_named(large: Opened, seed: int) -> None:
    damage_at_random(large, seed, LARGE_FLIPS)


def test_a_larger_repository_restores_and_verifies_without_a_false_alarm(large: Opened) -> None:
    large.check_intact()


@pytest.mark.soak
@pytest.mark.timeout(36_000)
def test_much_random_damage_to_a_larger_repository_is_found_and_named(large: Opened, seed: int) -> None:
    for number in range(int(os.environ.get("SOAK_ROUNDS", "20"))):
        damage_at_random(large, seed + number, LARGE_FLIPS)


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


def test_a_block_of_another_or_an_older_object_is_found_and_named(raw: FrozenStore) -> None:
    """A write that was lost, or that went to the same place in another file."""
    count = 0
    for one, other in same_kind(raw):
        content, source = raw.objects[one], raw.objects[other]
        for length in (64, 512):
            for start in range(0, min(len(content), len(source)), length):
                block = source[start : start + length][: len(content) - start]
                damaged = content[:start] + block + content[start + len(block) :]
                if damaged != content:
                    must_be_named(raw, {one: damaged}, f"{one} has bytes {start} to {start + length} of {other}")
                    count += 1
    assert count > 250


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
