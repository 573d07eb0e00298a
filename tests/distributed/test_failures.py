"""One rank goes wrong: every rank hears of it, by rank and cause, nothing half done stays, and the next save works."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from jobs import build, prints, rank, raw, same, train, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fastckpt
from fastckpt import (
    Checkpointer,
    CommitTimeout,
    FastckptError,
    Options,
    OutOfSpace,
    RankFailed,
    SaveError,
    SnapshotDamaged,
    StateMismatch,
)
from fastckpt import checkpointer as front
from fastckpt.job import group as job_groups
from fastckpt.job.group import StoreKeyValue
from fastckpt.repository import writer
from fastckpt.storage.local import _LocalWriter
from fastckpt.storage.open import open_store
from fastckpt.testing import FaultyStore

pytestmark = pytest.mark.distributed

SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)
IMPATIENT = Options(chunk_bytes=4096, commit_seconds_max=2)


def sharded(seed: int) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    full = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed))
    return distribute_tensor(full, mesh, [ShardPlacement(0)], src_data_rank=None)


def steps(ckpt: Checkpointer) -> list[int]:
    return [snapshot.step for snapshot in ckpt.snapshots()]


def different_steps(url: str) -> None:
    with Checkpointer(url, options=SMALL) as ckpt:
        with pytest.raises(ValueError, match="ranks save different steps at the same time: rank 0: 10, rank 1: 11"):
            ckpt.save(10 + rank(), {"x": 1})
        ckpt.save(12, {"x": 1}).wait()
        with pytest.raises(ValueError, match="different steps"):  # now behind the training loop
            ckpt.save(20 + rank(), {"x": 1}).wait()
        ckpt.save(30, {"x": 1}).wait()
        assert steps(ckpt) == [12, 30]


def test_ranks_that_save_different_steps_are_told(tmp_path: Path) -> None:
    ranks.run(2, different_steps, str(tmp_path))


def one_cannot_describe(url: str) -> None:
    good = {"t": torch.ones(3)}
    bad = {"t": torch.ones(3, device="meta" if rank() == 1 else "cpu")}
    with Checkpointer(url, options=SMALL) as ckpt:
        for first, step in ((True, 1), (False, 2)):
            if rank() == 1:
                with pytest.raises(TypeError, match="t: cannot save a tensor on the meta device"):
                    ckpt.save(step, bad).wait()
            else:
                with pytest.raises(RankFailed, match="rank 1 failed: rank 1: TypeError: t: cannot save") as caught:
                    ckpt.save(step, bad).wait()
                assert list(caught.value.failures) == [1]
            if first:
                assert steps(ckpt) == []
            ckpt.save(step, good).wait()
        assert steps(ckpt) == [1, 2]


def test_a_state_that_one_rank_cannot_save_fails_on_all_and_the_next_save_works(tmp_path: Path) -> None:
    ranks.run(3, one_cannot_describe, str(tmp_path))


def one_cannot_write(url: str, operation: str, number: int = 1) -> list[str]:
    writer.PACK_BYTES_MAX = 4096  # every chunk is a pack
    error = OutOfSpace("the disk of rank 1 is full")
    if rank() == 1:
        front.open_store = lambda url: FaultyStore(  # type: ignore[attr-defined]
            open_store(url), fail_at=number, error=error, only=lambda kind, name: kind == operation and "packs/" in name
        )
    with Checkpointer(url, options=SMALL) as ckpt:
        state = {"x": sharded(1)}
        pending = ckpt.save(1, state)
        with pytest.raises(RankFailed, match="rank 1 failed: rank 1: OutOfSpace: the disk of rank 1 is full") as caught:
            pending.wait()
        assert list(caught.value.failures) == [1]
        assert pending.status == "failed"
        assert steps(ckpt) == []
        ckpt.save(1, state).wait()
        assert steps(ckpt) == [1]
        return [snapshot.attempt for snapshot in ckpt.snapshots()]


@pytest.mark.parametrize("operation", ["write", "append", "finish"])
def test_storage_that_fails_one_rank_fails_the_save_on_all(tmp_path: Path, operation: str) -> None:
    ranks.run(3, one_cannot_write, str(tmp_path), operation)


def test_packs_that_a_rank_had_finished_before_it_failed_go_with_the_attempt(tmp_path: Path) -> None:
    attempts = same(ranks.run(3, one_cannot_write, str(tmp_path), "finish", 2))
    assert {pack.parts[-3] for pack in tmp_path.rglob("*.pack")} == set(attempts)


def coordinator_cannot_commit(url: str) -> None:
    if rank() == 0:
        front.open_store = lambda url: FaultyStore(  # type: ignore[attr-defined]
            open_store(url),
            fail_at=1,
            error=OutOfSpace("no room for the index"),
            only=lambda kind, name: kind == "create" and name.endswith("/index"),
        )
    with Checkpointer(url, options=SMALL) as ckpt:
        with pytest.raises(OutOfSpace, match="no room for the index"):
            ckpt.save(1, {"x": sharded(1)}).wait()
        ckpt.save(1, {"x": sharded(1)}).wait()
        assert steps(ckpt) == [1]


def test_a_commit_that_fails_on_the_coordinator_is_raised_on_all(tmp_path: Path) -> None:
    ranks.run(3, coordinator_cannot_commit, str(tmp_path))


def dies(url: str, where: str) -> None:
    with Checkpointer(url, options=IMPATIENT) as ckpt:
        ckpt.save(1, {"x": sharded(1)}).wait()
        if rank() == 1:
            if where == "writing":
                front.Saves.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
                ckpt.save(2, {"x": sharded(1)}).wait()
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(CommitTimeout, match="rank 1") as caught:
            ckpt.save(2, {"x": sharded(1)}).wait()
        assert caught.value.missing_ranks == (1,)
        assert time.monotonic() - start < 20
        assert steps(ckpt) == [1]
    os._exit(0)  # nobody is left to shut the process group down with


@pytest.mark.parametrize("where", ["before", "writing"])
def test_a_rank_that_died_is_named_by_the_others(tmp_path: Path, where: str) -> None:
    assert ranks.outcomes(3, dies, str(tmp_path), where) == [None, None, None]
    assert [snapshot.step for snapshot in fastckpt.open(str(tmp_path)).snapshots()] == [1]


def one_fence_gives_up(url: str) -> None:
    go_on = threading.Event()
    if rank() == 1:
        append = _LocalWriter.append

        def late(*arguments: Any) -> int:
            assert go_on.wait(20)
            return append(*arguments)

        _LocalWriter.append = late  # type: ignore[method-assign]
    options = Options(chunk_bytes=4096, staging_bytes_max=4096, commit_seconds_max=30, fence_seconds_max=0.1)
    with Checkpointer(url, options=options) as ckpt:
        model = DistributedDataParallel(nn.Linear(64, 256))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pending = ckpt.save(1, {"model": model})
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()  # returns on rank 1 too
        go_on.set()
        with pytest.raises(RankFailed, match="rank 1 failed: rank 1: AttemptAborted") as caught:
            pending.wait()
        assert list(caught.value.failures) == [1]
        ckpt.save(1, {"model": model}).wait()
        assert steps(ckpt) == [1]


def test_a_fence_that_is_given_up_on_one_rank_fails_the_save_on_all_and_training_goes_on(tmp_path: Path) -> None:
    ranks.run(2, one_fence_gives_up, str(tmp_path))


class LateNews:
    """From now on rank 1 learns how a save ended only once ``event`` is set; the save itself is not held up."""

    def __init__(self) -> None:
        self.event = threading.Event()
        if rank() == 1:
            commit = front.Saves.commit

            def late(*arguments: Any) -> Any:
                try:
                    return commit(*arguments)
                finally:
                    assert self.event.wait(20)

            front.Saves.commit = late  # type: ignore[method-assign]


def learns_late_of_a_failure(url: str) -> tuple[list[str], list[int]]:
    news = LateNews()
    if rank() == 0:
        front.open_store = lambda url: FaultyStore(  # type: ignore[attr-defined]
            open_store(url), fail_at=1, error=OutOfSpace("full"), only=lambda kind, name: kind == "append"
        )
    raised = []
    with Checkpointer(url, options=IMPATIENT) as ckpt:
        first = ckpt.save(1, {"x": sharded(1)})
        if rank() == 0:
            assert first._finished.wait(20)
        dist.barrier()  # rank 0 knows that step 1 failed, rank 1 does not
        for step in (2, 3, 4):
            try:
                ckpt.save(step, {"x": sharded(1)})
            except FastckptError as error:
                raised.append(type(error).__name__)
            if step == 2:
                news.event.set()
            dist.barrier()
        final = ckpt._pending
        assert final is not None
        final.wait(20)
    return raised, steps(ckpt)


def test_a_failure_that_ranks_learn_of_at_different_moments_costs_no_other_save(tmp_path: Path) -> None:
    results = ranks.run(2, learns_late_of_a_failure, str(tmp_path))
    assert [raised for raised, _ in results] == [["RankFailed"]] * 2, results
    for _, saved in results:
        assert saved in ([3, 4], [2, 3, 4])


def stays_away(url: str) -> None:
    store = dist.distributed_c10d._get_default_store()
    others = ["rank 0 is through", "rank 2 is through"]
    if rank() == 1:  # alive, and busy with something else
        store.wait(others, timedelta(seconds=30))
        return
    try:
        with pytest.raises(CommitTimeout, match="create their Checkpointer") as caught:
            Checkpointer(url, options=IMPATIENT)
        assert caught.value.missing_ranks == (1,)
    finally:
        store.set(f"rank {rank()} is through", "")


def test_a_rank_that_makes_no_checkpointer_is_named_by_the_others(tmp_path: Path) -> None:
    ranks.run(3, stays_away, str(tmp_path))


def damage(snapshot: fastckpt.Snapshot, key: str, element: int) -> tuple[str, int]:
    """Flips a byte in the chunk that holds this element of a float32 tensor; returns its pack and offset."""
    number = snapshot.key_number(key)
    layout, chunks = snapshot.layout, snapshot.chunks
    columns = layout.shapes[number][1]
    for unit in chunks.units():
        for chunk, pieces in enumerate(chunks.pieces(unit), unit.first):
            for piece in pieces:
                box = layout.box(piece.shard)
                first = box.offsets[0] * columns + piece.start
                if layout.shard_key(piece.shard) == number and first <= element < first + piece.stop - piece.start:
                    place = snapshot.place(chunk)
                    with open(f"{snapshot._store.url.removeprefix('file://')}/{place.pack}", "r+b") as file:
                        file.seek(place.offset + 5)
                        byte = file.read(1)[0]
                        file.seek(place.offset + 5)
                        file.write(bytes([byte ^ 16]))
                    return place.pack, place.offset
    raise AssertionError("no such element")


def meets_damage(url: str) -> tuple[str | None, int | None]:
    """Rows 32 to 63 are rank 1's; row 60 is damaged in step 2, and nothing in step 1."""
    first, second = raw(sharded(1).to_local()), raw(sharded(2).to_local())
    with Checkpointer(url, options=SMALL) as ckpt:
        state = {"x": sharded(3), "step": 3}
        with pytest.raises(SnapshotDamaged, match="step 2: x ") as caught:
            ckpt.restore(state)
        error = caught.value
        assert error.key == "x"
        assert error.shard == "[32:64, 0:96]"
        mine, before = state["x"].to_local(), sharded(3).to_local()  # type: ignore[attr-defined]
        if rank() == 1:
            assert "rank 1" not in str(error)
            at = torch.nonzero((mine == before).all(1)).flatten().tolist()
            assert 28 in at, "row 60 must hold its old bytes: not a byte of a damaged chunk may be placed"
            assert raw(mine[28]) == raw(before[28])
        else:
            assert str(error).startswith("rank 1: ")
        for _ in range(2):
            with pytest.raises(SaveError, match="not saving: a restore did not finish"):
                ckpt.save(9, state)
        assert ckpt.restore(state, policy="previous") == 1
        assert raw(state["x"].to_local()) == first != second  # type: ignore[attr-defined]
        assert state["step"] == 1
        ckpt.save(2, state).wait()
        assert ckpt.restore(state) == 2
        return error.object, error.offset


def save_two(url: str) -> None:
    with Checkpointer(url, options=SMALL) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"x": sharded(step), "step": step})


def test_a_damaged_byte_reaches_no_tensor_and_every_rank_says_where_it_is(tmp_path: Path) -> None:
    ranks.run(2, save_two, str(tmp_path))
    snapshot = fastckpt.open(str(tmp_path)).snapshot(2)
    place = damage(snapshot, "x", 60 * 96)
    assert ranks.run(2, meets_damage, str(tmp_path)) == [place, place]


def mismatched(url: str) -> None:
    with Checkpointer(url, options=SMALL) as ckpt:
        model, optimizer = build("fsdp", seed=2)
        before = prints(whole(model))
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if rank() == 1:
            state["local"] = nn.Linear(2, 2)
        with pytest.raises(StateMismatch, match=r"local\.weight: in the state but not in the snapshot") as caught:
            ckpt.restore(state, step=1)
        assert "local.weight: in the state but not in the snapshot (on rank 1)" in str(caught.value)
        assert prints(whole(model)) == before
        state.pop("local", None)
        ckpt.save(2, state).wait()  # nothing was changed, so saving is not refused
        assert ckpt.restore(state, step=1) == 1


def save_model(url: str) -> None:
    model, optimizer = build("fsdp", seed=1)
    train(model, optimizer, range(1))
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {"model": model, "optimizer": optimizer})


def test_what_does_not_fit_on_one_rank_is_raised_on_all_and_changes_nothing(tmp_path: Path) -> None:
    ranks.run(2, save_model, str(tmp_path))
    ranks.run(2, mismatched, str(tmp_path))


def in_time(call: Callable[[], object], seconds: float) -> bool:
    """Whether ``call`` returns or raises within so many seconds."""

    def run() -> None:
        with contextlib.suppress(FastckptError, TimeoutError, RuntimeError):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def key_value_without_server(port: int, server: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    warm = StoreKeyValue(store)
    warm.set("here", b"1")
    assert warm.get("here", 5.0) == b"1"
    assert warm.get("nothing", 0.1) is None
    os.kill(server, signal.SIGKILL)
    assert in_time(lambda: warm.get("here", 1.0), 10), "a client that had called before must give up in time"
    assert in_time(lambda: StoreKeyValue(store).get("here", 1.0), 10), "a new client must give up in time"


def test_a_key_value_store_whose_server_died_keeps_nobody_waiting() -> None:
    with ranks.key_value_server() as (port, process):
        ranks.run(1, key_value_without_server, port, process)


def one_has_another_plan(url: str, nodes: list[str]) -> None:
    job_groups._node = lambda: nodes[rank()]
    saved = {"t": torch.arange(5000.0), "own": sharded(1)}
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, saved).wait()
        agreements = ckpt._saves._agreements
        agree = agreements.agree

        def agree_otherwise(*arguments: Any) -> Any:
            attempt = agree(*arguments)
            return dataclasses.replace(attempt, agreed=dataclasses.replace(attempt.agreed, digest="f" * 64))

        if rank() == 1:
            agreements.agree = agree_otherwise  # type: ignore[method-assign]
        with pytest.raises(SaveError, match="by different layouts"):
            ckpt.save(2, saved).wait()
        agreements.agree = agree  # type: ignore[method-assign]
        if rank() == 1:  # as if it had missed that all planned anew
            assert agreements._agreed is not None
            agreements._agreed = dataclasses.replace(agreements._agreed, digest="f" * 64)
        ckpt.save(3, saved).wait()
        assert agreements._agreed is not None
        assert agreements._agreed.digest != "f" * 64, "it goes by a plan of its own still"
        assert steps(ckpt) == [1, 3]
        ckpt.snapshots()[-1].check()


@pytest.mark.parametrize("nodes", [["a", "a"], ["a", "b"]])
def test_ranks_that_write_by_different_plans_commit_nothing_and_plan_anew(tmp_path: Path, nodes: list[str]) -> None:
    ranks.run(2, one_has_another_plan, str(tmp_path), nodes)
