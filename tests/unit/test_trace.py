"""Spans and counters."""

from __future__ import annotations

import threading

import pytest

from fastckpt.testing import ThreadGroup
from fastckpt.trace import Span, Trace


def test_counters_sum_seconds_and_bytes_by_name() -> None:
    trace = Trace()
    trace.add(Span("write", 1.0, 0.5, 100, 1))
    trace.add(Span("write", 1.2, 0.25, 20, 2))
    trace.add(Span("sync", 2.0, 2.0, 0, 1))
    assert trace.counters() == {"write_seconds": 0.75, "write_bytes": 120, "sync_seconds": 2.0}


def test_a_trace_of_nothing_counts_nothing() -> None:
    assert Trace().counters() == {}
    assert Trace().spans() == []


def test_a_span_records_what_it_was_told_and_where_it_ran() -> None:
    trace = Trace()
    with trace.span("hash", 10):
        assert trace.spans() == [], "recorded when it ends"
    (span,) = trace.spans()
    assert (span.name, span.bytes, span.thread) == ("hash", 10, threading.get_ident())
    assert span.seconds >= 0
    assert span.start_seconds > 0


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
