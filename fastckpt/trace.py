"""Spans and byte counters: what a save or restore did, stage by stage. Recording only; showing is for others."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    name: str
    start_seconds: float
    """On the monotonic clock of this process."""
    seconds: float
    bytes: int
    thread: int


class Trace:
    """The spans of one save or restore. Any thread may record."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []

    @contextlib.contextmanager
    def span(self, name: str, bytes: int = 0) -> Iterator[None]:  # noqa: A002 - the unit is the name
        """Records the time spent inside, and ``bytes`` moved by it, under ``name``; also when it raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(Span(name, start, time.monotonic() - start, bytes, threading.get_ident()))

    def add_since(self, name: str, start_seconds: float) -> None:
        """Records a span from ``start_seconds`` (``time.monotonic()``) to now."""
        self.add(Span(name, start_seconds, time.monotonic() - start_seconds, 0, threading.get_ident()))

    def add(self, span: Span) -> None:
        with self._lock:
            self._spans.append(span)

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def counters(self) -> dict[str, float]:
        """``<name>_seconds`` summed over threads and ``<name>_bytes``, for every span name recorded so far."""
        counters: dict[str, float] = {}
        for span in self.spans():
            counters[f"{span.name}_seconds"] = counters.get(f"{span.name}_seconds", 0.0) + span.seconds
            if span.bytes:
                counters[f"{span.name}_bytes"] = counters.get(f"{span.name}_bytes", 0) + span.bytes
        return counters
