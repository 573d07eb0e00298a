"""Staging memory: one pool, kept from save to save, of what the machine can spare, pinned where accelerators copy."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from fastckpt.buffers import Pool

log = logging.getLogger("fastckpt")


class StagingMemory:
    """The pool of one rank's saves. One thread at a time."""

    def __init__(self, bytes_max: int | None, ranks_on_node: int) -> None:
        """``bytes_max``: the budget; None for a quarter of the memory available, divided by the ranks of the node."""
        self._bytes_max = bytes_max
        self._ranks_on_node = ranks_on_node
        self._pool: Pool | None = None
        self._unpin: Callable[[], None] = _nothing
        self._in_use: list[Pool] = []
        """Earlier ones that somebody still held a view of."""

    def pool(self, bytes_within: Callable[[int], int], devices: Iterable[torch.device], *, in_use: bool) -> Pool:
        """The pool for a save, which within a budget makes use of ``bytes_within(budget)``. A new one if that is more
        than there is, or if somebody may still use the one there is (``in_use``, or a slot that did not come back from
        a save that failed). ``SaveError`` if there is no memory.
        """
        self._in_use = [pool for pool in self._in_use if not pool.close()]
        wanted = bytes_within(self._bytes_max or _budget_bytes(self._ranks_on_node))
        if self._pool is not None and (self._pool.bytes < wanted or in_use or not self._pool.is_whole):
            self.close()
        if self._pool is None:
            self._pool = Pool(wanted)
            self._unpin = _pin(self._pool, devices)
        self._pool.reset()
        return self._pool

    def cancel(self) -> None:
        """Fails whoever waits for memory. Any thread."""
        pool = self._pool  # which the thread of a save may be about to close
        if pool is not None:
            pool.cancel()

    def close(self) -> None:
        """Gives the memory back, and that of earlier pools that were still in use."""
        self._unpin()
        self._unpin = _nothing
        self._in_use = [pool for pool in (*self._in_use, self._pool) if pool is not None and not pool.close()]
        self._pool = None


def _nothing() -> None:
    pass


def _pin(pool: Pool, devices: Iterable[torch.device]) -> Callable[[], None]:
    """Registers the memory with the CUDA or HIP runtime, if any tensor is there; what is returned undoes that, and must
    be called before the memory is unmapped. Other accelerators have no call for memory that is there already: copies
    from them go through memory of their driver's. So do all where the system refuses to pin as much."""
    if not any(device.type == "cuda" for device in devices):
        return _nothing
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(pool.address, pool.bytes, 0))
    if error:
        log.info(
            "%d bytes of staging memory cannot be pinned (error %d of the CUDA runtime): copies from the device are "
            "slower; raise the limit of locked memory (ulimit -l), or lower Options(staging_bytes_max=...)",
            pool.bytes,
            error,
        )
        return _nothing
    return lambda: runtime.cudaHostUnregister(pool.address) and None


def _budget_bytes(ranks_on_node: int) -> int:
    """The default staging budget, of which no more than its share of the snapshot is used: a quarter of what memory is
    available, divided by the ranks of the node."""
    return max(1, _available_bytes() // 4 // ranks_on_node)


def _available_bytes() -> int:
    """Memory this process may still use: the machine's, or its control group's if that is less."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such control group, or "max"
    return max(available, 0)
