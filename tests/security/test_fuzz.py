"""No parser of the format fails on any of very many inputs: each raises ``FormatError``, or returns what encodes to the
very same bytes, in bounded memory and time.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFESTS = ("layout", "part", "roll", "index", "decision")
PARSERS = ("value", *MANIFESTS, "footer", "FORMAT")
RUNS = 1_000_000
RUNS_SECONDS = 40
"""A parser that takes longer gets fewer inputs: how fast they are depends on what the fuzzer finds on its way."""
RUNS_MIN = 50_000
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


def fuzz(parser: str, runs: int, seed: int, artifacts: Path, seconds: int) -> str:
    """What is to be said if it fails, with how to do it again; nothing if it does not. ``seconds``: for which it goes
    on at most; 0 for as long as it takes."""
    command = [sys.executable, "-m", "tests.security.fuzz", parser, "--runs", str(runs), "--seed", str(seed)]
    try:
        result = subprocess.run(
            [*command, "--seconds", str(seconds), "--artifacts", str(artifacts)],
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
    if result.returncode == 0 and done and int(done[1]) >= (RUNS_MIN if seconds else runs):
        return ""
    said = (result.stdout + result.stderr)[-3000:]
    inputs = [f"{path.name}: bytes.fromhex('{path.read_bytes().hex()}')" for path in artifacts.glob(f"{parser}-*")]
    again = f"again: {' '.join(command)}; or write an input to a file: --replay FILE"
    return "\n".join([f"{parser} ended with {result.returncode}", said, *inputs, again])


def fuzz_all(parsers: Sequence[str], runs: int, seed: int, artifacts: Path, seconds: int = 0) -> None:
    with concurrent.futures.ThreadPoolExecutor(PROCESSES) as executor:
        failures = executor.map(lambda parser: fuzz(parser, runs, seed, artifacts, seconds), parsers)
        assert not (found := [failure for failure in failures if failure]), "\n\n".join(found)


@pytest.mark.timeout(3600)
def test_no_parser_fails_on_any_of_very_many_inputs(seed: int, tmp_path: Path) -> None:
    fuzz_all(PARSERS, RUNS, seed % 2**31 or 1, tmp_path, RUNS_SECONDS)


@pytest.mark.soak
@pytest.mark.timeout(24 * 3600)
def test_no_parser_of_manifests_fails_on_any_of_forty_million_inputs(seed: int, tmp_path: Path) -> None:
    for number in range(int(os.environ.get("SOAK_ROUNDS", "20"))):
        fuzz_all(MANIFESTS, SOAK_RUNS, (seed + number) % 2**31 or 1, tmp_path)
