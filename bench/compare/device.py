"""What the device gives: raw direct writes and reads of a number of bytes. The limit that ratios are against."""

from __future__ import annotations

import ctypes
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 8 << 20
ALIGNED_BYTES = 4096
_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def write(path: Path, size: int, threads: int, allocate: bool) -> None:
    """Writes ``size`` bytes directly, ``threads`` blocks in flight, and syncs them; first allocated where that is asked
    for and the file system can."""
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    buffer.write(os.urandom(1 << 20) * (BLOCK_BYTES >> 20))
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_DIRECT)
    try:
        if allocate:
            _fallocate(descriptor, 0, 0, size)

        def block(offset: int) -> None:
            left = min(BLOCK_BYTES, -(-(size - offset) // ALIGNED_BYTES) * ALIGNED_BYTES)
            os.pwrite(descriptor, memoryview(buffer)[:left], offset)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(block, range(0, size, BLOCK_BYTES)))
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path, threads: int) -> None:
    """Reads all of a file directly, ``threads`` blocks in flight, into a block of memory for each thread."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    blocks = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(threads)]
    try:
        size = os.fstat(descriptor).st_size

        def every(number: int) -> None:
            for offset in range(number * BLOCK_BYTES, size, threads * BLOCK_BYTES):
                os.preadv(descriptor, [blocks[number]], offset)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(every, range(threads)))
    finally:
        os.close(descriptor)
