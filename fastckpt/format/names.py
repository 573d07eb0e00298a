"""The names of objects in a repository, made here and nowhere else."""

from __future__ import annotations

import re

from fastckpt.errors import FormatError

FORMAT = "FORMAT"
FOLDERS = ("attempts", "decisions", "layouts", "packs")
_WRITER = r"[0-9]{12}-[0-9a-f]{16}"
_WRITER_ONLY = re.compile(_WRITER)
_ATTEMPT = re.compile(rf"({_WRITER})-([0-9]{{6,9}})")
_DECISION = re.compile(r"[0-9]{12}")
_PACK = re.compile(rf"packs/({_WRITER}-[0-9]{{6,9}})/[0-9]{{2,8}}/[0-9]{{1,10}}-[0-9]{{1,10}}\.pack")


def decision(number: int) -> str:
    return f"decisions/{number:012d}"


def decision_number(child: str) -> int:
    """The number of an entry of ``decisions/``; ``FormatError`` if it is none."""
    if not _DECISION.fullmatch(child) or int(child) == 0:
        raise FormatError(f"decisions/{child}: not the name of a decision")
    return int(child)


def layout(digest: str) -> str:
    return f"layouts/{digest}"


def writer(open_number: int, nonce: str) -> str:
    """The id of a writer: the number of its OPEN, then 16 random hex digits.

    The number tells a later writer which attempts are from before its own time, without reading the history.
    """
    name = f"{open_number:012d}-{nonce}"
    if not _WRITER_ONLY.fullmatch(name):
        raise ValueError(f"not a writer id: {name}")
    return name


def attempt(writer_id: str, counter: int) -> str:
    return f"{writer_id}-{counter:06d}"


def attempt_writer(attempt_id: str) -> str:
    """The writer of an attempt; ``FormatError`` if this is no attempt id."""
    match = _ATTEMPT.fullmatch(attempt_id)
    if not match:
        raise FormatError(f"not an attempt id: {attempt_id!r}")
    return match[1]


def writer_open_number(writer_id: str) -> int:
    """The number of the OPEN decision of a writer; ``FormatError`` if this is no writer id."""
    if not _WRITER_ONLY.fullmatch(writer_id):
        raise FormatError(f"not a writer id: {writer_id!r}")
    return int(writer_id[:12])


def part(attempt_id: str, node: int) -> str:
    return f"attempts/{attempt_id}/part-{node:06d}"


def roll(attempt_id: str, number: int) -> str:
    return f"attempts/{attempt_id}/roll-{number:06d}"


def index(attempt_id: str) -> str:
    return f"attempts/{attempt_id}/index"


def pack(attempt_id: str, writer_rank: int, number: int) -> str:
    """Packs lie 256 writers to a folder, so that no folder grows with the job."""
    return f"packs/{attempt_id}/{writer_rank // 256:02d}/{writer_rank}-{number}.pack"


def pack_attempt(name: str) -> str:
    """The attempt a pack was written by; ``FormatError`` if this is not the name of a pack."""
    match = _PACK.fullmatch(name)
    if not match:
        raise FormatError(f"not the name of a pack: {name!r}")
    return match[1]
