"""Memory of a rank that others of its node read: slots for runs, and words about them.

Only ranks of one user and one job meet here. A token, drawn anew each time, tells that what was mapped is what was
meant: process ids are not the same everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable, Mapping

import msgspec

from fastckpt.buffers import in_pages, map_shared
from fastckpt.repository.chunk_reader import READ_BYTES_MAX
from fastckpt.storage.store import BLOCK_BYTES

MEMORY_BYTES_MAX = 64 * 1024 * 1024
"""Of one rank's slots, unless ``SLOTS_MIN`` of them take more; as much again for what it fetches from other nodes."""
SLOTS_MIN = 4

_NAME = "fastckpt-relay"
# The words of a rank's memory: behind the token these two, then the numbers of the runs in its slots, and for each rank
# of the node the numbers of the runs that were taken from the slots of that one.
_TOKEN_BYTES = 16
GAVE_UP, BEAT, SLOTS = 2, 3, 4
_WORD_BYTES = 8
FINISHED = 2**64 - 1


class Where(msgspec.Struct, array_like=True, frozen=True):
    """How other ranks of the node come to a rank's memory."""

    process: int = 0
    descriptor: int = 0
    token: bytes = b""
    problem: str = ""
    """Why it has no memory, if it has none."""


class Memory:
    """One rank's memory, as mapped here."""

    def __init__(self, descriptor: int, shape: Shape) -> None:
        self._shape = shape
        self._map = map_shared(descriptor, shape.bytes)
        self._view = memoryview(self._map)
        self.words = self._view[: shape.words * _WORD_BYTES].cast("Q")

    @property
    def token(self) -> bytes:
        return bytes(self._view[:_TOKEN_BYTES])

    def write_token(self, token: bytes) -> None:
        self._view[:_TOKEN_BYTES] = token

    def slot(self, number: int) -> memoryview:
        start = in_pages(self._shape.words * _WORD_BYTES) + number * self._shape.slot_bytes
        return self._view[start : start + self._shape.slot_bytes]

    def close(self) -> None:
        self.words.release()
        self._view.release()
        with contextlib.suppress(BufferError):  # a call that was left behind holds a slot; the rest goes with that
            self._map.close()


class Shape:
    """How every rank's memory is laid out."""

    def __init__(self, chunk_bytes: int, members: int, fetches: bool) -> None:
        # The most that a chunk may take, as stored: see ``format/tables``.
        largest = max(READ_BYTES_MAX, chunk_bytes + chunk_bytes // 128 + 1024)
        self.slot_bytes = in_pages(largest + BLOCK_BYTES - 1)
        self.reading_slots = max(SLOTS_MIN, MEMORY_BYTES_MAX // self.slot_bytes)
        self.slots = self.reading_slots * (2 if fetches else 1)
        """First those that are filled from storage, then as many for what is fetched."""
        self.words = SLOTS + self.slots * (1 + members)
        self.bytes = in_pages(self.words * _WORD_BYTES) + self.slots * self.slot_bytes

    def taken(self, member: int, slot: int) -> int:
        """The word for what was taken from a slot of the n-th rank of the node."""
        return SLOTS + self.slots * (1 + member) + slot


def own_memory(shape: Shape, stack: contextlib.ExitStack) -> tuple[Memory | None, Where]:
    """This rank's memory, of which nothing is used until something is written to it. It goes with the stack."""
    try:
        if not hasattr(os, "memfd_create"):  # not Linux
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        stack.callback(os.close, descriptor)
        os.ftruncate(descriptor, shape.bytes)
        memory = Memory(descriptor, shape)
    except OSError as error:
        return None, Where(problem=str(error))
    stack.callback(memory.close)
    token = secrets.token_bytes(_TOKEN_BYTES)
    memory.write_token(token)
    return memory, Where(os.getpid(), descriptor, token)


def mapped(
    wheres: Mapping[int, Where], peers: Iterable[int], rank: int, own: Memory, shape: Shape, stack: contextlib.ExitStack
) -> tuple[str, dict[int, Memory]]:
    """The memory of these ranks and of this one, by rank; or why not all of them can be mapped."""
    memories = {rank: own}
    for peer in sorted({*peers} - {rank}):
        where = wheres[peer]
        path = f"/proc/{where.process}/fd/{where.descriptor}"
        try:
            # Looked at first: to open what someone else has under this number could do anything.
            if not os.readlink(path).startswith(f"/memfd:{_NAME} "):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            # To be written to as well: torch takes no buffer that is not. Nothing writes.
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                memory = Memory(descriptor, shape)
            finally:
                os.close(descriptor)
            stack.callback(memory.close)
            if memory.token != where.token:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        except (OSError, ValueError) as error:  # ValueError: it is smaller
            return f"rank {rank} cannot map the memory of rank {peer}: {error}", {}
        memories[peer] = memory
    return "", memories
