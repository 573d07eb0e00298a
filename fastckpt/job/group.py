"""The ranks of a torch job as a ``Group``: over a clone of the job's own key-value store, never its process groups."""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fastckpt.errors import CommitTimeout
from fastckpt.group import Group, KeyValue, KeyValueGroup, SoloGroup, decode_reply, encode_reply, missing_ranks_error
from fastckpt.storage.deadline import Callers, NoAnswer

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
    kv = StoreKeyValue(dist.distributed_c10d._get_default_store(), seconds_max)
    rank, size = dist.get_rank(), dist.get_world_size()
    end = time.monotonic() + seconds_max
    incarnation = agree_on_incarnation(kv, rank, size, f"fastckpt/{number}", seconds_max)
    # All are there now: only one that dies at this very moment is still waited for.
    seconds_left = max(_ANSWER_SECONDS, end - time.monotonic())
    host = _host(dist.distributed_c10d._get_default_store())
    return KeyValueGroup(kv, rank, size, f"fastckpt/{incarnation}", _node(), seconds_left, host)


def _node() -> str:
    """Equal on ranks of one node, different elsewhere. Launchers' local ranks say nothing certain about nodes."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()}/{boot.read_text().strip() if boot.exists() else ''}"


def _host(store: Any) -> str:
    """Where other nodes reach this one: at the address from which it reaches the job's key-value store, or, where that
    is its own, under the name that all know the store's node by."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    if not hasattr(store, "host"):  # a store of files
        return socket.gethostname()
    found: list[Any] = []
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(store.host, store.port, type=socket.SOCK_DGRAM)
    for family, kind, protocol, _, address in found:
        with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:  # nothing is sent
            probe.connect(address)
            own: str = probe.getsockname()[0]
            return str(store.host) if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own
    return socket.gethostname()


class StoreKeyValue:
    """A torch ``Store`` whose calls come back in time, whatever the server does.

    One client serialises its calls (a waiting thread blocks another's ``set``), so calls at the same time have a clone
    each; and connecting, or a call, may outlast the timeout it was given, so each runs on a thread that can be left
    behind. Clones are used again: a new connection for every look at a key would be most of what the server does.
    """

    def __init__(self, store: Any, seconds_max: float = 60.0) -> None:
        """``seconds_max``: the longest that ``set`` and ``delete`` may take."""
        self._store = store
        self._seconds_max = seconds_max
        self._callers = Callers("fastckpt-key-value")
        self._process = os.getpid()
        self._idle: list[Any] = []
        """Clones that no call is using."""

    def set(self, key: str, value: bytes) -> None:
        self._call(lambda store: store.set(key, value), self._seconds_max)

    def get(self, key: str, seconds: float) -> bytes | None:
        end = time.monotonic() + seconds

        def wait(store: Any) -> bytes | None:
            # Asking again and again, ever less often: torch's own wait logs a warning whenever it times out.
            start = time.monotonic()
            while not store.check([key]):
                now = time.monotonic()
                if now >= end:
                    return None
                time.sleep(min(_POLL_SECONDS_MAX, max(0.0005, (now - start) / 50), end - now))
            return bytes(store.get(key))

        return self._call(wait, seconds + _ANSWER_SECONDS)

    def delete(self, keys: Sequence[str]) -> None:
        def delete(store: Any) -> None:
            for key in keys:
                store.delete_key(key)

        self._call(delete, self._seconds_max)

    def _call(self, call: Callable[[Any], T], seconds: float) -> T:
        def run() -> T:
            if os.getpid() != self._process:  # a forked child would speak over its parent's connections
                self._process, self._idle = os.getpid(), []
            try:
                clone = self._idle.pop()
            except IndexError:
                clone = self._store.clone()
            result = call(clone)
            self._idle.append(clone)  # not after an error: the connection may be broken
            return result

        try:
            return self._callers.start(run).result(seconds)
        except Exception as error:
            late = f"it did not answer for {seconds:.0f} s"
            raise CommitTimeout(
                "the job's key-value store failed "
                f"({late if isinstance(error, NoAnswer) else f'{type(error).__name__}: {error}'}); the process that "
                "serves it, rank 0 or the launcher, may be gone"
            ) from error


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
