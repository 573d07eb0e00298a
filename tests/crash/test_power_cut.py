"""The power is cut, for real as far as the file system can tell; what was reported committed is there afterwards, and
nothing partial is.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.crash.power_cut import ALONE, MANNERS
from tests.crash.scenarios import SCENARIOS

ROOT = Path(__file__).resolve().parent.parent.parent
CUTS = 150
SOAK_CUTS = 2500
SOAK_ROUNDS = int(os.environ.get("SOAK_ROUNDS", "1"))
ENVIRONMENT = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
TOOLS = ["mount", "umount", "losetup", "unshare"]

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("need_root")]
each_file_system = pytest.mark.parametrize("file_system", ["ext4", "xfs"])


def cut(file_system: str, directory: Path, seed: int, cuts: int, *options: str) -> dict[str, Any]:
    """Runs power_cut.py and returns what it saw."""
    need(f"mkfs.{file_system}", *TOOLS)
    own = directory / f"cut-{secrets.token_hex(8)}"
    own.mkdir()
    command = [sys.executable, "-m", "tests.crash.power_cut", "--file-system", file_system, "--directory", str(own)]
    result = subprocess.run(
        [*ALONE, *command, "--cuts", str(cuts), "--seed", str(seed), *options],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100 + cuts,
    )
    devices = subprocess.run(["losetup", "--list"], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert own.name not in devices.stdout, "a loop device is left behind"
    assert result.returncode == 0, result.stderr[-4000:]
    seen: dict[str, Any] = json.loads(result.stdout)
    print("\n".join(seen["moments"]), result.stderr, sep="\n")
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


def check(seen: dict[str, Any], cuts: int) -> None:
    assert not seen["violations"], "\n".join(seen["violations"][:20])
    assert len(seen["moments"]) == cuts
    assert seen["reported"] >= cuts // 4, "hardly a save came to its end before the cut"


@each_file_system
def test_whatever_was_reported_committed_survives_a_power_cut(file_system: str, tmp_path: Path, seed: int) -> None:
    seen = cut(file_system, tmp_path, seed, CUTS)
    check(seen, CUTS)
    assert min(seen["calls"].values()) >= 50, "a save makes more calls; were they not all counted?"
    for scenario in SCENARIOS:
        assert sum(moment.startswith(scenario.name) for moment in seen["moments"]) >= CUTS // len(SCENARIOS)
    for manner in MANNERS:
        assert sum(f", {manner}, " in moment for moment in seen["moments"]) >= CUTS // 5


@each_file_system
def test_nothing_is_reported_when_the_file_system_dies_just_before_a_decision_is_durable(
    file_system: str, tmp_path: Path, seed: int
) -> None:
    """XFS then says of a directory that it was synced. Each scenario, in each manner."""
    cuts = len(SCENARIOS) * len(MANNERS)
    seen = cut(file_system, tmp_path, seed, cuts, "--before", "fsync of decisions")
    assert not seen["violations"], "\n".join(seen["violations"])
    assert len(seen["moments"]) == cuts


@each_file_system
def test_what_a_checkpointer_reported_survives_a_power_cut(file_system: str, tmp_path: Path, seed: int) -> None:
    check(cut(file_system, tmp_path, seed, 12, "--through-checkpointer"), 12)


@pytest.mark.parametrize(
    ("mistake", "before"),
    [
        ("no_fsync", ""),
        ("no_fsync_of_data", ""),
        ("no_fsync_of_directories", ""),
        ("link_before_fsync", "fsync of .0000"),  # of a decision; of all calls so few show it that 150 cuts may not
    ],
)
@each_file_system
def test_such_cuts_find_a_missing_or_late_fsync(
    file_system: str, mistake: str, before: str, tmp_path: Path, seed: int
) -> None:
    """So the tests above can fail. Ends with the first cut that finds it. (That nobody syncs the parent of a new
    directory cannot be found like this: what these two journals hold of one file, they hold of all older names.)"""
    seen = cut(file_system, tmp_path, seed, CUTS, "--mistake", mistake, "--before", before)
    assert seen["violations"]
    print(len(seen["moments"]), "cuts:", seen["violations"][0])


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("number", range(SOAK_ROUNDS))
@each_file_system
def test_thousands_of_power_cuts_lose_nothing(file_system: str, number: int, tmp_path: Path, seed: int) -> None:
    check(cut(file_system, tmp_path, seed + number, SOAK_CUTS), SOAK_CUTS)
