"""No parser of the format fails on any of some million inputs: each raises ``FormatError``, or returns what encodes to
the very same bytes, in bounded memory and time.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFESTS = ("layout", "part", "roll", "index", "decision")
PARSERS = ("value", *MANIFESTS, "footer", "FORMAT")
RUNS = dict.fromkeys(PARSERS, 1_000_000) | {"layout": 400_000, "roll": 400_000}
"""Layouts take longest: families that are right are checked to the end."""
PROCESSES = 2
SECONDS_MAX = 1500
"""For a million inputs; a third of a minute on a core that does nothing else."""
SOAK_RUNS = 2_000_000


@pytest.fixture(scope="module", autouse=True)
def need_atheris() -> None:
    """It is built for few platforms: without it these tests are skipped, but failed in CI."""
    if importlib.util.find_spec("atheris") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("needs atheris")
        pytest.skip("needs atheris")


def fuzz(parser: str, runs: int, seed: int, artifacts: Path) -> str:
    """What is to be said if it fails, with how to do it again; nothing if it does not."""
    command = [sys.executable, "-m", "tests.security.fuzz", parser, "--runs", str(runs), "--seed", str(seed)]
    try:
        result = subprocess.run(
            [*command, "--artifacts", str(artifacts)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS_MAX,
        )
    except subprocess.TimeoutExpired:
        return f"{parser}: not done in {SECONDS_MAX} seconds; {' '.join(command)}"
    done = re.search(r"^stat::number_of_executed_units: +(\d+)$", result.stderr, re.MULTILINE)
    print(f"{parser}: {done[1] if done else 'no'} inputs, seed {seed}")
    if result.returncode == 0 and done and int(done[1]) >= runs:
        return ""
    said = (result.stdout + result.stderr)[-3000:]
    inputs = [f"{path.name}: bytes.fromhex('{path.read_bytes().hex()}')" for path in artifacts.glob(f"{parser}-*")]
    again = f"again: {' '.join(command)}; or write an input to a file: --replay FILE"
    return "\n".join([f"{parser} ended with {result.returncode}", said, *inputs, again])


def fuzz_all(runs: Mapping[str, int], seed: int, artifacts: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as executor:
        failures = executor.map(lambda parser: fuzz(parser, runs[parser], seed, artifacts), runs)
        assert not (found := [failure for failure in failures if failure]), "\n\n".join(found)


@pytest.mark.timeout(3600)
def test_no_parser_fails_on_any_of_some_million_inputs(seed: int, tmp_path: Path) -> None:
    fuzz_all(RUNS, seed % 2**31 or 1, tmp_path)


@pytest.mark.soak
@pytest.mark.timeout(24 * 3600)
def test_no_parser_of_manifests_fails_on_any_of_forty_million_inputs(seed: int, tmp_path: Path) -> None:
    for number in range(int(os.environ.get("SOAK_ROUNDS", "20"))):
        fuzz_all(dict.fromkeys(MANIFESTS, SOAK_RUNS), (seed + number) % 2**31 or 1, tmp_path)
