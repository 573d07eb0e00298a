"""The machine runs out of something: every rank is told what and where, nothing is lost, the job and its saves go
on."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastckpt import Checkpointer, FastckptError, Options
from fastckpt.group import SoloGroup
from fastckpt.storage.memory import MemoryStore
from tests.crash.numpy_job import RankSaves, State, tiny_spec
from tests.crash.resources import LEVELS, Filler
from tests.crash.test_power_cut import ALONE, ENVIRONMENT, ROOT, TOOLS, need
from tests.distributed import jobs, ranks

MEBIBYTE = 1 << 20


def short_of(case: str, directory: Path) -> dict[str, Any]:
    """Runs resources.py and returns what it saw."""
    need("mkfs.ext4", "tune2fs", "findmnt", *TOOLS)
    command = [*ALONE, sys.executable, "-m", "tests.crash.resources", case, "--directory", str(directory)]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=250)
    # Also a process that a signal ended, such as SIGBUS or SIGXFSZ, ends here.
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-4000:]}"
    seen: dict[str, Any] = json.loads(result.stdout)
    print(f"{seen['failed']} failed, {seen['fitted']} did not; {seen['objects']}; for example: {seen['example']}")
    assert not seen["violations"], "\n".join(seen["violations"][:20])
    return seen


@pytest.mark.root
@pytest.mark.usefixtures("need_root")
@pytest.mark.parametrize("file_system", ["tmpfs", "ext4"])
def test_a_disk_that_is_full_at_any_level_fails_saves_on_all_ranks_and_loses_nothing(
    file_system: str, tmp_path: Path
) -> None:
    seen = short_of(f"full-{file_system}", tmp_path)
    assert seen["failed"] >= LEVELS
    assert seen["objects"].keys() >= {"packs", "part"}
    assert "No space left on device" in seen["example"]
    assert "bytes were to be written; free space there" in seen["example"]


@pytest.mark.root
@pytest.mark.usefixtures("need_root")
def test_a_disk_that_takes_no_more_files_does_the_same(tmp_path: Path) -> None:
    seen = short_of("no-more-files", tmp_path)
    assert seen["objects"].keys() >= {"packs", "part", "index", "decisions"}
    assert seen["fitted"]


@pytest.mark.root
@pytest.mark.usefixtures("need_root")
def test_a_file_system_that_turns_read_only_at_any_moment_loses_nothing_and_serves_again_once_it_is_mended(
    tmp_path: Path,
) -> None:
    seen = short_of("read-only", tmp_path)
    assert seen["failed"] >= 10
    assert seen["objects"].keys() >= {"packs"}


@pytest.mark.root
@pytest.mark.usefixtures("need_root")
@pytest.mark.parametrize(("limit", "least"), [("file-size", 20), ("open-files", 20), ("memory", 1)])
def test_a_limit_of_the_process_fails_saves_and_neither_ends_nor_harms_it(
    limit: str, least: int, tmp_path: Path
) -> None:
    assert short_of(limit, tmp_path)["failed"] >= least


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={16 * MEBIBYTE}", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def trains_on_a_full_disk(path: str) -> list[str]:
    """Trains beside a job that never saves; returns what its saves failed with."""
    model, optimizer = jobs.build("ddp", seed=1)
    other_model, other_optimizer = jobs.build("ddp", seed=1)
    state = {"model": model, "optimizer": optimizer}
    filler = Filler(Path(path))
    errors = []

    def train(*steps: int) -> dict[str, str]:
        jobs.train(model, optimizer, steps)
        jobs.train(other_model, other_optimizer, steps)
        now = jobs.prints(jobs.whole(model, optimizer))
        assert now == jobs.prints(jobs.whole(other_model, other_optimizer))
        return now

    def on_rank_0(action: Any, *arguments: int) -> None:
        dist.barrier()
        if jobs.rank() == 0:
            action(*arguments)
        dist.barrier()

    with Checkpointer(f"{path}/repository", options=Options(chunk_bytes=4096, commit_seconds_max=30)) as ckpt:
        first = train(1, 2)
        ckpt.save(2, state).wait()
        for step in (3, 4, 5):
            train(step)
            on_rank_0(filler.leave, 4096 * (step - 3))
            pending = ckpt.save(step, state)
            with pytest.raises(FastckptError) as caught:
                pending.wait()
            errors.append(str(caught.value))
            on_rank_0(filler.remove)
        last = train(6)
        ckpt.save(6, state).wait()
        assert [snapshot.step for snapshot in ckpt.snapshots()] == [2, 6]
        for step, saved in ((2, first), (6, last)):
            assert ckpt.restore(state, step=step) == step
            assert jobs.prints(jobs.whole(model, optimizer)) == saved
    return errors


@pytest.mark.root
@pytest.mark.distributed
@pytest.mark.usefixtures("need_root")
def test_training_goes_on_bit_for_bit_while_the_disk_is_full(tmp_path: Path) -> None:
    with small_disk(tmp_path) as path:
        errors = jobs.same(ranks.run(2, trains_on_a_full_disk, str(path)))
        attempts = {found.parent.name for found in path.glob("repository/attempts/*/index")}
        assert {found.name for found in path.glob("repository/packs/*")} == attempts
    for error in errors:
        assert "No space left on device" in error
        assert f"in file://{tmp_path}/repository" in error


class RoomyStore(MemoryStore):
    room: int | None = None

    def free_bytes(self) -> int | None:
        return self.room


def test_a_save_that_leaves_no_room_for_another_like_it_warns_once_until_there_is_room(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = RoomyStore("early-warning")
    saves = RankSaves(store, SoloGroup())
    warned = []

    def save_with(room: int | None) -> str:
        store.room = room
        caplog.clear()
        step = len(warned) + 1
        with caplog.at_level(logging.WARNING, "fastckpt"):
            saves.save(step, State(step, 0, 1, tiny_spec(1)))
        warned.append(bool(caplog.messages))
        return "\n".join(caplog.messages)

    assert save_with(None) == ""
    text = save_with(100)
    assert text.startswith("memory://early-warning: the next save will not fit: there is room for 100 bytes")
    stored = sum(info.size for info in store.list("packs"))
    needed = int(text.partition("the last one stored ")[2].partition(".")[0])
    assert stored // 2 < needed < sum(info.size for info in store.list("")), "packs and metadata of one save"
    for room in (100, 0, 1 << 40, 100, needed + 1000, None, needed // 2):
        save_with(room)
    assert warned == [False, True, False, False, False, True, False, False, True]
    saves.close()
