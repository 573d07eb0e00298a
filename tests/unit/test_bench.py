"""The benchmarks measure what they say: at a tiny size, in this process, without the libraries that only they need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bench.compare import device, report, restore, save
from bench.compare.harness import Runs, Spread
from bench.compare.state import random_state
from bench.compare.ways import Fastckpt, TorchSave

SIZE = 1 << 20


@pytest.fixture(autouse=True)
def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(restore, "drop_page_cache", lambda directory: "not at all")
    for question in (save, restore):
        monkeypatch.setattr(question, "PARAMETERS", 20)


def run(case: str, number: int, seconds: float, *, backed: bool = True) -> dict[str, Any]:
    rate = 2.0 if backed else 0.3
    return {
        "case": case,
        "round": number,
        "backed": backed,
        "touch_gb_per_second": rate,
        "measures": {"seconds": seconds},
    }


def test_saves_and_restores_are_measured_and_reported_beside_the_raw_device(tmp_path: Path) -> None:
    ways = (Fastckpt, TorchSave)
    about = {"machine": MACHINE, "versions": {"torch": "2"}, "command": "it", "commit": "c" * 40, "changed_files": 0}
    saved = save.measure(ways, SIZE, 1, tmp_path / "save")
    restored = restore.measure(ways, SIZE, 1, tmp_path / "restore")
    for record, peer, measure in (
        (saved, TorchSave.name, "committed_seconds"),
        (restored, TorchSave.load_name, "seconds"),
    ):
        runs = Runs(record["runs"])
        raw = [case for case in runs.cases() if case.startswith("raw")]
        assert set(runs.cases()) == {Fastckpt.name, peer, *raw}
        assert len(raw) >= 2
        assert len(runs.all) == len(runs.cases()), "the round that warms up is not counted"
        assert all({measure, "cpu_seconds"} <= done.measures.keys() for done in runs.all)
        assert all(done.measures[measure] > 0 and done.touch_gb_per_second > 0 for done in runs.all)
    text = report.markdown({"save": saved | about, "restore": restored | about}, (Fastckpt, TorchSave))
    for row in ("P-dense, 1 rank(s)", "P-peers, 1 rank(s)", "P-restore, 1 rank(s)", "P-return"):
        assert f"| {row}" in text
    assert f"| {TorchSave.name}" in text


def test_a_load_that_brings_back_other_bytes_is_not_measured(tmp_path: Path) -> None:
    class Forgets(TorchSave):
        load_name = "forgets"

        def load(self, step: int) -> None:
            super().load(step)
            self.state.tensors()["model.weight_0"][0, 0] += 1

    with pytest.raises(RuntimeError, match="forgets: what was loaded is not what was saved"):
        restore.measure((Forgets,), SIZE, 1, tmp_path)


def test_the_raw_device_is_not_charged_for_making_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit would be lower than it is, and all ratios to it better."""
    done: list[str] = []
    block = device.block
    monkeypatch.setattr(device, "block", lambda: done.append("made") or block())
    save.raw(tmp_path / "raw", SIZE, 2, False, lambda: done.append("clock"))
    restore.raw(tmp_path / "raw", 2, lambda: done.append("clock"))
    assert done == ["made", "clock", "made", "made", "clock"]


def test_the_state_is_never_round() -> None:
    state = random_state(SIZE, 20)
    tensors = state.tensors().values()
    assert 0.8 * SIZE < state.bytes() - NOT_SIZED_BYTES < 1.2 * SIZE
    assert {"torch.float32", "torch.bfloat16", "torch.int64", "torch.bool"} <= {str(each.dtype) for each in tensors}
    assert any(each.numel() == 0 for each in tensors)
    assert any(each.dim() == 0 for each in tensors)
    assert random_state(SIZE, 20).digest() == state.digest(), "every process makes the same"


def test_a_ratio_compares_runs_of_the_same_round() -> None:
    runs = Runs([run("a", 1, 2.0), run("b", 1, 1.0), run("b", 2, 4.0), run("a", 2, 4.0), run("a", 3, 9.0)])
    assert runs.ratio("a", "b", "seconds") == Spread(1.5, 1.0, 2.0)


def test_runs_on_unbacked_memory_count_only_where_there_are_no_others() -> None:
    runs = Runs([run("a", 1, 2.0), run("a", 2, 90.0, backed=False), run("b", 1, 80.0, backed=False)])
    assert runs.spread("a", "seconds") == Spread(2.0, 2.0, 2.0)
    assert runs.spread("b", "seconds") == Spread(80.0, 80.0, 80.0)
    labels = [label for _, _, label in report._labelled(runs)]
    assert labels == ["a", "a (unbacked memory)", "b (unbacked memory)"]


MACHINE = {"cpus": 2, "cpu": "a", "memory_gib": 1.0, "file_system": "b", "device": "c", "kernel": "d"}
NOT_SIZED_BYTES = 100_003 * 9 + 40_009 * 8
"""Buffers and the loader's order, which come on top of what was asked for."""
