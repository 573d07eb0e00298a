"""Which snapshot a restore takes: the newest that has every key of the state, and what it passes over it names."""

from __future__ import annotations

import logging
import secrets
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt import Checkpointer, Shard, StateMismatch

State = dict[str, Any]


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


class Counted(nn.Linear):
    """Has an extra state."""

    def get_extra_state(self) -> int:
        return 7

    def set_extra_state(self, state: int) -> None: ...


def filled(model: nn.Module, number: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(number)
    return model


def model(width: int = 2, kind: type[nn.Linear] = nn.Linear, **more: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"a": kind(1, width), **more})


def save(url: str, *states: State) -> None:
    """Each as the snapshot of the next step, from 1 on."""
    with Checkpointer(url) as ckpt:
        for step, state in enumerate(states, 1):
            ckpt.save(step, state).wait()


def restored(url: str, state: State, caplog: pytest.LogCaptureFixture, **how: Any) -> tuple[int | None, list[str]]:
    """The step that was restored, and what was said about others."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fastckpt"), Checkpointer(url) as ckpt:
        step = ckpt.restore(state, **how)
    return step, [record.getMessage().partition(": ")[2] for record in caplog.records]


def test_the_newest_snapshot_with_every_key_is_taken_and_those_passed_over_are_named(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    both = {"model": filled(model(b=nn.Linear(1, 1)), 2.0)}
    save(url, both, {"model": model()}, {"model": model(), "more": 1})
    target = {"model": filled(model(b=nn.Linear(1, 1)), 0.0)}
    step, said = restored(url, target, caplog)
    assert step == 1
    assert said == [f"passing over step {step}: it has no model.b.weight, model.b.bias" for step in (3, 2)]
    assert target["model"]["b"].weight.item() == 2.0


def test_buffers_shards_tensors_values_and_extra_states_are_asked_for(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    norm, value = nn.BatchNorm1d(2, affine=False), {"epoch": 3}
    whole = {"model": model(kind=Counted, norm=norm), "x": torch.ones(2), "value": value, "shard": torch.ones(2)}
    lacking = [whole | {"model": model(norm=norm)}, whole | {"model": model(kind=Counted)}]
    lacking += [{name: item for name, item in whole.items() if name != gone} for gone in ("x", "value", "shard")]
    save(url, whole, *lacking)
    target = whole | {"shard": Shard(torch.zeros(1), offsets=(1,), shape=(2,))}
    step, said = restored(url, target, caplog)
    assert step == 1
    assert [text.partition(" it has no ")[2] for text in said] == [
        *("shard", "value", "x"),
        "model.norm.running_mean, model.norm.running_var, model.norm.num_batches_tracked",
        "model.a._extra_state",
    ]


def test_what_an_optimizer_has_not_made_yet_is_not_asked_for(url: str, caplog: pytest.LogCaptureFixture) -> None:
    def job(step: bool) -> State:
        net = model()
        optimizer = torch.optim.AdamW(net.parameters())
        for parameter in net.parameters() if step else ():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return {"model": net, "optimizer": optimizer}

    save(url, job(True), job(False))
    target = job(True)
    assert restored(url, target, caplog) == (2, [])
    assert target["optimizer"].state == {}


def test_only_what_is_selected_is_asked_for_and_under_the_names_it_is_renamed_to(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(url, {"old": model(b=nn.Linear(1, 1))}, {"old": model()})
    target = {"new": model(b=nn.Linear(1, 1))}
    rename = {"old.": "new."}
    assert restored(url, target, caplog, rename=rename, only=("new.a.*",)) == (2, [])
    assert restored(url, target, caplog, rename=rename, only=("new.b.weight",)) == (
        1,
        ["passing over step 2: it has no new.b.weight"],
    )
    assert restored(url, target, caplog, rename=rename, missing="keep") == (2, [])
    assert restored(url, target, caplog, rename=rename)[0] == 1


def test_if_no_snapshot_has_everything_the_newest_says_what_is_missing(url: str) -> None:
    save(url, {"model": model()}, {"model": model(c=nn.Linear(1, 1))}, {"model": model()})
    wide = {"model": model(b=nn.Linear(1, 1))}
    with Checkpointer(url) as ckpt:
        with pytest.raises(StateMismatch, match=r"step 3 does not fit the state; nothing was changed:\n") as caught:
            ckpt.restore(wide)
        assert "model.b.weight: in the state but not in the snapshot" in str(caught.value)
        with pytest.raises(StateMismatch, match="step 2 does not fit"):
            ckpt.restore(wide, step=2)


def test_a_snapshot_that_has_more_is_taken_and_is_a_mismatch(url: str) -> None:
    save(url, {"model": model()}, {"model": model(b=nn.Linear(1, 1))})
    with Checkpointer(url) as ckpt, pytest.raises(StateMismatch, match=r"model\.b\.bias: in the snapshot but not in"):
        ckpt.restore({"model": model()})


def test_a_long_list_of_what_does_not_fit_is_cut_and_counted(url: str) -> None:
    save(url, {"x": {}, **{f"t{number}": torch.ones(1) for number in range(70)}})
    with Checkpointer(url) as ckpt, pytest.raises(StateMismatch) as caught:
        ckpt.restore({f"t{number}": torch.ones(2) for number in range(70)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 52
    assert lines[-1].strip() == "and 20 more"
