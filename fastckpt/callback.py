"""When to save and how to resume, for a training loop: the policy layer that framework callbacks adapt."""

from __future__ import annotations

import logging
import math
import signal
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from fastckpt import signals as process_signals
from fastckpt.checkpointer import Checkpointer
from fastckpt.errors import FastckptError, SaveError, SnapshotNotFound
from fastckpt.group import Assembly
from fastckpt.interval import FAILURE_SECONDS, FIRST_SECONDS, interval_seconds, observed_failure_seconds
from fastckpt.job.steps import (
    OptimizerSteps,
    SchedulersBehind,
    after_each_step,
    check_stepper,
    holds_optimizer_of,
)
from fastckpt.pending import Pending
from fastckpt.repository.reader import Snapshot
from fastckpt.storage.deadline import DeadlineStore
from fastckpt.storage.open import open_store
from fastckpt.watcher import Asked, Watcher

log = logging.getLogger("fastckpt")

_attached: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Callback]] = weakref.WeakKeyDictionary()
"""By optimizer or scheduler. In a notebook the callback of an earlier run of a cell is still there."""

_HISTORY_SECONDS_MAX = 30.0
"""For reading how long earlier jobs lasted: training is not kept waiting for that."""


class Callback:
    """Saves every so many steps or seconds, or when a signal asks for it, and resumes from the newest snapshot.

    callback = fastckpt.Callback(ckpt, state, every_steps=500)
    for step in range(callback.on_train_begin(), steps + 1):
        ...
        if callback.on_step_end(step, {"loss": loss}):
            break
    callback.on_train_end()

    Every rank makes one, in the same order and with the same arguments, and calls it alike, on the training thread; any
    thread may ask for ``stopping``, ``failed`` and ``skipped``, and may ``close``.

    *Signals and time.* Ranks end a step at different moments. A save that one rank is asked for by a signal, or that is
    due by the coordinator's clock, is therefore agreed on: every rank waits at the end of the step it is in until all
    have said which step that is, and all save at the end of the largest. A rank that does not say so within
    ``agree_seconds`` is named in a warning, the request is given up, and training goes on.

    SIGUSR1 and SIGUSR2 ask for a save; handlers that Python code has set for them before are called too. SIGTERM and
    SIGINT, which ``signals`` has to name, ask for a save and the end of training: ``on_step_end`` returns True on all
    ranks at the end of the agreed step, and ``on_train_end`` waits for the commit. If a rank that got such a signal
    does not reach that end within ``agree_seconds``, because a rank is dead or its main thread stuck in a collective,
    the signal falls to its previous disposition, which for SIGTERM usually is the end of the process; so
    ``agree_seconds`` must be longer than the longest step. One that comes later, while the last save is on its way,
    falls to it in ``agree_seconds`` as well. A callback made on another thread than the main one hears no signals, and
    says so.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        state: dict[str, Any],
        *,
        every_steps: int | None = None,
        every_seconds: float | Literal["auto"] | None = None,
        resume: Literal["if-any", "must", "never"] = "if-any",
        failures_max: int = 3,
        busy: Literal["wait", "skip"] = "wait",
        on_committed: Callable[[Snapshot], None] | None = None,
        signals: Sequence[signal.Signals] = (signal.SIGUSR1,),
        agree_seconds: float = 10.0,
        failures_per_day: float | None = None,
    ) -> None:
        """``every_steps`` and ``every_seconds`` may be given both: any save starts the seconds anew. Neither: only
        signals ask for saves.

        ``every_seconds="auto"`` takes the interval of Young (1974) and Daly (2006), sqrt(2 C M): C is what the last
        save cost training on the coordinator, ``return_seconds`` and ``fence_seconds`` of its counters, and M the mean
        time between failures: 86400 / ``failures_per_day``, or else how long the last jobs that wrote to the repository
        lasted, or else a day. The first save is due after 60 s; and no save is due sooner than twice the time that one
        takes to be committed.

        ``failures_max``: that many failed saves in a row are logged and counted, the next one raises.
        ``busy="skip"`` leaves out a save that is due while the one before is not committed on the coordinator, and logs
        and counts it; "wait" starts it all the same. What a signal asked for is never left out.
        ``on_committed`` is called on the training thread with each snapshot once it is committed.
        ``ValueError`` for arguments that cannot be."""
        _check(every_steps, every_seconds, resume, failures_max, busy, agree_seconds, failures_per_day)
        numbers = _checked_signals(signals)
        self._checkpointer = checkpointer
        self._state = state
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._resume = resume
        self._failures_max = failures_max
        self._busy = busy
        self._on_committed = on_committed
        self._agree_seconds = agree_seconds
        self._failure_seconds = 86_400.0 / failures_per_day if failures_per_day is not None else None
        self._pending: list[Pending] = []
        self._failures = 0
        self._first: int | None = None
        self._closed = False
        self._saved_at: float | None = None
        """When the last save was started, or training before there was one, on ``time.monotonic()``."""
        self._interval = FIRST_SECONDS if every_seconds == "auto" else every_seconds
        self._busy_questions = 0
        self._accumulation_warned = False
        self._detach: Callable[[], None] | None = None
        self._attached_step = 0
        self.failed = 0
        """Saves that failed so far."""
        self.skipped = 0
        """Saves left out so far because the one before was not committed."""
        self.stopping = False
        """Whether a signal has asked for the end of training, and the agreed step has ended."""
        self._steps = OptimizerSteps(state)
        self._watcher: Watcher | None = None
        self._listening: process_signals.Listening | None = None
        self._name = f"callback-{checkpointer.add_callback(self)}"
        if numbers or every_seconds is not None:
            self._watch(numbers)
        # Neither may hold this object, nor anything that does, such as an optimizer it is attached to.
        self._finalizer = weakref.finalize(self, _end, self._watcher, self._listening)

    def _watch(self, numbers: Sequence[signal.Signals]) -> None:
        try:
            watcher = Watcher(self._checkpointer.group, self._name, self._agree_seconds)
        except RuntimeError as error:
            log.warning("no saves by time or signal, and other ranks' are given up: %s", error)
            return
        self._watcher = watcher
        if not numbers:
            return

        def heard(number: signal.Signals) -> None:
            watcher.request(number.name, stop=number in process_signals.ENDING)

        try:
            self._listening = process_signals.listen(numbers, heard, hold_seconds=self._agree_seconds)
        except (RuntimeError, OSError) as error:
            log.warning("no saves by signals that this process gets: %s", error)

    def on_train_begin(self) -> int:
        """Restores; returns the first step to run. ``SnapshotNotFound`` if ``resume="must"`` and there is none."""
        first = 1
        if self._resume != "never":
            step = self._checkpointer.restore(self._state)
            if step is None and self._resume == "must":
                raise SnapshotNotFound(
                    f"{self._checkpointer.url}: no snapshot to resume from, and resume='must'; check the URL, or start "
                    "from the beginning with resume='if-any'"
                )
            first = (step or 0) + 1
            if step is not None:  # at the very beginning optimizers have no state yet, which is most of what is saved
                self._checkpointer.prepare(self._state)
        if self._every_seconds == "auto" and self._failure_seconds is None and self._checkpointer.group.rank == 0:
            self._failure_seconds = _failure_seconds(self._checkpointer.url)
        self._first = first
        self._start_clock()
        return first

    def attach(self, stepper: object) -> Callback:
        """For a loop one does not own: each call of ``stepper.step()`` ends a training step, from the first to run on,
        and so saves when due. Restores first, unless ``on_train_begin`` has been called. Returns itself.

        ``stepper``: an optimizer, or a learning-rate scheduler, which is the better choice where one steps after the
        optimizer: what steps later than ``stepper`` is saved one step behind. What ``on_step_end`` raises, its ``step``
        raises; whether to stop, ``stopping`` says. ``stepper`` keeps this callback alive, until ``close`` detaches it;
        one for the same repository that was attached to it before, as in an earlier run of a notebook's cell, is
        closed.
        ``TypeError`` if it is neither, ``ValueError`` if this is attached already.
        """
        self._check_open()
        check_stepper(stepper)
        if self._detach is not None:
            raise ValueError("this Callback is attached already: each step would be counted twice")
        others = _attached.setdefault(stepper, weakref.WeakSet())
        url = self._checkpointer.url
        for other in [other for other in others if other._checkpointer.url == url and not other._closed]:
            log.warning(
                "%s: an earlier Callback was attached to the same steps, and is closed now", other._checkpointer.url
            )
            other.close()
        others.add(self)
        if not holds_optimizer_of(self._state, stepper):
            log.warning(
                "%s: the optimizer that steps is not in the state: a job that resumes starts it afresh",
                self._checkpointer.url,
            )
        self._attached_step = (self.on_train_begin() if self._first is None else self._first) - 1
        behind = SchedulersBehind(self._state, stepper)
        warned = False

        def on_step() -> None:
            nonlocal warned
            late = behind.take()
            if late and not warned:
                warned = True
                log.warning(
                    "%s steps after the optimizer that the callback is attached to: snapshots have it one step behind; "
                    "call attach with the scheduler instead of the optimizer",
                    ", ".join(late),
                )
            self._attached_step += 1
            before = self._checkpointer.pending
            self.on_step_end(self._attached_step)
            if self._checkpointer.pending is not before:
                behind.saved()

        self._detach = after_each_step(stepper, on_step)
        return self

    def restored(self, state: Mapping[str, Any], step: int) -> None:
        """The Checkpointer tells of each restore: steps of what this is attached to are counted on from there."""
        if state is self._state:
            self._attached_step = step

    def on_step_end(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Saves if ``step`` is due. Returns True when training should stop, at the end of the same step on all ranks:
        a signal asked for it. ``SaveError`` once the callback or its Checkpointer is closed."""
        self._check_open()
        if self._saved_at is None:
            self._start_clock()
        if self._listening is not None:
            self._listening.renew()
        asked = self._watcher.step_ended() if self._watcher is not None else Asked()
        if asked.stop:
            self.stopping = True
            if self._listening is not None:
                self._listening.done()
        self._look_after()
        stepped = self._steps.take()
        if asked.save and asked.reasons and self._checkpointer.group.rank == 0:
            log.info("saving step %d, asked for by %s", step, ", ".join(asked.reasons))
        due = asked.save or (self._every_steps is not None and step % self._every_steps == 0)
        if due and (asked.reasons or not self._skips(step)):
            if not stepped:
                self._warn_of_gradients(step)
            self._save(step, metrics)
        return self.stopping

    def on_train_end(self) -> None:
        """Waits for every save to be committed, and raises if the last one failed, however many were tolerated. Then
        waits for the other ranks to come here, ``agree_seconds`` at most, and closes. May be called again."""
        if self._watcher is not None:
            self._watcher.end()
        if self._listening is not None:
            self._listening.done()
        failure: FastckptError | None = None
        try:
            try:
                while len(self._pending) > 1:
                    self._finish(self._pending.pop(0))
                if self._pending:
                    last = self._pending.pop()
                    last.wait()
                    self._committed(last)
            except FastckptError as error:
                failure = error
            if self._watcher is not None:
                self._watcher.end_together()
        finally:
            self.close()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Removes hooks, signal handlers and threads; waits for no save. May be called again, and on any thread;
        ``on_train_end`` and closing the Checkpointer call it, and so does the garbage collector."""
        self._closed = True
        detach, self._detach = self._detach, None
        if detach is not None:
            detach()
        self._steps.close()
        self._finalizer()
        if self._watcher is not None:
            self._watcher.join()

    def _check_open(self) -> None:
        if self._closed:
            raise SaveError(f"{self._checkpointer.url}: this Callback is closed; make a new one to train on")

    def _save(self, step: int, metrics: Mapping[str, float] | None) -> None:
        self._start_clock()
        before = self._checkpointer.pending
        try:
            finite = {name: number for name, number in (metrics or {}).items() if not _is_infinite(number)}
            pending = self._checkpointer.save(step, self._state, metrics=finite)
        except FastckptError as error:
            started = self._checkpointer.pending
            if started is None or started is before:
                self._count(step, error)
                return
            pending = started  # the error is an earlier save's, which is looked after as its turn comes
        self._pending.append(pending)

    def _skips(self, step: int) -> bool:
        """Whether the save of this step is left out. Ranks learn of a commit at different moments, so what the
        coordinator knows counts for all."""
        if self._busy == "wait":
            return False
        self._busy_questions += 1
        group = self._checkpointer.group

        def busy(_: object) -> bytes:
            pending = self._checkpointer.pending
            return b"busy" if pending is not None and not pending.done else b""

        try:
            answer = Assembly(group).ask(
                f"{self._name}/busy-{self._busy_questions}",
                b"",
                busy,
                seconds=self._agree_seconds,
                what=f"all ranks to end step {step}",
            )
        except FastckptError as error:  # which they all got: the save itself has more patience, and its own errors
            log.warning("step %d is saved although the save before may not be committed: %s", step, error)
            return False
        if answer:
            self.skipped += 1
            log.warning("step %d is not saved: the save before is not committed yet (%d left out)", step, self.skipped)
        return bool(answer)

    def _start_clock(self) -> None:
        self._saved_at = time.monotonic()
        self._schedule()

    def _schedule(self) -> None:
        if self._watcher is not None and self._interval is not None and self._saved_at is not None:
            self._watcher.schedule(self._saved_at, self._interval)

    def _warn_of_gradients(self, step: int) -> None:
        if not self._accumulation_warned and self._steps.hold_gradients():
            self._accumulation_warned = True
            log.warning(
                "step %d is saved although no optimizer has stepped since the step before: the gradients accumulated "
                "so far are not in the snapshot, and a job that resumes from it starts without them; call on_step_end "
                "after each optimizer step only",
                step,
            )

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
            self._measure(pending.counters)
            self._committed(pending)

    def _measure(self, counters: Mapping[str, float]) -> None:
        if self._every_seconds == "auto":
            self._interval = interval_seconds(
                counters["return_seconds"] + counters.get("fence_seconds", 0.0),
                self._failure_seconds or FAILURE_SECONDS,
                counters["committed_seconds"],
            )
            self._schedule()

    def _count(self, step: int, error: FastckptError) -> None:
        self.failed += 1
        self._failures += 1
        if self._failures > self._failures_max:
            raise error
        log.error("saving step %d failed (%d in a row): %s", step, self._failures, error)

    def _committed(self, pending: Pending) -> None:
        if self._on_committed is not None:
            self._on_committed(pending.snapshot)


def _end(watcher: Watcher | None, listening: process_signals.Listening | None) -> None:
    if listening is not None:
        listening.close()
    if watcher is not None:
        watcher.close()


def _failure_seconds(url: str) -> float | None:
    try:
        seconds = observed_failure_seconds(DeadlineStore.opened(url, _HISTORY_SECONDS_MAX, open_store))
    except FastckptError as error:
        log.warning("%s: how long earlier jobs lasted cannot be read, taking it for a day: %s", url, error)
        return None
    if seconds is not None:
        log.info("%s: earlier jobs lasted %.0f s on average", url, seconds)
    return seconds


def _check(
    every_steps: object,
    every_seconds: object,
    resume: object,
    failures_max: int,
    busy: object,
    agree_seconds: float,
    failures_per_day: float | None,
) -> None:
    if every_steps is not None and not (isinstance(every_steps, int) and every_steps > 0):
        raise ValueError(f"every_steps={every_steps!r} is not a positive number of steps")
    if every_seconds not in (None, "auto") and not _is_positive(every_seconds):
        raise ValueError(f"every_seconds={every_seconds!r} is neither a positive number of seconds nor 'auto'")
    if resume not in ("if-any", "must", "never"):
        raise ValueError(f"resume={resume!r} is not 'if-any', 'must' or 'never'")
    if failures_max < 0:
        raise ValueError(f"failures_max={failures_max} is negative")
    if busy not in ("wait", "skip"):
        raise ValueError(f"busy={busy!r} is not 'wait' or 'skip'")
    if not _is_positive(agree_seconds):
        raise ValueError(f"agree_seconds={agree_seconds!r} is not a positive number of seconds")
    if failures_per_day is not None and (every_seconds != "auto" or not _is_positive(failures_per_day)):
        raise ValueError(
            f"failures_per_day={failures_per_day!r} is a positive number that goes with every_seconds='auto', not with "
            f"every_seconds={every_seconds!r}"
        )


def _is_infinite(number: object) -> bool:
    """What is no number at all is for ``save`` to refuse, which tells the other ranks."""
    try:
        return not math.isfinite(number)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and 0 < number < math.inf


def _checked_signals(numbers: Sequence[signal.Signals]) -> list[signal.Signals]:
    known = process_signals.SAVING | process_signals.ENDING
    for number in numbers:
        if number not in known:
            names = ", ".join(sorted(each.name for each in known))
            raise ValueError(f"signals={numbers!r}: {number!r} cannot be handled; use some of {names}")
    return sorted({signal.Signals(number) for number in numbers})
