"""The power is cut, for real as far as the file system can tell; what was reported committed is there afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CUTS = 10
ENVIRONMENT = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
# In these namespaces nobody else sees the mount, and all processes end with the first one.
ALONE = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
TOOLS = ["mount", "umount", "losetup", "unshare"]

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("need_root")]


def cut(file_system: str, directory: Path, seed: int, *, cuts: int = CUTS, sync: str = "all") -> dict[str, Any]:
    """Runs power_cut.py and returns what it saw."""
    need(f"mkfs.{file_system}", *TOOLS)
    command = [sys.executable, "-m", "tests.crash.power_cut", "cut", "--file-system", file_system]
    options = ["--directory", str(directory), "--cuts", str(cuts), "--seed", str(seed), "--sync", sync]
    result = subprocess.run(
        [*ALONE, *command, *options], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60 + 10 * cuts
    )
    devices = subprocess.run(["losetup", "-j", directory / "image"], env=ENVIRONMENT, capture_output=True, text=True)
    assert devices.stdout == "", "a loop device is left behind"
    assert result.returncode == 0, result.stderr[-4000:]
    seen: dict[str, Any] = json.loads(result.stdout)
    print("\n".join(seen["moments"]))
    return seen


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None]
    if not os.path.exists("/dev/loop-control"):
        missing.append("loop devices")
    if missing:
        reason = f"needs {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_whatever_was_reported_committed_survives_a_power_cut(file_system: str, tmp_path: Path, seed: int) -> None:
    seen = cut(file_system, tmp_path, seed)
    assert not seen["violations"], "\n".join(seen["violations"])
    assert len(seen["moments"]) == CUTS
    assert seen["reported"] >= CUTS // 2


@pytest.mark.parametrize("sync", ["none", "names"])
@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_without_fsync_the_same_cuts_lose_snapshots(file_system: str, sync: str, tmp_path: Path, seed: int) -> None:
    """So the test above can fail. Three cuts: at any moment, after a report, and after a stranger's fsync."""
    seen = cut(file_system, tmp_path, seed, cuts=3, sync=sync)
    assert seen["violations"]
    print(seen["violations"][0])


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_hundreds_of_power_cuts_lose_nothing(file_system: str, tmp_path: Path, seed: int) -> None:
    for number in range(int(os.environ.get("SOAK_ROUNDS", "20"))):
        directory = tmp_path / str(number)
        directory.mkdir()
        seen = cut(file_system, directory, seed + number)
        assert not seen["violations"], (seed + number, seen["violations"])
