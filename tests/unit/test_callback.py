"""The policy around a Checkpointer: when it saves, how it resumes, how many failures it bears."""

from __future__ import annotations

import logging
import secrets
import threading
from typing import Any

import pytest
import torch

from fastckpt import Callback, Checkpointer, OutOfSpace, Snapshot, SnapshotNotFound
from fastckpt import checkpointer as front
from fastckpt.storage.memory import memory_store
from fastckpt.testing import FaultyStore

SECONDS = 20.0


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def state() -> dict[str, Any]:
    return {"t": torch.zeros(10)}


def train(callback: Callback, first: int, last: int) -> None:
    for step in range(first, last + 1):
        callback._state["t"].fill_(step)
        assert callback.on_step_end(step, {"loss": 1 / step}) is False


def test_every_n_steps_are_saved_and_a_new_job_goes_on_after_the_last(url: str) -> None:
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=3)
        assert callback.on_train_begin() == 1
        train(callback, 1, 8)
        callback.on_train_end()
        assert [(snapshot.step, snapshot.metrics) for snapshot in ckpt.snapshots()] == [
            (3, {"loss": 1 / 3}),
            (6, {"loss": 1 / 6}),
        ]
    with Checkpointer(url) as ckpt:
        again = state()
        assert Callback(ckpt, again, every_steps=3).on_train_begin() == 7
        assert again["t"].tolist() == [6.0] * 10


def test_resume_says_whether_a_snapshot_may_must_or_must_not_be_used(url: str) -> None:
    with Checkpointer(url) as ckpt:
        with pytest.raises(SnapshotNotFound, match="no snapshot to resume from, and resume='must'"):
            Callback(ckpt, state(), every_steps=1, resume="must").on_train_begin()
        assert Callback(ckpt, state(), every_steps=1).on_train_begin() == 1
        ckpt.save(4, state())
        assert Callback(ckpt, state(), every_steps=1, resume="must").on_train_begin() == 5
        untouched = {"t": torch.ones(10)}
        assert Callback(ckpt, untouched, every_steps=1, resume="never").on_train_begin() == 1
        assert untouched["t"].tolist() == [1.0] * 10


@pytest.mark.parametrize(
    "wrong",
    [{"every_steps": 0}, {"resume": "always"}, {"failures_max": -1}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_argument_is_named(url: str, wrong: dict[str, Any]) -> None:
    with Checkpointer(url) as ckpt, pytest.raises(ValueError, match=next(iter(wrong))):
        Callback(ckpt, state(), **{"every_steps": 1, **wrong})


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Saves are committed only once this event is set."""
    event = threading.Event()
    commit = front.Saves.commit

    def late(*arguments: Any) -> Any:
        assert event.wait(SECONDS)
        return commit(*arguments)

    monkeypatch.setattr(front.Saves, "commit", late)
    yield event
    event.set()


def test_a_save_that_is_due_while_one_is_under_way_is_started_all_the_same(url: str, gate: threading.Event) -> None:
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=1)
        train(callback, 1, 2)
        assert ckpt.snapshots() == []
        gate.set()
        callback.on_train_end()
        assert [snapshot.step for snapshot in ckpt.snapshots()] == [1, 2]


def failing(monkeypatch: pytest.MonkeyPatch, url: str, times: int) -> None:
    store = FaultyStore(memory_store(url.removeprefix("memory://")))
    left = iter(range(times))

    def only(operation: str, name: str) -> bool:
        return operation == "write" and next(left, None) is not None

    store = FaultyStore(store.store, fail_at=1, persistent=True, error=OutOfSpace("the disk is full"), only=only)
    monkeypatch.setattr("fastckpt.checkpointer.open_store", lambda _: store)


def test_as_many_failures_in_a_row_as_allowed_are_logged_and_counted(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, url, times=2)
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=1, failures_max=2)
        with caplog.at_level(logging.ERROR, "fastckpt"):
            train(callback, 1, 4)
        callback.on_train_end()
        assert callback.failed == 2
        assert "saving step 2 failed (2 in a row): the disk is full" in caplog.text
        assert [snapshot.step for snapshot in ckpt.snapshots()] == [3, 4]


def test_one_failure_more_than_allowed_is_raised(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, url, times=100)
    ckpt = Checkpointer(url)
    callback = Callback(ckpt, state(), every_steps=1, failures_max=2)
    with pytest.raises(OutOfSpace, match="the disk is full"):
        train(callback, 1, 9)
    assert callback.failed == 3
    with pytest.raises(OutOfSpace):  # one more was under way
        ckpt.close()


def test_a_success_starts_the_count_anew(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=1, failures_max=1)
        write = front.Saves.write

        def every_other(saves: Any, attempt: Any, *arguments: Any) -> Any:
            if attempt.step % 2:
                raise OutOfSpace("the disk is full")
            return write(saves, attempt, *arguments)

        monkeypatch.setattr(front.Saves, "write", every_other)
        train(callback, 1, 6)
        callback.on_train_end()
        assert callback.failed == 3
        assert [snapshot.step for snapshot in ckpt.snapshots()] == [2, 4, 6]


def test_the_end_of_training_raises_the_failure_of_the_last_save(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, url, times=1)
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=2)
        train(callback, 1, 2)
        with pytest.raises(OutOfSpace):
            callback.on_train_end()
        callback.on_train_end()


def test_each_committed_snapshot_is_reported_once_on_the_training_thread(url: str) -> None:
    seen: list[tuple[int, int]] = []

    def on_committed(snapshot: Snapshot) -> None:
        seen.append((snapshot.step, threading.get_ident()))

    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=2, on_committed=on_committed)
        train(callback, 1, 7)
        callback.on_train_end()
        callback.on_train_end()
    assert seen == [(step, threading.get_ident()) for step in (2, 4, 6)]
