"""The pack: chunks back to back from byte 0, without padding, then a footer that says what they are.

Readers of snapshots find chunks through parts and never need the footer; it names the pack itself, so that a swapped or
orphaned pack can be told from its own bytes.

    stored bytes of all chunks | footer: zstd msgpack | footer bytes: u32 LE | BLAKE3-256 of the footer | magic
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import codec, document, names
from fastckpt.format.chunk import HASH_BYTES, chunk_hash

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
MAGIC = b"FCKPACK1"
TRAILER_BYTES = 4 + HASH_BYTES + len(MAGIC)
FOOTER_BYTES_MAX = 64 * 1024 * 1024


class Footer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a pack says of itself. Columns are little-endian arrays with one entry a chunk, in order of offset."""

    attempt: str
    writer: Count
    """The rank that wrote it."""
    number: Count
    """Counts the packs of that rank."""
    lengths: bytes
    """uint32: stored bytes."""
    codecs: bytes
    """uint8."""
    hashes: bytes
    """32 bytes a chunk: BLAKE3-256 of the raw bytes."""


def encode_footer(footer: Footer) -> bytes:
    """The footer and trailer that close a pack."""
    raw = msgspec.msgpack.encode(footer)
    if len(raw) > FOOTER_BYTES_MAX:
        raise LimitExceeded(f"a pack footer of {len(raw)} bytes, at most {FOOTER_BYTES_MAX} are allowed")
    body = len(raw).to_bytes(4, "little") + codec.encode_zstd(raw)
    return body + len(body).to_bytes(4, "little") + chunk_hash(body) + MAGIC


def footer_bytes(trailer: bytes, pack_bytes: int, what: str) -> int:
    """Bytes of the footer proper, from the last ``TRAILER_BYTES`` of a pack; ``FormatError`` if they are no trailer."""
    size = int.from_bytes(trailer[:4], "little")
    if len(trailer) != TRAILER_BYTES or trailer[-len(MAGIC) :] != MAGIC:
        raise FormatError(f"{what}: does not end as a pack does (cut short, or not a pack)")
    if not 4 < size <= min(pack_bytes - TRAILER_BYTES, FOOTER_BYTES_MAX):
        raise FormatError(f"{what}: a footer of {size} bytes does not fit")
    return size


def decode_footer(body: bytes, trailer: bytes, data_bytes: int, what: str) -> Footer:
    """The footer of a pack whose chunks take ``data_bytes``; ``FormatError`` naming ``what`` if it is not right."""
    if chunk_hash(body) != trailer[4:-8]:
        raise FormatError(f"{what}: its footer is damaged")
    raw_bytes = int.from_bytes(body[:4], "little")
    if raw_bytes > FOOTER_BYTES_MAX:
        raise LimitExceeded(f"{what}: declares a footer of {raw_bytes} bytes")
    footer = document.unpack(codec.decode_zstd(body[4:], raw_bytes, what), Footer, what)
    count = len(footer.codecs)
    if len(footer.lengths) != 4 * count or len(footer.hashes) != HASH_BYTES * count:
        raise FormatError(f"{what}: columns of the footer have different lengths")
    if set(footer.codecs) - set(codec.CODECS.values()):
        raise FormatError(f"{what}: an unknown codec in the footer")
    names.attempt_writer(footer.attempt)
    if int(np.frombuffer(footer.lengths, "<u4").sum(dtype=np.uint64)) != data_bytes:
        raise FormatError(f"{what}: its footer does not account for every byte")
    return footer
