"""What was found of a state is used again by the next save only while nothing that it was made from has changed."""

from __future__ import annotations

import gc
import random
import secrets
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastckpt
from fastckpt import Checkpointer, Options, Shard, Snapshot
from fastckpt.job.state import Describer


class Average:
    """A ``Stateful`` with a tensor too large to be part of its value, made anew each time."""

    size = 20_000

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"mean": torch.rand(self.size, generator=torch.Generator().manual_seed(self.size))}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


class Counting(nn.Module):
    """Has an extra state, and counts how often it was asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def get_extra_state(self) -> int:
        self.asked += 1
        return 7

    def set_extra_state(self, state: int) -> None: ...


class Job:
    """A state with one of most things, and what may be done to it between two saves."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), Counting())
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.optimizer.param_groups[0]["lr"] = 0.5
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "average": Average(),
            "table": torch.arange(6.0),
            "box": Shard(torch.rand(3), offsets=(0,), shape=(3,)),
            "count": 1,
        }
        self.step()

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.rand_like(parameter)
        self.optimizer.step()

    def swap_data(self) -> None:
        self.model[0].weight.data = torch.rand(4, 4)

    def transpose_in_place(self) -> None:
        self.model[0].weight.data = self.model[0].weight.data.t()

    def reshape_in_place(self) -> None:
        self.state["table"].resize_(2, 3)

    def convert(self) -> None:
        self.model.double()

    def load_assigned(self) -> None:
        self.model.load_state_dict({key: value + 1 for key, value in self.model.state_dict().items()}, assign=True)

    def load_optimizer(self) -> None:
        saved = self.optimizer.state_dict()
        for kept in saved["state"].values():
            kept["exp_avg"] = kept["exp_avg"] + 1
        self.optimizer.load_state_dict(saved)

    def drop_optimizer_state(self) -> None:
        self.optimizer.state.pop(self.optimizer.param_groups[0]["params"][0], None)

    def keep_another_kind_of_state(self) -> None:
        self.optimizer.state[self.optimizer.param_groups[0]["params"][1]]["note"] = len(self.state)

    def regroup(self) -> None:
        group = self.optimizer.param_groups[0]
        moved = [group["params"].pop()]
        self.optimizer.add_param_group({**group, "params": moved, "lr": 0.25})

    def add_a_group(self) -> None:
        name = f"more{len(self.state)}"
        self.state[name] = nn.Linear(2, 1)
        self.optimizer.add_param_group({"params": list(self.state[name].parameters())})

    def reorder(self) -> None:
        self.optimizer.param_groups[0]["params"].reverse()

    def exchange_all_but_the_memory(self) -> None:
        one, other = self.model[0].weight, self.model[2].weight
        one.data, other.data = other.data, one.data
        self.model[0].weight, self.model[2].weight = other, one

    def exchange_whose_state_it_is(self) -> None:
        one, other = self.model[0].weight, self.model[2].weight
        kept = list(self.optimizer.state.items())
        self.optimizer.state.clear()
        for key, state in kept:
            self.optimizer.state[other if key is one else one if key is other else key] = state

    def rename_entries(self) -> None:
        for key, kept in self.optimizer.state.items():
            self.optimizer.state[key] = {f"my_{entry}": item for entry, item in kept.items()}

    def rename_a_parameter(self) -> None:
        self.model[0]._parameters = {f"my_{own}": parameter for own, parameter in self.model[0]._parameters.items()}

    def change_options(self) -> None:
        self.optimizer.param_groups[0]["lr"] *= 0.5
        self.optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.125)

    def tie(self) -> None:
        self.model[2].weight = self.model[0].weight

    def tie_data_alone(self) -> None:
        self.model[2].bias.data = self.model[0].bias.data

    def untie(self) -> None:
        self.model[2].weight = nn.Parameter(self.model[2].weight.detach().clone())

    def replace_a_module(self) -> None:
        self.model[1] = nn.LayerNorm(4)

    def remove_a_parameter(self) -> None:
        self.model[0].register_parameter("bias", None)

    def add_a_buffer(self) -> None:
        self.model[0].register_buffer("extra", torch.rand(2))

    def pass_a_buffer_over(self) -> None:
        self.model.register_buffer("scratch", torch.rand(2), persistent=False)

    def replace_a_buffer(self) -> None:
        self.model.register_buffer("sum", torch.rand(3))

    def wrap(self) -> None:
        self.model[2] = checkpoint_wrapper(self.model[2])

    def flip_the_sign_bit(self) -> None:
        self.state["table"] = torch.view_as_complex(torch.rand(3, 2)).conj().imag

    def move_the_box(self) -> None:
        self.state["box"] = Shard(self.state["box"].tensor.reshape(1, 3), offsets=(0, 0), shape=(1, 3))

    def rename(self) -> None:
        self.state = {"renamed" if name == "table" else name: item for name, item in self.state.items()}

    def lengthen_the_value(self) -> None:
        self.state["average"].size += 1

    def change_the_value(self) -> None:
        self.state["count"] += 1

    def subclass(self) -> None:
        self.model[0].weight = nn.Parameter(nn.Buffer(torch.rand(4, 4)))

    def nothing(self) -> None: ...


CHANGES = [name for name in vars(Job) if not name.startswith("_")]


def saved_again(ckpt: Checkpointer, step: int, state: dict[str, Any]) -> Snapshot:
    ckpt.save(step, state).wait()
    return ckpt.snapshots()[-1]


def saved_afresh(state: dict[str, Any]) -> Snapshot:
    with Checkpointer(url := f"memory://{secrets.token_hex(8)}") as ckpt:
        ckpt.save(1, state)
    return fastckpt.open(url).snapshot()


def contents(snapshot: Snapshot) -> tuple[object, dict[str, bytes], dict[str, bytes]]:
    tensors = {key: snapshot.read(key).tobytes() for key in snapshot.keys()}  # noqa: SIM118
    return snapshot.layout, tensors, {name: snapshot.value_blob(name) for name in snapshot.value_digests(0)}


def outcome(save: Callable[..., Snapshot], *arguments: object) -> object:
    """What was saved, or why nothing was."""
    try:
        return contents(save(*arguments))
    except (TypeError, ValueError) as refusal:
        return str(refusal)


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_the_next_save_is_what_a_first_one_would_be(change: str) -> None:
    job = Job()
    with Checkpointer(f"memory://{secrets.token_hex(8)}") as ckpt:
        before = contents(saved_again(ckpt, 1, job.state))
        assert contents(saved_again(ckpt, 2, job.state)) == before
        getattr(job, change)()
        after = contents(saved_again(ckpt, 3, job.state))
    assert after == contents(saved_afresh(job.state))
    assert (after != before) == (change not in ("nothing", "pass_a_buffer_over", "wrap"))


def test_after_any_changes_the_next_save_is_what_a_first_one_would_be() -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    job = Job()
    with Checkpointer(f"memory://{secrets.token_hex(8)}") as ckpt:
        for step in range(12):
            for change in choose.choices([name for name in CHANGES if name != "step"], k=2):
                try:
                    getattr(job, change)()
                except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
                    continue  # an earlier change has taken away what this one needs
            fresh = outcome(saved_afresh, job.state)
            assert outcome(saved_again, ckpt, step, job.state) == fresh
            if isinstance(fresh, str):
                job = Job()


WAVE = torch.view_as_complex(torch.rand(4, 4, 2))


@pytest.mark.parametrize(
    "other",
    [WAVE.imag.t(), WAVE.imag[:, :2], WAVE.imag.view(torch.int32), WAVE.conj().imag],
    ids=["strides", "shape", "dtype", "sign"],
)
def test_a_tie_that_is_loosened_in_place_is_noticed_though_the_memory_begins_where_it_did(other: torch.Tensor) -> None:
    state = {"one": WAVE.imag, "two": WAVE.imag}
    with Checkpointer(f"memory://{secrets.token_hex(8)}") as ckpt:
        assert len(saved_again(ckpt, 1, state).layout.aliases) == 1
        state["two"].data = other
        with pytest.raises(ValueError, match="share part of their memory"):
            ckpt.save(2, state)


def test_an_unchanged_state_is_not_described_again_through_steps_and_new_options() -> None:
    job, describer = Job(), Describer()
    first = describer.describe(job.state)
    job.step()
    job.change_options()
    job.change_the_value()
    second = describer.describe(job.state)
    assert second.outline is first.outline
    assert [view.data_ptr() for view in second.views] != []
    assert second.values != first.values
    job.swap_data()
    assert describer.describe(job.state).outline is not first.outline


def test_values_are_asked_for_once_a_save() -> None:
    job = Job()
    with Checkpointer(f"memory://{secrets.token_hex(8)}") as ckpt:
        for step in range(4):
            job.lengthen_the_value() if step == 2 else None
            ckpt.save(step, job.state).wait()
            assert job.model[3].asked == step + 1


@pytest.mark.parametrize("copy", [(), ("model.0.*",)])
def test_a_state_that_is_dropped_is_freed_while_the_checkpointer_is_open(copy: tuple[str, ...]) -> None:
    arrays = [np.zeros((4, 4), np.float32) for _ in range(2)]
    freed = [weakref.ref(array) for array in arrays]
    model = nn.Linear(4, 4)
    model.weight.data = torch.from_numpy(arrays.pop(0))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    optimizer.state[model.weight]["momentum_buffer"] = torch.from_numpy(arrays.pop())
    with Checkpointer(f"memory://{secrets.token_hex(8)}", options=Options(copy=copy)) as ckpt:
        for step in range(2):
            ckpt.save(step, {"model": model, "optimizer": optimizer}).wait()
        model.weight.data = torch.zeros(4, 4)
        gc.collect()
        assert freed[0]() is None
        del model, optimizer
        gc.collect()
        assert freed[1]() is None


def test_what_was_copied_early_once_is_copied_early_each_time() -> None:
    job = Job()
    with Checkpointer(f"memory://{secrets.token_hex(8)}", options=Options(copy=("model.0.weight",))) as ckpt:
        for step in range(3):
            expected = {"w": job.model[0].weight.detach().clone(), "t": job.state["table"].clone()}
            pending = ckpt.save(step, job.state)
            with torch.no_grad():
                job.model[0].weight.add_(1)
                job.state["table"].add_(1)
            pending.wait()
            assert pending.snapshot.read("model.0.weight").tolist() == expected["w"].tolist()
            assert pending.snapshot.read("table").tolist() == expected["t"].tolist()


@pytest.mark.parametrize("place", ["model.weight", "table", "other.rows"])
def test_a_tensor_that_a_value_referred_to_as_well_is_its_own_once_the_value_has_another(place: str) -> None:
    model, table = nn.Linear(200, 200), torch.rand(200, 200)
    shared = model.weight if place == "model.weight" else table
    values: dict[str, Any] = {"rows": shared}
    state: dict[str, Any] = {"model": model, "table": table, "value": values, "other": {"rows": table.clone()}}
    if place == "other.rows":
        state["other"]["rows"] = shared = values["rows"] = torch.rand(200, 200)
    with Checkpointer(f"memory://{secrets.token_hex(8)}") as ckpt:
        for step in (1, 2):
            assert contents(saved_again(ckpt, step, state)) == contents(saved_afresh(state))
        values["rows"] = type(shared)(torch.zeros(200, 200))
        snapshot = saved_again(ckpt, 3, state)
    assert not snapshot.read("value.rows").any()
    assert snapshot.read(place).tolist() == shared.tolist()
    assert contents(snapshot) == contents(saved_afresh(state))
