"""A file system that dies: a FUSE mount that passes everything through to a directory until a call of a chosen kind, on
a chosen path, arrives; that call and all later ones are not answered until it is told to go on.

The server is a process of its own (this module, run). A process that is stuck in the mount cannot be killed before its
call is answered, so whoever leaves the ``with`` block ends the server, and with it every call, in any case.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

START_SECONDS = 30.0


def need_fuse() -> None:
    """Skips without FUSE, but fails in CI, where a skip would go unnoticed."""
    missing = [] if shutil.which("umount", path=_PATH) else ["umount"]
    try:
        importlib.import_module("mfusepy")  # loads the C library, which may be missing
    except (ImportError, OSError):
        missing.append("libfuse3 and mfusepy")
    if not os.path.exists("/dev/fuse"):
        missing.append("/dev/fuse")
    if missing:
        reason = f"needs {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


_PATH = f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin"


class Mount:
    """The mount as the test sees it. Any thread may call."""

    def __init__(self, point: Path, server: subprocess.Popen[str]) -> None:
        self.point = point
        self._server = server
        self._dead = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        assert self._server.stdout is not None
        if self._server.stdout.readline():
            self._dead.set()

    def wait_dead(self, seconds: float) -> bool:
        """Whether a call is left without an answer by then."""
        return self._dead.wait(seconds)

    def release(self) -> None:
        """Answers everything, from now on too."""
        assert self._server.stdin is not None
        self._server.stdin.write("release\n")
        self._server.stdin.flush()


@contextlib.contextmanager
def blocking_mount(backing: Path, point: Path, dies_at: str) -> Iterator[Mount]:
    """``backing`` seen at ``point``. ``dies_at``: a regular expression for the call that is the first not to be
    answered, written ``operation path``, such as ``write /packs/.*-2/``."""
    backing.mkdir(parents=True, exist_ok=True)
    point.mkdir(parents=True)
    server = subprocess.Popen(
        [sys.executable, __file__, str(backing), str(point), dies_at],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": _PATH},
    )
    try:
        end = time.monotonic() + START_SECONDS
        while not os.path.ismount(point):
            assert server.poll() is None, "the file system's server ended at once"
            assert time.monotonic() < end, "the file system was not mounted in time"
            time.sleep(0.01)
        yield Mount(point, server)
    finally:
        server.kill()  # the kernel then fails every call that is waiting
        server.wait()
        for pipe in (server.stdin, server.stdout):
            with contextlib.suppress(OSError, AttributeError):
                pipe.close()  # type: ignore[union-attr]
        subprocess.run(["umount", "--lazy", point], env={"PATH": _PATH}, capture_output=True, timeout=30)
        assert not os.path.ismount(point), f"{point} is still mounted"


class Gate:
    """Where every call waits once the file system is dead."""

    def __init__(self, dies_at: str) -> None:
        self._dies_at = re.compile(dies_at)
        self._changed = threading.Condition()
        self._dead = self._released = False

    def release(self) -> None:
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def pass_through(self, operation: str, path: str) -> None:
        with self._changed:
            if not self._dead and self._dies_at.match(f"{operation} {path}"):
                self._dead = True
                print("dead", flush=True)
            self._changed.wait_for(lambda: self._released or not self._dead)


def serve(backing: str, point: str, dies_at: str) -> None:
    import mfusepy

    gate = Gate(dies_at)
    lock = threading.Lock()
    opened: collections.Counter[str] = collections.Counter()
    """Directories, by path."""

    def listen() -> None:
        for _ in sys.stdin:
            gate.release()
        # Whoever started this is gone: leave no mount behind.
        subprocess.run(["umount", "--lazy", point])
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()

    class PassThrough(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            gate.pass_through("getattr", path)
            found = os.lstat(backing + path)
            names = ("mode", "nlink", "uid", "gid", "size", "ino", "blocks")
            times = {f"st_{name}": getattr(found, f"st_{name}_ns") for name in ("atime", "mtime", "ctime")}
            return {f"st_{name}": getattr(found, f"st_{name}") for name in names} | times

        def readdir(self, path: str, fh: int) -> list[tuple[str, dict[str, int], int]]:
            gate.pass_through("readdir", path)
            # With numbers: the C library takes an entry without one to be deleted.
            found = {name: os.lstat(os.path.join(backing + path, name)) for name in (".", *os.listdir(backing + path))}
            return [(name, {"st_ino": stat.st_ino, "st_mode": stat.st_mode}, 0) for name, stat in found.items()]

        def mkdir(self, path: str, mode: int) -> int:
            gate.pass_through("mkdir", path)
            os.mkdir(backing + path, mode)
            return 0

        def opendir(self, path: str) -> int:
            with lock:
                opened[path] += 1
            return 0

        def releasedir(self, path: str, fh: int) -> int:
            with lock:
                opened[path] -= 1
            return 0

        def rmdir(self, path: str) -> int:
            gate.pass_through("rmdir", path)
            with lock:
                # The C library calls a directory that is gone stale to whoever has it open; no local file system does.
                if opened[path]:
                    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
                os.rmdir(backing + path)
            return 0

        def unlink(self, path: str) -> int:
            gate.pass_through("unlink", path)
            os.unlink(backing + path)
            return 0

        def link(self, target: str, source: str) -> int:
            gate.pass_through("link", target)
            os.link(backing + source, backing + target)
            return 0

        def rename(self, old: str, new: str) -> int:
            raise OSError(errno.ENOSYS, "nobody renames here")

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            gate.pass_through("create", path)
            return os.open(backing + path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

        def open(self, path: str, flags: int) -> int:
            gate.pass_through("open", path)
            return os.open(backing + path, flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR))

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            gate.pass_through("read", path)
            return os.pread(fh, size, offset)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            gate.pass_through("write", path)
            return os.pwrite(fh, data, offset)

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            gate.pass_through("fsync", path)
            os.fsync(fh)
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            gate.pass_through("fsyncdir", path)
            return 0

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

        def statfs(self, path: str) -> dict[str, int]:
            gate.pass_through("statfs", path)
            found = os.statvfs(backing)
            names = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_frsize")
            return {name: getattr(found, name) for name in names}

    # Nothing is remembered by the kernel: ranks see each other's objects through mounts of their own.
    mfusepy.FUSE(
        PassThrough(),
        point,
        foreground=True,
        fsname="blocking",
        use_ino=True,
        attr_timeout=0,
        entry_timeout=0,
    )


if __name__ == "__main__":
    serve(*sys.argv[1:])
