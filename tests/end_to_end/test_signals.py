"""What a launcher gets to see of a job with the callback: workers that end when they should, and a restart at once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TRAINING = Path(__file__).with_name("callback_train.py")
SECONDS = 120.0
RESTART_SECONDS_MAX = 12.0
"""Promised from the death of a worker to the start of its successor."""
END_SECONDS_MORE = 5.0
"""Promised to be all, after ``agree_seconds``, until a process that is stuck ends by a signal that it handles."""

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Job:
    output: Path

    def journal(self, rank: int) -> list[dict[str, Any]]:
        path = self.output / f"rank-{rank}.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def at(self, rank: int, what: str) -> list[float]:
        """When a rank wrote this, each time."""
        return [entry["at"] for entry in self.journal(rank) if what in entry]

    def of(self, rank: int, what: str) -> list[Any]:
        return [entry[what] for entry in self.journal(rank) if what in entry]

    def log(self) -> str:
        return (self.output / "log").read_text()


@contextlib.contextmanager
def torchrun(output: Path, restarts: int, *arguments: str) -> Iterator[tuple[Job, subprocess.Popen[bytes]]]:
    output.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(TRAINING), str(output), *arguments]
    # A key-value store of its own for every restart: in the one before, gloo may find the addresses of dead workers.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with (output / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            yield Job(output), process
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers
            process.wait(timeout=SECONDS)


def wait_until(done: Callable[[], bool], job: Job) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, job.log()
        time.sleep(0.005)


def restarted(output: Path, *signals: str) -> tuple[Job, float]:
    """A job one of whose two workers is killed; and the seconds from then to the restart."""
    with torchrun(output, 1, "10", "killed", *signals) as (job, process):
        assert process.wait(timeout=SECONDS) == 0, job.log()
    (killed,) = job.at(1, "event")
    return job, max(job.at(rank, "started")[1] for rank in range(2)) - killed


def ended(output: Path) -> float:
    """Seconds from SIGTERM to the end of a process that handles it, and that is stuck in a collective."""
    agree_seconds = 2.0
    with torchrun(output, 0, str(agree_seconds), "stuck", "SIGUSR1", "SIGTERM") as (job, process):
        wait_until(lambda: bool(job.at(0, "event")), job)
        (stuck,) = job.of(0, "started")
        start = time.monotonic()
        os.kill(stuck, signal.SIGTERM)
        wait_until(lambda: is_over(stuck), job)
        seconds = time.monotonic() - start
        process.wait(timeout=SECONDS)
        assert "Signal 15 (SIGTERM) received by PID" in job.log() or "exitcode  : -15" in job.log(), job.log()
        assert "SIGTERM falls to its previous disposition" in job.log()
    return seconds - agree_seconds


def is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_launcher_has_its_workers_back_in_time_whatever_they_are_stuck_in(tmp_path: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor() as executor:  # they mostly wait
        usual = executor.submit(restarted, tmp_path / "usual", "SIGUSR1")
        handling = executor.submit(restarted, tmp_path / "handling", "SIGUSR1", "SIGTERM")
        stuck = executor.submit(ended, tmp_path / "stuck")
        for future in (usual, handling):
            job, seconds = future.result()
            assert seconds < RESTART_SECONDS_MAX
            for rank in range(2):
                assert job.of(rank, "first") == [1, 6], "the second start goes on after the last snapshot"
                assert job.of(rank, "ended") == [8]
        assert stuck.result() < END_SECONDS_MORE
