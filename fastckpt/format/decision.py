"""Decisions and the FORMAT document: the small sealed documents that a repository's history consists of.

What makes an entry legal is ``repository/history.py``'s business; here is only what it looks like.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, TypeAlias

import msgspec

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import chunk, document, names

VERSION = 1
COMPACT = "compact"
"""A layout may have families, and an index says what kind of values there are."""
FEATURES: frozenset[str] = frozenset({COMPACT})
"""Feature flags this version understands. An unknown one in FORMAT refuses the whole repository."""
STEP_MAX = 2**53
NOTE_BYTES_MAX = 4096
METRICS_MAX = 64

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Format(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The FORMAT document."""

    version: int
    features: list[str]
    id: str
    """Random, 32 hex digits."""
    chunk_bytes: int
    created: str
    """RFC 3339, UTC. For people: no rule depends on a clock."""


class Live(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A live snapshot in a decision's list."""

    step: Count
    attempt: str
    decision: Count
    """Number of its COMMIT."""
    created: str
    bytes: Count
    """Logical bytes of all tensors and values."""
    index: str
    """Digest of the index object."""
    metrics: dict[str, float]
    note: str


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all decisions have."""

    number: Count
    previous: str
    """Digest of the decision before this one, as stored; in number 1 that of FORMAT."""
    writer: str
    """The writer that appended this one."""
    created: str
    live: list[Live] | None
    """The live snapshots after this decision, oldest COMMIT first, or None where ``live_at`` is an earlier number."""
    live_at: Count
    """Number of the newest decision, this one included, that carries the list."""


class Open(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="open"):
    """A job incarnation starts writing; every earlier writer is fenced from here on."""


class Commit(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="commit"):
    """The attempt is a snapshot from here on."""

    snapshot: Live


class Abort(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="abort"):
    """The attempt was given up and may never commit."""

    attempt: str


Decision: TypeAlias = Open | Commit | Abort


def decode_format(data: bytes) -> Format:
    """FORMAT, checked: ``UnsupportedVersion`` for a newer one, ``FormatError`` for anything else that is off."""
    document.unseal_version(data, VERSION, FEATURES, names.FORMAT)
    header: Format = document.unseal(data, Format, names.FORMAT)
    chunk.check_chunk_bytes(header.chunk_bytes, names.FORMAT)
    if not re.fullmatch(r"[0-9a-f]{32}", header.id):
        raise FormatError(f"{names.FORMAT}: its id is not 32 hex digits")
    return header


def decode_decision(data: bytes, number: int) -> Decision:
    """Decision ``number``, checked as far as it can be alone."""
    name = names.decision(number)
    entry: Decision = document.unseal(data, Decision, name)
    try:
        _check_alone(entry, number)
    except FormatError as error:
        raise type(error)(f"{name}: {error}") from error
    return entry


def _check_alone(entry: Decision, number: int) -> None:
    if entry.number != number:
        raise FormatError(f"holds decision {entry.number}")
    if (entry.live is not None) != (entry.live_at == number) or entry.live_at > number:
        raise FormatError(f"live_at {entry.live_at} does not fit")
    if not document.is_digest(entry.previous) and not (number == 1 and entry.previous == ""):
        raise FormatError("no digest of what comes before it")
    if names.writer_open_number(entry.writer) > number:
        raise FormatError("by a writer that opens later")
    if isinstance(entry, Open) and names.writer_open_number(entry.writer) != number:
        raise FormatError("an OPEN under another number")
    if isinstance(entry, Abort):
        names.attempt_writer(entry.attempt)
    for snapshot in [*(entry.live or ()), *([entry.snapshot] if isinstance(entry, Commit) else [])]:
        names.attempt_writer(snapshot.attempt)
        if snapshot.decision > number or not document.is_digest(snapshot.index):
            raise FormatError("names a snapshot that cannot be")
        check_labels(snapshot.step, snapshot.metrics, snapshot.note)


def check_labels(step: int, metrics: dict[str, float], note: str) -> None:
    """``LimitExceeded`` if what a user attaches to a snapshot is too large for a decision."""
    if not 0 <= step <= STEP_MAX:
        raise LimitExceeded(f"step {step} is not between 0 and 2**53")
    if len(note.encode()) > NOTE_BYTES_MAX:
        raise LimitExceeded(f"the note has {len(note.encode())} bytes, at most {NOTE_BYTES_MAX} are allowed")
    if len(metrics) > METRICS_MAX or any(len(name.encode()) > 256 for name in metrics):
        raise LimitExceeded(f"more than {METRICS_MAX} metrics, or one with a name of more than 256 bytes")
    if infinite := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise LimitExceeded(f"metric {infinite[0]!r} is {metrics[infinite[0]]}, not a finite number; leave it out")
