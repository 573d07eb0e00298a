"""What the device gives: raw direct writes and reads of a number of bytes. The limit that ratios are against."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 8 << 20
ALIGNED_BYTES = 4096
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def block() -> mmap.mmap:
    """Memory to write from or to read into, aligned and touched. Made before the clock starts, as staging memory is."""
    memory = mmap.mmap(-1, BLOCK_BYTES)
    memory.write(os.urandom(1 << 20) * (BLOCK_BYTES >> 20))
    return memory


def write(path: Path, buffer: mmap.mmap, size: int, threads: int, allocate: bool) -> None:
    """Writes ``size`` bytes directly from one block, ``threads`` requests in flight, and syncs them; first allocated
    where that is asked for and the file system can."""
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_DIRECT)
    try:
        if allocate:
            _fallocate(descriptor, 0, 0, size)

        def write_block(offset: int) -> None:
            left = min(BLOCK_BYTES, -(-(size - offset) // ALIGNED_BYTES) * ALIGNED_BYTES)
            os.pwrite(descriptor, memoryview(buffer)[:left], offset)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write_block, range(0, size, BLOCK_BYTES)))
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, blocks: Sequence[mmap.mmap]) -> None:
    """Reads all of a file directly, by a thread for each of ``blocks``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    threads = len(blocks)
    try:
        size = os.fstat(descriptor).st_size

        def every(number: int) -> None:
            for offset in range(number * BLOCK_BYTES, size, threads * BLOCK_BYTES):
                os.preadv(descriptor, [blocks[number]], offset)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(every, range(threads)))
    finally:
        os.close(descriptor)
