"""DeepSpeed's engines step an optimizer inside of them: it waits for staging, and what is saved is as it was before."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastckpt import Checkpointer, Options
from fastckpt import checkpointer as front
from tests.distributed import jobs, ranks

SECONDS = 60.0


def engine_of(stage: int, dtype: str) -> Any:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(jobs.rank()), DS_SKIP_CUDA_CHECK="1")
    import deepspeed

    # Its collectives in shared memory would be compiled here, for a minute; without them it takes torch's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(3)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def backward(engine: Any, step: int) -> None:
    torch.manual_seed(100 * step + jobs.rank())
    batch = torch.randn(4, 24, dtype=next(engine.module.parameters()).dtype)
    engine.backward(engine(batch).float().square().mean())


def partition(engine: Any) -> nn.ParameterDict:
    """This rank's part of the master weights and of what the optimizer keeps of them: the same memory."""
    tensors = {}
    for number, (_, kept) in enumerate(engine.optimizer.optimizer.state.items()):
        tensors |= {f"{name}-{number}": value for name, value in kept.items() if value.ndim}
    zero = engine.optimizer
    masters = (
        zero.fp32_partitioned_groups_flat
        if engine.zero_optimization_stage() == 3
        else zero.single_partition_of_fp32_groups
    )
    tensors |= {f"master-{number}": tensor for number, tensor in enumerate(masters)}
    assert {name.partition("-")[0] for name in tensors} == {"exp_avg", "exp_avg_sq", "master"}
    return nn.ParameterDict({name: nn.Parameter(value.detach(), False) for name, value in tensors.items()})


def live(state: dict[str, nn.Module]) -> dict[str, str]:
    return jobs.prints(
        {f"{top}.{name}": p.detach() for top, part in state.items() for name, p in part.named_parameters()}
    )


def steps_while_a_save_has_not_been_staged(path: str, stage: int, dtype: str) -> None:
    entering, reached, may_stage = threading.Event(), threading.Event(), threading.Event()
    register_optimizer_step_pre_hook(lambda *_: entering.set())  # which comes before the checkpointer's
    engine = engine_of(stage, dtype)
    inner = engine.optimizer.optimizer
    write = front.Saves.write

    def late(*arguments: Any) -> Any:
        reached.set()
        assert may_stage.wait(SECONDS)
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch, Checkpointer(path, options=Options(chunk_bytes=4096)) as ckpt:
        backward(engine, 1)
        engine.step()  # the optimizer has state from now on
        state: dict[str, nn.Module] = {f"zero-{jobs.rank()}": partition(engine)}
        if stage < 3:
            state["model"] = engine.module
        backward(engine, 2)
        before = live(state)
        patch.setattr(front.Saves, "write", late)
        pending = ckpt.save(1, state)
        assert reached.wait(SECONDS)
        entering.clear()
        seen: list[str] = []
        inner.register_step_pre_hook(lambda *_: seen.append(pending.status))

        def open_when_it_steps() -> None:
            assert entering.wait(SECONDS)
            assert pending.status == "staging"
            may_stage.set()

        opener = threading.Thread(target=open_when_it_steps)
        opener.start()
        engine.step()
        opener.join(SECONDS)
        assert seen
        assert seen[0] != "staging"
        pending.wait(SECONDS)
        assert pending.counters["fence_seconds"] > 0
        assert live(state) != before
        ckpt.restore(state, 1)
        assert live(state) == before


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "dtype"), [(1, "float32"), (2, "bfloat16"), (3, "bfloat16")])
def test_an_engine_steps_only_after_staging_and_what_is_saved_is_as_it_was_before(
    stage: int, dtype: str, tmp_path: Path
) -> None:
    ranks.run(2, steps_while_a_save_has_not_been_staged, str(tmp_path / "repository"), stage, dtype)
