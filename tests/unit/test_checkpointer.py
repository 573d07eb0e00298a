"""The Checkpointer from the outside, in one process: what it refuses, what it raises when, and how it ends."""

from __future__ import annotations

import logging
import os
import random
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastckpt
from fastckpt import (
    Checkpointer,
    Options,
    OutOfSpace,
    RepositoryNotFound,
    RNGState,
    SaveError,
    SnapshotDamaged,
    SnapshotExists,
    SnapshotNotFound,
    StateMismatch,
    StorageError,
)
from fastckpt import checkpointer as front
from fastckpt.format import names
from fastckpt.pending import Pending
from fastckpt.storage.memory import memory_store
from fastckpt.testing import FaultyStore

SECONDS = 20.0
SMALL = Options(chunk_bytes=4096)


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def failing(monkeypatch: pytest.MonkeyPatch, url: str, fail_at: int = 1, *, persistent: bool = False) -> None:
    """From now on Checkpointers of ``url`` fail at the nth append to a pack."""
    store = FaultyStore(
        memory_store(url.removeprefix("memory://")),
        fail_at=fail_at,
        error=OutOfSpace("the disk is full"),
        persistent=persistent,
        only=lambda operation, name: operation == "append" and name.startswith("packs/"),
    )
    monkeypatch.setattr("fastckpt.checkpointer.open_store", lambda _: store)


def steps(ckpt: Checkpointer) -> list[int]:
    return [snapshot.step for snapshot in ckpt.snapshots()]


def random_state(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Linear(40, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 5)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "mean": torch.randn(3),
        "epoch": seed,
        "deep": {"a": [seed, (1.5,)]},
    }


def content(state: dict[str, Any]) -> list[Any]:
    tensors = [*state["model"].state_dict().values(), state["mean"]]
    moments = [value.tolist() for own in state["optimizer"].state.values() for _, value in sorted(own.items())]
    return [[tensor.tolist() for tensor in tensors], moments, state["epoch"], state["deep"]]


def test_a_state_comes_back_in_place_and_the_step_with_it(url: str) -> None:
    saved, other = random_state(1), random_state(2)
    expected = content(saved)
    with Checkpointer(url) as ckpt:
        assert ckpt.restore(saved) is None
        ckpt.save(17, saved)
        weight, mean = other["model"][0].weight, other["mean"]
        assert ckpt.restore(other) == 17
        assert other["model"][0].weight is weight
        assert other["mean"] is mean
    assert content(other) == expected


def test_a_save_says_what_it_is_doing_and_what_it_did(url: str) -> None:
    with Checkpointer(url) as ckpt:
        pending = ckpt.save(3, {"t": torch.ones(1000)}, metrics={"loss": 2}, note="before annealing")
        pending.wait(SECONDS)
        assert (pending.step, pending.status, pending.done, pending.error) == (3, "committed", True, None)
        assert repr(pending) == "Pending(step=3, status='committed')"
        snapshot = pending.snapshot
        assert (snapshot.step, snapshot.metrics, snapshot.note) == (3, {"loss": 2.0}, "before annealing")
        assert snapshot.bytes >= 4000
        assert pending.counters["stage_bytes"] == pending.counters["write_bytes"] == 4000
        assert [snapshot.attempt for snapshot in ckpt.snapshots()] == [snapshot.attempt]
        assert snapshot.environment["torch"]["version"] == torch.__version__


def test_nothing_counts_as_committed_before_its_decision_is_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold(operation: str, name: str) -> bool:
        if (operation, name) == ("create", names.decision(2)):
            reached.set()
            go_on.wait(SECONDS)
        return True

    store = FaultyStore(memory_store(url.removeprefix("memory://")), only=hold)
    monkeypatch.setattr("fastckpt.checkpointer.open_store", lambda _: store)
    with Checkpointer(url) as ckpt:
        pending = ckpt.save(1, {"t": torch.ones(3)})
        assert reached.wait(SECONDS)
        assert (pending.status, pending.done) == ("written", False)
        with pytest.raises(TimeoutError, match="was not committed"):
            pending.wait(0)
        with pytest.raises(SaveError, match="step 1 is not committed"):
            _ = pending.snapshot
        go_on.set()
        pending.wait(SECONDS)
        assert steps(ckpt) == [1]


def test_a_repository_is_made_by_the_first_save_and_not_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    with caplog.at_level(logging.WARNING, "fastckpt"), Checkpointer(str(folder)) as ckpt:
        assert ckpt.restore({"x": 1}) is None
        assert ckpt.snapshots() == []
        assert f"no snapshot in file://{folder}, starting at 1" in caplog.text
        with pytest.raises(SnapshotNotFound, match="no snapshot of step 4"):
            ckpt.restore({"x": 1}, step=4)
        assert not folder.exists()
        ckpt.save(1, {"x": 1}).wait()
        with pytest.raises(SnapshotNotFound, match="no snapshot of step 4; the newest are 1"):
            ckpt.restore({"x": 1}, step=4)
    assert (folder / "FORMAT").exists()


def test_create_false_needs_a_repository_and_another_folder_is_never_written_to(tmp_path: Path) -> None:
    with pytest.raises(RepositoryNotFound, match="there is nothing there"):
        Checkpointer(str(tmp_path / "run"), create=False)
    (tmp_path / "thesis.tex").write_text("mine")
    for create in (True, False):
        with pytest.raises(RepositoryNotFound, match=r"it holds thesis\.tex"):
            Checkpointer(str(tmp_path), create=create)
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save(1, {"x": 1})
    Checkpointer(str(tmp_path / "run"), create=False).close()


def test_several_ranks_without_a_process_group_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 2.*Call torch\.distributed\.init_process_group"):
        Checkpointer(url)
    monkeypatch.setenv("WORLD_SIZE", "1")
    Checkpointer(url).close()


@pytest.mark.parametrize("step", [-1, 1.5, "3", 2**63, 2**70, True])
def test_a_wrong_step_is_refused_before_anything_happens(url: str, step: Any) -> None:
    with Checkpointer(url) as ckpt:
        with pytest.raises((ValueError, TypeError), match="step"):
            ckpt.save(step, {"x": 1})
        with pytest.raises((ValueError, TypeError), match="step"):
            ckpt.restore({"x": 1}, step)
        assert ckpt.snapshots() == []


def test_a_step_may_be_any_integer(url: str) -> None:
    with Checkpointer(url) as ckpt:
        ckpt.save(np.int64(3), {"x": 1})  # type: ignore[arg-type]
        ckpt.wait_staged()
        assert ckpt.restore({"x": 0}, np.int64(3)) == 3  # type: ignore[arg-type]


def test_wrong_arguments_of_restore_are_refused(url: str) -> None:
    with Checkpointer(url) as ckpt:
        with pytest.raises(ValueError, match="missing='ignore'"):
            ckpt.restore({}, missing="ignore")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="policy='any'"):
            ckpt.restore({}, policy="any")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="names in the state are strings"):
            ckpt.restore({1: 1})  # type: ignore[dict-item]
        for only in ("model.*", [None], None, 5):
            with pytest.raises(TypeError, match="is not a list of globs"):
                ckpt.restore({}, only=only)  # type: ignore[arg-type]
        for rename in ({"model.": None}, {1: "model."}, [("a.", "b.")]):
            with pytest.raises(TypeError, match="is not a mapping of prefixes"):
                ckpt.restore({}, rename=rename)  # type: ignore[arg-type]


def test_a_step_is_saved_once_until_a_rollback_makes_room_for_it(url: str) -> None:
    state = {"x": 0}
    with Checkpointer(url) as ckpt:
        for step in (1, 2, 3):
            state["x"] = step
            ckpt.save(step, state)
        with pytest.raises(SnapshotExists, match="has saved step 3 already"):
            ckpt.save(3, state)
        assert ckpt.restore(state, step=1) == 1
        with pytest.raises(SnapshotExists, match="step 1"):
            ckpt.save(1, state)
        state["x"] = 20
        ckpt.save(2, state).wait()
        with pytest.raises(SnapshotExists, match="step 2"):
            ckpt.save(2, state)
        assert ckpt.restore(state) == 2
        assert state["x"] == 20
        assert steps(ckpt) == [1, 2, 3, 2]
    with Checkpointer(url) as ckpt:  # another job may
        ckpt.save(3, {"x": 30}).wait()
        assert ckpt.restore(state) == 3
        assert state["x"] == 30


def test_a_state_that_cannot_be_saved_costs_nothing_but_the_call(url: str) -> None:
    with Checkpointer(url) as ckpt:
        for _ in range(2):
            with pytest.raises(TypeError, match=r"deep\['f'\]"):
                ckpt.save(1, {"deep": {"f": print}})
            ckpt.wait_staged()
        ckpt.save(1, {"deep": {"f": 1}}).wait()
        with pytest.raises(TypeError, match="names in the state are non-empty strings"):
            ckpt.save(2, {1: 2})  # type: ignore[dict-item]
        assert steps(ckpt) == [1]


# --- failures behind the training loop ------------------------------------------------------------------------------


def test_a_failure_behind_the_loop_is_raised_by_the_next_save_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, url)
    with Checkpointer(url) as ckpt:
        pending = ckpt.save(1, {"t": torch.ones(10)})
        assert pending._finished.wait(SECONDS)
        assert pending.status == "failed"
        assert isinstance(pending.error, OutOfSpace)
        with pytest.raises(SaveError, match="is not committed; it is failed"):
            _ = pending.snapshot
        with pytest.raises(OutOfSpace, match="the disk is full"):
            ckpt.save(2, {"t": torch.ones(10)})
        assert ckpt.pending is not None
        ckpt.pending.wait(SECONDS)  # it was started all the same
        assert steps(ckpt) == [2]
        ckpt.save(1, {"t": torch.ones(10)}).wait(SECONDS)  # the step that failed may be saved again
        assert steps(ckpt) == [2, 1]


def test_a_failure_behind_the_loop_is_raised_by_wait_and_then_not_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, url)
    with Checkpointer(url) as ckpt:
        pending = ckpt.save(1, {"t": torch.ones(10)})
        with pytest.raises(OutOfSpace):
            pending.wait(SECONDS)
        ckpt.save(2, {"t": torch.ones(10)}).wait(SECONDS)
    assert [snapshot.step for snapshot in fastckpt.open(url).snapshots()] == [2]


def test_a_failure_behind_the_loop_is_raised_by_close_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, url)
    ckpt = Checkpointer(url)
    ckpt.save(1, {"t": torch.ones(10)})
    with pytest.raises(OutOfSpace):
        ckpt.close()
    ckpt.close()
    with pytest.raises(SaveError, match="this Checkpointer is closed"):
        ckpt.save(2, {})
    with pytest.raises(SaveError, match="this Checkpointer is closed"):
        ckpt.restore({})


def test_a_failure_is_not_lost_because_the_next_save_was_already_under_way(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = front.Saves.write

    def late(saves: Any, attempt: Any, offered: Any, pool: Any, trace: Any, on_staged: Any) -> Any:
        if attempt.step > 1:
            return write(saves, attempt, offered, pool, trace, on_staged)
        on_staged()  # everything is read; that it cannot be written shows only later
        assert go_on.wait(SECONDS)
        raise OutOfSpace("the disk was full at step 1")

    monkeypatch.setattr(front.Saves, "write", late)
    ckpt = Checkpointer(url)
    ckpt.save(1, {"t": torch.ones(10)})
    second = ckpt.save(2, {"t": torch.ones(10)})
    go_on.set()
    second.wait(SECONDS)
    with pytest.raises(OutOfSpace, match="step 1"):
        ckpt.close()
    ckpt.close()


def test_a_failure_is_not_lost_because_the_next_save_comes_while_it_is_being_entered(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, url)
    reached, go_on = threading.Event(), threading.Event()
    finish = Pending._finish

    def slowly(pending: Pending, error: BaseException | None) -> None:
        reached.set()
        assert go_on.wait(SECONDS)
        finish(pending, error)

    monkeypatch.setattr(Pending, "_finish", slowly)
    ckpt = Checkpointer(url)
    ckpt.save(1, {"t": torch.ones(10)})
    assert reached.wait(SECONDS)
    ckpt.save(2, {"t": torch.ones(10)})
    go_on.set()
    with pytest.raises(OutOfSpace, match="the disk is full"):
        ckpt.close()
    ckpt.close()


def test_of_several_failures_that_nobody_was_told_of_close_raises_the_first_and_tells_of_the_others(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def late(saves: Any, attempt: Any, offered: Any, pool: Any, trace: Any, on_staged: Any) -> Any:
        on_staged()
        assert go_on.wait(SECONDS)
        raise OutOfSpace(f"the disk was full at step {attempt.step}")

    monkeypatch.setattr(front.Saves, "write", late)
    note = "fastckpt: step 2 was not saved either: OutOfSpace: the disk was full at step 2"
    with pytest.raises(OutOfSpace, match="full at step 1") as caught, Checkpointer(url) as ckpt:  # noqa: PT012
        ckpt.save(1, {"t": torch.ones(10)})
        ckpt.save(2, {"t": torch.ones(10)})
        go_on.set()
    assert caught.value.__notes__ == [note]
    ckpt.close()
    with pytest.raises(ZeroDivisionError) as other, Checkpointer(url) as ckpt:  # noqa: PT012
        go_on.clear()
        ckpt.save(1, {"t": torch.ones(10)})
        ckpt.save(2, {"t": torch.ones(10)})
        go_on.set()
        _ = 1 / 0
    first = "fastckpt: the last save did not get through either: OutOfSpace: the disk was full at step 1"
    assert other.value.__notes__ == [first, note]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_the_thread_of_a_save_starts_leaves_no_save_that_never_ends(
    url: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    start = threading.Thread.start
    interrupts = iter([KeyboardInterrupt()])

    def interrupted(thread: threading.Thread) -> None:
        error = next(interrupts, None) if thread.name == "fastckpt-save" else None
        if error is None or moment == "after":
            start(thread)
        if error is not None:
            raise error

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with Checkpointer(url) as ckpt:
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1, {"t": torch.ones(10)})
        assert ckpt.pending is not None
        ckpt.pending.wait(SECONDS)
        ckpt.save(2, {"t": torch.ones(10)})
    assert steps(ckpt) == [1, 2]


def test_leaving_the_block_waits_for_the_commit_and_raises_what_went_wrong(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(url) as ckpt:
        pending = ckpt.save(1, {"t": torch.ones(10)})
    assert pending.status == "committed"
    failing(monkeypatch, url)
    with pytest.raises(OutOfSpace), Checkpointer(url) as ckpt:
        ckpt.save(2, {"t": torch.ones(10)})


def test_an_error_in_the_block_stays_the_error_and_carries_what_became_of_the_last_save(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ZeroDivisionError) as caught, Checkpointer(url) as ckpt:  # noqa: PT012
        pending = ckpt.save(1, {"t": torch.ones(10)})
        _ = 1 / 0
    assert pending.status == "committed"
    assert not hasattr(caught.value, "__notes__")
    failing(monkeypatch, url)
    with pytest.raises(ZeroDivisionError) as caught, Checkpointer(url) as ckpt:  # noqa: PT012
        ckpt.save(2, {"t": torch.ones(10)})
        _ = 1 / 0
    assert caught.value.__notes__ == [
        "fastckpt: the last save did not get through either: OutOfSpace: the disk is full"
    ]


def test_after_an_error_in_the_block_a_save_that_hangs_is_not_waited_for_forever(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = front.Saves.write

    def late(*arguments: Any) -> Any:
        assert go_on.wait(SECONDS)
        return write(*arguments)

    monkeypatch.setattr(front.Saves, "write", late)
    monkeypatch.setattr(front, "CLOSE_SECONDS_AFTER_ERROR", 0.05)
    with pytest.raises(ZeroDivisionError) as caught, Checkpointer(url) as ckpt:  # noqa: PT012
        pending = ckpt.save(1, {"t": torch.ones(10)})
        _ = 1 / 0
    assert "TimeoutError: step 1 was not committed within 0.05 s" in caught.value.__notes__[0]
    with pytest.raises(TimeoutError):
        pending.wait(0.01)
    with pytest.raises(TimeoutError):
        ckpt.close(timeout=0.01)
    go_on.set()
    pending.wait(SECONDS)  # it goes on behind
    ckpt.close()


def test_a_program_that_ends_without_close_still_gets_its_last_save(tmp_path: Path) -> None:
    script = (
        "import sys, torch, fastckpt\n"
        "ckpt = fastckpt.Checkpointer(sys.argv[1])\n"
        "ckpt.save(1, {'t': torch.ones(1 << 22)})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == ""
    assert [snapshot.step for snapshot in fastckpt.open(str(tmp_path / "run")).snapshots()] == [1]


# --- damage ---------------------------------------------------------------------------------------------------------


def packs(folder: Path, attempt: str) -> list[Path]:
    return sorted((folder / "packs" / attempt).rglob("*.pack"))


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def save_steps(folder: Path, *numbers: int) -> list[str]:
    """Two chunks of distinct rows a step, in one repository; returns the attempts."""
    with Checkpointer(str(folder), options=SMALL) as ckpt:
        for number in numbers:
            ckpt.save(number, {"t": rows(number), "step": number})
    return [snapshot.attempt for snapshot in fastckpt.open(str(folder)).snapshots()]


def rows(seed: int) -> torch.Tensor:
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(seed))


def test_damage_is_named_and_saving_is_refused_until_a_restore_succeeds(tmp_path: Path) -> None:
    *_, last = save_steps(tmp_path, 1, 2)
    snapshot = fastckpt.open(str(tmp_path)).snapshot()
    place = snapshot.place(1)
    flip(tmp_path / place.pack, place.offset + 100)
    state = {"t": torch.zeros(16, 128), "step": 0}
    with Checkpointer(str(tmp_path), options=SMALL) as ckpt:
        with pytest.raises(SnapshotDamaged) as caught:
            ckpt.restore(state)
        error = caught.value
        assert (error.key, error.shard, error.object, error.offset) == ("t", "[0:16, 0:128]", place.pack, place.offset)
        assert place.pack.split("/")[1] == last
        assert torch.equal(state["t"][8:], torch.zeros(8, 128)), "not a byte of the damaged chunk was placed"
        assert state["step"] == 0
        with pytest.raises(SaveError, match="Restore successfully first"):
            ckpt.save(3, state)
        with pytest.raises(SnapshotDamaged):
            ckpt.restore(state)
        assert ckpt.restore(state, policy="previous") == 1
        assert state["step"] == 1
        assert torch.equal(state["t"], rows(1))
        ckpt.save(2, state).wait()
        assert ckpt.restore(state, step=2) == 2


def test_going_back_stops_where_nothing_is_left_rather_than_start_afresh(tmp_path: Path) -> None:
    for attempt in save_steps(tmp_path, 1, 2):
        for file in packs(tmp_path, attempt):
            flip(file, 10)
    state = {"t": torch.zeros(16, 128), "step": 0}
    with Checkpointer(str(tmp_path), options=SMALL) as ckpt:
        with pytest.raises(SnapshotDamaged, match="step 1"):
            ckpt.restore(state, policy="previous")
        with pytest.raises(SaveError, match="not saving"):
            ckpt.save(3, state)


def test_previous_from_an_explicit_step_goes_back_and_never_forward(tmp_path: Path) -> None:
    attempts = save_steps(tmp_path, 1, 2, 3)
    for file in packs(tmp_path, attempts[1]):
        flip(file, 10)
    state = {"t": torch.zeros(16, 128), "step": 0}
    with Checkpointer(str(tmp_path), options=SMALL) as ckpt:
        with pytest.raises(SnapshotDamaged, match="step 2"):
            ckpt.restore(state, step=2)
        assert ckpt.restore(state, step=2, policy="previous") == 1
        assert ckpt.restore(state) == 3
        assert state["step"] == 3


def test_a_snapshot_whose_pack_is_gone_or_short_is_passed_over_aloud_unless_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = save_steps(tmp_path, 1, 2, 3)
    packs(tmp_path, attempts[2])[0].unlink()
    with packs(tmp_path, attempts[1])[0].open("r+b") as file:
        file.truncate(100)
    state = {"t": torch.zeros(16, 128), "step": 0}
    with Checkpointer(str(tmp_path), options=SMALL) as ckpt:
        with caplog.at_level(logging.WARNING, "fastckpt"):
            assert ckpt.restore(state) == 1
        assert "passing over step 3" in caplog.text
        assert "passing over step 2" in caplog.text
        for step in (2, 3):
            with pytest.raises(SnapshotDamaged, match="pack"):
                ckpt.restore(state, step=step)
        assert state["step"] == 1
        ckpt.save(4, state).wait()  # those were found before anything was changed


def test_a_store_that_cannot_be_read_is_an_error_and_no_reason_to_go_back(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(url) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"t": torch.full((10,), step)})
    store = FaultyStore(
        memory_store(url.removeprefix("memory://")),
        fail_at=1,
        error=StorageError("the network is down", transient=True),
        only=lambda operation, _: operation == "read_into",
    )
    monkeypatch.setattr("fastckpt.checkpointer.open_store", lambda _: store)
    state = {"t": torch.zeros(10, dtype=torch.int64)}
    with Checkpointer(url) as ckpt:
        with pytest.raises(StorageError, match="the network is down"):
            ckpt.restore(state, policy="previous")
        with pytest.raises(SaveError, match="not saving"):
            ckpt.save(3, state)
        assert ckpt.restore(state) == 2
        ckpt.save(3, state)


def test_a_mismatch_changes_nothing_and_saving_goes_on(url: str) -> None:
    state = {"t": torch.ones(3), "u": torch.ones(2)}
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {"t": torch.zeros(3), "u": torch.zeros(3)}).wait()
        with pytest.raises(StateMismatch):
            ckpt.restore(state)
        assert state["t"].tolist() == [1, 1, 1]
        ckpt.save(2, state).wait()


# --- random numbers -------------------------------------------------------------------------------------------------


def test_random_streams_go_on_where_they_were(url: str) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    draw()
    with Checkpointer(url) as ckpt:
        ckpt.save(1, {"rng": RNGState()})
        expected = [draw(), draw()]
        ckpt.restore({"rng": RNGState()})
        assert [draw(), draw()] == expected


# --- what is on disk ------------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_written_fails_the_save_by_name(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path / "run")) as ckpt:
        ckpt.save(1, {"t": torch.ones(10)}).wait()
        (tmp_path / "run" / "packs").rename(tmp_path / "away")
        (tmp_path / "run" / "packs").write_text("a file in its place")
        with pytest.raises(StorageError, match="packs"):
            ckpt.save(2, {"t": torch.ones(10)}).wait()
        os.unlink(tmp_path / "run" / "packs")
        (tmp_path / "away").rename(tmp_path / "run" / "packs")
        ckpt.save(2, {"t": torch.ones(10)}).wait()
        assert steps(ckpt) == [1, 2]


def test_one_line_is_logged_for_a_commit(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastckpt"), Checkpointer(url) as ckpt:
        ckpt.save(5, {"t": torch.ones(10)})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith(f"{url}: committed step 5: ")


def test_a_restore_says_what_differs_from_the_environment_of_the_snapshot(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"model": torch.nn.Linear(2, 2)}
    precision = torch.get_float32_matmul_precision()
    with Checkpointer(url) as ckpt, caplog.at_level(logging.INFO, "fastckpt"):
        ckpt.save(3, state)
        ckpt.restore(state)
        assert "since step 3 was saved" not in caplog.text
        torch.set_float32_matmul_precision("medium")
        try:
            ckpt.restore(state)
        finally:
            torch.set_float32_matmul_precision(precision)
    (line,) = [record for record in caplog.records if "float32_matmul" in record.getMessage()]
    assert line.levelno == logging.WARNING
    assert line.getMessage() == (
        f"{url}: since step 3 was saved (training): determinism.float32_matmul_precision was {precision}, is medium"
    )
