"""How often to save: the arithmetic, and how long earlier jobs lasted, from the history of the repository."""

from __future__ import annotations

import datetime
import math
import secrets

import pytest
import torch

from fastckpt import Checkpointer, FormatError
from fastckpt.interval import FIRST_SECONDS, RESTARTS_MAX, interval_seconds, observed_failure_seconds
from fastckpt.repository import history, writer
from fastckpt.storage.memory import memory_store


def test_the_interval_is_the_root_of_twice_the_cost_times_the_time_between_failures() -> None:
    assert interval_seconds(2.0, 100.0, 1.0) == 20.0
    assert interval_seconds(0.5, 86_400.0, 1.0) == math.sqrt(86_400.0)


def test_saves_are_twice_as_far_apart_as_one_takes_to_be_committed() -> None:
    assert interval_seconds(2.0, 100.0, 10.0) == 20.0
    assert interval_seconds(2.0, 100.0, 11.0) == 22.0
    assert interval_seconds(0.0, 100.0, 3.0) == 6.0


@pytest.fixture
def name() -> str:
    return secrets.token_hex(8)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.minute = 0
        for module in (history, writer):
            monkeypatch.setattr(module, "now", self._now)

    def _now(self) -> str:
        start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        return (start + datetime.timedelta(minutes=self.minute)).isoformat().replace("+00:00", "Z")


def job(name: str, clock: Clock, *minutes: int) -> None:
    """Opens at the first of these minutes, and saves at each."""
    with Checkpointer(f"memory://{name}") as ckpt:
        for step, minute in enumerate(minutes):
            clock.minute = minute
            ckpt.save(step, {"t": torch.zeros(1)}).wait()


def test_jobs_lasted_from_their_opening_to_their_last_decision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert observed_failure_seconds(memory_store(name)) is None
    job(name, clock, 0, 30, 40)
    assert observed_failure_seconds(memory_store(name)) == 40 * 60
    job(name, clock, 1000, 1020)  # what lies between two jobs does not count
    assert observed_failure_seconds(memory_store(name)) == 30 * 60
    job(name, clock, 2000)  # its only save says no more than that it lived till then
    assert observed_failure_seconds(memory_store(name)) == (40 * 60 + 20 * 60 + FIRST_SECONDS) / 3


def test_only_the_last_jobs_are_looked_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    job(name, clock, 0, 100_000)
    for number in range(RESTARTS_MAX):
        job(name, clock, 200_000 + 10 * number, 200_001 + 10 * number)
    assert observed_failure_seconds(memory_store(name)) == 60


def test_a_time_that_is_none_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "now", lambda: "yesterday")
    with Checkpointer(f"memory://{name}") as ckpt:
        ckpt.save(1, {"t": torch.zeros(1)})
    with pytest.raises(FormatError, match="'yesterday'"):
        observed_failure_seconds(memory_store(name))
