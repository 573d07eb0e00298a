"""How much memory saves need above the state: P-memory.

A fresh process for each way saves three times. Counted is the anonymous and shared memory of all its processes
(``Pss_Anon`` and ``Pss_Shmem``: what two processes share counts once; the page cache does not count), at its peak,
above what there was before the way was made: sampled, and for the process itself also by its high-water mark.
"""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

from bench.compare.harness import processes
from bench.compare.state import random_state
from bench.compare.ways import Way

PARAMETERS = 300
SAVES = 3
SAMPLE_SECONDS = 0.02


def measure(way: type[Way], size: int, directory: Path) -> dict[str, Any]:
    """In a process of its own."""
    state = random_state(size, PARAMETERS)
    gc.collect()
    before, resident = held_bytes(), _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
    sampler = Sampler()
    made = way(state, directory)
    for step in range(1, SAVES + 1):
        made.save(step)
        made.wait_staged()
        made.wait()
    peak = max(sampler.stop() - before, _status("VmHWM") - resident)
    made.close()
    return {"way": way.name, "bytes": state.bytes(), "above_bytes": peak}


def held_bytes() -> int:
    """Anonymous and shared memory of this process and its descendants."""
    held = 0
    for process in processes():
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:  # it has ended
            continue
        held += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return held << 10


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise KeyError(name)


class Sampler:
    """The most memory held at a time, until it is stopped."""

    def __init__(self) -> None:
        self._most = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self._most = max(self._most, held_bytes())

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return max(self._most, held_bytes())
