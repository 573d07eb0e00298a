"""What jobs do to a repository, as scenarios to be cut short or disturbed at any point; and what must hold afterwards.

One library for all that goes wrong: crash states in memory, SIGKILL and errors at system calls, power cuts, full disks.
No torch. A scenario is run against whatever ``Store`` its jobs open; ``violations`` is the oracle:

    reported committed => restores bit for bit;  partial => invisible;  the next save works;  its space comes back
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from fastckpt.errors import FastckptError, OutOfSpace
from fastckpt.format.decision import Live
from fastckpt.group import SoloGroup
from fastckpt.plan.restore_plan import Want
from fastckpt.plan.save_plan import KNOWN, LOWEST, OWN
from fastckpt.repository import repository
from fastckpt.repository.reader import ArraySink, Snapshot
from fastckpt.repository.verify import verify
from fastckpt.restore import Restores
from fastckpt.storage.store import Store
from fastckpt.testing.faulty_store import FaultyStore, Killed
from tests.crash.numpy_job import (
    GENERATION,
    Job,
    RankSaves,
    State,
    Tensor,
    leftovers,
    repository_violations,
    save_alone,
    saved_as,
    share,
    stored_tensors,
)

SPEC: Mapping[str, Tensor] = {
    "w": Tensor("float32", (64, 32), KNOWN, split=0),
    "b": Tensor("float32", (8,), KNOWN),
    "mean": Tensor("float64", (4,), LOWEST),
    "own": Tensor("uint8", (100,), OWN),
}
"""Two grid chunks on one rank, bundles, and a tensor of each rank's own; any of 1, 2 or 4 ranks can hold it."""


class Run:
    """One run of a scenario: its jobs, and what they were told.

    What is saved has a number (``GENERATION``). An error of ours ends the act, not the run: a training job goes on.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        report: Callable[[int], None] = lambda number: None,
        is_killed: Callable[[], bool] = lambda: False,
    ) -> None:
        """``open_store`` is called for every rank of every job. ``report`` hears of each number that is committed, as
        soon as the job does. ``is_killed``: as for ``Job``."""
        self._open_store = open_store
        self._report = report
        self._is_killed = is_killed
        self.told: set[int] = set()
        """What was reported committed."""
        self.failures: list[FastckptError] = []
        self.wrong: list[str] = []
        """What no fault excuses."""

    def job(self) -> RankSaves:
        """A new job of one rank."""
        return RankSaves(self._open_store(), SoloGroup())

    def save(self, job: RankSaves, number: int) -> bool:
        """Whether it was committed."""
        saved = self._attempt(f"saving {number}", lambda: job.save(number, State(number, 0, 1, SPEC), self._tell))
        return saved is not None

    def save_together(self, size: int, *numbers: int) -> None:
        """A new job of ``size`` ranks on two nodes."""
        stores = [self._open_store() for _ in range(size)]
        job = Job(stores, spec=SPEC, is_killed=self._is_killed, on_committed=self._tell)
        job.run(numbers)
        for outcome in job.outcomes:
            for number, ended in outcome.items():
                if isinstance(ended, Killed):
                    raise ended
                if isinstance(ended, FastckptError):
                    self.failures.append(ended)
                elif not isinstance(ended, Live):
                    self.wrong.append(f"saving {number} raised {type(ended).__name__}: {ended}")

    def restore(self, size: int = 1, step: int | None = None) -> None:
        """A job of ``size`` ranks restores the newest snapshot, or that of ``step``; each rank its share."""

        def restored() -> None:
            store = self._open_store()
            snapshot = Restores(store, SoloGroup(), 10.0).choose(step, [])
            if snapshot is not None:
                for rank in range(size):
                    self._restore_share(snapshot, rank, size)

        self._attempt(f"restoring on {size} ranks", restored)

    def _restore_share(self, snapshot: Snapshot, rank: int, size: int) -> None:
        number, saved_size = saved_as(snapshot, 1)
        layout, expected = snapshot.layout, stored_tensors(SPEC, number, saved_size)
        wants, sinks, shares = [], [], []
        for at, key in enumerate(snapshot.keys()):
            box = share(SPEC[key.partition("@")[0]], rank, size)
            array = np.zeros(box.sizes, expected[key].dtype)
            wants.append(Want(at, box, len(sinks)))
            sinks.append(ArraySink(box, array.view(np.uint8).reshape(*box.sizes, -1)))
            shares.append((key, array, expected[key][box.slices()]))
        assert len(layout.keys) == len(shares)
        snapshot.read_into(wants, sinks)
        for key, array, right in shares:
            if array.tobytes() != right.tobytes():
                self.wrong.append(f"restoring {number} on {size} ranks gave rank {rank} other bytes of {key}")

    def interrupted(self, number: int) -> None:
        """A job that dies when all of its save is done but the decision."""

        def decides(operation: str, name: str) -> bool:
            return operation == "create" and name.startswith("decisions/")

        dying = FaultyStore(self._open_store(), kill_at=2, only=decides)  # the first is its OPEN
        try:
            RankSaves(dying, SoloGroup()).save(number, State(number, 0, 1, SPEC))
        except Killed:
            if self._is_killed():
                raise
            return
        except FastckptError as error:
            self.failures.append(error)
            return
        self.wrong.append(f"saving {number} went on after the job's death")

    def job_on(self, disk: Disk) -> RankSaves:
        """A new job of one rank whose storage has only so much room."""
        full = OutOfSpace("injected: no space left")
        return RankSaves(
            FaultyStore(self._open_store(), fail_at=1, error=full, persistent=True, only=disk.is_full_for), SoloGroup()
        )

    def opened_only(self) -> None:
        """A job that dies right after its OPEN."""
        dying = FaultyStore(self._open_store(), kill_at=1, only=lambda operation, name: name.startswith("packs/"))
        try:
            RankSaves(dying, SoloGroup()).save(1, State(1, 0, 1, SPEC))
        except Killed:
            if self._is_killed():
                raise
        except FastckptError as error:
            self.failures.append(error)

    def _tell(self, number: int) -> None:
        self.told.add(number)
        self._report(number)

    def _attempt(self, what: str, act: Callable[[], object]) -> object:
        try:
            return act() or True
        except FastckptError as error:
            self.failures.append(error)
        except Exception as error:
            self.wrong.append(f"{what} raised {type(error).__name__}: {error}")
        return None


class Disk:
    """Full from when an object below ``full_from`` is to be created; until something is deleted, if that ``frees``."""

    def __init__(self) -> None:
        self.full_from: str | None = None
        self.frees = True
        self._is_full = False

    def is_full_for(self, operation: str, name: str) -> bool:
        if self.full_from is None or (operation == "delete" and self.frees):
            self.full_from, self._is_full = None, False
        elif operation == "create" and name.startswith(self.full_from):
            self._is_full = True
        return self._is_full and operation in ("create", "write", "append", "finish")


class Scenario(NamedTuple):
    name: str
    before: Callable[[Run], None]
    """Undisturbed: what the jobs in question find."""
    acts: Callable[[Run], None]
    """To be disturbed."""
    numbers: frozenset[int]
    """All that ``acts`` may try to save."""


def nothing(run: Run) -> None:
    pass


def one_saved(run: Run) -> None:
    run.save(run.job(), 1)


def first_save(run: Run) -> None:
    run.save(run.job(), 1)


def second_save(run: Run) -> None:
    job = run.job()
    run.save(job, 1)
    run.restore()
    run.save(job, 2)


def left_half_done(run: Run) -> None:
    one_saved(run)
    run.interrupted(2)


def take_over(run: Run) -> None:
    """A new job finds what a dead one left, trains the same steps again, and goes on."""
    run.restore()
    job = run.job()
    run.save(job, GENERATION + 2)
    run.save(job, 3)


def three_saved(run: Run) -> None:
    job = run.job()
    for number in (1, 2, 3):
        run.save(job, number)


def roll_back(run: Run) -> None:
    """Goes back to step 1 and saves steps 2 and 3 anew."""
    run.restore(step=1)
    job = run.job()
    run.save(job, GENERATION + 2)
    run.restore(step=2)
    run.save(job, GENERATION + 3)


def four_ranks_saved(run: Run) -> None:
    run.save_together(4, 1)


def other_world_sizes(run: Run) -> None:
    run.restore(size=2)
    run.save_together(2, 2)
    run.restore(size=1)
    run.save(run.job(), 3)
    run.restore(size=4)


def interrupted_open(run: Run) -> None:
    """Jobs that die as soon as they have opened the repository, and one that does not."""
    run.opened_only()
    run.opened_only()
    run.save(run.job(), 2)


def two_writers(run: Run) -> None:
    """A job that does not know that it has been replaced."""
    old, new = run.job(), run.job()
    opened = run.save(old, 2)  # else it opens the repository later than the other one
    taken_over = run.save(new, 3)
    if run.save(old, 4) and opened and taken_over:
        run.wrong.append("a job committed after a later one had opened the repository")
    run.save(new, 5)


def given_up(run: Run) -> None:
    """Two saves for which there is no room: the first makes room by going, the second finds none even for its ABORT."""
    disk = Disk()
    job = run.job_on(disk)
    disk.full_from = "attempts/"
    run.save(job, 2)
    disk.full_from, disk.frees = "decisions/", False
    run.save(job, 3)
    disk.full_from = None
    run.save(job, 4)


SCENARIOS = [
    Scenario("first save", nothing, first_save, frozenset({1})),
    Scenario("second save", nothing, second_save, frozenset({1, 2})),
    Scenario("take over", left_half_done, take_over, frozenset({GENERATION + 2, 3})),
    Scenario("roll back", three_saved, roll_back, frozenset({GENERATION + 2, GENERATION + 3})),
    Scenario("other world sizes", four_ranks_saved, other_world_sizes, frozenset({2, 3})),
    Scenario("interrupted open", one_saved, interrupted_open, frozenset({2})),
    Scenario("two writers", one_saved, two_writers, frozenset({2, 3, 4, 5})),
]


def prepared(scenario: Scenario, open_store: Callable[[], Store]) -> set[int]:
    """Makes what the scenario's jobs find; returns what was committed of it."""
    run = Run(open_store)
    scenario.before(run)
    assert not run.wrong, run.wrong
    assert not run.failures, run.failures
    return run.told


def violations(store: Store, reported: set[int], possible: set[int], next_number: int = 9) -> list[str]:
    """What is wrong with what a run left in ``store``: ``reported`` are all numbers that were reported committed, also
    before it, ``possible`` those that may be there. Saves once more."""
    found, listed = repository_violations(store, reported, possible, 1, SPEC)
    try:
        save_alone(store, next_number, SPEC)
    except Exception as error:
        return [*found, f"the next job's save fails: {type(error).__name__}: {error}"]
    after, _ = repository_violations(store, listed | {next_number}, listed | {next_number}, 1, SPEC)
    found += [f"after the next save: {text}" for text in after]
    if not after:
        opened = repository.Repository(store)
        found += [f"the next job left {name}" for name in leftovers(store)]
        found += [f"verify says {damage}" for damage in verify(opened, opened.snapshots(), lambda progress: None)]
    return found
