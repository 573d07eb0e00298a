"""The demo in its short form: that it holds, and that it can tell when it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"

pytestmark = pytest.mark.distributed


def run(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), "--quick", "--output", str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_a_run_killed_in_a_save_ends_with_the_losses_of_one_that_was_not(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    facts = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert facts["losses equal to the last bit"] == "yes"
    assert facts["steps"].startswith("24 on 2 processes")
    assert facts["snapshots"].startswith("12 of ")
    assert facts["killed"].startswith("rank 1, saving step ")
    assert facts["restored on 1 process"].startswith("all 168 tensors equal")
    assert facts["verified"].startswith("all 12 snapshots")


def test_the_demo_fails_if_part_of_the_state_is_not_restored(tmp_path: Path) -> None:
    result = run(tmp_path, "--forget", "rng")
    assert result.returncode == 1
    assert "NOT AS CLAIMED: losses differ" in result.stderr
    assert result.stdout == ""
