"""Codecs: how a chunk's raw bytes are stored. A closed table of numbers; 0 is raw, 1 is one zstd frame."""

from __future__ import annotations

import threading

import zstandard

from fastckpt.errors import FormatError

RAW = 0
ZSTD = 1
CODECS = {"raw": RAW, "zstd": ZSTD}
ZSTD_LEVEL = 1
ZSTD_WINDOW_BYTES_MAX = 128 * 1024 * 1024

_local = threading.local()  # a zstd context serves one thread at a time


def encode_zstd(data: bytes | memoryview) -> bytes:
    """One zstd frame holding ``data``."""
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    return bytes(_local.compressor.compress(data))


def decode_zstd(data: bytes | memoryview, raw_bytes: int, what: str) -> bytes:
    """The content of a zstd frame, which must be exactly ``raw_bytes`` long; ``FormatError`` naming ``what`` otherwise.

    Never allocates more than ``raw_bytes`` for the result, whatever the frame claims.
    """
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES_MAX)
    try:
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != raw_bytes or raw_bytes == 0:  # also refuses frames that do not state their size
            raise FormatError(f"{what}: a zstd frame of {frame.content_size} bytes where {raw_bytes} are due")
        if frame.window_size > ZSTD_WINDOW_BYTES_MAX:  # the decoder itself does not look where it needs no window
            raise FormatError(f"{what}: a zstd frame that needs a window of {frame.window_size} bytes")
        return bytes(_local.decompressor.decompress(data, allow_extra_data=False))
    except zstandard.ZstdError as error:
        raise FormatError(f"{what}: not one whole zstd frame ({error})") from error
