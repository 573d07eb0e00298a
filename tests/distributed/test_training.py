"""FSDP2, DDP and one process restore what any of them saved, at any number of ranks; DCP is the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from jobs import build, prints, same, train, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastckpt import Checkpointer, Options, StateMismatch

pytestmark = pytest.mark.distributed

Prints = dict[str, str]
SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)
WORLDS = [4, 2, 3, 1, 4]


def leg(kind: str, folder: str, number: int) -> tuple[Prints | None, Prints]:
    """Restores what the leg before saved, compares it with what DCP restores, trains on and saves with both."""
    model, optimizer = build(kind, seed=number)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    restored: Prints | None = None
    with Checkpointer(f"{folder}/fastckpt", options=SMALL) as ckpt:
        step = ckpt.restore(state)
        if number:
            assert step == number - 1
            restored = prints(whole(model, optimizer))
            assert restored == by_dcp(kind, f"{folder}/dcp-{step}", seed=100 + number)
        train(model, optimizer, range(2))
        pending = ckpt.save(number, state)
        dcp.save(
            dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)),
            checkpoint_id=f"{folder}/dcp-{number}",
        )
        pending.wait()
        return restored, prints(whole(model, optimizer))


def by_dcp(kind: str, folder: str, seed: int) -> Prints:
    model, optimizer = build(kind, seed)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
    return prints(whole(model, optimizer))


@pytest.mark.parametrize(
    "kinds",
    [
        ["fsdp"] * 5,
        ["ddp"] * 5,
        ["fsdp", "ddp", "fsdp", "plain", "ddp"],
        ["hsdp", "fsdp", "ddp", "fsdp", "hsdp"],
    ],
    ids=lambda kinds: "-".join(kinds),
)
def test_every_world_restores_exactly_what_the_one_before_saved(tmp_path: Path, kinds: list[str]) -> None:
    saved: Prints | None = None
    for number, (kind, world) in enumerate(zip(kinds, WORLDS, strict=True)):
        restored, now = same(ranks.run(world, leg, kind, str(tmp_path), number))
        assert restored == saved
        assert now != saved
        assert "low.weight/exp_avg" in now
        assert "frozen" in now
        saved = now


def uninterrupted(kind: str, url: str) -> Prints:
    model, optimizer = build(kind, seed=1)
    with Checkpointer(url, options=SMALL) as ckpt:
        train(model, optimizer, range(3))
        ckpt.save(3, {"model": model, "optimizer": optimizer})
        train(model, optimizer, range(3, 6))
    return prints(whole(model, optimizer))


def resumed(kind: str, url: str) -> Prints:
    model, optimizer = build(kind, seed=2)
    with Checkpointer(url, options=SMALL) as ckpt:
        assert ckpt.restore({"model": model, "optimizer": optimizer}) == 3
    train(model, optimizer, range(3, 6))
    return prints(whole(model, optimizer))


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_resumed_job_trains_on_as_if_it_had_never_stopped(tmp_path: Path, kind: str) -> None:
    expected = same(ranks.run(3, uninterrupted, kind, f"{tmp_path}/{kind}"))
    assert same(ranks.run(3, resumed, kind, f"{tmp_path}/{kind}")) == expected


def roll_back(url: str) -> tuple[Prints, list[int]]:
    model, optimizer = build("fsdp", seed=1)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with Checkpointer(url, options=SMALL) as ckpt:
        for step in (1, 2, 3):
            train(model, optimizer, [step])
            ckpt.save(step, state)
            if step == 1:
                ckpt.wait_staged()
                first = prints(whole(model, optimizer))
        assert ckpt.restore(state, step=1) == 1
        assert prints(whole(model, optimizer)) == first
        train(model, optimizer, [20])
        ckpt.save(2, state).wait()
        return prints(whole(model, optimizer)), [snapshot.step for snapshot in ckpt.snapshots()]


def newest(url: str) -> Prints:
    model, optimizer = build("ddp", seed=2)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with Checkpointer(url, options=SMALL) as ckpt:
        assert ckpt.restore(state) == 2
        latest = prints(whole(model, optimizer))
        assert ckpt.restore(state, step=2) == 2
        assert prints(whole(model, optimizer)) == latest
        return latest


def test_after_a_rollback_training_goes_on_and_its_snapshot_is_the_latest(tmp_path: Path) -> None:
    saved, steps = same(ranks.run(2, roll_back, str(tmp_path / "run")))
    assert steps == [1, 2, 3, 2]
    assert same(ranks.run(3, newest, str(tmp_path / "run"))) == saved


def save_one(kind: str, url: str) -> dict[str, torch.Tensor]:
    model, optimizer = build(kind, seed=1)
    train(model, optimizer, range(2))
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(7, {"model": model, "optimizer": optimizer})
    return whole(model)


def restore_parts(url: str, saved: dict[str, torch.Tensor]) -> None:
    expected = prints(saved)
    with Checkpointer(url, options=SMALL) as ckpt:
        model, _ = build("fsdp", seed=2)
        before = prints(whole(model))
        assert ckpt.restore({"model": model}, only=("model.blocks.*",)) == 7
        after = prints(whole(model))
        chosen = {name for name in after if name.startswith("blocks.")}
        assert {name: after[name] for name in chosen} == {name: expected[name] for name in chosen}
        assert {name: after[name] for name in set(after) - chosen} == {
            name: before[name] for name in set(after) - chosen
        }

        model, _ = build("fsdp", seed=3)
        ckpt.restore({"net": model}, rename={"model.": "net.", "optimizer": "unused"})
        assert prints(whole(model)) == expected

        inner = build("fsdp", seed=4)[0].blocks[1]
        ckpt.restore({"block": inner}, rename={"model.blocks.1.": "block."})
        assert prints(whole(inner)) == {
            name.removeprefix("blocks.1."): text for name, text in expected.items() if name.startswith("blocks.1.")
        }

        class Headed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Linear(3, 6)
                self.head = nn.Linear(6, 5)

        headed = Headed()
        fully_shard(headed)
        before = prints(whole(headed))
        with pytest.raises(
            StateMismatch, match=r"(?s)head.weight: in the state but not in the snapshot.*head.bias: in"
        ):
            ckpt.restore({"model": headed}, only=("model.embed*", "model.head*"))
        assert prints(whole(headed)) == before
        ckpt.restore({"model": headed}, only=("model.embed*", "model.head*"), missing="keep")
        after = prints(whole(headed))
        assert {name: text for name, text in after.items() if name.startswith("head")} == {
            name: text for name, text in before.items() if name.startswith("head")
        }
        assert after["embed.weight"] == expected["embed.weight"]

        half = nn.Linear(3, 6, dtype=torch.bfloat16)
        fully_shard(half)
        with pytest.raises(
            StateMismatch, match=r"half.weight: float32 in the snapshot, bfloat16 in the state \(cast=True"
        ):
            ckpt.restore({"half": half}, rename={"model.low": "gone", "model.embed.": "half."})
        ckpt.restore({"half": half}, rename={"model.low": "gone", "model.embed.": "half."}, cast=True)
        cast = {"weight": saved["embed.weight"].bfloat16(), "bias": saved["embed.bias"].bfloat16()}
        assert prints(whole(half)) == prints(dict(sorted(cast.items())))


def test_parts_restore_under_other_names_into_other_models_and_dtypes(tmp_path: Path) -> None:
    saved = ranks.run(2, save_one, "ddp", str(tmp_path / "run"))[0]
    ranks.run(3, restore_parts, str(tmp_path / "run"), saved)


def tensor_parallel(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 4), nn.LayerNorm(4))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def save_tensor_parallel(url: str) -> Prints:
    model = tensor_parallel(1)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for step in range(2):
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer})
    return prints(whole(model, optimizer))


def restore_sharded(url: str) -> Prints:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 4), nn.LayerNorm(4))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore({"model": model, "optimizer": optimizer})
    return prints(whole(model, optimizer))


def restore_tensor_parallel(url: str) -> Prints:
    model = tensor_parallel(2)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore({"model": model, "optimizer": optimizer})
    return prints(whole(model, optimizer))


def test_tensor_parallel_times_fsdp_restores_anywhere(tmp_path: Path) -> None:
    saved = same(ranks.run(4, save_tensor_parallel, str(tmp_path)))
    assert same(ranks.run(3, restore_sharded, str(tmp_path))) == saved
    assert same(ranks.run(1, restore_sharded, str(tmp_path))) == saved
    assert same(ranks.run(4, restore_tensor_parallel, str(tmp_path))) == saved
