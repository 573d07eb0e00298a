"""A process that saves two hundred times and restores fifty times has no more memory, descriptors or threads than at
the start, whether saves get through or fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SAVES = 200
RESTORES = 50
SETTLED = 20
"""Saves after which nothing may come any more."""
GROWTH_BYTES_MAX = 2 << 20
"""Between the most in the first half and the most in the second: 20 KiB a save, of which a third is what a process
remembers of a snapshot, and the rest what its allocator scatters. A save stages 800 KiB, in slots of 16 KiB."""

SCRIPT = """
import gc, json, os, sys, threading, weakref
from pathlib import Path

import torch

import fastckpt
from fastckpt import checkpointer as front
from fastckpt.storage.open import open_store

folder, saves, restores, failing = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "failing"
finished = 0


class Store:
    def __init__(self, store):
        self.store = store
        self.creates = 0

    def __getattr__(self, name):
        return getattr(self.store, name)

    def create(self, name, data):
        self.creates += 1
        if self.creates % 40 == 0:  # a part, an index or a decision
            raise fastckpt.StorageError("no answer", transient=True)
        self.store.create(name, data)

    def write(self, name, **hints):
        return Writer(self.store.write(name, **hints))


class Writer:
    def __init__(self, writer):
        self.append, self.abandon, self._finish = writer.append, writer.abandon, writer.finish

    def finish(self):
        global finished
        finished += 1
        if finished % 15 == 0:
            raise fastckpt.OutOfSpace("no room")
        return self._finish()


if failing:
    front.open_store = lambda url: Store(open_store(url))


def held():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kibibytes = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    names = {"descriptors": "fd", "threads": "task"}
    return {"bytes": kibibytes * 1024} | {name: len(os.listdir(f"/proc/self/{names[name]}")) for name in names}


torch.manual_seed(1)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(200, 150), torch.nn.Linear(150, 240))
optimizer = torch.optim.AdamW(model.parameters())
state = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState(), "epoch": 0}
during_saves, during_restores, alive, failed = [], [], [], 0
ckpt = fastckpt.Checkpointer(folder, options=fastckpt.Options(chunk_bytes=16384, staging_bytes_max=1 << 17))
for step in range(1, saves + 1):
    model(torch.randn(4, 200)).square().mean().backward()
    optimizer.step()
    state["epoch"] = step
    try:
        pending = ckpt.save(step, state)
        alive.append(weakref.ref(pending))
        pending.wait()
    except fastckpt.FastckptError:
        failed += 1
    pending = None
    during_saves.append(held())
for _ in range(restores):
    assert ckpt.restore(state) is not None
    during_restores.append(held())
try:
    ckpt.close()
except fastckpt.FastckptError:
    pass
gc.collect()
left = sum(reference() is not None for reference in alive)
committed = len(fastckpt.open(folder).snapshots())
told = {"saves": during_saves, "restores": during_restores, "failed": failed, "left": left, "committed": committed}
print(json.dumps(told))
"""


def run(folder: Path, storage: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(SAVES), str(RESTORES), storage],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # several would each keep what threads have given back
    )
    assert result.returncode == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def most(samples: list[dict[str, int]], what: str) -> int:
    return max(sample[what] for sample in samples)


@pytest.mark.parametrize("storage", ["working", "failing"])
def test_two_hundred_saves_and_fifty_restores_leave_nothing_behind(tmp_path: Path, storage: str) -> None:
    told = run(tmp_path / "run", storage)
    assert told["committed"] == SAVES - told["failed"]
    assert (told["failed"] > SAVES // 10) == (storage == "failing")
    assert told["left"] <= 1, "Pendings that nobody holds are kept"
    for samples in (told["saves"][SETTLED:], told["restores"]):
        earlier, later = samples[: len(samples) // 2], samples[len(samples) // 2 :]
        grown = most(later, "bytes") - most(earlier, "bytes")
        assert grown <= GROWTH_BYTES_MAX, f"{grown} bytes more in the second half"
        assert most(later, "descriptors") <= most(earlier, "descriptors")
        assert most(later, "threads") <= most(earlier, "threads") + 3  # calls to the storage that meet by chance
