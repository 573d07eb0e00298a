"""Saving changes nothing of the training: with a save in every step, losses, weights and random numbers are those
without, to the bit, though each save is staged beside the next forward and backward. What changes beside staging by
mistake is named.
"""

from __future__ import annotations

import re
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastckpt
from fastckpt import Checkpointer, FastckptError, Options, RankFailed, RNGState
from fastckpt import checkpointer as front
from fastckpt.storage.open import open_store
from fastckpt.storage.store import ObjectWriter, Store

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))
import ranks

SECONDS = 60.0
STEPS = 6
VOCABULARY, CONTEXT, WIDTH = 64, 12, 32
STREAMED: dict[str, Any] = {"chunk_bytes": 4096, "staging_bytes_max": 8192}
"""Room for two chunks of some forty: nothing is staged before most has been written."""


class SlowStore:
    """Packs of the n-th attempt are begun only when ``allow(n)`` has been called."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = threading.Condition()
        self._attempts: dict[str, int] = {}
        self._allowed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def allow(self, attempts: int) -> None:
        with self._changed:
            self._allowed = attempts
            self._changed.notify_all()

    def write(self, name: str, **hints: Any) -> ObjectWriter:
        with self._changed:
            number = self._attempts.setdefault(name.split("/")[1], len(self._attempts) + 1)
            assert self._changed.wait_for(lambda: number <= self._allowed, SECONDS)
        return self._store.write(name, **hints)


class Model(nn.Module):
    """A transformer that predicts the next token; its dropout draws in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
}


@dataclass
class Trained:
    losses: list[bytes]
    weights: list[dict[str, bytes]]
    """After each step."""
    random: bytes


Save = Callable[[int, dict[str, Any]], None]
Settle = Callable[[], None]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


def train(optimizer_name: str, save: Save, before_step: Settle) -> Trained:
    torch.manual_seed(3)
    model = Model()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    state = {"model": model, "optimizer": optimizer, "rng": RNGState()}
    trained = Trained([], [], b"")
    for step in range(1, STEPS + 1):
        tokens = torch.randint(VOCABULARY, (4, CONTEXT + 1))
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        before_step()
        optimizer.step()
        trained.losses.append(raw(loss))
        trained.weights.append({f"model.{name}": raw(tensor) for name, tensor in model.state_dict().items()})
        save(step, state)
    trained.random = raw(torch.get_rng_state())
    return trained


@pytest.mark.parametrize(
    ("optimizer", "fence"), [("sgd", "hook"), ("foreach", "hook"), ("fused", "hook"), ("fused", "explicit")]
)
def test_losses_with_a_save_in_every_step_are_those_without_to_the_last_bit(
    optimizer: str, fence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(optimizer, lambda step, state: None, lambda: None)
    url = f"memory://{secrets.token_hex(8)}"
    store = SlowStore(open_store(url))
    monkeypatch.setattr(front, "open_store", lambda _: store)
    statuses: list[str] = []
    saved = 0

    def let_pass(*_: object) -> None:
        """The storage answers only now: all of the forward and the backward was beside staging."""
        if ckpt.pending is not None:
            statuses.append(ckpt.pending.status)
        store.allow(saved)

    def before_step() -> None:
        if fence == "explicit":
            let_pass()
            ckpt.wait_staged(SECONDS)

    def save(step: int, state: dict[str, Any]) -> None:
        nonlocal saved
        saved = step
        ckpt.save(step, state)

    before_the_fence = register_optimizer_step_pre_hook(let_pass) if fence == "hook" else None
    try:
        with Checkpointer(url, options=Options(fence=fence, **STREAMED)) as ckpt:
            trained = train(optimizer, save, before_step)
            store.allow(STEPS)
    finally:
        if before_the_fence is not None:
            before_the_fence.remove()
    assert statuses == ["staging"] * (STEPS - 1)
    assert trained == plain
    snapshots = fastckpt.open(url).snapshots()
    assert [snapshot.step for snapshot in snapshots] == list(range(1, STEPS + 1))
    for snapshot, weights in zip(snapshots, plain.weights, strict=True):
        assert {key: snapshot.read(key).tobytes() for key in weights} == weights


# --- mistakes -------------------------------------------------------------------------------------------------------


def step_unseen(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """With the fused operator itself, as a compiled or captured step calls it: no hook runs."""
    of = [(parameter, optimizer.state[parameter]) for parameter in model.parameters()]
    torch._fused_adamw_(
        [parameter.data for parameter, _ in of],
        [torch.ones_like(parameter) for parameter, _ in of],
        *([entries[name] for _, entries in of] for name in ("exp_avg", "exp_avg_sq")),
        [],
        [entries["step"] for _, entries in of],
        lr=0.01,
        beta1=0.9,
        beta2=0.999,
        weight_decay=0.1,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


def step_past_the_fence(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def mistaken(url: str, store: SlowStore, fence: Any, mistake: Callable[..., None], model: nn.Module) -> str:
    """What a save fails with during whose staging ``mistake`` is made; the next one holds what the mistake has left."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step_past_the_fence(model, optimizer)
    state = {"model": model, "optimizer": optimizer}
    with Checkpointer(url, options=Options(fence=fence, commit_seconds_max=SECONDS, **STREAMED)) as ckpt:
        pending = ckpt.save(1, state)
        mistake(model, optimizer)
        assert pending.status == "staging"
        store.allow(2)
        with pytest.raises(FastckptError) as caught:
            pending.wait(SECONDS)
        assert ckpt.snapshots() == []
        ckpt.save(2, state).wait(SECONDS)
        assert ckpt.pending is not None
        snapshot = ckpt.pending.snapshot
        for name, tensor in getattr(model, "module", model).state_dict().items():
            assert snapshot.read(f"model.{name}").tobytes() == raw(tensor)
    error = caught.value
    if isinstance(error, RankFailed):
        assert sorted(error.failures) == list(range(dist.get_world_size()))
        error = error.failures[dist.get_rank()]  # type: ignore[assignment]
    return str(error)


CHANGED = r"^(model|optimizer\.state)\.\w+\.[\w.]+ changed while it was being staged, by something other than Optim"


@pytest.mark.parametrize(
    ("fence", "mistake"),
    [("hook", step_unseen), ("explicit", step_past_the_fence)],
)
def test_what_changes_beside_staging_is_named_and_costs_that_save_only(
    fence: str, mistake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{secrets.token_hex(8)}"
    store = SlowStore(open_store(url))
    monkeypatch.setattr(front, "open_store", lambda _: store)
    assert re.match(CHANGED, mistaken(url, store, fence, mistake, Model()))


def sum_in_place(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        dist.all_reduce(parameter.data)


def collective(url: str) -> str:
    store = SlowStore(open_store(url))
    front.open_store = lambda _: store  # type: ignore[attr-defined]
    torch.manual_seed(3)
    return mistaken(url, store, "hook", sum_in_place, DistributedDataParallel(Model()))


@pytest.mark.distributed
def test_a_collective_in_place_beside_staging_is_named_on_all_ranks(tmp_path: Path) -> None:
    for message in ranks.run(2, collective, str(tmp_path)):
        assert re.match(CHANGED, message)
