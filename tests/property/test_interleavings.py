"""Seeded programs of training, saving, waiting, rolling back, closing and failing, over a store that is held back and
fails: every snapshot is what the state was when its ``save`` was called, every failure has a cause and is raised once,
and nothing is left at the end.

What a program does is drawn from its seed; how threads interleave is not. The store therefore decides how far the
threads behind a save may come: while it is held, operations pass one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

import fastckpt
from fastckpt import (
    AttemptAborted,
    Checkpointer,
    FastckptError,
    Options,
    OutOfSpace,
    SaveError,
    SnapshotExists,
    StorageError,
)
from fastckpt.pending import Pending
from fastckpt.repository.verify import check_history, verify
from fastckpt.storage.open import open_store
from fastckpt.storage.store import Bytes, ObjectWriter, Store

PROGRAMS = 24
SOAK_ROUNDS = int(os.environ.get("SOAK_ROUNDS", "30"))
ACTIONS = 40
SECONDS = 60.0
"""Longest wait for something that is going to happen."""
IMPATIENT_SECONDS = 0.02
PACE_SECONDS = 0.0005
"""Between two operations of a held store that goes on: whoever waits for them may overtake, or not."""


class Control:
    """Holds operations of stores back, lets them pass, and makes them fail. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = False
        self._permits = 0
        self._waiting = 0
        self._failing: tuple[str, int, bool, StorageError] | None = None
        self.failures = 0
        """Operations that were made to fail so far."""

    def hold(self) -> None:
        with self._changed:
            self._held = True

    def let_go(self) -> None:
        with self._changed:
            self._held, self._permits = False, 0
            self._changed.notify_all()

    def let_pass(self, count: int) -> None:
        with self._changed:
            self._permits += count * self._held
            self._changed.notify_all()

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        """What is held back goes on slowly meanwhile: the caller may be waiting for it."""
        over = threading.Event()

        def pump() -> None:
            while not over.wait(PACE_SECONDS):
                self.let_pass(1)

        thread = threading.Thread(target=pump)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def wait_held(self, pending: Pending) -> bool:
        """Whether an operation is held back; False if the save is over before one is."""
        end = time.monotonic() + SECONDS
        with self._changed:
            while not self._waiting and not pending.done:
                self._changed.wait(0.001)
                assert time.monotonic() < end
            return self._waiting > 0

    def fail(self, operation: str, count: int, after: bool, error: StorageError) -> None:
        """The next ``count`` operations of that kind fail; with ``after`` they are carried out first."""
        with self._changed:
            self._failing = operation, count, after, error

    def heal(self) -> None:
        with self._changed:
            self._failing = None

    def run(self, operation: str, function: Callable[[], Any]) -> Any:
        with self._changed:
            if operation in ("write", "append", "finish", "create"):
                self._waiting += 1
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: not self._held or self._permits, SECONDS)
                self._waiting -= 1
                self._permits -= self._held
            error: StorageError | None = None
            if self._failing is not None and self._failing[0] in (operation, "any"):
                kind, count, after, error = self._failing
                self._failing = (kind, count - 1, after, error) if count > 1 else None
                self.failures += 1
        if error is None:
            return function()
        if after and operation in ("create", "finish"):
            function()
        raise type(error)(*error.args)


class ControlledStore:
    def __init__(self, store: Store, control: Control) -> None:
        self._store, self._control = store, control

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        if name not in ("create", "read", "read_into", "delete"):
            return attribute
        return lambda *arguments, **named: self._control.run(name, lambda: attribute(*arguments, **named))

    def write(self, name: str, **hints: Any) -> ObjectWriter:
        return ControlledWriter(self._control.run("write", lambda: self._store.write(name, **hints)), self._control)


class ControlledWriter:
    def __init__(self, writer: ObjectWriter, control: Control) -> None:
        self._writer, self._control = writer, control
        self._finished = False

    def append(self, data: Bytes) -> int:
        return int(self._control.run("append", lambda: self._writer.append(data)))

    def finish(self) -> int:
        def finish() -> int:
            size = self._writer.finish()
            self._finished = True
            return size

        return int(self._control.run("finish", finish))

    def abandon(self) -> None:
        if not self._finished:
            self._writer.abandon()


class Loader:
    """A ``Stateful`` with a tensor and a plain value, both changed in place."""

    def __init__(self) -> None:
        self.position = [0]
        self.seen = torch.zeros(700)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "seen": self.seen}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.position, self.seen = list(saved["position"]), saved["seen"].clone()


class Training:
    """A small model whose optimizer changes all of it in every step; 21 chunks of 4 KiB once it has made one."""

    def __init__(self, seed: int, kind: str) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(40, 64), nn.BatchNorm1d(64), nn.Linear(64, 48))
        parameters = self.model.parameters()
        self.optimizer: torch.optim.Optimizer
        if kind == "sgd":
            self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1, **{kind: True})
        self.loader = Loader()
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "loader": self.loader,
            "plain": torch.rand(50),
            "losses": [],
        }

    def forward_and_backward(self) -> None:
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(8, 40)).square().mean()
        loss.backward()
        self.loader.position[0] += 1
        self.loader.seen[self.loader.position[0] % 700] += 1
        self.state["plain"].add_(1)
        self.state["losses"].append(loss.item())

    def content(self) -> dict[str, Any]:
        """What a snapshot must hold: bytes by key, and the plain values."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for entry, tensor in self.optimizer.state[parameter].items() if self._started(parameter) else ():
                tensors[f"optimizer.state.{name}.{entry}"] = tensor
        tensors |= {"plain": self.state["plain"], "loader": self.loader.seen}
        values = {"position": list(self.loader.position), "losses": list(self.state["losses"])}
        return {key: tensor.detach().numpy().tobytes() for key, tensor in tensors.items()} | values

    def _started(self, parameter: torch.Tensor) -> bool:
        return parameter in self.optimizer.state  # looking it up would make an entry


@dataclasses.dataclass
class Saved:
    """What the program knows of one save."""

    pending: Pending
    content: dict[str, Any]
    failures_before: int
    stepped_past: bool
    """It was made where nothing holds the step that follows."""


class LoopFailed(Exception):
    """Of the training loop itself."""


class Program:
    """One training program; ``run`` raises if a promise is broken."""

    def __init__(self, seed: int, folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draw = random.Random(seed)
        self.url = str(folder) if folder else f"memory://{secrets.token_hex(8)}"
        self.control = Control()
        monkeypatch.setattr(
            "fastckpt.checkpointer.open_store", lambda url: ControlledStore(open_store(url), self.control)
        )
        self.impatient = self.draw.random() < 0.2
        self.options = Options(
            chunk_bytes=4096,
            codec=self.draw.choice(["raw", "zstd"]),
            fence=self.draw.choice(["hook", "hook", "explicit", "copy"]),
            fence_seconds_max=IMPATIENT_SECONDS if self.impatient else SECONDS,
            staging_bytes_max=self.draw.choice([1, 4096 * 3, 4096 * 8, None]),
        )
        self.kind = self.draw.choice(["sgd", "foreach", "fused"])
        self.training = Training(seed, self.kind)
        self.ckpt = Checkpointer(self.url, options=self.options)
        self.step = 0
        self.saves: list[Saved] = []
        self.raised: list[BaseException] = []
        """By ``save`` and ``close``, or noted at an error of the loop."""
        self.waited: list[BaseException] = []
        """By ``wait``."""
        self.told: list[str] = [f"{self.kind}, {self.options}"]

    def run(self) -> None:
        often = [self.train, self.save, self.save, self.hold]
        actions = [*often, *often, self.save_in_a_hook, self.save_in_the_forward, self.let_pass, self.let_go]
        actions += [self.wait, self.wait_briefly, self.wait_staged, self.refused, self.fence_gives_up]
        actions += [self.fail_once, self.fail_for_a_while, self.heal, self.roll_back, self.reopen, self.loop_fails]
        for _ in range(ACTIONS):
            action = self.draw.choice(actions)
            self.told.append(action.__name__)
            action()
        self.control.heal()
        self.control.let_go()
        self.close()
        self.judge()

    # --- what a training loop does -----------------------------------------------------------------------------

    def train(self) -> None:
        self.training.forward_and_backward()
        if self.options.fence == "explicit":
            with self.control.flowing():
                self.ckpt.wait_staged(SECONDS)
        with self.control.flowing():
            self.training.optimizer.step()
        self.step += 1

    def save(self, *, ahead: int = 0, stepped_past: bool = False) -> None:
        step, before, failures = self.step + ahead, self.ckpt.pending, self.control.failures
        content = self.training.content()
        may_exist = any(saved.pending.step == step and saved.pending.status != "failed" for saved in self.saves)
        error: Exception | None = None
        try:
            with self.control.flowing():
                self.ckpt.save(step, self.training.state)
        except Exception as caught:
            error = caught
        pending = self.ckpt.pending
        if pending is not None and pending is not before:
            self.saves.append(Saved(pending, content, failures, stepped_past))
            if error is not None:  # that of an earlier one
                self._raised(error)
        elif isinstance(error, SnapshotExists):
            assert may_exist, error
        else:
            assert isinstance(error, StorageError | SaveError), error
            assert self.control.failures > failures, f"step {step} was refused for no reason: {error}"

    def save_in_a_hook(self) -> None:
        """Of the optimizer: before its step, which then goes on past the fence, or after it."""
        optimizer = self.training.optimizer
        if self.draw.random() < 0.5:
            handle = optimizer.register_step_pre_hook(lambda *_: self.save(stepped_past=True))
        else:
            handle = optimizer.register_step_post_hook(lambda *_: self.save(ahead=1))
        try:
            self.train()
        finally:
            handle.remove()

    def save_in_the_forward(self) -> None:
        handle = self.training.model[1].register_forward_hook(lambda *_: self.save())
        try:
            self.train()
        finally:
            handle.remove()

    def wait(self) -> None:
        if self.saves:
            saved = self.draw.choice(self.saves)
            with self.control.flowing():
                self._wait(saved.pending, SECONDS)

    def _wait(self, pending: Pending, seconds: float) -> None:
        """As often as one likes it raises the same."""
        with contextlib.suppress(FastckptError):
            pending.wait(seconds)
        if pending.done and pending.error is not None:
            with pytest.raises(FastckptError) as caught:
                pending.wait()
            assert caught.value is pending.error
            self.waited.append(caught.value)

    def wait_briefly(self) -> None:
        if self.saves:
            with contextlib.suppress(TimeoutError):
                self._wait(self.saves[-1].pending, 0)
            with contextlib.suppress(TimeoutError):
                self.ckpt.wait_staged(0)

    def wait_staged(self) -> None:
        """Then anything may change by any means."""
        with self.control.flowing():
            self.ckpt.wait_staged(SECONDS)
        for parameter in self.training.model.parameters():
            parameter.data.mul_(1.5)

    def refused(self) -> None:
        """Arguments that cost nothing but the call."""
        pending = self.ckpt.pending
        with self.control.flowing(), pytest.raises((TypeError, ValueError, SnapshotExists)):
            self.ckpt.save(self.draw.choice([self.step, -1]), {**self.training.state, "bad": threading.Lock()})
        assert self.ckpt.pending is pending

    def roll_back(self) -> None:
        self.control.heal()
        if self.draw.random() < 0.3:
            self.control.fail("read", 1, False, StorageError("cannot read"))
        with self.control.flowing():
            try:
                self._restore()
            except StorageError:
                self.control.heal()
                self._restore()
        self.control.heal()

    def _restore(self) -> None:
        step = self.ckpt.restore(self.training.state)
        if step is not None:
            newest = self.ckpt.snapshots()[-1]
            assert newest.step == step
            assert self.training.content() == self._expected(newest)
            self.step = step

    def reopen(self) -> None:
        self.close()
        self.training = Training(self.draw.randrange(2**32), self.kind)
        self.ckpt = Checkpointer(self.url, options=self.options)
        self.step = 0
        self.roll_back()

    def loop_fails(self) -> None:
        with pytest.raises(LoopFailed) as caught, self.control.flowing(), self.ckpt:
            raise LoopFailed
        self._noted(getattr(caught.value, "__notes__", [])[:1])  # what follows are the notes of that one
        self.reopen()

    def close(self) -> None:
        """Raises what had not been raised so far, all at once."""
        with self.control.flowing():
            try:
                self.ckpt.close()
            except FastckptError as error:
                self._raised(error)
            self.ckpt.close()

    # --- what the storage does -----------------------------------------------------------------------------------

    def hold(self) -> None:
        self.control.hold()

    def let_pass(self) -> None:
        self.control.let_pass(self.draw.randrange(1, 12))

    def let_go(self) -> None:
        self.control.let_go()

    def fail_once(self) -> None:
        kind = self.draw.choice(["write", "append", "finish", "create", "delete", "read"])
        error = self.draw.choice([StorageError("a moment's failure", transient=True), OutOfSpace("no room")])
        self.control.fail(kind, 1, self.draw.random() < 0.5, error)

    def fail_for_a_while(self) -> None:
        self.control.fail("any", self.draw.randrange(2, 40), self.draw.random() < 0.3, StorageError("it is down"))

    def heal(self) -> None:
        self.control.heal()

    def fence_gives_up(self) -> None:
        """A save that cannot be staged, since its storage lets nothing pass, and a step that does not wait for it."""
        if self.impatient and self.options.fence != "explicit":
            self.training.forward_and_backward()
            self.save(ahead=1)
            self.control.hold()
            self.training.optimizer.step()
            self.step += 1

    # --- what must be true -----------------------------------------------------------------------------------------

    def _raised(self, error: BaseException) -> None:
        assert not any(error is other for other in self.raised), f"raised twice: {error}"
        assert any(saved.pending.error is error for saved in self.saves), f"of no save: {error}"
        assert not any(error is other for other in self.waited), f"raised again, though wait has raised it: {error}"
        self.raised.append(error)
        self._noted(note for note in getattr(error, "__notes__", []) if "was not saved either" in note)

    def _noted(self, notes: Iterable[str]) -> None:
        """Failures that an error raised in their place has told of."""
        for note in notes:
            failures = [saved.pending.error for saved in self.saves if saved.pending.error is not None]
            untold = (error for error in failures if not self._told(error))
            self._raised(next(error for error in untold if note.endswith(f": {error}")))

    def _told(self, error: BaseException) -> bool:
        return any(error is other for other in (*self.raised, *self.waited))

    def _expected(self, snapshot: fastckpt.Snapshot) -> dict[str, Any]:
        for saved in self.saves:
            if saved.pending.status == "committed" and saved.pending.snapshot.attempt == snapshot.attempt:
                return saved.content
        # Reported as failed, since nobody could tell; then it is one of those that said so.
        doubtful = [saved for saved in self.saves if saved.pending.step == snapshot.step and _in_doubt(saved.pending)]
        assert doubtful, f"nobody knows of {snapshot}"
        return doubtful[-1].content

    def judge(self) -> None:
        for saved in self.saves:
            pending = saved.pending
            assert pending.done
            if pending.error is None:
                continue
            caused = self.control.failures > saved.failures_before
            caused |= isinstance(pending.error, AttemptAborted) and self.impatient
            caused |= saved.stepped_past and "changed while it was being staged" in str(pending.error)
            assert caused, f"step {pending.step} failed for no reason: {pending.error!r}"
            assert self._told(pending.error), f"step {pending.step} failed and nobody was told"
        patient = dataclasses.replace(self.options, fence_seconds_max=SECONDS)
        with Checkpointer(self.url, options=patient) as ckpt:  # removes what is left of attempts that failed
            ckpt.save(self.step + 1000, self.training.state)
            self.saves.append(Saved(ckpt.pending, self.training.content(), 0, False))  # type: ignore[arg-type]
        repository = fastckpt.open(self.url)
        snapshots = repository.snapshots()
        committed = {saved.pending.snapshot.attempt for saved in self.saves if saved.pending.status == "committed"}
        assert committed <= {snapshot.attempt for snapshot in snapshots}, "a snapshot is lost"
        assert check_history(repository) == []
        assert verify(repository, snapshots, lambda _: None) == []
        for snapshot in snapshots:
            expected = self._expected(snapshot)
            assert set(expected) - set(snapshot.layout.keys) == {"loader", "position", "losses"}  # among the values
            for key in snapshot.layout.keys:
                assert snapshot.read(key).tobytes() == expected[key], (
                    f"{key} of step {snapshot.step} is not what it was"
                )
        last = {snapshot.step: snapshot for snapshot in snapshots}
        chosen = last[self.draw.choice(list(last))]
        restored = Training(0, self.kind)
        with Checkpointer(self.url) as ckpt:
            assert ckpt.restore(restored.state, step=chosen.step) == chosen.step
        assert restored.content() == self._expected(chosen)
        attempts = {info.name.split("/")[1] for info in open_store(self.url).list("packs")}
        assert attempts <= {snapshot.attempt for snapshot in snapshots}, "packs are left of attempts that failed"


def _in_doubt(pending: Pending) -> bool:
    return pending.error is not None and "is not known" in str(pending.error)


def held() -> dict[str, int]:
    """What a process may have too much of."""
    return {
        "hooks": len(_global_optimizer_pre_hooks),
        "staging buffers": Path("/proc/self/maps").read_text().count("fastckpt-staging"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": sum(thread.name.startswith("fastckpt-") for thread in threading.enumerate()),
    }


def run_programs(first: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = held()
    interval, cores = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)  # it would spin where others need the cores
    try:
        for seed in range(first, first + count):
            with monkeypatch.context() as patched, tempfile.TemporaryDirectory() as folder:
                on_disk = seed % 4 == 0
                program = Program(seed, Path(folder, "run") if on_disk else None, patched)
                try:
                    program.run()
                except BaseException as error:
                    error.add_note(f"TEST_SEED={seed}: " + "; ".join(program.told))
                    raise
                finally:
                    program.control.heal()
                    program.control.let_go()
                left = [path.name for path in Path(folder).rglob("*") if path.name.startswith(".")]
                assert left == [], f"TEST_SEED={seed}: temporary files are left"
                del program
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(cores)
    end = time.monotonic() + SECONDS
    gc.collect()
    while any(now > before[what] for what, now in held().items()) and time.monotonic() < end:
        time.sleep(0.01)  # threads that make calls to the storage end once they have been idle
        gc.collect()
    after = held()
    assert all(after[what] <= before[what] for what in before), (before, after)


def first_seed() -> int:
    seed = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**32))
    print(f"TEST_SEED={seed}")
    return seed


def test_whatever_a_loop_and_its_storage_do_no_snapshot_is_wrong_and_no_failure_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_programs(first_seed(), PROGRAMS, monkeypatch)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_thousands_of_programs_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    run_programs(first_seed(), PROGRAMS * SOAK_ROUNDS, monkeypatch)
