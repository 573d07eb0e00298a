"""Which boxes of the whole tensor a DTensor's local part holds, and on which ranks: functions of its placements."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from functools import lru_cache

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, placement_types
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from fastckpt.format.shard import Box

Run = tuple[int, int, int]
"""Of one dimension: where a run of indices starts in the local tensor, where in the whole, and how long it is."""


def local_boxes(tensor: DTensor, key: str) -> list[tuple[Box, Box]]:
    """The boxes this rank holds, each with the box of the local tensor that has its elements; none if it holds none.

    ``ValueError`` naming ``key`` for placements that no box can describe.
    """
    for placement in tensor.placements:
        if isinstance(placement, Partial):
            raise ValueError(f"{key}: a Partial DTensor holds sums not yet made; redistribute it before saving")
        if not isinstance(placement, Replicate | ShardPlacement | _StridedShard):
            raise ValueError(
                f"{key}: cannot save a DTensor with placement {placement}; redistribute it to Shard or Replicate before"
            )
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is not in the mesh
        return []
    sizes = tuple(mesh.size(dim) for dim in range(mesh.ndim))
    runs = _runs(tuple(tensor.shape), tuple(tensor.placements), sizes, tuple(coordinate))
    boxes = []
    for combination in itertools.product(*runs):
        sizes = tuple(length for _, _, length in combination)
        boxes.append(
            (Box(tuple(at for _, at, _ in combination), sizes), Box(tuple(at for at, _, _ in combination), sizes))
        )
    return boxes


def mesh_ranks(tensor: DTensor) -> tuple[int, ...]:
    """The ranks among which the placements of ``tensor`` tell who holds what, sorted."""
    mesh = tensor.device_mesh
    if mesh not in _RANKS:  # which torch works out anew each time
        _RANKS[mesh] = tuple(sorted(mesh.mesh.flatten().tolist()))
    return _RANKS[mesh]


_RANKS: weakref.WeakKeyDictionary[DeviceMesh, tuple[int, ...]] = weakref.WeakKeyDictionary()


@lru_cache(maxsize=65536)
def _runs(
    shape: tuple[int, ...], placements: Sequence[object], mesh: tuple[int, ...], coordinate: tuple[int, ...]
) -> tuple[tuple[Run, ...], ...]:
    indices: list[list[int] | range] = [range(size) for size in shape]
    for placement, size, at in zip(placements, mesh, coordinate, strict=True):
        if isinstance(placement, _StridedShard):
            held = indices[placement.dim]
            _, offsets = placement._local_shard_size_and_offset(
                len(held), size, at, offset_mode=placement_types._StridedShardOffsetMode.ALL
            )
            assert isinstance(offsets, list)
            indices[placement.dim] = [held[offset] for offset in offsets]
        elif isinstance(placement, ShardPlacement):
            held = indices[placement.dim]
            length, offset = ShardPlacement.local_shard_size_and_offset(len(held), size, at)
            indices[placement.dim] = held[offset : offset + length]
    return tuple(tuple(_consecutive(held)) for held in indices)


def _consecutive(held: list[int] | range) -> list[Run]:
    if isinstance(held, range):
        return [(0, held.start, len(held))] if held else []
    runs: list[Run] = []
    for local, index in enumerate(held):
        if runs and index == runs[-1][1] + runs[-1][2]:
            start, at, length = runs[-1]
            runs[-1] = (start, at, length + 1)
        else:
            runs.append((local, index, 1))
    return runs
