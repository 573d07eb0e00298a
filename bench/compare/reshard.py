"""How many bytes a restore onto fewer ranks reads from storage: P-reshard, 4 ranks to 3 on one node.

Counted by the kernel (``read_bytes`` of ``/proc/self/io``, all ranks), in a restore that follows another one, with an
empty page cache.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from bench.compare.harness import drop_page_cache, together, world
from bench.compare.state import State, random_state, total
from bench.compare.ways import Fastckpt

PARAMETERS = 300


def save(size: int, directory: Path) -> dict[str, Any]:
    state = random_state(size, PARAMETERS)
    way = Fastckpt(state, directory)
    way.save(1)
    way.close()
    return {"ranks": world()[0], "checksum": checksum(state)}


def restore(size: int, runs: int, directory: Path) -> dict[str, Any]:
    state = random_state(size, PARAMETERS)
    way = Fastckpt(state, directory)
    read_bytes, seconds = [], []
    for _ in range(runs + 1):
        state.clear()
        together()
        if world()[1] == 0:
            drop_page_cache(directory)
        together()
        before, start = _read_bytes(), time.perf_counter()
        way.load(1)
        together()
        seconds.append(time.perf_counter() - start)
        read_bytes.append(total(_read_bytes() - before))
    way.close()
    return {
        "ranks": world()[0],
        "bytes": _whole_bytes(state),
        "checksum": checksum(state),
        "read_bytes": read_bytes[1:],
        "seconds": seconds[1:],
    }


def checksum(state: State) -> int:
    """Of the sharded tensors, however they are sharded: the sum of all bytes."""
    return total(sum(int(shard.view(torch.uint8).sum(dtype=torch.int64)) for _, shard in _shards(state)))


def _whole_bytes(state: State) -> int:
    """What is sharded, over all ranks, and once what every rank has."""
    sharded = sum(shard.nbytes for _, shard in _shards(state))
    return total(sharded) + state.bytes() - sharded


def _shards(state: State) -> list[tuple[str, torch.Tensor]]:
    found = []
    for name, part in state.state_dicts().items():
        for key, value in _leaves(part, name):
            if isinstance(value, DTensor):
                found.append((key, value.detach().to_local()))
    return found


def _leaves(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{name}.{key}")]
    return [(name, value)]


def _read_bytes() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])
