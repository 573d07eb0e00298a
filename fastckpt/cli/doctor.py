"""``fastckpt doctor``: what a store and this machine are good for, found by trying, and what to change."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import stat
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import click

from fastckpt.cli.arguments import open_store, repository_argument
from fastckpt.cli.terminal import Command, Terminal, count_text, pass_terminal, size_text

if TYPE_CHECKING:
    from fastckpt.storage.probe import Checks, Fact, Finding
    from fastckpt.storage.store import Store

LEAVE_SECONDS_MAX = 5.0
"""Wait this long for what is under way before leaving, so that it is tidied up."""


@click.command(cls=Command, name="doctor")
@repository_argument
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up on storage that does not answer for so long.",
)
@pass_terminal
def command(terminal: Terminal, repo: str, timeout: float) -> int:
    """Try what saves and restores need, in REPO and on this machine, and say what to change.

    REPO need not exist: then the nearest directory above it is looked at. Everything is tried in a hidden directory
    that is removed again; objects of a repository are read, never touched. Exits with 3 if something is worth a
    warning (such as: cannot write here) and with 1 if a save or a restore would fail.
    """
    examination = _Examination(lambda: _checks(repo))
    findings = examination.run(timeout)
    states = [finding.state for finding in findings]
    if terminal.json:
        worst = next(state for state in ("fail", "warn", "ok") if state in states)
        terminal.document({"state": worst, "findings": [dataclasses.asdict(finding) for finding in findings]})
    else:
        width = max(len(finding.about) for finding in findings)
        for finding in findings:
            change = f" -> {finding.change}" if finding.change else ""
            terminal.verdict(finding.state, f"{finding.about:<{width}}  {finding.what}{change}")
        failed, warned = states.count("fail"), states.count("warn")
        terminal.line(f"{count_text(len(findings), 'check')}: {failed} failed, {count_text(warned, 'warning')}")
    return 1 if "fail" in states else 3 if "warn" in states else 0


class _Examination:
    """Runs checks in a thread of its own: storage that is dead never lets go of whoever asks it, and a signal must
    not interrupt the tidying up."""

    def __init__(self, checks: Callable[[], Checks]) -> None:
        self._checks = checks
        self._findings: queue.SimpleQueue[Finding | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._about = "directory"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fastckpt-doctor", daemon=True)

    def run(self, seconds: float) -> list[Finding]:
        """All findings; the last one says so if a check was not answered for so long."""
        from fastckpt.storage.probe import Finding

        findings: list[Finding] = []
        try:
            self._thread.start()
            while (finding := self._findings.get(timeout=seconds)) is not None:
                findings.append(finding)
        except queue.Empty:
            what = f"no answer for {seconds:g} s; a hidden directory .doctor-* may be left behind"
            change = "find out why the storage hangs (server, network, daemon): a save would wait for it too"
            findings.append(Finding(self._about, "fail", what, change))
        finally:  # also on Ctrl-C
            self._stop.set()
            self._thread.join(min(seconds, LEAVE_SECONDS_MAX))
        if self._error is not None:
            raise self._error
        return findings

    def _work(self) -> None:
        try:
            with contextlib.closing(self._checks()) as checks:
                for about, check in checks:
                    if self._stop.is_set():
                        break
                    self._about = about
                    self._findings.put(_outcome(about, check))
        except BaseException as error:
            self._error = error
        self._findings.put(None)


def _outcome(about: str, check: Callable[[], Finding]) -> Finding:
    from fastckpt.errors import FastckptError
    from fastckpt.storage.probe import Finding
    from fastckpt.storage.reasons import REASONS

    needed = "saves and restores need this: use another directory, or have it mended"
    try:
        return check()
    except OSError as error:
        advice = REASONS[error.errno].advice if error.errno in REASONS else needed
        return Finding(about, "fail", error.strerror or str(error), advice)
    except FastckptError as error:
        return Finding(about, "fail", str(error), needed)


def _checks(url: str) -> Checks:
    from fastckpt.cli import machine
    from fastckpt.errors import RepositoryNotFound
    from fastckpt.storage.probe import Finding

    try:
        store = open_store(url)
    except RepositoryNotFound as error:
        found = Finding("directory", "fail", str(error), "give a directory, or a path where there is nothing yet")
        yield "directory", lambda: found
    else:
        if store.url.startswith("file://"):
            yield from _directory_checks(store, os.fsdecode(unquote_to_bytes(store.url.removeprefix("file://"))))
        else:
            change = "use it for tests only; give a path for snapshots that last"
            found = Finding("directory", "warn", f"{store.url} is memory of one process: nothing outlives it", change)
            yield "directory", lambda: found
            yield "repository", lambda: _repository(store)
    yield from machine.checks()


def _directory_checks(store: Store, path: str) -> Checks:
    from fastckpt.storage import mounts, probe
    from fastckpt.storage.probe import Finding

    try:
        existing = _nearest(path)
    except OSError as error:
        found = Finding("directory", "fail", f"cannot look at {path}: {error.strerror}", "let this user in")
        yield "directory", lambda: found
        return
    yield "directory", lambda: _directory(path, existing)
    if os.path.isdir(existing):
        yield "file system", lambda: mounts.file_system(existing)
        yield "space", lambda: probe.space(existing)
        yield from probe.directory_checks(existing)
        yield "repository", lambda: _repository(store)


def _nearest(path: str) -> str:
    """The path, or the first above it that is there, whatever it is."""
    while True:
        try:
            os.lstat(path)
            return path
        except (FileNotFoundError, NotADirectoryError):
            path = os.path.dirname(path)


def _directory(path: str, existing: str) -> Finding:
    from fastckpt.storage.probe import Finding

    if not os.path.isdir(existing):  # a link to nothing, or a file somewhere on the way
        kind = "a link to nothing" if os.path.islink(existing) else "a file"
        what, change = f"{path} cannot be made: {existing} is {kind}", "remove it, or choose another path"
        return Finding("directory", "fail", what, change, {"path": path, "looked_at": None})
    status = os.stat(existing)
    mode = stat.S_IMODE(status.st_mode)
    facts: dict[str, Fact] = {"path": path, "looked_at": existing, "owner": status.st_uid, "mode": f"{mode:04o}"}
    what = f"{existing}, owner {_user(status.st_uid)}, mode {mode:04o}"
    if existing != path:
        what = f"{path} does not exist yet; looking at {what}"
    elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        change = "chmod o-w: whoever can write a repository can replace it"
        return Finding("directory", "warn", f"{what}: every user may delete and replace what is in it", change, facts)
    return Finding("directory", "ok", what, facts=facts)


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _repository(store: Store) -> Finding:
    """What is there already, read as a restore reads it, down to the newest snapshot's metadata."""
    from fastckpt.errors import FastckptError, RepositoryNotFound, StorageError, UnsupportedVersion
    from fastckpt.repository import repository as repositories
    from fastckpt.storage.probe import Finding

    about = "repository"
    there: dict[str, Fact] = {"exists": True}
    try:
        if not repositories.exists(store):
            return Finding(about, "ok", "none here yet; the first save makes it", facts={"exists": False})
        repository = repositories.Repository(store)
        snapshots = repository.snapshots()
        opened = repository.last_open()
        if snapshots:
            snapshots[-1].check()
    except StorageError:
        raise  # says nothing about what is stored
    except RepositoryNotFound as error:
        return Finding(about, "fail", str(error), "choose an empty or a new directory: saves refuse this one")
    except UnsupportedVersion as error:
        return Finding(
            about, "fail", str(error), "install the fastckpt that wrote it, or a newer one", {"exists": True}
        )
    except FastckptError as error:
        change = "fastckpt verify --all names everything that is damaged"
        return Finding(about, "fail", str(error), change, there)
    newest = snapshots[-1] if snapshots else None
    facts: dict[str, Fact] = {
        **there,
        "version": repository.format.version,
        "snapshots": len(snapshots),
        "newest_step": newest.step if newest else None,
        "newest_bytes": newest.bytes if newest else None,
        "opened": opened.created if opened else None,
        "writer": opened.writer if opened else None,
    }
    what = f"readable, version {repository.format.version}, {count_text(len(snapshots), 'snapshot')}"
    what += f", the newest of step {newest.step} with {size_text(newest.bytes)}" if newest else ""
    what += f"; last opened for writing {opened.created} by writer {opened.writer}" if opened else ""
    free = store.free_bytes()
    if newest and free is not None and free < newest.bytes:
        change = "make room before the next save: it needs about as much as the newest"
        return Finding(about, "warn", f"{what}; only {size_text(free)} are free", change, facts)
    return Finding(about, "ok", what, facts=facts)
