"""A job is killed before any of its system calls, or any of them fails: nothing is lost, and nothing hangs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.crash.scenarios import SCENARIOS
from tests.crash.syscalls import ERRORS

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS, FAULTS = 100, 400
"""A scenario."""
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # it forks

pytestmark = pytest.mark.usefixtures("need_strace")

each_scenario = pytest.mark.parametrize("name", [scenario.name for scenario in SCENARIOS])


@pytest.fixture(scope="module")
def need_strace() -> None:
    """strace may be missing, and containers may forbid it to trace."""
    reason = "needs strace"
    if shutil.which("strace"):
        tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, timeout=60)
        reason = "" if tried.returncode == 0 else f"needs the right to trace: {tried.stderr}"
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: what dies here is a process and not the machine, so nothing depends on the
    disk but the time that an fsync takes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as path:
        yield Path(path)


def disturbed(what: str, name: str, directory: Path, *options: str, seconds_max: float = 280.0) -> dict[str, Any]:
    """Runs syscalls.py and returns what it saw."""
    command = [sys.executable, "-m", "tests.crash.syscalls", what, "--scenario", name, "--directory", str(directory)]
    pipe = subprocess.PIPE
    # In a session of its own, so that whatever it has started ends with it.
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=seconds_max)
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, errors[-4000:]
    seen: dict[str, Any] = json.loads(out)
    violations = seen.pop("violations")
    print(json.dumps(seen))
    assert not violations, "\n".join(violations[:100])
    return seen


@each_scenario
def test_a_job_killed_before_any_system_call_that_changes_something_loses_nothing(name: str, directory: Path) -> None:
    seen = disturbed("kill", name, directory)
    assert seen["runs"] >= 50
    assert not seen["not reached"]
    # Every way of changing something that a save has.
    calls = set(seen["calls"])
    assert {"openat", "write", "fsync", "close", "linkat", "unlinkat", "mkdirat", "ftruncate"} <= calls
    assert {"pwritev", "pwritev2"} & calls
    assert seen["direct"], "no pack was written by direct I/O"


@each_scenario
def test_the_job_that_comes_after_a_killed_one_may_be_killed_too(name: str, directory: Path, seed: int) -> None:
    seen = disturbed("kill-twice", name, directory, "--seed", str(seed), "--count", str(PAIRS))
    assert seen["runs"] == PAIRS
    # What a job does depends on what the one before left.
    assert seen["not reached"] < PAIRS / 2


@each_scenario
def test_whatever_system_call_fails_a_job_ends_with_our_errors_and_loses_nothing(
    name: str, directory: Path, seed: int
) -> None:
    seen = disturbed("fail", name, directory, "--seed", str(seed), "--count", str(FAULTS))
    assert seen["runs"] == FAULTS
    assert not seen["not reached"]
    assert set(seen["faults"]) == {*ERRORS, "short"}


@pytest.mark.soak
@pytest.mark.timeout(7200)
@each_scenario
def test_wherever_two_jobs_in_a_row_are_killed_nothing_is_lost(name: str, directory: Path) -> None:
    disturbed("kill-twice", name, directory, seconds_max=7000)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@each_scenario
def test_whatever_error_any_system_call_gives_nothing_is_lost(name: str, directory: Path) -> None:
    disturbed("fail", name, directory, seconds_max=7000)
