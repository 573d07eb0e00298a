"""Synthetic jobs: what the ranks of a transformer's training offer, without the tensors.

    fsdp    one mesh of all ranks, parameters and moments sharded in dimension 0; most ranks hold nothing of some
    hsdp    64 copies of a mesh of shards
    3d      pipeline, FSDP and tensor parallelism: 16 stages with keys of their own, FSDP and TP in one dimension
    ddp     every rank holds everything

``steps`` are plain tensors that optimizers keep on every rank, which must be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fastckpt.format.families import Mesh, mesh_of, split_box
from fastckpt.plan.save_plan import COMPARED, KNOWN, Offer, RankOffer

RANKS_A_NODE = 8
HIDDEN = 16_384
STAGES, TENSOR_PARALLEL = 16, 8

Splits = list[tuple[int, int]]


@dataclass(frozen=True)
class Tensor:
    key: str
    shape: list[int]
    splits: Splits
    mesh: Mesh | None
    """None: a plain tensor that every rank has."""


@dataclass(frozen=True)
class Job:
    """Ranks with one stage of the model, or all of it."""

    world_size: int
    stages: list[tuple[np.ndarray, list[Tensor]]]

    @property
    def nodes(self) -> list[int]:
        return [rank // RANKS_A_NODE for rank in range(self.world_size)]

    def offers(self) -> dict[int, RankOffer]:
        """By rank; equal ones are one object."""
        found: dict[int, RankOffer] = {}
        for ranks, unsorted in self.stages:
            tensors = sorted(unsorted, key=lambda tensor: tensor.key)
            meshes = list({id(tensor.mesh): tensor.mesh for tensor in tensors if tensor.mesh is not None}.values())
            numbers = {id(mesh): number for number, mesh in enumerate(meshes)}
            kinds: dict[bytes, RankOffer] = {}
            holds = [self._holds(tensor, ranks) for tensor in tensors]
            different = list({id(one): one for one in holds if one is not None}.values())
            for position, rank in enumerate(ranks.reshape(-1).tolist()):
                held = bytes(bool(one[position]) for one in different)
                if held not in kinds:
                    has = [one is None or bool(one[position]) for one in holds]
                    mine = [offer(tensor, numbers) for tensor, holding in zip(tensors, has, strict=True) if holding]
                    kinds[held] = RankOffer(mine, [[]], meshes)
                found[rank] = kinds[held]
        return found

    def _holds(self, tensor: Tensor, ranks: np.ndarray) -> np.ndarray | None:
        """For each rank whether it has any element of a tensor; None if all have."""
        if tensor.mesh is None or not tensor.splits:
            return None
        return _holding(tuple(tensor.shape), tuple(tensor.splits), ranks)


_HELD: dict[object, np.ndarray | None] = {}


def _holding(shape: tuple[int, ...], splits: tuple[tuple[int, int], ...], ranks: np.ndarray) -> np.ndarray | None:
    key = (shape, splits, ranks.shape)
    if key not in _HELD:
        held = np.ones(ranks.shape, bool)
        for dim, axis in splits:
            parts = -(-shape[dim] // -(-shape[dim] // ranks.shape[axis]))
            held[tuple(slice(parts, None) if at == axis else slice(None) for at in range(ranks.ndim))] = False
        _HELD[key] = None if held.all() else held.reshape(-1)
    return _HELD[key]


def offer(tensor: Tensor, numbers: dict[int, int]) -> Offer:
    if tensor.mesh is None:
        whole = [([0] * len(tensor.shape), tensor.shape)]
        return Offer(tensor.key, "float32", tensor.shape, whole, COMPARED, 0, "")
    return Offer(tensor.key, "float32", tensor.shape, [], KNOWN, 0, "", numbers[id(tensor.mesh)], tensor.splits)


def layers(count: int) -> Iterator[tuple[str, list[int], str]]:
    """Names, shapes and the way tensor parallelism cuts them, of a transformer's parameters."""
    yield "embed.weight", [262_144, HIDDEN], "rows"
    for layer in range(count):
        for name in ("q", "k", "v"):
            yield f"layers.{layer}.attention.{name}.weight", [HIDDEN, HIDDEN], "rows"
        yield f"layers.{layer}.attention.out.weight", [HIDDEN, HIDDEN], "columns"
        for name in ("gate", "up"):
            yield f"layers.{layer}.mlp.{name}.weight", [4 * HIDDEN, HIDDEN], "rows"
        yield f"layers.{layer}.mlp.down.weight", [HIDDEN, 4 * HIDDEN], "columns"
        for name in ("attention", "mlp"):
            yield f"layers.{layer}.{name}.norm.weight", [HIDDEN], "copies"
    yield "head.weight", [262_144, HIDDEN], "rows"


def with_optimizer(name: str, shape: list[int], splits: Splits, mesh: Mesh) -> Iterator[Tensor]:
    yield Tensor(f"model.{name}", shape, splits, mesh)
    for entry in ("exp_avg", "exp_avg_sq"):
        yield Tensor(f"optimizer.state.{name}.{entry}", shape, splits, mesh)
    yield Tensor(f"optimizer.state.{name}.step", [], [], None)


def keys_of(keys: int) -> int:
    """Layers that make about so many keys."""
    return max(1, round((keys / 4 - 2) / 9))


def fsdp(world_size: int, keys: int) -> Job:
    ranks = np.arange(world_size)
    mesh = mesh_of(ranks)
    tensors = [t for name, shape, _ in layers(keys_of(keys)) for t in with_optimizer(name, shape, [(0, 0)], mesh)]
    return Job(world_size, [(ranks, tensors)])


def hsdp(world_size: int, keys: int) -> Job:
    ranks = np.arange(world_size).reshape(min(64, world_size), -1)
    mesh = mesh_of(ranks)
    tensors = [t for name, shape, _ in layers(keys_of(keys)) for t in with_optimizer(name, shape, [(0, 1)], mesh)]
    return Job(world_size, [(ranks, tensors)])


def three_d(world_size: int, keys: int) -> Job:
    """Stages outermost; tensor parallelism within a node."""
    grid = np.arange(world_size).reshape(STAGES, -1, TENSOR_PARALLEL)
    cuts: dict[str, Splits] = {
        "rows": [(0, 1), (0, 0)],  # tensor parallelism first, then FSDP: what torch calls a strided shard
        "columns": [(0, 0), (1, 1)],
        "copies": [(0, 0)],
    }
    parameters = list(layers(keys_of(keys)))
    a_stage = -(-len(parameters) // STAGES)
    stages = []
    for stage, ranks in enumerate(grid):
        mesh = mesh_of(ranks)
        mine = parameters[stage * a_stage : (stage + 1) * a_stage]
        stages.append((ranks, [t for name, shape, cut in mine for t in with_optimizer(name, shape, cuts[cut], mesh)]))
    return Job(world_size, stages)


def ddp(world_size: int, keys: int) -> Job:
    """Of a model small enough for one rank: a sixteenth in each dimension."""
    ranks = np.arange(world_size)
    mesh = mesh_of(ranks)
    small = [(name, [size // 64 for size in shape]) for name, shape, _ in layers(keys_of(keys))]
    return Job(world_size, [(ranks, [t for name, shape in small for t in with_optimizer(name, shape, [], mesh)])])


JOBS: dict[str, Callable[[int, int], Job]] = {"fsdp": fsdp, "hsdp": hsdp, "3d": three_d, "ddp": ddp}


def wanted(job: Job, rank: int) -> Iterator[tuple[str, object]]:
    """Keys and boxes that a rank of a job holds."""
    for ranks, tensors in job.stages:
        ((*at,),) = np.argwhere(ranks == rank).tolist() or ((None,),)
        if at == [None]:
            continue
        coordinate = dict(enumerate(at))
        for tensor in tensors:
            yield tensor.key, split_box(tensor.shape, tensor.splits, ranks.shape, coordinate)
