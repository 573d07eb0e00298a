"""Watches what a process does, through Python's audit hooks: nothing that reads a repository may run what it reads,
load code, talk to anybody, or open what is neither in the repository nor the file to be written.

Files of a repository are opened a component at a time, relative to the directory before. So it is enough to see that
the only absolute path is the repository's own, that no component leads up, and that no link is followed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

FORBIDDEN = (
    *("exec", "compile", "import", "code.", "function.", "marshal.", "pickle.", "ctypes.", "cpython.", "mmap."),
    *(
        "subprocess.",
        "os.system",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "pty.",
    ),
    *(
        "socket.",
        "urllib.",
        "http.",
        "ftplib.",
        "smtplib.",
        "sqlite3.",
        "os.kill",
        "signal.",
        "os.putenv",
        "os.unsetenv",
    ),
    *("os.chmod", "os.chown", "os.chflags", "os.setxattr", "os.removexattr", "os.symlink", "os.mkdir", "os.rmdir"),
    *("os.chdir", "shutil.", "tempfile.", "glob."),
)
"""Beginnings of events. Warm up before watching: what is loaded on first use is loaded by then."""

_LISTING = {"os.scandir", "os.listdir"}
_ENTRIES = {"os.link": 2, "os.rename": 2, "os.remove": 1, "os.truncate": 1, "os.utime": 1}
"""Events that change entries of directories, and how many paths they name."""
_MEMORY = "/memfd:fastckpt"
"""What descriptors of this process's own memory refer to: buffers that are read into."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """What was done against the rules since ``start``, in words. Cannot be stopped: for processes that end soon."""

    def __init__(self, repository: Path, target: Path) -> None:
        self._repository = str(repository)
        self._target = str(target)
        self.violations: list[str] = []
        self.opened = 0
        """Files and directories opened in the repository."""

    def start(self) -> None:
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: Sequence[object]) -> None:
        if event == "open":
            path, _, flags = arguments
            self._on_open(path, flags)
        elif event in _LISTING:
            if not isinstance(arguments[0], int):
                self._blame(event, arguments)
        elif event in ("mmap.__new__", "os.truncate") and self._is_memory(arguments[0]):
            pass
        elif event in _ENTRIES:
            if not all(self._in_target(path) for path in arguments[: _ENTRIES[event]]):
                self._blame(event, arguments)
        elif event.startswith(FORBIDDEN):
            self._blame(event, arguments)

    def _on_open(self, path: object, flags: object) -> None:
        assert isinstance(flags, int)
        if isinstance(path, int):
            return  # wraps a descriptor that is open already
        name = os.fsdecode(path)  # type: ignore[arg-type]
        if self._in_target(name):
            return
        if name == self._repository:
            safe = True
        else:
            safe = "/" not in name and name not in ("", ".", "..") and bool(flags & os.O_NOFOLLOW)
        if safe and not flags & _WRITING:
            self.opened += 1
        else:
            self._blame("open", (path, flags))

    @staticmethod
    def _is_memory(file: object) -> bool:
        return file == -1 or (isinstance(file, int) and os.readlink(f"/proc/self/fd/{file}").startswith(_MEMORY))

    def _in_target(self, path: object) -> bool:
        name = os.fsdecode(path) if isinstance(path, str | bytes) else ""
        return name == self._target or (os.path.dirname(name) == self._target and os.path.basename(name) != "..")

    def _blame(self, event: str, arguments: Sequence[object]) -> None:
        self.violations.append(f"{event} {arguments!r}"[:300])
