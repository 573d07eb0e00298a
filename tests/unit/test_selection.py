"""What of a snapshot is restored, and into what: only, rename, policy, and states the snapshot does not fit."""

from __future__ import annotations

import logging
import secrets
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt import Checkpointer, Options, StateMismatch

SMALL = Options(chunk_bytes=4096)


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def trained(seed: int, kind: Any = torch.optim.AdamW, **settings: Any) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 4)
    optimizer = kind(model.parameters(), **({"lr": 0.1 * (seed + 1)} | settings))
    model(torch.randn(2, 4)).square().sum().backward()  # gradients that differ between seeds, the bias's too
    optimizer.step()
    return model, optimizer


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {
        name: {key: torch.as_tensor(value).tolist() for key, value in optimizer.state.get(parameter, {}).items()}
        for name, parameter in model.named_parameters()
    }


def saved(url: str, **names: str) -> tuple[nn.Linear, torch.optim.Optimizer]:
    model, optimizer = trained(0)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model, names.get("optimizer", "optimizer"): optimizer}).wait()
    return model, optimizer


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("only", [("optimizer",), ("optimizer.*",), ("optimizer", "optimizer.state.weight.*")])
def test_an_optimizer_selected_by_name_is_restored_whole_and_nothing_else_is(
    url: str, only: tuple[str, ...], fresh: bool
) -> None:
    expected = moments(*saved(url))
    model, optimizer = trained(1)
    if fresh:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    weight = model.weight.tolist()
    with Checkpointer(url, options=SMALL) as ckpt:
        assert ckpt.restore({"model": model, "optimizer": optimizer}, only=only) == 1
    assert moments(model, optimizer) == expected
    assert expected["weight"]["exp_avg"]
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert model.weight.tolist() == weight


def test_only_that_selects_nothing_is_a_mismatch_and_changes_nothing(url: str) -> None:
    saved(url)
    model, optimizer = trained(1)
    before = (model.weight.tolist(), moments(model, optimizer))
    with Checkpointer(url, options=SMALL) as ckpt:
        for missing in ("raise", "keep"):
            with pytest.raises(StateMismatch, match=r"only=.*modle.* selects nothing"):
                ckpt.restore({"model": model, "optimizer": optimizer}, only=("modle.*",), missing=missing)
    assert (model.weight.tolist(), moments(model, optimizer)) == before


@pytest.mark.parametrize("only", [("optimizer.state.weight.*",), ("model.*", "optimizer.state.weight.*")])
def test_state_of_one_parameter_alone_never_costs_the_others_theirs(url: str, only: tuple[str, ...]) -> None:
    expected = moments(*saved(url))
    model, optimizer = trained(1)
    before = moments(model, optimizer)
    assert before["bias"] != expected["bias"]
    with Checkpointer(url, options=SMALL) as ckpt:
        try:
            ckpt.restore({"model": model, "optimizer": optimizer}, only=only)
        except StateMismatch:  # refusing is fine; half an optimizer is not
            assert moments(model, optimizer) == before
    assert moments(model, optimizer)["bias"] == before["bias"]


def test_going_back_and_keeping_what_is_missing_do_not_go_together(url: str) -> None:
    saved(url)
    model, _ = trained(1)
    before = model.weight.tolist()
    ckpt = Checkpointer(url, options=SMALL)
    with pytest.raises(ValueError, match=r"missing='keep' with policy='previous'"):
        ckpt.restore({"model": model}, policy="previous", missing="keep")
    ckpt.close()
    assert model.weight.tolist() == before


def test_a_module_without_tensors_does_not_make_restore_pass_over_snapshots(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def state(value: float) -> dict[str, Any]:
        return {"x": torch.full((3,), value), "loss": nn.CrossEntropyLoss()}

    with Checkpointer(url, options=SMALL) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state(float(step)))
    restored = state(0.0)
    with caplog.at_level(logging.WARNING, "fastckpt"), Checkpointer(url, options=SMALL) as ckpt:
        assert ckpt.restore(restored) == 2
    assert caplog.text == ""
    assert restored["x"].tolist() == [2.0, 2.0, 2.0]


def test_a_learning_rate_that_is_a_tensor_of_one_element_is_restored_in_place(url: str) -> None:
    with Checkpointer(url, options=SMALL) as ckpt:
        model, optimizer = trained(0, lr=torch.tensor([0.1]), foreach=False)
        ckpt.save(1, {"model": model, "optimizer": optimizer}).wait()
        model, optimizer = trained(1, lr=torch.tensor([0.2]), foreach=False)
        rate = optimizer.param_groups[0]["lr"]
        assert ckpt.restore({"model": model, "optimizer": optimizer}) == 1
        assert optimizer.param_groups[0]["lr"] is rate
        assert torch.equal(rate, torch.tensor([0.1]))
        ckpt.save(2, {"model": model, "optimizer": optimizer}).wait()


def test_an_optimizer_can_be_renamed(url: str) -> None:
    expected = moments(*saved(url, optimizer="opt"))
    model, optimizer = trained(1)
    with Checkpointer(url, options=SMALL) as ckpt:
        assert ckpt.restore({"model": model, "optimizer": optimizer}, rename={"opt": "optimizer"}) == 1
    assert moments(model, optimizer) == expected
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("plain", [False, True])
def test_two_prefixes_renamed_to_one_name_are_refused(url: str, plain: bool) -> None:
    def state(name: str, value: float) -> dict[str, Any]:
        return {name: value if plain else torch.full((3,), value)}

    target = state("m.x", 7.0)
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, state("a.x", 0.0) | state("b.x", 1.0)).wait()
        with pytest.raises(ValueError, match=r"rename makes m\.x of two names"):
            ckpt.restore(target, rename={"a.": "m.", "b.": "m."})
    assert str(target) == str(state("m.x", 7.0))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("back", [False, True])
def test_a_snapshot_of_another_kind_of_optimizer_is_a_mismatch_and_changes_nothing(
    url: str, back: bool, momentum: float
) -> None:
    pair = [trained(0), trained(1, torch.optim.SGD, momentum=momentum)]
    (model, optimizer), (other, target) = reversed(pair) if back else pair
    before = (other.weight.tolist(), moments(other, target), str(target.param_groups[0]["lr"]))
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer}).wait()
        with pytest.raises(StateMismatch, match="another kind of optimizer"):
            ckpt.restore({"model": other, "optimizer": target})
    assert (other.weight.tolist(), moments(other, target), str(target.param_groups[0]["lr"])) == before


def test_a_tensor_whose_elements_share_memory_is_refused_before_anything_changes(url: str) -> None:
    strided = torch.zeros(5).as_strided((3, 3), (1, 1))
    target = {"a": torch.zeros(3), "e": strided}
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"a": torch.ones(3), "e": torch.arange(9.0).reshape(3, 3)}).wait()
        with pytest.raises(StateMismatch, match="e: its elements share memory"):
            ckpt.restore(target)
    assert target["a"].tolist() == [0.0, 0.0, 0.0]
    assert strided.unique().tolist() == [0.0]


def test_column_views_of_one_matrix_are_saved_and_overlapping_ones_are_refused(url: str) -> None:
    matrix = torch.arange(64 * 128.0).reshape(64, 128)
    views = {f"v{n}": matrix[:, 16 * n : 16 * (n + 1)] for n in range(8)}
    with Checkpointer(url, options=SMALL) as ckpt:
        pending = ckpt.save(1, views)
        pending.wait()
        for name, view in views.items():
            assert pending.snapshot.read(name).tolist() == view.tolist()
        with pytest.raises(ValueError, match="share part of their memory"):
            ckpt.save(2, {"a": matrix[:, :17], "b": matrix[:, 16:32]})
        with pytest.raises(ValueError, match="share part of their memory"):
            ckpt.save(2, {"b": matrix[:, 16:32], "a": matrix[3:, 10:17]})
        assert [snapshot.step for snapshot in ckpt.snapshots()] == [1]
