"""A repository that is deleted or replaced under a running job: nothing that is gone is reported as committed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import fastckpt
from fastckpt import AnotherWriter, Checkpointer, Options

OPTIONS = Options(chunk_bytes=4096)


def state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((5000,), float(step))}


def test_a_job_whose_repository_was_deleted_is_told_so_and_nothing_counts_as_committed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ckpt = Checkpointer(str(folder), options=OPTIONS)
    ckpt.save(1, state(1)).wait()
    shutil.rmtree(folder)
    for step in (2, 3):
        with pytest.raises(AnotherWriter):
            ckpt.save(step, state(step)).wait()
        assert ckpt.pending is not None
        assert ckpt.pending.status == "failed"
    ckpt.close()
    assert not folder.exists() or not any(folder.rglob("*.pack"))


def test_a_job_whose_repository_another_has_replaced_is_told_so_and_the_other_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    old = Checkpointer(str(folder), options=OPTIONS)
    old.save(1, state(1)).wait()
    shutil.rmtree(folder)
    with Checkpointer(str(folder), options=OPTIONS) as new:
        new.save(1, state(10)).wait()
        for step in (2, 3):
            with pytest.raises(AnotherWriter):
                old.save(step, state(step)).wait()
            new.save(step, state(10 * step)).wait()
        old.close()
        new.save(4, state(40)).wait()
        restored = state(0)
        assert new.restore(restored) == 4
        assert restored["w"].unique().tolist() == [40.0]
    snapshots = fastckpt.open(str(folder)).snapshots()
    assert [snapshot.step for snapshot in snapshots] == [1, 2, 3, 4]
    assert [float(snapshot.read("w")[0]) for snapshot in snapshots] == [10.0, 20.0, 30.0, 40.0]
