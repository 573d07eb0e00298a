"""The simulator against a network: writers of four supernodes send to a storage over links that are shaped for real."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastckpt.plan.simulate import simulate
from fastckpt.topology.topology import Tree
from tests.end_to_end.shaped_network import (
    RANK_BYTES_PER_SECOND,
    STORAGE_BYTES_PER_SECOND,
    UPLINK_BYTES_PER_SECOND,
    WRITER_BYTES,
)

ROOT = Path(__file__).resolve().parents[2]
ALONE = ["unshare", "--net", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
WRITERS = [(16, 0, 0, 0), (8, 8, 0, 0), (10, 2, 2, 2), (8, 4, 2, 2), (4, 4, 4, 4), (2, 2, 2, 2), (6, 6, 6, 6)]
"""By supernode: from crowded to even, and from too few to enough."""
TOLERANCE = 0.25
"""TCP shares a full link less than evenly, so that the last ends late."""

pytestmark = [pytest.mark.soak, pytest.mark.root, pytest.mark.usefixtures("need_root"), pytest.mark.timeout(300)]


def simulated(writers: tuple[int, ...]) -> float:
    """Seconds until the last writer is done."""
    above = np.repeat(np.arange(len(writers)), writers)
    ranks = len(above)
    capacities = [
        np.full(ranks, float(RANK_BYTES_PER_SECOND)),
        np.full(ranks, math.inf),
        np.full(len(writers), float(UPLINK_BYTES_PER_SECOND)),
        np.array([float(STORAGE_BYTES_PER_SECOND)]),
    ]
    levels = ("rank", "node", "supernode", "storage")
    parents = (np.arange(ranks), above, np.zeros(len(writers), np.intp))
    names = tuple([str(n) for n in range(len(level))] for level in capacities)
    return simulate(Tree(levels, parents, tuple(capacities), names), np.full(ranks, WRITER_BYTES)).makespan_seconds


def test_writers_take_as_long_as_simulated_over_shaped_links() -> None:
    if missing := [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    cases = [",".join(map(str, writers)) for writers in WRITERS]
    command = [*ALONE, sys.executable, "-m", "tests.end_to_end.shaped_network", *cases]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    measured = [max(json.loads(line)) for line in result.stdout.splitlines()]
    expected = [simulated(writers) for writers in WRITERS]
    for case, seconds, wanted in zip(cases, measured, expected, strict=True):
        print(f"{case}: {seconds:.2f} s, simulated {wanted:.2f} s")
    assert measured == [pytest.approx(wanted, rel=TOLERANCE) for wanted in expected]
