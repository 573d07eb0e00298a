"""Spans, counters and timelines of saves and restores, and the ranges they leave in the user's own profiles."""

from __future__ import annotations

import functools
import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastckpt
from fastckpt import Checkpointer, Options
from fastckpt.job.profile import profile_range
from fastckpt.testing import ThreadGroup
from fastckpt.trace import Trace, _Streams

SECONDS = 20.0
"""Longest wait for something that is going to happen."""


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nanoseconds = 5_000_000_000
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.nanoseconds)
        monkeypatch.setattr(time, "time_ns", lambda: self.nanoseconds + 1_700_000_000_000_000_000)

    def spend(self, trace: Trace, name: str, nanoseconds: int, size: int = 0) -> None:
        with trace.span(name, size):
            self.nanoseconds += nanoseconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_counters_sum_seconds_and_bytes_by_name(clock: Clock) -> None:
    trace = Trace()
    clock.spend(trace, "write", 500_000_000, 100)
    clock.spend(trace, "write", 250_000_000, 20)
    clock.spend(trace, "sync", 2_000_000_000)
    trace.add_since_start("committed")
    assert trace.counters() == {
        "write_seconds": 0.75,
        "write_bytes": 120,
        "sync_seconds": 2.0,
        "committed_seconds": 2.75,
    }


def test_a_trace_of_nothing_counts_nothing() -> None:
    assert Trace().counters() == {}
    assert Trace().spans() == []
    assert [event for event in Trace().timeline(1)["traceEvents"] if event["ph"] != "M"] == []


def test_a_span_records_what_it_was_told_and_where_it_ran(clock: Clock) -> None:
    trace = Trace()
    clock.nanoseconds += 1_000_000_000
    with trace.span("hash", 10):
        assert trace.spans() == [], "recorded when it ends"
        clock.nanoseconds += 3
    (span,) = trace.spans()
    assert (span.name, span.bytes, span.stream) == ("hash", 10, threading.current_thread().name)
    assert (span.start_seconds, span.seconds) == (6.0, 3e-9)


def test_a_span_that_raises_is_recorded_and_raises() -> None:
    trace = Trace()
    with pytest.raises(ValueError, match="full"), trace.span("write", 3):
        raise ValueError("full")
    assert trace.counters()["write_bytes"] == 3


def test_spans_of_all_threads_are_kept_and_the_list_is_the_callers() -> None:
    trace = Trace()

    def work(group: object) -> None:
        for _ in range(100):
            with trace.span("hash", 1):
                pass

    ThreadGroup(4).run(work)
    assert trace.counters()["hash_bytes"] == 400
    trace.spans().clear()
    assert len(trace.spans()) == 400


def test_of_too_many_spans_the_longest_are_kept_and_all_are_counted(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastckpt.trace.SPANS_MAX", 100)
    trace = Trace()
    for number in range(977):
        clock.spend(trace, "write", 1 + number * 617 % 977, 1)
    clock.spend(trace, "sync", 5000)
    kept = [round(span.seconds * 1e9) for span in trace.spans()]
    assert 50 <= len(kept) <= 100
    assert sorted(kept) == [*range(978 - len(kept) + 1, 978), 5000], "the longest of them"
    assert [span.start_seconds for span in trace.spans()] == sorted(span.start_seconds for span in trace.spans())
    assert trace.counters()["write_bytes"] == 977
    assert trace.counters()["write_seconds"] == sum(range(1, 978)) / 1e9
    assert trace.timeline(1)["otherData"]["spans_left_out"] == 978 - len(kept)


def test_spans_of_one_length_are_bounded_too(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastckpt.trace.SPANS_MAX", 100)
    trace = Trace()
    for _ in range(1000):
        clock.spend(trace, "write", 7)
    assert 50 <= len(trace.spans()) <= 100


def in_thread(name: str, work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join()


def numbers(trace: Trace) -> dict[str, int]:
    """By the name of a thread its number in the timeline."""
    events = trace.timeline(1)["traceEvents"]
    return {event["args"]["name"]: event["tid"] for event in events if event["name"] == "thread_name"}


def test_threads_have_one_number_in_all_traces_and_names_that_do_not_come_again_are_forgotten(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastckpt.trace._streams", _Streams())
    monkeypatch.setattr("fastckpt.trace.STREAMS_MAX", 3)
    monkeypatch.setattr("fastckpt.trace.SPANS_MAX", 100)

    def traced(*threads: str) -> Trace:
        trace = Trace()
        for length, thread in enumerate(threads, 1):
            in_thread(thread, functools.partial(clock.spend, trace, "read", length))
        return trace

    first = traced("one", "two", "three")
    assert numbers(traced("three", "one")).items() <= numbers(first).items()
    many = traced(*(f"other {number}" for number in range(300)))
    assert numbers(first).keys() == {"one", "two", "three"}, "a trace keeps the names of its own"
    assert numbers(many).keys() == {span.stream for span in many.spans()} == many._streams.keys() - {""}
    assert numbers(traced("one"))["one"] > max(numbers(many).values()), "forgotten"


def test_a_timeline_is_what_viewers_read(clock: Clock) -> None:
    trace = Trace(rank=3, node=1)
    with trace.span("return"):
        clock.nanoseconds += 1_500
        clock.spend(trace, "agree", 2_999)
    thread = threading.Thread(target=lambda: clock.spend(trace, "write", 4_000_000, 10), name="fastckpt-write-0")
    thread.start()
    thread.join()
    trace.add_since_start("committed")
    timeline = trace.timeline(500)
    metadata, events = timeline["traceEvents"][:-5], timeline["traceEvents"][-5:]
    begin, save, agree, write, end = events
    start = 1_700_000_005_000_000  # the wall clock when the trace was made, in microseconds
    here, there = save["tid"], write["tid"]
    assert save == {**save, "name": "save", "ph": "X", "pid": 3, "ts": start, "dur": 4}
    assert agree == {**agree, "name": "agree", "ph": "X", "pid": 3, "tid": here, "ts": start + 1, "dur": 3}
    assert write == {**write, "name": "write", "pid": 3, "ts": start + 4, "dur": 4000, "args": {"bytes": 10}}
    for event, phase, when in ((begin, "b", start), (end, "e", start + 4004)):
        assert event == {**event, "name": "committed", "ph": phase, "pid": 3, "ts": when, "id2": {"local": "0x1f4"}}
    named = {(event["name"], event["tid"]): event["args"] for event in metadata}
    assert {event["ph"] for event in metadata} == {"M"}
    assert named["process_name", 0] == {"name": "rank 3 on node 1"}
    assert named["thread_name", here] == {"name": threading.current_thread().name}
    assert named["thread_name", there] == {"name": "fastckpt-write-0"}
    assert timeline["otherData"] == {"step": 500, "rank": 3, "spans_left_out": 0}
    assert json.loads(json.dumps(timeline)) == timeline


def test_a_range_is_entered_and_left_on_the_thread_of_the_span_also_when_it_raises() -> None:
    seen: list[tuple[str, str, str]] = []

    class Range(AbstractContextManager[None]):
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            seen.append(("enter", self.name, threading.current_thread().name))

        def __exit__(self, *_: object) -> None:
            seen.append(("exit", self.name, threading.current_thread().name))

    trace = Trace(ranges=lambda name: None if name == "hash" else Range(name))
    with pytest.raises(ValueError, match="full"), trace.span("return"), trace.span("hash"):
        raise ValueError("full")
    here = threading.current_thread().name
    assert seen == [("enter", "save", here), ("exit", "save", here)]


# --- through the front door ----------------------------------------------------------------------------------------


class Job:
    """A model of several chunks, and room to stage two: what is staged waits until the fence has been reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reached = threading.Event()

        def ranges(name: str) -> AbstractContextManager[object] | None:
            if name == "fence":
                reached.set()
            if name == "write":
                assert reached.wait(SECONDS)
            return profile_range(name)

        monkeypatch.setattr("fastckpt.checkpointer.profile_range", ranges)
        self.options = Options(chunk_bytes=4096, staging_bytes_max=8192)
        self.url = f"memory://{secrets.token_hex(8)}"
        self.model = torch.nn.Linear(64, 128)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}

    def save_and_restore(self, ckpt: Checkpointer) -> None:
        pending = ckpt.save(1, self.state)
        self.optimizer.step()
        pending.wait(SECONDS)
        ckpt.restore(self.state)


def ranges_in(profiled: profile, path: Path) -> set[str]:
    """The names that the profile shows, and those in the file made of it."""
    profiled.export_chrome_trace(str(path))
    exported = {event["name"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"}
    shown = {event.name for event in profiled.events() or ()}
    assert {name for name in shown if name.startswith("fastckpt")} <= exported
    return {name.removeprefix("fastckpt::") for name in shown if name.startswith("fastckpt::")}


def test_a_profile_of_the_training_shows_what_saves_and_restores_do_on_its_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job(monkeypatch)
    with Checkpointer(job.url, options=job.options) as ckpt:
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            job.save_and_restore(ckpt)
        assert {"save", "fence", "restore", "choose"} <= ranges_in(profiled, tmp_path / "profile.json")


def test_a_profile_of_all_threads_shows_the_stages_behind_the_training_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = Job(monkeypatch)
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with Checkpointer(job.url, options=job.options) as ckpt:
        with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as profiled:
            job.save_and_restore(ckpt)
        names = ranges_in(profiled, tmp_path / "profile.json")
        assert {"save", "fence", "restore", "stage", "hash", "write", "sync", "commit", "read", "place"} <= names


def test_without_a_profiler_there_are_no_ranges() -> None:
    assert profile_range("stage") is None


def test_the_checkpointer_tells_of_its_last_restore_and_a_snapshot_of_what_was_read_of_it() -> None:
    url = f"memory://{secrets.token_hex(8)}"
    state: dict[str, Any] = {"weight": torch.arange(3000.0)}
    with Checkpointer(url, options=Options(chunk_bytes=4096)) as ckpt:
        assert ckpt.restore(state) is None
        assert ckpt.restored is None
        saved = ckpt.save(1, state)
        saved.wait(SECONDS)
        assert saved.counters["stage_bytes"] == saved.counters["hash_bytes"] == 12000
        assert ckpt.restore(state) == 1
        assert ckpt.restored is not None
        assert ckpt.restored.step == 1
        counters = ckpt.restored.counters
        assert counters["place_bytes"] == counters["verify_bytes"] == 12000
        ckpt.restored.read("weight")
        assert ckpt.restored.counters == counters, "they are the restore's"
        with pytest.raises(fastckpt.StateMismatch):
            ckpt.restore({"bias": torch.zeros(2)})
        assert ckpt.restored is None, "it failed"
    snapshot = fastckpt.open(url).snapshot(1)
    assert snapshot.counters == {}
    snapshot.read("weight", slice(0, 10))
    assert snapshot.counters["place_bytes"] == 4096, "whole chunks are read and verified"
    assert {event["name"] for event in snapshot.timeline()["traceEvents"]} >= {"read", "verify", "place"}
