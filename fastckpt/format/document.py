"""The two envelopes that metadata objects come in: sealed documents and tables.

A *document* is for people too: one line of canonical JSON, then one line with the BLAKE3-256 of the first, in hex.
A *table* is for programs: magic, raw length, one zstd frame of msgpack. Whoever names a table knows its digest.
Both are typed: what does not decode into exactly the declared fields is refused.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import blake3
import msgspec

from fastckpt.errors import FormatError, LimitExceeded, UnsupportedVersion
from fastckpt.format import codec

DOCUMENT_BYTES_MAX = 64 * 1024 * 1024
TABLE_BYTES_MAX = 256 * 1024 * 1024
TABLE_MAGIC = b"FCKTAB01"

T = TypeVar("T")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def digest(data: bytes) -> str:
    """BLAKE3-256 of a whole object as stored, in hex."""
    return blake3.blake3(data).hexdigest()


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def seal(document: Any) -> bytes:
    """The bytes of a document."""
    line = msgspec.json.encode(document)
    if len(line) > DOCUMENT_BYTES_MAX:
        raise LimitExceeded(f"a document of {len(line)} bytes, at most {DOCUMENT_BYTES_MAX} are allowed")
    return line + b"\n" + digest(line).encode() + b"\n"


def unseal(data: bytes, kind: type[T] | Any, what: str) -> T:
    """The document in ``data``, decoded as ``kind``. ``FormatError`` naming ``what`` if a single bit is off."""
    line = _sealed_line(data, what)
    document: T = _decode_line(line, kind, what)
    if msgspec.json.encode(document) != line:
        raise FormatError(f"{what}: not in canonical form (repeated or reordered fields)")
    return document


def unseal_version(data: bytes, version_max: int, features: frozenset[str], what: str) -> None:
    """Reads only ``version`` and ``features`` of a FORMAT document; ``UnsupportedVersion`` if they are not ours.

    Comes before everything else, so that a repository of the future is refused as such and not as damaged.
    """
    header = unseal_loosely(data, what)
    version, wanted = header.get("version"), header.get("features", [])
    if not isinstance(version, int) or not isinstance(wanted, list):
        raise FormatError(f"{what}: no version or feature list")
    if isinstance(version, bool) or version < 1:
        raise FormatError(f"{what}: version {version}")
    if version > version_max:
        raise UnsupportedVersion(
            f"{what}: format version {version}, this fastckpt reads up to {version_max}; install a newer fastckpt"
        )
    if any(isinstance(name, list | dict) for name in wanted):  # too deep a one could not even be shown
        raise FormatError(f"{what}: a feature without a name")
    if unknown := sorted(str(name) for name in wanted if not isinstance(name, str) or name not in features):
        raise UnsupportedVersion(
            f"{what}: needs features unknown to this fastckpt: {', '.join(unknown)}; install a newer one"
        )


def unseal_loosely(data: bytes, what: str) -> dict[str, Any]:
    """The document as a plain dict, seal checked, fields not."""
    document: dict[str, Any] = _decode_line(_sealed_line(data, what), dict[str, Any], what)
    return document


def _sealed_line(data: bytes, what: str) -> bytes:
    line = data[:-66]
    if len(data) < 67 or data[-66:] != b"\n" + digest(line).encode() + b"\n":
        raise FormatError(f"{what}: damaged, or not a fastckpt document: its seal does not match its content")
    return line


def _decode_line(line: bytes, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{what}: {error}") from error


def pack_table(table: Any) -> bytes:
    """The bytes of a table."""
    raw = msgspec.msgpack.encode(table)
    if len(raw) > TABLE_BYTES_MAX:
        raise LimitExceeded(f"a table of {len(raw)} bytes, at most {TABLE_BYTES_MAX} are allowed")
    return TABLE_MAGIC + len(raw).to_bytes(8, "little") + codec.encode_zstd(raw)


def unpack_table(data: bytes, kind: type[T], what: str) -> T:
    """The table in ``data``, decoded as ``kind``; its digest has been checked. ``FormatError`` naming ``what`` for
    anything that ``pack_table`` would not have written."""
    if len(data) < 16 or data[:8] != TABLE_MAGIC:
        raise FormatError(f"{what}: not a fastckpt table")
    raw_bytes = int.from_bytes(data[8:16], "little")
    if raw_bytes > TABLE_BYTES_MAX:
        raise LimitExceeded(f"{what}: declares {raw_bytes} bytes, at most {TABLE_BYTES_MAX} are allowed")
    return unpack(codec.decode_zstd(memoryview(data)[16:], raw_bytes, what), kind, what)


def unpack(raw: bytes, kind: type[T], what: str) -> T:
    """The struct that ``raw`` is the msgpack of: fields in order, each once, everything in its shortest form."""
    try:
        table = msgspec.msgpack.decode(raw, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"{what}: {error}") from error
    if msgspec.msgpack.encode(table) != raw:
        raise FormatError(f"{what}: not in canonical form (repeated or reordered fields, or not the shortest)")
    return table
