"""When to save and how to resume, for a training loop: the policy layer that framework callbacks adapt."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from fastckpt.checkpointer import Checkpointer, Pending
from fastckpt.errors import FastckptError, SnapshotNotFound
from fastckpt.repository.reader import Snapshot

log = logging.getLogger("fastckpt")


class Callback:
    """Saves every N steps and resumes from the newest snapshot.

    callback = fastckpt.Callback(ckpt, state, every_steps=500)
    for step in range(callback.on_train_begin(), steps + 1):
        ...
        callback.on_step_end(step, {"loss": loss})
    callback.on_train_end()
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        state: dict[str, Any],
        *,
        every_steps: int,
        resume: Literal["if-any", "must", "never"] = "if-any",
        failures_max: int = 3,
        on_committed: Callable[[Snapshot], None] | None = None,
    ) -> None:
        """``failures_max``: that many failed saves in a row are logged and counted, the next one raises.
        ``on_committed`` is called on the training thread with each snapshot once it is committed."""
        if every_steps <= 0:
            raise ValueError(f"every_steps={every_steps} is not positive")
        if resume not in ("if-any", "must", "never"):
            raise ValueError(f"resume={resume!r} is not 'if-any', 'must' or 'never'")
        if failures_max < 0:
            raise ValueError(f"failures_max={failures_max} is negative")
        self._checkpointer = checkpointer
        self._state = state
        self._every_steps = every_steps
        self._resume = resume
        self._failures_max = failures_max
        self._on_committed = on_committed
        self._pending: list[Pending] = []
        self._failures = 0
        self.failed = 0
        """Saves that failed so far."""

    def on_train_begin(self) -> int:
        """Restores; returns the first step to run. ``SnapshotNotFound`` if ``resume="must"`` and there is none."""
        if self._resume == "never":
            return 1
        step = self._checkpointer.restore(self._state)
        if step is None and self._resume == "must":
            raise SnapshotNotFound(
                f"{self._checkpointer.url}: no snapshot to resume from, and resume='must'; check the URL, or start "
                "from the beginning with resume='if-any'"
            )
        return (step or 0) + 1

    def on_step_end(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Saves if ``step`` is due. Returns True when training should stop, which nothing asks for yet."""
        self._look_after()
        if step % self._every_steps:
            return False
        try:
            finite = {name: number for name, number in (metrics or {}).items() if math.isfinite(number)}
            pending = self._checkpointer.save(step, self._state, metrics=finite)
        except FastckptError as error:
            started = self._checkpointer.pending
            if started is None or started.step != step:
                self._count(step, error)
                return False
            pending = started  # the error is an earlier save's, which is looked after as its turn comes
        self._pending.append(pending)
        return False

    def on_train_end(self) -> None:
        """Waits for every save to be committed, and raises if the last one failed, however many were tolerated."""
        while len(self._pending) > 1:
            self._finish(self._pending.pop(0))
        if self._pending:
            last = self._pending.pop()
            last.wait()
            self._committed(last)

    def _look_after(self) -> None:
        while self._pending and self._pending[0].done:
            self._finish(self._pending.pop(0))

    def _finish(self, pending: Pending) -> None:
        try:
            pending.wait()
        except FastckptError as error:
            self._count(pending.step, error)
        else:
            self._failures = 0
            self._committed(pending)

    def _count(self, step: int, error: FastckptError) -> None:
        self.failed += 1
        self._failures += 1
        if self._failures > self._failures_max:
            raise error
        log.error("saving step %d failed (%d in a row): %s", step, self._failures, error)

    def _committed(self, pending: Pending) -> None:
        if self._on_committed is not None:
            self._on_committed(pending.snapshot)
