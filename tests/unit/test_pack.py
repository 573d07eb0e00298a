"""The footer of a pack: what it says must account for every byte before it."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import codec, pack
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.pack import (
    FOOTER_BYTES_MAX,
    MAGIC,
    TRAILER_BYTES,
    Footer,
    decode_footer,
    encode_footer,
    footer_bytes,
)

ATTEMPT = "000000000001-0123456789abcdef-000001"


def footer(**fields: Any) -> Footer:
    values: dict[str, Any] = {
        "attempt": ATTEMPT,
        "writer": 3,
        "number": 1,
        "lengths": np.array([100, 23], "<u4").tobytes(),
        "codecs": b"\0\1",
        "hashes": bytes(64),
    }
    return Footer(**{**values, **fields})


def split(end: bytes) -> tuple[bytes, bytes]:
    return end[:-TRAILER_BYTES], end[-TRAILER_BYTES:]


def closed(body: bytes) -> tuple[bytes, bytes]:
    """Any body with a trailer that matches."""
    return body, len(body).to_bytes(4, "little") + chunk_hash(body) + MAGIC


def read(end: bytes, data_bytes: int = 123) -> Footer:
    body, trailer = split(end)
    assert footer_bytes(trailer, data_bytes + len(end), "the pack") == len(body)
    return decode_footer(body, trailer, data_bytes, "the pack")


def test_a_footer_comes_back() -> None:
    assert read(encode_footer(footer())) == footer()


def test_the_footer_of_an_empty_pack_comes_back() -> None:
    empty = footer(lengths=b"", codecs=b"", hashes=b"")
    assert read(encode_footer(empty), 0) == empty


def found(end: bytes) -> Footer:
    """As a reader finds it, from the end of the pack backwards."""
    body, trailer = split(bytes(200) + end)
    size = footer_bytes(trailer, 123 + len(end), "the pack")
    return decode_footer(body[-size:], trailer, 123, "the pack")


def test_every_single_flipped_bit_of_a_footer_is_refused() -> None:
    end = encode_footer(footer())
    assert found(end) == footer()
    for bit in range(len(end) * 8):
        flipped = bytearray(end)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match="the pack"):
            found(bytes(flipped))


@pytest.mark.parametrize(
    "trailer",
    [
        b"",
        split(encode_footer(footer()))[1][1:],
        b"x" + split(encode_footer(footer()))[1],
        split(encode_footer(footer()))[1][:-1] + b"2",
        (4).to_bytes(4, "little") + bytes(32) + MAGIC,
        (1000 - TRAILER_BYTES + 1).to_bytes(4, "little") + bytes(32) + MAGIC,
        (2**32 - 1).to_bytes(4, "little") + bytes(32) + MAGIC,
    ],
    ids=["empty", "cut", "long", "magic", "no body", "beyond the pack", "huge"],
)
def test_what_is_no_trailer_is_refused(trailer: bytes) -> None:
    with pytest.raises(FormatError, match="the pack"):
        footer_bytes(trailer, 1000, "the pack")


def test_a_footer_beyond_the_limit_is_refused_even_in_a_large_pack() -> None:
    size = (FOOTER_BYTES_MAX + 1).to_bytes(4, "little")
    with pytest.raises(FormatError):
        footer_bytes(size + bytes(32) + MAGIC, 2**40, "x")
    with pytest.raises(LimitExceeded, match=f"declares a footer of {FOOTER_BYTES_MAX + 1} bytes"):
        decode_footer(*closed(size + codec.encode_zstd(b"x")), 0, "x")


@pytest.mark.parametrize(
    "wrong",
    [
        footer(lengths=bytes(4)),
        footer(lengths=bytes(9)),
        footer(hashes=bytes(63)),
        footer(codecs=b"\0"),
        footer(lengths=np.array([100, 24], "<u4").tobytes()),
        footer(lengths=np.array([2**32 - 1, 124], "<u4").tobytes()),  # wraps in 32 bits
    ],
)
def test_a_footer_that_does_not_account_for_every_byte_is_refused(wrong: Footer) -> None:
    with pytest.raises(FormatError, match="the pack"):
        read(encode_footer(wrong))


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({**msgspec.to_builtins(footer()), "more": 1}), b"\x91" * 100_000],
    ids=["empty", "invalid", "no fields", "unknown field", "deep"],
)
def test_a_body_that_is_no_footer_is_refused(raw: bytes) -> None:
    body, trailer = closed(len(raw).to_bytes(4, "little") + codec.encode_zstd(raw))
    with pytest.raises(FormatError, match="the pack"):
        decode_footer(body, trailer, 123, "the pack")


def test_a_footer_too_large_to_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "FOOTER_BYTES_MAX", 100)
    with pytest.raises(LimitExceeded):
        encode_footer(footer())


@pytest.mark.parametrize("fields", [{"codecs": b"\0\2"}, {"attempt": "../x"}, {"writer": -1}, {"number": -1}], ids=str)
def test_a_footer_that_says_what_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        read(encode_footer(footer(**fields)))
