"""FaultyStore without faults is the store it wraps; with faults it does what its docstring says."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from fastckpt.errors import ObjectNotFound, OutOfSpace, StorageError
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Store
from fastckpt.testing import FaultyStore, Killed, StoreContract


class TestFaultyStoreWithoutFaults(StoreContract):
    @pytest.fixture
    def make_store(self) -> Callable[[], Store]:
        faulty = FaultyStore(MemoryStore("test"))
        return faulty.view


def work(store: Store) -> None:
    store.create("FORMAT", b"format")
    writer = store.write("packs/p")
    try:
        writer.append(b"0123")
        writer.append(b"4567")
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    store.size("packs/p")
    store.read("FORMAT", size_max=100)
    store.read_into("packs/p", 0, memoryview(bytearray(8)))
    list(store.children(""))
    list(store.list("packs"))
    store.delete("FORMAT")


OPERATIONS = [
    (1, "create", "FORMAT"),
    (2, "write", "packs/p"),
    (3, "append", "packs/p"),
    (4, "append", "packs/p"),
    (5, "finish", "packs/p"),
    (6, "size", "packs/p"),
    (7, "read", "FORMAT"),
    (8, "read_into", "packs/p"),
    (9, "children", ""),
    (10, "list", "packs"),
    (11, "delete", "FORMAT"),
]


def content(store: Store) -> dict[str, bytes]:
    return {info.name: store.read(info.name, size_max=100) for info in store.list("")}


# What the store holds after death at each operation, without and with torn.
DEATHS = {
    1: ({}, {"FORMAT": b"format"}),
    2: ({"FORMAT": b"format"}, {"FORMAT": b"format", "packs/p": b""}),
    3: ({"FORMAT": b"format", "packs/p": b""}, {"FORMAT": b"format", "packs/p": b"01"}),
    4: ({"FORMAT": b"format", "packs/p": b"0123"}, {"FORMAT": b"format", "packs/p": b"012345"}),
    **{n: ({"FORMAT": b"format", "packs/p": b"01234567"},) * 2 for n in range(5, 11)},
    11: ({"FORMAT": b"format", "packs/p": b"01234567"}, {"packs/p": b"01234567"}),
}


def test_every_operation_is_counted_and_logged():
    faulty = FaultyStore(MemoryStore("test"))
    work(faulty)
    assert list(faulty.operations) == OPERATIONS
    assert not faulty.killed


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("number", range(1, 12))
def test_death_stops_everything_and_leaves_what_a_dead_process_leaves(number, torn):
    faulty = FaultyStore(MemoryStore("test"), kill_at=number, torn=torn)
    with pytest.raises(Killed):
        work(faulty)
    assert faulty.killed
    assert list(faulty.operations) == OPERATIONS[:number]
    assert content(faulty.store) == DEATHS[number][torn]
    for call in (
        lambda: faulty.create("late", b""),
        lambda: faulty.write("late"),
        lambda: faulty.read("FORMAT", size_max=100),
        lambda: faulty.list(""),
        lambda: faulty.delete("FORMAT"),
    ):
        with pytest.raises(Killed):
            call()
    assert content(faulty.store) == DEATHS[number][torn]
    assert len(faulty.operations) == number


def test_an_open_stream_dies_with_the_job_and_cannot_be_abandoned():
    faulty = FaultyStore(MemoryStore("test"))
    writer = faulty.write("a")
    writer.append(b"abc")
    faulty.kill()
    for call in (lambda: writer.append(b"x"), writer.finish):
        with pytest.raises(Killed):
            call()
    writer.abandon()
    assert content(faulty.store) == {"a": b"abc"}


def test_killed_passes_handlers_of_exceptions():
    assert not issubclass(Killed, Exception)


def test_all_views_share_numbers_and_death():
    store = MemoryStore("test")
    first = FaultyStore(store, kill_at=3)
    second, third = first.view(), first.view(MemoryStore("other"))
    first.create("a", b"")
    third.create("b", b"")
    with pytest.raises(Killed):
        second.create("c", b"")
    for view in (first, second, third):
        assert view.killed
        with pytest.raises(Killed):
            view.size("a")
    assert [operation.name for operation in first.operations] == ["a", "b", "c"]
    assert content(store) == {"a": b""}
    assert content(third.store) == {"b": b""}


def test_an_operation_under_way_at_the_death_completes_but_its_caller_does_not_learn():
    inner = MemoryStore("test")
    entered, resume = threading.Event(), threading.Event()

    class SlowStore(MemoryStore):
        def create(self, name, data):
            entered.set()
            assert resume.wait(30)
            inner.create(name, data)

    faulty = FaultyStore(SlowStore("slow"))
    outcome = []

    def create():
        try:
            faulty.create("a", b"x")
        except BaseException as error:
            outcome.append(type(error))

    thread = threading.Thread(target=create)
    thread.start()
    assert entered.wait(30)
    faulty.kill()
    resume.set()
    thread.join(30)
    assert outcome == [Killed]
    assert content(inner) == {"a": b"x"}


@pytest.mark.parametrize("number", range(1, 12))
def test_a_failure_happens_once_and_does_nothing(number):
    faulty = FaultyStore(MemoryStore("test"), fail_at=number, error=OutOfSpace("injected: full"))
    with pytest.raises(OutOfSpace, match="injected: full"):
        work(faulty)
    expected = dict(DEATHS[number][0])
    if number in (3, 4, 5):  # abandoned
        del expected["packs/p"]
    assert content(faulty.store) == expected
    faulty.create("later", b"")


def test_a_failure_after_the_operation_leaves_it_applied():
    faulty = FaultyStore(MemoryStore("test"), fail_at=1, after=True)
    with pytest.raises(StorageError, match="injected") as caught:
        faulty.create("a", b"x")
    assert caught.value.transient
    assert content(faulty.store) == {"a": b"x"}


def test_an_object_whose_finish_was_applied_stays_when_abandoned():
    faulty = FaultyStore(MemoryStore("test"), fail_at=5, after=True)
    with pytest.raises(StorageError):
        work(faulty)
    assert content(faulty.store)["packs/p"] == b"01234567"


def test_a_persistent_failure_goes_on():
    faulty = FaultyStore(MemoryStore("test"), fail_at=2, error=StorageError("broken"), persistent=True)
    faulty.create("a", b"x")
    errors = []
    for _ in range(3):
        with pytest.raises(StorageError, match="broken") as caught:
            faulty.size("a")
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3, "one error object in several threads would mix their tracebacks"


def test_only_what_is_asked_for_is_counted_but_all_dies():
    faulty = FaultyStore(
        MemoryStore("test"), kill_at=2, only=lambda operation, name: operation == "create" and name.startswith("d/")
    )
    faulty.create("a", b"")
    faulty.create("d/1", b"")
    faulty.size("d/1")
    with pytest.raises(Killed):
        faulty.create("d/2", b"")
    with pytest.raises(Killed):
        faulty.size("a")
    assert list(faulty.operations) == [(1, "create", "d/1"), (2, "create", "d/2")]


def test_errors_of_the_store_itself_pass_and_count():
    faulty = FaultyStore(MemoryStore("test"))
    with pytest.raises(ObjectNotFound):
        faulty.size("a")
    assert list(faulty.operations) == [(1, "size", "a")]


@pytest.mark.parametrize(
    "faults",
    [
        {"kill_at": 0},
        {"fail_at": -1},
        {"torn": True},
        {"persistent": True},
        {"after": True},
        {"error": OutOfSpace("x")},
    ],
    ids=str,
)
def test_faults_that_could_never_happen_are_refused(faults):
    with pytest.raises(ValueError):
        FaultyStore(MemoryStore("test"), **faults)
