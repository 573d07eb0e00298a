"""Lazily conjugated and negated tensors: their memory does not hold their values, and the values are what counts."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fastckpt import Checkpointer, Options
from fastckpt import checkpointer as front

SECONDS = 20.0
SMALL = Options(chunk_bytes=4096)


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def numbers(count: int = 5) -> torch.Tensor:
    return torch.complex(torch.arange(1.0, count + 1), torch.arange(10.0, count + 10))


def conjugated(value: torch.Tensor) -> torch.Tensor:
    view = value.clone().conj()
    assert view.is_conj()
    return view


def negated(value: torch.Tensor) -> torch.Tensor:
    view = value.clone().conj().imag
    assert view.is_neg()
    return view


def test_a_tensor_and_its_lazy_conjugate_are_refused_since_restoring_one_would_change_the_other(url: str) -> None:
    a = numbers()
    with (
        Checkpointer(url, options=SMALL) as ckpt,
        pytest.raises(ValueError, match="x and y share part of their memory"),
    ):
        ckpt.save(1, {"x": a, "y": a.conj()})


def test_a_lazy_view_is_saved_by_its_values_beside_what_holds_the_same_bytes(url: str) -> None:
    a = numbers()
    state = {"x": a, "y": conjugated(a), "i": a.clone().imag, "n": negated(a)}
    with Checkpointer(url, options=SMALL) as ckpt:
        pending = ckpt.save(1, state)
        pending.wait(SECONDS)
        for name, tensor in state.items():
            assert pending.snapshot.read(name).tolist() == tensor.tolist()


@pytest.mark.parametrize("view", [conjugated, negated])
@pytest.mark.parametrize("cast", [False, True])
def test_restoring_into_a_lazy_view_sets_its_values(
    url: str, view: Callable[[torch.Tensor], torch.Tensor], cast: bool
) -> None:
    saved = view(numbers())
    target = view(torch.zeros(5, dtype=torch.complex128 if cast else torch.complex64))
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"x": saved}).wait(SECONDS)
        assert ckpt.restore({"x": target}, cast=cast) == 1
        plain = torch.zeros(5, dtype=saved.dtype)
        assert ckpt.restore({"x": plain}) == 1
    assert (target.is_conj(), target.is_neg()) == (saved.is_conj(), saved.is_neg())
    assert target.tolist() == plain.tolist() == saved.tolist()


def test_a_conjugated_parameter_is_staged_as_it_was_at_the_save(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = threading.Event()
    write = front.Saves.write

    def late(*arguments: Any) -> Any:
        assert changed.wait(SECONDS)
        return write(*arguments)

    monkeypatch.setattr(front.Saves, "write", late)
    module = nn.Module()
    module.register_parameter("p", nn.Parameter(conjugated(numbers(2000))))
    parameter = module.get_parameter("p")
    assert parameter.is_conj()
    expected = parameter.tolist()
    with Checkpointer(url, options=SMALL) as ckpt:
        pending = ckpt.save(1, {"m": module})
        with torch.no_grad():
            parameter.zero_()
        changed.set()
        pending.wait(SECONDS)
        assert pending.snapshot.read("m.p").tolist() == expected
        assert ckpt.restore({"m": module}) == 1
    assert parameter.is_conj()
    assert parameter.tolist() == expected
