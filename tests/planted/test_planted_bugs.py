"""Bugs that checkpoint libraries have had, each planted in a copy of this one: the suite must notice.

A patch begins with what is wrong; then follow the promise it breaks, the tests that must fail for it, and what they
must say (a regular expression).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent
PATCHES = sorted(HERE.glob("*.patch"))
AT_ONCE = 2
SECONDS_MAX = 240.0
SHOWN = 4000


class Planted(NamedTuple):
    promise: str
    caught_by: list[str]
    says: str


def read(patch: Path) -> Planted:
    header = patch.read_text().partition("\n--- ")[0]
    fields = dict(re.findall(r"^(Promise|Caught by|Says): (.*)$", header, re.MULTILINE))
    return Planted(fields["Promise"], fields["Caught by"].split("; "), fields["Says"])


def run_against(patch: Path, copy: Path) -> subprocess.CompletedProcess[str]:
    """What the tests named in a patch say of a copy of the project that has it."""
    leave = shutil.ignore_patterns("__pycache__", "planted")
    for folder in ("fastckpt", "tests", "examples"):
        shutil.copytree(PROJECT / folder, copy / folder, ignore=leave)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(PROJECT / file, copy)
    applied = subprocess.run(["git", "apply", str(patch)], cwd=copy, capture_output=True, text=True)
    assert applied.returncode == 0, f"{patch.name} does not fit the code any more; plant it anew\n{applied.stderr}"
    # The interpreter looks into the directory it is started in first: the copy, not what is installed.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not soak", *read(patch).caught_by]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS_MAX)


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """Of all that are asked for, two at a time."""
    asked = [item.callspec.params["patch"] for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {patch: pool.submit(run_against, patch, tmp_path_factory.mktemp(patch.stem)) for patch in asked}


@pytest.mark.timeout(SECONDS_MAX * 2)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_the_suite_catches(patch: Path, results: dict[Path, Future[subprocess.CompletedProcess[str]]]) -> None:
    result = results[patch].result()
    said = result.stdout[-SHOWN:] + result.stderr[-SHOWN:]
    planted = read(patch)
    if result.returncode == 0 and " passed" not in result.stdout and os.environ.get("CI") != "true":
        pytest.skip("the tests that would catch it need root or tools that are not here")
    assert result.returncode != 0, f"nobody noticed: {planted.promise}\n{said}"
    assert result.returncode == 1, f"the tests did not run\n{said}"
    assert re.search(planted.says, result.stdout), f"they failed, but do not say {planted.says!r}\n{said}"
