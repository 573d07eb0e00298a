"""One rank is killed, stops, or its storage does not answer, somewhere in a save or a restore: every other rank's call
ends in time and names it, nothing leaks, nothing half done is seen, and who can go on does.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from blocking_mount import Mount, blocking_mount, need_fuse
from caught import PATIENT, Ending, after, after_posting, all_at_once, before, ending, say, strike, wait_for_test
from jobs import rank, raw

import fastckpt
from fastckpt import Checkpointer, CommitTimeout, FastckptError, Options, Shard, StorageError
from fastckpt import checkpointer as front
from fastckpt import save as save_flow
from fastckpt.job import group as job_groups
from fastckpt.job.staging import Staging
from fastckpt.repository import verify
from fastckpt.repository.chunk_reader import ChunkReader
from fastckpt.repository.history import History
from fastckpt.repository.repository import Repository
from fastckpt.repository.writer import Committer, PackStream
from fastckpt.request import Request

pytestmark = pytest.mark.distributed

DEADLINE = 2.0
BOUND = DEADLINE + 5.0
"""By when a call must have ended whose deadline is DEADLINE, whatever happens."""
AT_ONCE = 10.0
"""Far less than PATIENT, for which others would wait for a rank that says nothing."""
OPTIONS = Options(chunk_bytes=4096, commit_seconds_max=PATIENT)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
ROWS = 32
COLUMNS = 96


@dataclass(frozen=True)
class Case:
    """One rank lost, once."""

    phase: str
    lost: int
    size: int
    fate: str
    """"kill", "stop", or the call that the storage does not answer any more."""
    nodes: int = 1

    def __str__(self) -> str:
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.fate} rank {self.lost} of {self.size}{nodes}, {self.phase}"


def full(step: int, size: int) -> torch.Tensor:
    return torch.randn(size * ROWS, COLUMNS, generator=torch.Generator().manual_seed(step))


def state(step: int, *, more: bool = False) -> dict[str, Any]:
    """Of each rank some rows, and a copy of the first row. ``more`` changes the layout."""
    size = dist.get_world_size()
    whole = full(step, size)
    mine = whole[rank() * ROWS : (rank() + 1) * ROWS].clone()
    made = {"x": Shard(mine, (rank() * ROWS, 0), (size * ROWS, COLUMNS)), "same": whole[0].clone(), "step": step}
    return made | ({"more": torch.ones(2)} if more else {})


def bytes_of(made: dict[str, Any]) -> bytes:
    return raw(made["x"].tensor) + raw(made["same"])


def wait_no_longer_than(ckpt: Checkpointer, seconds: float) -> None:
    """As if ``commit_seconds_max`` were that: short for the call that is to fail, long for those that are not."""
    wait_for_others_no_longer_than(ckpt, seconds)
    ckpt._store._seconds_max = seconds * front.STORAGE_SECONDS_SHARE


def wait_for_others_no_longer_than(ckpt: Checkpointer, seconds: float) -> None:
    ckpt._saves._options = ckpt._saves._agreements._options = dataclasses.replace(OPTIONS, commit_seconds_max=seconds)
    ckpt._restores._seconds_max = seconds


class Census:
    """What this process has of threads, descriptors and staging memory: to be the same in the end."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(FileNotFoundError):  # a process that has just ended
            self.before = self._count()

    @staticmethod
    def _count() -> collections.Counter[str]:
        found = collections.Counter(t.name for t in threading.enumerate() if t.name.startswith("fastckpt"))
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # the listing's own
                found[os.readlink(f"/proc/self/fd/{descriptor}").split(":")[0]] += 1
        with open("/proc/self/maps") as maps:
            found["staging"] = sum("fastckpt-staging" in line for line in maps)
        return found

    def leaked(self) -> collections.Counter[str]:
        """What there is more of than before; threads that nobody needs are given time to end."""
        end = time.monotonic() + PATIENT
        while True:
            gc.collect()
            more = self._count() - self.before
            if not more or time.monotonic() > end:
                return more
            time.sleep(0.05)


# --- where a rank is caught ----------------------------------------------------------------------------------------


SAVE_PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "before it calls save": lambda happen: before(Checkpointer, "save", happen),
    "after its hello": lambda happen: after_posting("save-2/hello", happen),
    "after its offer": lambda happen: after_posting("save-2/offers", happen),
    "before staging": lambda happen: before(Staging, "source", happen),
    "before it writes a chunk": lambda happen: before(PackStream, "write", happen),
    "before it finishes a pack": lambda happen: before(PackStream, "close", happen),
    "with its packs written": lambda happen: before(save_flow.Saves, "_written", happen),
    "after it said so": lambda happen: after_posting("save-2/commit", happen),
}
LEADER_PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "before the part": lambda happen: before(save_flow, "write_part", happen),
}
COORDINATOR_PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "before the index": lambda happen: before(Committer, "commit", happen),
    "before the decision": lambda happen: before(History, "append_commit", happen),
    "after the decision": lambda happen: after(Committer, "commit", happen),
}
RESTORE_PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "before it calls restore": lambda happen: before(Checkpointer, "restore", happen),
    "after its word on the choice": lambda happen: after_posting("restore-1/choose", happen),
    "before it plans": lambda happen: before(Request, "targets", happen),
    "after its word on the plan": lambda happen: after_posting("restore-1/plan", happen),
    "before it reads": lambda happen: before(ChunkReader, "_fetch", happen),
    "with a chunk in place": lambda happen: after(ChunkReader, "_deliver", happen),
    "with all in place": lambda happen: after(Checkpointer, "_read", happen),
    "after its word on the reading": lambda happen: after_posting("restore-1/read", happen),
}
CHOOSING: dict[str, Callable[[Callable[[], None]], None]] = {
    "before it chooses": lambda happen: before(Repository, "choose", happen),
}
ALL_PHASES = SAVE_PHASES | LEADER_PHASES | COORDINATOR_PHASES | CHOOSING | RESTORE_PHASES
DOES_THE_REST = {"before the part", "before the index"}
"""All packs are there: a coordinator that goes on may well commit them, whatever others have been told by then."""
MAY_SUCCEED = {"after it said so", "before the decision", "after the decision", "after its word on the reading"}
"""Nothing more is needed from the lost rank, or it may have done the rest before others look."""


def make_nodes(case: Case) -> None:
    node = rank() * case.nodes // case.size
    job_groups._node = lambda: f"node {node}"


# --- a rank lost in a save -----------------------------------------------------------------------------------------


@dataclass
class Report:
    """What a rank saw."""

    rank: int
    second: Ending
    """Of the call in which a rank was lost."""
    untouched: bool
    """Whether what was being saved still has the bytes it had."""
    next: Ending | None = None
    """Of the call after that."""
    leaked: collections.Counter[str] = field(default_factory=collections.Counter)


def loses_a_rank_in_a_save(url: str, case: Case) -> Any:
    make_nodes(case)
    census = Census()
    report = saves_three_times(url, case)
    report.leaked = census.leaked()
    return ranks.Last(report)


def saves_three_times(url: str, case: Case) -> Report:
    with Checkpointer(url, options=OPTIONS) as ckpt:
        ckpt.save(1, state(1)).wait(PATIENT)
        saved = state(2, more="offer" in case.phase)
        bytes_before = bytes_of(saved)
        wait_no_longer_than(ckpt, DEADLINE)
        if rank() == case.lost:
            ALL_PHASES[case.phase](strike(SIGNALS[case.fate]))
        dist.barrier()
        report = Report(rank(), ending(lambda: ckpt.save(2, saved).wait(BOUND * 2)), bytes_of(saved) == bytes_before)
        say("ended")
        if case.fate == "stop":
            wait_for_test("went on")
            wait_no_longer_than(ckpt, PATIENT)
            report.next = ending(lambda: ckpt.save(3, state(3)).wait(PATIENT))
        return report


def lose_a_rank_in_a_save(directory: Path, case: Case) -> None:
    url = str(directory / "repository")
    others = [member for member in range(case.size) if member != case.lost]
    with ranks.started(case.size, loses_a_rank_in_a_save, url, case) as job:
        reports = follow(job, case, others)
        check_keys(job, case)
    steps = check_repository(url, case.size)
    for report in reports:
        check_ending(report, case, reports)
        assert report.untouched, "a tensor changed"
        assert not report.leaked, report.leaked
    if any(report.second.error is None for report in reports):
        assert 2 in steps, "reported as committed, but not there"
    if case.phase not in MAY_SUCCEED and not (case.fate == "stop" and case.phase in DOES_THE_REST):
        assert 2 not in steps, "committed without one rank's share"
    if case.fate == "stop":
        assert [report.next.error for report in reports if report.next] == [None] * case.size
        assert 3 in steps


def follow(job: ranks.Job, case: Case, others: Sequence[int]) -> list[Any]:
    """Sees a job to its end, with a rank that was stopped going on once all others' calls have ended."""
    caught = True
    if case.fate == "stop":
        caught = job.wait_stopped(case.lost, PATIENT)
        ended = caught and job.wait_keys([f"said/ended/{member}" for member in others], PATIENT)
        if caught:
            job.resume(case.lost)
        if ended:
            job.store.set("test/went on", "")
    outcomes = job.outcomes()
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    if case.fate == "kill":
        caught = outcomes[case.lost] is None
    assert caught, "the rank never came to where it was to be caught"
    return [outcome for outcome in outcomes if outcome is not None]


def check_ending(report: Report, case: Case, reports: Sequence[Report]) -> None:
    end = report.second
    assert not isinstance(end.error, TimeoutError), f"rank {report.rank} waits still after {end.seconds:.1f} s"
    if report.rank == case.lost:  # it was stopped for longer
        return
    lag = sum(other.second.lag for other in reports if other.rank != case.lost)
    assert end.seconds <= BOUND + lag, f"rank {report.rank} waited {end.seconds:.1f} s: {end.error!r}"
    if end.error is None:
        assert case.phase in MAY_SUCCEED, f"rank {report.rank} was told that all is well"
    else:
        assert case.lost in end.names, f"rank {report.rank} does not name rank {case.lost}: {end.error!r}"


def check_keys(job: ranks.Job, case: Case) -> None:
    """What is left of exchanges in the job's key-value store: nothing, but what a dead rank would have taken away."""
    left = [key for key in job.store.list_keys() if "/save-" in key or "/restore-" in key or "/nodes/" in key]
    if case.fate == "kill":
        left = [key for key in left if not key.endswith(f"/{case.lost}")]
    assert not left, left


def check_repository(url: str, size: int) -> list[int]:
    """In a fresh job, of another size: all that is listed is whole, the next save works, and what is left of attempts
    that were never committed goes. Returns the steps that were there."""
    repository = fastckpt.open(url)
    snapshots = repository.snapshots()
    assert not verify.verify(repository, snapshots, lambda _: None)
    with Checkpointer(url, options=Options(chunk_bytes=4096)) as ckpt:
        for snapshot in snapshots:
            made = {"x": torch.zeros(size * ROWS, COLUMNS), "same": torch.zeros(COLUMNS), "step": 0}
            more = {"more": torch.zeros(2)} if "more" in snapshot.keys() else {}  # noqa: SIM118 - a method
            assert ckpt.restore(made | more, step=snapshot.step) == snapshot.step
            whole = full(snapshot.step, size)
            assert raw(made["x"]) == raw(whole)  # type: ignore[arg-type]
            assert raw(made["same"]) == raw(whole[0])  # type: ignore[arg-type]
        ckpt.save(9, {"x": torch.ones(3)}).wait(PATIENT)
    kept = {snapshot.attempt for snapshot in repository.snapshots()}
    for folder in ("packs", "attempts"):
        assert set(repository.store.children(folder)) == kept, "what dead attempts left behind is still there"
    return [snapshot.step for snapshot in snapshots]


@pytest.mark.parametrize("fate", ["kill", "stop"])
def test_a_save_without_one_rank_ends_in_time_on_all_others_and_names_it(tmp_path: Path, fate: str) -> None:
    cases = [Case(phase, size - 1, size, fate) for size in (2, 4) for phase in SAVE_PHASES]
    cases += [Case(phase, 2, 4, fate, nodes=2) for phase in LEADER_PHASES | SAVE_PHASES]
    phases = SAVE_PHASES | LEADER_PHASES | COORDINATOR_PHASES
    cases += [Case(phase, 0, size, fate) for size in (2, 4) for phase in phases]
    all_at_once(cases, lose_a_rank_in_a_save, tmp_path)


# --- a rank lost in a restore --------------------------------------------------------------------------------------


def loses_a_rank_in_a_restore(url: str, case: Case) -> Any:
    census = Census()
    report, target, bytes_then = restores_twice(url, case)
    report.leaked = census.leaked()
    report.untouched = bytes_of(target) == bytes_then
    return ranks.Last(report)


def restores_twice(url: str, case: Case) -> tuple[Report, dict[str, Any], bytes]:
    target = state(0)
    right = bytes_of(state(6))
    with Checkpointer(url, options=OPTIONS) as ckpt:
        wait_no_longer_than(ckpt, DEADLINE)
        if rank() == case.lost:
            ALL_PHASES[case.phase](strike(SIGNALS[case.fate]))
        dist.barrier()
        report = Report(rank(), ending(lambda: ckpt.restore(target)), True)
        bytes_then = bytes_of(target)
        assert report.second.error is not None or bytes_then == right
        say("ended")
        if case.fate == "stop":
            wait_for_test("went on")
            wait_no_longer_than(ckpt, PATIENT)
            assert bytes_of(target) == bytes_then, "a tensor changed after restore had raised"
            report.next = ending(lambda: ckpt.restore(target))
            bytes_then = bytes_of(target)
            assert bytes_then == right
            ckpt.save(7, state(7)).wait(PATIENT)
    return report, target, bytes_then


def two_snapshots(url: str, size: int) -> None:
    with Checkpointer(url, options=Options(chunk_bytes=4096)) as ckpt:
        for step in (5, 6):
            whole = full(step, size)
            ckpt.save(step, {"x": whole, "same": whole[0].clone(), "step": step}).wait(PATIENT)


def lose_a_rank_in_a_restore(directory: Path, case: Case) -> None:
    url = str(directory / "repository")
    two_snapshots(url, case.size)
    others = [member for member in range(case.size) if member != case.lost]
    with ranks.started(case.size, loses_a_rank_in_a_restore, url, case) as job:
        reports = follow(job, case, others)
        check_keys(job, case)
    for report in reports:
        check_ending(report, case, reports)
        assert report.untouched, "a tensor changed after restore had raised"
        assert not report.leaked, report.leaked
    if case.fate == "stop":
        assert [report.next.error for report in reports if report.next] == [None] * case.size
    assert check_repository(url, case.size) == ([5, 6, 7] if case.fate == "stop" else [5, 6])


@pytest.mark.parametrize("fate", ["kill", "stop"])
def test_a_restore_without_one_rank_ends_in_time_on_all_others_and_names_it(tmp_path: Path, fate: str) -> None:
    cases = [Case(phase, size - 1, size, fate) for size in (2, 4) for phase in RESTORE_PHASES]
    cases += [Case(phase, 0, size, fate) for size in (2, 4) for phase in CHOOSING | RESTORE_PHASES]
    all_at_once(cases, lose_a_rank_in_a_restore, tmp_path)


# --- storage that does not answer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dead:
    """The storage of some ranks answers nothing any more, from some call on."""

    verb: str
    """"save", "first save" or "restore"."""
    dies_at: str
    ranks: tuple[int, ...]
    size: int
    closes: bool = False
    """While the storage is dead still, rather than when it is back."""

    def __str__(self) -> str:
        return f"{self.verb} by {self.size}, storage of {self.ranks} dies at {self.dies_at!r}, closes={self.closes}"


@dataclass
class DeadReport:
    rank: int
    first: Ending
    again: Ending
    listed: Ending
    closed: Ending
    untouched: bool
    last: Ending | None = None
    leaked: collections.Counter[str] = field(default_factory=collections.Counter)


def meets_dead_storage(alive: str, mounted: str, case: Dead) -> Any:
    census = Census()
    report, bytes_then, target = lives_with_dead_storage(mounted if rank() in case.ranks else alive, case)
    report.leaked = census.leaked()
    report.untouched = bytes_of(target) == bytes_then
    return ranks.Last(report)


def lives_with_dead_storage(url: str, case: Dead) -> tuple[DeadReport, bytes, dict[str, Any]]:
    ckpt = Checkpointer(url, options=OPTIONS)
    if case.verb == "save":
        ckpt.save(1, state(1)).wait(PATIENT)
    wait_no_longer_than(ckpt, DEADLINE)
    target = state(2)

    def call() -> None:
        if case.verb == "restore":
            ckpt.restore(target)
        else:
            ckpt.save(2, target).wait(BOUND * 2)

    dist.barrier()
    first = ending(call)
    bytes_then = bytes_of(target)
    wait_for_others_no_longer_than(ckpt, PATIENT)
    dist.barrier()
    again = ending(call)
    listed = ending(ckpt.snapshots)
    closed = ending(ckpt.close) if case.closes else Ending(None, 0.0, 0.0, set())
    report = DeadReport(rank(), first, again, listed, closed, True)
    say("ended")
    wait_for_test("went on")
    end = time.monotonic() + PATIENT
    while ckpt._store.busy and time.monotonic() < end:
        time.sleep(0.01)
    if not case.closes:
        assert bytes_of(target) == bytes_then, "a tensor changed"
        wait_no_longer_than(ckpt, PATIENT)
        dist.barrier()
        report.last = ending(call)
        if case.verb == "restore":
            bytes_then = bytes_of(target)
            assert bytes_then == bytes_of(state(6))
        ckpt.close(PATIENT)
    return report, bytes_then, target


def lose_storage(directory: Path, case: Dead) -> None:
    backing, point = directory / "backing", directory / "mount"
    if case.verb == "restore":
        two_snapshots(str(backing / "repository"), case.size)
    url, mounted = str(backing / "repository"), str(point / "repository")
    with (
        blocking_mount(backing, point, case.dies_at) as mount,
        ranks.started(case.size, meets_dead_storage, url, mounted, case) as job,
        released(mount),
    ):
        ended = job.wait_keys([f"said/ended/{member}" for member in range(case.size)], PATIENT)
        assert mount.wait_dead(0), f"no call was {case.dies_at!r}"
        if ended:
            mount.release()
            job.store.set("test/went on", "")
        reports = job.outcomes()
    for report in reports:
        if isinstance(report, BaseException):
            raise report
    for report in reports:
        check_dead(report, case, reports)
    steps = check_repository(url, case.size)
    if case.verb == "restore":
        assert steps == [5, 6]
    else:  # a decision that was on its way may have been carried out when the storage answered again
        expected = {1, 2} if case.verb == "save" else {2}
        assert set(steps) == expected - ({2} if case.closes else set())


@contextlib.contextmanager
def released(mount: Mount) -> Iterator[None]:
    """Lets go of who is stuck in the mount before anybody waits for their end."""
    try:
        yield
    finally:
        mount.release()


def check_dead(report: DeadReport, case: Dead, reports: Sequence[DeadReport]) -> None:
    lag = sum(other.first.lag + other.again.lag + other.closed.lag for other in reports)
    who = f"rank {report.rank}"
    assert report.first.error is not None, f"{who} was told that all is well"
    assert isinstance(report.first.error, FastckptError), f"{who}: {report.first.error!r}"
    assert report.first.seconds <= BOUND + lag, f"{who} waited {report.first.seconds:.1f} s: {report.first.error!r}"
    assert isinstance(report.again.error, FastckptError), f"{who}: {report.again.error!r}"
    assert report.again.seconds <= AT_ONCE + lag, f"{who} waited {report.again.seconds:.1f} s: {report.again.error!r}"
    assert report.closed.seconds <= BOUND + lag, f"{who} closed in {report.closed.seconds:.1f} s"
    text = str(report.first.error)
    if report.rank in case.ranks:
        assert "the storage has not answered for" in text, f"{who}: {text}"
        assert "/mount/repository" in text
        assert isinstance(report.listed.error, StorageError)
        assert report.listed.seconds <= BOUND + lag
    else:
        named_in_text = [dead for dead in case.ranks if f"rank {dead}" in text]
        assert named_in_text or report.first.names & set(case.ranks) or "/mount/repository" in text, f"{who}: {text}"
    if case.verb == "save" and case.dies_at.startswith("link"):
        assert "Whether step 2 is or will be committed is not known" in text, f"{who}: {text}"
    assert report.untouched, "a tensor changed"
    assert report.last is None or report.last.error is None, f"{who}: {report.last}"
    assert not report.leaked, report.leaked


@pytest.mark.root
def test_storage_that_does_not_answer_ends_a_save_in_time_and_the_next_one_works_when_it_does(
    tmp_path: Path, need_root: None
) -> None:
    need_fuse()
    second = "[^/]*-0*2"
    own = {
        "new pack": f"create /repository/packs/{second}/",
        "write": f"write /repository/packs/{second}/",
        "fsync": f"fsync /repository/packs/{second}/",
        "fsync of a directory": f"fsyncdir /repository/packs/{second}/",
    }
    coordinator = {
        "part": f"create /repository/attempts/{second}/",
        "decision": "link /repository/decisions/.*3$",
    }
    cases = [Dead("save", at, (size - 1,), size) for size in (2, 4) for at in own.values()]
    cases += [Dead("save", at, (0,), 2) for at in (own | coordinator).values()]
    cases += [Dead("save", at, (0, 1), 2) for at in (own["write"], own["fsync"], *coordinator.values())]
    cases += [Dead("save", own["write"], dead, 4, closes=True) for dead in ((2,), (0,), (0, 1, 2, 3))]
    cases += [Dead("first save", r"create /repository/\.FORMAT", dead, 2) for dead in ((0,), (0, 1))]
    cases += [Dead("first save", "open /repository/FORMAT", (1,), 2)]
    cases += [Dead("first save", r"link /repository/decisions/.*1$", (0,), 2)]
    all_at_once(cases, lose_storage, tmp_path)


@pytest.mark.root
def test_storage_that_does_not_answer_ends_a_restore_in_time_and_the_next_one_works_when_it_does(
    tmp_path: Path, need_root: None
) -> None:
    need_fuse()
    chooses = ["readdir /repository/decisions", "open /repository/decisions/"]
    reads = ["open /repository/attempts/.*part", "open /repository/packs/", "read /repository/packs/"]
    cases = [Dead("restore", at, (size - 1,), size) for size in (2, 4) for at in reads]
    cases += [Dead("restore", at, dead, 2) for dead in ((0,), (0, 1)) for at in (*chooses, *reads)]
    cases += [Dead("restore", reads[-1], (1,), 2, closes=True)]
    all_at_once(cases, lose_storage, tmp_path)


def opens_on_dead_storage(alive: str, mounted: str) -> Any:
    options = Options(commit_seconds_max=DEADLINE)
    url = mounted if rank() == 1 else alive
    first = ending(lambda: Checkpointer(url, options=options))
    say("ended")
    wait_for_test("went on")
    with Checkpointer(url, options=OPTIONS) as ckpt:
        ckpt.save(1, state(1)).wait(PATIENT)
    return ranks.Last(first)


@pytest.mark.root
@pytest.mark.parametrize("dies_at", ["getattr /repository$", "getattr /repository/FORMAT"])
def test_a_rank_whose_storage_is_dead_from_the_start_keeps_nobody_waiting(
    tmp_path: Path, need_root: None, dies_at: str
) -> None:
    need_fuse()
    backing, point = tmp_path / "backing", tmp_path / "mount"
    urls = [str(at / "repository") for at in (backing, point)]
    two_snapshots(urls[0], 2)
    with (
        blocking_mount(backing, point, dies_at) as mount,
        ranks.started(2, opens_on_dead_storage, *urls) as job,
        released(mount),
    ):
        assert job.wait_keys(["said/ended/0", "said/ended/1"], PATIENT)
        mount.release()
        job.store.set("test/went on", "")
        others, own = job.outcomes()
    assert isinstance(others.error, CommitTimeout)
    assert others.names == {1}
    assert isinstance(own.error, StorageError)
    assert "the storage has not answered for" in str(own.error)
    assert "/mount/repository" in str(own.error)
    assert max(others.seconds, own.seconds) <= BOUND + others.lag + own.lag
