"""When to save and how to resume, for a training loop: the policy layer that framework callbacks adapt."""

from __future__ import annotations

import logging
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
        busy: Literal["wait", "skip"] = "wait",
        failures_max: int = 3,
        on_committed: Callable[[Snapshot], None] | None = None,
    ) -> None:
        """``busy``: what to do when a save is due and the one before is not committed yet; a skip is logged and
        counted. ``failures_max``: that many failed saves in a row are logged and counted, the next one raises.
        ``on_committed`` is called on the training thread with each snapshot once it is committed."""
        if every_steps <= 0:
            raise ValueError(f"every_steps={every_steps} is not positive")
        if resume not in ("if-any", "must", "never") or busy not in ("wait", "skip"):
            raise ValueError(f"resume={resume!r} or busy={busy!r} is not one of the values it may have")
        if failures_max < 0:
            raise ValueError(f"failures_max={failures_max} is negative")
        self._checkpointer = checkpointer
        self._state = state
        self._every_steps = every_steps
        self._resume = resume
        self._busy = busy
        self._failures_max = failures_max
        self._on_committed = on_committed
        self._pending: Pending | None = None
        self._failures = 0
        self.failed = 0
        """Saves that failed so far."""
        self.skipped = 0
        """Saves that were due but skipped because the one before was not committed."""

    def on_train_begin(self) -> int:
        """Restores; returns the first step to run. ``SnapshotNotFound`` if ``resume="must"`` and there is none."""
        if self._resume == "never":
            return 1
        step = self._checkpointer.restore(self._state)
        if step is None and self._resume == "must":
            raise SnapshotNotFound(f"{self._checkpointer.url}: no snapshot to resume from, and resume='must'")
        return (step or 0) + 1

    def on_step_end(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Saves if ``step`` is due. Returns True when training should stop, which nothing asks for yet."""
        self._look_after(wait=False)
        if step % self._every_steps:
            return False
        if self._pending is not None and not self._pending.done:
            if self._busy == "skip":
                self.skipped += 1
                log.warning("step %d is not saved: step %d is not committed yet", step, self._pending.step)
                return False
            self._look_after(wait=True)
        try:
            self._pending = self._checkpointer.save(step, self._state, metrics=metrics)
        except FastckptError as error:
            self._count(step, error)
        return False

    def on_train_end(self) -> None:
        """Waits for the last save to be committed, and raises if it failed, however many were tolerated before."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.wait()
            self._committed(pending)

    def _look_after(self, wait: bool) -> None:
        pending = self._pending
        if pending is None or not (wait or pending.done):
            return
        self._pending = None
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
