"""A store that answers in time: whatever the one behind it does, and as it does when it answers."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from fastckpt.errors import ObjectNotFound, StorageError
from fastckpt.storage.deadline import Callers, DeadlineStore, NoAnswer, run_workers
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Bytes, ObjectWriter, Store
from fastckpt.testing import FaultyStore, StoreContract

PATIENT = 20.0


class SilentStore(FaultyStore):
    """Answers nothing while it is ``silent``."""

    def __init__(self) -> None:
        self.silent = threading.Event()
        self.speaks = threading.Event()
        super().__init__(MemoryStore("silent"), only=self._wait)

    def _wait(self, operation: str, name: str) -> bool:
        return not self.silent.is_set() or self.speaks.wait(PATIENT)

    @contextlib.contextmanager
    def silence(self) -> Iterator[None]:
        self.silent.set()
        try:
            yield
        finally:
            self.silent.clear()
            self.speaks.set()


class TestDeadlineStore(StoreContract):
    @pytest.fixture
    def make_store(self) -> Callable[[], DeadlineStore]:
        store = MemoryStore("contract")
        return lambda: DeadlineStore(store, PATIENT)

    def raw_write(self, store: DeadlineStore, name: str, data: bytes) -> None:
        store._store.create(name, data)

    def raw_read(self, store: DeadlineStore, name: str) -> bytes:
        return store._store.read(name, size_max=1 << 30)


def wait_idle(store: DeadlineStore) -> None:
    end = time.monotonic() + PATIENT
    while store.busy:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_an_operation_that_is_not_answered_fails_in_time_and_says_for_how_long() -> None:
    inner = SilentStore()
    store = DeadlineStore(inner, 1.0)
    with inner.silence():
        start = time.monotonic()
        with pytest.raises(
            StorageError, match=r"cannot read 'a' in memory://silent: the storage has not answered for 1 s"
        ) as caught:
            store.read("a", size_max=1)
        assert time.monotonic() - start >= 1.0
        assert caught.value.transient


def test_while_it_is_silent_all_else_fails_at_once_and_when_it_answers_all_is_as_before() -> None:
    inner = SilentStore()
    store = DeadlineStore(inner, 0.3)
    with inner.silence():
        with pytest.raises(StorageError, match="has not answered"):
            store.create("a", b"x")
        assert store.busy
        started = len(inner.operations)
        for call in (lambda: store.size("b"), lambda: list(store.list("")), lambda: store.delete("b")):
            with pytest.raises(StorageError, match="has not answered"):
                call()
        assert len(inner.operations) == started, "nothing is tried"
    wait_idle(store)
    assert store.read("a", size_max=1) == b"x", "what was left behind may be carried out"
    with pytest.raises(ObjectNotFound):
        store.size("b")


def test_who_waits_for_a_later_call_hears_of_the_silence_with_who_waits_for_the_first() -> None:
    inner = SilentStore()
    store = DeadlineStore(inner, 1.0)
    seconds: list[float] = []

    def ask() -> None:
        start = time.monotonic()
        with pytest.raises(StorageError):
            store.size("a")
        seconds.append(time.monotonic() - start)

    with inner.silence():
        first = threading.Thread(target=ask)
        first.start()
        assert not first.join(0.5)
        ask()
        first.join()
    assert min(seconds) < 0.95, seconds


class SlowWriter:
    def __init__(self, silent: threading.Event) -> None:
        self.silent = silent
        self.log: list[str] = []

    def append(self, data: Bytes) -> int:
        self.log.append("append begins")
        self.silent.wait(PATIENT)
        self.log.append("append ends")
        return 0

    def finish(self) -> int:
        return 0

    def abandon(self) -> None:
        self.log.append("abandoned")


def test_an_object_is_abandoned_only_when_the_call_that_was_left_behind_is_over() -> None:
    speaks = threading.Event()
    writer = SlowWriter(speaks)

    class Writes(MemoryStore):
        def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
            return writer

    store = DeadlineStore(Writes("x"), 0.2)
    seen = store.write("a")
    with pytest.raises(StorageError, match="cannot append to 'a'"):
        seen.append(b"x")
    start = time.monotonic()
    seen.abandon()
    assert time.monotonic() - start < 5
    assert writer.log == ["append begins"]
    speaks.set()
    wait_idle(store)
    assert writer.log == ["append begins", "append ends", "abandoned"]


def test_what_a_call_returns_that_was_left_behind_is_let_go_of() -> None:
    speaks = threading.Event()
    gone = threading.Event()

    class Held:
        def __del__(self) -> None:
            gone.set()

    def late() -> Held:
        speaks.wait(PATIENT)
        return Held()

    call = Callers("test").start(late)
    with pytest.raises(NoAnswer):
        call.result(0.01)
    call.leave_behind()
    speaks.set()
    assert gone.wait(PATIENT)


def test_an_error_does_not_keep_alive_what_its_callers_hold() -> None:
    store = DeadlineStore(MemoryStore("empty"), PATIENT)

    class Held:
        pass

    def look_for(held: Held) -> weakref.ref[Held]:
        with contextlib.suppress(ObjectNotFound):  # unlike pytest.raises, it keeps nothing
            store.read("missing", size_max=1)
            pytest.fail("there is no such object")
        return weakref.ref(held)

    gc.disable()
    try:
        reference = look_for(Held())
        assert reference() is None
    finally:
        gc.enable()


def test_threads_that_nobody_needs_end() -> None:
    callers = Callers("test-callers")
    assert [callers.start(lambda n=n: n).result(PATIENT) for n in range(50)] == list(range(50))

    def count() -> int:
        return sum(thread.name == "test-callers" for thread in threading.enumerate())

    assert count() <= 2
    end = time.monotonic() + PATIENT
    while count():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert callers.start(lambda: 1).result(PATIENT) == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_makes_threads_of_its_own() -> None:
    callers = Callers("test")
    blocked = threading.Event()
    callers.start(lambda: blocked.wait(PATIENT))
    callers.start(lambda: 1).result(PATIENT)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        callers.start(lambda: os.write(writing, b"x")).result(PATIENT)
        os._exit(0 if callers.oldest() is None else 1)
    assert os.read(reading, 1) == b"x"
    assert os.waitpid(child, 0)[1] == 0
    blocked.set()
    os.close(reading)
    os.close(writing)


# Workers.


class ThreadStore(MemoryStore):
    """Remembers by which threads it was asked, and answers the operations on ``held`` once ``speaks`` is set."""

    def __init__(self) -> None:
        super().__init__("workers")
        self.threads: list[str] = []
        self.reached, self.speaks = threading.Event(), threading.Event()

    def size(self, name: str) -> int:
        self.threads.append(threading.current_thread().name)
        if name == "held":
            self.reached.set()
            assert self.speaks.wait(PATIENT)
        return 7


def test_what_a_worker_asks_for_is_done_on_its_own_thread_and_what_others_ask_for_is_not() -> None:
    inner = ThreadStore()
    store, other = DeadlineStore(inner, PATIENT), DeadlineStore(inner, PATIENT)
    names = []

    def work() -> None:
        names.append(threading.current_thread().name)
        assert threading.current_thread().daemon
        assert store.size("a") == 7

    run_workers(store, [work], "first")
    assert names == inner.threads == ["first-0"]
    run_workers(store, [lambda: None, lambda: other.size("a")], "second")
    store.size("a")
    assert inner.threads[1:] == ["fastckpt-storage"] * 2
    assert not store.busy


@pytest.mark.parametrize("store", [DeadlineStore(MemoryStore("all"), PATIENT), MemoryStore("all")])
def test_workers_run_at_the_same_time_and_the_first_error_is_raised_when_all_have_ended(store: Store) -> None:
    together = threading.Barrier(3)
    failed = threading.Event()
    done: list[int] = []

    def fails() -> None:
        together.wait(PATIENT)
        try:
            store.size("missing")
        finally:
            failed.set()

    def fails_later() -> None:
        together.wait(PATIENT)
        assert failed.wait(PATIENT)
        raise ValueError("later")

    def succeeds() -> None:
        together.wait(PATIENT)
        assert failed.wait(PATIENT)
        writer = store.write(f"a{len(list(store.list('')))}")
        writer.append(b"x")
        done.append(writer.finish())

    with pytest.raises(ObjectNotFound):
        run_workers(store, [succeeds, fails_later, fails], "test")
    assert done == [1]
    run_workers(store, [], "test")


def test_workers_are_left_behind_when_the_storage_is_silent_and_come_to_no_other_call() -> None:
    inner = ThreadStore()
    store = DeadlineStore(inner, 0.5)
    errors: list[StorageError] = []
    go_on = threading.Event()

    def stuck() -> None:
        try:
            store.size("held")
        except StorageError as error:
            errors.append(error)
        with pytest.raises(StorageError, match="it was given up"):
            store.size("b")

    def computes() -> None:
        assert go_on.wait(PATIENT)
        with pytest.raises(StorageError, match="cannot read the size of 'c'"):
            store.size("c")

    with pytest.raises(
        StorageError, match=r"cannot read the size of 'held' in memory://workers: the storage has not answered for \d s"
    ) as caught:
        run_workers(store, [computes, stuck], "test")
    assert caught.value.transient
    assert store.busy
    with pytest.raises(StorageError, match="has not answered"):
        store.size("d")
    inner.speaks.set()
    end = time.monotonic() + PATIENT
    while any(thread.name == "test-1" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.001)
    assert store.busy, "the other one is still at work, on a buffer perhaps"
    go_on.set()
    wait_idle(store)
    assert [str(error) for error in errors] == [
        "cannot read the size of 'held' in memory://workers: it was given up, since the storage did not answer in time"
    ]
    assert inner.threads == ["test-1"]
    assert store.size("e") == 7


def test_a_worker_that_takes_its_time_between_calls_is_waited_for() -> None:
    store = DeadlineStore(MemoryStore("slow"), 0.05)
    run_workers(store, [lambda: time.sleep(0.5)], "test")


def test_what_a_stuck_worker_writes_is_abandoned_only_when_its_call_is_over() -> None:
    speaks = threading.Event()
    writer = SlowWriter(speaks)

    class Writes(MemoryStore):
        def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
            return writer

    store = DeadlineStore(Writes("x"), 0.2)
    seen: list[ObjectWriter] = []

    def work() -> None:
        seen.append(store.write("a"))
        with pytest.raises(StorageError, match="given up"):
            seen[0].append(b"x")

    with pytest.raises(StorageError, match="cannot append to 'a'"):
        run_workers(store, [work], "test")
    seen[0].abandon()
    assert writer.log == ["append begins"]
    speaks.set()
    wait_idle(store)
    assert writer.log == ["append begins", "append ends", "abandoned"]


def test_where_no_thread_can_be_started_the_caller_works_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    store = DeadlineStore(MemoryStore("alone"), PATIENT)
    names = []

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work() -> None:
        store.create(f"a{len(names)}", b"x")
        names.append(threading.current_thread().name)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    run_workers(store, [work, work], "test")
    assert names == [threading.current_thread().name] * 2
    assert not store.busy


def test_an_error_of_a_worker_does_not_keep_alive_what_it_held() -> None:
    store = DeadlineStore(MemoryStore("empty"), PATIENT)

    class Held:
        pass

    def run(held: Held) -> weakref.ref[Held]:
        def look_for() -> None:
            store.size(f"missing{held}"[:7])

        with contextlib.suppress(ObjectNotFound):
            run_workers(store, [look_for], "test")
            pytest.fail("there is no such object")
        return weakref.ref(held)

    gc.disable()
    try:
        reference = run(Held())
        end = time.monotonic() + PATIENT
        while reference() is not None:  # a thread's last frames go a moment after it was heard of
            assert time.monotonic() < end
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_not_busy_with_its_parents_workers() -> None:
    inner = ThreadStore()
    store = DeadlineStore(inner, PATIENT)

    def work() -> None:
        assert inner.reached.wait(PATIENT)
        child = os.fork()
        if child == 0:
            run_workers(store, [lambda: store.size("a")], "child")
            os._exit(store.busy)
        assert os.waitpid(child, 0)[1] == 0
        inner.speaks.set()

    run_workers(store, [work, lambda: store.size("held")], "test")
    assert not store.busy
