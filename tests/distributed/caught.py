"""Catching processes at a chosen point of their work, and seeing how the calls of the others end."""

from __future__ import annotations

import concurrent.futures
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import ranks
from jobs import rank

from fastckpt import CommitTimeout, FastckptError, RankFailed
from fastckpt.job import group as job_groups

_Case = TypeVar("_Case")

PATIENT = 60.0
JOBS_AT_ONCE = 24


def strike(with_signal: signal.Signals) -> Callable[[], None]:
    """What kills or stops the process that calls it; once, from whatever thread comes first."""
    first = threading.Lock()

    def happen() -> None:
        if first.acquire(blocking=False):
            # To this thread: another might take its time to act on it, and this one go on meanwhile.
            signal.pthread_kill(threading.get_ident(), with_signal)

    return happen


def before(owner: Any, name: str, happen: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def caught(*arguments: Any, **named: Any) -> Any:
        happen()
        return original(*arguments, **named)

    setattr(owner, name, staticmethod(caught) if isinstance(vars(owner).get(name), staticmethod) else caught)


def after(owner: Any, name: str, happen: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def caught(*arguments: Any, **named: Any) -> Any:
        try:
            return original(*arguments, **named)
        finally:
            happen()

    setattr(owner, name, staticmethod(caught) if isinstance(vars(owner).get(name), staticmethod) else caught)


def after_posting(what: str, happen: Callable[[], None]) -> None:
    """Once the first reply, or on a leader the first answer, of an exchange is posted."""
    post = job_groups.StoreKeyValue.set

    def caught(self: Any, key: str, value: bytes) -> None:
        post(self, key, value)
        if f"/{what}/" in key:
            happen()

    job_groups.StoreKeyValue.set = caught  # type: ignore[method-assign]


@dataclass
class Ending:
    """How a call ended on one rank."""

    error: BaseException | None
    seconds: float
    lag: float
    """Seconds for which the machine did not run this process when it should have."""
    names: set[int]
    """The ranks that are said to be missing or to have failed."""


def ending(call: Callable[[], object]) -> Ending:
    start = time.monotonic()
    failure: BaseException | None = None
    with Lag() as lag:
        try:
            call()
        except (FastckptError, TimeoutError) as error:
            failure = forgotten(error)
    return Ending(failure, time.monotonic() - start, lag.seconds, named(failure))


def forgotten(error: BaseException) -> BaseException:
    """Without the stacks it was raised in, which would keep alive what they hold: as if it had been logged."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = seen.__context__ = None
        seen = seen.__cause__
    return error


def named(error: BaseException | None) -> set[int]:
    if error is None:
        return set()
    found = set(error.missing_ranks) if isinstance(error, CommitTimeout) else set()
    found |= set(error.failures) if isinstance(error, RankFailed) else set()
    return found | named(error.__cause__)


class Lag:
    """Measures how much later than asked for this process is run: nothing on a machine that is not overloaded."""

    seconds = 0.0

    def __enter__(self) -> Lag:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)
        self._thread.start()
        return self

    def _measure(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.05):
            now = time.monotonic()
            self.seconds += max(0.0, now - last - 0.06)
            last = now

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def say(what: str) -> None:
    ranks.store().set(f"said/{what}/{rank()}", b"")


def wait_for_test(what: str) -> None:
    ranks.store().wait([f"test/{what}"], timedelta(seconds=PATIENT))


def all_at_once(cases: Sequence[_Case], run: Callable[[Path, _Case], None], directory: Path) -> None:
    """Jobs mostly wait: many at the same time. All that failed are told."""
    failures = []
    with concurrent.futures.ThreadPoolExecutor(JOBS_AT_ONCE) as executor:
        futures = {executor.submit(run, directory / str(n), case): case for n, case in enumerate(cases)}
        for future in concurrent.futures.as_completed(futures):
            error = future.exception()
            if error is not None:
                failures.append(f"--- {futures[future]}: {''.join(traceback.format_exception(error))}")
    assert not failures, f"{len(failures)} of {len(cases)} cases failed\n" + "\n".join(failures)
