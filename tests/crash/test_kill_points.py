"""A job dies before every single store operation, wholly or one rank of it; or every single operation fails.

Afterwards everything that was reported committed restores bit for bit, nothing else is visible unless it is whole, and
the next job saves without help and takes away what the dead one left. The same checks find planted mistakes in the
order of the commit.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fastckpt.errors import AnotherWriter, CommitTimeout, FastckptError, OutOfSpace, StorageError
from fastckpt.format import document, names
from fastckpt.format.decision import Live
from fastckpt.format.tables import Part, PartInfo
from fastckpt.options import Options
from fastckpt.repository import repository
from fastckpt.repository.history import now
from fastckpt.repository.verify import verify
from fastckpt.repository.writer import Committer, Contents
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Bytes, ObjectWriter, Store
from fastckpt.testing.faulty_store import FaultyStore, Killed, Operation
from fastckpt.testing.thread_group import MemoryKeyValue
from tests.crash.numpy_job import (
    CHUNK_BYTES,
    Job,
    full_spec,
    leftovers,
    repository_violations,
)
from tests.crash.volatile_store import FATES, Fate, VolatileStore

SIZE = 4
SPEC = full_spec(SIZE)
OPERATIONS_MIN = 90
"""A pair of saves has more; fewer would mean that the enumeration stopped early."""

Wrap = Callable[[Store], Store]


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one writing thread a rank, the number of each rank's operations is the same in every run, and so none is
    passed over because it had another number when its turn came."""
    monkeypatch.setattr("fastckpt.save.STREAMS", 1)


Mistake = Callable[[pytest.MonkeyPatch], Wrap]
"""Breaks the code under test, and returns what to put around the stores of the job that shall make the mistake."""


def as_it_is(store: Store) -> Store:
    return store


def no_mistake(patch: pytest.MonkeyPatch) -> Wrap:
    return as_it_is


# --- what must hold after a death -------------------------------------------------------------------------------


def violations(left: Store, reported: set[int], tried: set[int], next_step: int) -> list[str]:
    """What is wrong with ``left``, which a job left that tried to save ``tried`` and was told of ``reported``."""
    found, listed = repository_violations(left, reported, tried, SIZE, SPEC)
    try:
        job = Job([left] * SIZE).run([next_step])
    except Exception as error:
        return [*found, f"the next job does not run: {type(error).__name__}: {error}"]
    found += [
        f"the next job's save fails on rank {rank}: {type(outcome[next_step]).__name__}: {outcome[next_step]}"
        for rank, outcome in enumerate(job.outcomes)
        if not isinstance(outcome[next_step], Live)
    ]
    after, _ = repository_violations(left, listed | job.reported, listed | {next_step}, SIZE, SPEC)
    found += [f"after the next save: {text}" for text in after]
    if not after:
        opened = repository.Repository(left)
        found += [f"the next job left {name}" for name in leftovers(left)]
        found += [f"verify says {damage}" for damage in verify(opened, opened.snapshots(), lambda progress: None)]
    return found


def killed_everywhere(
    *,
    steps: tuple[int, ...] = (1, 2),
    torn: bool = False,
    start: MemoryStore | None = None,
    before: frozenset[int] = frozenset(),
    fates: tuple[Fate, ...] = FATES,
    mistake: Mistake = no_mistake,
    until_found: bool = False,
) -> tuple[list[Operation], list[str]]:
    """Runs a job that saves ``steps``, once for each of its store operations, and kills it there; all ranks at once.
    Returns the operations it was killed at, and all violations. ``start`` is what the job finds,
    with the snapshots ``before``. ``mistake`` is made by this job only, not by the next one."""
    found: list[str] = []
    points: list[Operation] = []
    for number in itertools.count(1):
        volatile = VolatileStore(start)
        faulty = FaultyStore(volatile, kill_at=number, torn=torn)
        with pytest.MonkeyPatch.context() as patch:
            wrap = mistake(patch)
            stores = [wrap(faulty.view()) for _ in range(SIZE)]
            job = Job(stores, spec=SPEC, is_killed=lambda faulty=faulty: faulty.killed).run(steps)
        for rank, outcome in enumerate(job.outcomes):
            wrong = [e for e in outcome.values() if not isinstance(e, Live) and not (faulty.killed and _is_death(e))]
            found += [f"killed at {faulty.operations[-1]}: rank {rank} raised {error!r}" for error in wrong]
        for fate in fates:
            left = volatile.after_crash(fate)
            found += [
                f"killed at {faulty.operations[-1]}, torn={torn}, {fate}: {text}\n  {_tail(faulty)}"
                for text in violations(left, job.reported | before, set(steps) | before, max(steps) + 1)
            ]
        if not faulty.killed:
            return points, found
        points.append(faulty.operations[number - 1])
        if found and until_found:
            return points, found
    raise AssertionError


def _is_death(error: BaseException) -> bool:
    return isinstance(error, Killed)


def _tail(faulty: FaultyStore) -> str:
    return "\n  ".join(f"{number} {operation} {name}" for number, operation, name in faulty.operations[-8:])


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("torn", [False, True], ids=["before the operation", "half way through it"])
def test_a_job_killed_at_any_store_operation_loses_nothing_it_reported_and_leaves_nothing_partial(torn: bool) -> None:
    points, found = killed_everywhere(torn=torn)
    assert not found, "\n".join(found[:20])
    assert len(points) >= OPERATIONS_MIN
    created = [kind_of(point) for point in points if point.operation == "create"]
    assert created.count("decision") == 3
    assert set(created) == {"FORMAT", "decision", "layout", "part", "index"}
    print(f"{len(points)} operations, {len(FATES)} fates of what was not finished")


def kind_of(point: Operation) -> str:
    """The kind of object that an operation was about."""
    folder, _, rest = point.name.partition("/")
    kinds = {"decisions": "decision", "layouts": "layout", "packs": "pack", "attempts": rest.rpartition("/")[2][:5]}
    return kinds.get(folder, folder).partition("-")[0]


@pytest.mark.parametrize("torn", [False, True], ids=["before the operation", "half way through it"])
def test_a_job_that_takes_over_from_a_dead_one_may_die_anywhere_too(torn: bool) -> None:
    """Also while it cleans up."""
    left = a_dead_jobs_store()
    points, found = killed_everywhere(steps=(3,), torn=torn, start=left, before=frozenset({1}), fates=FATES[:2])
    assert not found, "\n".join(found[:20])
    assert len(points) >= OPERATIONS_MIN // 2


def a_dead_jobs_store() -> MemoryStore:
    """Holds step 1, and what was written of step 2 until the decision was due."""
    volatile = VolatileStore()
    decision = names.decision(3)
    faulty = FaultyStore(volatile, kill_at=1, only=lambda operation, name: (operation, name) == ("create", decision))
    Job([faulty.view() for _ in range(SIZE)], is_killed=lambda: faulty.killed).run([1, 2])
    left = volatile.after_crash(FATES[0])
    assert faulty.killed
    assert len(leftovers(left)) > SIZE
    return left


# --- the same check finds mistakes --------------------------------------------------------------------------------


def decision_before_index(patch: pytest.MonkeyPatch) -> Wrap:
    original = Committer.commit

    def commit(self: Committer, contents: Contents) -> Live:
        late: list[Callable[[], None]] = []
        store = self._store

        class Postponing:
            """The real ``commit``, whose index is created once the decision is."""

            def __getattr__(self, name: str) -> Any:
                return getattr(store, name)

            def create(self, name: str, data: Bytes) -> None:
                late.append(lambda: store.create(name, data))

        self._store = Postponing()  # type: ignore[assignment]
        try:
            live = original(self, contents)
        finally:
            self._store = store
        for create in late:
            create()
        return live

    patch.setattr(Committer, "commit", commit)
    return as_it_is


def decision_before_parts(patch: pytest.MonkeyPatch) -> Wrap:
    late: list[Callable[[], None]] = []
    commit = Committer.commit

    def write_part(store: Store, attempt: str, node: int, layout: str, tables: Any, blobs: Any) -> PartInfo:
        part = Part(attempt=attempt, node=node, layout=layout, tables=sorted(tables, key=_rank), blobs=list(blobs))
        data = document.pack_table(part)
        late.append(lambda: store.create(names.part(attempt, node), data))
        return PartInfo(node, document.digest(data), len(data))

    def commit_then_parts(self: Committer, contents: Contents) -> Live:
        mine = [late.pop() for _ in contents.parts]
        live = commit(self, contents)
        for create in mine:
            create()
        return live

    patch.setattr("fastckpt.save.write_part", write_part)
    patch.setattr(Committer, "commit", commit_then_parts)
    return as_it_is


def _rank(table: Any) -> int:
    return int(table.rank)


def packs_never_finished(patch: pytest.MonkeyPatch) -> Wrap:
    class Unfinished:
        def __init__(self, inner: ObjectWriter) -> None:
            self._inner, self._size = inner, 0

        def append(self, data: Bytes) -> int:
            self._size += memoryview(data).nbytes
            return self._inner.append(data)

        def finish(self) -> int:
            return self._size

        def abandon(self) -> None:
            self._inner.abandon()

    class Careless:
        def __init__(self, store: Store) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        def write(self, name: str) -> ObjectWriter:
            return Unfinished(self._store.write(name))

    return lambda store: Careless(store)  # type: ignore[return-value]


def reported_before_the_decision(patch: pytest.MonkeyPatch) -> Wrap:
    late: list[Callable[[], object]] = []
    decide, next_attempt = Committer._decide, Committer.next_attempt

    def decide_later(self: Committer, contents: Contents, index_digest: str) -> Live:
        late.append(lambda: decide(self, contents, index_digest))
        return Live(
            step=contents.step,
            attempt=contents.attempt,
            decision=self._history.number + 1,
            created=now(),
            bytes=contents.bytes,
            index=index_digest,
            metrics={},
            note=contents.note,
        )

    def decide_first(self: Committer) -> str:
        while late:
            late.pop()()
        return next_attempt(self)

    patch.setattr(Committer, "_decide", decide_later)
    patch.setattr(Committer, "next_attempt", decide_first)
    return as_it_is


def cleaning_what_is_committed(patch: pytest.MonkeyPatch) -> Wrap:
    clean = Committer.clean

    def clean_all(self: Committer) -> int:
        self._history.refresh()
        live, self._history._live = self._history._live, []
        try:
            return clean(self)
        finally:
            self._history._live = live

    patch.setattr(Committer, "clean", clean_all)
    return as_it_is


def ids(thing: object) -> str:
    return str(getattr(thing, "__name__", thing))


MISTAKES = [decision_before_index, decision_before_parts, packs_never_finished, reported_before_the_decision]


@pytest.mark.parametrize("mistake", MISTAKES, ids=ids)
def test_the_check_finds_a_commit_that_is_made_too_early(mistake: Mistake) -> None:
    _, found = killed_everywhere(mistake=mistake, until_found=True, fates=FATES[:1])
    assert found
    print(found[0])


def test_the_check_finds_a_job_that_cleans_too_much() -> None:
    start, before = a_dead_jobs_store(), frozenset({1})
    _, found = killed_everywhere(
        steps=(3,),
        start=start,
        before=before,
        mistake=cleaning_what_is_committed,
        until_found=True,
        fates=FATES[:1],
    )
    assert found
    print(found[0])


def test_the_check_finds_a_job_that_does_not_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Committer, "clean", lambda self: 0)  # of the next job too
    _, found = killed_everywhere(until_found=True, fates=FATES[:1])
    assert found
    print(found[0])


# --- one rank dies ----------------------------------------------------------------------------------------------


def killed_alone(rank: int, *, torn: bool) -> tuple[int, list[str]]:
    """Like ``killed_everywhere``, but only one rank dies, at each of its own operations, and the others go on."""
    found: list[str] = []
    for number in itertools.count(1):
        volatile = VolatileStore()
        faulty = FaultyStore(volatile, kill_at=number, torn=torn)
        job = Job([faulty if r == rank else volatile for r in range(SIZE)]).run([1, 2])
        seen = alone_violations(job, rank, faulty.killed) + unheard(job, volatile, except_for=rank)
        for fate in FATES[:3]:
            seen += violations(volatile.after_crash(fate), job.reported, {1, 2}, 3)
        found += [f"rank {rank} died at {faulty.operations[-1]}: {text}\n  {_tail(faulty)}" for text in seen]
        if not faulty.killed:
            return number - 1, found
    raise AssertionError


def alone_violations(job: Job, dead: int, died: bool) -> list[str]:
    found = []
    for rank, outcome in enumerate(job.outcomes):
        last = list(outcome.values())[-1]
        if rank == dead:
            found += [] if not died or _is_death(last) else [f"rank {rank} lived on and got {last!r}"]
        elif not isinstance(last, Live) and not (isinstance(last, FastckptError) and _names(last, dead)):
            found.append(f"rank {rank} got {last!r}, which does not name rank {dead}")
        elif died and isinstance(last, Live) and len(outcome) == 2:
            pass  # it died with nothing left to do for the others
    for step in (1, 2):
        ends = {isinstance(o[step], Live) for rank, o in enumerate(job.outcomes) if rank != dead and step in o}
        if len(ends) > 1:
            found.append(f"step {step}: some of the living say committed and some not: {_shown(job, step)}")
    return found


def unheard(job: Job, store: Store, except_for: int | None = None) -> list[str]:
    """Ranks that were told of a failure although the step is in the history: who fails looks there first."""
    if not repository.exists(store):
        return []
    listed = {snapshot.step for snapshot in repository.Repository(store).snapshots()}
    return [
        f"step {step} is committed, but rank {rank} was told {end!r}"
        for rank, outcome in enumerate(job.outcomes)
        for step, end in outcome.items()
        if step in listed and not isinstance(end, Live) and rank != except_for
    ]


def _shown(job: Job, step: int) -> list[str]:
    return [f"{type(outcome.get(step)).__name__}: {outcome.get(step)}" for outcome in job.outcomes]


def _names(error: BaseException, rank: int) -> bool:
    return (isinstance(error, CommitTimeout) and rank in error.missing_ranks) or f"rank {rank}" in str(error)


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("torn", [False, True], ids=["before the operation", "half way through it"])
@pytest.mark.parametrize("rank", range(SIZE))
def test_when_one_rank_dies_the_others_hear_which_and_nothing_is_half_committed(rank: int, torn: bool) -> None:
    count, found = killed_alone(rank, torn=torn)
    assert not found, "\n".join(found[:20])
    assert count >= 10


def test_the_living_hear_of_a_dead_rank_within_the_deadline() -> None:
    """By the clock this time, with the deadlines that every level of waiting adds. Any rank, early and late."""
    seconds = 0.5

    def run(rank: int, number: int) -> tuple[float, list[str]]:
        volatile = VolatileStore()
        faulty = FaultyStore(volatile, kill_at=number)
        options = Options(chunk_bytes=CHUNK_BYTES, commit_seconds_max=seconds)
        stores: list[Store] = [faulty if r == rank else volatile for r in range(SIZE)]
        start = time.monotonic()
        job = Job(stores, options=options, key_value=MemoryKeyValue()).run([1])
        took = time.monotonic() - start
        assert faulty.killed
        return took, alone_violations(job, rank, True) + violations(
            volatile.after_crash(FATES[0]), job.reported, {1}, 2
        )

    with ThreadPoolExecutor(8) as executor:
        runs = list(executor.map(lambda point: run(*point), itertools.product(range(SIZE), (1, 5))))
    for took, found in runs:
        assert not found, found
        assert took < seconds + 5


# --- a job is not dead, only paused ---------------------------------------------------------------------------------


def paused_everywhere() -> Iterator[tuple[int, bool, list[str]]]:
    """A job that saves steps 1 and 2 is stopped before each of its operations, all ranks at once; meanwhile another job
    saves step 3 to the same repository; then the first one goes on. Yields, for each operation, its number, whether
    the first job was fenced, and the violations."""
    for number in itertools.count(1):
        volatile = VolatileStore()
        counter = itertools.count(1)
        others: list[Job] = []

        def pause(operation: str, name: str, volatile=volatile, number=number, counter=counter, others=others) -> bool:  # type: ignore[no-untyped-def]
            # Called with the lock held under which operations start, so that nobody else can start one.
            if next(counter) == number:
                others.append(Job([volatile] * SIZE).run([3]))
            return True

        faulty = FaultyStore(volatile, only=pause)
        job = Job([faulty.view() for _ in range(SIZE)]).run([1, 2])
        if not others:
            return
        found = [f"the other job's save failed: {_shown(others[0], 3)}"] if others[0].reported != {3} else []
        ends = [list(outcome.values())[-1] for outcome in job.outcomes]
        for rank, end in enumerate(ends):
            if not isinstance(end, Live) and not isinstance(end, FastckptError):
                found.append(f"rank {rank} got {end!r}")
        if len({isinstance(end, Live) for end in ends}) > 1:
            found.append(f"some say committed and some not: {ends}")
        found += violations(volatile.after_crash(FATES[0]), job.reported | {3}, {1, 2, 3}, 4)
        fenced = any(isinstance(end, AnotherWriter) or "AnotherWriter" in str(end) for end in ends)
        yield number, fenced, [f"paused at {faulty.operations[number - 1]}: {text}" for text in found]


def test_a_job_paused_anywhere_while_another_takes_over_can_commit_nothing_and_damage_nothing() -> None:
    runs = list(paused_everywhere())
    found = [text for _, _, texts in runs for text in texts]
    assert not found, "\n".join(found[:20])
    assert len(runs) >= OPERATIONS_MIN
    # Most of the time it fails earlier, because the other job has taken away what it had written.
    assert any(fenced for _, fenced, _ in runs)


# --- an operation fails -------------------------------------------------------------------------------------------


def once_before(number: int, healed: Callable[[], bool]) -> dict[str, Any]:
    return {"fail_at": number, "error": StorageError("injected failure")}


def once_after(number: int, healed: Callable[[], bool]) -> dict[str, Any]:
    return {"fail_at": number, "error": StorageError("injected failure"), "after": True}


def full_until_healed(number: int, healed: Callable[[], bool]) -> dict[str, Any]:
    writes = ("create", "write", "append", "finish")
    return {
        "fail_at": number,
        "error": OutOfSpace("injected: no space left"),
        "persistent": True,
        "only": lambda operation, name: operation in writes and not healed(),
    }


def dead_until_healed(number: int, healed: Callable[[], bool]) -> dict[str, Any]:
    return {
        "fail_at": number,
        "error": StorageError("injected: input/output error"),
        "persistent": True,
        "only": lambda operation, name: not healed(),
    }


def failed_everywhere(fault: Callable[[int, Callable[[], bool]], dict[str, Any]]) -> Iterator[tuple[int, list[str]]]:
    """A job saves steps 1, 2 and 3, once for each of the operations of the first two, which fails; a lasting fault is
    gone after the first step that failed. Yields, for each operation, its number and the violations."""
    for number in itertools.count(1):
        volatile = VolatileStore()
        failed_steps: list[int] = []
        faulty = FaultyStore(volatile, **fault(number, lambda failed=failed_steps: bool(failed)))
        job = Job([faulty.view() for _ in range(SIZE)])
        counts = {}

        def on_done(step: int, job: Job = job, faulty=faulty, counts=counts, failed_steps=failed_steps) -> None:  # type: ignore[no-untyped-def]
            counts[step] = len(faulty.operations)
            if any(not isinstance(outcome[step], Live) for outcome in job.outcomes):
                failed_steps.append(step)

        job.run([1, 2, 3], on_each_step_done=on_done)
        if not failed_steps and counts[2] < number:
            return
        found = []
        for step in (1, 2, 3):
            ends = [outcome[step] for outcome in job.outcomes]
            if len({isinstance(end, Live) for end in ends}) > 1:
                found.append(f"step {step}: some say committed and some not: {_shown(job, step)}")
            for rank, end in enumerate(ends):
                if not isinstance(end, Live) and not (isinstance(end, FastckptError) and "injected" in str(end)):
                    found.append(f"step {step}: rank {rank} got {end!r}, which does not say what happened")
        if len(failed_steps) > 1:
            found.append(f"steps {failed_steps} failed; only one should have: {_shown(job, failed_steps[-1])}")
        if fault is not dead_until_healed:  # from a dead store nobody can learn anything
            found += unheard(job, volatile)
        found += violations(volatile.after_crash(FATES[0]), job.reported, {1, 2, 3}, 4)
        last = faulty.operations[number - 1 : number]
        yield number, [f"failed at {last}: {text}" for text in found]


@pytest.mark.usefixtures("one_stream")
@pytest.mark.parametrize("fault", [once_before, once_after, full_until_healed, dead_until_healed])
def test_when_any_operation_fails_every_rank_hears_why_and_the_same_job_saves_again(
    fault: Callable[[int, Callable[[], bool]], dict[str, Any]],
) -> None:
    runs = list(failed_everywhere(fault))
    found = [text for _, texts in runs for text in texts]
    assert not found, "\n".join(found[:20])
    assert len(runs) >= OPERATIONS_MIN


# --- longer ---------------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_orders_of_threads_are_killed_everywhere() -> None:
    """Which thread comes first differs from run to run, and with it what each operation finds."""
    for _ in range(int(os.environ.get("SOAK_ROUNDS", "20"))):
        for torn in (False, True):
            _, found = killed_everywhere(torn=torn)
            assert not found, "\n".join(found[:20])
            for rank in range(SIZE):
                _, found = killed_alone(rank, torn=torn)
                assert not found, "\n".join(found[:20])
        for fault in (once_before, once_after, full_until_healed, dead_until_healed):
            found = [text for _, texts in failed_everywhere(fault) for text in texts]
            assert not found, "\n".join(found[:20])
