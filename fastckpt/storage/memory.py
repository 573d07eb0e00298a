"""MemoryStore: objects in this process's memory, for tests and examples."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence

from fastckpt.errors import ObjectExists, ObjectNotFound, StorageError
from fastckpt.storage.names import check_name, check_prefix
from fastckpt.storage.store import Bytes, Capabilities, ObjectInfo


class MemoryStore:
    """A store that ends with its process. Unfinished objects are visible, as they are with files."""

    def __init__(self, name: str) -> None:
        check_name(name)
        self.url = f"memory://{name}"
        self.capabilities = Capabilities(durable=False, create_if_absent=True)
        self._lock = threading.Lock()
        self._objects: dict[str, bytearray] = {}
        # How many objects are below each prefix.
        self._directories: Counter[str] = Counter()

    def create(self, name: str, data: Bytes) -> None:
        check_name(name)
        content = bytearray(data)
        with self._lock:
            self._add(name, content)

    def write(self, name: str, *, bytes_expected: int = 0) -> _MemoryWriter:
        check_name(name)
        content = bytearray()
        with self._lock:
            self._add(name, content)
        return _MemoryWriter(self, name, content)

    def read(self, name: str, *, size_max: int) -> bytes:
        check_name(name)
        with self._lock:
            content = self._find(name)
            if len(content) > size_max:
                raise StorageError(
                    f"cannot read {name!r} in {self.url}: it has {len(content)} bytes, "
                    f"at most {size_max} are allowed here"
                )
            return bytes(content)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        check_name(name)
        if offset < 0:
            raise ValueError(f"offset must not be negative: {offset}")
        end = offset + buffer.nbytes
        with self._lock:
            content = self._find(name)
            if len(content) < end:
                raise StorageError(
                    f"cannot read {name!r} in {self.url}: it has {len(content)} bytes, "
                    f"bytes {offset} to {end} were asked for"
                )
            if buffer.nbytes:
                buffer.cast("B")[:] = content[offset:end]

    def size(self, name: str) -> int:
        check_name(name)
        with self._lock:
            return len(self._find(name))

    def children(self, prefix: str) -> Iterator[str]:
        start = len(prefix) + 1 if prefix else 0
        return iter(sorted({info.name[start:].partition("/")[0] for info in self.list(prefix)}))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        below = prefix + "/" if prefix else ""
        with self._lock:
            found = [
                ObjectInfo(name, len(content)) for name, content in self._objects.items() if name.startswith(below)
            ]
        return iter(sorted(found, key=lambda info: info.name))

    def delete(self, name: str) -> None:
        check_name(name)
        with self._lock:
            self._remove(name)

    def sweep(self, folders: Sequence[str]) -> int:
        return 0

    def free_bytes(self) -> int | None:
        return None

    # The lock is held by the caller of these.

    def _find(self, name: str) -> bytearray:
        try:
            return self._objects[name]
        except KeyError:
            raise ObjectNotFound(f"cannot read {name!r} in {self.url}: no such object") from None

    def _add(self, name: str, content: bytearray) -> None:
        if name in self._objects or self._directories[name]:
            raise ObjectExists(f"cannot create {name!r} in {self.url}: it exists")
        for directory in _directories(name):
            if directory in self._objects:  # as it would fail with files
                raise StorageError(f"cannot create {name!r} in {self.url}: {directory!r} is an object")
        self._objects[name] = content
        self._directories.update(_directories(name))

    def _remove(self, name: str) -> None:
        if self._objects.pop(name, None) is not None:
            self._directories.subtract(_directories(name))


class _MemoryWriter:
    def __init__(self, store: MemoryStore, name: str, content: bytearray) -> None:
        self._store = store
        self._name = name
        self._content = content
        self._open = True

    def append(self, data: Bytes) -> int:
        self._check_open()
        with self._store._lock:
            offset = len(self._content)
            self._content += bytes(data)
        return offset

    def finish(self) -> int:
        self._check_open()
        self._open = False
        with self._store._lock:
            if self._store._objects.get(self._name) is not self._content:
                raise StorageError(f"cannot finish {self._name!r} in {self._store.url}: it was deleted meanwhile")
            return len(self._content)

    def abandon(self) -> None:
        if self._open:
            self._open = False
            with self._store._lock:
                if self._store._objects.get(self._name) is self._content:
                    self._store._remove(self._name)

    def _check_open(self) -> None:
        if not self._open:
            raise ValueError(f"{self._name!r} was finished or abandoned; nothing may follow")


def _directories(name: str) -> list[str]:
    components = name.split("/")
    return ["/".join(components[:count]) for count in range(1, len(components))]


_stores: dict[str, MemoryStore] = {}
_stores_lock = threading.Lock()


def memory_store(name: str) -> MemoryStore:
    """The store that ``memory://name`` means: the same one for everybody in this process."""
    with _stores_lock:
        if name not in _stores:
            _stores[name] = MemoryStore(name)
        return _stores[name]
