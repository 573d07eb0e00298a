"""How long until what was saved is durable, and how long its caller stands still: P-dense, P-peers, P-return, stall.

For each way: ``return_seconds``, until ``save`` came back; ``stall_seconds``, until an optimizer that was to step at
once could; ``committed_seconds``, until all of it was durable and complete; ``cpu_seconds``, of all its processes. Raw
direct writes of as many bytes, in the same rounds, are the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.compare import device
from bench.compare.harness import Measures, alternate, copy_seconds, cpu_seconds, together, world
from bench.compare.state import random_state, total
from bench.compare.ways import Fastckpt, Way

PARAMETERS = 300
RAW = {
    "raw, 2 threads": (2, False),
    "raw, 2 threads, allocated": (2, True),
    "raw, 4 threads": (4, False),
    "raw, 4 threads, allocated": (4, True),
}


def measure(ways: Sequence[type[Way]], size: int, runs: int, directory: Path) -> dict[str, Any]:
    """On every rank of a job: all ways with a state of ``size`` bytes in all."""
    state = random_state(size, PARAMETERS)
    size = total(state.bytes())
    ranks, rank = world()
    made: list[Way] = []
    for way in ways:
        own = directory / f"{way.__name__}-{ranks}"
        own.mkdir(parents=True, exist_ok=True)
        together()
        made.append(way(state, own))
    cases = {each.name: partial(saved, each, Steps()) for each in made}
    raw_bytes = state.bytes()
    for name, (threads, allocate) in RAW.items():
        cases[name] = partial(raw, directory / f"raw-{rank}", raw_bytes, threads, allocate)
    rows = alternate(cases, runs, raw_bytes)
    stages = next((each.stages() for each in made if isinstance(each, Fastckpt)), {})
    for each in made:
        each.close()
    (directory / f"raw-{rank}").unlink()
    return {
        "ranks": ranks,
        "bytes": size,
        "tensors": len(state.tensors()),
        "copy_seconds": copy_seconds(raw_bytes),
        "stages": stages,
        "runs": rows,
    }


class Steps:
    """Counts the saves of one way."""

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        self.last += 1
        return self.last


def saved(way: Way, steps: Steps, ready: Callable[[], None]) -> Measures:
    """One save of one way. What it wrote is removed afterwards."""
    step = steps.next()
    ready()
    cpu, start = cpu_seconds(), time.perf_counter()
    way.save(step)
    returned = time.perf_counter()
    way.wait_staged()
    staged = time.perf_counter()
    way.wait()
    committed = time.perf_counter()
    measures = {
        "return_seconds": returned - start,
        "stall_seconds": staged - start,
        "committed_seconds": committed - start,
        "cpu_seconds": cpu_seconds() - cpu,
    }
    way.discard(step)
    return measures


def raw(path: Path, size: int, threads: int, allocate: bool, ready: Callable[[], None]) -> Measures:
    path.unlink(missing_ok=True)
    block = device.block()
    ready()
    cpu, start = cpu_seconds(), time.perf_counter()
    device.write(path, block, size, threads, allocate)
    return {"committed_seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
