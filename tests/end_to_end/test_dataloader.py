"""torchdata's loader in the state: saved in the middle of an epoch, the same batches follow in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler, StatefulDistributedSampler

from fastckpt import Checkpointer, RNGState

pytestmark = [
    pytest.mark.timeout(120),
    # torch's notice about what torchdata does.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]

SAMPLES = 41
SAVED = (0, 4, 11)
"""Batches taken when the loader is saved: before the epoch, in the middle, at its end."""
LOADERS = {
    "shuffled, no workers": SAVED,
    "shuffled, 2 workers": (4,),
    "distributed, no workers": (4,),
    "distributed, 2 persistent workers": (0, 4),
    "iterable, no workers": (4,),
    "iterable, 2 workers": (4,),
}
"""Each with the snapshots that it is restored from: workers take time to start."""


class Shuffling(IterableDataset[int]):
    """Draws from a buffer that is too large to travel inside the value; each worker has its share of the samples."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        share = range(SAMPLES) if worker is None else range(worker.id, SAMPLES, worker.num_workers)
        if self.state is None:
            buffer = torch.zeros(9000, dtype=torch.int64)
            buffer[: len(share)] = torch.tensor(share)
            self.state = {
                "generator": torch.Generator().manual_seed(6).get_state(),
                "buffer": buffer,
                "left": len(share),
            }
        generator = torch.Generator()
        generator.set_state(self.state["generator"])
        buffer = self.state["buffer"]
        while left := self.state["left"]:
            at = int(torch.randint(left, (), generator=generator))
            sample = int(buffer[at])
            buffer[at] = buffer[left - 1].item()
            self.state.update(left=left - 1, generator=generator.get_state())
            yield sample
        self.state = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self.state is None else {**self.state, "buffer": self.state["buffer"].clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state or None


class Loader(StatefulDataLoader[Any]):
    asked = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return super().state_dict()


def loader(which: str) -> Loader:
    kind, _, workers = which.partition(", ")
    how: dict[str, Any] = {"num_workers": 0 if workers == "no workers" else 2, "persistent_workers": "pers" in workers}
    # What starts an epoch draws; the stream of the samples, and that of training, are not drawn from.
    how["generator"] = torch.Generator().manual_seed(1)
    if kind == "iterable":
        return Loader(Shuffling(), batch_size=4, **how)
    if kind == "shuffled":
        sampler: Any = RandomSampler(range(SAMPLES), generator=torch.Generator().manual_seed(2))
    else:
        sampler = StatefulDistributedSampler(range(SAMPLES), num_replicas=1, rank=0, seed=3)  # type: ignore[arg-type]
    return Loader(range(SAMPLES), batch_size=4, sampler=sampler, **how)  # type: ignore[arg-type]


def train(data: Loader, saved: str | None = None) -> list[tuple[list[int], float]]:
    """An epoch's batches, each with a number drawn for it. Saved where ``SAVED`` says."""
    seen: list[tuple[list[int], float]] = []
    state = {"data": data, "rng": RNGState()}
    if saved is None:
        return [(batch.tolist(), float(torch.rand(()))) for batch in data]
    with Checkpointer(saved) as ckpt:
        ckpt.save(0, state)
        for batch in data:
            seen.append((batch.tolist(), float(torch.rand(()))))
            if len(seen) in SAVED:
                ckpt.save(len(seen), state)
    assert data.asked == len(SAVED)
    return seen


def go_on(directory: str) -> None:
    """In a new process: what follows each snapshot."""
    followed = {}
    loaders = []  # what ends in a garbage collection waits five seconds for its workers
    for which, steps in LOADERS.items():
        for step in steps:
            loaders.append(data := loader(which))
            with Checkpointer(f"{directory}/{which}") as ckpt:
                ckpt.restore({"data": data, "rng": RNGState()}, step=step)
            followed[f"{which}, {step}"] = [*train(data), *train(data)]
    print(json.dumps(followed))


def test_the_same_batches_follow_in_a_new_process_and_saving_takes_none(tmp_path: Path) -> None:
    expected = {}
    for which, steps in LOADERS.items():
        torch.manual_seed(4)
        undisturbed = loader(which)
        batches = [*train(undisturbed), *train(undisturbed)]
        torch.manual_seed(4)
        data = loader(which)
        assert [*train(data, f"{tmp_path}/{which}"), *train(data)] == batches
        expected |= {f"{which}, {step}": [[*batch] for batch in batches[step:]] for step in steps}
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    assert result.returncode == 0, result.stderr
    followed = json.loads(result.stdout)
    for which, batches in expected.items():
        assert followed[which] == batches, which


class Unsaveable(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def state_dict(self) -> dict[str, Any]:
        return {"files": [object()]}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def test_what_a_loader_holds_and_no_snapshot_can_is_named() -> None:
    with (
        Checkpointer("memory://unsaveable-loader") as ckpt,
        pytest.raises(TypeError, match=r"data.*dataset_state.*files.*\[0\].*object"),
    ):
        ckpt.save(1, {"data": StatefulDataLoader(Unsaveable())})


if __name__ == "__main__":
    go_on(sys.argv[1])
