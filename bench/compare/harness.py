"""How every question is measured: ranks as real processes, cases in alternating order, memory touched before each timed
run, medians with their spread, and a record that says where and by what it was made.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
BACKED_BYTES_PER_SECOND = 1e9
"""Memory that is touched more slowly than this had to be backed by the machine's host first."""
BARRIER_SECONDS = 300.0
PACKAGES = ("torch", "fastckpt-torch", "safetensors", "torch_checkpointing", "blake3", "numpy")

Measures = dict[str, float]
Case = Callable[[Callable[[], None]], Measures]
"""Prepares, calls what it is given directly before the timed part, and returns what it measured, by name."""


# --- ranks ---------------------------------------------------------------------------------------------------------


def job(ranks: int, function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` on every rank of a new job; what rank 0 returns, which is sent as JSON. Raises what a
    rank raised, once all have ended."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory, "result.json")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torch.multiprocessing.spawn(_rank, (ranks, port, result, function, arguments), nprocs=ranks)
        loaded: T = json.loads(result.read_text())
        return loaded


def _rank(rank: int, ranks: int, port: int, result: Path, function: Callable[..., Any], arguments: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # DCP, of ``no_dist``
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    # With one rank too: DCP's process wants it.
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=BARRIER_SECONDS))
    returned = function(*arguments)
    dist.barrier()
    if rank == 0:
        result.write_text(json.dumps(returned))
    dist.destroy_process_group()


def world() -> tuple[int, int]:
    """Number of ranks, and this one's."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def together() -> None:
    """Waits for all ranks."""
    if world()[0] > 1:
        dist.barrier()


# --- memory --------------------------------------------------------------------------------------------------------


def touch(size: int) -> float:
    """Touches and frees ``size`` bytes of memory; returns the rate in bytes/s. A virtual machine may have given memory
    that nobody used back to its host, and the next to use it pays for that."""
    size = max(size, mmap.PAGESIZE)
    start = time.perf_counter()
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()
    return size / (time.perf_counter() - start)


def copy_seconds(size: int) -> float:
    """How long one copy of ``size`` bytes takes in touched memory, with torch's threads: no way of staging by copying
    is quicker."""
    block = 64 << 20
    source, target = torch.ones(block, dtype=torch.uint8), torch.ones(block, dtype=torch.uint8)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * size / block


def drop_page_cache(directory: Path) -> str:
    """Empties the page cache of what lies below ``directory``; says how."""
    os.sync()
    if os.geteuid() == 0:
        try:
            Path("/proc/sys/vm/drop_caches").write_text("1\n")
            return "/proc/sys/vm/drop_caches"
        except OSError:  # a container's /proc may be read-only
            pass
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return "posix_fadvise(POSIX_FADV_DONTNEED) on each file"


def processes() -> list[int]:
    """This process and all its descendants."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found = [os.getpid()]
    for parent in found:
        found += [process for process, its in parents.items() if its == parent]
    return found


def cpu_seconds() -> float:
    """User and system time so far of this process and its descendants, dead or alive."""
    ticks = 0
    for process in processes():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


# --- runs ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One timed run of one case."""

    case: str
    round: int
    backed: bool
    touch_gb_per_second: float
    measures: Measures = field(default_factory=dict)


def alternate(cases: Mapping[str, Case], runs: int, touch_bytes: int) -> list[dict[str, Any]]:
    """Every case ``runs`` times, after a round that warms up: forwards in one round, backwards in the next. On several
    ranks all call it, and the slowest rank's measures count."""
    done = []
    gc.freeze()  # a collection before each run would look through all of torch's objects
    for number in range(runs + 1):
        for name in cases if number % 2 else reversed(list(cases)):
            rates: list[float] = []

            def ready(rates: list[float] = rates) -> None:
                gc.collect()
                os.sync()  # what the run before has left for later
                together()
                rates.append(touch(touch_bytes))
                together()

            slowest = _slowest({**cases[name](ready), "touch": -min(rates)})
            rate = -slowest.pop("touch")
            if number:
                done.append(Run(name, number, rate >= BACKED_BYTES_PER_SECOND, round(rate / 1e9, 3), slowest))
    gc.unfreeze()
    return [vars(run) for run in done]


def _slowest(measures: Measures) -> Measures:
    if world()[0] == 1:
        return measures
    values = torch.tensor(list(measures.values()), dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(measures, values.tolist(), strict=True))


@dataclass(frozen=True)
class Spread:
    """The median of several runs, the least and the most."""

    median: float
    least: float
    most: float

    def __format__(self, form: str) -> str:
        return f"{self.median:{form}} ({self.least:{form}}-{self.most:{form}})"

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


class Runs:
    """The runs of one question."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.all = [Run(**row) for row in rows]

    def cases(self) -> list[str]:
        return list(dict.fromkeys(run.case for run in self.all))

    def backed(self, case: str) -> bool:
        """Whether the case has runs on backed memory: those count, and others only where there are none."""
        return any(run.backed for run in self.all if run.case == case)

    def values(self, case: str, measure: str, backed: bool | None = None) -> dict[int, float]:
        """By round."""
        wanted = self.backed(case) if backed is None else backed
        return {run.round: run.measures[measure] for run in self.all if run.case == case and run.backed == wanted}

    def spread(self, case: str, measure: str) -> Spread:
        return Spread.of(list(self.values(case, measure).values()))

    def best(self, cases: Sequence[str], measure: str) -> str:
        """The case with the smallest median."""
        return min(cases, key=lambda case: self.spread(case, measure).median)

    def ratio(self, over: str, under: str, measure: str) -> Spread:
        """``over`` / ``under``, round by round. Rounds in which the two had memory in different states are left out
        unless there are no others."""
        top, bottom = self.values(over, measure), self.values(under, measure)
        rounds = top.keys() & bottom.keys()
        if not rounds:
            return Spread.of([Spread.of(list(top.values())).median / Spread.of(list(bottom.values())).median])
        return Spread.of([top[number] / bottom[number] for number in rounds])


# --- records -------------------------------------------------------------------------------------------------------


def record(question: str, directory: Path, **found: Any) -> dict[str, Any]:
    """What goes into ``results/<question>.jsonl``: what was found, and all that is needed to find it again."""
    return {
        "question": question,
        "command": shlex.join(["python", "-m", "bench.compare", *sys.argv[1:]]),
        "commit": _output("git", "rev-parse", "HEAD"),
        "changed_files": len(
            _output(
                "git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/compare/results"
            ).splitlines()
        ),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(directory),
        "versions": {"python": platform.python_version(), **versions()},
        **found,
    }


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(directory: Path) -> dict[str, Any]:
    """CPUs, memory, kernel, and the device and file system that hold ``directory``."""
    columns = _output(
        "findmnt", "--noheadings", "--raw", "--output", "SOURCE,FSTYPE,OPTIONS", "--target", str(directory)
    )
    source, file_system, options = columns.split(" ", 2)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    number = os.stat(directory).st_dev
    queue = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/rotational")
    return {
        "cpus": os.cpu_count(),
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "device": source,
        "rotational": queue.read_text().strip() == "1" if queue.exists() else None,
        "file_system": file_system,
        "mount_options": options,
    }
