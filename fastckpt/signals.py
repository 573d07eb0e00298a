"""Signals of this process as requests: heard at once on a thread of its own, whatever the main thread is stuck in.

Python runs a signal's handler on the main thread, and not before that is back in Python: a rank that waits in a
collective for one that is dead never gets there. The byte that the interpreter writes to its wakeup descriptor when the
signal arrives is written by the C handler, at once. One thread a process reads these bytes, tells who listens, and
holds the deadlines of signals that ask the process to end.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("fastckpt")

SAVING = frozenset({signal.SIGUSR1, signal.SIGUSR2})
"""Ask for something, and leave the process as it is."""
ENDING = frozenset({signal.SIGTERM, signal.SIGINT})
"""Ask the process to end."""

_SIGACTION_BYTES = 1024
"""More than any system's ``struct sigaction`` has."""


class Listening:
    """One listener to some signals, until ``close``. Any thread may call."""

    def __init__(
        self, signals: Sequence[signal.Signals], heard: Callable[[signal.Signals], None], hold_seconds: float
    ) -> None:
        self._signals = frozenset(signals)
        self._heard = heard
        self._hold_seconds = hold_seconds
        self._done = False

    def renew(self) -> None:
        """On the main thread, now and then: goes on listening where somebody, such as an event loop that has ended,
        has taken the interpreter's wakeup descriptor away. Till then they are heard when Python runs its handlers."""
        _hub.renew()

    def done(self) -> None:
        """What signals of ``ENDING`` that have come asked for is being done: they do not fall to the previous
        disposition. One that comes later is not told, and falls in its time."""
        self._done = True
        _hub.let_go(self._signals)

    def close(self) -> None:
        """Listens no more. The previous dispositions come back with the last listener; that of a signal that still
        waits for ``done``, once its time is over."""
        _hub.remove(self)


def listen(
    signals: Sequence[signal.Signals], heard: Callable[[signal.Signals], None], *, hold_seconds: float
) -> Listening:
    """Calls ``heard`` with each of ``signals`` as it arrives, on the thread that reads them; it must not block.

    A previous Python handler of a signal in ``SAVING`` is called as well. One in ``ENDING`` falls to the previous
    disposition ``hold_seconds`` after it arrived, unless a listener calls ``done`` by then: what ended the process,
    ends it then; a Python handler is called on the main thread; what was ignored, is. ``RuntimeError`` on any thread
    but the main one, where the interpreter does not let signals be handled, and if no thread can be started.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("signals can be handled from the main thread only")
    listening = Listening(signals, heard, hold_seconds)
    _hub.add(listening)
    return listening


@dataclass
class _Taken:
    """A signal whose handler is ours."""

    previous: Any
    """What ``signal.getsignal`` said: a callable, SIG_DFL, SIG_IGN, or None for a handler that is not Python's."""
    action: ctypes.Array[ctypes.c_char]
    """The same as the system sees it; kept and put back as it is."""
    echoes: int = 0
    """Arrivals still to be read that are our own doing."""
    fallen: bool = False
    """The previous handler is to be called on the main thread."""
    given_back: bool = False
    """For the system, but not for the interpreter, which has to be told on the main thread."""


class _Wakeup:
    """The interpreter's wakeup descriptor, and the one that was there before."""

    def __init__(self) -> None:
        self.reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._previous = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        self._identity = _identity(self._previous)

    def forward(self, data: bytes) -> None:
        # Its owner may have closed it, and the number may be some other file's by now.
        if self._identity is not None and _identity(self._previous) == self._identity:
            with contextlib.suppress(OSError):
                os.write(self._previous, data)

    def replaced(self) -> bool:
        """On the main thread: whether the interpreter writes elsewhere by now. A descriptor that was taken away, as an
        event loop does when it ends, is put back; one that was put in the place of ours stays."""
        current = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        if current not in (-1, self._writing.fileno()):
            signal.set_wakeup_fd(current)
        return current != self._writing.fileno()

    def tell(self, number: int) -> None:
        """What the interpreter would have written."""
        with contextlib.suppress(OSError):
            self._writing.send(bytes([number]))

    def close(self) -> bool:
        """On the main thread. False if someone has put a descriptor on top of ours, and may write to ours still."""
        current = signal.set_wakeup_fd(-1)
        if current != self._writing.fileno():
            signal.set_wakeup_fd(current, warn_on_full_buffer=False)
            return False
        if self._identity is not None and _identity(self._previous) == self._identity:
            signal.set_wakeup_fd(self._previous, warn_on_full_buffer=False)
        self._writing.close()  # the reader finds the end, and closes its own
        return True

    def abandon(self) -> None:
        """In a forked child: what it wrote would be read by the parent."""
        signal.set_wakeup_fd(-1)
        self._writing.close()
        self.reading.close()


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _Hub:
    """What this process listens to. One object a process.

    The garbage collector may close a listener on any thread at any moment, also in the middle of a change: so the lock
    may be taken again by its holder, who then only leaves word that there is more to change.
    """

    def __init__(self) -> None:
        self._forget()
        os.register_at_fork(after_in_child=self._after_fork)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._listeners: list[Listening] = []
        self._taken: dict[signal.Signals, _Taken] = {}
        self._held: dict[signal.Signals, float] = {}
        """Until when a signal waits for ``done``, on ``time.monotonic()``."""
        self._wakeup: _Wakeup | None = None
        self._settling = False
        self._unsettled = False

    def add(self, listening: Listening) -> None:
        with self._lock:
            self._listeners.append(listening)
            try:
                self._settle()
            except BaseException:
                self._listeners.remove(listening)
                raise

    def remove(self, listening: Listening) -> None:
        with self._lock:
            if listening in self._listeners:
                self._listeners.remove(listening)
                self._settle()

    def renew(self) -> None:
        if self._wakeup is not None and threading.current_thread() is threading.main_thread():
            self._wakeup.replaced()

    def let_go(self, signals: frozenset[signal.Signals]) -> None:
        with self._lock:
            for number in signals:
                self._held.pop(number, None)

    def _wanted(self) -> set[signal.Signals]:
        return {number for listening in self._listeners for number in listening._signals} | set(self._held)

    def _settle(self) -> None:
        self._unsettled = True
        if self._settling:
            return
        self._settling = True
        try:
            while self._unsettled:
                self._unsettled = False
                self._settle_once()
        finally:
            self._settling = False

    def _settle_once(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            # Only the system's side of it; the interpreter's is put right when the main thread is here again.
            for number, taken in list(self._taken.items()):
                if number not in self._wanted() and signal.getsignal(number) == self._handle:
                    _sigaction(number, taken.action, None)
                    taken.given_back = True
            return
        for number, taken in list(self._taken.items()):
            if taken.given_back or number not in self._wanted():
                self._give_back(number)
        if self._wanted() and self._wakeup is None:
            self._wakeup = self._listen()
        for number in self._wanted():
            # One that was taken may have been reset by whoever put a handler on top of ours: nothing would be heard.
            if number not in self._taken or not callable(signal.getsignal(number)):
                self._take(number)
        if not self._taken and self._wakeup is not None and self._wakeup.close():
            self._wakeup = None

    def _listen(self) -> _Wakeup:
        wakeup = _Wakeup()
        try:
            threading.Thread(target=self._read, args=(wakeup,), name="fastckpt-signals", daemon=True).start()
        except BaseException:  # the system gives no thread
            wakeup.close()
            wakeup.reading.close()
            raise
        return wakeup

    def _take(self, number: signal.Signals) -> None:
        action = ctypes.create_string_buffer(_SIGACTION_BYTES)
        _sigaction(number, None, action)
        previous = signal.getsignal(number)
        if not callable(previous) and _handler(action) not in (signal.SIG_DFL, signal.SIG_IGN):
            log.warning(
                "%s has a handler that is not Python's, such as faulthandler's: it is not called while a Callback "
                "listens; use another signal for one of the two, or Callback(signals=())",
                number.name,
            )
        self._taken[number] = _Taken(previous, action)
        signal.signal(number, self._handle)

    def _give_back(self, number: signal.Signals) -> None:
        """Puts back what was there before, unless someone has put a handler on top of ours: it may call ours, which
        from now on only passes on."""
        if signal.getsignal(number) == self._handle:
            taken = self._taken.pop(number)
            signal.signal(number, signal.SIG_DFL if taken.previous is None else taken.previous)
            _sigaction(number, taken.action, None)

    def _handle(self, number: int, frame: Any) -> None:
        """The handler, on the main thread, between any two of its instructions: takes no lock."""
        taken, wakeup = self._taken.get(signal.Signals(number)), self._wakeup
        if wakeup is not None and wakeup.replaced():
            wakeup.tell(number)
        if taken is None:
            return
        heard = any(number in listening._signals for listening in list(self._listeners)) or number in self._held
        if callable(taken.previous):
            if number in SAVING or taken.fallen or not heard:
                taken.fallen = False
                taken.previous(number, frame)
        elif not heard and taken.previous != signal.SIG_IGN:
            # Somebody who had put a handler on top of ours has put ours back after the last listener had gone.
            signal.signal(number, signal.SIG_DFL)
            _sigaction(number, taken.action, None)
            os.kill(os.getpid(), number)

    def _read(self, wakeup: _Wakeup) -> None:
        with wakeup.reading:
            while True:
                with self._lock:
                    first = min(self._held.values(), default=None)
                wakeup.reading.settimeout(None if first is None else max(0.001, first - time.monotonic()))
                try:
                    data = wakeup.reading.recv(4096)
                    if not data:
                        return
                    wakeup.forward(data)
                    for byte in data:
                        self._hear(byte)
                except TimeoutError:
                    pass
                self._fall_back()

    def _hear(self, byte: int) -> None:
        with self._lock:
            number = next((number for number in self._taken if number == byte), None)
            if number is None:
                return
            if self._taken[number].echoes:
                self._taken[number].echoes -= 1
                return
            listeners = [each for each in self._listeners if number in each._signals]
            if number in ENDING and listeners:
                seconds = min(listening._hold_seconds for listening in listeners)
                self._held.setdefault(number, time.monotonic() + seconds)
        for listening in listeners:
            if not listening._done:
                listening._heard(number)

    def _fall_back(self) -> None:
        with self._lock:
            now = time.monotonic()
            over = {number: self._taken[number] for number, until in self._held.items() if until <= now}
            for number in over:
                del self._held[number]
        for number, taken in over.items():
            self._fall(number, taken)

    def _fall(self, number: signal.Signals, taken: _Taken) -> None:
        if taken.previous == signal.SIG_IGN:
            return
        if callable(taken.previous):
            taken.echoes += 1
            taken.fallen = True
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            return
        # Logging may be stuck with the main thread, which may hold its lock: the end does not wait for it.
        said = threading.Thread(target=self._say, args=(number,), daemon=True)
        said.start()
        said.join(0.5)
        _sigaction(number, taken.action, None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)

    @staticmethod
    def _say(number: signal.Signals) -> None:
        log.warning(
            "%s falls to its previous disposition: the end of the agreed step was not reached in time; a rank may be "
            "dead or stuck, or a step take longer than agree_seconds",
            number.name,
        )

    def _after_fork(self) -> None:
        """A forked child, such as a loader's worker, dies of its signals as it would have; the parent hears its own.
        Only what asks for a save, and may be sent to all processes of a job, is nothing to die of."""
        taken, wakeup = self._taken, self._wakeup
        self._forget()
        if wakeup is not None:
            wakeup.abandon()
        for number, before in taken.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL if before.previous is None else before.previous)
                _sigaction(number, before.action, None)
                if number in SAVING and signal.getsignal(number) == signal.SIG_DFL == _handler(before.action):
                    signal.signal(number, signal.SIG_IGN)


def _handler(action: ctypes.Array[ctypes.c_char]) -> int:
    """Where the system's handler is, or SIG_DFL or SIG_IGN: the first member of the structure, wherever it was looked
    up."""
    return int.from_bytes(action.raw[: ctypes.sizeof(ctypes.c_void_p)], sys.byteorder)


def _sigaction(number: int, new: Any, old: Any) -> None:
    if ctypes.CDLL(None).sigaction(ctypes.c_int(number), new, old) != 0:
        raise OSError(f"sigaction refused signal {number}")


_hub = _Hub()
