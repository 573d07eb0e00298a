"""Where bytes rest between tensor and store: sources, sinks, and a pool of page-aligned buffers on one memfd.

The pool is shared memory that is neither inherited by a fork (data loaders fork while direct I/O is in flight) nor
written to core dumps. Freed slots are reused, never returned to the system: fresh pages are slow.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np

from fastckpt.errors import AttemptAborted, SaveError

_FAULT_BYTES = 64 * 1024 * 1024
_MADV_POPULATE_WRITE = 23


class Source(Protocol):
    """The bytes of one shard, in C order, little-endian. Any thread may call."""

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

    def __init__(self, start: int, view: memoryview) -> None:
        self.start = start
        self.view = view


class Pool:
    """Memory for ``count`` buffers of ``slot_bytes`` each, or for as many of other sizes as there is room for. Any
    thread may take and give.

    ``SaveError`` if the system does not give the memory, or no descriptor for it.
    """

    def __init__(self, slot_bytes: int, count: int = 1) -> None:
        if slot_bytes <= 0 or count <= 0:
            raise ValueError(f"a pool of {count} slots of {slot_bytes} bytes")
        self.slot_bytes = in_pages(slot_bytes)
        self.bytes = self.slot_bytes * count
        try:
            self._map = _shared_memory(self.bytes)
        except OSError as error:
            raise SaveError(
                f"cannot get {self.bytes} bytes of memory for staging buffers: {error.strerror or error}; lower "
                "Options(staging_bytes_max=...), or raise the limits on memory and open files that the job runs under"
            ) from error
        self._view = memoryview(self._map)
        self.address = address(self._view)
        self._free = [(0, self.bytes)]
        """Runs (start, length) that nobody has, ascending, with something between any two."""
        self._changed = threading.Condition()
        self._cancelled = False

    def take(self, size: int | None = None) -> Slot:
        """A free buffer of ``size`` bytes, or of ``slot_bytes``; waits for one. ``AttemptAborted`` once the pool is
        cancelled."""
        with self._changed:
            while (slot := self._find(size)) is None:
                self._changed.wait()
            return slot

    def try_take(self, size: int | None = None) -> Slot | None:
        """Like ``take``, but None if there is no room now."""
        with self._changed:
            return self._find(size)

    def _find(self, size: int | None) -> Slot | None:
        if self._cancelled:
            raise AttemptAborted("the attempt was given up while it waited for a staging buffer")
        size = self.slot_bytes if size is None else size
        wanted = in_pages(size)
        assert 0 < wanted <= self.bytes, "the pool is too small for this"
        for number, (start, length) in enumerate(self._free):
            if length >= wanted:
                self._free[number : number + 1] = [(start + wanted, length - wanted)] if length > wanted else []
                return Slot(start, self._view[start : start + size])
        return None

    def give(self, slot: Slot) -> None:
        """Returns a slot; its view must not be used any more."""
        start, length = slot.start, in_pages(len(slot.view))
        slot.view.release()
        with self._changed:
            free = self._free
            at = bisect.bisect(free, (start, 0))
            if at < len(free) and free[at][0] == start + length:
                length += free.pop(at)[1]
            if at and sum(free[at - 1]) == start:
                at -= 1
                start, before = free.pop(at)
                length += before
            free.insert(at, (start, length))
            self._changed.notify_all()

    def fault(self, is_enough: Callable[[], bool]) -> None:
        """Has the system back all of the memory now, unless ``is_enough``: the first touch of a page is slow."""
        for start in range(0, self.bytes, _FAULT_BYTES):
            if is_enough():
                return
            _populate(self._view[start : start + _FAULT_BYTES])

    def cancel(self) -> None:
        """Wakes everyone who waits in ``take``, with ``AttemptAborted``."""
        with self._changed:
            self._cancelled = True
            self._changed.notify_all()

    @property
    def is_whole(self) -> bool:
        """Whether every slot has been given back."""
        with self._changed:
            return self._free == [(0, self.bytes)]

    def reset(self) -> None:
        """Makes a cancelled pool usable again. It must be whole."""
        assert self.is_whole, "a slot is still in use"
        with self._changed:
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


def address(view: memoryview) -> int:
    """Where a view lies in memory."""
    found: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return found


def _populate(view: memoryview) -> None:
    """Makes the pages of a view present. Leaves what is in them."""
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.madvise(ctypes.c_void_p(address(view)), ctypes.c_size_t(len(view)), _MADV_POPULATE_WRITE) == 0:
            return
    for at in range(0, len(view), mmap.PAGESIZE):  # before Linux 5.14
        view[at] = view[at]


def in_pages(size: int) -> int:
    """The bytes of the pages that ``size`` bytes take."""
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _shared_memory(size: int) -> mmap.mmap:
    if not hasattr(os, "memfd_create"):  # not Linux
        return mmap.mmap(-1, size)
    descriptor = os.memfd_create("fastckpt-staging", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        return map_shared(descriptor, size)
    finally:
        os.close(descriptor)


def map_shared(descriptor: int, size: int) -> mmap.mmap:
    """Maps a file of memory, so that it is neither inherited by a fork nor written to core dumps."""
    memory = mmap.mmap(descriptor, size, mmap.MAP_SHARED)
    memory.madvise(mmap.MADV_DONTFORK)
    memory.madvise(mmap.MADV_DONTDUMP)
    return memory
