"""Everything that is compared, in one run: saves, stalls, a training loop, restores, memory, resharding, listing.

    python -m bench.compare --gib 2 --runs 5 [--directory DIR] [--results DIR] [--only QUESTION ...]

From the repository's root; `make bench` does it with the versions that are pinned. A line of JSON for each question
goes to ``results/<question>.jsonl``, the tables to ``results/table.md``, the plots to ``results/*.svg``. What is
written below ``--directory`` is removed again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.compare import listing, loop, many_tensors, memory, report, reshard, restore, save
from bench.compare.harness import ROOT, job, record
from bench.compare.ways import (
    LOADS,
    SAVES,
    DcpAsyncProcess,
    DcpAsyncThread,
    DcpThreads,
    Fastckpt,
    FastckptSmall,
    Safetensors,
    TorchCheckpointing,
    TorchCheckpointingAsync,
    TorchSave,
)

OTHERS_ON_DISK = 9
"""Checkpoints that lie on the disk at a time, beside the snapshots of every run."""
LOOP_WAYS = (Fastckpt, TorchSave, DcpAsyncThread, DcpAsyncProcess, TorchCheckpointingAsync)
LOADS_OF_TWO = (Fastckpt, TorchSave, Safetensors, DcpThreads, TorchCheckpointing)
MEMORY_WAYS = (
    FastckptSmall,
    Fastckpt,
    TorchSave,
    DcpThreads,
    DcpAsyncThread,
    DcpAsyncProcess,
    TorchCheckpointingAsync,
)
ASYNCHRONOUS = tuple(way for way in SAVES if way.asynchronous)
# Of --gib: what keeps all of it below a quarter of an hour on two cores.
TWO_RANKS_SHARE = 0.4
LOOP_SHARE = 0.28
MEMORY_SHARE = 0.25
RESHARD_SHARE = 0.2
SMALL_SAVES = 15


def questions(size: int, runs: int, snapshots: int, parameters: int) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Each question as what answers it, given an empty directory."""
    two_ranks_size = int(size * TWO_RANKS_SHARE)

    def memories(directory: Path) -> dict[str, Any]:
        found = []
        for way in MEMORY_WAYS:
            own = directory / way.__name__
            own.mkdir()
            found.append(job(1, memory.measure, way, int(size * MEMORY_SHARE), own))
            shutil.rmtree(own)
        return {"ways": found}

    def resharded(directory: Path) -> dict[str, Any]:
        part = int(size * RESHARD_SHARE)
        before = job(4, reshard.save, part, directory)
        after = job(3, reshard.restore, part, runs, directory)
        if before["checksum"] != after["checksum"]:
            raise RuntimeError("reshard: what 3 ranks restored is not what 4 ranks saved")
        return after

    return {
        "save": lambda directory: job(1, save.measure, SAVES, size, runs, directory),
        "save 2 ranks": lambda directory: job(2, save.measure, SAVES, two_ranks_size, runs, directory),
        "many_tensors": lambda directory: job(1, many_tensors.measure, parameters, max(runs, SMALL_SAVES), directory),
        "loop": lambda directory: job(1, loop.measure, LOOP_WAYS, int(size * LOOP_SHARE), runs, directory),
        "restore": lambda directory: job(1, restore.measure, LOADS, size, runs, directory),
        "restore 2 ranks": lambda directory: job(2, restore.measure, LOADS_OF_TWO, two_ranks_size, runs, directory),
        "memory": memories,
        "reshard": resharded,
        "listing": lambda directory: job(1, listing.measure, snapshots, runs, directory),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the state")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each case, after one that warms up")
    parser.add_argument("--snapshots", type=int, default=1000, help="how many snapshots to list")
    parser.add_argument("--parameters", type=int, default=2000, help="parameters of the state of many tensors")
    parser.add_argument("--directory", type=Path, default=ROOT / "build", help="on the disk that is measured")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", nargs="+", help="some of the questions")
    given = parser.parse_args()
    asked = questions(int(given.gib * 2**30), given.runs, given.snapshots, given.parameters)
    if unknown := set(given.only or ()) - asked.keys():
        parser.error(f"no such question: {', '.join(sorted(unknown))}; there are: {', '.join(asked)}")
    given.directory.mkdir(parents=True, exist_ok=True)
    given.results.mkdir(parents=True, exist_ok=True)
    needed = given.gib * 2**30 * (given.runs + OTHERS_ON_DISK)
    if (free := shutil.disk_usage(given.directory).free) < needed:
        parser.error(f"{given.directory} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} are needed")
    records: dict[str, dict[str, Any]] = {}
    start = time.monotonic()
    for name in given.only or asked:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=given.directory) as directory:
            since = time.monotonic()
            answer = asked[name](Path(directory))
            records[name] = record(name, Path(directory), **answer, took_seconds=round(time.monotonic() - since, 1))
        with (given.results / f"{name.split()[0]}.jsonl").open("a") as file:
            file.write(json.dumps(records[name]) + "\n")
        # After each question: what is known is there, should a later one fail.
        text = report.markdown(records, ASYNCHRONOUS)
        (given.results / "table.md").write_text(text)
        report.plots(records, given.results)
        print(f"{name}: {records[name]['took_seconds']} s", file=sys.stderr, flush=True)
    print(text)
    print(f"took {time.monotonic() - start:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
