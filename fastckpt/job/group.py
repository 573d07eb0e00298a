"""The ranks of a torch job as a ``Group``: over a clone of the job's own key-value store, never its process groups."""

from __future__ import annotations

import datetime
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

import torch
import torch.distributed as dist

from fastckpt.errors import CommitTimeout
from fastckpt.group import Group, KeyValueGroup, SoloGroup

T = TypeVar("T")

_numbers = itertools.count()
_SLICE_SECONDS = 1.0
"""Longest single wait inside the store, so that a call that was given up ends soon after."""


def job_group(seconds_max: float) -> Group:
    """The group of this process's job. All ranks create their Checkpointers in the same order, on the thread that runs
    the job's collectives: one broadcast tells this incarnation of the job from earlier ones.

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
    # A launcher may keep its key-value store when it restarts the workers, and with it what the dead ones posted last:
    # every incarnation needs keys of its own.
    nonce = torch.tensor([secrets.randbits(62)], device=dist.distributed_c10d._get_pg_default_device())
    dist.broadcast(nonce, 0)
    prefix = f"fastckpt/{int(nonce.item()):016x}/{next(_numbers)}"
    kv = StoreKeyValue(dist.distributed_c10d._get_default_store())
    return KeyValueGroup(kv, dist.get_rank(), dist.get_world_size(), prefix, _node(), seconds_max)


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
            while True:
                left = max(0.001, min(_SLICE_SECONDS, end - time.monotonic()))
                try:
                    store.wait([key], datetime.timedelta(seconds=left))
                except (dist.DistStoreError, RuntimeError) as error:
                    if not _is_timeout(error):
                        raise
                    if time.monotonic() >= end:
                        return None
                else:
                    return bytes(store.get(key))

        return self._call(wait, seconds + 2 * _SLICE_SECONDS)

    def delete(self, keys: Sequence[str]) -> None:
        def delete(store: Any) -> None:
            for key in keys:
                store.delete_key(key)

        self._call(delete, 60.0)

    def _call(self, call: Callable[[Any], T], seconds: float) -> T:
        with self._lock:
            client = self._idle.pop() if self._idle else _Client(self._store.clone())
        try:
            result = client.call(call, seconds)
        except Exception as error:
            raise CommitTimeout(
                f"the job's key-value store failed ({type(error).__name__}: {error}); the process that serves it, "
                "rank 0 or the launcher, may be gone"
            ) from error
        with self._lock:  # not reached by a client that did not come back: it is left to its fate
            self._idle.append(client)
        return result


class _Client:
    """A clone of the store and the thread that calls it."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._calls: queue.SimpleQueue[tuple[Callable[[Any], Any], queue.SimpleQueue[tuple[bool, Any]]]] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._run, name="fastckpt-store", daemon=True).start()

    def _run(self) -> None:
        while True:
            call, results = self._calls.get()
            try:
                results.put((True, call(self._store)))
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


def _is_timeout(error: Exception) -> bool:
    return "timeout" in str(error).lower() or "timed out" in str(error).lower()
