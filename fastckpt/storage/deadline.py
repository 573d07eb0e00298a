"""Calls that end in time, and a store all of whose operations do, whatever the storage behind it does.

A call into a dead file system cannot be ended, only left behind. So each runs on a daemon thread, and whoever waits for
it can stop waiting. Workers are such threads already: their calls need no other one.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from fastckpt.errors import StorageError
from fastckpt.storage.store import Bytes, ObjectInfo, ObjectWriter, Store

_Result = TypeVar("_Result")

_IDLE_SECONDS = 1.0
"""A thread that nobody needs for so long ends."""
_MOMENT_SECONDS = 0.25
"""More than was asked for: a process that goes on after having been stopped finds its time over, and the answer there
a moment later."""

_ADVICE = "See whether its server is up and the mount alive (`stat` on the path hangs too, if not)"


class NoAnswer(Exception):
    """A call was not back in time. It goes on, on its thread, and what comes of it is dropped."""


class Call(Generic[_Result]):
    """A call on a thread of its own, from its start on."""

    def __init__(self, function: Callable[[], _Result]) -> None:
        self.started = time.monotonic()
        self._function: Callable[[], _Result] | None = function
        self._done = threading.Event()
        self._outcome: tuple[_Result] | BaseException | None = None
        self.is_left_behind = False

    def result(self, seconds: float) -> _Result:
        """What the call returned or raised; ``NoAnswer`` if it does neither for ``seconds``. To be taken once."""
        if not self._done.wait(max(0.0, seconds)) and not self._done.wait(_MOMENT_SECONDS):
            raise NoAnswer
        outcome, self._outcome = self._outcome, None
        try:
            if isinstance(outcome, BaseException):
                raise outcome
            assert outcome is not None, "the result was taken before"
            return outcome[0]
        finally:
            del outcome  # an error would hold itself, by its traceback, and with it all that the callers hold

    def leave_behind(self) -> None:
        """Nobody is going to ask for the result: whatever it holds is let go of."""
        self.is_left_behind = True
        self._outcome = None

    def _run(self) -> None:
        assert self._function is not None
        try:
            self._outcome = (self._function(),)
        except BaseException as error:
            self._outcome = error
        self._function = None
        if self.is_left_behind:
            self._outcome = None


class Worker:
    """A function on a thread that makes its calls to ``store`` itself."""

    def __init__(self, store: Store, function: Callable[[], object], errors: list[BaseException]) -> None:
        self.store = store
        self.ended = threading.Event()
        self.left_behind = False
        self.under_way = ""
        """What it is asking of the store."""
        self._function: Callable[[], object] | None = function
        self._errors = errors

    def run(self) -> None:
        _here.worker = self
        self.run_as_caller()

    def run_as_caller(self) -> None:
        """On the caller's own thread: nobody else waits for it, so its calls are made like those of everybody."""
        assert self._function is not None
        try:
            self._function()
        except BaseException as error:
            if not self.left_behind:  # else nobody hears of it, and it would hold itself
                self._errors.append(error)
        self._function = None
        if isinstance(self.store, DeadlineStore):
            self.store._callers.ended(self)
        else:
            self.ended.set()


_here = threading.local()
"""``worker``: the one that this thread belongs to."""


def run_workers(store: Store, functions: Sequence[Callable[[], object]], name: str) -> None:
    """Runs the functions at the same time, each on a daemon thread (``<name>-0``, ``<name>-1``, ...), and returns when
    all have returned. What such a thread asks of a ``DeadlineStore`` is done on that very thread. Where no thread can
    be started, the caller's runs the function.

    Raises the first error that any of them raised, after all have ended: one that waits for another must be woken by
    it when that fails. If ``store`` does not answer in time, raises what its own calls raise, and leaves the workers
    behind: none of them comes to another call, and ``store.busy`` tells whether any is still at work.
    """
    errors: list[BaseException] = []
    started, others = [], []
    try:
        for number, worker in enumerate(Worker(store, function, errors) for function in functions):
            try:
                threading.Thread(target=worker.run, name=f"{name}-{number}", daemon=True).start()
                started.append(worker)
            except (RuntimeError, MemoryError):
                others.append(worker)
        for worker in others:
            worker.run_as_caller()
        if isinstance(store, DeadlineStore):
            store._wait_for(started, name)
        else:
            for worker in started:
                worker.ended.wait()
        if errors:
            raise errors[0]
    except BaseException:
        if isinstance(store, DeadlineStore):
            for worker in started:
                store._callers.leave_behind(worker)
        raise
    finally:
        errors.clear()  # an error would hold itself, by its traceback, and with it all that the callers hold


class Callers:
    """Daemon threads that make calls for others. Any thread may start one; a thread whose call is back is used again,
    and ends when that is not soon. Where no thread can be started, ``start`` makes the call itself."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[queue.SimpleQueue[Call[object]]] = []
        self._under_way: dict[object, float] = {}
        """When each was started."""
        self._left_behind = 0
        """Workers whose caller has gone."""

    def start(self, function: Callable[[], _Result]) -> Call[_Result]:
        self._forget_after_fork()
        call = Call(function)
        with self._lock:
            self._under_way[call] = call.started
            calls = self._idle.pop() if self._idle else None
        if calls is None:
            calls = queue.SimpleQueue()
            try:
                threading.Thread(target=self._serve, args=(calls,), name=self._name, daemon=True).start()
            except (RuntimeError, MemoryError):
                # No thread is to be had, from a full system or an interpreter on its way out: better late than never.
                self._make(call)  # type: ignore[arg-type]
                return call
        calls.put(call)  # type: ignore[arg-type]
        return call

    def _forget_after_fork(self) -> None:
        if os.getpid() != self._process:  # a forked child has none of the threads, and maybe a lock that nobody holds
            self._forget()

    def oldest(self) -> float | None:
        """When the oldest call under way was started, on ``time.monotonic()``; None if all are back."""
        self._forget_after_fork()
        with self._lock:
            return min(self._under_way.values(), default=None)

    def make_here(self, function: Callable[[], _Result]) -> _Result:
        """Makes the call on the thread that asks for it, which somebody else watches over."""
        self._forget_after_fork()
        call = object()
        with self._lock:
            self._under_way[call] = time.monotonic()
        try:
            return function()
        finally:
            with self._lock:
                self._under_way.pop(call, None)  # a forked child knows nothing of it

    def leave_behind(self, worker: Worker) -> None:
        """Nobody waits for this worker any more. Its next call fails."""
        self._forget_after_fork()
        with self._lock:
            if not worker.ended.is_set() and not worker.left_behind:
                worker.left_behind = True
                self._left_behind += 1

    def ended(self, worker: Worker) -> None:
        with self._lock:
            worker.ended.set()
            self._left_behind -= worker.left_behind

    @property
    def busy(self) -> bool:
        """Whether a call or a worker that was left behind has not ended."""
        self._forget_after_fork()
        with self._lock:
            return bool(self._left_behind) or any(
                isinstance(call, Call) and call.is_left_behind for call in self._under_way
            )

    def _serve(self, calls: queue.SimpleQueue[Call[object]]) -> None:
        while True:
            try:
                call = calls.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                with self._lock:
                    if calls in self._idle:
                        self._idle.remove(calls)  # nobody can hand it a call any more
                        return
                continue
            self._make(call, calls)
            del call  # what it returned belongs to who waited

    def _make(self, call: Call[object], calls: queue.SimpleQueue[Call[object]] | None = None) -> None:
        call._run()
        with self._lock:
            del self._under_way[call]
            if calls is not None:
                self._idle.append(calls)
        call._done.set()


class DeadlineStore:
    """A store every operation of which returns or raises within ``seconds_max``.

    Where the storage does not answer, that is ``StorageError``, and the call is left behind: it may still be carried
    out, any time later, or never. As long as one that old is under way, the storage is taken to be silent, and every
    operation fails at once; when it comes back, all is as before. Whoever was told of a failure must not rely on the
    buffer it passed being let go of: see ``busy``.
    """

    def __init__(self, store: Store, seconds_max: float) -> None:
        self._store = store
        self._seconds_max = seconds_max
        self._callers = Callers("fastckpt-storage")
        self.url = store.url
        self.capabilities = store.capabilities

    @classmethod
    def opened(cls, url: str | os.PathLike[str], seconds_max: float, open_store: Callable[..., Store]) -> DeadlineStore:
        """What ``open_store`` makes of ``url``: it may look at the storage, and so be kept waiting too."""
        try:
            return cls(Callers("fastckpt-storage").start(lambda: open_store(url)).result(seconds_max), seconds_max)
        except NoAnswer:
            raise StorageError(
                f"cannot open {os.fspath(url)}: the storage has not answered for {seconds_max:.0f} s. {_ADVICE}",
                transient=True,
            ) from None

    @property
    def busy(self) -> bool:
        """Whether a call or a worker that was left behind is still at work: it may be using the buffer it was given."""
        return self._callers.busy

    def create(self, name: str, data: Bytes) -> None:
        self._answer(f"create {name!r}", lambda: self._store.create(name, data))

    def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
        writer = self._answer(f"write {name!r}", lambda: self._store.write(name, bytes_expected=bytes_expected))
        return _DeadlineWriter(self, writer, name)

    def read(self, name: str, *, size_max: int) -> bytes:
        return self._answer(f"read {name!r}", lambda: self._store.read(name, size_max=size_max))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._answer(f"read {name!r}", lambda: self._store.read_into(name, offset, buffer))

    def size(self, name: str) -> int:
        return self._answer(f"read the size of {name!r}", lambda: self._store.size(name))

    # Listings are taken whole: a call for each name would take a turn of its own.

    def children(self, prefix: str) -> Iterator[str]:
        return iter(self._answer(f"list {prefix!r}", lambda: tuple(self._store.children(prefix))))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._answer(f"list {prefix!r}", lambda: tuple(self._store.list(prefix))))

    def delete(self, name: str) -> None:
        self._answer(f"delete {name!r}", lambda: self._store.delete(name))

    def sweep(self, folders: Sequence[str]) -> int:
        return self._answer("sweep", lambda: self._store.sweep(folders))

    def free_bytes(self) -> int | None:
        with contextlib.suppress(StorageError):
            return self._answer("tell how much room there is", self._store.free_bytes)
        return None

    def _answer(self, what: str, function: Callable[[], _Result]) -> _Result:
        worker: Worker | None = getattr(_here, "worker", None)
        if worker is not None and worker.store is self:
            return self._answer_here(worker, what, function)
        if self._silent():
            raise self._no_answer(what)
        return self._wait(what, self._callers.start(function))

    def _answer_here(self, worker: Worker, what: str, function: Callable[[], _Result]) -> _Result:
        if worker.left_behind:
            raise self._given_up(what)
        if self._silent():
            raise self._no_answer(what)
        worker.under_way = what
        try:
            result = self._callers.make_here(function)
        finally:
            worker.under_way = ""
        if worker.left_behind:  # meanwhile: whoever wanted it was told that it failed
            raise self._given_up(what)
        return result

    def _wait_for(self, workers: Sequence[Worker], name: str) -> None:
        """Until all have ended."""
        for worker in workers:
            while True:
                oldest = self._callers.oldest() or time.monotonic()
                seconds = max(0.0, oldest + self._seconds_max - time.monotonic())
                if worker.ended.wait(seconds) or worker.ended.wait(_MOMENT_SECONDS):
                    break
                if self._silent():
                    whats = [what for each in workers if (what := each.under_way)]
                    raise self._no_answer(whats[0] if whats else f"go on with {name}")

    def _wait(self, what: str, call: Call[_Result]) -> _Result:
        while True:
            # Who waits for a younger call learns from the oldest that the storage is silent, and need not wait as long.
            oldest = self._callers.oldest() or call.started
            try:
                return call.result(oldest + self._seconds_max - time.monotonic())
            except NoAnswer:
                if self._silent():
                    call.leave_behind()
                    raise self._no_answer(what) from None

    def _silent(self) -> bool:
        oldest = self._callers.oldest()
        return oldest is not None and time.monotonic() - oldest >= self._seconds_max

    def _given_up(self, what: str) -> StorageError:
        return StorageError(f"cannot {what} in {self.url}: it was given up, since the storage did not answer in time")

    def _no_answer(self, what: str) -> StorageError:
        silent = time.monotonic() - (self._callers.oldest() or time.monotonic())
        return StorageError(
            f"cannot {what} in {self.url}: the storage has not answered for {silent:.0f} s, and nothing is tried until "
            f"it does. {_ADVICE}",
            transient=True,
        )


class _DeadlineWriter:
    """An object being written, by one call at a time."""

    def __init__(self, store: DeadlineStore, writer: ObjectWriter, name: str) -> None:
        self._store = store
        self._writer = writer
        self._name = name
        self._lock = threading.Lock()

    def append(self, data: Bytes) -> int:
        return self._store._answer(f"append to {self._name!r}", self._in_turn(lambda: self._writer.append(data)))

    def finish(self) -> int:
        return self._store._answer(f"finish {self._name!r}", self._in_turn(self._writer.finish))

    def abandon(self) -> None:
        # Also where the storage is silent: it then waits, left behind, for the call that was left behind before it.
        abandon = self._store._callers.start(self._in_turn(self._writer.abandon))
        with contextlib.suppress(StorageError):
            self._store._wait(f"abandon {self._name!r}", abandon)

    def _in_turn(self, function: Callable[[], _Result]) -> Callable[[], _Result]:
        """No two threads may use a writer: one could close the file that the other is about to write to."""

        def run() -> _Result:
            with self._lock:
                return function()

        return run
