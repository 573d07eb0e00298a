"""Several ranks through the Checkpointer: what goes wrong on one of them is known to all, and they stay in step."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastckpt
from fastckpt import (
    Checkpointer,
    CommitTimeout,
    Options,
    RestoreError,
    SaveError,
    SnapshotDamaged,
    SnapshotExists,
    StorageError,
)
from fastckpt import checkpointer as front
from fastckpt.group import Deadline, Decide, Group, Reply
from fastckpt.repository.reader import Snapshot
from fastckpt.testing import ThreadGroup

SECONDS = 60.0
OPTIONS = Options(chunk_bytes=4096, fence="explicit", commit_seconds_max=SECONDS)


class Ranks:
    """Runs a function on each of ``size`` ranks; the Checkpointers it makes are of that rank."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int = 2) -> None:
        self._here = threading.local()
        self._group = ThreadGroup(size, seconds_max=SECONDS)
        monkeypatch.setattr(front, "job_group", lambda *_: self._here.group)

    def run(self, function: Callable[[int], Any], wrap: Callable[[Group], Group] = lambda group: group) -> Any:
        def on_rank(group: Group) -> Any:
            self._here.group = wrap(group)
            return function(group.rank)

        return self._group.run(on_rank)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


@pytest.fixture
def url() -> str:
    return f"memory://{secrets.token_hex(8)}"


def outcome(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


class MissesAnswer:
    """A group in which rank 1 does not get the answer to one exchange, although the leader has given it."""

    def __init__(self, group: Group, name: str) -> None:
        self._group = group
        self._name = name
        self.rank, self.size, self.nodes, self.host = group.rank, group.size, group.nodes, group.host

    def exchange(
        self, name: str, reply: Reply, decide: Decide, *, members: Sequence[int], until: Deadline, what: str
    ) -> bytes:
        answer = self._group.exchange(name, reply, decide, members=members, until=until, what=what)
        if self.rank == 1 and name == self._name:
            raise CommitTimeout("rank 1 had no answer from rank 0", [0])
        return answer

    def post(self, name: str, data: bytes) -> None:
        self._group.post(name, data)

    def posted(self, name: str) -> bytes | None:
        return self._group.posted(name)

    def withdraw(self, name: str) -> None:
        self._group.withdraw(name)


@pytest.mark.parametrize("missed", [1, 2])
def test_a_rank_that_missed_the_answer_with_a_new_layout_does_not_write_by_the_old_one(
    url: str, ranks: Ranks, missed: int
) -> None:
    def state(rank: int, step: int, value: float) -> dict[str, Any]:
        # When the answer is missed, rank 0 gives one buffer up for another: rank 1 is to write the other of its two.
        module = nn.Module()
        if rank == 1 or step < missed:
            module.register_buffer("b0", torch.full((4096,), value))
        if rank == 1 or step >= missed:
            module.register_buffer("b1", torch.full((4096,), value + 1))
        return {"m": module}

    def job(rank: int) -> list[Any]:
        with Checkpointer(url, options=OPTIONS) as ckpt:
            failed = {}
            for step in (1, 2, 3, 4):
                # The rank that goes on waits for the one that gave up only so long.
                seconds = 0.5 if step == missed else SECONDS
                ckpt._saves._options = dataclasses.replace(OPTIONS, commit_seconds_max=seconds)

                def save(step: int = step) -> None:
                    ckpt.save(step, state(rank, step, step * 10.0)).wait(SECONDS)

                failed[step] = outcome(save)
            restored = state(1, 4, 0.0)
            return [
                failed,
                ckpt.restore(restored),
                {name: value.unique().tolist() for name, value in restored["m"].named_buffers()},
            ]

    results = ranks.run(job, lambda group: MissesAnswer(group, f"save-{missed}/offers/node"))
    for rank, (failed, step, buffers) in enumerate(results):
        for number, error in failed.items():
            assert (error is not None) == (number == missed), (rank, failed)
        assert step == 4
        assert buffers == {"b0": [40.0], "b1": [41.0]}
    snapshots = fastckpt.open(url).snapshots()
    assert [snapshot.step for snapshot in snapshots] == [step for step in (1, 2, 3, 4) if step != missed]
    for snapshot in snapshots:
        for key in snapshot.layout.keys:
            expected = snapshot.step * 10.0 + (key == "m.b1")
            assert np.array_equal(snapshot.read(key), np.full(4096, expected, np.float32)), (snapshot.step, key)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_metric_that_is_not_finite_on_one_rank_fails_that_save_on_all_and_no_other(
    url: str, ranks: Ranks, failing: int
) -> None:
    def job(rank: int) -> list[BaseException | None]:
        with Checkpointer(url, options=OPTIONS) as ckpt:

            def save(step: int, loss: float) -> BaseException | None:
                return outcome(lambda: ckpt.save(step, {"w": torch.arange(5000.0)}, metrics={"loss": loss}).wait())

            bad = float("nan") if rank == failing else 1.0
            return [save(1, 1.0), save(2, bad), save(3, 1.0), save(4, 1.0)]

    for rank, errors in enumerate(ranks.run(job)):
        assert [error is None for error in errors] == [True, False, True, True], errors
        assert isinstance(errors[1], ValueError if rank == failing else SaveError)
        assert rank == failing or f"rank {failing}" in str(errors[1])
    assert [snapshot.step for snapshot in fastckpt.open(url).snapshots()] == [1, 3, 4]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_step_that_one_rank_has_saved_before_fails_that_save_on_all_and_no_other(
    url: str, ranks: Ranks, failing: int
) -> None:
    def job(rank: int) -> list[BaseException | None]:
        with Checkpointer(url, options=OPTIONS) as ckpt:

            def save(step: int) -> BaseException | None:
                return outcome(lambda: ckpt.save(step, {"w": torch.arange(5000.0)}).wait())

            return [save(1), save(1 if rank == failing else 2), save(2), save(3)]

    for rank, errors in enumerate(ranks.run(job)):
        assert [error is None for error in errors] == [True, False, True, True], errors
        assert isinstance(errors[1], SnapshotExists if rank == failing else SaveError)
        assert rank == failing or f"rank {failing}" in str(errors[1])
    assert [snapshot.step for snapshot in fastckpt.open(url).snapshots()] == [1, 2, 3]


def test_where_one_rank_cannot_read_and_another_finds_damage_none_goes_back_alone(
    url: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(_: int) -> None:
        with Checkpointer(url, options=OPTIONS) as ckpt:
            for step in (1, 2):
                ckpt.save(step, {"w": torch.full((5000,), float(step))}).wait()

    ranks.run(save)
    read_chunks = Snapshot.read_chunks

    def failing(snapshot: Snapshot, *arguments: Any) -> None:
        if snapshot.step == 2 and ranks._here.group.rank == 0:
            raise StorageError("the network is down", transient=True)
        if snapshot.step == 2:
            raise SnapshotDamaged("a chunk of it is damaged", key="w")
        read_chunks(snapshot, *arguments)

    monkeypatch.setattr(Snapshot, "read_chunks", failing)

    def restore(_: int) -> tuple[BaseException | None, list[float]]:
        state = {"w": torch.zeros(5000)}
        with Checkpointer(url, options=OPTIONS) as ckpt:
            return outcome(lambda: ckpt.restore(state, policy="previous")), state["w"].unique().tolist()

    (first, first_values), (second, second_values) = ranks.run(restore)
    assert isinstance(first, StorageError)
    assert isinstance(second, RestoreError)
    assert not isinstance(second, SnapshotDamaged)
    assert "rank 0" in str(second)
    assert first_values == second_values == [0.0]


def test_where_every_rank_finds_damage_all_go_back_together(
    url: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(_: int) -> None:
        with Checkpointer(url, options=OPTIONS) as ckpt:
            for step in (1, 2):
                ckpt.save(step, {"w": torch.full((5000,), float(step))}).wait()

    ranks.run(save)
    read_chunks = Snapshot.read_chunks

    def failing(snapshot: Snapshot, *arguments: Any) -> None:
        if snapshot.step == 2 and ranks._here.group.rank == 1:
            raise SnapshotDamaged("a chunk of it is damaged", key="w")
        read_chunks(snapshot, *arguments)

    monkeypatch.setattr(Snapshot, "read_chunks", failing)

    def restore(_: int) -> tuple[int | None, list[float]]:
        state = {"w": torch.zeros(5000)}
        with Checkpointer(url, options=OPTIONS) as ckpt:
            return ckpt.restore(state, policy="previous"), state["w"].unique().tolist()

    assert ranks.run(restore) == [(1, [1.0]), (1, [1.0])]


def test_a_rank_that_does_not_prepare_is_named_by_the_one_that_does(url: str, ranks: Ranks) -> None:
    def on_rank(rank: int) -> BaseException | None:
        ckpt = Checkpointer(url, options=dataclasses.replace(OPTIONS, commit_seconds_max=0.5))
        return outcome(lambda: ckpt.prepare({"t": torch.ones(3)})) if rank == 0 else None

    error, _ = ranks.run(on_rank)
    assert isinstance(error, CommitTimeout)
    assert "rank 1 was not heard of while waiting for all ranks to call prepare" in str(error)


def test_ranks_that_see_different_directories_under_one_path_all_fail_naming_the_one_that_is_elsewhere(
    tmp_path: Path, ranks: Ranks
) -> None:
    def job(rank: int) -> BaseException | None:
        ckpt = Checkpointer(tmp_path / f"host{rank}", options=OPTIONS)
        error = outcome(lambda: ckpt.save(1, {"w": torch.zeros(1 << 12)}).wait())
        ckpt.close()
        assert ckpt.snapshots() == []
        return error

    for error in ranks.run(job):
        assert isinstance(error, SaveError)
        assert "rank 1 does not see the repository that rank 0 made" in str(error)
    assert not (tmp_path / "host1" / "packs").exists()


def test_a_large_tensor_whose_last_elements_differ_between_ranks_is_refused_at_the_first_save(
    url: str, ranks: Ranks
) -> None:
    def job(rank: int) -> BaseException | None:
        tensor = torch.zeros(1 << 22)
        tensor[-100:] = rank
        with Checkpointer(url, options=dataclasses.replace(OPTIONS, chunk_bytes=1 << 20)) as ckpt:
            return outcome(lambda: ckpt.save(1, {"table": tensor}))

    for error in ranks.run(job):
        assert isinstance(error, ValueError)
        assert "table: differs between ranks (rank 0 from rank 1)" in str(error)


def test_ranks_that_ask_for_different_steps_all_raise(url: str, ranks: Ranks) -> None:
    def job(rank: int) -> tuple[BaseException | None, list[float]]:
        state = {"w": torch.zeros(3)}
        with Checkpointer(url, options=OPTIONS) as ckpt:
            for step in (1, 2):
                ckpt.save(step, {"w": torch.full((3,), float(step))}).wait()
            return outcome(lambda: ckpt.restore(state, step=1 + rank)), state["w"].tolist()

    for error, values in ranks.run(job):
        assert error is not None
        assert "ranks ask for different steps" in str(error)
        assert values == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("ranks_that_err", [(1,), (0, 1)])
def test_a_step_of_any_kind_of_integer_is_restored_and_one_too_large_is_told_to_all(
    url: str, ranks: Ranks, ranks_that_err: tuple[int, ...]
) -> None:
    options = dataclasses.replace(OPTIONS, commit_seconds_max=20.0)

    def job(rank: int) -> BaseException | None:
        state = {"w": torch.zeros(3)}
        with Checkpointer(url, options=options) as ckpt:
            ckpt.save(np.int64(1), state).wait()
            error = outcome(lambda: ckpt.restore(state, step=2**70 if rank in ranks_that_err else 1))
            assert ckpt.restore(state, step=np.int64(1) if rank else 1) == 1
            return error

    for error in ranks.run(job):
        assert isinstance(error, ValueError | RestoreError)
        assert not isinstance(error, CommitTimeout)
        assert "1180591620717411303424" in str(error)


def test_ranks_with_different_policies_all_raise_and_stay_in_step(url: str, ranks: Ranks) -> None:
    """One alone would go back to the snapshot before where the newest is damaged, and take part in what comes next."""

    def job(rank: int) -> BaseException | None:
        state = {"w": torch.zeros(3)}
        with Checkpointer(url, options=OPTIONS) as ckpt:
            ckpt.save(1, state).wait()
            error = outcome(lambda: ckpt.restore(state, policy="previous" if rank else "strict"))
            assert ckpt.restore(state, policy="previous") == 1
            return error

    for error in ranks.run(job):
        assert isinstance(error, ValueError)
        assert "by the same policy" in str(error)


class Unreadable(dict[str, Any]):
    def items(self) -> Any:
        raise AttributeError("not here")


@pytest.mark.parametrize(
    "wrong", [{"only": [None]}, {"step": 2**70}, {"state": Unreadable()}], ids=["only", "step", "state"]
)
def test_a_restore_that_is_asked_for_wrongly_on_one_rank_fails_on_all_and_the_next_does_not(
    url: str, ranks: Ranks, wrong: dict[str, Any]
) -> None:
    def job(rank: int) -> BaseException | None:
        state = {"w": torch.zeros(3)}
        with Checkpointer(url, options=OPTIONS) as ckpt:
            ckpt.save(1, state).wait()
            error = outcome(lambda: ckpt.restore(**{"state": state, **(wrong if rank == 1 else {})}))
            assert ckpt.restore(state) == 1
            return error

    first, second = ranks.run(job)
    assert isinstance(first, RestoreError)
    assert "rank 1" in str(first)
    assert isinstance(second, RestoreError if "state" in wrong else TypeError | ValueError)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        ("fastckpt.job.state.Describer.describe", SaveError),
        ("fastckpt.repository.writer.Committer.commit", SaveError),
        ("fastckpt.repository.repository.Repository.choose", RestoreError),
        ("fastckpt.repository.reader.Snapshot.read_chunks", RestoreError),
    ],
)
def test_an_error_that_is_none_of_ours_is_raised_as_one_of_the_operation_on_every_rank(
    url: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, place: str, kind: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError("no more of it")

    def save(rank: int) -> None:
        with Checkpointer(url, options=OPTIONS) as ckpt:
            ckpt.save(1, {"w": torch.zeros(3)}).wait()

    def job(rank: int) -> BaseException | None:
        state = {"w": torch.zeros(3)}
        with Checkpointer(url, options=OPTIONS) as ckpt:
            return outcome(lambda: ckpt.save(2, state).wait() if kind is SaveError else ckpt.restore(state))

    ranks.run(save)
    monkeypatch.setattr(place, fail)
    for error in ranks.run(job):
        assert isinstance(error, kind)
        assert "MemoryError: no more of it" in str(error)
