"""Restoring into a live state: optimizers without a step, schedulers, tied weights, and what does not fit."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fastckpt
from fastckpt import Checkpointer, RestoreError, Shard, Snapshot, StateMismatch

optim = torch.optim


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def save(url: str, state: dict[str, Any], step: int = 1) -> None:
    with Checkpointer(url) as ckpt:
        ckpt.save(step, state)


def restore(url: str, state: dict[str, Any], **how: Any) -> None:
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(state, **how) is not None


def refusal(url: str, state: dict[str, Any], **how: Any) -> str:
    with Checkpointer(url) as ckpt, pytest.raises(StateMismatch) as caught:
        ckpt.restore(state, **how)
    return str(caught.value)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[str]:
    losses = []
    for step in steps:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return losses


def shown(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything there is, to the bit, with the types that torch gave it."""
    state = [
        sorted((name, type(value), str(getattr(value, "dtype", "")), bits(value)) for name, value in own.items())
        for own in (optimizer.state[parameter] for parameter in model.parameters())
    ]
    return [[bits(parameter) for parameter in model.parameters()], state]


def bits(value: Any) -> Any:
    return value.detach().flatten().view(torch.uint8).tolist() if isinstance(value, torch.Tensor) else value


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: optim.AdamW(p, lr=0.1),
    "AdamW fused": lambda p: optim.AdamW(p, lr=0.1, fused=True),
    "AdamW foreach amsgrad": lambda p: optim.AdamW(p, lr=0.1, foreach=True, amsgrad=True),
    "Adam with a tensor as lr": lambda p: optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "SGD": lambda p: optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "SGD nesterov fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Adagrad fused": lambda p: optim.Adagrad(p, lr=0.1, fused=True),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.1),
    "RMSprop centered momentum": lambda p: optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "NAdam": lambda p: optim.NAdam(p, lr=0.1),
    "RAdam": lambda p: optim.RAdam(p, lr=0.1),
    "Adamax": lambda p: optim.Adamax(p, lr=0.1),
    "Adadelta": lambda p: optim.Adadelta(p),
    "ASGD": lambda p: optim.ASGD(p, lr=0.1),
    "Rprop": lambda p: optim.Rprop(p, lr=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "Muon": lambda p: optim.Muon(p, lr=0.1),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_fresh_optimizer_restored_without_a_step_trains_on_bit_for_bit(
    url: str, make: Callable[[Any], torch.optim.Optimizer]
) -> None:
    model = network(1)
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    save(url, {"model": model, "optimizer": optimizer})
    at_save = shown(model, optimizer)
    losses, at_end = train(model, optimizer, range(3, 7)), shown(model, optimizer)

    again = network(2)
    fresh = make(again.parameters())
    restore(url, {"model": again, "optimizer": fresh})
    assert shown(again, fresh) == at_save
    assert train(again, fresh, range(3, 7)) == losses
    assert shown(again, fresh) == at_end


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum", "Adagrad", "RMSprop centered momentum"])
def test_a_warm_optimizer_restored_to_before_its_first_step_has_no_state(url: str, name: str) -> None:
    model = network(1)
    optimizer = OPTIMIZERS[name](model.parameters())
    save(url, {"model": model, "optimizer": optimizer})
    at_save = shown(model, optimizer)
    losses = train(model, optimizer, range(3))
    restore(url, {"model": model, "optimizer": optimizer})
    assert shown(model, optimizer) == at_save
    assert train(model, optimizer, range(3)) == losses


def test_hyperparameters_are_restored_and_how_a_step_is_computed_is_the_targets_business(url: str) -> None:
    model = network(1)
    optimizer = optim.AdamW(model.parameters(), lr=0.3, betas=(0.5, 0.6), weight_decay=0.7, foreach=True)
    train(model, optimizer, range(1))
    save(url, {"model": model, "optimizer": optimizer})
    fresh = optim.AdamW(model.parameters(), lr=9.0, fused=True)
    restore(url, {"model": model, "optimizer": fresh})
    group = fresh.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.3, (0.5, 0.6), 0.7)
    assert (group["fused"], group["foreach"]) == (True, None)
    train(model, fresh, range(1, 2))


class Counting(torch.optim.Optimizer):
    """Keeps numbers that are no tensors, as optimizers outside torch do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("step", 0)
            state.update(step=state["step"] + 1, rms=1 / 3, kind="odd", nothing=None, warm=True)
            parameter.sub_(0.1 / state["step"])


def test_numbers_in_the_state_of_an_optimizer_are_restored_as_what_they_were(url: str) -> None:
    model = network(1)
    optimizer = Counting(model.parameters())
    train(model, optimizer, range(3))
    save(url, {"model": model, "optimizer": optimizer})
    again = network(2)
    fresh = Counting(again.parameters())
    restore(url, {"model": again, "optimizer": fresh})
    assert fresh.state[again[0].weight] == {"step": 3, "rms": 1 / 3, "kind": "odd", "nothing": None, "warm": True}
    assert shown(again, fresh) == shown(model, optimizer)


def test_state_tensors_keep_their_place_in_memory_where_they_fit(url: str) -> None:
    model = network(1)
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    save(url, {"model": model, "optimizer": optimizer})
    before = {id(tensor): tensor.data_ptr() for own in optimizer.state.values() for tensor in own.values()}
    train(model, optimizer, range(2, 3))
    restore(url, {"model": model, "optimizer": optimizer})
    assert {id(tensor): tensor.data_ptr() for own in optimizer.state.values() for tensor in own.values()} == before


def test_two_optimizers_over_two_models_and_one_over_both(url: str) -> None:
    def job(seed: int) -> tuple[dict[str, Any], list[nn.Module]]:
        models = [network(seed), network(seed + 1)]
        both = [*models[0].parameters(), *models[1].parameters()]
        optimizers = [
            optim.AdamW(models[0].parameters()),
            optim.SGD(models[1].parameters(), 0.1, momentum=0.9),
            optim.Adagrad([{"params": both[:3]}, {"params": both[3:], "lr": 0.5}]),
        ]
        return dict(zip(("a", "b", "oa", "ob", "oc"), [*models, *optimizers], strict=True)), models

    saved, models = job(1)
    for model, name in ((models[0], "oa"), (models[1], "ob"), (models[0], "oc"), (models[1], "oc")):
        train(model, saved[name], range(2))
    save(url, saved)
    keys = fastckpt.open(url).snapshot().keys()
    assert {"oa.state.0.weight.exp_avg", "ob.state.2.weight.momentum_buffer", "oc.state.b.0.weight.sum"} <= set(keys)
    other, others = job(5)
    restore(url, other)
    for ours, theirs, name in ((models[0], others[0], "oa"), (models[1], others[1], "ob")):
        assert shown(theirs, other[name]) == shown(ours, saved[name])
    sums = [[bits(own["sum"]) for own in job["oc"].state.values()] for job in (saved, other)]
    assert sums[0] == sums[1]
    assert [group["lr"] for group in other["oc"].param_groups] == [0.01, 0.5]


def test_a_frozen_parameter_is_restored_and_has_no_optimizer_state(url: str) -> None:
    model = network(1)
    model[0].weight.requires_grad_(False)
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    save(url, {"model": model, "optimizer": optimizer})
    again = network(2)
    again[0].weight.requires_grad_(False)
    fresh = optim.AdamW(again.parameters())
    restore(url, {"model": again, "optimizer": fresh})
    assert torch.equal(again[0].weight, model[0].weight)
    assert list(fresh.state) == [again[2].weight]
    assert not again[0].weight.requires_grad


# --- schedulers and scalers -----------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1.0, total_steps=12),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(url: str, name: str) -> None:
    def schedule(state: dict[str, Any], steps: range) -> list[list[float]]:
        rates = []
        for step in steps:
            train(state["model"], state["optimizer"], range(step, step + 1))
            state["schedule"].step(*([1.0] if name == "ReduceLROnPlateau" else []))
            group = state["optimizer"].param_groups[0]
            rates.append([group["lr"], group["momentum"]])
        return rates

    def job(seed: int) -> dict[str, Any]:
        model = network(seed)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "schedule": SCHEDULERS[name](optimizer)}

    state = job(1)
    schedule(state, range(3))
    save(url, state)
    expected = schedule(state, range(3, 9))
    again = job(2)
    restore(url, again)
    assert schedule(again, range(3, 9)) == expected


def test_a_gradient_scaler_goes_on_where_it_was(url: str) -> None:
    def job(growth: float) -> tuple[Any, Any]:
        model = network(1)
        return torch.amp.GradScaler("cpu", init_scale=growth), optim.SGD(model.parameters(), lr=0.1)

    scaler, optimizer = job(1024.0)
    scaler.scale(torch.ones(()))
    scaler.update(77.0)
    save(url, {"scaler": scaler})
    fresh, _ = job(4.0)
    restore(url, {"scaler": fresh})
    assert fresh.get_scale() == 77.0
    assert fresh.state_dict() == scaler.state_dict()
    assert optimizer.state == {}


# --- tied weights ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, seed: int, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_restored_tied(url: str) -> None:
    saved, other = Tied(1), Tied(2)
    save(url, {"model": saved})
    snapshot = fastckpt.open(url).snapshot()
    assert snapshot.keys() == ["model.embed.weight", "model.head.weight"]
    assert snapshot.layout.bytes() == saved.embed.weight.numel() * 4
    assert snapshot.read("model.head.weight").tolist() == saved.embed.weight.tolist()
    restore(url, {"model": other})
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.head.weight, saved.embed.weight)


def test_what_was_tied_restores_into_what_is_not_but_not_the_other_way_round(url: str) -> None:
    save(url, {"model": Tied(1)}, step=1)
    save(url, {"model": Tied(3, tied=False)}, step=2)
    apart = Tied(2, tied=False)
    restore(url, {"model": apart}, step=1)
    assert torch.equal(apart.head.weight, apart.embed.weight)
    tied = Tied(4)
    before = tied.embed.weight.tolist()
    assert (
        "model.head.weight: is the same tensor as model.embed.weight in the state, but not in the snapshot"
        in refusal(url, {"model": tied}, step=2)
    )
    assert tied.embed.weight.tolist() == before


# --- what does not fit ----------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed_at_once_and_nothing_is_changed(url: str) -> None:
    save(
        url,
        {
            "model": nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.BatchNorm1d(2)),
            "optimizer": optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
            "plain": torch.zeros(3),
            "epoch": 3,
            "old": 4,
        },
    )
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(4, 2, dtype=torch.float64), nn.Identity())
    fresh = nn.Linear(2, 2)
    state: dict[str, Any] = {
        "model": model,
        "optimizer": optim.SGD([{"params": [fresh.weight]}, {"params": [fresh.bias]}], lr=0.5),
        "plain": torch.ones(3, dtype=torch.int32),
        "epoch": -1,
        "new": -1,
    }
    before = [tensor.tolist() for tensor in model.state_dict().values()]
    text = refusal(url, state)
    for line in (
        "model.0.weight: shape [4, 3] in the snapshot, [5, 3] in the state",
        "model.0.bias: shape [4] in the snapshot, [5] in the state",
        "model.1.weight: float32 in the snapshot, float64 in the state (cast=True converts)",
        "model.1.bias: float32 in the snapshot, float64 in the state",
        "model.2.running_mean: in the snapshot but not in the state",
        "optimizer: no rank saved parameters of group 1: ['1.0']; 1 parameter groups in the snapshot, 2 in the state",
        "plain: float32 in the snapshot, int32 in the state",
        "new: in the state but not in the snapshot",
    ):
        assert line in text
    assert "old" not in text, "a part of what was saved may be restored"
    assert [tensor.tolist() for tensor in model.state_dict().values()] == before
    assert (state["epoch"], state["plain"].tolist()) == (-1, [1, 1, 1])
    assert state["optimizer"].param_groups[0]["lr"] == 0.5


def test_an_optimizer_over_other_parameters_is_named(url: str) -> None:
    model = network(1)
    save(url, {"model": model, "optimizer": optim.SGD(model.parameters(), lr=0.1)})
    text = refusal(url, {"model": model, "optimizer": optim.SGD([model[2].weight], lr=0.1)})
    assert "optimizer.param_groups.0.weight: in the snapshot but not in the state" in text
    wide = nn.Sequential(*model, nn.Linear(3, 1, bias=False))
    text = refusal(url, {"model": model, "wide": wide, "optimizer": optim.SGD(wide[3:].parameters(), lr=0.1)})
    assert "optimizer: no rank saved parameters of group 0: ['3.weight']" in text


def test_only_rename_missing_and_cast_choose_what_is_restored_where(url: str) -> None:
    save(url, {"model": network(1), "epoch": 7, "notes": ["a"]})
    model = network(2)
    first, last = model[0].weight.tolist(), model[2].weight.tolist()
    state: dict[str, Any] = {"model": model, "epoch": 0, "notes": None}
    restore(url, state, only=("model.0.*", "epoch"))
    assert model[0].weight.tolist() != first
    assert model[2].weight.tolist() == last
    assert (state["epoch"], state["notes"]) == (7, None)

    wide = {"net": network(3).double(), "epoch": 0, "extra": 5}
    assert "net.0.weight: in the state but not in the snapshot" in refusal(url, wide)
    restore(url, wide, rename={"model.": "net."}, missing="keep", cast=True)
    assert torch.equal(wide["net"][0].weight, network(1)[0].weight.double())
    assert (wide["epoch"], wide["extra"]) == (7, 5)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("int64", "float16"), ("float64", "complex64")],
)
def test_a_cast_converts_as_torch_does(url: str, stored: str, wanted: str) -> None:
    original = (torch.randn(7, 3) * 9).to(getattr(torch, stored))
    save(url, {"t": original})
    target = torch.zeros(3, 7, dtype=getattr(torch, wanted)).t()
    restore(url, {"t": target}, cast=True)
    assert torch.equal(target, original.to(target.dtype))


def test_a_renamed_optimizer_follows_its_model(url: str) -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model = network(1)
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, range(2))
    save(url, {"model": model, "optimizer": optimizer})
    wrapped = Wrapped(network(2))
    fresh = optim.AdamW(wrapped.parameters())
    rename = {"model.": "model.inner.", "optimizer.state.": "optimizer.state.inner."}
    restore(url, {"model": wrapped, "optimizer": fresh}, rename=rename)
    assert shown(wrapped.inner, fresh) == shown(model, optimizer)


def test_parts_of_a_larger_tensor_are_restored_from_the_whole_and_the_other_way_round(url: str) -> None:
    full = torch.randn(6, 4)
    save(url, {"x": full})
    part = torch.zeros(2, 3)
    restore(url, {"x": Shard(part, offsets=(3, 1), shape=(6, 4))})
    assert torch.equal(part, full[3:5, 1:4])
    assert "x: shape [6, 4] in the snapshot, [6, 5] in the state" in refusal(
        url, {"x": Shard(part, offsets=(3, 1), shape=(6, 5))}
    )


def test_a_tensor_is_filled_in_place_whatever_its_strides(url: str) -> None:
    full = torch.arange(24.0).reshape(4, 6)
    save(url, {"x": full})
    base = torch.zeros(8, 12)
    for target in (base[::2, ::2], torch.zeros(6, 4).t(), torch.zeros(4, 6).flip(0)):
        restore(url, {"x": target})
        assert torch.equal(target, full)
    assert base[1::2].count_nonzero() == base[:, 1::2].count_nonzero() == 0


def test_a_tensor_whose_elements_share_memory_is_refused_before_anything_is_changed(url: str) -> None:
    save(url, {"x": torch.arange(4.0).expand(3, 4), "y": torch.ones(2)})
    assert fastckpt.open(url).snapshot().read("x").shape == (3, 4)
    y = torch.zeros(2)
    with Checkpointer(url) as ckpt, pytest.raises((StateMismatch, ValueError), match="x: "):
        ckpt.restore({"x": torch.zeros(4).expand(3, 4), "y": y})
    assert y.tolist() == [0, 0]


@pytest.mark.parametrize("left_bytes", [0, 4096])
@pytest.mark.parametrize("strides", [(64, 1), (1, 64)])
def test_a_tensor_without_the_memory_it_says_it_has_is_refused_by_name(
    url: str, strides: tuple[int, int], left_bytes: int
) -> None:
    def emptied() -> torch.Tensor:
        tensor = torch.ones(64 * 64).as_strided((64, 64), strides)
        tensor.untyped_storage().resize_(left_bytes)
        return tensor

    module = nn.Module()
    module.register_buffer("x", emptied())
    with Checkpointer(url) as ckpt:
        for state in ({"x": emptied()}, {"m": module}):
            with pytest.raises(ValueError, match=r"^(m\.)?x: the memory of its storage has been freed"):
                ckpt.save(1, state)
        ckpt.save(1, {"x": torch.ones(64, 64), "y": torch.ones(2)}).wait()
        y = torch.zeros(2)
        with pytest.raises(ValueError, match=r"^x: the memory of its storage has been freed"):
            ckpt.restore({"x": emptied(), "y": y})
    assert not y.any()


@pytest.mark.parametrize("strides", [(64, 1), (1, 64)])
def test_memory_that_is_taken_from_a_tensor_while_it_is_restored_is_not_written(
    url: str, strides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(url, {"x": torch.ones(64, 64)})
    target = torch.zeros(64 * 64).as_strided((64, 64), strides)
    read_chunks = Snapshot.read_chunks

    def read(*arguments: Any) -> None:
        target.untyped_storage().resize_(4096)
        read_chunks(*arguments)

    monkeypatch.setattr(Snapshot, "read_chunks", read)
    with Checkpointer(url) as ckpt, pytest.raises(RestoreError, match=r"^x lost memory of its storage"):
        ckpt.restore({"x": target})


def test_a_tensor_of_zeros_without_memory_is_saved_and_not_written(url: str) -> None:
    module = nn.Module()
    module.x = nn.Parameter(torch._efficientzerotensor(64))
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {"m": module}).wait()
        assert not ckpt.snapshots()[0].read("m.x").any()
        ckpt.save(2, {"x": torch.ones(64)}).wait()
    with Checkpointer(url) as ckpt, pytest.raises(RestoreError, match="ZeroTensors are immutable"):
        ckpt.restore({"x": torch._efficientzerotensor(64)})


def test_an_extra_state_of_a_module_goes_back_to_it(url: str) -> None:
    class Counting(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.count = {"count": count, "seen": torch.full((30_000,), count)}

        def get_extra_state(self) -> dict[str, Any]:
            return self.count

        def set_extra_state(self, state: dict[str, Any]) -> None:
            self.count = state

    save(url, {"model": nn.Sequential(nn.Linear(1, 1), Counting(5))})
    model = nn.Sequential(nn.Linear(1, 1), Counting(0))
    restore(url, {"model": model})
    assert model[1].count["count"] == 5
    assert model[1].count["seen"].unique().tolist() == [5]


def test_tensors_that_share_part_of_their_memory_are_refused_before_anything_is_changed(url: str) -> None:
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {"one": torch.ones(4), "other": torch.ones(4)}).wait()
        target = torch.zeros(6)
        with pytest.raises(StateMismatch, match="share part of their memory"):
            ckpt.restore({"one": target[:4], "other": target[2:]})
    assert not target.any()
