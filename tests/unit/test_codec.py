"""zstd frames: exactly one, exactly as long as it must be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import zstandard

from fastckpt.errors import FormatError
from fastckpt.format.codec import CODECS, decode_zstd, encode_zstd

DATA = b"0123456789" * 100


def test_the_numbers_of_codecs_are_part_of_the_format() -> None:
    assert CODECS == {"raw": 0, "zstd": 1}


@pytest.mark.parametrize("data", [b"x", DATA, bytes(10**6)], ids=len)
def test_what_is_encoded_comes_back(data: bytes) -> None:
    assert decode_zstd(encode_zstd(memoryview(data)), len(data), "x") == data


def test_threads_do_not_share_a_context() -> None:
    blocks = [bytes([number]) * 100_000 for number in range(32)]
    with ThreadPoolExecutor(8) as executor:
        frames = list(executor.map(encode_zstd, blocks))
        assert list(executor.map(lambda frame: decode_zstd(frame, 100_000, "x"), frames)) == blocks


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"no zstd frame",
        encode_zstd(DATA)[:-1],
        encode_zstd(DATA)[:7],
        encode_zstd(DATA) + b"x",
        encode_zstd(DATA) + encode_zstd(DATA),
        encode_zstd(DATA + b"x"),
        encode_zstd(DATA[1:]),
        zstandard.ZstdCompressor(write_content_size=False).compress(DATA),
        bytes.fromhex("502a4d18") + len(DATA).to_bytes(4, "little") + DATA,  # a frame to be skipped
    ],
    ids=["empty", "garbage", "cut", "cut to its head", "followed", "twice", "longer", "shorter", "unsized", "skipped"],
)
def test_anything_but_one_whole_frame_of_the_right_size_is_refused(frame: bytes) -> None:
    with pytest.raises(FormatError, match="the chunk"):
        decode_zstd(frame, len(DATA), "the chunk")


@pytest.mark.parametrize("frame", [encode_zstd(b"") + b"x", bytes.fromhex("502a4d1800000000")])
def test_anything_but_one_whole_frame_is_refused_even_if_no_bytes_are_due(frame: bytes) -> None:
    with pytest.raises(FormatError):
        decode_zstd(frame, 0, "x")


def test_a_frame_that_claims_too_much_allocates_nothing() -> None:
    claim = bytearray(encode_zstd(bytes(300)))
    assert claim[4] & 0xC0 == 0x40, "two bytes of content size follow"
    claim[5:7] = b"\xff\xff"
    with pytest.raises(FormatError, match="a zstd frame of 65791 bytes where 300 are due"):
        decode_zstd(bytes(claim), 300, "x")


def test_a_frame_that_needs_a_large_window_is_refused_even_where_none_is_used() -> None:
    window = (28 - 10) << 3  # 256 MiB
    frame = b"\x28\xb5\x2f\xfd\x80" + bytes([window]) + (3).to_bytes(4, "little") + b"\x19\0\0abc"
    assert zstandard.get_frame_parameters(frame).content_size == 3
    with pytest.raises(FormatError, match="window of 268435456 bytes"):
        decode_zstd(frame, 3, "x")
