"""The closed table of element types. A dtype is stored by its name; bytes are C order, little-endian."""

from __future__ import annotations

from fastckpt.errors import FormatError

ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    # Sub-byte types are stored as torch keeps them in memory: one element a byte, except the packed x2, x4 and x8
    # ones, whose element is a byte that holds several values.
    "float4_e2m1fn_x2": 1,
    **{f"{sign}int{bits}": 1 for bits in range(1, 8) for sign in ("", "u")},
    "bits8": 1,
    "bits16": 2,
    "bits1x8": 1,
    "bits2x4": 1,
    "bits4x2": 1,
}
"""Bytes an element, by dtype name."""


def item_bytes(dtype: str) -> int:
    """Bytes an element of ``dtype``. ``FormatError`` for a name that is not in the table."""
    try:
        return ITEM_BYTES[dtype]
    except KeyError:
        raise FormatError(f"unknown dtype {dtype!r}") from None
