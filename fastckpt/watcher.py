"""The step at whose end all ranks save because one of them asks for it, or the time has come.

Ranks end a step at different moments, so whoever asks cannot name a step that no rank is beyond. Each rank's watcher
therefore answers with the step its rank is in, and holds its rank at the end of that step until the largest of the
answers, the target, is known. Nobody is beyond it: every rank goes on to the end of the target, and does there what was
asked for.

    ring     any rank that has a request posts the number of the round it wants; only the coordinator looks at this
    round    the coordinator posts a round's number, for its own requests and for those that rang; every rank looks
    answers  one exchange of all ranks, on the watchers' threads: each rank's step and requests, and the target

What is counted is ends of steps, not their labels, which go back in a roll-back. A round that is not complete in time
is given up by all: a rank is dead or stopped. The keys of ring and round are written again and again by their names, so
a rank that missed a round comes back in with the next.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from fastckpt.errors import FastckptError
from fastckpt.group import ANSWER_SECONDS, Assembly, Group, as_told

log = logging.getLogger("fastckpt")

_LOOK_SECONDS_MIN = 0.2
_LOOKS_A_SECOND_MAX = 20_000
"""Of all ranks together: a key-value store of one process answers that many and has time left."""
_LOOK_SECONDS_AFTER_ERROR = 30.0
"""A key-value store that fails is asked again, but seldom: each call that does not come back leaves a thread behind."""
_HOLD_SECONDS_MORE = ANSWER_SECONDS + 3.0
"""A round is over, one way or the other, so much later than its answers were due."""
_JOIN_SECONDS = 1.0


@dataclass
class Asked:
    """What is to be done at the end of a step."""

    save: bool = False
    stop: bool = False
    """Training is to end here."""
    reasons: tuple[str, ...] = ()
    """Why, other than that it is time."""


@dataclass(frozen=True)
class _Request:
    reason: str
    stop: bool
    raised: float


class _Answer(msgspec.Struct, array_like=True, frozen=True):
    step: int
    """The one the rank is in; its end is the first at which it can still do something."""
    ended: bool
    """It has left its training loop, and does nothing any more."""
    time: bool
    stop: bool
    reasons: list[str]


class _Target(msgspec.Struct, array_like=True, frozen=True):
    step: int
    save: bool
    stop: bool
    reasons: list[str]


class Watcher:
    """One rank's part in it. Every rank makes one, under the same ``name``, and ends the same steps."""

    def __init__(self, group: Group, name: str, agree_seconds: float) -> None:
        self._group = group
        self._name = name
        self._agree_seconds = agree_seconds
        # Only the coordinator looks for rings, so it can look as often as it likes.
        others_seconds = max(_LOOK_SECONDS_MIN, group.size / _LOOKS_A_SECOND_MAX)
        self._look_seconds = others_seconds if group.rank else _LOOK_SECONDS_MIN
        self._changed = threading.Condition()  # its lock may be taken again: the garbage collector may call close
        self._process = os.getpid()
        self._closed = False
        self._ended = False
        self._steps = 0
        """How many have ended here."""
        self._round = 1
        """The next one."""
        self._held_at: int | None = None
        """While a round is under way: the step whose end must wait for its target."""
        self._targets: dict[int, Asked] = {}
        self._requests: list[_Request] = []
        self._woken = False
        self._due: float | None = None
        self._every_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="fastckpt-watcher", daemon=True)
        self._thread.start()

    def request(self, reason: str, *, stop: bool) -> None:
        """Asks for a save at the end of the next step that all ranks can agree on, and with ``stop`` for the end of
        training there. Any thread; returns at once."""
        with self._changed:
            self._requests.append(_Request(reason, stop, time.monotonic()))
            self._woken = True
            self._changed.notify_all()

    def schedule(self, start: float, seconds: float) -> None:
        """The next save that nobody else asks for is due ``seconds`` after ``start``, on ``time.monotonic()``; if it is
        given up, again as much later. The coordinator's clock is the job's; other ranks' calls have no effect."""
        if self._group.rank == 0:
            with self._changed:
                self._due, self._every_seconds = start + seconds, seconds
                self._woken = True
                self._changed.notify_all()

    def step_ended(self) -> Asked:
        """Counts a step, and says what is to be done at its end. Waits while a round is under way that may name it, a
        little longer than ``agree_seconds`` at most."""
        until = time.monotonic() + self._agree_seconds + _HOLD_SECONDS_MORE
        with self._changed:
            step = self._steps + 1
            while self._held_at is not None and step >= self._held_at and not self._closed:
                if not self._changed.wait(until - time.monotonic()):
                    log.warning("a save that was asked for is given up: no answer from the job's key-value store")
                    self._held_at = None
            self._steps = step
            return self._targets.pop(step, Asked())

    def end(self) -> None:
        """There are no more steps: what is asked for from now on comes too late, and is dropped on all ranks."""
        with self._changed:
            self._ended = True
            self._due = None

    def end_together(self) -> None:
        """Waits until all ranks have come here, up to ``agree_seconds``: till then they may still start rounds, and
        would wait for this one."""
        if self._group.size > 1 and not self._closed:
            try:
                Assembly(self._group).ask(
                    f"{self._name}/end", b"", lambda _: b"", seconds=self._agree_seconds, what="the end of training"
                )
            except FastckptError as error:  # they train on, or have died: not for us to say
                log.debug("%s: %s", self._name, error)

    def close(self) -> None:
        """Ends the thread, once what it is in the middle of is over. Any thread, the garbage collector too; may be
        called again."""
        if os.getpid() != self._process:
            return  # a forked child has no such thread, and its lock may be held for good
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self) -> None:
        """After ``close``: waits for a moment until the thread has ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)

    # --- on the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._woken, self._seconds_to_wait(pause))
                self._woken = False
                if self._closed:
                    return
                self._raise_what_is_due()
            pause = self._look_seconds
            try:
                self._look()
            except Exception as error:  # also for want of memory: the thread must not end while training goes on
                pause = _LOOK_SECONDS_AFTER_ERROR
                log.warning("saves that other ranks ask for are not heard of for %.0f s: %s", pause, as_told(error))

    def _seconds_to_wait(self, pause: float) -> float | None:
        seconds = [pause] if self._group.size > 1 else []
        if self._due is not None:
            seconds.append(max(0.0, self._due - time.monotonic()))
        return min(seconds, default=None)

    def _raise_what_is_due(self) -> None:
        now = time.monotonic()
        if self._due is not None and self._due <= now:
            self._due = now + self._every_seconds  # unless a save sets it before
            self._requests.append(_Request("", False, now))
        if self._targets:  # a save lies ahead already, and is later than any of these
            self._requests = [request for request in self._requests if request.stop]
        if self._ended:
            self._requests = []
        if late := [request for request in self._requests if now - request.raised > self._agree_seconds]:
            self._requests = [request for request in self._requests if request not in late]
            self._warn_given_up(late, f"rank 0 has begun no round for {self._agree_seconds:g} s; look at its log")

    def _look(self) -> None:
        if self._group.rank == 0:
            if self._rung() or self._requests:
                if self._group.size > 1:
                    self._group.post(f"{self._name}/round", b"%d" % self._round)
                self._take_part(self._round)
            return
        opened = self._group.posted(f"{self._name}/round")
        if opened is not None and int(opened) >= self._round:
            self._take_part(int(opened))
        elif self._requests:
            self._group.post(f"{self._name}/ring", b"%d" % self._round)

    def _rung(self) -> bool:
        """Whether a rank wants a round that has not been yet."""
        if self._group.size == 1 or (wanted := self._group.posted(f"{self._name}/ring")) is None:
            return False
        self._group.withdraw(f"{self._name}/ring")
        return int(wanted) >= self._round

    def _take_part(self, number: int) -> None:
        with self._changed:
            requests, self._requests = self._requests, []
            answer = _Answer(
                step=self._steps + 1,
                ended=self._ended,
                time=any(not request.reason for request in requests),
                stop=any(request.stop for request in requests),
                reasons=[f"{request.reason} at rank {self._group.rank}" for request in requests if request.reason],
            )
            self._held_at = answer.step
        self._round = number + 1
        try:
            data = Assembly(self._group).ask(
                f"{self._name}/round-{number}",
                msgspec.msgpack.encode(answer),
                _decide,
                seconds=self._agree_seconds,
                what="all ranks to say which step they are in",
            )
        except FastckptError as error:
            self._warn_given_up(requests, str(error))
            with self._changed:
                self._requests = []
                self._held_at = None
                self._changed.notify_all()
            return
        target = msgspec.msgpack.decode(data, type=_Target)
        with self._changed:
            # The save that lies ahead is later than what was asked for meanwhile, too.
            self._requests = [request for request in self._requests if request.stop and not target.stop]
            if self._held_at is not None and (target.save or target.stop):
                asked = self._targets.setdefault(target.step, Asked())
                asked.save |= target.save
                asked.stop |= target.stop
                asked.reasons += tuple(target.reasons)
            self._held_at = None
            self._changed.notify_all()

    def _warn_given_up(self, requests: Sequence[_Request], why: str) -> None:
        # One line a rank would be many: those say it that asked, and the coordinator.
        level = logging.WARNING if requests or self._group.rank == 0 else logging.INFO
        reasons = ", ".join(sorted({request.reason or "time" for request in requests})) or "another rank"
        log.log(level, "a save asked for by %s is given up, and training goes on: %s", reasons, why)


def _decide(replies: dict[int, bytes]) -> bytes:
    answers = {rank: msgspec.msgpack.decode(data, type=_Answer) for rank, data in sorted(replies.items())}
    ended = any(answer.ended for answer in answers.values())
    reasons = [reason for answer in answers.values() for reason in answer.reasons]
    asked = bool(reasons) or any(answer.time for answer in answers.values())
    return msgspec.msgpack.encode(
        _Target(
            step=max((answer.step for answer in answers.values() if not answer.ended), default=0),
            save=asked and not ended,
            stop=any(answer.stop for answer in answers.values()),
            reasons=reasons,
        )
    )
