"""An outside judge, ckpt-chaos, kills the demo's training at file events and says what became of it: whether it went
on, from the newest snapshot there was, to the same weights to the bit.

"before" is a kill before the event, "torn" a file cut to half its length and a kill, "term" a SIGTERM. The judge counts
files and folders that are made or removed, and tears what ``torch.save`` or Python's ``open`` writes: of this training
one file, which is not fastckpt's. Kills between a save's system calls, and torn packs, are in ``tests/crash``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from ckpt_chaos.runner import Row, rejudge

TRAIN = Path(__file__).resolve().parent / "chaos_train.py"
JUDGE = Path(sys.executable).with_name("ckpt-chaos")
RUN_SECONDS_MAX = 180
STEPS = 4
ALL = 10_000
"""More points than there are."""
OBJECTS = (".pack", ".part-", ".index.", *(f".{number:012}." for number in range(1, STEPS + 2)))
"""What is in the names of the files that are made for the packs, parts, indexes and decisions of ``STEPS`` saves."""

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Judged:
    events: list[str]
    """Names that the rank to be killed made or removed when it was not, in order."""
    rows: list[Row]
    """What the judge says of every point that a run came to."""

    @property
    def verdicts(self) -> set[str]:
        return {row.verdict for row in self.rows}

    def hit(self, mode: str) -> int:
        """How many of the points chosen for ``mode`` a run came to: all of them, or all but the last."""
        return sum(row.label.endswith(f"[{mode}]") for row in self.rows)


def judge(
    work: Path,
    *more: str,
    points_max: int,
    modes: str = "before",
    ranks: int = 1,
    crash_rank: int = 0,
    snapshots: str = "repository/decisions/*",
    seconds_max: float = 840.0,
) -> Judged:
    """Kills the training at evenly chosen events, ``points_max`` in all modes together.

    Every step is saved. So the first decision opens the repository, and each other one is the COMMIT of the step before
    its number: the newest decision's number is the step to go on with, and that is what the judge compares.
    """
    command = [str(JUDGE), "run", "--work", str(work), "--jobs", "2", "--timeout", str(RUN_SECONDS_MAX)]
    command += ["--ranks", str(ranks), "--crash-rank", str(crash_rank), "--grace", "1"]
    command += ["--max-points", str(points_max), "--modes", modes]
    command += ["--result-file", "{out}/digests.json", "--step-regex", r"training from step (\d+)"]
    command += ["--checkpoint-glob", f"{{out}}/{snapshots}"]
    command += ["--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"]
    command += ["--", sys.executable, str(TRAIN), "--output", "{out}"]
    command += ["--steps", str(STEPS), "--save-every", "1", "--size", "tiny", *more]
    # The judge does not tell ranks which of them is to be killed: without this it would always be rank 0.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CKPT_CHAOS_CRASH_RANK": str(crash_rank)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=seconds_max)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # it, and the training it runs
        process.wait()
        raise
    print(said)
    control, *rows = rejudge(work)
    assert (control.label, control.verdict) == ("no crash (control)", "PASS"), said
    assert bool(process.returncode) == any(row.verdict != "PASS" for row in rows), said
    hit = []
    for row, folder in zip(rows, sorted(work.glob("pt_[0-9]*")), strict=True):
        # Threads that race to make a folder make an event more or less: a run may not come to the last points, such
        # as the only one that can be torn. (That an event was counted by a thread that was then killed may not be in
        # the log.)
        number = int(row.label.partition(" ")[0].removeprefix("#"))
        assert row.crashed or len(events(folder, crash_rank)) < number, f"{row.label}: {said}"
        hit += [row] if row.crashed else []
        if row.verdict != "PASS":
            print(row.label, json.loads((folder / "result.json").read_text())["resume_tail"], sep="\n")
    judged = Judged(events(work / "reference", crash_rank), hit)
    shutil.rmtree(work)  # a repository for every point
    return judged


def events(folder: Path, rank: int) -> list[str]:
    return [line.split("\t")[2] for line in (folder / f"events.log.rank{rank}").read_text().splitlines()]


def check_coordinator_is_judged_everywhere(judged: Judged) -> None:
    """The judge sees every file that a save makes."""
    assert len(judged.events) >= 14 * STEPS
    for part in OBJECTS:
        assert any(part in name for name in judged.events), part


# --- fastckpt -----------------------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_a_job_of_one_rank_killed_anywhere_goes_on_from_the_newest_snapshot_to_the_same_weights(tmp_path: Path) -> None:
    judged = judge(tmp_path / "work", points_max=10, modes="before,torn,term")
    check_coordinator_is_judged_everywhere(judged)
    assert judged.hit("before") + judged.hit("term") >= 6
    assert judged.verdicts == {"PASS"}


@pytest.mark.timeout(900)
def test_a_job_of_two_ranks_whose_coordinator_is_killed_goes_on_from_the_newest_snapshot(tmp_path: Path) -> None:
    judged = judge(tmp_path / "work", points_max=3, ranks=2)
    check_coordinator_is_judged_everywhere(judged)
    assert judged.hit("before") >= 2
    assert judged.verdicts == {"PASS"}


@pytest.mark.timeout(900)
def test_a_job_of_two_ranks_whose_other_rank_is_killed_goes_on_from_the_newest_snapshot(tmp_path: Path) -> None:
    judged = judge(tmp_path / "work", points_max=2, ranks=2, crash_rank=1)
    assert sum(name.endswith(".pack") for name in judged.events) >= STEPS
    assert judged.hit("before") >= 1
    assert judged.verdicts == {"PASS"}


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("ranks", "crash_rank"), [(1, 0), (2, 0), (2, 1)])
def test_a_job_killed_at_every_file_event_goes_on_from_the_newest_snapshot(
    ranks: int, crash_rank: int, tmp_path: Path
) -> None:
    work, modes = tmp_path / "work", "before,torn,term"
    judged = judge(work, points_max=ALL, modes=modes, ranks=ranks, crash_rank=crash_rank, seconds_max=7000.0)
    print(f"{len(judged.events)} events, {len(judged.rows)} points")
    assert len(judged.rows) >= 1.7 * len(judged.events)
    assert judged.verdicts == {"PASS"}


# --- the judge ----------------------------------------------------------------------------------------------------


# Of the three kills below the first comes before anything is committed: there is nothing to lose. The second does or
# does not; the last comes after most saves.


@pytest.mark.timeout(900)
def test_the_judge_calls_a_resume_that_silently_starts_afresh_lost_work(tmp_path: Path) -> None:
    judged = judge(tmp_path / "work", "--mistake", "starts-afresh", points_max=3)
    assert (judged.rows[0].verdict, judged.rows[-1].verdict) == ("PASS", "LOST_WORK")


@pytest.mark.timeout(900)
def test_the_judge_calls_a_resume_without_random_numbers_a_silent_divergence(tmp_path: Path) -> None:
    judged = judge(tmp_path / "work", "--forget", "rng", points_max=3)
    assert (judged.rows[0].verdict, judged.rows[-1].verdict) == ("PASS", "SILENT_DIVERGENCE")


@pytest.mark.timeout(900)
def test_the_judge_calls_what_torch_save_in_place_leaves_a_hard_failure(tmp_path: Path) -> None:
    judged = judge(
        tmp_path / "work", "--mistake", "in-place", points_max=1, modes="torn", snapshots="repository/step-*.pt"
    )
    assert [row.verdict for row in judged.rows] == ["HARD_FAIL"]
