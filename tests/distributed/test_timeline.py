"""The timelines of a save and of a restore by two ranks: complete, well formed, and side by side."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from jobs import rank

from fastckpt import Checkpointer, Options, trace

pytestmark = pytest.mark.distributed

EVERYWHERE = {"save", "describe", "agree", "stage", "hash", "codec", "write", "sync", "commit", "staged", "committed"}
ON_THE_COORDINATOR = {"plan", "part", "index", "decision"}
OF_A_RESTORE = {"restore", "choose", "plan", "read", "verify", "decode", "place"}


def save_and_restore(url: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, float], dict[str, float]]:
    state: dict[str, Any] = {f"zeros {rank()}": torch.zeros(5000)}
    with Checkpointer(url, options=Options(chunk_bytes=4096, codec="zstd", commit_seconds_max=30)) as ckpt:
        pending = ckpt.save(7, state)
        pending.wait(30)
        assert ckpt.restore(state) == 7
        assert ckpt.restored is not None
        return pending.timeline(), ckpt.restored.timeline(), pending.counters, ckpt.restored.counters


def check_well_formed(timeline: dict[str, Any], pid: int) -> set[str]:
    """The names of what happened. Ends and beginnings lie within each other, as viewers demand of a thread."""
    events = timeline["traceEvents"]
    assert {event["pid"] for event in events} == {pid}
    happened = [event for event in events if event["ph"] != "M"]
    assert {event["ph"] for event in happened} <= {"X", "b", "e"}
    times = [event["ts"] for event in happened]
    assert times == sorted(times)
    assert all(type(time) is int and time > 1_600_000_000_000_000 for time in times), "wall clock, in microseconds"
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    for thread, on_thread in itertools.groupby(
        sorted((event for event in happened if event["ph"] == "X"), key=lambda event: event["tid"]),
        key=lambda event: event["tid"],
    ):
        assert thread in named
        ends: list[int] = []
        for event in on_thread:
            begin, end = event["ts"], event["ts"] + event["dur"]
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or end <= ends[-1], f"{event} ends after what it began in"
            ends.append(end)
    return {event["name"] for event in happened}


def test_two_ranks_show_every_stage_of_a_save_and_a_restore_side_by_side(tmp_path: Path) -> None:
    results = ranks.run(2, save_and_restore, str(tmp_path / "run"))
    table = set(re.findall(r"^    +(\w+)  ", trace.__doc__ or "", re.MULTILINE)) | {"save"}
    both = []
    for number, (saved, restored, counters, restore_counters) in enumerate(results):
        stages = check_well_formed(saved, number)
        assert stages - table == set(), "the table in trace.py names every stage"
        assert stages >= EVERYWHERE
        assert ON_THE_COORDINATOR & stages == (ON_THE_COORDINATOR if number == 0 else set())
        stages = check_well_formed(restored, number)
        assert stages - table == set(), "the table in trace.py names every stage"
        assert stages >= OF_A_RESTORE
        assert counters["stage_bytes"] == counters["hash_bytes"] == counters["codec_bytes"] == 20000
        assert restore_counters["place_bytes"] == restore_counters["decode_bytes"] == 20000
        assert counters["write_bytes"] < 20000, "zeros shrink"
        both += saved["traceEvents"]
    (tmp_path / "both.json").write_text(json.dumps({"traceEvents": both}))
    together = json.loads((tmp_path / "both.json").read_text())["traceEvents"]
    decided = next(event["ts"] for event in together if event["name"] == "decision")
    committed = [event["ts"] for event in together if event["name"] == "committed" and event["ph"] == "e"]
    assert len(committed) == 2
    assert all(decided <= end for end in committed), "clocks of one node agree"
