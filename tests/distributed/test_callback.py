"""The callback on real processes: what one rank is asked for, all do at the end of the same step, or none does."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import caught
import pytest
import ranks
import torch
import torch.distributed as dist

import fastckpt
from fastckpt import Callback, Checkpointer, Options
from fastckpt.checkpointer import Saves

pytestmark = pytest.mark.distributed

SECONDS = 30.0
BOTH = (signal.SIGUSR1, signal.SIGTERM)
OPTIONS = Options(chunk_bytes=4096, commit_seconds_max=60.0)


def steps(folder: Path) -> list[int]:
    return [snapshot.step for snapshot in fastckpt.open(folder).snapshots()]


def asked_for_by_signals_and_time(folder: Path) -> tuple[int, int, int, list[Any]]:
    """Ranks train without speaking to each other, at different speeds. Each save is asked for in another way."""
    rank = dist.get_rank()
    state = {"t": torch.zeros(64)}
    step, stopped_at = 0, 0
    with Checkpointer(folder, options=OPTIONS) as ckpt:
        callback = Callback(ckpt, state, every_seconds=3600.0, signals=BOTH, agree_seconds=SECONDS)
        assert callback.on_train_begin() == 1

        def train_until_saved() -> None:
            nonlocal step
            before = ckpt.pending
            end = time.monotonic() + SECONDS
            while ckpt.pending is before and time.monotonic() < end:
                step += 1
                time.sleep(0.001 + 0.0005 * rank)
                callback.on_step_end(step)
            assert ckpt.pending is not None
            ckpt.pending.wait(SECONDS)

        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        train_until_saved()
        if callback._watcher is not None:
            callback._watcher.schedule(time.monotonic(), 0.1)  # an hour is over
        train_until_saved()
        if rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        train_until_saved()
        stopped_at = step if callback.stopping else 0
        callback.on_train_end()
    return step, stopped_at, callback.failed, [signal.getsignal(number) for number in BOTH]


def test_what_one_rank_is_asked_for_by_a_signal_or_by_the_clock_all_save_at_the_same_step(tmp_path: Path) -> None:
    results = ranks.run(3, asked_for_by_signals_and_time, tmp_path / "run")
    saved = steps(tmp_path / "run")
    assert len(saved) == 3
    assert saved == sorted(saved)
    for last, stopped_at, failed, handlers in results:
        assert last == stopped_at == saved[-1]
        assert failed == 0
        assert handlers == [signal.SIG_DFL] * 2


def skipping(folder: Path, behind: int) -> tuple[int, list[int]]:
    """Rank ``behind`` does not learn of the first commit before all steps have ended, the other one at once."""
    commit = Saves.commit
    over = threading.Event()

    def late(*arguments: Any) -> Any:
        live = commit(*arguments)
        if dist.get_rank() == behind:
            assert over.wait(SECONDS)
        return live

    Saves.commit = late  # type: ignore[method-assign]
    with Checkpointer(folder, options=OPTIONS) as ckpt:
        callback = Callback(ckpt, {"t": torch.zeros(64)}, every_steps=1, busy="skip", signals=(), agree_seconds=SECONDS)
        saved: list[int] = []
        for step in (1, 2):
            callback.on_step_end(step)
            assert ckpt.pending is not None
            if ckpt.pending.step == step:
                saved.append(step)
            if step == 1 and dist.get_rank() != behind:
                ckpt.pending.wait(SECONDS)
        over.set()
        callback.on_train_end()
        return callback.skipped, saved


def test_whether_a_save_is_skipped_is_the_coordinators_to_say_for_all(tmp_path: Path) -> None:
    assert ranks.run(2, skipping, tmp_path / "a", 1) == [(0, [1, 2])] * 2
    assert steps(tmp_path / "a") == [1, 2]
    assert ranks.run(2, skipping, tmp_path / "b", 0) == [(1, [1])] * 2
    assert steps(tmp_path / "b") == [1]


def with_one_stopped(folder: Path) -> list[str]:
    rank = dist.get_rank()
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastckpt").addHandler(handler)
    with Checkpointer(folder, options=OPTIONS) as ckpt:
        callback = Callback(ckpt, {"t": torch.zeros(64)}, agree_seconds=1.0)
        step = callback.on_train_begin()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            callback._agree_seconds = SECONDS
        else:
            caught.wait_for_test("stopped")
            os.kill(os.getpid(), signal.SIGUSR1)
            end = time.monotonic() + SECONDS
            while not any("is given up" in text for text in warnings) and time.monotonic() < end:
                callback.on_step_end(step)
                step += 1
            caught.say("given up")
            os.kill(os.getpid(), signal.SIGUSR1)
        assert callback._watcher is not None
        callback._watcher._agree_seconds = SECONDS
        while ckpt.pending is None and step < 10_000_000:
            callback.on_step_end(step)
            step += 1
        callback.on_train_end()
    return warnings


def test_with_a_rank_stopped_the_request_is_given_up_and_training_goes_on(tmp_path: Path) -> None:
    with ranks.started(2, with_one_stopped, tmp_path) as job:
        assert job.wait_stopped(1, SECONDS)
        job.store.set("test/stopped", b"")
        assert job.wait_keys(["said/given up/0"], SECONDS)
        job.resume(1)
        outcomes = job.outcomes()
    assert all(isinstance(outcome, list) for outcome in outcomes), outcomes
    assert any(
        "a save asked for by SIGUSR1 is given up, and training goes on: rank 1 was not heard of" in text
        for text in outcomes[0]
    )
    assert len(steps(tmp_path)) == 1, "and the next one is not"
