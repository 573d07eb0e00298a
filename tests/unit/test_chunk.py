"""The chunk grid: where it cuts, shown on tensors small enough to count by hand."""

from __future__ import annotations

import pytest

from fastckpt.format.chunk import bundle_bytes_max, chunk_count, chunk_cuts, chunk_hash, is_tiny
from fastckpt.format.shard import Box

CHUNK = 4096


def test_the_id_of_a_chunk_is_blake3_of_its_bytes() -> None:
    empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"  # from the BLAKE3 paper's test vectors
    assert chunk_hash(b"").hex() == empty
    assert chunk_hash(memoryview(b"abc")) == chunk_hash(bytearray(b"abc")) == chunk_hash(b"abc")
    assert len(chunk_hash(b"abc")) == 32


@pytest.mark.parametrize(
    ("shape", "item_bytes", "box", "cuts"),
    [
        # 4 rows of 1 KiB to a chunk.
        ((10, 256), 4, Box((0, 0), (10, 256)), [0, 1024, 2048, 2560]),
        # Counted from row 0 of the whole tensor, so this shard starts in the middle of a chunk.
        ((10, 256), 4, Box((3, 0), (6, 256)), [0, 256, 1280, 1536]),
        # A column shard is cut at the same rows.
        ((10, 256), 4, Box((3, 0), (6, 10)), [0, 10, 50, 60]),
        # A row that just fits.
        ((3, 1024), 4, Box((0, 0), (3, 1024)), [0, 1024, 2048, 3072]),
        # A row that does not: each on its own, every chunk_bytes.
        ((2, 1500), 4, Box((0, 0), (2, 1500)), [0, 1024, 1500, 2524, 3000]),
        # The shard's part of a long row is what is cut.
        ((2, 1500), 4, Box((0, 500), (2, 100)), [0, 100, 200]),
        # Rows that do not divide a chunk: 3 of them to one.
        ((7, 300), 4, Box((0, 0), (7, 300)), [0, 900, 1800, 2100]),
        ((), 4, Box((), ()), [0, 1]),
        ((5000,), 1, Box((4000,), (1000,)), [0, 96, 1000]),
    ],
)
def test_the_grid_cuts_where_it_says(shape: tuple[int, ...], item_bytes: int, box: Box, cuts: list[int]) -> None:
    assert chunk_cuts(shape, item_bytes, box, CHUNK) == cuts
    assert chunk_count(shape, item_bytes, box, CHUNK) == len(cuts) - 1


def test_counting_chunks_makes_no_list() -> None:
    assert chunk_count((2**50, 8), 8, Box((0, 0), (2**50, 8)), CHUNK) == 2**44
    assert chunk_count((2**20, 2**40), 1, Box((0, 0), (2**20, 2**40)), CHUNK) == 2**48


def test_only_a_sixty_fourth_of_a_chunk_is_tiny_and_a_bundle_is_a_quarter_at_most() -> None:
    assert is_tiny(CHUNK // 64, CHUNK)
    assert not is_tiny(CHUNK // 64 + 1, CHUNK)
    assert bundle_bytes_max(CHUNK) == CHUNK // 4
