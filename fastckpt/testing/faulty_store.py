"""FaultyStore: a store that counts its operations, and fails or dies at a chosen one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from fastckpt.errors import StorageError
from fastckpt.storage.store import Bytes, ObjectInfo, ObjectWriter, Store

_Result = TypeVar("_Result")


class Killed(BaseException):
    """The simulated job is dead. Not an ``Exception``: no handler of the code under test may outlive its process."""


class Operation(NamedTuple):
    number: int
    """From 1, in the order of starting."""
    operation: str
    """``create``, ``write``, ``append``, ``finish``, ``read``, ``read_into``, ``size``, ``children``, ``list``,
    ``delete`` or ``sweep``."""
    name: str
    """The object's name, or the prefix."""


class FaultyStore:
    """Wraps ``store``, numbers every operation from 1 and logs it in ``operations``. ``abandon`` is not counted.

    The use is to run a piece of work once without faults, read ``len(faulty.operations)``, then run it again for every
    number and look at what ``faulty.store`` holds::

        for number in range(1, count + 1):
            store = MemoryStore("job")
            with pytest.raises(Killed):
                work(FaultyStore(store, kill_at=number))
            assert is_whole(store)

    **Death** (``kill_at=n``, or ``kill()`` at any moment): operation n and all later ones, from any thread, do nothing
    and raise ``Killed``; from then on ``abandon`` does nothing either. An operation that another thread had under way
    completes, but its caller gets ``Killed`` too: the dead learn nothing. With ``torn=True`` operation n has gone as
    far as it can before the death: half of the bytes of an ``append`` are there, and a ``create``, ``write``,
    ``finish`` or ``delete`` has happened, since these happen whole or not at all.

    **Failure** (``fail_at=n, error=...``): operation n does nothing and raises a copy of ``error``; with
    ``persistent=True`` so does every later one. With ``after=True`` the operation is carried out before the error is
    raised, so that its outcome is in doubt; an object whose ``finish`` failed like that stays, even if abandoned.

    ``only=lambda operation, name: ...`` restricts what is counted, logged and failed. It does not restrict death.

    ``view()`` gives another store with the same numbers, log and faults: one for each rank of a simulated job, so that
    all of them die together. Ranks that must die apart get a ``FaultyStore`` of their own around the same store.

    Everything is a function of the order of operations: the same order gives the same run.
    """

    def __init__(
        self,
        store: Store,
        *,
        kill_at: int | None = None,
        torn: bool = False,
        fail_at: int | None = None,
        error: StorageError | None = None,
        persistent: bool = False,
        after: bool = False,
        only: Callable[[str, str], bool] | None = None,
    ) -> None:
        if (kill_at is not None and kill_at < 1) or (fail_at is not None and fail_at < 1):
            raise ValueError("operations are numbered from 1: kill_at and fail_at must be positive")
        if torn and kill_at is None:
            raise ValueError("torn says how kill_at kills; give kill_at as well")
        if fail_at is None and (error is not None or persistent or after):
            raise ValueError("error, persistent and after say how fail_at fails; give fail_at as well")
        fallback = StorageError("injected failure", transient=not persistent)
        self._wrap(store, _Faults(kill_at, torn, fail_at, error or fallback, persistent, after, only))

    def view(self, store: Store | None = None) -> FaultyStore:
        """Another view that shares numbers, log and faults, of the same store or of ``store``."""
        other = FaultyStore.__new__(FaultyStore)
        other._wrap(store or self.store, self._faults)
        return other

    def _wrap(self, store: Store, faults: _Faults) -> None:
        self.store = store
        """What is wrapped: look here after a death."""
        self._faults = faults
        self.url = store.url
        self.capabilities = store.capabilities

    @property
    def operations(self) -> tuple[Operation, ...]:
        """What was counted so far, including the operation that failed or died."""
        return tuple(self._faults.operations)

    @property
    def killed(self) -> bool:
        return self._faults.killed

    def kill(self) -> None:
        """Death now: whatever comes next raises ``Killed``, in all views."""
        self._faults.killed = True

    def create(self, name: str, data: Bytes) -> None:
        self._faults.run("create", name, lambda: self.store.create(name, data))

    def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
        writer = self._faults.run("write", name, lambda: self.store.write(name, bytes_expected=bytes_expected))
        return _FaultyWriter(writer, name, self._faults)

    def read(self, name: str, *, size_max: int) -> bytes:
        return self._faults.run("read", name, lambda: self.store.read(name, size_max=size_max))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._faults.run("read_into", name, lambda: self.store.read_into(name, offset, buffer))

    def size(self, name: str) -> int:
        return self._faults.run("size", name, lambda: self.store.size(name))

    def children(self, prefix: str) -> Iterator[str]:
        # All at once, so that the whole listing is one operation.
        return iter(self._faults.run("children", prefix, lambda: tuple(self.store.children(prefix))))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._faults.run("list", prefix, lambda: tuple(self.store.list(prefix))))

    def delete(self, name: str) -> None:
        self._faults.run("delete", name, lambda: self.store.delete(name))

    def sweep(self, folders: Sequence[str]) -> int:
        return self._faults.run("sweep", "", lambda: self.store.sweep(folders))

    def free_bytes(self) -> int | None:
        """Not counted: nothing that is written depends on it."""
        if self.killed:
            raise Killed("free_bytes after death")
        return self.store.free_bytes()


class _FaultyWriter:
    def __init__(self, writer: ObjectWriter, name: str, faults: _Faults) -> None:
        self._writer = writer
        self._name = name
        self._faults = faults
        self._finished = False

    def append(self, data: Bytes) -> int:
        def tear() -> None:
            view = memoryview(data)
            self._writer.append(view.cast("B")[: view.nbytes // 2] if view.nbytes else b"")

        return self._faults.run("append", self._name, lambda: self._writer.append(data), tear)

    def finish(self) -> int:
        def finish() -> int:
            size = self._writer.finish()
            self._finished = True
            return size

        return self._faults.run("finish", self._name, finish)

    def abandon(self) -> None:
        # The wrapped writer may be called no more once it has finished, even if we told our caller otherwise.
        if not self._faults.killed and not self._finished:
            self._writer.abandon()


class _Faults:
    """The numbers, the log and the faults that views share."""

    def __init__(
        self,
        kill_at: int | None,
        torn: bool,
        fail_at: int | None,
        error: StorageError,
        persistent: bool,
        after: bool,
        only: Callable[[str, str], bool] | None,
    ) -> None:
        self._kill_at, self._torn = kill_at, torn
        self._fail_at, self._error, self._persistent, self._after = fail_at, error, persistent, after
        self._only = only
        self._lock = threading.Lock()
        self.operations: list[Operation] = []
        self.killed = False

    def run(
        self, operation: str, name: str, act: Callable[[], _Result], tear: Callable[[], object] | None = None
    ) -> _Result:
        with self._lock:
            if self.killed:
                raise Killed(f"{operation} {name!r} after death")
            number = self._count(operation, name)
            if number is not None and number == self._kill_at:
                # Inside the lock: no operation of a later number may run before the job is dead.
                self.killed = True
                if self._torn:
                    self._tear(operation, tear or act)
                raise Killed(f"at operation {number}, {operation} {name!r}")
        fails = number is not None and self._fails(number)
        if fails and not self._after:
            raise copy.copy(self._error)
        try:
            result = act()
        finally:
            if self.killed:
                raise Killed(f"during {operation} {name!r}")
        if fails:
            raise copy.copy(self._error)
        return result

    def _count(self, operation: str, name: str) -> int | None:
        if self._only is not None and not self._only(operation, name):
            return None
        number = len(self.operations) + 1
        self.operations.append(Operation(number, operation, name))
        return number

    def _fails(self, number: int) -> bool:
        return self._fail_at is not None and (number >= self._fail_at if self._persistent else number == self._fail_at)

    @staticmethod
    def _tear(operation: str, act: Callable[[], object]) -> None:
        if operation in ("create", "write", "append", "finish", "delete"):
            try:
                act()
            except StorageError:
                # Nobody is left to hear of it.
                return
