"""What a directory supports, found by doing it: not the type of a file system decides, but what it answers.

Everything happens in a hidden directory with a random name, which no listing of a store shows. It is removed when the
iterator is closed, whatever happened in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fastckpt.errors import ObjectExists
from fastckpt.storage.local import LocalStore
from fastckpt.storage.store import BLOCK_BYTES
from fastckpt.storage.transfers import BUFFER_BYTES

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP}
_NO_LOCKS = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_ALIGNMENT_MAX = 1024 * 1024
_CLOCK_SECONDS_MAX = 60.0
_INODES_MIN = 10_000

Fact: TypeAlias = int | float | str | bool | None


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    about: str
    state: Literal["ok", "warn", "fail"]
    """Whether saves and restores work and are durable; "warn" where they work, but less well than they could."""
    what: str
    change: str = ""
    """What to do about it."""
    facts: Mapping[str, Fact] = field(default_factory=dict)
    """The same as numbers, for programs."""


Checks: TypeAlias = Generator[tuple[str, Callable[[], Finding]], None, None]
"""What each is about, and the check itself; an ``OSError`` that it raises is a failure of what it is about."""


def directory_checks(path: str) -> Checks:
    """Every check of a directory that exists. To be run in order, and closed."""
    probe = _Probe(path)
    try:
        yield "write", probe.make
        if probe.directory < 0:
            return
        yield "fsync", probe.sync_file
        yield "fsync of directories", probe.sync_directory
        yield "objects", probe.objects
        yield "create if absent", probe.create_if_absent
        yield "direct I/O", probe.direct
        yield "locks", probe.locks
        yield "clock", probe.clock
        yield "delete", probe.remove
    finally:
        with contextlib.suppress(OSError):
            probe.remove()


def space(path: str) -> Finding:
    """Free bytes and inodes, as far as the file system tells; quotas are often not in it."""
    found = os.statvfs(path)
    free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    if not total:
        return Finding("space", "ok", "unknown: this file system does not say", facts={"free_bytes": None})
    inodes = found.f_favail if found.f_files else None  # some make inodes as they are needed
    facts: dict[str, Fact] = {"free_bytes": free, "total_bytes": total, "free_inodes": inodes}
    text = f"{free / 1024**3:.1f} GiB free of {total / 1024**3:.1f} GiB"
    text += "" if inodes is None else f", {inodes} inodes"
    if not free:
        return Finding("space", "fail", text, "make room: no save can succeed", facts)
    if inodes is not None and inodes < _INODES_MIN:
        return Finding("space", "warn", text, "remove files: every rank makes some in each save", facts)
    return Finding("space", "ok", text, facts=facts)


class _Probe:
    """The hidden directory, and what is tried in it."""

    def __init__(self, path: str) -> None:
        self._path = os.path.join(path, f".doctor-{secrets.token_hex(8)}")
        self.directory = -1

    def make(self) -> Finding:
        try:
            os.mkdir(self._path)
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            text = f"cannot write here: {error.strerror}"
            change = "restoring works; to save, let this user write here, or choose another directory"
            return Finding("write", "warn", text, change, {"uid": os.geteuid(), "gid": os.getegid()})
        self.directory = os.open(self._path, _DIRECTORY)
        with self._file("mode") as file:
            mode = stat.S_IMODE(os.fstat(file).st_mode)
        facts: dict[str, Fact] = {"uid": os.geteuid(), "gid": os.getegid(), "file_mode": f"{mode:04o}"}
        text = f"new files get mode {mode:04o}"
        if mode & 0o600 != 0o600:
            change = "set a umask that lets the owner read and write, such as 022"
            return Finding("write", "fail", text, change, facts)
        if mode & stat.S_IWOTH:
            change = "set a umask such as 022: whoever can write a repository can replace it"
            return Finding("write", "warn", f"{text}: every user may change them", change, facts)
        return Finding("write", "ok", text, facts=facts)

    def sync_file(self) -> Finding:
        with self._file("sync") as file:
            os.write(file, b"fastckpt")
            start = time.perf_counter()
            os.fsync(file)
            seconds = time.perf_counter() - start
        return Finding("fsync", "ok", f"{seconds * 1000:.1f} ms", facts={"seconds": seconds})

    def sync_directory(self) -> Finding:
        try:
            os.fsync(self.directory)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
            return Finding(
                "fsync of directories",
                "warn",
                f"not supported ({error.strerror}): names of new files are as durable as this file system makes them",
                "for saves that survive a power cut, use a local ext4 or XFS, or ask who runs this storage",
                {"supported": False},
            )
        return Finding("fsync of directories", "ok", "supported", facts={"supported": True})

    def objects(self) -> Finding:
        """A pack's way, through the store that saves use: write, finish, list, read back, delete."""
        store, content = LocalStore(self._path), secrets.token_bytes(5000)
        writer = store.write("packs/one")
        writer.append(content)
        writer.finish()
        back = bytearray(len(content))
        store.read_into("packs/one", 0, memoryview(back))
        listed = [info.name for info in store.list("packs")]
        store.delete("packs/one")
        if back != content:
            return Finding("objects", "fail", "what was written reads back changed", "do not trust this storage")
        if listed != ["packs/one"]:
            change = "use another file system: a job must see what it has written"
            return Finding("objects", "fail", "a new file is not listed", change)
        return Finding("objects", "ok", "written, listed, read back and deleted")

    def create_if_absent(self) -> Finding:
        """What a commit rests on: of two jobs that create one decision, one is told that it exists."""
        store = LocalStore(self._path)
        store.create("decision", b"first")
        try:
            store.create("decision", b"second")
            refused = False
        except ObjectExists:
            refused = True
        if not refused or store.read("decision", size_max=100) != b"first":
            return Finding(
                "create if absent",
                "fail",
                "a second create of one name was not refused",
                "use another file system: two jobs could both believe that they have committed",
                {"primitive": None},
            )
        try:
            os.link("decision", "link", src_dir_fd=self.directory, dst_dir_fd=self.directory)
        except OSError:
            # One kernel refuses a second create by itself. Whether two hosts' kernels do cannot be seen from one.
            return Finding(
                "create if absent",
                "warn",
                "by renameat2, since there are no hard links; between hosts it may not be atomic",
                "start no second job on this repository from another host",
                {"primitive": "renameat2"},
            )
        return Finding("create if absent", "ok", "by link", facts={"primitive": "link"})

    def direct(self) -> Finding:
        """What the store that saves use makes of it: some file systems accept the flag and refuse the transfer."""
        about = "direct I/O"
        with self._file("direct") as file:
            announced = _announced_alignment(file)
        store, content = LocalStore(self._path), secrets.token_bytes(BUFFER_BYTES)
        writer = store.write("packs/direct")
        writer.append(content)
        writer.finish()
        back = bytearray(len(content))
        store.read_into("packs/direct", 0, memoryview(back))
        facts: dict[str, Fact] = {"supported": bool(store.direct), "alignment": announced or None}
        if back != content:
            return Finding(about, "fail", "what was written reads back changed", "do not trust this storage", facts)
        if store.direct:
            return Finding(about, "ok", f"yes, in blocks of {BLOCK_BYTES} bytes", facts=facts)
        why = f"this file system wants blocks of {announced} bytes" if announced else "this file system refuses it"
        return Finding(about, "ok", f"no: {why}; files go through the page cache, which is slower", facts=facts)

    def locks(self) -> Finding:
        """Nothing in fastckpt locks; other tools on the same storage may."""
        if not hasattr(fcntl, "F_OFD_SETLK"):
            return Finding(
                "locks", "ok", "not supported by this system; nothing needs them", facts={"supported": False}
            )
        request = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        with self._file("lock") as first, self._opened("lock", os.O_RDWR) as second:
            try:
                fcntl.fcntl(first, fcntl.F_OFD_SETLK, request)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                text = f"not supported ({error.strerror}); nothing needs them"
                return Finding("locks", "ok", text, facts={"supported": False})
            try:
                fcntl.fcntl(second, fcntl.F_OFD_SETLK, request)
                excludes = False
            except BlockingIOError:
                excludes = True
        text = "supported" if excludes else "accepted, but they exclude nobody"
        return Finding("locks", "ok", f"{text}; nothing needs them", facts={"supported": excludes})

    def clock(self) -> Finding:
        """The file's time of change is by the clock of whoever holds the files. No rule reads either clock."""
        before = time.time()
        with self._file("clock") as file:
            os.write(file, b"fastckpt")
            os.fsync(file)
            changed = os.fstat(file).st_mtime
        skew = changed - min(max(changed, before), time.time())
        facts: dict[str, Fact] = {"skew_seconds": skew}
        if abs(skew) < 1:  # a kernel's file times are coarse
            return Finding("clock", "ok", "this machine and the storage agree", facts=facts)
        text = f"the storage is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} this machine"
        if abs(skew) < _CLOCK_SECONDS_MAX:
            return Finding("clock", "ok", text, facts=facts)
        change = "set the clocks (NTP); no save depends on them, but times in listings mislead"
        return Finding("clock", "warn", text, change, facts)

    def remove(self) -> Finding:
        """Deletes everything that was made. May be repeated."""
        if self.directory >= 0:
            directory, self.directory = self.directory, -1
            os.close(directory)
        for above, directories, files in os.walk(self._path, topdown=False):
            for name in files:
                os.unlink(os.path.join(above, name))
            for name in directories:
                os.rmdir(os.path.join(above, name))
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self._path)
        return Finding("delete", "ok", "nothing is left of these checks")

    @contextlib.contextmanager
    def _opened(self, name: str, flags: int) -> Iterator[int]:
        file = os.open(name, flags | os.O_CLOEXEC, 0o666, dir_fd=self.directory)
        try:
            yield file
        finally:
            os.close(file)  # an error counts: network file systems report late, here

    def _file(self, name: str) -> contextlib.AbstractContextManager[int]:
        return self._opened(name, _CREATE)


def _announced_alignment(file: int) -> int:
    """What ``statx`` gives as the alignment of direct I/O in files like this one; 0 where it says nothing."""
    at_empty_path, mask_dioalign, size = 0x1000, 0x2000, 256
    answer = ctypes.create_string_buffer(size)
    try:
        statx = ctypes.CDLL(None, use_errno=True).statx
    except AttributeError:  # not Linux, or an old C library
        return 0
    if statx(file, b"", at_empty_path, mask_dioalign, answer) != 0:
        return 0
    (mask,) = struct.unpack_from("=I", answer, 0)
    memory, offset = struct.unpack_from("=II", answer, 152)
    alignment: int = max(memory, offset) if mask & mask_dioalign else 0
    return alignment if alignment <= _ALIGNMENT_MAX else 0
