"""Metadata of a job of very many ranks: what offers, layout, parts, index and commit take.

    python -m bench.metadata [--ranks N] [--keys N] [--jobs fsdp hsdp 3d ddp] [--directory DIR]

The library's own code runs for every rank that matters: one that describes its DTensors, the coordinator, each node's
leader, a rank that is told the layout, and one that restores; no tensor is read and no pack written. Each of these is a
process of its own, so that the peak of memory is its own. Prints a line of JSON for each job: bytes, seconds, and per
exchange what a node sends.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from bench.metadata import jobs
from bench.metadata.crowd import Crowd
from fastckpt.agreement import agreed
from fastckpt.format import names
from fastckpt.options import Options
from fastckpt.plan.restore_plan import Selection, Want
from fastckpt.plan.save_plan import Agreement
from fastckpt.repository.repository import Repository
from fastckpt.restore import values_of
from fastckpt.save import STREAMS, Saves
from fastckpt.storage.local import LocalStore
from fastckpt.trace import Trace

STAGES = ("describing", "saving", "taking", "restoring")


class Store(LocalStore):
    """Parts are other nodes' to write, so they are not synced here; reads of metadata are counted."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._path = Path(path)
        self.read_bytes: dict[str, int] = {}

    def create(self, name: str, data: bytes) -> None:
        if "/part-" not in name:
            super().create(name, data)
            return
        (self._path / name).parent.mkdir(parents=True, exist_ok=True)
        (self._path / name).write_bytes(data)

    def read(self, name: str, *, size_max: int) -> bytes:
        data = super().read(name, size_max=size_max)
        self.read_bytes[name] = len(data)
        return data


def peak_bytes() -> int:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def saving(job: jobs.Job, directory: str) -> dict[str, Any]:
    """The coordinator: two saves. The first agrees on a layout; the second finds all as it was."""
    store = Store(directory)
    offers = job.offers()
    crowd = Crowd(offers, job.nodes)
    saves = Saves(store, crowd, Options())
    before = peak_bytes()
    for step in (1, 2):
        crowd.begin(step, saves)
        attempt = saves.agree(step, crowd.kinds[0], Trace())
        crowd.commit(attempt)
    layout = attempt.agreed.layout
    (Path(directory) / "agreement").write_bytes(msgspec.msgpack.encode(Agreement(attempt.agreed.data, [])))
    index = store.read(names.index(attempt.id), size_max=2**30)
    return {
        "kinds": len(set(map(id, offers.values()))),
        "offer_bytes": max(
            len(msgspec.msgpack.encode(offer)) for offer in {id(o): o for o in offers.values()}.values()
        ),
        "keys": len(layout.keys),
        "families": len(layout.families),
        "shards": sum(attempt.agreed.chunks.shard_count(key) for key in range(len(layout.keys))),
        "chunks": len(attempt.agreed.chunks),
        "chunk_bytes": layout.chunk_bytes,
        "state_bytes": layout.bytes(),
        "layout_bytes": len(attempt.agreed.data),
        "index_bytes": len(index),
        "exchanges": [
            {
                "name": one.name,
                "coordinator_seconds": round(one.seconds, 3),
                "line_bytes_median": sorted(one.line_bytes)[len(one.line_bytes) // 2],
                "line_bytes_max": max(one.line_bytes),
                "answer_bytes": one.answer_bytes,
            }
            for one in crowd.exchanged
        ],
        "offers_memory_bytes": before,
        "coordinator_memory_bytes": peak_bytes(),
    }


def taking(job: jobs.Job, directory: str) -> dict[str, Any]:
    """A rank that is told the layout."""
    agreement = msgspec.msgpack.decode((Path(directory) / "agreement").read_bytes(), type=Agreement)
    begin = time.perf_counter()
    taken = agreed(agreement, job.world_size // 3, STREAMS)
    return {
        "rank_seconds": round(time.perf_counter() - begin, 3),
        "rank_chunks": len(taken.mine),
        "rank_memory_bytes": peak_bytes(),
    }


def restoring(job: jobs.Job, half: jobs.Job, directory: str) -> dict[str, Any]:
    """A rank of a job of half the size."""
    store = Store(directory)
    rank = half.world_size // 3
    snapshot = Repository(store).snapshot()
    store.read_bytes.clear()
    begin = time.perf_counter()
    wants = []
    for target, (key, box) in enumerate(jobs.wanted(half, rank)):
        number = snapshot.key_number(key)
        assert number is not None
        if box.elements:
            wants.append(Want(number, box, target))
    reads = snapshot.plan(wants)
    own = {name: size for name, size in store.read_bytes.items() if "/part-" in name}
    values_of(snapshot, rank, half.world_size, Selection())
    layout = store.read_bytes[names.layout(snapshot.index.layout)]
    total = sum(store.read_bytes.values())
    return {
        "restore_seconds": round(time.perf_counter() - begin, 3),
        "restore_chunks": len(reads),
        "restore_own_bytes": layout + sum(own.values()),
        "restore_parts": len(own),
        "restore_read_bytes": total,
        "restore_more": round(total / (layout + sum(own.values())) - 1, 4),
        "restore_memory_bytes": peak_bytes(),
    }


def run(stage: str, job: jobs.Job, half: jobs.Job, directory: str) -> dict[str, Any]:
    match stage:
        case "describing":
            from bench.metadata.describe import describing  # needs torch

            return describing(job, job.world_size // 3)
        case "saving":
            return saving(job, directory)
        case "taking":
            return taking(job, directory)
    return restoring(job, half, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=131_072)
    parser.add_argument("--keys", type=int, default=10_000)
    parser.add_argument("--jobs", nargs="+", choices=jobs.JOBS, default=list(jobs.JOBS))
    parser.add_argument("--output", help="a file to append the lines to")
    parser.add_argument("--directory", help="where the repositories are; a temporary one if it is not given")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        (name,) = options.jobs
        job = jobs.JOBS[name](options.ranks, options.keys)
        print(json.dumps(run(options.stage, job, jobs.JOBS[name](options.ranks // 2, options.keys), options.directory)))
        return
    for name in options.jobs:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            found: dict[str, Any] = {"job": name, "ranks": options.ranks}
            for stage in STAGES:
                command = [sys.executable, "-m", "bench.metadata", "--stage", stage, "--jobs", name]
                command += ["--ranks", str(options.ranks), "--keys", str(options.keys), "--directory", directory]
                result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found |= json.loads(result.stdout)
            line = json.dumps({"command": " ".join(sys.argv[1:]), "python": sys.version.split()[0], **found})
            print(line, flush=True)
            if options.output:
                with open(options.output, "a") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
