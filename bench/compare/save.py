"""How long until a snapshot is durable, and how long the caller stands still: fastckpt beside torch.save and DCP.

    python bench/compare/save.py --gib 1 --runs 5 --directory DIR [--out bench/compare/results/save.jsonl]

Cases alternate; before each timed run as much memory as it may allocate is touched and freed, and the rate printed
(below 1 GB/s the machine was "unbacked", and the run is labelled so); every case ends with its data on the device. The
first round warms up and is not counted. A raw direct write of the same bytes in the same rounds is the limit.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

import fastckpt

BLOCK = 8 << 20


def make_state(gib: float) -> dict[str, torch.Tensor]:
    """Random float32 tensors of odd sizes, a third each of a parameter and two moments."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    left = int(gib * 2**30) // 4
    while left > 0:
        rows = int(torch.randint(200, 2000, (1,), generator=generator))
        size = min(left, rows * 1031)
        tensors[f"layer{len(tensors)}"] = torch.randn(size, generator=generator)
        left -= size
    return tensors


def raw_write(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Direct writes of the same number of bytes from one buffer, four in flight, and an fsync: what the device does."""
    size = sum(tensor.numel() * 4 for tensor in tensors.values()) // BLOCK * BLOCK
    buffer = mmap.mmap(-1, BLOCK)
    buffer.write(os.urandom(1 << 20) * 8)
    descriptor = os.open(directory / "raw", os.O_CREAT | os.O_WRONLY | os.O_DIRECT)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda at: os.pwrite(descriptor, buffer, at), range(0, size, BLOCK)))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def torch_save(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    with open(directory / "state.pt", "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def dcp_save(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    writer = dcp.FileSystemWriter(directory / "dcp", single_file_per_rank=False, sync_files=True, thread_count=4)
    dcp.save(tensors, storage_writer=writer, no_dist=True)


class Fast:
    """A parameter for every tensor, so that staging is behind the fence; the Checkpointer lives through all rounds."""

    def __init__(self, tensors: dict[str, torch.Tensor], directory: Path) -> None:
        self.module = torch.nn.ParameterDict({name: torch.nn.Parameter(t, False) for name, t in tensors.items()})
        self.checkpointer = fastckpt.Checkpointer(str(directory))
        self.step = 0
        self.return_seconds: list[float] = []
        self.staged_seconds: list[float] = []

    def save(self, *_: object) -> None:
        self.step += 1
        start = time.perf_counter()
        pending = self.checkpointer.save(self.step, {"model": self.module})
        self.return_seconds.append(time.perf_counter() - start)
        pending.wait_staged()
        self.staged_seconds.append(time.perf_counter() - start)
        pending.wait()


def touch(size: int) -> float:
    """Touches and frees memory; returns the rate in bytes/s."""
    start = time.perf_counter()
    memory = mmap.mmap(-1, size)
    for at in range(0, size, mmap.PAGESIZE):
        memory[at] = 1
    memory.close()
    return size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    tensors = make_state(arguments.gib)
    size = sum(tensor.numel() * 4 for tensor in tensors.values())
    work = arguments.directory / "fastckpt-bench"
    shutil.rmtree(work, ignore_errors=True)
    (work / "repository").mkdir(parents=True)
    fast = Fast(tensors, work / "repository")
    cases: dict[str, Callable[[dict[str, torch.Tensor], Path], None]] = {
        "raw direct write": raw_write,
        "fastckpt": fast.save,
        "torch.save + fsync": torch_save,
        "dcp.save, 4 threads": dcp_save,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    rates: list[float] = []
    for run in range(arguments.runs + 1):
        for name, case in cases.items():
            directory = work / "other"
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            os.sync()
            rates.append(touch(2 * size))
            start = time.perf_counter()
            case(tensors, directory)
            if run:
                seconds[name].append(time.perf_counter() - start)
        shutil.rmtree(work / "repository" / "packs", ignore_errors=True)  # the disk need not hold every round
    limit = statistics.median(seconds["raw direct write"])
    record = {
        "bench": "compare/save",
        "command": f"python {sys.argv[0]} --gib {arguments.gib} --runs {arguments.runs} --directory DIR",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release(), "torch": torch.__version__},
        "bytes": size,
        "tensors": len(tensors),
        "touch_gb_per_second": [round(rate / 1e9, 2) for rate in rates],
        "memory": "backed" if min(rates) > 1e9 else "unbacked",
        "seconds": seconds,
        "fastckpt_return_seconds": fast.return_seconds[1:],
        "fastckpt_staged_seconds": fast.staged_seconds[1:],
    }
    print(
        f"{size / 2**30:.2f} GiB in {len(tensors)} tensors, memory {record['memory']} "
        f"(touched at {min(rates) / 1e9:.1f} GB/s)"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{size / max(values) / 1e9:.2f}-{size / min(values) / 1e9:.2f}"
        print(f"{name:22} {size / median / 1e9:5.2f} GB/s ({spread})   {limit / median:4.2f} of the raw write")
    print(f"fastckpt: save() returned after {statistics.median(fast.return_seconds[1:]) * 1e3:.1f} ms,", end=" ")
    print(f"staged after {statistics.median(fast.staged_seconds[1:]) * 1e3:.0f} ms")
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    fast.checkpointer.close()
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
