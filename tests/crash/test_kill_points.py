"""One rank of a job dies before every single store operation; or a whole job is paused there; or the operation fails.

The others hear of it. Afterwards everything that was reported committed restores bit for bit, nothing else is visible
unless it is whole, and the next job saves without help and takes away what was left. What a job leaves all of whose
ranks die is in test_crash_states.py.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest

from fastckpt.errors import AnotherWriter, CommitTimeout, FastckptError, OutOfSpace, StorageError
from fastckpt.format.decision import Live
from fastckpt.options import Options
from fastckpt.repository import repository
from fastckpt.repository.verify import verify
from fastckpt.storage.store import Store
from fastckpt.testing.faulty_store import FaultyStore, Killed
from fastckpt.testing.thread_group import MemoryKeyValue
from tests.crash.numpy_job import (
    CHUNK_BYTES,
    Job,
    full_spec,
    leftovers,
    repository_violations,
)
from tests.crash.volatile_store import FateKind, VolatileStore

SIZE = 4
SPEC = full_spec(SIZE)
OPERATIONS_MIN = 90
"""A pair of saves has more; fewer would mean that the enumeration stopped early."""
FATES: tuple[tuple[FateKind, Literal["gone", "back"]], ...] = (("gone", "gone"), ("empty", "back"), ("torn", "gone"))
"""What became of everything unfinished, and of everything deleted."""


@pytest.fixture
def one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one writing thread a rank, the number of each rank's operations is the same in every run, and so none is
    passed over because it had another number when its turn came. Each chunk is written by itself: there are more
    operations to disturb."""
    monkeypatch.setattr("fastckpt.save.STREAMS", 1)
    monkeypatch.setattr("fastckpt.repository.pull.BATCH_BYTES", 1)


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


def _is_death(error: BaseException) -> bool:
    return isinstance(error, Killed)


def _tail(faulty: FaultyStore) -> str:
    return "\n  ".join(f"{number} {operation} {name}" for number, operation, name in faulty.operations[-8:])


# --- one rank dies ----------------------------------------------------------------------------------------------


def killed_alone(rank: int, *, torn: bool) -> tuple[int, list[str]]:
    """Like ``killed_everywhere``, but only one rank dies, at each of its own operations, and the others go on."""
    found: list[str] = []
    for number in itertools.count(1):
        volatile = VolatileStore()
        faulty = FaultyStore(volatile, kill_at=number, torn=torn)
        job = Job([faulty if r == rank else volatile for r in range(SIZE)]).run([1, 2])
        seen = alone_violations(job, rank, faulty.killed) + unheard(job, volatile, except_for=rank)
        for fate in FATES:
            seen += violations(volatile.after_crash(*fate), job.reported, {1, 2}, 3)
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
            volatile.after_crash(*FATES[0]), job.reported, {1}, 2
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
        found += violations(volatile.after_crash(*FATES[0]), job.reported | {3}, {1, 2, 3}, 4)
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
        found += violations(volatile.after_crash(*FATES[0]), job.reported, {1, 2, 3}, 4)
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
def test_many_orders_of_threads_are_disturbed_everywhere() -> None:
    """Which thread comes first differs from run to run, and with it what each operation finds."""
    for _ in range(int(os.environ.get("SOAK_ROUNDS", "20"))):
        for torn in (False, True):
            for rank in range(SIZE):
                _, found = killed_alone(rank, torn=torn)
                assert not found, "\n".join(found[:20])
        for fault in (once_before, once_after, full_until_healed, dead_until_healed):
            found = [text for _, texts in failed_everywhere(fault) for text in texts]
            assert not found, "\n".join(found[:20])
