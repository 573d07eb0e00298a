"""What one save adds to a training loop: P-loop, wall time and CPU time.

A byte-level transformer with AdamW on two cores. A run is ``STEPS`` steps with one save after the first, and ends when
that is durable; or as many steps with none. All ways share the model, and train it on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.compare.harness import Measures, alternate, cpu_seconds
from bench.compare.save import Steps
from bench.compare.state import Loader, State
from bench.compare.ways import Way

STEPS = 8
BATCH, LENGTH = 2, 32
WITHOUT = "no save"
BYTES_PER_ELEMENT = 12
"""A float32 parameter and two moments."""


class Model(torch.nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(256, width)
        self.layers = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = torch.nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class Training:
    def __init__(self, size: int) -> None:
        torch.manual_seed(0)
        width = 512 if size > 100 << 20 else 64
        self.model = Model(width, max(1, size // (12 * width * width * BYTES_PER_ELEMENT)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.tokens = torch.randint(0, 256, (BATCH, LENGTH + 1))
        self.state = State({"model": self.model, "optimizer": self.optimizer, "loader": Loader()})

    def compute(self) -> None:
        """Forward and backward."""
        logits = self.model(self.tokens[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten()).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(ways: Sequence[type[Way]], size: int, runs: int, directory: Path) -> dict[str, Any]:
    training = Training(size)
    training.compute()
    training.update()  # the optimizer has its state from now on
    cases = {WITHOUT: partial(trained, training, None, Steps())}
    made: list[Way] = []
    for way in ways:
        own = directory / way.__name__
        own.mkdir(parents=True)
        made.append(way(training.state, own))
        cases[way.name] = partial(trained, training, made[-1], Steps())
    rows = alternate(cases, runs, training.state.bytes())
    for each in made:
        each.close()
    return {"ranks": 1, "bytes": training.state.bytes(), "steps": STEPS, "runs": rows}


def trained(training: Training, way: Way | None, steps: Steps, ready: Callable[[], None]) -> Measures:
    saved = steps.next()
    waited = 0.0
    ready()
    cpu, start = cpu_seconds(), time.perf_counter()
    for number in range(STEPS):
        training.compute()
        if way is not None:
            before = time.perf_counter()
            way.wait_staged()
            waited += time.perf_counter() - before
        training.update()
        if way is not None and number == 0:
            before = time.perf_counter()
            way.save(saved)
            waited += time.perf_counter() - before
    if way is not None:
        way.wait()
    measures = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds() - cpu,
        "stood_still_seconds": waited,
    }
    if way is not None:
        way.discard(saved)
    return measures
