"""What goes on behind the training loop: the Pending of a save, and the work that brings it to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal

from fastckpt.errors import SaveError
from fastckpt.repository.reader import Snapshot
from fastckpt.trace import Trace


class Pending:
    """One save on its way: staged, then written, then committed; or failed. Any thread may ask and wait."""

    def __init__(self, step: int, trace: Trace) -> None:
        self.step = step
        self._trace = trace
        self._staged = threading.Event()
        self._finished = threading.Event()
        self._status: Literal["staging", "staged", "written", "committed", "failed"] = "staging"
        self._error: BaseException | None = None
        self._raised = False
        self._snapshot: Snapshot | None = None

    def __repr__(self) -> str:
        return f"Pending(step={self.step}, status={self.status!r})"

    @property
    def status(self) -> str:
        """ "staging", "staged", "written", "committed" or "failed"."""
        return self._status

    @property
    def done(self) -> bool:
        """Whether it is committed or failed."""
        return self._finished.is_set()

    @property
    def snapshot(self) -> Snapshot:
        """What was committed. ``SaveError`` before it is."""
        if self._snapshot is None:
            raise SaveError(f"step {self.step} is not committed; it is {self.status}: call wait() first")
        return self._snapshot

    @property
    def error(self) -> BaseException | None:
        """Why it failed, if it did."""
        return self._error

    @property
    def counters(self) -> dict[str, float]:
        """Seconds and bytes by stage, so far, on this rank: ``return_seconds`` (what ``save`` took), ``fence_seconds``
        (what the optimizer waited), ``stage_bytes``, ``write_seconds`` (of all threads together),
        ``committed_seconds`` (from the call) and so on; ``fastckpt/trace.py`` has the table."""
        return self._trace.counters()

    def timeline(self) -> dict[str, Any]:
        """The stages so far, on this rank, by thread, in Chrome's trace event format: written with ``json.dump``, it is
        a file for ui.perfetto.dev or chrome://tracing. Of more than 131,072 the longest; ``otherData`` has how many
        were left out. Any thread.

        Timestamps are wall clock, so files of several ranks can be shown as one: put together what their
        ``traceEvents`` list. Between nodes they are as far apart as the clocks are.
        """
        return self._trace.timeline(self.step)

    def wait_staged(self, timeout: float | None = None) -> None:
        """Waits until the last live tensor has been read; from then on anything may change. ``TimeoutError`` after
        ``timeout`` seconds. A failure is not raised here: a save that failed reads nothing any more."""
        if not self._staged.wait(timeout):
            raise TimeoutError(
                f"step {self.step} was not staged within {timeout} s; it goes on, and can be waited for again"
            )

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the snapshot is committed; raises what went wrong, naming ranks. ``TimeoutError`` after
        ``timeout`` seconds."""
        if not self._finished.wait(timeout):
            raise TimeoutError(
                f"step {self.step} was not committed within {timeout} s; it is {self.status}, goes on, and can be "
                "waited for again"
            )
        if self._error is not None:
            self._raised = True
            raise self._error

    def _mark(self, status: Literal["staged", "written"]) -> None:
        self._status = status
        if status == "staged":
            self._trace.add_since_start("staged")
            self._staged.set()

    def _finish(self, error: BaseException | None) -> None:
        self._error = error
        self._status = "committed" if error is None else "failed"
        self._staged.set()
        self._finished.set()


class Work:
    """Something to be done once, behind the training loop."""

    def __init__(self, name: str, do: Callable[[], None]) -> None:
        """``name``: of the thread that does it."""
        self._name = name
        self._do = do
        self._claim = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        """Has a thread do it; the caller's, before this returns, if the system gives no other. May be called again."""
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except (RuntimeError, MemoryError):
            self._run()

    def join(self) -> None:
        """Waits until it is done."""
        self._over.wait()

    def _run(self) -> None:
        if self._claim.acquire(blocking=False):
            try:
                self._do()
            finally:
                del self._do  # and with it what it holds
                self._over.set()
