"""VolatileStore: a store in memory that can show what a crash may leave of it, as far as the contract of stores allows:
of what was not finished anything, and what was deleted may be back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Literal, NamedTuple

from fastckpt.errors import StorageError
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Bytes, ObjectInfo, ObjectWriter

BYTES_MAX = 1 << 30


class Fate(NamedTuple):
    """What a crash makes of what was under way."""

    unfinished: Literal["gone", "empty", "half", "zeros", "whole"]
    deleted: Literal["gone", "back"]


FATES = (
    Fate("gone", "gone"),
    Fate("empty", "back"),
    Fate("half", "gone"),
    Fate("zeros", "back"),
    Fate("whole", "gone"),
)


class VolatileStore:
    """A ``MemoryStore`` that remembers what is not durable yet."""

    def __init__(self, start: MemoryStore | None = None) -> None:
        self._memory = copy_of(start) if start is not None else MemoryStore("job")
        self.url = self._memory.url
        self.capabilities = self._memory.capabilities
        self._lock = threading.Lock()
        self._unfinished: set[str] = set()
        self._deleted: dict[str, bytes] = {}

    def after_crash(self, fate: Fate) -> MemoryStore:
        """A new store, as those who come after the crash find it."""
        with self._lock:
            left = MemoryStore("job")
            for info in self._memory.list(""):
                content = self._memory.read(info.name, size_max=BYTES_MAX)
                if info.name not in self._unfinished:
                    left.create(info.name, content)
                elif fate.unfinished != "gone":
                    left.create(info.name, _damaged(content, fate))
            for name, content in self._deleted.items():
                if fate.deleted == "back":
                    left.create(name, content)  # raises if a name was used twice, which must not happen either
            return left

    def create(self, name: str, data: Bytes) -> None:
        self._memory.create(name, data)

    def write(self, name: str) -> ObjectWriter:
        with self._lock:
            writer = self._memory.write(name)
            self._unfinished.add(name)
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
                self._deleted[name] = self._memory.read(name, size_max=BYTES_MAX)
            except StorageError:
                return
            self._memory.delete(name)
            self._unfinished.discard(name)


class _VolatileWriter:
    def __init__(self, store: VolatileStore, name: str, writer: ObjectWriter) -> None:
        self._store = store
        self._name = name
        self._writer = writer

    def append(self, data: Bytes) -> int:
        return self._writer.append(data)

    def finish(self) -> int:
        size = self._writer.finish()
        with self._store._lock:
            self._store._unfinished.discard(self._name)
        return size

    def abandon(self) -> None:
        with self._store._lock:
            if self._name in self._store._unfinished:
                self._store._unfinished.discard(self._name)
                self._store._deleted[self._name] = self._store._memory.read(self._name, size_max=BYTES_MAX)
            self._writer.abandon()


def copy_of(store: MemoryStore) -> MemoryStore:
    copy = MemoryStore("job")
    for info in store.list(""):
        copy.create(info.name, store.read(info.name, size_max=BYTES_MAX))
    return copy


def _damaged(content: bytes, fate: Fate) -> bytes:
    match fate.unfinished:
        case "empty":
            return b""
        case "half":
            return content[: len(content) // 2]
        case "zeros":
            return bytes(len(content))
        case _:
            return content
