"""What happens between a save and its commit: changes, copies, a fence that gives up, and saves that fail there."""

from __future__ import annotations

import gc
import logging
import secrets
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastckpt
from fastckpt import AttemptAborted, Checkpointer, Options, SaveError
from fastckpt import checkpointer as front
from fastckpt.repository.verify import check_history, verify
from fastckpt.storage.memory import memory_store
from fastckpt.storage.store import ObjectWriter, Store

SECONDS = 30.0
SMALL = Options(chunk_bytes=4096)


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


class Gate:
    """Holds back the writing of saves, and with it their staging, while it is shut."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.reached = threading.Event()

    def shut(self) -> None:
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def pass_through(self) -> None:
        self.reached.set()
        assert self._open.wait(SECONDS)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    write = front.Saves.write

    def late(*arguments: Any) -> Any:
        gate.pass_through()
        return write(*arguments)

    monkeypatch.setattr(front.Saves, "write", late)
    yield gate
    gate.open()


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(50, 80)
        self.b = nn.Linear(80, 50, bias=False)
        self.b.weight = self.a.weight


def set_all(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.fill_(value)


# --- a save that cannot be staged ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), MemoryError("no memory")])
def test_a_save_without_memory_to_stage_in_leaves_the_snapshot_before_whole(
    url: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_memory(*_: Any) -> Any:
        raise error

    model = nn.Linear(50, 50)
    optimizer = torch.optim.AdamW(model.parameters())
    weight = model.weight.tolist()
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer}).wait(SECONDS)
        model(torch.randn(1, 50)).sum().backward()
        optimizer.step()
        with monkeypatch.context() as patched:
            patched.setattr("fastckpt.job.memory.Pool", no_memory)
            ckpt._memory.close()
            with pytest.raises((SaveError, OSError, MemoryError), match="memory"):
                ckpt.save(2, {"model": model, "optimizer": optimizer}).wait(SECONDS)
        repository = fastckpt.open(url)
        assert [snapshot.step for snapshot in repository.snapshots()] == [1]
        assert check_history(repository) == []
        assert verify(repository, repository.snapshots(), lambda _: None) == []
        ckpt.save(3, {"model": model, "optimizer": optimizer}).wait(SECONDS)
    fresh = nn.Linear(50, 50)
    with Checkpointer(url, options=SMALL) as ckpt:
        state = {"model": fresh, "optimizer": torch.optim.AdamW(fresh.parameters())}
        assert ckpt.restore(state, step=1) == 1
    assert fresh.weight.tolist() == weight


# --- the fence ----------------------------------------------------------------------------------------------------


def test_a_close_that_timed_out_leaves_the_fence_in_place(
    url: str, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.grad = torch.ones_like(model.weight)
    ckpt = Checkpointer(url, options=Options(chunk_bytes=4096, fence_seconds_max=0.05))
    gate.shut()
    pending = ckpt.save(1, {"model": model})
    with pytest.raises(TimeoutError):
        ckpt.close(timeout=0.01)
    with caplog.at_level(logging.WARNING, "fastckpt"):
        optimizer.step()  # must not go on beside the staging: it waits, and then has the save given up
    assert "step 1 is given up" in caplog.text
    gate.open()
    with pytest.raises(AttemptAborted):
        pending.wait(SECONDS)
    assert fastckpt.open(url).snapshots() == []
    ckpt.close()


class HangingStore:
    """A store in which packs cannot be begun while the gate is shut."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self._store = store
        self._gate = gate

    def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
        if name.startswith("packs/"):
            self._gate.pass_through()
        return self._store.write(name, bytes_expected=bytes_expected)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_save_does_not_wait_for_one_that_hangs_longer_than_the_fence_may(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    store = HangingStore(memory_store(url.removeprefix("memory://")), gate)
    monkeypatch.setattr(front, "open_store", lambda _: store)
    options = Options(chunk_bytes=4096, staging_bytes_max=8192, fence_seconds_max=0.05)
    model = nn.Linear(128, 128)
    ckpt = Checkpointer(url, options=options)
    ckpt.save(1, {"model": model}).wait(SECONDS)
    gate.shut()
    hanging = ckpt.save(2, {"model": model})
    assert gate.reached.wait(SECONDS)
    caller = threading.Thread(target=ckpt.save, args=(3, {"model": model}), daemon=True)
    caller.start()
    caller.join(SECONDS)
    returned = not caller.is_alive()
    gate.open()
    caller.join(SECONDS)
    assert returned, "save waited for the store"
    with pytest.raises(AttemptAborted):
        hanging.wait(SECONDS)
    assert ckpt.pending is not None
    ckpt.pending.wait(SECONDS)
    ckpt.close()
    assert [snapshot.step for snapshot in fastckpt.open(url).snapshots()] == [1, 3]


# --- changes and copies -------------------------------------------------------------------------------------------


def test_a_change_after_the_save_and_before_staging_is_detected(url: str, gate: Gate) -> None:
    model = nn.Linear(64, 64, bias=False)
    ckpt = Checkpointer(url, options=SMALL)
    gate.shut()
    pending = ckpt.save(1, {"model": model})
    set_all(model.weight, 2.0)
    gate.open()
    with pytest.raises(SaveError, match=r"model\.weight changed while it was being staged"):
        pending.wait(SECONDS)
    ckpt.close()
    assert fastckpt.open(url).snapshots() == []


@pytest.mark.parametrize("left_bytes", [0, 4096])
@pytest.mark.parametrize("strides", [(64, 1), (1, 64)])
def test_memory_that_is_taken_from_a_tensor_before_staging_is_not_read(
    url: str, gate: Gate, strides: tuple[int, int], left_bytes: int
) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(64 * 64).as_strided((64, 64), strides))
    ckpt = Checkpointer(url, options=Options())  # one chunk: of a whole tensor torch checks no copy
    gate.shut()
    pending = ckpt.save(1, {"model": module})
    module.weight.untyped_storage().resize_(left_bytes)
    gate.open()
    with pytest.raises(SaveError, match=r"^model\.weight lost memory of its storage while it was being staged"):
        pending.wait(SECONDS)
    ckpt.close()


@pytest.mark.parametrize("glob", ["m.a.*", "m.b.*"])
def test_a_tied_tensor_is_copied_if_a_glob_fits_any_of_its_keys(url: str, gate: Gate, glob: str) -> None:
    module = Tied()
    set_all(module.a.weight, 1.0)
    with Checkpointer(url, options=Options(chunk_bytes=4096, copy=(glob,))) as ckpt:
        gate.shut()
        pending = ckpt.save(1, {"m": module})
        set_all(module.a.weight, 2.0)
        gate.open()
        pending.wait(SECONDS)
        for key in ("m.a.weight", "m.b.weight"):
            assert set(pending.snapshot.read(key).ravel().tolist()) == {1.0}


@pytest.mark.parametrize("name", ["a", "z"])  # before and after the parameter's own
def test_a_plain_tensor_tied_to_a_parameter_is_copied(url: str, gate: Gate, name: str) -> None:
    module = nn.Linear(64, 64, bias=False)
    set_all(module.weight, 1.0)
    with Checkpointer(url, options=SMALL) as ckpt:
        gate.shut()
        pending = ckpt.save(1, {"m": module, name: module.weight})
        set_all(module.weight, 2.0)
        gate.open()
        pending.wait(SECONDS)
        for key in ("m.weight", name):
            assert set(pending.snapshot.read(key).ravel().tolist()) == {1.0}


def test_copies_are_let_go_of_once_the_save_is_committed(url: str, gate: Gate) -> None:
    model = nn.Linear(100, 100)
    with Checkpointer(url, options=Options(chunk_bytes=4096, copy=("*",))) as ckpt:
        gate.shut()
        pending = ckpt.save(1, {"model": model, "mean": torch.ones(3000)})
        assert ckpt._staging is not None
        staging = weakref.ref(ckpt._staging)
        copies = [weakref.ref(tensor) for tensor in ckpt._staging._views]
        assert len(copies) == 3
        gate.open()
        pending.wait(SECONDS)
        gc.collect()
        assert [copy() for copy in copies] == [None] * 3
    gc.collect()
    assert staging() is None


def test_a_state_whose_only_live_tensors_are_empty_is_saved(url: str) -> None:
    model = nn.Module()
    model.register_parameter("p", nn.Parameter(torch.zeros(0, 3)))
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model}).wait(SECONDS)
        assert ckpt.restore({"model": model}) == 1


# --- the end of the process ---------------------------------------------------------------------------------------


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60)


FAILS_UNASKED = """
import pathlib, sys, torch, fastckpt
folder = pathlib.Path(sys.argv[1])
ckpt = fastckpt.Checkpointer(folder)
ckpt.save(1, {"t": torch.ones(10)}).wait()
(folder / "packs").rename(folder / "away")
(folder / "packs").write_text("a file in its place")
pending = ckpt.save(2, {"t": torch.ones(10)})
if sys.argv[2] == "done":
    pending._finished.wait(30)
"""


@pytest.mark.parametrize("when", ["done", "under way"])
def test_a_failed_save_that_nobody_asked_about_is_logged_at_exit(tmp_path: Path, when: str) -> None:
    result = run(FAILS_UNASKED, str(tmp_path / "run"), when)
    assert result.returncode == 0, result.stderr
    assert "step 2 was not saved: " in result.stderr


FORKS = """
import os, sys, threading, torch, fastckpt
from fastckpt import checkpointer as front

torch.set_num_threads(1)
go_on, write = threading.Event(), front.Saves.write

def late(*arguments):
    assert go_on.wait(60)
    return write(*arguments)

front.Saves.write = late
model = torch.nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
model.weight.grad = torch.ones_like(model.weight)
ckpt = fastckpt.Checkpointer(sys.argv[1])
expected = model.weight.tolist()
pending = ckpt.save(1, {"model": model})
if os.fork() == 0:
    optimizer.step()
    sys.exit(7)
_, status = os.wait()
go_on.set()
ckpt.close()
assert model.weight.tolist() == expected
assert pending.snapshot.read("model.weight").tolist() == expected
print("child", os.waitstatus_to_exitcode(status))
"""


FORKS_INSIDE = """
import os, signal, sys, threading, torch, fastckpt
from fastckpt import checkpointer as front

torch.set_num_threads(1)
go_on, write = threading.Event(), front.Saves.write

def late(*arguments):
    assert go_on.wait(60)
    return write(*arguments)

front.Saves.write = late
state = {"t": torch.ones(3)}
with fastckpt.Checkpointer(sys.argv[1]) as ckpt:
    ckpt.save(1, state)
    if os.fork() == 0:
        signal.alarm(20)
        for call in (lambda: ckpt.save(2, state), lambda: ckpt.prepare(state), lambda: ckpt.restore(state)):
            try:
                call()
            except fastckpt.SaveError as error:
                assert "the process that forked this one" in str(error)
            else:
                sys.exit(1)
        ckpt.close()
        sys.exit(7)
    _, status = os.wait()
    go_on.set()
print("child", os.waitstatus_to_exitcode(status), [each.step for each in fastckpt.open(sys.argv[1]).snapshots()])
"""


def test_a_forked_child_cannot_save_and_leaves_the_block_without_waiting_for_its_parents_save(tmp_path: Path) -> None:
    result = run(FORKS_INSIDE, str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "child 7 [1]\n"


def test_a_forked_child_may_step_and_exit_while_a_save_is_under_way(tmp_path: Path) -> None:
    result = run(FORKS, str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "child 7\n"
