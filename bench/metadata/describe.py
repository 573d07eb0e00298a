"""One rank's state of a synthetic job: real DTensors of a process group that only pretends to be one.

That what it offers is what ``jobs`` says it offers, is checked.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.metadata.jobs import Job, Tensor
from fastckpt.format.families import split_box
from fastckpt.job.state import Describer


def placements(tensor: Tensor, sizes: tuple[int, ...]) -> list[Placement]:
    """What torch calls the splits."""
    found: list[Placement] = [Replicate()] * len(sizes)
    for number, (dim, axis) in enumerate(tensor.splits):
        before = [other for at, other in tensor.splits[:number] if at == dim and other > axis]
        found[axis] = _StridedShard(dim, split_factor=sizes[before[0]]) if before else Shard(dim)
    return found


def state_of(job: Job, rank: int) -> dict[str, torch.Tensor]:
    """Memory is set aside and not touched."""
    state: dict[str, torch.Tensor] = {}
    for ranks, tensors in job.stages:
        at = (ranks == rank).nonzero()
        if not at[0].size:
            continue
        mesh = DeviceMesh("cpu", torch.from_numpy(ranks.copy()))
        coordinate = {axis: int(where[0]) for axis, where in enumerate(at)}
        for tensor in tensors:
            if tensor.mesh is None:
                state[tensor.key] = torch.zeros(tensor.shape)
                continue
            shape = torch.Size(tensor.shape)
            local = torch.empty(split_box(shape, tensor.splits, ranks.shape, coordinate).sizes)
            stride = torch.empty(shape, device="meta").stride()
            placed = placements(tensor, ranks.shape)
            state[tensor.key] = DTensor.from_local(local, mesh, placed, run_check=False, shape=shape, stride=stride)
    return state


def describing(job: Job, rank: int) -> dict[str, Any]:
    """How long a rank takes to describe its state, the first time and once it is known."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job.world_size)
    state, describer, seconds = state_of(job, rank), Describer(), []
    for _ in range(2):
        begin = time.perf_counter()
        described = describer.describe(state)
        seconds.append(round(time.perf_counter() - begin, 3))
    assert described.outline.offer == job.offers()[rank], "jobs.py says something else"
    return {"describe_seconds": seconds[0], "describe_again_seconds": seconds[1]}
