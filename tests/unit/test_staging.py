"""The fence: what a save holds up, what it lets go on, and what it notices. Stores that wait make each moment last."""

from __future__ import annotations

import gc
import random
import secrets
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import fastckpt
from fastckpt import AttemptAborted, Checkpointer, Options, SaveError
from fastckpt.job.staging import Staging
from fastckpt.job.state import Describer
from fastckpt.storage.memory import memory_store
from fastckpt.storage.store import Bytes, ObjectWriter, Store

SECONDS = 20.0
"""Longest wait for something that is going to happen."""


class GatedStore:
    """Waits before appending to a pack until ``gate`` is set. ``reached`` says that something waits there."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url, self.capabilities = store.url, store.capabilities
        self.gate = threading.Event()
        self.reached = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
        return GatedWriter(self.store.write(name, bytes_expected=bytes_expected), self)


class GatedWriter:
    def __init__(self, writer: ObjectWriter, store: GatedStore) -> None:
        self.finish, self.abandon = writer.finish, writer.abandon
        self._writer = writer
        self._store = store

    def append(self, data: Bytes) -> int:
        self._store.reached.set()
        assert self._store.gate.wait(SECONDS)
        return self._writer.append(data)


class Job:
    """A model of 24 chunks, and room to stage two of them: while the gate is shut, staging cannot complete."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        name = secrets.token_hex(8)
        self.store = GatedStore(memory_store(name))
        monkeypatch.setattr("fastckpt.checkpointer.open_store", lambda _: self.store)
        options = {"chunk_bytes": 4096, "staging_bytes_max": 8192, **options}
        self.ckpt = Checkpointer(f"memory://{name}", options=Options(**options))
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(96, 128), nn.BatchNorm1d(128), nn.Linear(128, 96))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "plain": torch.arange(5.0),
            "list": [1],
        }
        self.backward()

    def backward(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)

    def values(self) -> dict[str, bytes]:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {name: raw(tensor) for name, tensor in {**tensors, "plain": self.state["plain"]}.items()}

    def saved(self, step: int) -> dict[str, bytes]:
        snapshot = fastckpt.open(self.ckpt.url).snapshot(step)
        return {key: snapshot.read(key).tobytes() for key in snapshot.layout.keys if not key.startswith("optimizer")}

    def open_when(self, event: threading.Event) -> None:
        """Opens the gate, from another thread, once ``event`` is set."""

        def run() -> None:
            assert event.wait(SECONDS)
            self.store.gate.set()

        threading.Thread(target=run, daemon=True).start()


MakeJob = Callable[..., Job]


@pytest.fixture
def make_job(monkeypatch: pytest.MonkeyPatch) -> Any:
    jobs: list[Job] = []

    def make(**options: Any) -> Job:
        jobs.append(Job(monkeypatch, **options))
        return jobs[-1]

    yield make
    for job in jobs:
        job.store.gate.set()
        if job.ckpt._fence is not None:
            job.ckpt._fence.close()


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def hooks() -> int:
    return len(torch_optimizer._global_optimizer_pre_hooks)


def test_a_step_waits_until_a_state_larger_than_the_staging_memory_has_streamed_through(make_job: MakeJob) -> None:
    entering = threading.Event()
    before_fence = torch_optimizer.register_optimizer_step_pre_hook(lambda *_: entering.set())
    try:
        job = make_job()
        job.optimizer.step()  # the optimizer has state from now on
        job.backward()
        before = job.values()
        entering.clear()
        pending = job.ckpt.save(1, job.state)
        assert job.store.reached.wait(SECONDS)
        assert pending.status == "staging"
        assert not any(info.size for info in job.store.store.list("packs")), "save returned before any byte was written"
        at_step = []
        job.optimizer.register_step_pre_hook(lambda *_: at_step.append((pending.status, job.store.gate.is_set())))
        job.open_when(entering)
        job.optimizer.step()
    finally:
        before_fence.remove()
    (status, was_open), *_ = at_step
    assert was_open
    assert status in ("staged", "written", "committed")
    pending.wait(SECONDS)
    assert job.saved(1) == before != job.values()
    assert pending.counters["fence_seconds"] > 0


def test_a_state_that_fits_the_staging_memory_lets_training_go_on_before_a_byte_is_written(make_job: MakeJob) -> None:
    job = make_job(staging_bytes_max=1 << 20)
    before = job.values()
    pending = job.ckpt.save(1, job.state)
    assert job.store.reached.wait(SECONDS)
    pending.wait_staged(SECONDS)
    assert pending.status == "staged"
    job.optimizer.step()
    with torch.no_grad():
        job.model[0].weight.zero_()
    assert not pending.done
    job.store.gate.set()
    pending.wait(SECONDS)
    assert job.saved(1) == before


def test_buffers_plain_tensors_and_values_may_change_as_soon_as_save_has_returned(make_job: MakeJob) -> None:
    job = make_job()
    before = job.values()
    pending = job.ckpt.save(1, job.state)
    for _, buffer in job.model.named_buffers():
        buffer.add_(1)
    job.state["plain"].zero_()
    job.state["list"].append(2)
    job.optimizer.param_groups[0]["lr"] = 77.0
    job.store.gate.set()
    pending.wait(SECONDS)
    assert job.saved(1) == before
    restored: dict[str, Any] = {"optimizer": job.optimizer, "model": job.model, "list": None, "plain": torch.zeros(5)}
    job.ckpt.restore(restored)
    assert restored["list"] == [1]
    assert job.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("fence", ["hook", "explicit"])
def test_a_change_that_no_fence_saw_fails_the_save_and_names_tensor_and_remedy(make_job: MakeJob, fence: str) -> None:
    job = make_job(fence=fence)
    pending = job.ckpt.save(1, job.state)
    assert job.store.reached.wait(SECONDS)
    if fence == "hook":
        for parameter in job.model.parameters():
            parameter.data.mul_(3).add_(1)
    else:
        job.optimizer.step()  # held by nothing
        assert not pending.done
    job.store.gate.set()
    with pytest.raises(SaveError, match=r"model\.\d\.(weight|bias) changed while it was being staged") as caught:
        pending.wait(SECONDS)
    named = str(caught.value).split(" ")[0]
    assert f"Options(copy=('{named}',))" in str(caught.value)
    assert job.ckpt.snapshots() == []
    with job.ckpt as ckpt:
        ckpt.save(1, job.state).wait(SECONDS)
    assert job.saved(1) == job.values()


def test_what_is_copied_by_glob_may_be_changed_by_anything_after_save(make_job: MakeJob) -> None:
    job = make_job(copy=("model.*",))
    before = job.values()
    pending = job.ckpt.save(1, job.state)
    for parameter in job.model.parameters():
        parameter.data.mul_(3).add_(1)
    job.store.gate.set()
    pending.wait(SECONDS)
    assert job.saved(1) == before


def test_with_an_explicit_fence_wait_staged_says_when_parameters_may_change(make_job: MakeJob) -> None:
    hooks_before = hooks()
    job = make_job(fence="explicit")
    assert hooks() == hooks_before
    before = job.values()
    pending = job.ckpt.save(1, job.state)
    for waiter in (job.ckpt.wait_staged, pending.wait_staged):
        with pytest.raises(TimeoutError, match="step 1 was not staged within"):
            waiter(0.01)
    job.store.gate.set()
    job.ckpt.wait_staged(SECONDS)
    job.optimizer.step()
    pending.wait(SECONDS)
    assert job.saved(1) == before != job.values()


@pytest.mark.parametrize("why", ["asked for", "capturable"])
def test_a_copy_fence_holds_save_itself_until_everything_is_staged(make_job: MakeJob, why: str) -> None:
    job = make_job(fence="copy") if why == "asked for" else make_job()
    if why == "capturable":
        job.optimizer = job.state["optimizer"] = torch.optim.AdamW(job.model.parameters(), capturable=True)
    before = job.values()
    job.open_when(job.store.reached)
    pending = job.ckpt.save(1, job.state)
    assert pending.status != "staging"
    for parameter in job.model.parameters():
        parameter.data.mul_(3).add_(1)
    pending.wait(SECONDS)
    assert job.saved(1) == before


def test_a_fence_that_takes_too_long_gives_up_the_save_and_not_the_training(make_job: MakeJob) -> None:
    job = make_job(fence_seconds_max=0.05)
    pending = job.ckpt.save(1, job.state)
    before = job.values()
    job.optimizer.step()  # returns, though not a byte can be written
    assert job.values() != before
    assert not job.store.gate.is_set()
    job.store.gate.set()
    with pytest.raises(AttemptAborted):
        pending.wait(SECONDS)
    assert job.ckpt.snapshots() == []
    job.ckpt.save(1, job.state).wait(SECONDS)
    assert job.saved(1) == job.values()


def test_the_next_save_waits_for_the_staging_of_the_one_before_and_both_are_committed(make_job: MakeJob) -> None:
    job = make_job()
    first = job.ckpt.save(1, job.state)
    assert job.store.reached.wait(SECONDS)
    waiting = threading.Event()

    class Watched(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waiting.set()
            return super().wait(timeout)

    first._staged = Watched()
    before = job.values()
    job.open_when(waiting)
    second = job.ckpt.save(2, job.state)
    assert first.status in ("staged", "written", "committed")
    second.wait(SECONDS)
    first.wait(SECONDS)
    assert job.saved(1) == job.saved(2) == before


def test_each_entry_of_the_stream_of_an_accelerator_is_by_an_object_of_its_own() -> None:
    staging = Staging(Describer().describe({"plain": torch.ones(3)}))
    device = torch.device("cuda", 0)  # which this machine may not have: streams are told by their numbers
    stream = torch.Stream(stream_id=3, device_index=0, device_type=1)
    staging._events[device], staging._streams[device] = None, stream  # type: ignore[assignment]
    entries = staging.on_stream(device), staging.on_stream(device)
    assert list(entries) == [stream, stream]
    assert len({id(stream), *map(id, entries)}) == 3


def test_the_fence_of_a_closed_checkpointer_is_gone(tmp_path: Path) -> None:
    before = hooks()
    with Checkpointer(str(tmp_path)):
        assert hooks() == before + 1
    assert hooks() == before


def test_the_fence_of_a_forgotten_checkpointer_is_gone(tmp_path: Path) -> None:
    before = hooks()
    ckpt = Checkpointer(str(tmp_path))
    ckpt.save(1, {"x": torch.ones(3)}).wait(SECONDS)
    assert hooks() == before + 1
    ckpt._join()
    assert ckpt._cleaner is not None
    ckpt._cleaner.join(SECONDS)
    gone = weakref.ref(ckpt)
    del ckpt
    gc.collect()
    assert gone() is None
    assert hooks() == before


def test_two_checkpointers_of_one_process_both_hold_the_step(make_job: MakeJob) -> None:
    one, two = make_job(), make_job()
    before = one.values()
    two.model, two.optimizer, two.state = one.model, one.optimizer, one.state
    first, second = one.ckpt.save(1, one.state), two.ckpt.save(1, one.state)
    assert one.store.reached.wait(SECONDS)
    assert two.store.reached.wait(SECONDS)
    statuses = []
    one.optimizer.register_step_pre_hook(lambda *_: statuses.extend([first.status, second.status]))
    one.open_when(one.store.reached)
    two.open_when(two.store.reached)
    one.optimizer.step()
    assert "staging" not in statuses
    first.wait(SECONDS)
    second.wait(SECONDS)
    assert one.saved(1) == two.saved(1) == before


def test_saving_and_restoring_leave_the_random_number_generators_of_the_training_alone(tmp_path: Path) -> None:
    def states() -> tuple[Any, ...]:
        name, keys, *rest = np.random.get_state()  # type: ignore[misc]
        return random.getstate(), name, keys.tobytes(), *rest, torch.get_rng_state().tolist()

    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 300)).sum().backward()
    optimizer.step()
    before = states()
    with Checkpointer(str(tmp_path)) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer}).wait(SECONDS)
        ckpt.restore({"model": model, "optimizer": optimizer})
    assert states() == before
