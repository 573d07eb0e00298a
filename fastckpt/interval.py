"""How often to save: from what a save costs and how often the job fails. What failed before, the repository knows."""

from __future__ import annotations

import datetime
import math

from fastckpt.errors import FormatError
from fastckpt.format import names
from fastckpt.format.decision import Decision, Open, decode_decision
from fastckpt.format.document import DOCUMENT_BYTES_MAX
from fastckpt.repository.metadata import read_metadata
from fastckpt.repository.repository import Repository, exists
from fastckpt.storage.store import Store

FIRST_SECONDS = 60.0
"""Before any save has been measured."""
FAILURE_SECONDS = 86_400.0
"""Mean time between failures where none is given and none was observed: a failure a day."""
RESTARTS_MAX = 16
"""As many earlier jobs are looked at: each takes two small reads."""


def interval_seconds(cost_seconds: float, failure_seconds: float, committed_seconds: float) -> float:
    """Seconds from one save to the next that lose the least time to saves and failures together.

    ``cost_seconds``: what a save costs training. ``failure_seconds``: mean time between failures.
    ``committed_seconds``: from the call of a save to its commit; saves are at least twice that apart, so that storage
    keeps up.

    J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17 (1974):
    sqrt(2 * cost * mean time between failures). J. T. Daly, "A higher order estimate of the optimum checkpoint interval
    for restart dumps", Future Generation Computer Systems 22 (2006), bounds its error: it is good while a save costs
    little compared with the time between failures, as it does where it is written behind the training.
    """
    return max(math.sqrt(2.0 * cost_seconds * failure_seconds), 2.0 * committed_seconds)


def observed_failure_seconds(store: Store) -> float | None:
    """The mean time that the last jobs which wrote to the repository lasted: from their OPEN to their last decision.
    None if there was none. Each is taken to have failed, for it does not write any more: the history does not tell a
    failure from a job that was meant to end, so this errs towards saving too often."""
    if not exists(store):
        return None
    repository = Repository(store)
    repository.history.load()
    number = repository.history.number
    lasted: list[float] = []
    while number and len(lasted) < RESTARTS_MAX:
        last = _decision(store, number)
        opened = last if isinstance(last, Open) else _decision(store, names.writer_open_number(last.writer))
        # An OPEN is as late as the first save: a job that saved once would seem to have lasted no time at all.
        lasted.append(max(FIRST_SECONDS, _time(last.created) - _time(opened.created)))
        number = opened.number - 1
    return sum(lasted) / len(lasted) if lasted else None


def _decision(store: Store, number: int) -> Decision:
    return decode_decision(read_metadata(store, names.decision(number), DOCUMENT_BYTES_MAX), number)


def _time(created: str) -> float:
    try:
        return datetime.datetime.fromisoformat(created).timestamp()
    except ValueError as error:
        raise FormatError(f"a decision's time is {created!r}, not one of RFC 3339") from error
