"""The ranks of a torch job as a ``Group``: over a clone of the job's own key-value store, never its process groups."""

from __future__ import annotations

import itertools
import os
import platform
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fastckpt.errors import CommitTimeout
from fastckpt.group import Group, KeyValue, KeyValueGroup, SoloGroup, decode_reply, encode_reply, missing_ranks_error

T = TypeVar("T")

_numbers = itertools.count()
_POLL_SECONDS_MAX = 0.1
_ANSWER_SECONDS = 2.0
"""A call to the key-value store that takes this much longer than it was told to is given up."""


def next_group_number() -> int:
    """Counts the groups of this process; ranks that make theirs in the same order have the same numbers."""
    return next(_numbers)


def job_group(seconds_max: float, number: int) -> Group:
    """The group of this process's job, one of those with this number on all ranks.

    ``RuntimeError`` if the launcher says there are several ranks but no process group has been made.
    """
    if not (dist.is_available() and dist.is_initialized()):
        world = os.environ.get("WORLD_SIZE", "1")
        if world.isdigit() and int(world) > 1:
            raise RuntimeError(
                f"WORLD_SIZE is {world}, but torch.distributed has no process group: every rank would save a snapshot "
                "of its own over the others'. Call torch.distributed.init_process_group() before making a Checkpointer"
            )
        return SoloGroup()
    if dist.get_world_size() == 1:
        return SoloGroup()
    kv = StoreKeyValue(dist.distributed_c10d._get_default_store())
    rank, size = dist.get_rank(), dist.get_world_size()
    incarnation = agree_on_incarnation(kv, rank, size, f"fastckpt/{number}", seconds_max)
    return KeyValueGroup(kv, rank, size, f"fastckpt/{incarnation}", _node(), seconds_max)


def _node() -> str:
    """Equal on ranks of one node, different elsewhere. Launchers' local ranks say nothing certain about nodes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()}/{boot.read_text().strip() if boot.exists() else ''}"


class StoreKeyValue:
    """A torch ``Store`` whose calls come back in time, whatever the server does.

    One client serialises its calls (a waiting thread blocks another's ``set``), so each thread that waits gets a clone;
    and a call may outlast the timeout it was given, so each runs on a thread that can be left behind.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._idle: list[_Client] = []

    def set(self, key: str, value: bytes) -> None:
        self._call(lambda store: store.set(key, value), 60.0)

    def get(self, key: str, seconds: float) -> bytes | None:
        end = time.monotonic() + seconds

        def wait(store: Any) -> bytes | None:
            # Asking again and again, ever less often: torch's own wait logs a warning whenever it times out.
            start = time.monotonic()
            while not store.check([key]):
                now = time.monotonic()
                if now >= end:
                    return None
                time.sleep(min(_POLL_SECONDS_MAX, max(0.0005, (now - start) / 10), end - now))
            return bytes(store.get(key))

        return self._call(wait, seconds + _ANSWER_SECONDS)

    def delete(self, keys: Sequence[str]) -> None:
        def delete(store: Any) -> None:
            for key in keys:
                store.delete_key(key)

        self._call(delete, 60.0)

    def _call(self, call: Callable[[Any], T], seconds: float) -> T:
        with self._lock:
            client = self._idle.pop() if self._idle else _Client(self._store)
        try:
            result = client.call(call, seconds)
        except Exception as error:
            if not isinstance(error, TimeoutError):
                with self._lock:
                    self._idle.append(client)
            raise CommitTimeout(
                f"the job's key-value store failed ({type(error).__name__}: {error}); the process that serves it, "
                "rank 0 or the launcher, may be gone"
            ) from error
        with self._lock:  # not reached by a client that did not come back: it is left to its fate
            self._idle.append(client)
        return result


class _Client:
    """A clone of the store and the thread that makes and calls it: connecting can hang as well as any call."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._calls: queue.SimpleQueue[tuple[Callable[[Any], Any], queue.SimpleQueue[tuple[bool, Any]]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._run, name="fastckpt-store", daemon=True).start()

    def _run(self) -> None:
        clone = None
        while True:
            call, results = self._calls.get()
            try:
                if clone is None:
                    clone = self._store.clone()
                results.put((True, call(clone)))
            except BaseException as error:
                results.put((False, error))

    def call(self, call: Callable[[Any], T], seconds: float) -> T:
        results: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
        self._calls.put((call, results))
        try:
            succeeded, result = results.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError(f"the job's key-value store did not answer for {seconds:.0f} s") from None
        if not succeeded:
            raise result
        return result  # type: ignore[no-any-return]


def agree_on_incarnation(kv: KeyValue, rank: int, size: int, prefix: str, seconds_max: float) -> str:
    """A name for these keys that all ranks of this incarnation of the job have, and no earlier one had.

    A launcher may keep its key-value store when it restarts the workers, and with it what the dead ones posted last. So
    each rank posts a token of its own making; rank 0 answers under the token, answers again when it finds the token
    replaced by a later one, and is done when every rank has confirmed under the name it was given. ``CommitTimeout``
    names the ranks that did not come within ``seconds_max``.
    """
    end = time.monotonic() + seconds_max
    name = secrets.token_hex(8)
    if rank:
        token = secrets.token_hex(8)
        kv.set(f"{prefix}/token/{rank}", token.encode())
        answer = kv.get(f"{prefix}/name/{token}", seconds_max + 2)
        if answer is None:
            raise missing_ranks_error([0], _ALL_RANKS)
        name = answer.decode()
        kv.set(f"{prefix}/{name}/confirmed/{rank}", b"")
        outcome = kv.get(f"{prefix}/{name}/outcome", max(0.0, end - time.monotonic()) + 2)
        reply = missing_ranks_error([0], _ALL_RANKS) if outcome is None else decode_reply(outcome)
        if isinstance(reply, BaseException):
            raise reply
        return name
    waiting = list(range(1, size))
    answered: dict[int, bytes] = {}
    while waiting and time.monotonic() < end:
        for member in list(waiting):
            token_seen = kv.get(f"{prefix}/token/{member}", 0.0 if member in answered else 0.01)
            if token_seen is not None and answered.get(member) != token_seen:
                kv.set(f"{prefix}/name/{token_seen.decode()}", name.encode())
                answered[member] = token_seen
            if member in answered and kv.get(f"{prefix}/{name}/confirmed/{member}", 0.01) is not None:
                waiting.remove(member)
    failure = missing_ranks_error(waiting, _ALL_RANKS) if waiting else None
    kv.set(f"{prefix}/{name}/outcome", encode_reply(failure or b""))
    if failure is not None:
        raise failure
    return name


_ALL_RANKS = "all ranks to create their Checkpointer"
