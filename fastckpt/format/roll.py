"""Rolls: where the index of a job of many nodes keeps what it says of parts, so that nobody reads all to find one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import document, names
from fastckpt.format.chunk import HASH_BYTES
from fastckpt.format.tables import Count, PartInfo, RollInfo

NODES_MAX = 256
"""Of a roll; an index of no more nodes has none."""


class Roll(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The parts of consecutive nodes: all but the last roll of an attempt have ``NODES_MAX``."""

    attempt: str
    number: Count
    digests: bytes
    """32 bytes a node: of its part, as stored."""
    sizes: bytes
    """uint32 a node: of its part, in bytes."""


def make_rolls(attempt: str, parts: Sequence[PartInfo]) -> list[Roll]:
    """The rolls of all parts, which are in order of node; none if they are few."""
    if len(parts) <= NODES_MAX:
        return []
    groups = [parts[first : first + NODES_MAX] for first in range(0, len(parts), NODES_MAX)]
    return [
        Roll(
            attempt=attempt,
            number=number,
            digests=b"".join(bytes.fromhex(info.digest) for info in group),
            sizes=np.array([info.size for info in group], "<u4").tobytes(),
        )
        for number, group in enumerate(groups)
    ]


def roll_count(nodes: int) -> int:
    """How many rolls an index of so many nodes has."""
    return -(-nodes // NODES_MAX) if nodes > NODES_MAX else 0


def decode_roll(data: bytes, info: RollInfo, attempt: str, number: int, nodes: int) -> list[PartInfo]:
    """What roll ``number`` of an attempt of ``nodes`` nodes says, every rule checked; ``FormatError`` otherwise."""
    name = names.roll(attempt, number)
    if len(data) != info.size or document.digest(data) != info.digest:
        raise FormatError(f"{name}: damaged: its bytes do not have the digest its index names")
    roll: Roll = document.unpack_table(data, Roll, name)
    if roll.attempt != attempt or roll.number != number:
        raise FormatError(f"{name}: belongs to another attempt, or is another one")
    first = number * NODES_MAX
    count = min(NODES_MAX, nodes - first)
    if len(roll.digests) != count * HASH_BYTES or len(roll.sizes) != 4 * count:
        raise FormatError(f"{name}: has not one entry for each of {count} nodes")
    sizes = np.frombuffer(roll.sizes, "<u4").tolist()
    if max(sizes) > document.TABLE_BYTES_MAX:
        raise LimitExceeded(f"{name}: a part of more than {document.TABLE_BYTES_MAX} bytes")
    digests = [roll.digests[at : at + HASH_BYTES].hex() for at in range(0, len(roll.digests), HASH_BYTES)]
    return [PartInfo(first + at, digest, size) for at, (digest, size) in enumerate(zip(digests, sizes, strict=True))]
