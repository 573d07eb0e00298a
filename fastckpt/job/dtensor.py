"""Which boxes of the whole tensor a DTensor's local part holds, and on which ranks: functions of its placements.

Most placements split by the rule of ``format/families``. Then a rank need not say which box is its own.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from functools import lru_cache

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, placement_types
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from fastckpt.format.families import Mesh, mesh_of, split_box
from fastckpt.format.shard import Box

Splits = tuple[tuple[int, int], ...]
"""Pairs (dimension of the tensor, dimension of the mesh)."""
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


def mesh_ranks(tensor: DTensor) -> tuple[Mesh, tuple[int, ...]]:
    """The mesh of a tensor, and its ranks, sorted: those among which its placements tell who holds what."""
    device_mesh = tensor.device_mesh
    if device_mesh not in _MESHES:
        ranks = device_mesh.mesh.numpy(force=True)
        _MESHES[device_mesh] = mesh_of(ranks), tuple(sorted(ranks.reshape(-1).tolist()))
    return _MESHES[device_mesh]


_MESHES: weakref.WeakKeyDictionary[DeviceMesh, tuple[Mesh, tuple[int, ...]]] = weakref.WeakKeyDictionary()


def splits_of(tensor: DTensor, box: Box) -> Splits | None:
    """How the rule splits a tensor of which this rank holds ``box``; None for placements that it does not describe."""
    mesh = tensor.device_mesh
    sizes = tuple(mesh.size(dim) for dim in range(mesh.ndim))
    splits = _splits(tuple(tensor.shape), tuple(tensor.placements), sizes)
    coordinate = mesh.get_coordinate()
    if splits is None or coordinate is None:
        return None
    return splits if split_box(tensor.shape, splits, sizes, dict(enumerate(coordinate))) == box else None


@lru_cache(maxsize=65536)
def _splits(shape: tuple[int, ...], placements: Sequence[object], sizes: tuple[int, ...]) -> Splits | None:
    found: list[tuple[int, int]] = []
    strided: set[int] = set()
    for axis, placement in reversed(list(enumerate(placements))):
        if not isinstance(placement, ShardPlacement | _StridedShard) or sizes[axis] == 1:
            continue
        dim, at = placement.dim % len(shape), 0
        if isinstance(placement, _StridedShard):
            # It takes its part of each of ``split_factor`` parts, into which dimensions behind its own have cut.
            strided.add(dim)
            parts = 1
            while parts != placement.split_factor and at < len(found):
                other, behind = found[at]
                parts *= sizes[behind] if other == dim else 1
                at += 1
            if parts != placement.split_factor:
                return None
        found.insert(at, (dim, axis))
    if any(shape[dim] % math.prod(sizes[axis] for other, axis in found if other == dim) for dim in strided):
        return None  # cut unevenly, it holds many runs
    return tuple(found)


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
