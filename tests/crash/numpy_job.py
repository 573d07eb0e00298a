"""A job without torch: what its ranks hold at each step, how they save it, and what has to come back.

``whole`` is the oracle: it says what every tensor is at every step without asking the code under test.
"""

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastckpt.agreement import Attempt, offer_digest
from fastckpt.buffers import Pool
from fastckpt.errors import FastckptError
from fastckpt.format import value
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.decision import Live
from fastckpt.format.dtype import item_bytes
from fastckpt.format.shard import Box
from fastckpt.group import Group, SoloGroup
from fastckpt.options import Options
from fastckpt.plan.restore_plan import Want
from fastckpt.plan.save_plan import COMPARED, KNOWN, LOWEST, OWN, Offer, RankOffer
from fastckpt.repository import repository
from fastckpt.repository.reader import ArraySink, Snapshot
from fastckpt.restore import Restores
from fastckpt.save import Labels, Saves
from fastckpt.storage.store import Store
from fastckpt.testing.faulty_store import Killed
from fastckpt.testing.thread_group import MemoryKeyValue, ThreadGroup
from fastckpt.trace import Trace

CHUNK_BYTES = 4096
OPTIONS = Options(chunk_bytes=CHUNK_BYTES, commit_seconds_max=30.0)
NODES = ("a", "a", "b", "b")
GENERATION = 1_000_000
"""What a job saves has a number: its step, plus a multiple of this where a step is saved again with other content."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    sharing: int
    split: int | None = None
    """The dimension that is divided between the ranks; None: each rank holds all of it."""
    alias: str = ""


Spec = Mapping[str, Tensor]


def full_spec(size: int) -> Spec:
    """Every kind of tensor a job of ``size`` ranks can hold."""
    return {
        "model.weight": Tensor("float32", (48, 64), KNOWN),
        "model.tied": Tensor("float32", (48, 64), KNOWN, alias="model.weight"),
        "model.bias": Tensor("float32", (8,), KNOWN),
        "model.scale": Tensor("float16", (3, 5), KNOWN),
        "model.nothing": Tensor("float32", (0, 3), KNOWN),
        "model.embedding": Tensor("float32", (4 * size, 256), KNOWN, split=0),
        "model.head": Tensor("float64", (2, 256 * size), KNOWN, split=1),
        "optimizer.step": Tensor("int64", (), KNOWN),
        "buffers.mean": Tensor("float64", (8,), LOWEST),
        "hand.replicated": Tensor("float32", (40,), COMPARED),
        "own.tiny": Tensor("int32", (4,), OWN),
        "own.large": Tensor("uint8", (5000,), OWN),
    }


def tiny_spec(size: int) -> Spec:
    """As few bytes as a repository can have that still has grid chunks, bundles and every rank's own."""
    return {
        "w": Tensor("float32", (4 * size, 16), KNOWN, split=0),
        "b": Tensor("float32", (8,), KNOWN),
        "t": Tensor("int16", (3,), KNOWN),
        "o": Tensor("uint8", (100,), OWN),
    }


def whole(key: str, tensor: Tensor, step: int, owner: int = -1) -> npt.NDArray[Any]:
    """The oracle. ``owner``: the rank whose own it is, or -1."""
    generator = np.random.default_rng([zlib.crc32(key.encode()), step, owner + 1])
    dtype = np.dtype(tensor.dtype)
    # Of few different values, so that zstd has something to do.
    size = int(np.prod(tensor.shape)) * dtype.itemsize
    return generator.integers(0, 8, size, np.uint8).view(dtype).reshape(tensor.shape)


def stored_tensors(spec: Spec, step: int, size: int) -> dict[str, npt.NDArray[Any]]:
    """What a snapshot has to hold, by the key it is read by."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for key, tensor in spec.items():
        if tensor.sharing == OWN and size > 1:
            tensors.update({f"{key}@{rank}": whole(key, tensor, step, rank) for rank in range(size)})
        else:
            owner = 0 if tensor.sharing in (LOWEST, OWN) else -1
            tensors[key] = whole(tensor.alias or key, tensor, step, owner)
    return tensors


def stored_values(step: int, rank: int) -> dict[str, object]:
    """What a snapshot has to hold of a rank's plain values."""
    return {"progress": {"step": step, "name": "equal on all ranks"}, "rng": (step, rank, bytes([rank]) * 20)}


def share(tensor: Tensor, rank: int, size: int) -> Box:
    """The part of a tensor that one of ``size`` ranks holds."""
    box = Box.whole(tensor.shape)
    if tensor.split is None:
        return box
    part = tensor.shape[tensor.split] // size
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[tensor.split], sizes[tensor.split] = rank * part, part
    return Box(tuple(offsets), tuple(sizes))


class State:
    """What one rank offers at one step; the ``Offered`` of the save flow."""

    def __init__(self, step: int, rank: int, size: int, spec: Spec) -> None:
        self._arrays: dict[tuple[str, Box], npt.NDArray[Any]] = {}
        self._spec = spec
        offers = []
        for key, tensor in spec.items():
            box = share(tensor, rank, size)
            owner = rank if tensor.sharing in (LOWEST, OWN) else -1
            array = whole(tensor.alias or key, tensor, step, owner)[box.slices()]
            self._arrays[key, box] = np.ascontiguousarray(array)
            boxes = [(list(box.offsets), list(box.sizes))] if box.elements and not tensor.alias else []
            offers.append(Offer(key, tensor.dtype, list(tensor.shape), boxes, tensor.sharing, 0, tensor.alias))
        self.offer = RankOffer(offers, [list(range(size))])
        self.digest = offer_digest(self.offer)
        self.values = {name: value.encode(plain) for name, plain in stored_values(step, rank).items()}
        self.labels = Labels(note=f"{step} of {size}")

    def sampled(self, keys: Sequence[str], *, whole: bool = False) -> dict[str, bytes]:
        return {key: chunk_hash(array.tobytes()) for (key, _), array in self._arrays.items() if key in keys}

    def source(self, key: str, box: Box) -> ArraySource:
        return ArraySource(self._arrays[key, box])

    def check_unchanged(self) -> None:
        pass


class ArraySource:
    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._data = array.tobytes()
        self.bytes = len(self._data)

    def fill(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]


class RankSaves:
    """One rank's saves, in the order in which ``Checkpointer`` makes the calls, but not behind anything."""

    def __init__(self, store: Store, group: Group, options: Options = OPTIONS) -> None:
        self._saves = Saves(store, group, options)
        self._pool: Pool | None = None
        self._cleaned = False

    def save(self, step: int, state: State, on_committed: Callable[[int], None] = lambda step: None) -> Live:
        trace = Trace()
        attempt = self._saves.agree(step % GENERATION, state, trace)
        written: Any
        try:
            written = self._saves.write(attempt, state, self._staging_pool(attempt), trace, lambda: None)
        except Exception as error:
            written = error
        live = self._saves.commit(attempt, written, state.values, state.labels, trace)
        on_committed(step)
        if not self._cleaned:
            self._cleaned = True
            with contextlib.suppress(FastckptError):  # as in Checkpointer: the next job tries again
                self._saves.clean()
        return live

    def _staging_pool(self, attempt: Attempt) -> Pool:
        wanted = attempt.agreed.pool_bytes(6 * CHUNK_BYTES)
        if self._pool is None or self._pool.bytes < wanted:
            self._pool = Pool(wanted)
        self._pool.reset()
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def save_alone(store: Store, step: int, spec: Spec, options: Options = OPTIONS) -> Live:
    """One save of a new job of one rank."""
    saves = RankSaves(store, SoloGroup(), options)
    live = saves.save(step, State(step, 0, 1, spec))
    saves.close()
    return live


class Job:
    """Ranks as threads; each has a store of its own, which may be the same.

    A job does what a real one does after a failure: a rank that raises goes away. Nobody waits for the dead by the
    clock: once a rank has gone, what it has not said counts as not said in time. Once ``is_killed``, every rank
    that asks or tells the others anything dies too.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        spec: Spec | None = None,
        nodes: Sequence[str] = NODES,
        options: Options = OPTIONS,
        is_killed: Callable[[], bool] = lambda: False,
        key_value: MemoryKeyValue | None = None,
        on_committed: Callable[[int], None] = lambda step: None,
    ) -> None:
        """``on_committed`` is called by every rank that is told of a commit."""
        self._stores = stores
        self._size = len(stores)
        self._spec = spec or full_spec(self._size)
        self._options = options
        self._mortal = MortalKeyValue(is_killed)
        self._group = ThreadGroup(self._size, nodes[: self._size], seconds_max=60.0)
        self._group.key_value = key_value or self._mortal
        self._on_committed = on_committed
        self.reported: set[int] = set()
        """Steps that at least one rank was told are committed."""
        self.outcomes: list[dict[int, Live | BaseException]] = []
        """For each rank and step how its save ended."""

    def run(self, steps: Sequence[int], *, on_each_step_done: Callable[[int], None] | None = None) -> Job:
        """Saves the steps. With ``on_each_step_done`` the ranks go on after failures, in step: it is called between
        steps, when no rank is doing anything."""
        self.outcomes = [{} for _ in range(self._size)]
        done = iter(steps)
        barrier = None
        if on_each_step_done is not None:
            barrier = threading.Barrier(self._size, lambda: on_each_step_done(next(done)))

        def rank_main(group: Group) -> None:
            saves = RankSaves(self._stores[group.rank], group, self._options)
            mine = self.outcomes[group.rank]
            try:
                for step in steps:
                    try:
                        state = State(step, group.rank, self._size, self._spec)
                        mine[step] = saves.save(step, state, self._report)
                    except BaseException as error:
                        mine[step] = error
                        if barrier is None or isinstance(error, Killed):
                            return
                    if barrier is not None:
                        barrier.wait(60.0)
                saves.close()
            finally:
                self._mortal.bury(group.rank)

        for rank, outcome in enumerate(self._group.outcomes(rank_main)):
            if isinstance(outcome, BaseException) and not isinstance(outcome, Killed):
                outcome.add_note(f"on rank {rank}")
                raise outcome
        return self

    def _report(self, step: int) -> None:
        self.reported.add(step)
        self._on_committed(step)


class MortalKeyValue(MemoryKeyValue):
    """A key-value store that knows who is dead."""

    def __init__(self, is_killed: Callable[[], bool]) -> None:
        super().__init__()
        self._is_killed = is_killed
        self._buried: set[int] = set()

    def bury(self, rank: int) -> None:
        with self._changed:
            self._buried.add(rank)
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        if self._is_killed():
            raise Killed(f"set {key!r} after death")
        super().set(key, value)

    def get(self, key: str, seconds: float) -> bytes | None:
        *_, leader, kind, rank = key.split("/")
        writer = int(rank if kind == "reply" else leader)
        with self._changed:
            self._changed.wait_for(lambda: key in self._values or writer in self._buried or self._is_killed(), seconds)
            if self._is_killed():
                raise Killed(f"get {key!r} after death")
            return self._values.get(key)


UNTOUCHED = 0xEE
"""What is in a sink before anything is read; the oracle's bytes are all below 8."""


def read_all(
    snapshot: Snapshot, into: dict[str, npt.NDArray[np.uint8]] | None = None
) -> dict[str, npt.NDArray[np.uint8]]:
    """Every tensor's bytes, read in one go; ``into`` shows how far it came if it raises."""
    arrays = {} if into is None else into
    layout = snapshot.layout
    for number, label in enumerate(snapshot.keys()):
        shape = (*layout.shapes[number], item_bytes(layout.dtypes[number]))
        arrays[label] = np.full(shape, UNTOUCHED, np.uint8)
    boxes = [Box.whole(shape) for shape in layout.shapes]
    wants = [Want(number, box, number) for number, box in enumerate(boxes) if box.elements]
    snapshot.read_into(wants, [ArraySink(box, array) for box, array in zip(boxes, arrays.values(), strict=True)])
    return arrays


def saved_as(snapshot: Snapshot, size: int) -> tuple[int, int]:
    """The number of what was saved, and by how many ranks. What another job than this saved: its step, and ``size``."""
    number, of, ranks = snapshot.note.partition(" of ")
    return (int(number), int(ranks)) if of else (snapshot.step, size)


def snapshot_violations(snapshot: Snapshot, step: int, size: int, spec: Spec) -> list[str]:
    """How a snapshot differs from what was saved at ``step``. Reads every chunk and every value."""
    found: list[str] = []
    try:
        snapshot.check()
        expected = stored_tensors(spec, step, size)
        if snapshot.keys() != sorted(expected):
            found.append(f"keys are {snapshot.keys()}, not {sorted(expected)}")
        for key, read in read_all(snapshot).items():
            if read.tobytes() != expected[key].tobytes():
                found.append(f"{key} has other bytes than were saved")
        for rank in range(size):
            for name, plain in stored_values(step, rank).items():
                if snapshot.value(name, rank) != plain:
                    found.append(f"value {name} of rank {rank} is {snapshot.value(name, rank)!r}")
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
    return [f"step {step} does not restore: {text}" for text in found]


def repository_violations(
    store: Store, reported: set[int], possible: set[int], size: int, spec: Spec
) -> tuple[list[str], set[int]]:
    """What is wrong with a repository where steps ``reported`` were reported committed, and no others than
    ``possible`` were tried; and the steps it lists."""
    try:
        if not repository.exists(store):
            return ([f"steps {sorted(reported)} were reported, but there is no repository"] if reported else []), set()
        opened = repository.Repository(store)
        snapshots = opened.snapshots()
        opened.history.read_all()
        latest = Restores(store, SoloGroup(), 10.0).choose(None, [])
    except Exception as error:
        return [f"the repository does not open: {type(error).__name__}: {error}"], set()
    saved = [saved_as(snapshot, size) for snapshot in snapshots]
    listed = [number for number, _ in saved]
    found = []
    if len(set(listed)) != len(listed) or not set(listed) <= possible:
        found.append(f"lists steps {listed}; only {sorted(possible)} were tried, each once")
    if lost := reported - set(listed):
        found.append(f"steps {sorted(lost)} were reported committed, but only {listed} are listed")
    if (saved_as(latest, size)[0] if latest else None) != (listed[-1] if listed else None):
        found.append(f"restores {latest} where {listed} are listed")
    for snapshot, (number, ranks) in zip(snapshots, saved, strict=True):
        if snapshot.step != number % GENERATION:
            found.append(f"calls {number} step {snapshot.step}")
        found += snapshot_violations(snapshot, number, ranks, spec)
    return found, set(listed)


def leftovers(store: Store) -> list[str]:
    """Objects of packs and attempts that belong to no snapshot, and objects that belong to nothing."""
    committed = {snapshot.attempt for snapshot in repository.Repository(store).snapshots()}
    names = [info.name.split("/") for info in store.list("")]
    return [
        "/".join(name)
        for name in names
        if (name[0] in ("packs", "attempts") and name[1] not in committed)
        or name[0] not in ("FORMAT", "decisions", "layouts", "packs", "attempts")
    ]
