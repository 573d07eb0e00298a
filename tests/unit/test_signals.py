"""Signals as requests: heard beside the main thread, passed on to who was there before, and put back as they were."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastckpt import signals
from fastckpt.signals import Listening, listen

SECONDS = 20.0
BOTH = (signal.SIGUSR1, signal.SIGTERM)


class Heard(queue.SimpleQueue[signal.Signals]):
    def next(self) -> signal.Signals:
        return self.get(timeout=SECONDS)


@pytest.fixture(autouse=True)
def _all_is_as_it_was() -> Iterator[None]:
    def now() -> list[object]:
        wakeup = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakeup)
        numbers = (*BOTH, signal.SIGUSR2, signal.SIGINT)
        return [wakeup, *map(signal.getsignal, numbers), *map(action, numbers)]

    before, open_before = now(), set(os.listdir("/proc/self/fd"))
    yield
    until = time.monotonic() + SECONDS
    while readers() and time.monotonic() < until:
        time.sleep(0.001)
    assert now() == before
    assert set(os.listdir("/proc/self/fd")) <= open_before  # of other tests', some may be closed meanwhile


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastckpt-signals"]


def action(number: int) -> bytes:
    buffer = ctypes.create_string_buffer(1024)
    assert ctypes.CDLL(None).sigaction(number, None, buffer) == 0
    return buffer.raw[:8]  # the handler; what follows is not set to the last byte


@pytest.fixture
def handled() -> Iterator[Callable[[int], Heard]]:
    """Sets a Python handler, as a program may have done before us."""
    before: list[tuple[int, object]] = []

    def handle(number: int) -> Heard:
        heard = Heard()
        before.append((number, signal.signal(number, lambda got, _: heard.put(signal.Signals(got)))))
        return heard

    yield handle
    for number, previous in reversed(before):
        signal.signal(number, previous)  # type: ignore[arg-type]


def run_until(done: Callable[[], bool]) -> None:
    """Keeps the main thread in Python, where handlers are run."""
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_signal_is_heard_while_the_main_thread_is_elsewhere() -> None:
    heard = Heard()
    listening = listen(BOTH, heard.put, hold_seconds=SECONDS)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard.next() == signal.SIGUSR1
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.next() == signal.SIGTERM
    listening.done()
    listening.close()
    listening.close()


def test_a_python_handler_from_before_is_called_too_but_not_for_a_signal_that_ends(
    handled: Callable[[int], Heard],
) -> None:
    before = {number: handled(number) for number in BOTH}
    heard = Heard()
    listening = listen(BOTH, heard.put, hold_seconds=SECONDS)
    for number in BOTH:
        os.kill(os.getpid(), number)
        assert heard.next() == number
    assert before[signal.SIGUSR1].next() == signal.SIGUSR1
    assert before[signal.SIGTERM].empty()
    listening.done()
    listening.close()
    os.kill(os.getpid(), signal.SIGTERM)
    assert before[signal.SIGTERM].next() == signal.SIGTERM


def test_a_signal_that_nothing_is_done_about_in_time_falls_to_the_python_handler_from_before_once(
    handled: Callable[[int], Heard],
) -> None:
    before, heard = handled(signal.SIGTERM), Heard()
    listening = listen(BOTH, heard.put, hold_seconds=0.02)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.next() == signal.SIGTERM
        run_until(lambda: not before.empty())
        assert before.next() == signal.SIGTERM
        run_until(lambda: signals._hub._taken[signal.SIGTERM].echoes == 0)
        assert signals._hub._held == {}, "the fall itself is no new signal"
    assert before.empty()
    assert heard.empty()
    listening.close()


def test_an_ignored_signal_stays_ignored() -> None:
    previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    heard = Heard()
    listening = listen(BOTH, heard.put, hold_seconds=0.01)
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.next() == signal.SIGTERM
        run_until(lambda: not signals._hub._held)
    listening.close()
    assert signal.signal(signal.SIGTERM, previous) == signal.SIG_IGN


def test_what_was_done_does_not_fall_and_what_comes_after_is_not_told_but_falls_in_its_time(
    handled: Callable[[int], Heard],
) -> None:
    before, heard = handled(signal.SIGTERM), Heard()
    listening = listen(BOTH, heard.put, hold_seconds=0.5)
    other = listen([signal.SIGUSR2], heard.put, hold_seconds=SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.next() == signal.SIGTERM
    listening.done()
    assert signals._hub._held == {}
    for number in (signal.SIGTERM, signal.SIGUSR2):
        os.kill(os.getpid(), number)
    assert heard.next() == signal.SIGUSR2, "which was read after the other"
    assert before.empty()
    run_until(lambda: not before.empty())  # the last save may wait for a rank that is dead
    assert before.next() == signal.SIGTERM
    listening.close()
    other.close()


def test_signals_are_heard_after_an_event_loop_has_taken_the_wakeup_descriptor_away() -> None:
    async def handle_a_signal() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)

    heard = Heard()
    listening = listen([signal.SIGUSR2], heard.put, hold_seconds=SECONDS)
    asyncio.run(handle_a_signal())
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert heard.next() == signal.SIGUSR2
    listening.close()


def test_a_handler_of_ours_that_is_put_back_after_we_are_gone_does_what_was_there_before() -> None:
    code = """
import os, signal, time
from fastckpt.signals import listen
listening = listen([signal.SIGTERM], print, hold_seconds=1)
ours = signal.signal(signal.SIGTERM, lambda *_: None)
listening.close()
signal.signal(signal.SIGTERM, ours)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", code], timeout=SECONDS)
    assert result.returncode == -signal.SIGTERM


def test_a_listener_is_heard_after_another_program_has_reset_the_handler() -> None:
    first = listen([signal.SIGUSR2], lambda _: None, hold_seconds=SECONDS)
    ours = signal.signal(signal.SIGUSR2, lambda *_: None)
    first.close()
    signal.signal(signal.SIGUSR2, signal.SIG_DFL)
    heard = Heard()
    second = listen([signal.SIGUSR2], heard.put, hold_seconds=SECONDS)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert heard.next() == signal.SIGUSR2
    second.close()
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    assert callable(ours)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_does_not_die_of_what_asks_for_a_save() -> None:
    listening = listen([signal.SIGUSR2], lambda _: None, hold_seconds=SECONDS)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGUSR2)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    listening.close()


def test_a_handler_that_is_not_pythons_is_named(caplog: pytest.LogCaptureFixture) -> None:
    faulthandler.register(signal.SIGUSR2)
    try:
        with caplog.at_level(logging.WARNING, "fastckpt"):
            listen([signal.SIGUSR2], lambda _: None, hold_seconds=SECONDS).close()
    finally:
        faulthandler.unregister(signal.SIGUSR2)
    assert "SIGUSR2 has a handler that is not Python's, such as faulthandler's" in caplog.text


def test_a_signal_that_is_held_when_the_listener_closes_still_falls(handled: Callable[[int], Heard]) -> None:
    before, heard = handled(signal.SIGTERM), Heard()
    listening = listen(BOTH, heard.put, hold_seconds=0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    heard.next()
    listening.close()
    run_until(lambda: not before.empty())
    # The main thread puts the rest back when it is here the next time.
    listen([signal.SIGUSR1], heard.put, hold_seconds=SECONDS).close()


def test_listeners_come_and_go_in_any_order() -> None:
    first, second = Heard(), Heard()
    one = listen([signal.SIGUSR1], first.put, hold_seconds=SECONDS)
    two = listen(BOTH, second.put, hold_seconds=SECONDS)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert first.next() == second.next() == signal.SIGUSR1
    assert len(readers()) == 1
    one.close()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert second.next() == signal.SIGUSR1
    assert first.empty()
    two.close()


def test_bytes_are_passed_on_to_the_wakeup_descriptor_from_before(handled: Callable[[int], Heard]) -> None:
    handled(signal.SIGUSR2)  # which is not listened to
    reading, writing = socket.socketpair()
    with reading, writing:
        writing.setblocking(False)
        reading.settimeout(SECONDS)
        previous = signal.set_wakeup_fd(writing.fileno())
        listening = listen([signal.SIGUSR1], lambda _: None, hold_seconds=SECONDS)
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
            assert reading.recv(10) == bytes([number])
        listening.close()
        assert signal.set_wakeup_fd(previous) == writing.fileno()


def test_a_file_that_took_the_number_of_the_descriptor_from_before_is_not_written_to(tmp_path: Path) -> None:
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    previous = signal.set_wakeup_fd(writing.fileno())
    heard = Heard()
    listening = listen([signal.SIGUSR1], heard.put, hold_seconds=SECONDS)
    victim = os.open(tmp_path / "pack", os.O_CREAT | os.O_RDWR)
    os.dup2(victim, writing.fileno())
    os.kill(os.getpid(), signal.SIGUSR1)
    heard.next()
    listening.close()
    assert os.fstat(victim).st_size == 0
    os.close(victim)
    reading.close()
    writing.close()
    signal.set_wakeup_fd(previous)


def test_a_handler_that_is_not_pythons_is_put_back(tmp_path: Path) -> None:
    with (tmp_path / "stacks").open("w+") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        listen([signal.SIGUSR1], lambda _: None, hold_seconds=SECONDS).close()
        os.kill(os.getpid(), signal.SIGUSR1)
        run_until(lambda: (tmp_path / "stacks").stat().st_size > 0)
        faulthandler.unregister(signal.SIGUSR1)


def test_a_handler_set_on_top_of_ours_stays_and_may_pass_on_to_ours(handled: Callable[[int], Heard]) -> None:
    bottom, heard = handled(signal.SIGTERM), Heard()
    listening = listen([signal.SIGTERM], heard.put, hold_seconds=SECONDS)
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)
    signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
    on_top = signal.getsignal(signal.SIGTERM)
    listening.close()
    assert signal.getsignal(signal.SIGTERM) is on_top
    os.kill(os.getpid(), signal.SIGTERM)
    run_until(lambda: not bottom.empty())
    assert heard.empty()
    signal.signal(signal.SIGTERM, ours)
    listen([signal.SIGUSR2], heard.put, hold_seconds=SECONDS).close()


def test_a_listener_closed_on_another_thread_leaves_the_signal_to_the_system_at_once(
    handled: Callable[[int], Heard],
) -> None:
    before, heard = handled(signal.SIGUSR1), Heard()
    ours = action(signal.SIGUSR1)
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    ignored = action(signal.SIGUSR1)
    listening = listen([signal.SIGUSR1], heard.put, hold_seconds=SECONDS)
    assert action(signal.SIGUSR1) == ours
    thread = threading.Thread(target=listening.close)
    thread.start()
    thread.join()
    assert action(signal.SIGUSR1) == ignored
    again = listen([signal.SIGUSR1], heard.put, hold_seconds=SECONDS)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard.next() == signal.SIGUSR1
    again.close()
    assert signal.signal(signal.SIGUSR1, previous) == signal.SIG_IGN
    assert before.empty()


def test_listening_is_for_the_main_thread() -> None:
    caught: list[BaseException] = []

    def elsewhere() -> None:
        try:
            listen(BOTH, lambda _: None, hold_seconds=SECONDS)
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "from the main thread only" in str(caught[0])


def test_where_no_thread_can_be_had_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        listen(BOTH, lambda _: None, hold_seconds=SECONDS)


def test_a_forked_child_dies_of_its_signals_and_its_parent_hears_nothing_of_them() -> None:
    heard = Heard()
    listening = listen(BOTH, heard.put, hold_seconds=SECONDS)
    child = os.fork()
    if child == 0:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SECONDS)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR1)
    assert heard.next() == signal.SIGUSR1, "nothing came before it"
    listening.close()


STUCK = """
import ctypes, signal, threading, os
from fastckpt.signals import listen
listen([signal.SIGTERM], lambda number: os.write(1, number.name.encode()), hold_seconds=0.1)
libc = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
libc.pthread_mutex_lock(mutex)  # never comes back, and Python runs no handler
"""


def test_a_process_whose_main_thread_is_stuck_ends_by_the_signal_when_its_time_is_over() -> None:
    process = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60)
    assert process.returncode == -signal.SIGTERM, process.stderr
    assert process.stdout == "SIGTERM"
    assert "SIGTERM falls to its previous disposition" in process.stderr


def test_a_listener_that_is_collected_in_the_middle_of_a_change_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loop:
        def __init__(self, listening: Listening) -> None:
            self.listening, self.me = listening, self

        def __del__(self) -> None:
            self.listening.close()

    take = signals._hub._take

    def collecting(number: signal.Signals) -> None:
        gc.collect()
        take(number)

    heard = Heard()
    gc.disable()
    try:
        Loop(listen([signal.SIGUSR1], heard.put, hold_seconds=SECONDS))
        monkeypatch.setattr(signals._hub, "_take", collecting)
        listening = listen([signal.SIGTERM], heard.put, hold_seconds=SECONDS)
    finally:
        gc.enable()
    assert signals._hub._listeners == [listening]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    listening.close()
