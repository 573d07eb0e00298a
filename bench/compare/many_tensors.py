"""How long ``save`` takes to return where the state has many small tensors: P-return, per tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from bench.compare.harness import alternate
from bench.compare.save import Steps, saved
from bench.compare.state import random_state
from bench.compare.ways import Fastckpt

BYTES = 32 << 20


def measure(parameters: int, runs: int, directory: Path) -> dict[str, Any]:
    """``parameters``: each comes with three tensors of the optimizer."""
    state = random_state(BYTES, parameters)
    way = Fastckpt(state, directory)
    rows = alternate({way.name: partial(saved, way, Steps())}, runs, state.bytes())
    way.close()
    return {"ranks": 1, "bytes": state.bytes(), "tensors": len(state.tensors()), "runs": rows}
