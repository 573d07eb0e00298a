"""How long a cold restore takes, bytes checked: P-restore, beside others' loads and raw direct reads of as many bytes.

The page cache is emptied and the state zeroed before each run; a run whose state afterwards is not what was saved, to
the last byte, fails. fastckpt verifies every chunk while it reads; the others verify nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.compare import device
from bench.compare.harness import Measures, alternate, cpu_seconds, drop_page_cache, together, world
from bench.compare.state import State, random_state, total
from bench.compare.ways import Fastckpt, Way

PARAMETERS = 300
RAW_THREADS = (2, 4)


def measure(ways: Sequence[type[Way]], size: int, runs: int, directory: Path) -> dict[str, Any]:
    """On every rank of a job: each way saves once, and loads that."""
    state = random_state(size, PARAMETERS)
    ranks, rank = world()
    own_bytes, size = state.bytes(), total(state.bytes())
    expected = state.digest()
    cases: dict[str, Callable[[Callable[[], None]], Measures]] = {}
    made: list[Way] = []
    for way in ways:
        own = directory / f"{way.__name__}-{ranks}"
        own.mkdir(parents=True, exist_ok=True)
        together()
        made.append(way(state, own))
        made[-1].save(1)
        made[-1].wait()
        cases[way.load_name] = partial(loaded, made[-1], state, expected)
    file = directory / f"raw-{rank}"
    device.write(file, device.block(), own_bytes, RAW_THREADS[0], allocate=True)
    for threads in RAW_THREADS:
        cases[f"raw, {threads} threads"] = partial(raw, file, threads)
    cleared = drop_page_cache(directory)
    rows = alternate(cases, runs, 2 * own_bytes)
    stages = next((each.stages() for each in made if isinstance(each, Fastckpt)), {})
    for each in made:
        each.close()
    return {"ranks": ranks, "bytes": size, "page_cache_emptied_by": cleared, "stages": stages, "runs": rows}


def loaded(way: Way, state: State, expected: str, ready: Callable[[], None]) -> Measures:
    state.clear()
    together()
    drop_page_cache(way.directory)
    ready()
    cpu, start = cpu_seconds(), time.perf_counter()
    way.load(1)
    seconds = time.perf_counter() - start
    measures = {"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu}
    if state.digest() != expected:
        raise RuntimeError(f"{way.load_name}: what was loaded is not what was saved")
    return measures


def raw(path: Path, threads: int, ready: Callable[[], None]) -> Measures:
    drop_page_cache(path.parent)
    blocks = [device.block() for _ in range(threads)]
    ready()
    cpu, start = cpu_seconds(), time.perf_counter()
    device.read(path, blocks)
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
