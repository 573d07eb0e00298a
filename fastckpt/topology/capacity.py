"""What an edge of a topology can carry, as people write it."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import Any, Final

from fastckpt.topology.nearest import nearest
from fastckpt.topology.shown import shown

BYTES_PER_SECOND_MAX: Final = 1e18

_PREFIXES: Final = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY: Final = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
UNITS: Final = {
    **{f"{prefix}B/s": Decimal(factor) for prefix, factor in (_PREFIXES | _BINARY).items()},
    **{f"{prefix}{bit}/s": Decimal(factor) / 8 for prefix, factor in _PREFIXES.items() for bit in ("b", "bit")},
}
UNLIMITED: Final = "unlimited"

_TEXT: Final = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*(\S+)\s*")


def read_capacity(value: Any) -> float:
    """Bytes/s, from a number of them, or a text like "25 GB/s", "200 Gb/s" or "unlimited".

    Raises ``ValueError`` for what is not a positive capacity.
    """
    if isinstance(value, str):
        return math.inf if value == UNLIMITED else _checked(_of_text(value), value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{shown(value)} is not a capacity: write bytes per second, or a text like '25 GB/s'")
    if value == math.inf:
        return math.inf
    return _checked(value, value)


def write_capacity(capacity: float) -> str | int | float:
    """What ``read_capacity`` reads back as the same, in the largest unit that gives a whole number."""
    if capacity == math.inf:
        return UNLIMITED
    if not capacity.is_integer():
        return capacity
    whole = int(capacity)
    unit = next((unit for unit in ("TB/s", "GB/s", "MB/s") if whole % int(UNITS[unit]) == 0), None)
    return f"{whole // int(UNITS[unit])} {unit}" if unit else whole


def _of_text(text: str) -> Decimal:
    match = _TEXT.fullmatch(text)
    if not match:
        raise ValueError(f"{shown(text)} is not a capacity: write a number and a unit, like '25 GB/s'")
    number, unit = match.groups()
    if unit not in UNITS:
        alike = [f"{known!r}" for known in UNITS if known.lower() == unit.lower()]
        meant = f"did you mean {' or '.join(alike)}?" if alike else nearest(unit, UNITS)
        raise ValueError(f"the unit {shown(unit)} is unknown: {meant} (B are bytes, b are bits)")
    return Decimal(number) * UNITS[unit]


def _checked(capacity: int | float | Decimal, value: Any) -> float:
    if not 1 <= capacity <= BYTES_PER_SECOND_MAX:  # false for nan as well
        raise ValueError(
            f"{shown(value)} is not a capacity: from 1 byte/s to 10^18 are (leave it out where no limit is known)"
        )
    return float(capacity)
