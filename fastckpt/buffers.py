"""Where bytes rest between tensor and store: sources, sinks, and a pool of page-aligned buffers on one memfd.

The pool is shared memory that is neither inherited by a fork (data loaders fork while direct I/O is in flight) nor
written to core dumps. Freed slots are reused, never returned to the system: fresh pages are slow.
"""

from __future__ import annotations

import mmap
import os
import threading
from typing import Protocol

from fastckpt.errors import AttemptAborted, SaveError


class Source(Protocol):
    """The bytes of one shard, in C order, little-endian. Called from one staging thread at a time."""

    bytes: int

    def fill(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` with the shard's bytes from byte ``offset`` on. Returns when the copy is complete."""


class Sink(Protocol):
    """Takes the elements of one box of one tensor. Any thread may call; regions never overlap."""

    def place(self, offsets: tuple[int, ...], sizes: tuple[int, ...], data: memoryview) -> None:
        """Puts the elements of a region, given in coordinates of the whole tensor and inside the sink's box.
        ``data`` holds exactly the region's bytes in C order, and is the caller's again on return."""


class Slot:
    """One buffer of a pool. ``view`` is writable and page-aligned."""

    def __init__(self, number: int, view: memoryview) -> None:
        self.number = number
        self.view = view


class Pool:
    """``count`` buffers of ``slot_bytes`` each. Any thread may take and give.

    ``SaveError`` if the system does not give the memory, or no descriptor for it.
    """

    def __init__(self, slot_bytes: int, count: int) -> None:
        if slot_bytes <= 0 or count <= 0:
            raise ValueError(f"a pool of {count} slots of {slot_bytes} bytes")
        page = mmap.PAGESIZE
        self.slot_bytes = -(-slot_bytes // page) * page
        self.count = count
        size = self.slot_bytes * count
        try:
            self._map = _shared_memory(size)
        except OSError as error:
            raise SaveError(
                f"cannot get {size} bytes of memory for staging buffers: {error.strerror or error}; lower "
                "Options(staging_bytes_max=...), or raise the limits on memory and open files that the job runs under"
            ) from error
        self._view = memoryview(self._map)
        self._free = list(range(count))
        self._changed = threading.Condition()
        self._cancelled = False

    def take(self) -> Slot:
        """A free slot; waits for one. ``AttemptAborted`` once the pool is cancelled."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._cancelled)
            if self._cancelled:
                raise AttemptAborted("the attempt was given up while it waited for a staging buffer")
            number = self._free.pop()
        start = number * self.slot_bytes
        return Slot(number, self._view[start : start + self.slot_bytes])

    def give(self, slot: Slot) -> None:
        """Returns a slot; its view must not be used any more."""
        slot.view.release()
        with self._changed:
            self._free.append(slot.number)
            self._changed.notify()

    def cancel(self) -> None:
        """Wakes everyone who waits in ``take``, with ``AttemptAborted``."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    def reset(self) -> None:
        """Makes a cancelled pool usable again. Every slot must have been given back."""
        with self._changed:
            assert len(self._free) == self.count, "a slot is still in use"
            self._cancelled = False

    def close(self) -> bool:
        """Unmaps the memory if nobody holds a view of it any more, and says whether that is so: the traceback of a
        failure may hold one for a while, and a call to the storage that was left behind until it comes back."""
        try:
            self._view.release()
            self._map.close()
        except BufferError:
            return False
        return True


def _shared_memory(size: int) -> mmap.mmap:
    if not hasattr(os, "memfd_create"):  # not Linux
        return mmap.mmap(-1, size)
    descriptor = os.memfd_create("fastckpt-staging", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
    finally:
        os.close(descriptor)
    memory.madvise(mmap.MADV_DONTFORK)
    memory.madvise(mmap.MADV_DONTDUMP)
    return memory
