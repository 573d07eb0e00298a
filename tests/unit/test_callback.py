"""The policy around a Checkpointer: when it saves, how it resumes, how many failures it bears."""

from __future__ import annotations

import copy
import gc
import logging
import math
import os
import pickle
import secrets
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import _global_optimizer_pre_hooks

from fastckpt import Callback, Checkpointer, OutOfSpace, SaveError, Snapshot, SnapshotNotFound, signals
from fastckpt import callback as callbacks
from fastckpt import checkpointer as front
from fastckpt.interval import FIRST_SECONDS, interval_seconds
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
    [
        {"every_steps": 0},
        {"every_steps": 2.0},
        {"every_seconds": 0},
        {"every_seconds": float("nan")},
        {"every_seconds": "often"},
        {"resume": "always"},
        {"failures_max": -1},
        {"busy": "raise"},
        {"agree_seconds": 0},
        {"failures_per_day": 0, "every_seconds": "auto"},
        {"failures_per_day": 2, "every_seconds": 60},
        {"signals": [signal.SIGKILL]},
        {"signals": [signal.SIGUSR1, 77]},
    ],
    ids=str,
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


# --- by the clock --------------------------------------------------------------------------------------------------


def train_until(callback: Callback, done: Callable[[], bool], first: int = 1) -> int:
    """Trains on until something has happened; the first step not trained yet."""
    end = time.monotonic() + SECONDS
    step = first
    while not done():
        assert time.monotonic() < end
        callback.on_step_end(step)
        step += 1
    return step


def steps(ckpt: Checkpointer) -> list[int]:
    return [snapshot.step for snapshot in ckpt.snapshots()]


def test_a_save_is_made_whenever_so_many_seconds_are_over(url: str) -> None:
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_seconds=0.02, signals=())
        first = 1
        for _ in range(2):
            pending = ckpt.pending
            first = train_until(callback, lambda before=pending: ckpt.pending is not before, first)  # type: ignore[misc]
        callback.on_train_end()
        assert len(ckpt.snapshots()) == 2


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Every time a callback sets its clock: from when on, and how many seconds."""
    calls: list[tuple[float, float]] = []
    schedule = callbacks.Watcher.schedule

    def recorded(watcher: Any, start: float, seconds: float) -> None:
        calls.append((start, seconds))
        schedule(watcher, start, seconds)

    monkeypatch.setattr(callbacks.Watcher, "schedule", recorded)
    return calls


def test_any_save_starts_the_seconds_anew(url: str, scheduled: list[tuple[float, float]]) -> None:
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=3, every_seconds=1000)
        callback.on_train_begin()
        train(callback, 1, 6)
        callback.on_train_end()
        assert steps(ckpt) == [3, 6]
    assert [seconds for _, seconds in scheduled] == [1000] * 3
    assert [start for start, _ in scheduled] == sorted({start for start, _ in scheduled}), "later each time"


def test_auto_begins_with_a_short_interval_and_goes_on_by_what_a_save_cost(
    url: str, scheduled: list[tuple[float, float]]
) -> None:
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=1, every_seconds="auto", failures_per_day=864_000)
        callback.on_train_begin()
        train(callback, 1, 1)
        pending = ckpt.pending
        assert pending is not None
        pending.wait(SECONDS)
        train(callback, 2, 2)
        counters = pending.counters
        callback.on_train_end()
    cost = counters["return_seconds"] + counters.get("fence_seconds", 0)
    after = interval_seconds(cost, 0.1, counters["committed_seconds"])
    assert [seconds for _, seconds in scheduled] == [FIRST_SECONDS, FIRST_SECONDS, after, after]


def test_auto_learns_from_the_history_how_long_a_job_lasts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "observed_failure_seconds", lambda _: 12.0)
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_seconds="auto")
        callback.on_train_begin()
        assert callback._failure_seconds == 12.0
        given = Callback(ckpt, state(), every_seconds="auto", failures_per_day=2)
        given.on_train_begin()
        assert given._failure_seconds == 43_200


def test_a_history_that_cannot_be_read_does_not_keep_a_job_from_training(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def damaged(_: object) -> float:
        raise SaveError("decision 3 is damaged")

    monkeypatch.setattr(callbacks, "observed_failure_seconds", damaged)
    with Checkpointer(url) as ckpt:
        Callback(ckpt, state(), every_seconds="auto").on_train_begin()
    assert "taking it for a day: decision 3 is damaged" in caplog.text


# --- by signals ----------------------------------------------------------------------------------------------------


def test_sigusr1_saves_the_step_that_is_under_way_and_training_goes_on(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(url) as ckpt, caplog.at_level(logging.INFO, "fastckpt"):
        callback = Callback(ckpt, state())
        first = callback.on_train_begin()
        os.kill(os.getpid(), signal.SIGUSR1)
        step = train_until(callback, lambda: ckpt.pending is not None, first)
        assert callback.on_step_end(step) is False
        callback.on_train_end()
        assert steps(ckpt) == [step - 1]
        assert f"saving step {step - 1}, asked for by SIGUSR1 at rank 0" in caplog.text


def test_sigterm_saves_and_stops_where_it_was_asked_to(url: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), signals=(signal.SIGTERM,), agree_seconds=SECONDS)
        callback.on_train_begin()
        os.kill(os.getpid(), signal.SIGTERM)
        step = train_until(callback, lambda: callback.stopping)
        os.kill(os.getpid(), signal.SIGTERM)  # once more does not hurt
        end = time.monotonic() + SECONDS
        while not signals._hub._held:
            assert time.monotonic() < end
            time.sleep(0.001)
        assert callback.on_step_end(step) is True
        callback.on_train_end()
        assert signals._hub._held == {}, "it has been done"
        assert steps(ckpt) == [step - 1]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_callback_made_beside_the_main_thread_says_that_it_hears_no_signals(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(url) as ckpt:
        thread = threading.Thread(target=lambda: Callback(ckpt, state(), every_steps=1))
        thread.start()
        thread.join()
    assert "no saves by signals that this process gets: signals can be handled from the main thread only" in caplog.text


def test_where_no_thread_can_be_had_steps_are_saved_all_the_same(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Checkpointer(url) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            callback = Callback(ckpt, state(), every_steps=2)
        assert "no saves by time or signal" in caplog.text
        train(callback, 1, 2)
        callback.on_train_end()
        assert steps(ckpt) == [2]


# --- while the save before is under way ----------------------------------------------------------------------------


def test_a_save_that_is_due_while_one_is_under_way_is_skipped_aloud_if_asked_to(
    url: str, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=1, busy="skip")
        train(callback, 1, 3)
        assert callback.skipped == 2
        assert "step 3 is not saved: the save before is not committed yet (2 left out)" in caplog.text
        gate.set()
        assert ckpt.pending is not None
        ckpt.pending.wait(SECONDS)
        train(callback, 4, 4)
        callback.on_train_end()
        assert steps(ckpt) == [1, 4]


def test_what_a_signal_asks_for_is_never_skipped(url: str, gate: threading.Event) -> None:
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=1, busy="skip")
        train(callback, 1, 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        first = ckpt.pending
        step = train_until(callback, lambda: ckpt.pending is not first, 2)
        gate.set()
        callback.on_train_end()
        assert steps(ckpt) == [1, step - 1]


# --- optimizers and schedulers -------------------------------------------------------------------------------------


class Training:
    """A model, its optimizer and a schedule, with a step of two micro-batches."""

    def __init__(self) -> None:
        self.model = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.schedule = lr_scheduler.StepLR(self.optimizer, step_size=1)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def backward(self) -> None:
        self.model(torch.ones(1, 3)).sum().backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def test_a_save_between_accumulation_boundaries_warns_once(url: str, caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, training.state, every_steps=1)
        training.step()
        callback.on_step_end(1)
        training.optimizer.zero_grad()
        callback.on_step_end(2)  # nothing was accumulated
        training.backward()
        training.optimizer.step()
        callback.on_step_end(3)  # gradients are still there, but were used
        assert "accumulated" not in caplog.text
        for step in (4, 5):
            training.backward()
            callback.on_step_end(step)
    assert caplog.text.count("the gradients accumulated so far are not in the snapshot") == 1
    assert "step 4 is saved although no optimizer has stepped" in caplog.text


@pytest.mark.parametrize("to", ["optimizer", "schedule"])
def test_attached_each_step_of_another_ones_loop_is_one_of_ours(
    url: str, to: str, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training()
    stepper = training.state[to]
    kind, content = type(stepper), stepper.state_dict()
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, training.state, every_steps=2)
        assert callback.attach(stepper) is callback
        assert isinstance(stepper, kind)
        assert stepper.state_dict() == content
        for _ in range(5):
            training.step()
        callback.on_train_end()
        training.step()
        assert steps(ckpt) == [2, 4]
        assert type(stepper) is kind
    again = Training()
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, again.state, every_steps=1).attach(again.state[to])
        assert again.schedule.last_epoch == (3 if to == "optimizer" else 4)
        again.step()
        callback.on_train_end()
        assert steps(ckpt)[-1] == 5
    behind = "schedule steps after the optimizer that the callback is attached to: snapshots have it one step behind"
    assert caplog.text.count(behind) == (to == "optimizer")


def test_attaching_goes_on_from_what_was_restored_before(url: str) -> None:
    training = Training()
    with Checkpointer(url) as ckpt:
        ckpt.save(6, training.state)
        callback = Callback(ckpt, training.state, every_steps=1)
        assert callback.on_train_begin() == 7
        callback.attach(training.schedule)
        training.step()
        callback.on_train_end()
        assert steps(ckpt) == [6, 7]


def test_what_is_no_stepper_and_a_second_one_are_refused(url: str) -> None:
    training = Training()
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, training.state, every_steps=1)
        with pytest.raises(TypeError, match="not to a Linear; in a loop of your own, call on_step_end"):
            callback.attach(training.model)
        callback.attach(training.optimizer)
        with pytest.raises(ValueError, match="attached already: each step would be counted twice"):
            callback.attach(training.schedule)


def test_what_goes_wrong_in_an_attached_callback_is_raised_by_the_step(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, url, times=100)
    training = Training()
    ckpt = Checkpointer(url)
    callback = Callback(ckpt, training.state, every_steps=1, failures_max=0).attach(training.optimizer)
    training.step()
    assert ckpt.pending is not None
    with pytest.raises(OutOfSpace):
        ckpt.pending.wait(SECONDS)
    with pytest.raises(OutOfSpace):
        training.step()
    assert callback.failed == 1
    ckpt.close()


def test_an_attached_loop_sees_that_it_is_to_stop(url: str) -> None:
    training = Training()
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, training.state, signals=(signal.SIGTERM,), agree_seconds=SECONDS)
        callback.attach(training.schedule)
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + SECONDS
        while not callback.stopping and time.monotonic() < end:
            training.step()
        callback.on_train_end()
        assert steps(ckpt) == [training.schedule.last_epoch]


def test_after_a_roll_back_attached_steps_are_counted_from_the_step_that_was_restored(url: str) -> None:
    training = Training()
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, training.state, every_steps=2).attach(training.schedule)
        for _ in range(4):
            training.step()
        assert ckpt.restore(training.state, step=2) == 2
        for _ in range(2):
            training.step()
        callback.on_train_end()
        assert steps(ckpt) == [2, 4, 4]
        assert training.schedule.last_epoch == 4


def test_a_cell_run_again_closes_the_callback_that_its_first_run_attached(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training()
    kept = []
    for run in range(3):
        ckpt = Checkpointer(url)
        kept.append((ckpt, Callback(ckpt, training.state, every_steps=1).attach(training.optimizer)))
        training.step()
        ckpt.close()
        assert steps(ckpt)[-1] == run + 1
    assert caplog.text.count("an earlier Callback was attached to the same steps, and is closed now") == 0
    ckpt = Checkpointer(url)
    for _ in range(2):
        Callback(ckpt, training.state, every_steps=1).attach(training.optimizer)
    assert caplog.text.count("an earlier Callback was attached to the same steps, and is closed now") == 1
    training.step()
    ckpt.close()
    assert steps(ckpt)[-1] == 4


def test_two_repositories_of_one_schedule_end_in_any_order_and_copies_do_not_count(url: str) -> None:
    training = Training()
    with Checkpointer(f"{url}-a") as first, Checkpointer(f"{url}-b") as second:
        one = Callback(first, training.state, every_steps=1).attach(training.schedule)
        other = Callback(second, training.state, every_steps=1).attach(training.schedule)
        training.step()
        for copied in (copy.deepcopy(training.schedule), pickle.loads(pickle.dumps(training.schedule))):
            assert type(copied) is lr_scheduler.StepLR
            copied.step()
        one.on_train_end()
        training.step()
        other.on_train_end()
        training.step()
        assert (steps(first), steps(second)) == ([1], [1, 2])


def test_attaching_to_an_optimizer_that_is_not_saved_warns(url: str, caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    with Checkpointer(url) as ckpt:
        Callback(ckpt, {"model": training.model}, every_steps=1).attach(training.optimizer).close()
        assert caplog.text.count("the optimizer that steps is not in the state") == 1
        Callback(ckpt, training.state, every_steps=1).attach(training.schedule).close()
        assert caplog.text.count("the optimizer that steps is not in the state") == 1


def test_a_step_saved_twice_is_a_failure_and_no_second_commit(url: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, state(), every_steps=2, on_committed=lambda snapshot: seen.append(snapshot.step))
        for _ in range(2):
            callback.on_step_end(2)
        callback.on_train_end()
    assert seen == [2]
    assert callback.failed == 1
    assert "this job has saved step 2 already" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"metrics": {"loss": None}}, "metric 'loss' is no number"),
        ({"metrics": {3: 1.0}}, "names of metrics are strings, not 3"),
        ({"metrics": {"loss": math.nan}}, "metric 'loss' is nan, not a finite number"),
        ({"note": None}, "the note is a string, not None"),
    ],
)
def test_labels_that_cannot_be_are_named(url: str, wrong: dict[str, Any], said: str) -> None:
    with Checkpointer(url) as ckpt:
        with pytest.raises((TypeError, ValueError), match=said):
            ckpt.save(1, state(), **wrong)
        ckpt.save(1, state())


# --- what is left behind -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_thread_hook_or_handler_is_left() -> Iterator[None]:
    def left() -> list[Any]:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        threads = [t for t in threading.enumerate() if t.name in ("fastckpt-watcher", "fastckpt-signals")]
        handlers = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
        return [wakeup, threads, handlers, len(_global_optimizer_pre_hooks)]

    before = left()
    yield
    end = time.monotonic() + SECONDS
    while left() != before and time.monotonic() < end:
        gc.collect()
        time.sleep(0.005)
    assert left() == before


def test_an_abandoned_callback_goes_and_takes_its_hooks_handlers_and_threads_along(url: str) -> None:
    training = Training()
    with Checkpointer(url) as ckpt:
        callback = Callback(ckpt, training.state, every_seconds=1000, signals=(signal.SIGUSR1, signal.SIGTERM))
        watcher = callback._watcher
        assert watcher is not None
        gone = weakref.ref(callback)
        assert training.optimizer._optimizer_step_post_hooks
        del callback
        gc.collect()
        assert gone() is None
        assert not training.optimizer._optimizer_step_post_hooks
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        watcher.join()
        assert not watcher._thread.is_alive()


def test_an_attached_callback_lives_as_long_as_what_it_is_attached_to(url: str) -> None:
    with Checkpointer(url) as ckpt:
        for to in ("optimizer", "schedule"):
            training = Training()
            gone = weakref.ref(Callback(ckpt, training.state, every_steps=1, resume="never").attach(training.state[to]))
            gc.collect()
            assert gone() is not None
            del training
            gc.collect()
            assert gone() is None


def test_closing_the_checkpointer_closes_its_callbacks(url: str) -> None:
    training = Training()
    ckpt = Checkpointer(url)
    callback = Callback(ckpt, training.state, every_steps=1).attach(training.schedule)
    ckpt.close()
    callback.close()
    assert type(training.schedule) is lr_scheduler.StepLR
    assert not training.optimizer._optimizer_step_post_hooks
    with pytest.raises(SaveError, match="this Callback is closed"):
        callback.on_step_end(1)
    with pytest.raises(SaveError, match="this Callback is closed"):
        callback.attach(training.optimizer)
    callback.on_train_end()


def test_a_cell_that_is_run_again_leaves_nothing_of_the_first_run(url: str) -> None:
    cell: dict[str, Any] = {}
    for first in (1, 3):
        # As in a notebook, the new objects are made while the old ones are still there.
        cell["ckpt"] = Checkpointer(url)
        cell["training"] = training = Training()
        cell["callback"] = callback = Callback(cell["ckpt"], training.state, every_steps=1)
        callback.attach(training.optimizer)
        training.step()
        os.kill(os.getpid(), signal.SIGUSR1)
        training.step()
        cell["ckpt"].pending.wait(SECONDS)
        assert steps(cell["ckpt"])[-1] == first + 1
        gc.collect()
        assert len([t for t in threading.enumerate() if t.name == "fastckpt-signals"]) == 1
        assert len(_global_optimizer_pre_hooks) == 1
    cell["callback"].on_train_end()
    cell["ckpt"].close()


def test_two_checkpointers_in_a_process_do_not_disturb_each_other(url: str) -> None:
    training, other = Training(), Training()
    with Checkpointer(url) as ckpt, Checkpointer(f"{url}-2") as second:
        one, two = (
            Callback(each, mine.state, every_steps=every, signals=(signal.SIGUSR1,)).attach(mine.schedule)
            for each, mine, every in ((ckpt, training, 2), (second, other, 3))
        )
        for _ in range(6):
            training.step()
            other.step()
        one.on_train_end()
        other.step()
        os.kill(os.getpid(), signal.SIGUSR1)
        before = second.pending
        end = time.monotonic() + SECONDS
        while second.pending is before and time.monotonic() < end:
            other.step()
        two.on_train_end()
        assert steps(ckpt) == [2, 4, 6]
        assert steps(second)[:2] == [3, 6]
        assert len(steps(second)) > 2


def test_an_abandoned_checkpointer_gives_back_its_hook_threads_descriptors_and_memory(url: str) -> None:
    def held() -> list[int]:
        memory = Path("/proc/self/maps").read_text().count("fastckpt-staging")
        return [len(_global_optimizer_pre_hooks), memory, len(os.listdir("/proc/self/fd")), threading.active_count()]

    def more_than_before() -> list[bool]:
        return [now > then for now, then in zip(held(), before, strict=True)]

    before = held()
    ckpt = Checkpointer(url)
    ckpt.save(1, {"t": torch.zeros(1 << 20)}).wait(SECONDS)
    assert more_than_before()[:2] == [True, True]
    del ckpt
    end = time.monotonic() + SECONDS
    while any(more_than_before()) and time.monotonic() < end:  # threads that make calls end when they have been idle
        gc.collect()
        time.sleep(0.005)
    assert not any(more_than_before())


def test_checkpointers_that_are_gone_are_not_looked_after_at_the_end_of_the_process(url: str) -> None:
    for _ in range(3):
        Checkpointer(url).close()
    gc.collect()
    assert [ckpt.url for ckpt in front._open if ckpt.url == url] == []
