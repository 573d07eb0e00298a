"""VolatileStore: a store in memory with a log of what was done to it, and what a crash may leave at any point of it.

As far as the contract of stores allows: what ``create`` or ``finish`` reported is there. Of an object that was not
finished anything may be there: nothing, or a beginning of whole sectors, each of them as written, zero, or with other
bytes. What was deleted may be back. Each object on its own, so names come and go in any order.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Literal, NamedTuple

from fastckpt.errors import ObjectNotFound
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Bytes, ObjectInfo, ObjectWriter

BYTES_MAX = 1 << 30
"""More than any object in these tests has."""
SECTOR = 512
"""Bytes that a device writes all or not at all."""

FateKind = Literal["gone", "empty", "torn", "zeros", "stale", "whole", "back"]


class Logged(NamedTuple):
    """An operation that was done."""

    operation: Literal["create", "write", "append", "finish", "delete"]
    name: str
    data: bytes = b""


class Told(NamedTuple):
    """Somebody outside was told that this number is committed."""

    number: int


Log = list[Logged | Told]


class Fate(NamedTuple):
    """What became of one object that was not durable; ``content`` is None if it is not there."""

    kind: FateKind
    content: bytes | None


GONE = Fate("gone", None)


class VolatileStore:
    """A ``MemoryStore`` with a log. An operation and its entry are one step, so every prefix of the log is a moment at
    which all of a job can die."""

    def __init__(self, start: Mapping[str, bytes] | None = None, in_step_seconds: float = 0.0) -> None:
        """``start``: objects that are there already, durably. ``in_step_seconds``: whoever has done something to an
        unfinished object lets others go first, for at most so long. Else the packs of small states are written one
        after another, and no crash finds several unfinished."""
        self._start = dict(start or {})
        self._memory = store_of(self._start)
        self.url = self._memory.url
        self.capabilities = self._memory.capabilities
        self._in_step_seconds = in_step_seconds
        self._lock = threading.RLock()
        self._others = threading.Condition(self._lock)
        self.log: Log = []

    def tell(self, number: int) -> None:
        """Enters in the log that a number was reported committed."""
        with self._lock:
            self._enter(Told(number))

    def after_crash(self, unfinished: FateKind, deleted: Literal["gone", "back"]) -> MemoryStore:
        """A new store, as those who come after a crash at the end of the log find it, with one kind of fate for all."""
        with self._lock:
            *_, moment = moments(self._start, self.log)
        left = dict(moment.durable)
        for name, content in moment.unfinished.items():
            fate = drawn_fate(unfinished, content, bytes(len(content)), Random(name))
            if fate.content is not None:
                left[name] = fate.content
        if deleted == "back":
            left |= moment.deleted
        return store_of(left)

    def create(self, name: str, data: Bytes) -> None:
        with self._lock:
            self._memory.create(name, data)
            self._enter(Logged("create", name, bytes(data)))

    def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
        with self._lock:
            writer = self._memory.write(name, bytes_expected=bytes_expected)
            self._enter(Logged("write", name))
            self._let_others_go_first()
        return _VolatileWriter(self, name, writer)

    def read(self, name: str, *, size_max: int) -> bytes:
        return self._memory.read(name, size_max=size_max)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._memory.read_into(name, offset, buffer)

    def size(self, name: str) -> int:
        return self._memory.size(name)

    def children(self, prefix: str) -> Iterator[str]:
        return self._memory.children(prefix)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._memory.list(prefix)

    def delete(self, name: str) -> None:
        with self._lock:
            try:
                self._memory.size(name)
            except ObjectNotFound:
                return
            self._memory.delete(name)
            self._enter(Logged("delete", name))

    def sweep(self, folders: Sequence[str]) -> int:
        return self._memory.sweep(folders)

    def free_bytes(self) -> int | None:
        return self._memory.free_bytes()

    # The lock is held by the caller of these.

    def _enter(self, entry: Logged | Told) -> None:
        self.log.append(entry)
        self._others.notify_all()

    def _let_others_go_first(self) -> None:
        before = len(self.log)
        self._others.wait_for(lambda: len(self.log) > before, self._in_step_seconds)


class _VolatileWriter:
    def __init__(self, store: VolatileStore, name: str, writer: ObjectWriter) -> None:
        self._store = store
        self._name = name
        self._writer = writer

    def append(self, data: Bytes) -> int:
        with self._store._lock:
            offset = self._writer.append(data)
            self._store._enter(Logged("append", self._name, bytes(data)))
            self._store._let_others_go_first()
        return offset

    def finish(self) -> int:
        with self._store._lock:
            size = self._writer.finish()
            self._store._enter(Logged("finish", self._name))
            self._store._let_others_go_first()
        return size

    def abandon(self) -> None:
        # Not logged: what was not finished may be gone anyway, and need not be after this either.
        self._writer.abandon()


class Moment:
    """A point of a log.

    It needs to know nothing of the operation that was under way: that it had no effect yet is this moment, that it had
    all of it (only nobody was told) is the next one, and half an ``append`` is one of the fates of the next one.
    """

    def __init__(self, start: Mapping[str, bytes]) -> None:
        self.durable = dict(start)
        self.unfinished: dict[str, bytes] = {}
        """All that was appended; whether or not it was abandoned or deleted since."""
        self.deleted: dict[str, bytes] = {}
        """What was durable and then deleted: no deletion is ever durable."""
        self.told: frozenset[int] = frozenset()

    def go_on(self, entry: Logged | Told) -> None:
        match entry:
            case Told(number):
                self.told |= {number}
            case Logged("create", name, data):
                self._check_unused(name)
                self.durable[name] = data
            case Logged("write", name):
                self._check_unused(name)
                self.unfinished[name] = b""
            case Logged("append", name, data) if name in self.unfinished:
                self.unfinished[name] += data
            case Logged("finish", name):
                self.durable[name] = self.unfinished.pop(name)
            case Logged("delete", name) if name in self.durable:
                self.deleted[name] = self.durable.pop(name)

    def _check_unused(self, name: str) -> None:
        # Even deleted it may be back, with its old content: a name must never be used twice.
        used = name in self.durable or name in self.unfinished or name in self.deleted
        assert not used, f"{name} is used twice"

    @property
    def pending(self) -> list[str]:
        """Names of what may be there or not."""
        return [*sorted(self.unfinished), *sorted(self.deleted)]

    def subsets(self, count_max: int, random: Random) -> Iterator[tuple[str, ...]]:
        """Which of the pending names are there: all subsets, or as many drawn ones."""
        pending = self.pending
        if 2 ** len(pending) <= count_max:
            for there in itertools.product((False, True), repeat=len(pending)):
                yield tuple(itertools.compress(pending, there))
        else:
            for _ in range(count_max):
                yield tuple(name for name in pending if random.random() < 0.5)

    def fates(self, there: Sequence[str], count_max: int, random: Random) -> Iterator[dict[str, Fate]]:
        """What the pending names that are there hold: all possibilities, or as many drawn ones. Of each the kind is
        drawn first, so that all kinds meet all."""
        back = {name: Fate("back", self.deleted[name]) for name in there if name in self.deleted}
        torn = {name: (self.unfinished[name], self._stale(name)) for name in there if name in self.unfinished}
        count = 1
        for content, _ in torn.values():
            count *= _possible(content)
        if count <= count_max:
            for fates in itertools.product(*(all_fates(*of) for of in torn.values())):
                yield back | dict(zip(torn, fates, strict=True))
        else:
            for _ in range(count_max):
                yield back | {name: drawn_fate(None, *of, random) for name, of in torn.items()}

    def _stale(self, name: str) -> bytes:
        """As many bytes as the object has: what its neighbours hold in the next sector."""
        folder = "/".join(name.split("/")[:2])
        written = [*sorted(self.unfinished.items()), *sorted(self.durable.items())]
        near = b"".join(content for other, content in written if other.startswith(folder + "/"))
        size = len(self.unfinished[name])
        repeats = size // max(1, len(near)) + 2
        return (near * repeats)[SECTOR : SECTOR + size].ljust(size, b"\xaa")


def moments(start: Mapping[str, bytes], log: Log) -> Iterator[Moment]:
    """What is durable before the first entry of the log, and after each. It is one object, which goes on."""
    moment = Moment(start)
    yield moment
    for entry in log:
        moment.go_on(entry)
        yield moment


Mark = Literal["kept", "zero", "stale"]
MARKS: tuple[Mark, ...] = ("kept", "zero", "stale")


def _sectors(content: bytes) -> int:
    return -(-len(content) // SECTOR)


def _possible(content: bytes) -> int:
    """How many fates ``all_fates`` gives."""
    return sum(len(MARKS) ** cut for cut in range(_sectors(content) + 1))


def all_fates(content: bytes, stale: bytes) -> Iterator[Fate]:
    """Every possible fate of an unfinished object that is there: cut after any sector, each sector of each kind."""
    for cut in range(_sectors(content) + 1):
        for marks in itertools.product(MARKS, repeat=cut):
            yield _fate(content, stale, marks)


def drawn_fate(kind: FateKind | None, content: bytes, stale: bytes, random: Random) -> Fate:
    """A fate of this kind, or for None of any kind but "gone"; of the kind that comes nearest where the object is too
    small for it."""
    sectors = _sectors(content)
    # Of zeros and stale bytes there are by far the most.
    kind = kind or random.choices(("empty", "torn", "zeros", "stale", "whole"), (1, 2, 6, 6, 1))[0]
    if kind == "gone":
        return GONE
    if kind == "empty" or not sectors:
        return _fate(content, stale, ())
    if kind == "whole":
        return _fate(content, stale, ["kept"] * sectors)
    if kind == "torn":
        return _fate(content, stale, ["kept"] * random.randrange(sectors))
    # Whole in length, mostly: a size that is right proves nothing.
    cut = sectors if random.random() < 0.75 else random.randint(1, sectors)
    marks = random.choices(MARKS if kind == "stale" else MARKS[:2], k=cut)
    marks[random.randrange(cut)] = "stale" if kind == "stale" else "zero"
    return _fate(content, stale, marks)


def _fate(content: bytes, stale: bytes, marks: Sequence[Mark]) -> Fate:
    sources = {"kept": content, "zero": bytes(len(content)), "stale": stale}
    left = b"".join(sources[mark][at * SECTOR : (at + 1) * SECTOR] for at, mark in enumerate(marks))
    kind: FateKind
    if not marks:
        kind = "empty"
    elif "stale" in marks:
        kind = "stale"
    elif "zero" in marks:
        kind = "zeros"
    else:
        kind = "whole" if len(left) == len(content) else "torn"
    return Fate(kind, left)


def store_of(tree: Mapping[str, bytes]) -> MemoryStore:
    store = MemoryStore("job")
    for name, content in tree.items():
        store.create(name, content)
    return store
