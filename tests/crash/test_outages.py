"""Storage that stops answering while a decision is being made, and comes back: whether the decision was made is then in
doubt, on some ranks longer than on others. In doubt nothing may be reported, and nothing may be deleted.
"""

from __future__ import annotations

import pytest

from fastckpt.errors import FastckptError, StorageError
from fastckpt.format import names
from fastckpt.format.decision import Live
from fastckpt.storage.memory import MemoryStore
from fastckpt.testing.faulty_store import FaultyStore
from tests.crash.numpy_job import Job
from tests.crash.scenarios import SPEC, violations

LONGEST = 16
"""Operations. A coordinator gives up its attempt, and learns what became of it, with fewer."""


class Outage:
    """Begins when a decision is created, and lasts for some operations."""

    def __init__(self, decision: int, length: int) -> None:
        self._first = ("create", names.decision(decision))
        self._left = length
        self._begun = False

    def has(self, operation: str, name: str) -> bool:
        self._begun = self._begun or (operation, name) == self._first
        self._left -= self._begun
        return self._begun and self._left >= 0

    def end(self, step: int) -> None:
        if self._begun:
            self._left = 0


@pytest.mark.parametrize("decision", [2, 3], ids=["the first commit", "a later commit"])
@pytest.mark.parametrize("applied", [True, False], ids=["applied", "not applied"])
def test_an_outage_of_any_length_from_a_decision_on_loses_nothing_and_misleads_nobody(
    applied: bool, decision: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastckpt.save.STREAMS", 1)
    committed = set()
    error = StorageError("the storage did not answer", transient=True)
    for length in range(1, LONGEST + 1):
        store, outage = MemoryStore("job"), Outage(decision, length)
        faulty = FaultyStore(store, only=outage.has, fail_at=1, persistent=True, after=applied, error=error)
        job = Job([faulty.view(), faulty.view()], spec=SPEC, nodes=("a", "b"))
        job.run([1, 2, 3], on_each_step_done=outage.end)
        found = violations(store, job.reported, {1, 2, 3})
        assert not found, (length, found)
        ends = [end for outcome in job.outcomes for end in outcome.values()]
        assert all(isinstance(end, Live | FastckptError) for end in ends), (length, ends)
        assert all(isinstance(outcome[3], Live) for outcome in job.outcomes), (length, job.outcomes)
        committed.add(isinstance(job.outcomes[0][decision - 1], Live))
    assert committed == {True, False}, "outages were all too short, or all too long"
