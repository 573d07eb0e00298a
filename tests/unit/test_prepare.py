"""prepare: what the first save would meet the other ranks for is agreed before it, and nothing is written."""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastckpt
from fastckpt import Checkpointer, Options
from fastckpt.save import Saves
from fastckpt.storage.memory import memory_store


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def state(width: int = 64) -> dict[str, Any]:
    torch.manual_seed(width)
    return {"model": nn.Linear(width, width), "plain": torch.arange(3.0), "list": [1]}


def threads_that_agree(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    agree = Saves.agree

    def spied(saves: Saves, *arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return agree(saves, *arguments)

    monkeypatch.setattr(Saves, "agree", spied)
    return names


def test_the_first_save_agrees_behind_the_loop_after_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = threads_that_agree(monkeypatch)
    with Checkpointer(url) as ckpt:
        ckpt.prepare(state())
        ckpt.save(1, state()).wait()
    with Checkpointer(url) as ckpt:
        ckpt.save(2, state()).wait()
    assert names == ["fastckpt-save", "MainThread"]


def test_it_writes_nothing(url: str) -> None:
    with Checkpointer(url) as ckpt:
        ckpt.prepare(state())
    assert list(memory_store(url.removeprefix("memory://")).list("")) == []


def test_the_memory_is_there_before_the_save(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as ckpt:
        ckpt.prepare(state())
        ckpt._join()
        pool = ckpt._memory._pool
        assert pool is not None
        ckpt.save(1, state()).wait()
        assert ckpt._memory._pool is pool


def test_a_save_of_another_layout_is_right_all_the_same(url: str) -> None:
    with Checkpointer(url) as ckpt:
        ckpt.prepare(state())
        other = state(96)
        ckpt.save(1, other).wait()
        assert ckpt.snapshots()[0].read("model.weight").tobytes() == other["model"].weight.detach().numpy().tobytes()


def test_an_existing_repository_keeps_its_grid(url: str) -> None:
    with Checkpointer(url, options=Options(chunk_bytes=4096)) as ckpt:
        ckpt.save(1, state()).wait()
    with Checkpointer(url) as ckpt:
        ckpt.prepare(state())
        ckpt.save(2, state()).wait()
        assert {snapshot.layout.chunk_bytes for snapshot in ckpt.snapshots()} == {4096}


def test_a_repository_that_another_job_makes_meanwhile_with_another_grid_is_used(url: str) -> None:
    with Checkpointer(url) as ckpt:
        ckpt.prepare(state())
        with Checkpointer(url, options=Options(chunk_bytes=4096)) as other:
            other.save(1, state()).wait()
        ckpt.save(2, state()).wait()
        assert fastckpt.open(url).snapshot(2).layout.chunk_bytes == 4096


def test_what_cannot_be_saved_is_said_now(url: str) -> None:
    with Checkpointer(url) as ckpt:
        with pytest.raises(TypeError, match="what"):
            ckpt.prepare({"what": object()})
        ckpt.save(1, state()).wait()


def test_a_save_does_not_wait_for_memory_to_be_backed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def fault(pool: object, is_enough: Any) -> None:
        begun.set()
        while not is_enough():  # for ever, but for the save
            threading.Event().wait(0.001)

    monkeypatch.setattr("fastckpt.buffers.Pool.fault", fault)
    with Checkpointer(url) as ckpt:
        ckpt.prepare(state())
        assert begun.wait(20)
        ckpt.save(1, state()).wait(20)


def test_an_interrupt_while_its_thread_starts_leaves_no_work_that_a_save_does_not_wait_for(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    begun, go_on = threading.Event(), threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "fastckpt-prepare":
            raise KeyboardInterrupt

    def fault(pool: object, is_enough: object) -> None:
        begun.set()
        assert go_on.wait(20)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    monkeypatch.setattr("fastckpt.buffers.Pool.fault", fault)
    with Checkpointer(url) as ckpt:
        with pytest.raises(KeyboardInterrupt):
            ckpt.prepare(state())
        assert begun.wait(20)
        pending = ckpt.save(1, state())
        with pytest.raises(TimeoutError):
            pending.wait(0.2)  # the memory is in use
        go_on.set()
        pending.wait(20)


def test_an_interrupt_inside_of_a_lock_that_a_save_takes_does_not_leave_it_held(url: str) -> None:
    entering, setting = threading.Condition.__enter__.__code__, threading.Event.set.__code__

    def enter(frame: Any, event: str, _: object) -> Any:
        return leave if frame.f_code is entering and frame.f_back.f_code is setting else None

    def leave(frame: Any, event: str, _: object) -> Any:
        if event == "return":  # with the lock, and before the caller is where it would give it back
            sys.settrace(None)
            raise KeyboardInterrupt
        return leave

    ckpt = Checkpointer(url)
    ckpt.prepare(state())
    before = sys.gettrace()
    sys.settrace(enter)
    with contextlib.suppress(KeyboardInterrupt):
        ckpt.save(1, state())
    sys.settrace(before)
    last = threading.Thread(target=lambda: ckpt.save(2, state()), daemon=True)
    last.start()
    last.join(20)
    assert not last.is_alive()
    ckpt.close(20)


def test_it_may_be_called_again_and_between_saves(url: str) -> None:
    with Checkpointer(url) as ckpt:
        for step in (1, 2):
            ckpt.prepare(state())
            ckpt.prepare(state(32))
            ckpt.save(step, state()).wait()
        assert [snapshot.step for snapshot in ckpt.snapshots()] == [1, 2]
