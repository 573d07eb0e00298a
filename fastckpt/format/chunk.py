"""Chunks: how the bytes of shards are cut into the units of hash, compression and reuse. Pure arithmetic.

The grid belongs to the whole tensor, counted from row 0, so that where it cuts does not depend on world size or plan.
A chunk of a shard is a contiguous run of the shard's elements in C order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import blake3

from fastckpt.errors import FormatError
from fastckpt.format.shard import Box

CHUNK_BYTES_MIN = 4 * 1024
CHUNK_BYTES_MAX = 64 * 1024 * 1024
CHUNKS_MAX = 10**7
HASH_BYTES = 32


def chunk_hash(data: bytes | bytearray | memoryview) -> bytes:
    """The id of a chunk: BLAKE3-256 of its raw bytes, 32 bytes."""
    return blake3.blake3(data).digest()


def check_chunk_bytes(chunk_bytes: int, what: str) -> None:
    """``FormatError`` naming ``what`` unless this is a size that chunks may have."""
    if not CHUNK_BYTES_MIN <= chunk_bytes <= CHUNK_BYTES_MAX or chunk_bytes.bit_count() != 1:
        raise FormatError(
            f"{what}: chunk_bytes {chunk_bytes} is not a power of two from {CHUNK_BYTES_MIN} to {CHUNK_BYTES_MAX}"
        )


def chunk_cuts(shape: Sequence[int], item_bytes: int, box: Box, chunk_bytes: int) -> list[int]:
    """Where the grid cuts a shard: ascending element positions in the shard's C order, from 0 to ``box.elements``.

    Rows (of dimension 0) are kept whole as long as a row of the whole tensor fits a chunk: the grid lines then are at
    multiples of ``chunk_bytes // row_bytes`` rows of the whole tensor. Longer rows are cut one by one, each every
    ``chunk_bytes`` of the shard's part of it. The number of chunks is ``len(result) - 1``.
    """
    if not shape:
        return [0, 1]
    rows, first_row = box.sizes[0], box.offsets[0]
    row_elements = math.prod(box.sizes[1:])
    row_bytes = math.prod(shape[1:]) * item_bytes
    if row_bytes <= chunk_bytes:
        step = chunk_bytes // row_bytes
        lines = range((first_row // step + 1) * step, first_row + rows, step)
        return [0, *((line - first_row) * row_elements for line in lines), rows * row_elements]
    step = chunk_bytes // item_bytes
    return [
        *(row * row_elements + at for row in range(rows) for at in range(0, row_elements, step)),
        rows * row_elements,
    ]


def chunk_count(shape: Sequence[int], item_bytes: int, box: Box, chunk_bytes: int) -> int:
    """``len(chunk_cuts(...)) - 1`` without making the list."""
    if not shape:
        return 1
    rows, first_row = box.sizes[0], box.offsets[0]
    row_bytes = math.prod(shape[1:]) * item_bytes
    if row_bytes <= chunk_bytes:
        step = chunk_bytes // row_bytes
        return (first_row + rows - 1) // step - first_row // step + 1
    return rows * -(-math.prod(box.sizes[1:]) // (chunk_bytes // item_bytes))


def is_tiny(shard_bytes: int, chunk_bytes: int) -> bool:
    """Whether a shard of this size is bundled with others instead of being cut on the grid."""
    return shard_bytes <= tiny_bytes_max(chunk_bytes)


def tiny_bytes_max(chunk_bytes: int) -> int:
    """Bytes of a shard in a bundle, at most."""
    return chunk_bytes // 64


def bundle_bytes_max(chunk_bytes: int) -> int:
    """Bytes a bundle holds at most."""
    return chunk_bytes // 4
