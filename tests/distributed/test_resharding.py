"""Distributed tensors of every dtype and any shape: whatever the placements then and now, the bytes come back."""

from __future__ import annotations

import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import raw
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import fastckpt
from fastckpt import Checkpointer, Options

pytestmark = pytest.mark.distributed

SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)
DTYPES = ["float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool", "complex64", "float8_e4m3fn"]
WORLDS = [4, 2, 3, 1, 4]


def shapes(seed: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape by key: 0-d, empty, a few that span several chunks, many small ones."""
    choose = random.Random(seed)
    found = {}
    for number in range(36):
        dims = choose.choice(
            [(), (0,), (3, 0, 2), *[tuple(choose.randrange(1, 9) for _ in range(n)) for n in (1, 2, 2, 3)]]
        )
        found[f"t{number}"] = (choose.choice(DTYPES), dims)
    found["tall"] = ("float32", (211, 13))
    found["wide"] = ("bfloat16", (3, 5003))
    found["cube"] = ("float16", (7, 60, 9))
    return found


def value(key: str, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The same random bits on every rank and in every job."""
    item = getattr(torch, dtype).itemsize
    generator = np.random.default_rng(zlib.crc32(key.encode()))
    data = generator.integers(0, 2 if dtype == "bool" else 256, int(np.prod(shape)) * item, dtype=np.uint8)
    if not data.size:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)


def mesh_of(choose: random.Random) -> DeviceMesh:
    world = dist.get_world_size()
    return init_device_mesh("cpu", (2, 2) if world == 4 and choose.random() < 0.7 else (world,))


def placements(mesh: DeviceMesh, dims: int, choose: random.Random) -> list[Placement]:
    options: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(dims) for _ in range(2))]
    return [choose.choice(options) for _ in range(mesh.ndim)]


def place(full: torch.Tensor, mesh: DeviceMesh, layout: list[Placement]) -> DTensor:
    return distribute_tensor(full, mesh, layout, src_data_rank=None)


def leg(seed: int, folder: str, number: int) -> None:
    choose = random.Random(f"{seed} {number}")
    mesh = mesh_of(choose)
    expected: dict[str, DTensor] = {}
    state: dict[str, object] = {}
    by_dcp: dict[str, DTensor] = {}
    for key, (dtype, shape) in shapes(seed).items():
        full = value(key, dtype, shape)
        layout = placements(mesh, len(shape), choose)
        expected[key] = place(full, mesh, layout)
        state[key] = place(torch.zeros(full.shape, dtype=torch.uint8).to(full.dtype), mesh, layout)
        if full.numel():  # dcp cannot load some empty ones
            by_dcp[key] = place(torch.zeros(full.shape, dtype=torch.uint8).to(full.dtype), mesh, layout)
    with Checkpointer(f"{folder}/fastckpt", options=SMALL) as ckpt:
        if number:
            assert ckpt.restore(state) == number - 1
            dcp.load(by_dcp, checkpoint_id=f"{folder}/dcp-{number - 1}")
            for key, tensor in expected.items():
                got = state[key]
                assert isinstance(got, DTensor)
                assert got.placements == tensor.placements
                assert raw(got.to_local()) == raw(tensor.to_local()), f"{key} {tensor.placements} on {mesh}"
                if key in by_dcp:
                    assert raw(got.to_local()) == raw(by_dcp[key].to_local()), f"{key}: unlike dcp"
        ckpt.save(number, dict(state) if number else dict(expected))
    dcp.save({key: expected[key] for key in by_dcp}, checkpoint_id=f"{folder}/dcp-{number}")


@pytest.mark.parametrize("seed", range(4))
def test_any_placement_restores_into_any_other_bit_for_bit_as_with_dcp(tmp_path: Path, seed: int) -> None:
    for number, world in enumerate(WORLDS):
        ranks.run(world, leg, seed, str(tmp_path), number)
    snapshot = fastckpt.open(str(tmp_path / "fastckpt")).snapshot()
    for key, (dtype, shape) in shapes(seed).items():
        assert snapshot.read(key).tobytes() == raw(value(key, dtype, shape)), key


def nested(url: str) -> list[bytes]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = value("inside", "float32", (7, 3))

    class Sharded:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.inside = {"deep": [distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)]}

        def state_dict(self) -> dict[str, list[DTensor]]:
            return self.inside

        def load_state_dict(self, state: dict[str, list[DTensor]]) -> None:
            self.inside = state

    with Checkpointer(url, options=SMALL) as ckpt:
        fresh = Sharded(torch.zeros(7, 3))
        if ckpt.restore({"it": fresh}) is None:
            ckpt.save(1, {"it": Sharded(full)}).wait()
            assert ckpt.restore({"it": fresh}) == 1
        return [raw(fresh.inside["deep"][0].full_tensor()), raw(full)]


def test_a_distributed_tensor_inside_a_stateful_is_one_tensor_at_any_world_size(tmp_path: Path) -> None:
    for world in (2, 3):
        for restored, saved in ranks.run(world, nested, str(tmp_path)):
            assert restored == saved


def partial(url: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sums = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with Checkpointer(url) as ckpt:
        with pytest.raises(ValueError, match="sums: a Partial DTensor holds sums not yet made; redistribute"):
            ckpt.save(1, {"sums": sums})
        ckpt.save(1, {"sums": sums.redistribute(mesh, [Replicate()])})


def test_a_partial_tensor_is_refused_by_name(tmp_path: Path) -> None:
    ranks.run(2, partial, str(tmp_path))
    assert fastckpt.open(str(tmp_path)).snapshot(1).read("sums").tolist() == [2.0, 2.0, 2.0]
