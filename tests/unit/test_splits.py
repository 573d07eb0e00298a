"""The rule by which ranks are said to split a tensor is what DTensor's placements do."""

from __future__ import annotations

import itertools

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fastckpt.format.families import split_box
from fastckpt.format.shard import Box
from fastckpt.job import dtensor

SHAPES = [(12, 3), (7, 5), (2, 24), (1, 1), (16, 8)]
MESHES = [(4,), (3, 2), (2, 1, 3), (2, 2, 2)]


def held(
    shape: tuple[int, ...], placements: tuple[object, ...], sizes: tuple[int, ...], at: tuple[int, ...]
) -> list[Box]:
    runs = dtensor._runs(shape, placements, sizes, at)
    return [Box(tuple(run[1] for run in one), tuple(run[2] for run in one)) for one in itertools.product(*runs)]


def test_shards_and_replicas_in_any_order_are_split_by_the_rule() -> None:
    for shape, sizes in itertools.product(SHAPES, MESHES):
        for placements in itertools.product((Replicate(), Shard(0), Shard(1)), repeat=len(sizes)):
            splits = dtensor._splits(shape, placements, sizes)
            assert splits is not None
            for at in itertools.product(*map(range, sizes)):
                box = split_box(shape, splits, sizes, dict(enumerate(at)))
                assert held(shape, placements, sizes, at) == ([box] if box.elements else [])


def test_strided_shards_are_split_by_the_rule_where_they_divide_evenly_and_not_otherwise() -> None:
    by_rule = listed = 0
    for shape, sizes in itertools.product(SHAPES, MESHES):
        choices = (Replicate(), Shard(0), *(_StridedShard(0, split_factor=factor) for factor in (2, 3, 4, 6)))
        for placements in itertools.product(choices, repeat=len(sizes)):
            if not any(isinstance(placement, _StridedShard) for placement in placements):
                continue
            if (splits := dtensor._splits(shape, placements, sizes)) is None:
                listed += 1
                continue
            by_rule += 1
            for at in itertools.product(*map(range, sizes)):
                box = split_box(shape, splits, sizes, dict(enumerate(at)))
                assert held(shape, placements, sizes, at) == ([box] if box.elements else [])
    assert by_rule > 10
    assert listed > 10


def test_what_fsdp_and_tensor_parallelism_do_to_the_same_dimension_is_split_by_the_rule() -> None:
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    assert dtensor._splits((16, 8), placements, (4, 2)) == ((0, 1), (0, 0))
    assert dtensor._splits((12, 8), placements, (4, 2)) is None
