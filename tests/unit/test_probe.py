"""What a directory supports is found by doing it; whatever fails is said, and nothing is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from fastckpt.errors import FastckptError
from fastckpt.storage import probe
from fastckpt.storage.local import LocalStore
from fastckpt.storage.probe import Finding

ABOUT = [
    "write",
    "fsync",
    "fsync of directories",
    "objects",
    "create if absent",
    "direct I/O",
    "locks",
    "clock",
    "delete",
]


def examined(path: Path) -> dict[str, Finding]:
    """Every finding; a check that raises is a failure of what it is about."""
    found = {}
    with closing(probe.directory_checks(str(path))) as checks:
        for about, check in checks:
            try:
                found[about] = check()
            except (OSError, FastckptError) as error:
                found[about] = Finding(about, "fail", str(error))
            assert found[about].about == about
    return found


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, when: Callable[..., bool] = lambda *_: True) -> None:
    """``os.<name>`` fails with ``code`` for the arguments that ``when`` picks."""
    real = getattr(os, name)

    def call(*args: Any, **settings: Any) -> Any:
        if when(*args):
            raise OSError(code, os.strerror(code))
        return real(*args, **settings)

    monkeypatch.setattr(os, name, call)


def is_directory(file: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{file}")


def test_a_usual_directory_has_everything_and_keeps_nothing(tmp_path: Path) -> None:
    found = examined(tmp_path)
    assert list(found) == ABOUT
    assert {finding.state for finding in found.values()} == {"ok"}, found
    assert found["create if absent"].facts["primitive"] == "link"
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_a_warning_and_nothing_else_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "mkdir", errno.EROFS)
    found = examined(tmp_path)
    assert list(found) == ["write"]
    assert found["write"].state == "warn"
    assert "cannot write here: Read-only file system" in found["write"].what


def test_a_file_system_without_fsync_of_directories_is_told_from_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "fsync", errno.EINVAL, is_directory)
        assert examined(tmp_path)["fsync of directories"].state == "warn"
    with monkeypatch.context() as patch:
        failing(patch, "fsync", errno.EIO, is_directory)
        found = examined(tmp_path)
    assert (found["fsync"].state, found["fsync of directories"].state) == ("ok", "fail")
    assert os.listdir(tmp_path) == []


def test_without_hard_links_renameat2_is_used_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "link", errno.EPERM)
    finding = examined(tmp_path)["create if absent"]
    assert (finding.state, finding.facts["primitive"]) == ("warn", "renameat2")


def test_a_second_create_that_is_not_refused_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int, **_: object) -> None:
        os.replace(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    monkeypatch.setattr(os, "link", link)
    finding = examined(tmp_path)["create if absent"]
    assert finding.state == "fail"
    assert "was not refused" in finding.what

    def nothing(_source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int, **_: object) -> None:
        with suppress(FileExistsError):
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=dst_dir_fd))

    monkeypatch.setattr(os, "link", nothing)
    assert examined(tmp_path)["create if absent"].state == "fail"


def test_without_direct_io_saves_work_and_are_said_to_be_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def refuse(file: int, command: int, argument: Any = 0) -> Any:
        if command == fcntl.F_SETFL and argument:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    for alignment, why in ((0, "refuses it"), (65536, "wants blocks of 65536 bytes")):
        monkeypatch.setattr(probe, "_announced_alignment", lambda _, alignment=alignment: alignment)
        finding = examined(tmp_path)["direct I/O"]
        assert (finding.state, finding.facts["supported"]) == ("ok", False)
        assert finding.what == f"no: this file system {why}; files go through the page cache, which is slower"


def test_bytes_that_read_back_changed_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def preadv(file: int, buffers: list[memoryview], offset: int) -> int:
        count = real(file, buffers, offset)
        buffers[0][0] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    found = examined(tmp_path)
    assert found["objects"].state == "fail"
    assert found["direct I/O"].state == "fail"


@pytest.mark.parametrize(("seconds", "state"), [(5, "ok"), (-5, "ok"), (3600, "warn"), (-3600, "warn")])
def test_a_storage_with_another_clock_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, state: str
) -> None:
    real = probe.time.time
    monkeypatch.setattr(probe.time, "time", lambda: real() - seconds)
    finding = examined(tmp_path)["clock"]
    assert finding.state == state
    assert abs(float(finding.facts["skew_seconds"] or 0) - seconds) < 2
    assert ("ahead of" if seconds > 0 else "behind") in finding.what


def test_a_umask_that_locks_the_owner_out_or_lets_everybody_in_is_noticed(tmp_path: Path) -> None:
    states = {}
    for mask in (0o022, 0o000, 0o277):
        before = os.umask(mask)
        try:
            states[mask] = examined(tmp_path)["write"].state
        finally:
            os.umask(before)
    # With 0277 the hidden directory cannot be entered by its owner either, root aside.
    assert states == {0o022: "ok", 0o000: "warn", 0o277: "fail"}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["open", "fsync", "write", "pwritev", "link", "preadv"])
def test_whichever_call_fails_it_is_a_finding_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every call in turn, until all have been failed."""
    unnoticed = 0
    for number in range(1000):
        count = 0

        def nth(*_: object, number: int = number) -> bool:
            nonlocal count
            count += 1
            return count == number + 1

        with monkeypatch.context() as patch:
            failing(patch, name, errno.EIO, nth)
            found = examined(tmp_path)
        assert os.listdir(tmp_path) == [], f"call {number} of {name}"
        if count <= number:
            break
        # What a store may answer by another way: which primitive there is.
        tolerant = {"create if absent": "warn"}
        unnoticed += not any(f.state == "fail" or tolerant.get(about) == f.state for about, f in found.items())
    assert 0 < number < 999
    # Whoever is refused a name opens it to see whether it is its own, and if it cannot, takes it to be another's.
    assert unnoticed == (name == "open")


def test_checks_that_are_not_run_to_the_end_leave_nothing(tmp_path: Path) -> None:
    for stop_after in range(len(ABOUT) + 1):
        with closing(probe.directory_checks(str(tmp_path))) as checks:
            for _, (_, check) in zip(range(stop_after), checks, strict=False):
                check()
        assert os.listdir(tmp_path) == [], stop_after


def test_while_it_is_there_the_hidden_directory_is_no_part_of_a_store(tmp_path: Path) -> None:
    with closing(probe.directory_checks(str(tmp_path))) as checks:
        for _, check in checks:
            check()
            assert list(LocalStore(tmp_path).children("")) == []


def test_what_cannot_be_deleted_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        failing(patch, "rmdir", errno.EBUSY)
        assert examined(tmp_path)["delete"].state == "fail"


def test_space_is_what_the_file_system_says(tmp_path: Path) -> None:
    finding = probe.space(str(tmp_path))
    assert finding.state == "ok"
    assert 0 < int(finding.facts["free_bytes"] or 0) < int(finding.facts["total_bytes"] or 0)
