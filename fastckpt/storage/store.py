"""The store: where bytes go. It knows names and bytes, nothing else; what they mean is format's business.

Every store passes ``fastckpt.testing.StoreContract``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Bytes: TypeAlias = bytes | bytearray | memoryview

BLOCK_BYTES = 4096
"""Bytes move without a copy where the address of a buffer and its place in the object are equal modulo this."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a store can do, as data."""

    durable: bool
    """What was reported written survives power loss (files) or the loss of any one host (object stores)."""
    create_if_absent: bool
    """``create`` is atomic between processes. Without it, one writer only."""


@dataclass(frozen=True)
class ObjectInfo:
    name: str
    size: int
    """Bytes."""


class ObjectWriter(Protocol):
    """One object being written from front to back, by one thread. Ends with exactly one ``finish`` or ``abandon``."""

    def append(self, data: Bytes) -> int:
        """Adds ``data`` and returns the offset it starts at. The buffer may be reused as soon as this returns. Fastest
        where its address and that offset are equal modulo ``BLOCK_BYTES``."""

    def finish(self) -> int:
        """Makes the object and its name durable, and returns its size. Nothing may be called afterwards.

        After an error the object must not be trusted, finished again or appended to: only ``abandon`` may follow.
        """

    def abandon(self) -> None:
        """Gives the object up, removing what can be removed. Never raises; may follow any error; may be repeated."""


class Store(Protocol):
    """Objects by name. Any thread may call any method at any time.

    Names are components joined by ``/``; each is made of ``A-Z a-z 0-9 . _ -``, does not start with a dot and is at
    most 200 bytes. Anything else is ``ValueError``. Callers never make one name the folder of another.

    Errors: ``ObjectNotFound``, ``ObjectExists``, ``OutOfSpace``, else ``StorageError`` with the system's reason and the
    object's name. No other exception leaves a store for anything that the outside world did.
    """

    url: str
    """As a user would write it, without credentials."""
    capabilities: Capabilities

    def create(self, name: str, data: Bytes) -> None:
        """Writes a small object whole, if absent, durably: after return it survives a crash; before, it is there whole
        or not at all, also for other processes. ``ObjectExists`` if the name is taken: what has the name is unchanged,
        and is as durable as after a create that succeeded. After any other error the object may or may not exist, and
        may not be durable if it does: create it again to know, and if that says ``ObjectExists``, read it."""

    def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
        """Starts a large object. ``ObjectExists`` if the name is taken. Until ``finish`` returns, others may see it
        missing, empty, partial, larger or whole, and so may everyone after a crash. ``bytes_expected``: about how many
        will come, if known, so that room can be set aside for them; more or fewer may."""

    def read(self, name: str, *, size_max: int) -> bytes:
        """The whole object. ``StorageError`` if it is larger than ``size_max`` bytes; nothing is allocated for it."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from ``offset`` (negative: ``ValueError``). A short object is ``StorageError``, never a
        short read. Fastest where the buffer's address and ``offset`` are equal modulo ``BLOCK_BYTES``."""

    def size(self, name: str) -> int:
        """Bytes of the object; ``ObjectNotFound`` if there is none."""

    def children(self, prefix: str) -> Iterator[str]:
        """The distinct next components below ``prefix`` (``""`` or a name), sorted: of ``a/b/c`` and ``a/d``,
        ``children("a")`` gives ``b`` and ``d``. A prefix without objects gives nothing."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects below ``prefix``, sorted by name, without one that has exactly that name. What ``create`` or
        ``finish`` reported before the call is in it."""

    def delete(self, name: str) -> None:
        """Removes the object; absent is no error. Need not be durable: nothing relies on a name being gone."""

    def sweep(self, folders: Sequence[str]) -> int:
        """Removes what operations of dead processes left behind that is no object, such as temporary files, at the top
        and below these uppermost folders; returns how much. Safe at any time: an operation of a living process that it
        hits is done again, unnoticed."""

    def free_bytes(self) -> int | None:
        """About how many bytes can still be written: cheap, never raises; None if that is not known. 0 too if there is
        room for bytes but not for another object. A quota may leave less, and other writers may be faster."""
