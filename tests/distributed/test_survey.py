"""What is found of a sharded state is used again by the next save, through training, until its placement changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor import distribute_tensor

import fastckpt
from fastckpt import Checkpointer, Shard
from fastckpt.job.state import Describer

pytestmark = pytest.mark.distributed


def placed_anew(url: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    whole = torch.arange(16.0).reshape(4, 4)
    rank = dist.get_rank()
    state = {
        "model": model,
        "optimizer": optimizer,
        "table": distribute_tensor(whole, mesh, [ShardPlacement(0)]),
        "box": Shard(torch.full((2,), float(rank)), (2 * rank,), (4,)),
    }
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    describer = Describer()
    first = describer.describe(state).outline
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(torch.ones(1, 4))  # and leaves the parameters gathered
    assert describer.describe(state).outline is first
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state)
        state["box"] = Shard(state["box"].tensor, (2 - 2 * rank,), (4,))
        ckpt.save(2, state)
        state["table"] = distribute_tensor(whole, mesh, [ShardPlacement(1)])
        ckpt.save(3, state)
    assert describer.describe(state).outline is not first


def test_a_placement_that_changes_between_two_saves_is_noticed(tmp_path: Path) -> None:
    ranks.run(2, placed_anew, str(tmp_path))
    for step, box in ((1, [0, 0, 1, 1]), (2, [1, 1, 0, 0]), (3, [1, 1, 0, 0])):
        snapshot = fastckpt.open(str(tmp_path)).snapshot(step)
        assert snapshot.read("box").tolist() == box
        assert snapshot.read("table").tolist() == torch.arange(16.0).reshape(4, 4).tolist()


def forwards_without_backward(url: str) -> list[list[str]]:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(4, 4)), nn.Linear(4, 4))
    fully_shard(model[0], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(url) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state).wait()
            with torch.no_grad():
                model(torch.ones(1, 4))
        assert ckpt.restore(state) == 2
        return [snapshot.keys() for snapshot in ckpt.snapshots()]


def test_what_a_forward_left_gathered_in_a_wrapper_is_let_go_of(tmp_path: Path) -> None:
    first, second = ranks.run(2, forwards_without_backward, str(tmp_path))[0]
    assert second == first


def averages(url: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = fully_shard(nn.Linear(4, 4, bias=False), mesh=mesh)
    average = {"weight": model.weight.detach()}
    state = {"model": model, "average": average}
    with Checkpointer(url) as ckpt:
        ckpt.save(1, state)
        average["weight"] = torch.full_like(average["weight"], 7.0)
        ckpt.save(2, state)


def test_a_distributed_tensor_of_a_value_that_is_a_parameters_no_more_is_noticed(tmp_path: Path) -> None:
    ranks.run(2, averages, str(tmp_path))
    first, second = fastckpt.open(str(tmp_path)).snapshots()
    assert first.read("average.weight").tolist() == first.read("model.weight").tolist()
    assert second.read("average.weight").tolist() == [[7.0] * 4] * 4
    assert second.read("model.weight").tolist() == first.read("model.weight").tolist()
