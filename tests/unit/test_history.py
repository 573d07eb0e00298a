"""The commit protocol: which decisions are legal, who is fenced, and what an ambiguous create comes to."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from fastckpt.errors import (
    AnotherWriter,
    AttemptAborted,
    FormatError,
    ObjectNotFound,
    SnapshotDamaged,
    StorageError,
)
from fastckpt.format import document, names
from fastckpt.format.decision import Abort, Commit, Decision, Live, Open, decode_decision
from fastckpt.repository.history import History
from fastckpt.repository.writer import outcome
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Bytes, Store
from fastckpt.testing import FaultyStore, ThreadGroup


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore("test")


def snapshot(attempt: str, step: int = 1, **fields: Any) -> Callable[[int], Live]:
    values: dict[str, Any] = {"created": "now", "bytes": 10, "index": "0" * 64, "metrics": {}, "note": "", **fields}
    return lambda number: Live(**{"step": step, "attempt": attempt, "decision": number, **values})


def opened(store: Store) -> tuple[History, str]:
    history = History(store)
    history.load()
    return history, history.append_open()


def commit(history: History, writer: str, counter: int) -> str:
    attempt = names.attempt(writer, counter)
    history.append_commit(writer, snapshot(attempt, counter))
    return attempt


def loaded(store: Store) -> History:
    history = History(store)
    history.load()
    return history


def steps(store: Store) -> list[int]:
    return [live.step for live in loaded(store).live]


def decisions(store: MemoryStore) -> list[Decision]:
    return [
        decode_decision(store.read(info.name, size_max=2**30), number)
        for number, info in enumerate(store.list("decisions"), 1)
    ]


# --- what is legal -------------------------------------------------------------------------------------------------


def test_an_empty_store_has_an_empty_history(store: MemoryStore) -> None:
    history = loaded(store)
    assert (history.number, history.live) == (0, [])
    assert history.read_all() == []


def test_a_snapshot_is_live_once_its_commit_is_appended(store: MemoryStore) -> None:
    history, writer = opened(store)
    first = commit(history, writer, 1)
    second = commit(history, writer, 2)
    for reader in (history, loaded(store)):
        assert [live.attempt for live in reader.live] == [first, second]
        assert [live.decision for live in reader.live] == [2, 3]
        assert reader.committed(first)
        assert not reader.aborted(first)
    assert [type(entry) for entry in history.read_all()] == [Open, Commit, Commit]


def test_the_number_of_an_open_is_part_of_its_writers_id(store: MemoryStore) -> None:
    _, first = opened(store)
    _, second = opened(store)
    assert [names.writer_open_number(writer) for writer in (first, second)] == [1, 2]


def test_an_aborted_attempt_never_commits(store: MemoryStore) -> None:
    history, writer = opened(store)
    attempt = names.attempt(writer, 1)
    history.append_abort(writer, attempt)
    assert history.aborted(attempt)
    with pytest.raises(AttemptAborted, match=attempt):
        history.append_commit(writer, snapshot(attempt))
    assert steps(store) == []
    assert len(decisions(store)) == 2


def test_an_abort_of_what_is_committed_or_aborted_already_appends_nothing(store: MemoryStore) -> None:
    history, writer = opened(store)
    history.append_abort(writer, commit(history, writer, 1))
    history.append_abort(writer, names.attempt(writer, 2))
    history.append_abort(writer, names.attempt(writer, 2))
    assert [type(entry) for entry in decisions(store)] == [Open, Commit, Abort]


def test_a_later_open_fences_every_earlier_writer(store: MemoryStore) -> None:
    zombie, old = opened(store)
    kept = commit(zombie, old, 1)
    history, new = opened(store)
    for append in (
        lambda: commit(zombie, old, 2),
        lambda: zombie.append_abort(old, names.attempt(old, 2)),
    ):
        with pytest.raises(AnotherWriter, match=r"decision 3.*can never be committed"):
            append()
    assert zombie.fenced(old)
    assert not history.fenced(new)
    commit(history, new, 7)
    assert steps(store) == [1, 7]
    assert loaded(store).committed(kept)
    assert len(decisions(store)) == 4, "a fenced writer leaves nothing"


class Interleaved(MemoryStore):
    """Calls ``before`` once, just before the next operation of that kind; then it is an ordinary store again."""

    before: tuple[str, Callable[[], object]] | None = None

    def _pause(self, operation: str) -> None:
        if self.before and self.before[0] == operation:
            _, act = self.before
            self.before = None
            act()

    def create(self, name: str, data: Bytes) -> None:
        self._pause("create")
        super().create(name, data)

    def children(self, prefix: str) -> Any:
        self._pause("children")
        return super().children(prefix)


def test_a_writer_that_loses_the_race_to_an_open_is_fenced_although_it_was_legal_when_it_began() -> None:
    store = Interleaved("test")
    history, writer = opened(store)
    store.before = ("create", lambda: opened(store))
    with pytest.raises(AnotherWriter):
        commit(history, writer, 1)
    assert steps(store) == []


def test_a_writer_that_loses_the_race_to_a_commit_takes_the_next_number() -> None:
    store = Interleaved("test")
    history, writer = opened(store)
    twin = loaded(store)
    store.before = ("create", lambda: commit(twin, writer, 1))
    commit(history, writer, 2)
    assert [live.decision for live in loaded(store).live] == [2, 3]
    assert steps(store) == [1, 2]
    assert len(history.read_all()) == 3


def test_an_abort_that_loses_the_race_to_a_late_commit_of_its_attempt_appends_nothing() -> None:
    store = Interleaved("test")
    history, writer = opened(store)
    late = loaded(store)
    store.before = ("create", lambda: commit(late, writer, 1))
    history.append_abort(writer, names.attempt(writer, 1))
    assert history.committed(names.attempt(writer, 1))
    assert [type(entry) for entry in decisions(store)] == [Open, Commit]


def test_an_attempt_that_is_committed_already_is_not_committed_again(store: MemoryStore) -> None:
    history, writer = opened(store)
    commit(history, writer, 1)
    with pytest.raises(Exception, match="committed"):
        commit(history, writer, 1)
    assert loaded(store).read_all()
    assert len(decisions(store)) == 2


def test_an_attempt_of_another_writer_is_not_committed(store: MemoryStore) -> None:
    history, writer = opened(store)
    foreign = names.attempt(names.writer(1, "f" * 16), 1)
    with pytest.raises(Exception, match="another writer"):
        history.append_commit(writer, snapshot(foreign))
    assert loaded(store).read_all()


@pytest.mark.parametrize("labels", [{"note": "n" * 5000}, {"metrics": {"loss": float("nan")}}], ids=str)
def test_a_commit_that_no_reader_would_accept_is_not_appended(store: MemoryStore, labels: dict[str, Any]) -> None:
    history, writer = opened(store)
    with pytest.raises(FormatError):
        history.append_commit(writer, snapshot(names.attempt(writer, 1), **labels))
    assert loaded(store).read_all()


# --- what a reader refuses -----------------------------------------------------------------------------------------


def forge(store: MemoryStore, number: int, change: Callable[[Decision], Decision]) -> None:
    """Rewrites a decision, well sealed, and the digests of all after it, so that only the rule itself is broken."""
    previous = None
    for at, entry in enumerate(decisions(store), 1):
        if at < number:
            continue
        if previous is not None:
            entry = msgspec.structs.replace(entry, previous=previous)
        if at == number:
            entry = change(entry)
        data = document.seal(entry)
        store.delete(names.decision(at))
        store.create(names.decision(at), data)
        previous = document.digest(data)


def three(store: MemoryStore) -> str:
    """OPEN, COMMIT, COMMIT, OPEN, COMMIT; returns the second writer."""
    history, writer = opened(store)
    commit(history, writer, 1)
    commit(history, writer, 2)
    history, second = opened(store)
    commit(history, second, 3)
    return second


def replaced(**fields: Any) -> Callable[[Decision], Decision]:
    return lambda entry: msgspec.structs.replace(entry, **fields)


def resnapshot(**fields: Any) -> Callable[[Decision], Decision]:
    def change(entry: Decision) -> Decision:
        assert isinstance(entry, Commit)
        new = msgspec.structs.replace(entry.snapshot, **fields)
        live = [*entry.live[:-1], new] if entry.live else None
        return msgspec.structs.replace(entry, snapshot=new, live=live)

    return change


def test_forging_nothing_is_no_damage(store: MemoryStore) -> None:
    three(store)
    forge(store, 2, lambda entry: entry)
    assert len(loaded(store).read_all()) == 5


BROKEN: dict[str, tuple[int, Callable[[MemoryStore, str], object]]] = {
    "a rewritten decision": (
        3,  # the next one has the digest of the one that was there
        lambda store, _: rewrite(store, 2, document.seal(msgspec.structs.replace(decisions(store)[1], created="x"))),
    ),
    "a flipped bit": (2, lambda store, _: rewrite(store, 2, flipped(store.read(names.decision(2), size_max=10**6)))),
    "a decision under another number": (
        2,
        lambda store, _: rewrite(store, 2, store.read(names.decision(3), size_max=10**6)),
    ),
    "a chain that is broken": (3, lambda store, _: forge(store, 3, replaced(previous="0" * 64))),
    "a commit by a fenced writer": (
        5,
        lambda store, _: forge(
            store,
            5,
            lambda entry: resnapshot(attempt=names.attempt(decisions(store)[0].writer, 9))(
                msgspec.structs.replace(entry, writer=decisions(store)[0].writer)
            ),
        ),
    ),
    "a commit of another writer's attempt": (
        5,
        lambda store, _: forge(store, 5, resnapshot(attempt=names.attempt(decisions(store)[0].writer, 9))),
    ),
    "a commit under another number": (5, lambda store, _: forge(store, 5, resnapshot(decision=4))),
    "a second commit of an attempt": (
        3,
        lambda store, _: forge(store, 3, resnapshot(attempt=decisions(store)[1].snapshot.attempt)),  # type: ignore[union-attr]
    ),
    "a list that lacks a snapshot": (
        5,
        lambda store, _: forge(store, 5, lambda entry: msgspec.structs.replace(entry, live=(entry.live or [])[1:])),
    ),
    "an older list that lacks a snapshot": (
        3,
        lambda store, _: forge(store, 3, lambda entry: msgspec.structs.replace(entry, live=(entry.live or [])[1:])),
    ),
    "a pointer to a list that is not the newest": (3, lambda store, _: forge(store, 3, replaced(live=None, live_at=1))),
}


def rewrite(store: MemoryStore, number: int, data: bytes) -> None:
    store.delete(names.decision(number))
    store.create(names.decision(number), data)


def flipped(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize("rule", BROKEN)
def test_the_whole_chain_is_checked_and_the_decision_that_breaks_a_rule_is_named(store: MemoryStore, rule: str) -> None:
    writer = three(store)
    number, break_it = BROKEN[rule]
    break_it(store, writer)
    with pytest.raises(SnapshotDamaged, match=names.decision(number)) as caught:
        History(store).read_all()
    assert caught.value.object == names.decision(number)


def test_a_commit_of_an_aborted_attempt_is_damage(store: MemoryStore) -> None:
    history, writer = opened(store)
    history.append_abort(writer, names.attempt(writer, 1))
    commit(history, writer, 2)
    forge(store, 3, resnapshot(attempt=names.attempt(writer, 1)))
    with pytest.raises(SnapshotDamaged, match=r"000003 commits attempt .* aborted or committed before"):
        History(store).read_all()


@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("read", [History.load, History.read_all])
def test_a_missing_decision_is_named(store: MemoryStore, number: int, read: Callable[[History], object]) -> None:
    three(store)
    history, writer = opened(store)
    commit(history, writer, 4)
    store.delete(names.decision(number))
    with pytest.raises(SnapshotDamaged, match=f"{names.decision(number)}.* missing") as caught:
        read(History(store))
    assert caught.value.object == names.decision(number)


def test_opening_names_a_damaged_decision_that_it_reads(store: MemoryStore) -> None:
    three(store)
    rewrite(store, 5, flipped(store.read(names.decision(5), size_max=10**6)))
    with pytest.raises(SnapshotDamaged, match=names.decision(5)):
        loaded(store)


def test_opening_names_a_newest_decision_that_points_to_no_list(store: MemoryStore) -> None:
    three(store)
    forge(store, 5, replaced(live=None, live_at=0))
    with pytest.raises(SnapshotDamaged, match=f"{names.decision(5)} points to no list"):
        loaded(store)


def test_a_stray_object_among_the_decisions_is_damage(store: MemoryStore) -> None:
    three(store)
    store.create("decisions/notes.txt", b"x")
    with pytest.raises(SnapshotDamaged):
        loaded(store)


def appended(store: MemoryStore, make: Callable[[dict[str, Any]], Decision]) -> None:
    """Adds a decision that is well sealed and chained, and says nothing new about what is live."""
    entries = decisions(store)
    number = len(entries) + 1
    live = loaded(store).live if entries else []
    last = store.read(names.decision(number - 1), size_max=10**6) if entries else b""
    head = {
        "number": number,
        "previous": document.digest(last) if entries else "",
        "created": "now",
        "live": live,
        "live_at": number,
    }
    store.create(names.decision(number), document.seal(make(head)))


def entry_of(kind: str, writer: str, attempt: str) -> Callable[[dict[str, Any]], Decision]:
    if kind == "abort":
        return lambda head: Abort(**head, writer=writer, attempt=attempt)

    def make(head: dict[str, Any]) -> Decision:
        new = snapshot(attempt)(head["number"])
        return Commit(**{**head, "live": [*head["live"], new]}, writer=writer, snapshot=new)

    return make


@pytest.mark.parametrize(
    "case",
    [
        "an ABORT of a committed attempt",
        "an ABORT of another writer's attempt",
        "a COMMIT by a writer that never opened, under the number of one that did",
        "a COMMIT by a writer whose number is no OPEN's",
        "a COMMIT before any OPEN",
    ],
)
def test_a_reader_holds_decisions_to_the_rules_of_writers(store: MemoryStore, case: str) -> None:
    impostor = names.writer(1, "f" * 16)
    if case == "a COMMIT before any OPEN":
        appended(store, entry_of("commit", impostor, names.attempt(impostor, 1)))
    else:
        history, writer = opened(store)
        done = commit(history, writer, 1)
        late = names.writer(2, "f" * 16)
        kind, by, attempt = {
            "an ABORT of a committed attempt": ("abort", writer, done),
            "an ABORT of another writer's attempt": ("abort", writer, names.attempt(impostor, 5)),
            "a COMMIT by a writer that never opened, under the number of one that did": (
                "commit",
                impostor,
                names.attempt(impostor, 1),
            ),
            "a COMMIT by a writer whose number is no OPEN's": ("commit", late, names.attempt(late, 1)),
        }[case]
        appended(store, entry_of(kind, by, attempt))
    with pytest.raises(SnapshotDamaged):
        History(store).read_all()


def test_checking_the_chain_while_the_job_goes_on_saving_finds_no_damage() -> None:
    store = Interleaved("test")
    history, writer = opened(store)
    commit(history, writer, 1)
    verifier = History(store)
    store.before = ("children", lambda: commit(history, writer, 2))
    assert len(verifier.read_all()) >= 2


# --- failures of the store -----------------------------------------------------------------------------------------


def creating(operation: str, name: str) -> bool:
    return operation == "create" and name.startswith("decisions/")


def attempt_to_commit(store: MemoryStore, **faults: Any) -> tuple[str, bool]:
    """Commits through a store that fails at the first create; the attempt, and whether commit said it worked."""
    _, writer = opened(store)
    history = History(FaultyStore(store, fail_at=1, only=creating, **faults))
    history.load()
    attempt = names.attempt(writer, 1)
    try:
        history.append_commit(writer, snapshot(attempt))
    except StorageError:
        return attempt, False
    assert history.committed(attempt)
    return attempt, True


@pytest.mark.parametrize("persistent", [False, True])
def test_a_create_that_happened_but_was_reported_as_failed_is_a_commit(store: MemoryStore, persistent: bool) -> None:
    attempt, committed = attempt_to_commit(store, after=True, persistent=persistent)
    assert committed
    assert loaded(store).committed(attempt)
    assert outcome(store, attempt).committed is not None
    assert len(decisions(store)) == 2, "it is there once"


def test_a_create_that_failed_once_is_made_again(store: MemoryStore) -> None:
    attempt, committed = attempt_to_commit(store)
    assert committed
    assert loaded(store).committed(attempt)
    assert len(decisions(store)) == 2


def test_a_create_that_keeps_failing_commits_nothing_and_says_so(store: MemoryStore) -> None:
    attempt, committed = attempt_to_commit(store, persistent=True)
    assert not committed
    assert outcome(store, attempt).committed is None
    assert len(decisions(store)) == 1


def test_a_create_that_failed_while_another_writer_was_faster_is_a_lost_race() -> None:
    store = Interleaved("test")
    history, writer = opened(store)
    twin = loaded(store)

    def lose() -> None:
        commit(twin, writer, 1)
        raise StorageError("connection reset", transient=True)

    store.before = ("create", lose)
    commit(history, writer, 2)
    assert steps(store) == [1, 2]
    assert len(history.read_all()) == 3


def test_a_writer_that_loses_every_race_gives_up_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastckpt.repository.history._RACES_MAX", 3)
    store = Interleaved("test")
    history, writer = opened(store)
    twin, counters = loaded(store), itertools.count(1)

    def lose() -> None:
        commit(twin, writer, next(counters))
        store.before = ("create", lose)

    store.before = ("create", lose)
    with pytest.raises(StorageError, match="lost 3 races for the next decision in a row") as caught:
        commit(history, writer, 100)
    assert caught.value.transient
    assert steps(store) == [1, 2, 3]


def test_confirming_a_decision_creates_it_again_so_that_it_is_known_to_be_durable(store: MemoryStore) -> None:
    history, writer = opened(store)
    commit(history, writer, 1)
    faulty = FaultyStore(store)
    History(faulty).confirm(2)
    assert ("create", names.decision(2)) in [(operation.operation, operation.name) for operation in faulty.operations]
    with pytest.raises(StorageError):
        History(FaultyStore(store, fail_at=1, persistent=True, only=creating)).confirm(2)
    with pytest.raises(ObjectNotFound):
        History(store).confirm(3)


def test_what_became_of_an_attempt_is_known_even_if_the_list_of_snapshots_came_after_its_abort(
    store: MemoryStore,
) -> None:
    history, writer = opened(store)
    history.append_abort(writer, names.attempt(writer, 1))
    for counter in range(2, 5):
        commit(history, writer, counter)
    assert not loaded(store).aborted(names.attempt(writer, 1)), "the case at hand: load() did not read the ABORT"
    assert outcome(store, names.attempt(writer, 1)).aborted
    assert not outcome(store, names.attempt(writer, 9)).aborted
    live = outcome(store, names.attempt(writer, 3)).committed
    assert live is not None
    assert live.step == 3


# --- many ----------------------------------------------------------------------------------------------------------


def test_threads_that_append_at_once_make_one_serial_history(store: MemoryStore) -> None:
    _, writer = opened(store)

    def append(group: Any) -> list[str]:
        history = loaded(store)
        return [commit(history, writer, 100 * group.rank + counter) for counter in range(1, 21)]

    attempts = ThreadGroup(3).run(append)
    entries = loaded(store).read_all()
    assert [entry.number for entry in entries] == list(range(1, 62))
    committed = [entry.snapshot.attempt for entry in entries if isinstance(entry, Commit)]
    assert sorted(committed) == sorted(itertools.chain(*attempts))
    for own in attempts:
        assert [attempt for attempt in committed if attempt in own] == own, "each thread's are in its order"


def test_threads_that_open_at_once_leave_exactly_one_that_may_commit(store: MemoryStore) -> None:
    def work(group: Any) -> str:
        history, writer = opened(store)
        try:
            for counter in range(1, 6):
                commit(history, writer, counter)
        except AnotherWriter:
            return ""
        return writer

    ThreadGroup(4).run(work)
    entries = loaded(store).read_all()
    opened_by = ""
    for entry in entries:
        opened_by = entry.writer if isinstance(entry, Open) else opened_by
        assert entry.writer == opened_by, "no COMMIT follows another writer's OPEN"
    assert sum(isinstance(entry, Open) for entry in entries) == 4


def history_of(commits: int) -> tuple[MemoryStore, int]:
    store = MemoryStore("many")
    history, writer = opened(store)
    for counter in range(1, commits + 1):
        commit(history, writer, counter)
    return store, sum(info.size for info in store.list("decisions"))


def test_a_long_history_stays_small_and_opens_with_few_reads() -> None:
    store, size = history_of(500)
    carriers = [entry.number for entry in decisions(store) if entry.live is not None]
    assert len(carriers) < 120, "the list is repeated seldom"
    gaps = [after - before for before, after in itertools.pairwise(carriers)]
    assert max(gaps) <= 500 // 16 + 1, "and often enough"
    _, half = history_of(250)
    assert size < 3 * half, "twice as many commits take about twice the bytes, not four times"

    faulty = FaultyStore(store)
    assert len(loaded(faulty).live) == 500
    assert [operation.operation for operation in faulty.operations].count("children") == 1
    assert len(faulty.operations) <= 500 // 16 + 5


def test_refreshing_reads_only_what_is_new(store: MemoryStore) -> None:
    history, writer = opened(store)
    faulty = FaultyStore(store)
    reader = loaded(faulty)
    before = len(faulty.operations)
    commit(history, writer, 1)
    assert [type(entry) for entry in reader.refresh()] == [Commit]
    assert reader.refresh() == []
    assert [operation.name for operation in faulty.operations[before:]] == [
        names.decision(2),
        names.decision(3),
        names.decision(3),
    ]
