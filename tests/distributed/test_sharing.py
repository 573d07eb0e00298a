"""What ranks hold in common and what each has of its own: stored once, kept apart, or refused; never mixed up."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from jobs import build, prints, rank, raw, same, train, whole
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastckpt
from fastckpt import Checkpointer, Options, RNGState, Shard, StateMismatch

pytestmark = pytest.mark.distributed

SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)


def normed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8))


def save_batch_norm(url: str) -> dict[str, bytes]:
    model = DistributedDataParallel(normed(1), broadcast_buffers=False)
    torch.manual_seed(rank())
    for _ in range(3):
        model(torch.randn(5, 3)).sum().backward()
    own = {name: raw(buffer) for name, buffer in model.module.named_buffers()}
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(3, {"model": model})
    return own


def restore_batch_norm(url: str) -> dict[str, bytes]:
    model = DistributedDataParallel(normed(1), broadcast_buffers=False)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore({"model": model})
    return {name: raw(buffer) for name, buffer in model.module.named_buffers()}


@pytest.mark.parametrize("world", [1, 2, 3])
def test_batch_norm_statistics_that_differ_are_those_of_the_lowest_rank_everywhere(tmp_path: Path, world: int) -> None:
    saved = ranks.run(3, save_batch_norm, str(tmp_path))
    assert saved[0]["1.running_mean"] != saved[1]["1.running_mean"] != saved[2]["1.running_mean"]
    assert same(ranks.run(world, restore_batch_norm, str(tmp_path))) == saved[0]


def save_what_ddp_ignores(url: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.fill_(rank())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["1.weight", "1.bias"])
    state = {"outer": nn.ModuleList([DistributedDataParallel(model)])}
    with (
        Checkpointer(url, options=SMALL) as ckpt,
        pytest.raises(ValueError, match=r"^outer\.0\.1\.weight: differs .*rank 1"),
    ):
        ckpt.save(1, state).wait()


def test_parameters_that_ddp_was_told_to_ignore_are_not_taken_to_be_equal(tmp_path: Path) -> None:
    ranks.run(2, save_what_ddp_ignores, str(tmp_path))


def save_experts(url: str) -> torch.Tensor:
    torch.manual_seed(rank())
    expert = nn.Linear(3, 2)
    with Checkpointer(url, options=SMALL) as ckpt:
        with pytest.raises(
            ValueError, match=r"expert\.bias: differs between ranks \(rank 0 from rank 1 from rank 2\)"
        ) as one:
            ckpt.save(1, {"expert": expert})
        assert "fastckpt.Shard(tensor, offsets, shape)" in str(one.value)
        with pytest.raises(ValueError, match="expert: differs between ranks"):
            ckpt.save(1, {"expert": expert.weight.detach().clone()})
        assert ckpt.snapshots() == []
        shard = Shard(expert.weight.detach()[None], offsets=(rank(), 0, 0), shape=(3, 2, 3))
        ckpt.save(1, {"experts": shard}).wait()
    return expert.weight.detach()


def restore_experts(url: str) -> torch.Tensor:
    """Three experts on two ranks: the first has two."""
    mine = torch.zeros(2 - rank(), 2, 3)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore({"experts": Shard(mine, offsets=(2 * rank(), 0, 0), shape=(3, 2, 3))})
    return mine


def test_local_experts_under_one_key_are_refused_and_as_shards_restore_at_any_world_size(tmp_path: Path) -> None:
    saved = ranks.run(3, save_experts, str(tmp_path))
    assert not torch.equal(saved[0], saved[1])
    assert torch.equal(torch.cat(ranks.run(2, restore_experts, str(tmp_path))), torch.stack(saved))


def drifting(url: str) -> None:
    """Hand-made data parallelism: equal at first, and only as long as nobody makes a mistake."""
    torch.manual_seed(0)
    model = nn.Linear(40, 40)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model}).wait()
        if rank() == 1:
            with torch.no_grad():
                model.bias += 1
        with pytest.raises(ValueError, match=r"model\.bias: differs between ranks \(rank 0 from rank 1\)"):
            ckpt.save(2, {"model": model}).wait()
        with torch.no_grad():
            model.bias.fill_(7)
        ckpt.save(2, {"model": model}).wait()
        assert [snapshot.step for snapshot in ckpt.snapshots()] == [1, 2]


def test_replicas_are_compared_again_at_every_save(tmp_path: Path) -> None:
    ranks.run(2, drifting, str(tmp_path))


class Tied(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(32, 24)
        self.head = nn.Linear(24, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x))


def save_tied(url: str) -> bytes:
    model = DistributedDataParallel(Tied(1))
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model})
    return raw(model.module.head.weight)


def restore_tied(url: str) -> bytes:
    model = Tied(2)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore({"model": model})
    assert model.head.weight is model.embed.weight
    return raw(model.head.weight)


def test_tied_weights_are_stored_once_and_restored_tied(tmp_path: Path) -> None:
    saved = same(ranks.run(2, save_tied, str(tmp_path)))
    assert fastckpt.open(str(tmp_path)).snapshot().layout.bytes() == len(saved)
    assert same(ranks.run(3, restore_tied, str(tmp_path))) == saved


def save_values(url: str) -> None:
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"position": 10 * rank(), "epoch": 4, "seen": {"files": [f"shard-{rank()}"]}})


def restore_values(url: str) -> dict[str, Any]:
    state: dict[str, Any] = {"position": -1, "epoch": -1, "seen": None}
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore(state)
    return state


def refuse_values(url: str) -> int:
    state: dict[str, Any] = {"position": -1, "epoch": -1, "seen": None}
    with Checkpointer(url, options=SMALL) as ckpt:
        with pytest.raises(StateMismatch) as caught:
            ckpt.restore(state)
        assert "position: its value differed between the 3 ranks" in str(caught.value)
        assert "seen: its value differed" in str(caught.value)
        assert "only=" in str(caught.value)
        assert "epoch" not in str(caught.value)
        assert state == {"position": -1, "epoch": -1, "seen": None}
        ckpt.restore(state, only=("epoch",))
        assert state["position"] == -1
        partial = {"epoch": 0}
        ckpt.restore(partial)
        assert partial == {"epoch": 4}
    return int(state["epoch"])


def test_values_of_a_rank_go_back_to_it_and_at_another_world_size_only_common_ones_restore(tmp_path: Path) -> None:
    ranks.run(3, save_values, str(tmp_path))
    assert ranks.run(3, restore_values, str(tmp_path)) == [
        {"position": 10 * at, "epoch": 4, "seen": {"files": [f"shard-{at}"]}} for at in range(3)
    ]
    for world in (1, 2, 4):
        assert ranks.run(world, refuse_values, str(tmp_path)) == [4] * world


class Loader:
    """Tensors on both sides of the 64 KiB below which they travel inside the value; equal on all ranks or not."""

    def __init__(self, at: int) -> None:
        self.state = {
            "small": torch.full((3,), 1),
            "large": torch.arange(20_000),
            "own small": torch.full((3,), at),
            "own large": [torch.full((20_000 + at,), at, dtype=torch.float32)],
        }

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def shown(loader: Loader) -> list[Any]:
    return [loader.state[name].tolist() for name in ("small", "large", "own small")] + [
        loader.state["own large"][0].tolist()
    ]


def save_loader(url: str) -> list[Any]:
    loader = Loader(rank())
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"loader": loader})
    return shown(loader)


def restore_loader(url: str) -> list[Any]:
    loader = Loader(77)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore({"loader": loader})
    return shown(loader)


def refuse_loader(url: str) -> None:
    loader = Loader(77)
    with Checkpointer(url, options=SMALL) as ckpt, pytest.raises(StateMismatch, match="loader: its value differed"):
        ckpt.restore({"loader": loader})
    assert shown(loader) == shown(Loader(77))


def test_a_stateful_keeps_what_each_rank_had_and_stores_once_what_all_had(tmp_path: Path) -> None:
    saved = ranks.run(2, save_loader, str(tmp_path))
    layout = fastckpt.open(str(tmp_path)).snapshot().layout
    assert layout.keys.count("loader.large") == 1
    assert layout.keys.count("loader.own large.0") == 2
    assert ranks.run(2, restore_loader, str(tmp_path)) == saved
    ranks.run(3, refuse_loader, str(tmp_path))


def save_equal_loader(url: str) -> list[Any]:
    loader = Loader(5)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"loader": loader})
    return shown(loader)


def test_a_stateful_that_is_equal_on_all_ranks_restores_at_any_world_size(tmp_path: Path) -> None:
    saved = same(ranks.run(2, save_equal_loader, str(tmp_path)))
    for world in (1, 3):
        assert same(ranks.run(world, restore_loader, str(tmp_path))) == saved


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def save_streams(url: str) -> list[float]:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(rank() + 1)
    draw()
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"rng": RNGState()})
    return draw()


def restore_streams(url: str) -> list[float]:
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore({"rng": RNGState()})
    return draw()


def test_random_streams_go_on_and_at_another_world_size_are_new_the_same_way_every_time(tmp_path: Path) -> None:
    saved = ranks.run(2, save_streams, str(tmp_path))
    assert ranks.run(2, restore_streams, str(tmp_path)) == saved
    derived = ranks.run(3, restore_streams, str(tmp_path))
    assert ranks.run(3, restore_streams, str(tmp_path)) == derived
    for drawn in zip(*derived, *saved, strict=True):
        assert len(set(drawn)) == 5


def save_large(url: str) -> None:
    torch.manual_seed(1)
    model = DistributedDataParallel(nn.Sequential(*(nn.Linear(300, 301) for _ in range(4))))
    with Checkpointer(url, options=Options(chunk_bytes=65536, commit_seconds_max=30)) as ckpt:
        ckpt.save(1, {"model": model})


def test_replicated_bytes_are_written_once_and_evenly_by_all_replicas(tmp_path: Path) -> None:
    ranks.run(4, save_large, str(tmp_path))
    snapshot = fastckpt.open(str(tmp_path)).snapshot()
    written = [int(np.frombuffer(snapshot.table(rank).length, "<u4").sum()) for rank in range(4)]
    whole_bytes = 4 * 4 * 301 * (300 + 1)
    assert sum(written) == whole_bytes
    assert max(written) - min(written) <= 65536
    packs = sum(file.stat().st_size for file in (tmp_path / "packs").rglob("*.pack"))
    assert whole_bytes <= packs < whole_bytes * 1.02


class Two:
    """A generator and a discriminator, each with its own optimizer, and something frozen in one of them."""

    def __init__(self, seed: int, wrap: bool) -> None:
        torch.manual_seed(seed)
        plain = [nn.Linear(3, 3) for _ in range(2)]
        plain[0].bias.requires_grad_(False)
        self.models: list[nn.Module] = [DistributedDataParallel(model) if wrap else model for model in plain]
        first, second = self.models
        self.optimizers = [torch.optim.AdamW(first.parameters()), torch.optim.SGD(second.parameters(), 0.1, 0.9)]
        self.state = dict(zip(("g", "d", "g_optimizer", "d_optimizer"), [*self.models, *self.optimizers], strict=True))

    def train(self) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            train(model, optimizer, range(2))

    def prints(self) -> list[dict[str, str]]:
        return [prints(whole(*pair)) for pair in zip(self.models, self.optimizers, strict=True)]


def save_two(url: str) -> list[dict[str, str]]:
    two = Two(1, wrap=True)
    two.train()
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, two.state)
    return two.prints()


def restore_two(url: str) -> list[dict[str, str]]:
    two = Two(2, wrap=dist.get_world_size() > 1)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore(two.state)
    return two.prints()


def test_two_optimizers_and_a_frozen_parameter_restore_with_their_state(tmp_path: Path) -> None:
    saved = same(ranks.run(2, save_two, str(tmp_path)))
    assert "weight/exp_avg" in saved[0]
    assert "bias/exp_avg" not in saved[0]
    assert "bias/momentum_buffer" in saved[1]
    for world in (1, 3):
        assert same(ranks.run(world, restore_two, str(tmp_path))) == saved


def eval_then_save(url: str) -> tuple[dict[str, str], dict[str, str]]:
    model, optimizer = build("fsdp", seed=1)
    train(model, optimizer, range(2))
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with torch.no_grad():
        model(torch.ones(2, 3))  # leaves the root's parameters gathered
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, state).wait()
        saved = prints(whole(model, optimizer))
        train(model, optimizer, range(2, 3))
        with torch.no_grad():
            model(torch.ones(2, 3))
        ckpt.restore(state)
        return saved, prints(whole(model, optimizer))


def test_a_save_and_a_restore_right_after_an_evaluation_see_the_sharded_parameters(tmp_path: Path) -> None:
    saved, restored = same(ranks.run(2, eval_then_save, str(tmp_path)))
    assert restored == saved


def experts(url: str, swapped: bool) -> tuple[float, float]:
    """Two experts, one a rank, the second of which gets no gradient in the first two of five steps."""
    me = 1 - rank() if swapped else rank()
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1, 4))
    model.register_buffer("peak", torch.full((1,), float(me)))
    optimizer = torch.optim.AdamW(model.parameters())
    state = {
        "model": model,
        "optimizer": optimizer,
        "w": Shard(model.w, (me, 0), (2, 4)),
        "peak": Shard(model.peak, (me,), (2,)),
    }
    with Checkpointer(url, options=SMALL) as ckpt:
        if ckpt.restore(state) is None:
            for step in range(5):
                model.w.grad = torch.ones(1, 4) if me == 0 or step > 1 else None
                optimizer.step()
            ckpt.save(5, state)
    return float(optimizer.state[model.w]["step"]), float(model.peak)


def misplaced_experts(url: str) -> None:
    with pytest.raises(StateMismatch, match=r"w\.step: each rank that saved it had its own, for the part of the param"):
        experts(url, True)


def test_a_ranks_own_state_goes_back_to_the_part_of_the_parameter_that_it_belongs_to(tmp_path: Path) -> None:
    assert ranks.run(2, experts, str(tmp_path), False) == [(5.0, 0.0), (3.0, 1.0)]
    assert ranks.run(2, experts, str(tmp_path), False) == [(5.0, 0.0), (3.0, 1.0)]
    ranks.run(2, misplaced_experts, str(tmp_path))


class Factored(torch.optim.Optimizer):
    """Keeps a list with one factor for each parameter, which may have the form of the parameter by chance."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                factors = self.state[parameter].setdefault("factors", [torch.zeros(4, 4)])
                factors[0].fill_(rank() + 1)


def square(url: str) -> list[float]:
    model = nn.Linear(4, 4, bias=False)
    optimizer = Factored(model.parameters(), {})
    state = {"model": model, "optimizer": optimizer, "w": Shard(model.weight, (4 * rank(), 0), (8, 4))}
    with Checkpointer(url, options=SMALL) as ckpt:
        if ckpt.restore(state) is None:
            optimizer.step()
            ckpt.save(1, state)
    assert fastckpt.open(url).snapshot().layout.owners.count(-1) == 2  # the weight, and its name in the state
    return [float(factor.mean()) for factor in optimizer.state[model.weight]["factors"]]


def test_a_factor_of_the_form_of_a_declared_box_is_not_taken_for_one(tmp_path: Path) -> None:
    for _ in range(2):
        assert ranks.run(2, square, str(tmp_path)) == [[1.0], [2.0]]


def local_sgd(url: str) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook

    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 2))
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model}).wait()
        subgroup = dist.new_group([0, 1])
        model.register_comm_hook(PostLocalSGDState(None, subgroup, 100), post_localSGD_hook)
        with torch.no_grad():
            model.module.bias += rank()
        with pytest.raises(ValueError, match=r"model\.bias: differs between ranks"):
            ckpt.save(2, {"model": model}).wait()


def test_copies_that_a_communication_hook_does_not_keep_equal_are_compared(tmp_path: Path) -> None:
    ranks.run(2, local_sgd, str(tmp_path))
