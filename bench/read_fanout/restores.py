"""What every rank of the benchmark does: restores in all ways, from storage that it shares with the others."""

from __future__ import annotations

import ctypes
import fcntl
import platform
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from bench.compare.harness import Case, Measures, alternate, drop_page_cache, together, world
from fastckpt import Checkpointer, Options
from fastckpt.storage.local import LocalStore

STORAGES = {"memory": None, "the disk as it is": None, "1 GB/s": 1e9, "0.5 GB/s": 0.5e9}
"""What all nodes share, in bytes/s; None for as much as there is. Memory is a tmpfs."""
MEMORY = Path("/dev/shm")
FANOUTS: tuple[Literal["node", "job"], ...] = ("node", "job")
_CLONE_NEWUTS = 0x04000000


class SharedStorage:
    """Delays the reads of all processes to a rate that they share."""

    def __init__(self, clock: Path) -> None:
        self._clock = clock
        self.bytes_per_second: float | None = None
        self.bytes = 0
        read_into = LocalStore.read_into

        def shared(store: LocalStore, name: str, offset: int, buffer: memoryview) -> None:
            until = self._turn(len(buffer))
            read_into(store, name, offset, buffer)
            self.bytes += len(buffer)
            time.sleep(max(0.0, until - time.monotonic()))

        LocalStore.read_into = shared  # type: ignore[method-assign]

    def _turn(self, size: int) -> float:
        """When this read may be done, given all before it."""
        if self.bytes_per_second is None:
            return 0.0
        with self._clock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            (last,) = struct.unpack("d", file.read(8))
            until: float = max(last, time.monotonic()) + size / self.bytes_per_second
            file.seek(0)
            file.write(struct.pack("d", until))
        return until


def restores(directory: str, memory: str, size: int, runs: int) -> list[dict[str, Any]]:
    """Every way, on each of the ranks. ``memory``: where a repository may be that is read without a disk."""
    rank = world()[1]
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUTS):
        raise OSError(ctypes.get_errno(), "cannot have a host name of its own")
    socket.sethostname(f"node{rank}")
    platform._uname_cache = None  # type: ignore[attr-defined] # importing torch has asked for it
    folder = Path(directory)
    clock = folder / "clock"
    if rank == 0:
        clock.write_bytes(bytes(8))
    together()
    storage = SharedStorage(clock)
    urls = dict.fromkeys(STORAGES, str(folder / "repository"))
    urls["memory"] = memory
    saved = torch.arange(size // 8).view(torch.float32)
    for url in sorted({*urls.values()}):
        with Checkpointer(url) as ckpt:
            ckpt.save(1, {"t": saved}).wait()
    state = torch.zeros_like(saved)

    def restore(fanout: Literal["node", "job"], name: str) -> Case:
        def case(ready: Callable[[], None]) -> Measures:
            with Checkpointer(urls[name], options=Options(read_fanout=fanout)) as ckpt:
                state.zero_()
                drop_page_cache(folder)
                storage.bytes_per_second, storage.bytes = STORAGES[name], 0
                ready()
                start = time.perf_counter()
                ckpt.restore({"t": state})
                seconds = time.perf_counter() - start
                storage.bytes_per_second = None
            assert torch.equal(state.view(torch.int64), saved.view(torch.int64))
            return {"seconds": seconds, "read_bytes": storage.bytes}

        return case

    cases = {name_case(fanout, name): restore(fanout, name) for name in STORAGES for fanout in FANOUTS}
    return alternate(cases, runs, 64 << 20)


def name_case(fanout: str, storage: str) -> str:
    return f"{fanout}, {storage}"
