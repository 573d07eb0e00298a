"""The step at whose end all ranks save: found while ranks run freely, and given up when one is missing."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from fastckpt import watcher as watchers
from fastckpt.errors import CommitTimeout
from fastckpt.group import Group, SoloGroup
from fastckpt.testing import ThreadGroup
from fastckpt.watcher import Asked, Watcher

SECONDS = 30.0


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchers, "_LOOK_SECONDS_MIN", 0.005)


def steps_until(watcher: Watcher, wanted: Callable[[Asked], bool]) -> tuple[int, Asked]:
    """Runs on until something is asked for: which step, and what."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        asked = watcher.step_ended()
        if wanted(asked):
            return watcher._steps, asked
        time.sleep(0)
    raise TimeoutError("nothing was asked for")


def saving(watcher: Watcher) -> tuple[int, Asked]:
    return steps_until(watcher, lambda asked: asked.save)


def round_is_over(watcher: Watcher, number: int) -> bool:
    with watcher._changed:
        return watcher._round > number and watcher._held_at is None


def end(watcher: Watcher) -> None:
    watcher.end()
    watcher.end_together()
    watcher.close()
    watcher.join()
    assert not watcher._thread.is_alive()


@pytest.mark.parametrize("nodes", ["aaa", "aabb", "abc"])
def test_all_ranks_do_what_one_asks_for_at_the_end_of_the_same_step(nodes: str) -> None:
    ranks = ThreadGroup(len(nodes), list(nodes), seconds_max=SECONDS)

    def work(group: Group) -> list[tuple[int, Asked]]:
        watcher = Watcher(group, "w", SECONDS)
        found = []
        for asking in range(group.size):
            if group.rank == asking:
                watcher.request("SIGUSR1", stop=asking == 1)
            found.append(saving(watcher))
        end(watcher)
        return found

    results = ranks.run(work)
    assert all(result == results[0] for result in results)
    assert [asked for _, asked in results[0]] == [
        Asked(True, rank == 1, (f"SIGUSR1 at rank {rank}",)) for rank in range(len(nodes))
    ]
    assert ranks.key_value.keys() == ["run-0/posted/w/round"]


def test_requests_of_many_ranks_at_once_are_one_save_and_none_is_lost() -> None:
    def work(group: Group) -> list[tuple[int, Asked]]:
        watcher = Watcher(group, "w", SECONDS)
        watcher.request("SIGUSR1", stop=False)
        watcher.request("SIGTERM", stop=True)
        found = [steps_until(watcher, lambda asked: asked.save)]
        while not found[-1][1].stop:  # asked for when the round before was under way already
            found.append(saving(watcher))
        end(watcher)
        return found

    results = ThreadGroup(4, seconds_max=SECONDS).run(work)
    assert all(result == results[0] for result in results)
    assert len(results[0]) <= 2


def test_the_coordinators_clock_asks_for_a_save_on_all_ranks_again_and_again() -> None:
    def work(group: Group) -> list[tuple[int, Asked]]:
        watcher = Watcher(group, "w", SECONDS)
        found = []
        for _ in range(2):
            watcher.schedule(time.monotonic(), 0.02 if group.rank == 0 else 0.0)
            found.append(saving(watcher))
        end(watcher)
        return found

    first, second = ThreadGroup(2, seconds_max=SECONDS).run(work)
    assert first == second
    assert [asked for _, asked in first] == [Asked(save=True)] * 2


def test_one_rank_alone_agrees_with_itself() -> None:
    watcher = Watcher(SoloGroup(), "w", SECONDS)
    watcher.request("SIGUSR1", stop=False)
    assert saving(watcher)[1].reasons == ("SIGUSR1 at rank 0",)
    watcher.schedule(time.monotonic(), 0.01)
    assert saving(watcher)[1] == Asked(save=True)
    end(watcher)


def test_what_is_asked_for_while_a_round_is_under_way_is_served_by_its_save_but_for_a_stop() -> None:
    class Meanwhile(SoloGroup):
        asked = False

        def exchange(self, *arguments: object, **named: object) -> bytes:
            if not self.asked:
                self.asked = True
                watcher.request("SIGUSR2", stop=False)
                watcher.request("SIGTERM", stop=True)
            return super().exchange(*arguments, **named)  # type: ignore[arg-type]

    watcher = Watcher(Meanwhile(), "w", SECONDS)
    with watcher._changed:  # the next step does not end before both rounds are over
        watcher.request("SIGUSR1", stop=False)
        assert watcher._changed.wait_for(lambda: watcher._round == 3 and watcher._held_at is None, SECONDS)
    assert watcher.step_ended() == Asked(save=True, stop=True, reasons=("SIGUSR1 at rank 0", "SIGTERM at rank 0"))
    end(watcher)


def test_a_rank_that_has_not_begun_is_agreed_with() -> None:
    here = threading.Event()

    def work(group: Group) -> tuple[int, Asked]:
        watcher = Watcher(group, "w", SECONDS)
        if group.rank == 0:
            watcher.request("SIGUSR1", stop=False)
            found = saving(watcher)
            here.set()
        else:
            assert here.wait(SECONDS)  # rank 0 has gone on to its save, and this one starts to train
            found = saving(watcher)
        end(watcher)
        return found

    first, second = ThreadGroup(2, seconds_max=SECONDS).run(work)
    assert first == second


@pytest.mark.parametrize("stop", [False, True])
def test_what_is_asked_for_when_a_rank_has_ended_is_dropped_but_for_the_stop(stop: bool) -> None:
    ended = threading.Event()

    def work(group: Group) -> Asked | None:
        watcher = Watcher(group, "w", SECONDS)
        asked = None
        if group.rank == 1:
            watcher.step_ended()
            watcher.end()
            ended.set()
        else:
            assert ended.wait(SECONDS)
            watcher.request("SIGTERM" if stop else "SIGUSR1", stop=stop)
            # One asked for after it, so it is over when this round is.
            asked = steps_until(watcher, lambda asked: asked.stop or round_is_over(watcher, 1))[1]
        end(watcher)
        return asked

    asked = ThreadGroup(2, seconds_max=SECONDS).run(work)[0]
    assert asked == Asked(save=False, stop=stop, reasons=("SIGTERM at rank 0",) if stop else ())


def test_a_rank_that_is_missing_is_named_and_the_others_train_on_until_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given_up = threading.Barrier(3)
    ranks = ThreadGroup(3, ["a", "a", "b"], seconds_max=SECONDS)

    def work(group: Group) -> tuple[int, Asked]:
        if group.rank == 2:
            given_up.wait(SECONDS)
        # All are given time but in the rounds that one misses.
        watcher = Watcher(group, "w", 0.3)
        for number in (1, 2) if group.rank < 2 else ():
            if group.rank == 0:
                watcher.request("SIGUSR1", stop=False)
            steps_until(watcher, lambda _, number=number: round_is_over(watcher, number))  # type: ignore[misc]
        watcher._agree_seconds = SECONDS
        if group.rank < 2:
            given_up.wait(SECONDS)
        if group.rank == 1:
            watcher.request("SIGUSR2", stop=False)
        found = saving(watcher)
        end(watcher)
        return found

    with caplog.at_level(logging.WARNING, "fastckpt"):
        first, second, third = ranks.run(work)
    assert first == second == third
    assert first[1].reasons == ("SIGUSR2 at rank 1",)
    assert "a save asked for by SIGUSR1 is given up, and training goes on: " in caplog.text
    assert "rank 2 was not heard of while waiting for all ranks to say which step they are in" in caplog.text


def test_a_coordinator_that_does_not_answer_is_named(caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()

    def work(group: Group) -> None:
        if group.rank == 0:
            assert over.wait(SECONDS)
            return
        watcher = Watcher(group, "w", 0.05)
        watcher.request("SIGUSR1", stop=False)
        steps_until(watcher, lambda _: "is given up" in caplog.text)
        over.set()
        watcher.close()

    with caplog.at_level(logging.WARNING, "fastckpt"):
        ThreadGroup(2, seconds_max=SECONDS).run(work)
    assert "rank 0 has begun no round for 0.05 s; look at its log" in caplog.text


class Silent(SoloGroup):
    """One of two ranks, whose key-value store fails."""

    rank = 1
    size = 2
    nodes = (0, 0)

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def posted(self, name: str) -> bytes | None:
        self.asked += 1
        raise CommitTimeout("the job's key-value store failed")


def test_a_key_value_store_that_fails_is_told_of_and_asked_seldom(caplog: pytest.LogCaptureFixture) -> None:
    group = Silent()
    with caplog.at_level(logging.WARNING, "fastckpt"):
        watcher = Watcher(group, "w", 0.05)
        steps_until(watcher, lambda _: "are not heard of for 30 s: the job's key-value store failed" in caplog.text)
    watcher.close()
    watcher.join()
    assert group.asked == 1


def test_a_rank_waits_at_the_end_of_its_step_only_so_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchers, "_HOLD_SECONDS_MORE", 0.05)
    stuck = threading.Event()

    class Stuck(SoloGroup):
        def exchange(self, *arguments: object, **named: object) -> bytes:
            stuck.wait(SECONDS)
            return super().exchange(*arguments, **named)  # type: ignore[arg-type]

    watcher = Watcher(Stuck(), "w", 0.01)
    watcher.request("SIGUSR1", stop=False)
    with caplog.at_level(logging.WARNING, "fastckpt"):
        steps_until(watcher, lambda _: "no answer from the job's key-value store" in caplog.text)
    stuck.set()
    # What comes of it in the end would be for a step that this rank may be beyond.
    steps_until(watcher, lambda _: watcher._round == 2 and not watcher._requests)
    watcher.close()
    watcher.join()
    assert watcher._targets == {}


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    until = time.monotonic() + SECONDS
    while any(thread.name == "fastckpt-watcher" for thread in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.001)
    assert not [thread for thread in threading.enumerate() if thread.name == "fastckpt-watcher"]
