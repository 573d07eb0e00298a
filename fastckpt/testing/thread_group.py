"""ThreadGroup: the ranks of a job as threads of one process, speaking over memory by the real ``KeyValueGroup``."""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fastckpt.group import Group, KeyValueGroup

_Result = TypeVar("_Result")


class RanksRaised(Exception):
    """One or more ranks of a ``ThreadGroup`` raised; ``errors`` maps each of them to what it raised.

    The lowest rank's error is the cause; the others' tracebacks are notes.
    """

    def __init__(self, errors: Mapping[int, BaseException]) -> None:
        self.errors = dict(sorted(errors.items()))
        lines = (f"rank {rank}: {type(error).__name__}: {error}" for rank, error in self.errors.items())
        super().__init__("\n".join(lines))
        self.__cause__, *others = self.errors.values()
        for error in others:
            self.add_note("".join(traceback.format_exception(error)))


class MemoryKeyValue:
    """The key-value store of a job whose ranks are threads. Any thread may call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str, seconds: float) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, seconds)
            return self._values.get(key)

    def delete(self, keys: Sequence[str]) -> None:
        with self._changed:
            for key in keys:
                self._values.pop(key, None)

    def keys(self) -> list[str]:
        """What is there now, sorted."""
        with self._changed:
            return sorted(self._values)


class ThreadGroup:
    """``size`` ranks as threads. ``nodes`` names each rank's node; without it all are on one.

    ::

        group = ThreadGroup(4, nodes=["a", "a", "b", "b"])
        ranks = group.run(lambda group: group.rank)     # [0, 1, 2, 3]

    ``run`` and ``outcomes`` may be called again and again, one at a time; each starts new threads and new groups over
    the same ``key_value``. Neither hangs: a rank that has not returned ``seconds_max`` after the start counts as having
    raised ``TimeoutError``, which says where it is; its thread is a daemon and is left behind.
    """

    def __init__(self, size: int, nodes: Sequence[str] | None = None, *, seconds_max: float = 60.0) -> None:
        if size < 1:
            raise ValueError(f"a group of {size} ranks")
        if nodes is not None and len(nodes) != size:
            raise ValueError(f"nodes names the nodes of {len(nodes)} ranks, but size is {size}")
        self.size = size
        self.nodes = tuple(nodes) if nodes is not None else ("node",) * size
        self.seconds_max = seconds_max
        self.key_value = MemoryKeyValue()
        """What the ranks speak through; empty between runs if every exchange was completed by all."""
        self._runs = itertools.count()

    def run(self, function: Callable[[Group], _Result]) -> list[_Result]:
        """Calls ``function`` with each rank's own group, all at once, and returns the results by rank. If any rank
        raised, ``RanksRaised`` with the errors of all that did."""
        results, errors = self._call(function)
        if errors:
            raise RanksRaised(errors)
        return [results[rank] for rank in range(self.size)]

    def outcomes(self, function: Callable[[Group], _Result]) -> list[_Result | BaseException]:
        """Like ``run``, but returns what a rank raised, ``Killed`` and the like included, in place of its result."""
        results, errors = self._call(function)
        return [errors[rank] if rank in errors else results[rank] for rank in range(self.size)]

    def _call(self, function: Callable[[Group], _Result]) -> tuple[dict[int, _Result], dict[int, BaseException]]:
        prefix = f"run-{next(self._runs)}"
        results: dict[int, _Result] = {}
        errors: dict[int, BaseException] = {}

        def rank_thread(rank: int) -> None:
            try:
                group = KeyValueGroup(self.key_value, rank, self.size, prefix, self.nodes[rank], self.seconds_max)
                results[rank] = function(group)
            except BaseException as error:
                errors[rank] = error

        threads = [
            threading.Thread(target=rank_thread, args=(rank,), name=f"rank-{rank}", daemon=True)
            for rank in range(self.size)
        ]
        end = time.monotonic() + self.seconds_max
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        # Copies: a thread that is left behind may still write to the originals.
        late = {rank: self._late(rank, thread) for rank, thread in enumerate(threads) if thread.is_alive()}
        return dict(results), {**errors, **late}

    def _late(self, rank: int, thread: threading.Thread) -> TimeoutError:
        frame = sys._current_frames().get(thread.ident or 0)
        place = "".join(traceback.format_stack(frame)) if frame else ""
        return TimeoutError(f"rank {rank} has not returned after {self.seconds_max:g} s; it is here:\n{place}")
