"""How a LocalStore moves bytes between memory and open files: past the page cache where the file system lets it.

Such a direct transfer (O_DIRECT, see open(2)) begins and ends at whole blocks of the file, and at addresses that are
whole blocks too. So bytes that lie otherwise go through an aligned buffer, and the end of a file, which is no whole
block, through the page cache. Descriptors are the caller's, and so is turning an ``OSError`` into one of ours.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
from contextlib import suppress

from fastckpt.buffers import address
from fastckpt.storage.store import BLOCK_BYTES, Bytes

log = logging.getLogger("fastckpt")

BUFFER_BYTES = 1024 * 1024
"""Of an aligned buffer, in which smaller pieces are collected: two blocks or more."""
DIRECT_BYTES_MIN = 64 * 1024
"""Fewer bytes are not worth a direct transfer of their own."""
WRITE_BACK_BYTES = 8 * 1024 * 1024
"""Without direct I/O, the system is told to start writing whenever so much has gathered: it would rather wait."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)  # not every system has it
_NOT_DIRECT = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NOT_THERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ESPIPE}
_FALLOC_FL_KEEP_SIZE = 1
_SYNC_FILE_RANGE_WRITE = 2


class Transfers:
    """What the files of one store share: what their file system was found to support, and aligned buffers. Any thread
    may call."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.direct: bool | None = None
        """Whether direct I/O works; None until it was tried."""
        self._lock = threading.Lock()
        self._allocates = self._starts_writing = True
        self._buffers_of = os.getpid()
        self._buffers: list[memoryview] = []

    def read(self, file: int, offset: int, content: memoryview) -> None:
        """Fills ``content`` from ``offset`` of the file."""
        direct = len(content) >= DIRECT_BYTES_MIN and self.start_direct(file)
        buffer = self.take_buffer() if direct else memoryview(b"")
        try:
            while content:
                wanted = len(content)
                try:
                    if direct:
                        count, wanted = _read_blocks(file, offset, content, buffer)
                    else:
                        count = os.preadv(file, [content], offset)
                except OSError as error:
                    if not direct or error.errno not in _NOT_DIRECT:
                        raise
                    self.refuse_direct(file, error)
                    direct = False
                    continue
                if direct:
                    self.direct_worked()
                    if count < wanted:  # and may be so again inside this block: the page cache gives what there is
                        self.stop_direct(file)
                        direct, count = False, max(count, 0)
                elif not count:
                    raise OSError(f"it was cut to {offset} bytes while being read")
                content = content[count:]
                offset += count
        finally:
            if buffer:
                self.give_buffer(buffer)

    def start_direct(self, file: int) -> bool:
        """From now on transfers of this file are direct, if that may be."""
        if self.direct is False:
            return False
        if not _O_DIRECT:
            self.refuse_direct(file, OSError(errno.ENOTSUP, "this system has no O_DIRECT"))
            return False
        try:
            # Asked for at once, a file that may not have it would be created all the same.
            fcntl.fcntl(file, fcntl.F_SETFL, _O_DIRECT)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise
            self.refuse_direct(file, error)
            return False
        return True

    def stop_direct(self, file: int) -> None:
        fcntl.fcntl(file, fcntl.F_SETFL, 0)

    def direct_worked(self) -> None:
        if self.direct is None:
            self.direct = True

    def refuse_direct(self, file: int, error: OSError) -> None:
        """The file system has refused it: this file and all later ones go through the page cache."""
        self.stop_direct(file)
        with self._lock:
            is_news, self.direct = self.direct is not False, False
        if is_news:
            log.info("%s: no direct I/O here (%s): files go through the page cache", self._url, error.strerror)

    def allocate(self, file: int, bytes_expected: int) -> int:
        """Sets room aside for the bytes of a new file, and returns for how many. It may be none: the transfers
        themselves will tell. The size of the file stays what has been written, as others and a crash see it."""
        if bytes_expected < BUFFER_BYTES or not self._allocates:
            return 0
        with suppress(OSError):
            found = os.fstatvfs(file)
            # Before saying no, a file system may take all the room it has from everybody else.
            if found.f_blocks and bytes_expected > found.f_bavail * found.f_frsize:
                return 0
        try:
            size = ctypes.c_int64(bytes_expected)
            system_call("fallocate", file, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), size)
        except OSError as error:
            if error.errno in _NOT_THERE:
                self._allocates = False
            else:
                with suppress(OSError):
                    os.ftruncate(file, 0)  # gives back what it took
            return 0
        return bytes_expected

    def start_writing(self, file: int, offset: int, count: int) -> None:
        """Has the system begin to write what is in its page cache, so that a later fsync finds little left."""
        if self._starts_writing:
            try:
                # Not told to wait: whoever waits is told of failed writes, and the fsync would not hear of them.
                place = ctypes.c_int64(offset), ctypes.c_int64(count)
                system_call("sync_file_range", file, *place, _SYNC_FILE_RANGE_WRITE)
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                self._starts_writing = False

    def take_buffer(self) -> memoryview:
        """An aligned buffer of ``BUFFER_BYTES``; one that was used before has its pages already."""
        if os.getpid() != self._buffers_of:  # a fork shares the pages with its parent
            self._buffers_of, self._buffers = os.getpid(), []
        try:
            return self._buffers.pop()
        except IndexError:
            # Shared memory: the pages of a private one may be exchanged if the process forks during a transfer.
            return memoryview(mmap.mmap(-1, BUFFER_BYTES))

    def give_buffer(self, buffer: memoryview) -> None:
        if os.getpid() == self._buffers_of:
            self._buffers.append(buffer)


class FileAppender:
    """The bytes of one new file, added from front to back. By one thread at a time."""

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._file = -1
        self._allocated = 0
        self._direct: bool | None = None
        self._written = 0
        """Bytes in the file: whole blocks."""
        self._buffer: memoryview | None = None
        self._held = 0
        """Bytes in the buffer; they come next."""
        self._started = 0
        """Where in the file writing has been started up to."""

    def begin(self, file: int, bytes_expected: int) -> None:
        """``file`` is empty."""
        self._file = file
        self._allocated = self._transfers.allocate(file, bytes_expected)

    @property
    def size(self) -> int:
        return self._written + self._held

    def append(self, content: memoryview) -> None:
        while content:
            rest = -self._held % BLOCK_BYTES  # of the block that the held bytes end in
            whole = (len(content) - rest) // BLOCK_BYTES * BLOCK_BYTES
            if whole >= DIRECT_BYTES_MIN and self._takes(content[rest:]):
                self._hold(content[:rest])
                pieces = [self._take_held(), content[rest : rest + whole]]
                self._write([piece for piece in pieces if piece])
                content = content[rest + whole :]
            else:
                count = min(len(content), BUFFER_BYTES - self._held)
                self._hold(content[:count])
                if self._held == BUFFER_BYTES:
                    self._write([self._take_held()])
                content = content[count:]

    def complete(self) -> None:
        """Everything is in the file, and what was set aside for more is given back. Durable it is not."""
        found = os.fstat(self._file).st_size
        if found != self._written:
            raise OSError(f"{self._written} bytes were written, {found} are there: somebody else writes to it")
        if self._held:
            if self._direct:
                self._transfers.stop_direct(self._file)
            self._direct = False
            self._write([self._take_held()])
        if self._allocated > self._written:
            os.ftruncate(self._file, self._written)

    def close(self) -> None:
        """Lets go of the buffer. May be repeated."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._transfers.give_buffer(buffer)

    def _takes(self, content: memoryview) -> bool:
        """Whether content can be written from where it lies."""
        if self._direct is None:
            self._direct = self._transfers.start_direct(self._file)
        return not self._direct or address(content) % BLOCK_BYTES == 0

    def _hold(self, content: memoryview) -> None:
        if content:
            if self._buffer is None:
                self._buffer = self._transfers.take_buffer()
            self._buffer[self._held : self._held + len(content)] = content
            self._held += len(content)

    def _take_held(self) -> memoryview:
        """To be written before anything else is held."""
        held, self._held = self._held, 0
        return self._buffer[:held] if self._buffer is not None else memoryview(b"")

    def _write(self, pieces: list[memoryview]) -> None:
        while pieces:
            if self._direct is None:
                self._direct = self._transfers.start_direct(self._file)
            try:
                count = os.pwritev(self._file, pieces, self._written)
            except OSError as error:
                if not self._direct or error.errno not in _NOT_DIRECT:
                    raise
                self._transfers.refuse_direct(self._file, error)
                self._direct = False
                continue
            if not count:
                raise OSError("the system wrote nothing and gave no reason")
            self._written += count
            if self._direct:
                self._transfers.direct_worked()
                if count % BLOCK_BYTES:  # what is left begins inside a block
                    self._transfers.stop_direct(self._file)
                    self._direct = False
            while pieces and count >= len(pieces[0]):
                count -= len(pieces.pop(0))
            if count:
                pieces[0] = pieces[0][count:]
        if not self._direct and self._written - self._started >= WRITE_BACK_BYTES:
            self._transfers.start_writing(self._file, self._started, self._written - self._started)
            self._started = self._written


def _read_blocks(file: int, offset: int, content: memoryview, buffer: memoryview) -> tuple[int, int]:
    """Reads in whole blocks; returns how many bytes came, which may be fewer than none, and how many were to. The first
    and the last block, if not wanted whole, pass through the buffer; where ``content`` lies otherwise than the file,
    all do."""
    before = offset % BLOCK_BYTES
    first = -offset % BLOCK_BYTES
    whole = (len(content) - first) // BLOCK_BYTES * BLOCK_BYTES
    if whole > 0 and address(content) % BLOCK_BYTES == before:
        head, tail = buffer[:BLOCK_BYTES], buffer[BLOCK_BYTES : 2 * BLOCK_BYTES]
        last = len(content) - first - whole
        pieces = [head] * bool(first) + [content[first : first + whole]] + [tail] * bool(last)
        count = os.preadv(file, pieces, offset - before) - before
        # If it was cut short, what follows it is read again.
        content[:first] = head[before : before + first]
        content[first + whole :] = tail[:last]
        return min(count, len(content)), len(content)
    wanted = min(len(content), len(buffer) - before)
    count = os.preadv(file, [buffer[: -(-(before + wanted) // BLOCK_BYTES) * BLOCK_BYTES]], offset - before) - before
    count = min(count, wanted)
    if count > 0:
        content[:count] = buffer[before : before + count]
    return count, wanted


def as_bytes(data: Bytes) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot always be cast


def system_call(name: str, *arguments: object) -> None:
    """One that ``os`` does not have; the C library may not have it either, which is ENOSYS."""
    try:
        function = getattr(ctypes.CDLL(None, use_errno=True), name)
    except AttributeError as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    if function(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
