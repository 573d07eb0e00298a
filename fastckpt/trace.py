"""Spans and byte counters: what a save or restore did, stage by stage. Recording only; showing is for others.

A save, from the call on; bytes are given where a stage moves some:

    return     the call of ``save``, on the caller's thread; in timelines and profiles it is called ``save``
    describe     what the state holds; a part of ``return``
    agree      all ranks agree on the attempt; a part of ``return`` where the layout is new
    plan         the coordinator: who writes what, if the layout is new
    stage      tensor to buffer; bytes of the state
    hash       bytes before the codec
    codec      bytes before the codec
    write      buffer to storage; bytes after the codec
    sync       the end of a pack: its footer, and waiting until it is durable
    commit     from the last byte of this rank until the decision is known here
    part         the leader of a node: its part
    index        the coordinator: layout and index
    decision     the coordinator: the COMMIT
    fence      what ``Optimizer.step``, or the next ``save``, waited for staging
    staged     from the call until the last live tensor was read
    committed  from the call until the commit was known here

A restore:

    restore    the call
    choose       which snapshot; the coordinator: reading of its metadata
    plan         what of it goes where; the others: reading of its metadata
    read         storage to buffer; bytes as stored
    verify       bytes as stored, and where there is a codec once more as they were before it
    decode       bytes after decoding
    fetch        a run that a rank of another node has read, into a buffer; bytes of the state
    shared       placing what another rank of the node has read and verified; bytes of the state
    place        buffer to tensor; bytes of the state
"""

from __future__ import annotations

import itertools
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

SPANS_MAX = 131_072
"""Kept of one trace, in 3.75 MiB. Beyond that the shorter half goes, and from then on what is shorter than the rest."""
STREAMS_MAX = 1024
"""Names of threads that are kept for the traces to come."""

_RECORD = struct.Struct("<HIqqq")
_COLUMNS = np.dtype([("name", "<u2"), ("stream", "<u4"), ("start", "<i8"), ("length", "<i8"), ("bytes", "<i8")])
_SINCE_START = 0
"""The stream of spans that belong to no thread: from the start of the trace to some event."""
_TITLES = {"return": "save"}
"""What is shown of a span whose counter is not named for the call that it measures."""

Ranges = Callable[[str], AbstractContextManager[object] | None]
"""Gives a range of this name in someone else's profile, to be entered and left on the calling thread; None if nobody
looks."""


@dataclass(frozen=True)
class Span:
    name: str
    start_seconds: float
    """On the monotonic clock of this process."""
    seconds: float
    bytes: int
    stream: str
    """The name of the thread; "" for a span since the start of the trace."""


class _Streams:
    """Numbers for names of threads: the same in all traces of the process, so that they can be laid side by side. A
    name that came ``STREAMS_MAX`` others ago gets another number when it comes again. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._next = itertools.count(_SINCE_START + 1)

    def number(self, name: str) -> int:
        with self._lock:
            if name not in self._numbers:
                self._numbers[name] = next(self._next)
                if len(self._numbers) > STREAMS_MAX:
                    del self._numbers[next(iter(self._numbers))]
            return self._numbers[name]


_streams = _Streams()


class Trace:
    """The spans of one save or restore, on one rank. Any thread may record.

    Counters are exact, whatever their number is; spans are kept up to ``SPANS_MAX``, the longest ones.
    """

    def __init__(self, rank: int = 0, node: int = 0, ranges: Ranges | None = None) -> None:
        """``ranges``: where spans are shown besides, as they happen."""
        self._rank = rank
        self._node = node
        self._ranges = ranges
        self._start = time.monotonic_ns()
        self._wall = time.time_ns() - self._start
        self._lock = threading.Lock()
        self._names: dict[str, int] = {}
        self._lengths: list[int] = []  # nanoseconds, by number of name
        self._bytes: list[int] = []
        self._streams = {"": _SINCE_START}
        """By the name of a thread its number in the records."""
        self._records = bytearray()
        self._shortest = 0
        self._left_out = 0
        self._notes: dict[str, Any] = {}
        self._ended = False

    def span(self, name: str, bytes: int = 0) -> AbstractContextManager[None]:  # noqa: A002 - the unit is the name
        """Records the time spent inside, and ``bytes`` moved by it, under ``name``; also when it raises."""
        return _Open(self, name, bytes)

    def add_since_start(self, name: str) -> None:
        """Records a span from the making of this trace to now, which belongs to no thread."""
        self._add(name, "", self._start, time.monotonic_ns() - self._start, 0)

    def note(self, name: str, value: object) -> None:
        """Keeps a plain value that the timeline is to show beside the spans."""
        with self._lock:
            self._notes[name] = value

    def end(self) -> None:
        """From now on nothing is recorded any more."""
        self._ended = True

    def _add(self, name: str, thread: str, start: int, length: int, bytes: int) -> None:  # noqa: A002
        with self._lock:
            if self._ended:
                return
            number = self._names.get(name)
            if number is None:
                number = self._names[name] = len(self._names)
                self._lengths.append(0)
                self._bytes.append(0)
            self._lengths[number] += length
            self._bytes[number] += bytes
            if length < self._shortest:
                self._left_out += 1
                return
            stream = self._streams.get(thread)
            if stream is None:
                stream = self._streams[thread] = _streams.number(thread)
            self._records += _RECORD.pack(number, stream, start, length, bytes)
            if len(self._records) > SPANS_MAX * _RECORD.size:
                self._leave_out_shorter_half()

    def _leave_out_shorter_half(self) -> None:
        columns = np.frombuffer(bytes(self._records), _COLUMNS)
        by_length = np.argsort(columns["length"], kind="stable")
        kept = np.sort(by_length[len(columns) // 2 :])
        self._left_out += len(columns) - len(kept)
        self._shortest = int(columns["length"][by_length[len(columns) // 2]])
        self._records = bytearray(columns[kept].tobytes())
        used = {_SINCE_START, *columns["stream"][kept].tolist()}
        self._streams = {thread: stream for thread, stream in self._streams.items() if stream in used}

    def spans(self) -> list[Span]:
        """Those kept so far, in the order in which they ended."""
        with self._lock:
            records, names, streams = bytes(self._records), list(self._names), self._threads()
        return [
            Span(names[name], start / 1e9, length / 1e9, size, streams[stream])
            for name, stream, start, length, size in _RECORD.iter_unpack(records)
        ]

    def counters(self) -> dict[str, float]:
        """``<name>_seconds`` summed over threads and ``<name>_bytes``, for every span name recorded so far."""
        counters: dict[str, float] = {}
        with self._lock:
            for name, number in self._names.items():
                counters[f"{name}_seconds"] = self._lengths[number] / 1e9
                if self._bytes[number]:
                    counters[f"{name}_bytes"] = self._bytes[number]
        return counters

    def timeline(self, step: int) -> dict[str, Any]:
        """The spans kept so far in Chrome's trace event format, as an object for ``json``; times are microseconds.

        A process is a rank, a thread one of its threads. Timestamps are of the wall clock, as it was when the trace was
        made, and go on with the monotonic one: comparable between ranks as far as the clocks of their nodes agree.
        """
        with self._lock:
            records, names, left_out = bytes(self._records), list(self._names), self._left_out
            threads, notes = self._threads(), dict(self._notes)
        common = {"cat": "fastckpt", "pid": self._rank}
        events: list[dict[str, Any]] = []
        used = set()
        # Longer ones first where several start together: the others are inside.
        for name, stream, start, length, size in sorted(_RECORD.iter_unpack(records), key=lambda r: (r[2], -r[3])):
            title = _TITLES.get(names[name], names[name])
            begin, end = (self._wall + start) // 1000, (self._wall + start + length) // 1000
            if stream == _SINCE_START:
                event = {**common, "name": title, "tid": stream, "id2": {"local": hex(step)}}
                events += [{**event, "ph": "b", "ts": begin, "args": {"step": step}}, {**event, "ph": "e", "ts": end}]
                continue
            used.add(stream)
            event = {**common, "name": title, "tid": stream, "ph": "X", "ts": begin, "dur": end - begin}
            events.append({**event, "args": {"bytes": size}} if size else event)
        events.sort(key=lambda event: event["ts"])
        return {
            "traceEvents": [*self._metadata({stream: threads[stream] for stream in sorted(used)}), *events],
            "displayTimeUnit": "ms",
            "otherData": {"step": step, "rank": self._rank, "spans_left_out": left_out, **notes},
        }

    def _threads(self) -> dict[int, str]:
        return {stream: thread for thread, stream in self._streams.items()}

    def _metadata(self, threads: Mapping[int, str]) -> list[dict[str, Any]]:
        """What the viewer calls the rank and its threads, and in which order it shows them."""
        rank: dict[str, Any] = {"ph": "M", "pid": self._rank, "tid": _SINCE_START}
        events = [
            {**rank, "name": "process_name", "args": {"name": f"rank {self._rank} on node {self._node}"}},
            {**rank, "name": "process_sort_index", "args": {"sort_index": self._rank}},
        ]
        for stream, name in threads.items():
            thread = {**rank, "tid": stream}
            events.append({**thread, "name": "thread_name", "args": {"name": name}})
            events.append({**thread, "name": "thread_sort_index", "args": {"sort_index": stream}})
        return events


class _Open:
    """A span under way. No generator: there are several for each chunk."""

    __slots__ = ("_bytes", "_name", "_range", "_start", "_trace")

    def __init__(self, trace: Trace, name: str, bytes: int) -> None:  # noqa: A002
        self._trace = trace
        self._name = name
        self._bytes = bytes

    def __enter__(self) -> None:
        ranges = self._trace._ranges
        self._range = None if ranges is None else ranges(_TITLES.get(self._name, self._name))
        if self._range is not None:
            self._range.__enter__()
        self._start = time.monotonic_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        length = time.monotonic_ns() - self._start
        self._trace._add(self._name, threading.current_thread().name, self._start, length, self._bytes)
        if self._range is not None:
            self._range.__exit__(kind, error, traceback)
