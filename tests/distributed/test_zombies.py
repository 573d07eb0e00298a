"""A writer that was stopped while its job was started anew, and jobs that write at the same time: the later OPEN wins,
and whoever is fenced is told so and changes nothing.
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from caught import PATIENT, after, all_at_once, before, ending, say, strike, wait_for_test
from jobs import raw

import fastckpt
from fastckpt import AnotherWriter, Checkpointer, Options
from fastckpt import save as save_flow
from fastckpt.agreement import Agreements
from fastckpt.repository import history, verify
from fastckpt.repository.history import History
from fastckpt.repository.writer import ChunkWriter, Committer, PackStream
from fastckpt.storage.local import LocalStore, _LocalWriter

pytestmark = pytest.mark.distributed

OPTIONS = Options(chunk_bytes=4096, commit_seconds_max=PATIENT)
SEEDS = 20

PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "in the agreement": lambda happen: before(Agreements, "_on_hello", happen),
    "before it writes a chunk": lambda happen: before(PackStream, "write", happen),
    "before the fsync of a pack": lambda happen: before(_LocalWriter, "finish", happen),
    "before the part": lambda happen: before(save_flow, "write_part", happen),
    "before the index": lambda happen: before(Committer, "commit", happen),
    "before it reads the history": lambda happen: before(History, "append_commit", happen),
    "right before the decision is created": lambda happen: before(history, "_settle", happen),
    "after the decision": lambda happen: after(Committer, "commit", happen),
    "in cleaning": lambda happen: before(LocalStore, "delete", happen),
    "in the cleaning of its own attempt": lambda happen: before(ChunkWriter, "delete", happen),
}


HAD_ENDED = {"after the decision", "in cleaning", "in the cleaning of its own attempt"}
"""Where the save itself may have ended, well or not, before its writer was stopped."""


def state(step: int, job: int) -> dict[str, Any]:
    """No two jobs ever save the same content."""
    generator = torch.Generator().manual_seed(step * 100 + job)
    return {"x": torch.randn(64, 96, generator=generator), "job": job}


@dataclass(frozen=True)
class Stopped:
    phase: str
    size: int = 1
    successors: int = 1

    def __str__(self) -> str:
        return f"a job of {self.size} stopped {self.phase}, {self.successors} after it"


def dies_with_a_pack(url: str) -> None:
    """Leaves something to clean."""
    before(save_flow, "write_part", strike(signal.SIGKILL))
    with Checkpointer(url, options=OPTIONS) as ckpt:
        ckpt.save(1, state(1, 0)).wait(PATIENT)


def writes_on(url: str, phase: str) -> Any:
    with Checkpointer(url, options=OPTIONS) as ckpt:
        cleaning = phase == "in cleaning"
        if cleaning:
            PHASES[phase](strike(signal.SIGSTOP))
        ckpt.save(1, state(1, 1)).wait(PATIENT)
        if not cleaning:
            if phase == "in the cleaning of its own attempt":
                fail_once(_LocalWriter, "finish")
            if ranks.dist.get_rank() == 0:
                PHASES[phase](strike(signal.SIGSTOP))
        endings = [ending(lambda: ckpt.save(2, state(2, 1)).wait(PATIENT))]
        if cleaning:
            say("saved")
            wait_for_test("a later job has saved")
        endings += [ending(lambda step=step: ckpt.save(step, state(step, 1)).wait(PATIENT)) for step in (3, 4)]
        listed = [snapshot.attempt for snapshot in ckpt.snapshots()]
    return ranks.Last([end.error for end in endings] + [listed])


def fail_once(owner: Any, name: str) -> None:
    def fail() -> None:
        if not failed:
            failed.append(True)
            raise fastckpt.StorageError("this once")

    failed: list[bool] = []
    before(owner, name, fail)


def starts_anew(url: str, job: int) -> list[str]:
    """What a job does that a launcher has started again. Returns the attempts it has committed."""
    with Checkpointer(url, options=OPTIONS) as ckpt:
        target = state(0, 0)
        step = ckpt.restore(target)
        assert step is not None
        assert raw(target["x"]) == raw(state(step, target["job"])["x"])
        pendings = [ckpt.save(step + n, state(step + n, job)) for n in (1, 2)]
        ckpt.wait_staged()
    return [pending.snapshot.attempt for pending in pendings]


def stop_a_writer(directory: Path, case: Stopped) -> None:
    url = str(directory / "repository")
    assert ranks.outcomes(1, dies_with_a_pack, url) == [None]
    with ranks.started(case.size, writes_on, url, case.phase) as zombie:
        assert zombie.wait_stopped(0, PATIENT), "the writer never came to where it was to be stopped"
        for member in range(1, case.size):
            zombie.stop(member)
        committed: list[str] = []
        for successor in range(case.successors):
            (attempts,) = ranks.run(1, starts_anew, url, 2 + successor)
            committed += attempts
        before_it_goes_on = decisions(directory)
        for member in range(case.size):
            zombie.resume(member)
        zombie.store.set("test/a later job has saved", "")
        outcomes = zombie.outcomes()
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        *errors, listed = outcome
        first = errors.pop(0)
        assert case.phase in HAD_ENDED or isinstance(first, AnotherWriter), repr(first)
        assert [type(error) for error in errors] == [AnotherWriter] * 2, errors
        assert listed[-len(committed) :] == committed
    assert decisions(directory) == before_it_goes_on, "a fenced writer appended a decision"
    check(url, committed)


def decisions(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "repository" / "decisions").iterdir()}


def check(url: str, committed: list[str]) -> None:
    """The repository holds what was committed, all of it bit for bit; a next job works, and cleans."""
    repository = fastckpt.open(url)
    snapshots = repository.snapshots()
    assert [snapshot.attempt for snapshot in snapshots][-len(committed) :] == committed
    assert not verify.verify(repository, snapshots, lambda _: None)
    for snapshot in snapshots:
        job = snapshot.value("job")
        assert isinstance(job, int)
        assert snapshot.read("x").tobytes() == raw(state(snapshot.step, job)["x"])
    with Checkpointer(url, options=OPTIONS) as ckpt:
        ckpt.save(99, state(99, 9)).wait(PATIENT)
    kept = {snapshot.attempt for snapshot in repository.snapshots()}
    for folder in ("packs", "attempts"):
        assert set(repository.store.children(folder)) == kept, "what dead attempts left behind is still there"


def test_a_writer_that_was_stopped_past_its_restart_never_commits(tmp_path: Path) -> None:
    cases = [Stopped(phase) for phase in PHASES]
    cases += [Stopped(phase, size=2) for phase in PHASES if "clean" not in phase]
    all_at_once(cases, stop_a_writer, tmp_path)


# --- two jobs at the same time -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    seed: int
    jobs: int = 2
    saves: int = 12

    def __str__(self) -> str:
        return f"TEST_SEED={self.seed}: {self.jobs} jobs at the same time"


def saves_in_a_loop(url: str, job: int, case: Race, seconds_before: float) -> tuple[list[str], BaseException | None]:
    """Saves so many times, and as long as some job has not come to its first. The attempts it was told are committed,
    and what ended it."""
    time.sleep(seconds_before)  # so that it is not always the same job that comes second
    end = time.monotonic() + PATIENT
    told: list[str] = []
    error: BaseException | None = None
    with Checkpointer(url, options=OPTIONS) as ckpt:
        for step in itertools.count(1):
            try:
                pending = ckpt.save(step, state(step, job))
                pending.wait(PATIENT)
                told.append(pending.snapshot.attempt)
            except fastckpt.FastckptError as failure:
                error = failure
            here = Path(url).parent
            (here / f"came-{job}").touch()
            waiting = not all((here / f"came-{other}").exists() for other in range(case.jobs))
            if error is not None or (step >= case.saves and not waiting):
                return told, error
            assert time.monotonic() < end
    raise AssertionError("counting ended")


def race(directory: Path, case: Race) -> None:
    url = str(directory / "repository")
    chosen = random.Random(case.seed)
    running = [
        ranks.started(1, saves_in_a_loop, url, job, case, chosen.choice([0.0, 0.0, 0.05 * chosen.random()]))
        for job in range(case.jobs)
    ]
    entered = [job.__enter__() for job in running]
    try:
        results = [outcome for job in entered for outcome in job.outcomes()]
    finally:
        for job in running:
            job.__exit__(None, None, None)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    told = {attempt for attempts, _ in results for attempt in attempts}
    errors = [error for _, error in results if error is not None]
    assert [type(error) for error in errors] == [AnotherWriter] * (case.jobs - 1), errors
    listed = [snapshot.attempt for snapshot in fastckpt.open(url).snapshots()]
    assert set(listed) == told, "what jobs were told is not what is there"
    check(url, listed)


def test_of_two_jobs_on_one_repository_one_is_fenced_and_the_other_goes_on(tmp_path: Path) -> None:
    seed = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**32))
    cases = [Race(seed + number, jobs) for number, jobs in enumerate((2, 2, 2, 2, 3, 4))]
    all_at_once(cases, race, tmp_path)


@pytest.mark.soak
def test_any_number_of_stopped_writers_and_races_leaves_what_was_committed(tmp_path: Path) -> None:
    seed = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**32))
    print(f"TEST_SEED={seed}")
    for number in range(int(os.environ.get("SOAK_ROUNDS", "1"))):
        chosen = random.Random(seed + number)
        stopped = [Stopped(chosen.choice(sorted(PHASES)), successors=chosen.randint(1, 3)) for _ in range(SEEDS)]
        all_at_once(stopped, stop_a_writer, tmp_path / f"stopped-{number}")
        races = [Race(seed + number * SEEDS + k, chosen.randint(2, 4), chosen.randint(5, 30)) for k in range(SEEDS)]
        all_at_once(races, race, tmp_path / f"races-{number}")
