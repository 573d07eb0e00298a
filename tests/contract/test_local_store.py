"""LocalStore keeps the contract of stores, and is durable: the order of system calls is what survives a power cut."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import random
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

from fastckpt.errors import ObjectExists, ObjectNotFound, OutOfSpace, StorageError
from fastckpt.storage import local, transfers
from fastckpt.storage.local import LocalStore
from fastckpt.storage.reasons import REASONS
from fastckpt.storage.store import BLOCK_BYTES, ObjectWriter, Store
from fastckpt.testing import StoreContract


class TestLocalStore(StoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: LocalStore(tmp_path / "repository")

    def raw_write(self, store: Store, name: str, data: bytes) -> None:
        path = _path(store, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_read(self, store: Store, name: str) -> bytes:
        return _path(store, name).read_bytes()


class TestLocalStoreThroughRename(TestLocalStore):
    """On file systems without hard links."""

    @pytest.fixture(autouse=True)
    def no_hard_links(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def link(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", link)


class TestLocalStoreThroughThePageCache(TestLocalStore):
    """On file systems without direct I/O."""

    @pytest.fixture(autouse=True)
    def no_direct_transfers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _refuse_direct_transfers(monkeypatch)


MEBIBYTE = 1 << 20


def _use_small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nearly every byte is at the edge of something."""
    monkeypatch.setattr(transfers, "BUFFER_BYTES", 2 * BLOCK_BYTES)
    monkeypatch.setattr(transfers, "DIRECT_BYTES_MIN", BLOCK_BYTES)


def _refuse_direct_transfers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flag is taken and each transfer refused, as some file systems do it. Returns which were."""
    refused = []

    def refusing(name: str) -> None:
        real = getattr(os, name)

        def call(file, pieces, offset):
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                refused.append(name)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(file, pieces, offset)

        monkeypatch.setattr(os, name, call)

    refusing("pwritev")
    refusing("preadv")
    return refused


def _path(store: Store, name: str) -> Path:
    return Path(unquote(store.url.removeprefix("file://"))) / name


def _files(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir())


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "repository")


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


# Durability: which system calls, in which order.


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list[tuple[str, ...]]:
    """What LocalStore asked of the system, as (call, path...) relative to the test's directory."""
    recorded: list[tuple[str, ...]] = []

    def name(descriptor: int | None, path: str = "") -> str:
        start = os.getcwd() if descriptor is None else os.readlink(f"/proc/self/fd/{descriptor}")
        return os.path.relpath(os.path.join(start, path), tmp_path)

    def record(call: str, describe: Callable[..., tuple[str, ...] | None]) -> None:
        real = getattr(os, call)

        def recording(*args, **kwargs):
            described = describe(*args, **kwargs)
            result = real(*args, **kwargs)
            if described is not None:
                recorded.append((call, *described))
            return result

        monkeypatch.setattr(os, call, recording)

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        return (name(dir_fd, path),) if flags & os.O_CREAT else None

    def closed(descriptor):
        path = f"/proc/self/fd/{descriptor}"
        return (name(descriptor),) if stat.S_ISREG(os.stat(path).st_mode) else None

    record("open", opened)
    record("mkdir", lambda path, mode=0o777, *, dir_fd=None: (name(dir_fd, path),))
    record("write", lambda descriptor, data: (name(descriptor),))
    record("pwritev", lambda descriptor, pieces, offset: (name(descriptor),))
    record("ftruncate", lambda descriptor, size: (name(descriptor),))
    record("fsync", lambda descriptor: (name(descriptor),))
    record("close", closed)
    record("unlink", lambda path, *, dir_fd=None: (name(dir_fd, path),))
    record(
        "link",
        lambda old, new, *, src_dir_fd, dst_dir_fd, follow_symlinks: (name(src_dir_fd, old), name(dst_dir_fd, new)),
    )
    return recorded


def _below(calls: list[tuple[str, ...]], temporary: str = "TEMPORARY") -> list[tuple[str, ...]]:
    """Calls at and below the test's directory, random names replaced; and all fsyncs of ancestors checked away."""
    short = []
    for call, *paths in calls:
        if any(path.startswith("..") for path in paths):
            assert call == "fsync"
            continue
        short.append(
            (
                call,
                *(
                    "/".join(temporary if p.startswith(".") and p != "." else p for p in path.split("/"))
                    for path in paths
                ),
            )
        )
    return short


def test_a_created_file_is_synced_before_it_gets_its_name_and_its_directory_after(tmp_path, store, calls):
    store.create("a/b", b"content")
    calls.clear()
    store.create("a/c", b"content")
    assert _below(calls) == [
        ("open", "repository/a/TEMPORARY"),
        ("write", "repository/a/TEMPORARY"),
        ("fsync", "repository/a/TEMPORARY"),
        ("close", "repository/a/TEMPORARY"),
        ("link", "repository/a/TEMPORARY", "repository/a/c"),
        ("unlink", "repository/a/TEMPORARY"),
        ("fsync", "repository/a"),
    ]


def test_a_stream_is_synced_and_closed_and_then_its_directory_synced(store, calls):
    store.create("a/b", b"content")
    calls.clear()
    writer = store.write("a/c", bytes_expected=8 * MEBIBYTE)
    writer.append(bytes(MEBIBYTE))
    writer.append(b"01234567")
    writer.finish()
    assert _below(calls) == [
        ("open", "repository/a/c"),
        ("pwritev", "repository/a/c"),
        ("pwritev", "repository/a/c"),
        ("ftruncate", "repository/a/c"),
        ("fsync", "repository/a/c"),
        ("close", "repository/a/c"),
        ("fsync", "repository/a"),
    ]


def test_the_parent_of_every_new_directory_is_synced_before_anything_is_put_into_it(store, calls):
    store.write("a/b/c").finish()
    relevant = [call for call in _below(calls) if call[0] in ("mkdir", "fsync", "open")]
    assert relevant == [
        ("mkdir", "repository"),
        ("fsync", "."),
        ("mkdir", "repository/a"),
        ("fsync", "repository"),
        ("mkdir", "repository/a/b"),
        ("fsync", "repository/a"),
        ("open", "repository/a/b/c"),
        ("fsync", "repository/a/b/c"),
        ("fsync", "repository/a/b"),
    ]


def test_all_new_ancestors_of_the_root_are_synced(tmp_path, calls):
    LocalStore(tmp_path / "x" / "y" / "repository").create("a", b"")
    first_open = next(number for number, call in enumerate(calls) if call[0] == "open")
    assert {("fsync", "x/y"), ("fsync", "x"), ("fsync", ".")} <= set(calls[:first_open])


def test_a_directory_that_another_process_just_made_is_synced_by_everyone_who_relies_on_it(tmp_path, store, calls):
    (tmp_path / "repository" / "a").mkdir(parents=True)
    calls.clear()
    store.create("a/b", b"")
    assert ("fsync", ".") in _below(calls)
    assert ("fsync", "repository") in _below(calls)


def test_whoever_is_told_that_an_object_exists_may_rely_on_its_name(store, calls):
    store.create("a/b", b"first")
    calls.clear()
    with pytest.raises(ObjectExists):
        store.create("a/b", b"second")
    # The winner may not have come to its own sync yet.
    assert _below(calls)[-1] == ("fsync", "repository/a")


def test_a_directory_removed_behind_its_back_is_made_and_synced_again(tmp_path, store, calls):
    store.create("a/b/c", b"first")
    for path in ("a/b/c", "a/b", "a"):
        (tmp_path / "repository" / path).unlink() if path == "a/b/c" else (tmp_path / "repository" / path).rmdir()
    calls.clear()
    store.create("a/b/c", b"second")
    assert [call for call in _below(calls) if call[0] in ("mkdir", "fsync")][:4] == [
        ("mkdir", "repository/a"),
        ("fsync", "repository"),
        ("mkdir", "repository/a/b"),
        ("fsync", "repository/a"),
    ]
    assert store.read("a/b/c", size_max=6) == b"second"


def test_a_directory_that_others_replaced_is_synced_again(tmp_path, store, calls):
    store.create("a/b", b"first")
    (tmp_path / "repository" / "a").rename(tmp_path / "old")
    (tmp_path / "repository" / "a").mkdir()
    calls.clear()
    store.create("a/b", b"second")
    assert ("fsync", "repository") in _below(calls)


@pytest.mark.parametrize("times", [1, 50])
def test_a_directory_removed_at_the_worst_moment_is_made_again_a_few_times(tmp_path, store, monkeypatch, times):
    real, removed = os.open, []

    def open_after_removal(path, flags, mode=0o777, *, dir_fd=None):
        if flags & os.O_CREAT and len(removed) < times:
            (tmp_path / "repository" / "a").rmdir()
            removed.append(path)
        return real(path, flags, mode, dir_fd=dir_fd)

    for work in (lambda: store.create("a/b", b"x"), lambda: store.write("a/c").finish()):
        removed.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", open_after_removal)
            if times == 1:
                work()
            else:
                with pytest.raises(StorageError) as caught:
                    work()
                assert caught.value.transient
                assert not isinstance(caught.value, ObjectNotFound)
        for path in (tmp_path / "repository").rglob("*/*"):
            path.unlink()


@pytest.mark.parametrize("writable", [False, True])
def test_an_ancestor_that_cannot_be_read_matters_only_if_we_may_have_written_it(tmp_path, monkeypatch, writable):
    ancestor = tmp_path / "ancestor"
    ancestor.mkdir()
    real_open, real_access = os.open, os.access

    def refuse(path, flags, mode=0o777, *, dir_fd=None):
        if path == str(ancestor):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real_open(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda path, mode: writable if path == str(ancestor) else real_access(path, mode))
    store = LocalStore(ancestor / "repository")
    if writable:
        with pytest.raises(StorageError, match=os.strerror(errno.EACCES)):
            store.create("a", b"x")
    else:
        store.create("a", b"x")
        assert store.size("a") == 1


def test_a_root_removed_behind_its_back_is_made_again(tmp_path, store):
    store.create("a", b"first")
    (tmp_path / "repository" / "a").unlink()
    (tmp_path / "repository").rmdir()
    assert list(store.list("")) == []
    with pytest.raises(ObjectNotFound):
        store.read("a", size_max=5)
    writer = store.write("b/c")
    writer.append(b"x")
    writer.finish()
    assert [info.name for info in store.list("")] == ["b/c"]


def test_an_object_removed_while_it_was_written_cannot_be_finished(tmp_path, store):
    writer = store.write("a/b")
    writer.append(b"x")
    (tmp_path / "repository" / "a" / "b").unlink()
    (tmp_path / "repository" / "a").rmdir()
    with pytest.raises(StorageError, match="a/b"):
        writer.finish()


def test_an_object_cut_while_it_was_written_cannot_be_finished(tmp_path, store):
    writer = store.write("a")
    writer.append(bytes(MEBIBYTE))
    writer.append(b"0123456789")
    os.truncate(tmp_path / "repository" / "a", 4)
    with pytest.raises(StorageError, match="1048576 bytes were written, 4 are there"):
        writer.finish()


# Faults: every system call, failing once, in each way.


class Faults:
    """Fails the n-th of the system calls that LocalStore makes; a close that fails has closed, as Linux does it."""

    CALLS = (
        "open",
        "write",
        "pwritev",
        "ftruncate",
        "fsync",
        "close",
        "link",
        "unlink",
        "mkdir",
        "fstat",
        "stat",
        "dup",
        "scandir",
        "preadv",
        "read",
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_at: int | None = None
        self.code = 0
        self.count = 0
        self.failed = ""
        for call in self.CALLS:
            monkeypatch.setattr(os, call, self._faulty(call, getattr(os, call)))
        monkeypatch.setattr(fcntl, "fcntl", self._faulty("fcntl", fcntl.fcntl))

    def _faulty(self, call, real):
        def faulty(*args, **kwargs):
            self.count += 1
            if self.count != self.fail_at:
                return real(*args, **kwargs)
            self.failed = call
            if call == "close":
                real(*args, **kwargs)
            raise OSError(self.code, os.strerror(self.code))

        return faulty

    def arm(self, fail_at: int | None, code: int) -> None:
        self.fail_at, self.code, self.count, self.failed = fail_at, code, 0, ""


CONTENT = bytes(range(250)) * 80


def _create_object(store: LocalStore) -> None:
    store.create("a/b/object", CONTENT)


def _write_object(store: LocalStore) -> None:
    writer = store.write("a/b/object", bytes_expected=2 * len(CONTENT))
    writer.append(CONTENT[:10_000])
    writer.append(CONTENT[10_000:])
    assert writer.finish() == len(CONTENT)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EROFS, errno.ESTALE])
@pytest.mark.parametrize("work", [_create_object, _write_object])
def test_whichever_system_call_fails_nothing_is_torn_leaked_or_unnamed(tmp_path, monkeypatch, work, code):
    _use_small_buffers(monkeypatch)
    descriptors = len(os.listdir("/proc/self/fd"))
    faults = Faults(monkeypatch)
    failed = set()
    for number in range(1, 200):
        root = tmp_path / str(number)
        store = LocalStore(root)
        faults.arm(number, code)
        error = None
        try:
            work(store)
        except StorageError as raised:
            error = raised
        reached = faults.failed
        faults.arm(None, 0)
        if error is not None:
            failed.add(reached)
            assert "a/b/object" in str(error)
            assert str(root) in str(error)
            assert f": {os.strerror(code)}; " in str(error)
            assert str(error).endswith(f"; {REASONS[code].advice}")
            assert isinstance(error.__cause__, OSError)
            assert isinstance(error, OutOfSpace) == (code in (errno.ENOSPC, errno.EDQUOT))
            assert error.transient == (code in (errno.EMFILE, errno.ESTALE))
        else:
            assert store.read("a/b/object", size_max=len(CONTENT)) == CONTENT
        if reached in ("fsync", "write", "pwritev", "ftruncate", "link", "mkdir"):
            assert error is not None, f"the failure of {reached} was swallowed"
        if work is _create_object:
            assert [info.size for info in store.list("")] in ([], [len(CONTENT)])
        store.create("a/b/next", b"next")
        assert store.read("a/b/next", size_max=4) == b"next"
        assert len(os.listdir("/proc/self/fd")) == descriptors
        if not reached:
            break
    assert number > 15
    own = {"write", "link"} if work is _create_object else {"pwritev", "ftruncate", "fcntl"}
    assert failed >= {"open", "fsync", "close", "mkdir"} | own


def test_a_failed_stream_takes_nothing_more(store, monkeypatch):
    faults = Faults(monkeypatch)
    writer = store.write("a")
    faults.arm(1, errno.EIO)
    with pytest.raises(StorageError):
        writer.append(bytes(MEBIBYTE))
    for call in (lambda: writer.append(b"x"), writer.finish):
        with pytest.raises(ValueError, match="nothing may follow"):
            call()
    writer.abandon()


def test_a_failed_fsync_is_never_tried_again_on_the_same_file(store, monkeypatch):
    store.create("first", b"")
    writer = store.write("a")
    writer.append(b"x")
    synced = []

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match=os.strerror(errno.EIO)) as caught:
        writer.finish()
    assert not caught.value.transient
    assert len(synced) == 1
    with pytest.raises(ObjectNotFound):
        store.size("a")


def test_what_could_not_be_synced_is_not_what_the_next_create_relies_on(store, monkeypatch):
    store.create("first", b"")
    real, synced = os.fsync, []

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(synced) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match=os.strerror(errno.EIO)):
        store.create("a", b"x")
    store.create("a", b"x")
    failed, *later = synced
    assert failed not in later, "a second sync of the same file may succeed with its bytes lost"
    assert os.path.basename(later[0]).startswith(".a."), "and a new file was written"


@pytest.mark.parametrize("code", sorted(REASONS))
def test_every_reason_of_the_system_is_told_with_what_to_do_about_it(store, monkeypatch, code):
    writer = store.write("a/b")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(StorageError) as caught:
            writer.append(bytes(MEBIBYTE))
    text = str(caught.value)
    assert text.startswith(f"cannot append to 'a/b' in {store.url}: {os.strerror(code)}; ")
    assert REASONS[code].advice in text
    assert ("1,048,576 bytes were to be written" in text) == (code == errno.ENOSPC)
    assert isinstance(caught.value, OutOfSpace) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert caught.value.transient == REASONS[code].transient
    assert not caught.value.transient or code not in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def test_what_is_wrong_with_an_object_itself_is_not_blamed_on_the_system(store):
    store.create("a", b"12345")
    with pytest.raises(StorageError) as caught:
        store.read("a", size_max=4)
    assert str(caught.value) == f"cannot read 'a' in {store.url}: it has 5 bytes, at most 4 are allowed here"


def test_signals_disturb_nothing(store):
    handled = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: handled.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for number in range(60):
            store.create(f"a/{number}", bytes([number]) * 100_000)
            writer = store.write(f"b/{number}")
            writer.append(bytes([number]) * 300_000)
            writer.finish()
            buffer = bytearray(300_000)
            store.read_into(f"b/{number}", 0, memoryview(buffer))
            assert buffer == bytes([number]) * 300_000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(handled) > 10
    assert all(store.read(f"a/{number}", size_max=100_000) == bytes([number]) * 100_000 for number in range(60))


def test_an_error_of_close_is_an_error_of_finish(store, monkeypatch):
    writer = store.write("a")
    real, file = os.close, writer._file

    def close(descriptor):
        real(descriptor)
        if descriptor == file:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(OutOfSpace):
        writer.finish()


def test_short_writes_and_short_reads_are_continued(store, monkeypatch):
    write, pwritev, preadv, read = os.write, os.pwritev, os.preadv, os.read
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    monkeypatch.setattr(os, "pwritev", lambda descriptor, views, offset: pwritev(descriptor, [views[0][:9]], offset))
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: preadv(descriptor, [views[0][:5]], offset))
    monkeypatch.setattr(os, "read", lambda descriptor, count: read(descriptor, min(count, 3)))
    data = bytes(range(100))
    store.create("a", data)
    writer = store.write("b")
    assert writer.append(data) == 0
    assert writer.append(data) == 100
    writer.finish()
    assert store.read("a", size_max=100) == data
    buffer = bytearray(150)
    store.read_into("b", 50, memoryview(buffer))
    assert buffer == (data + data)[50:]


def test_a_file_system_without_directory_sync_is_tolerated_but_its_files_must_sync(store, monkeypatch):
    real = os.fsync
    refuse_files = False

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or refuse_files:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.create("a/b", b"x")
    store.write("a/c").finish()
    refuse_files = True
    with pytest.raises(StorageError):
        store.create("a/d", b"x")


def test_a_file_system_that_cannot_create_if_absent_says_so(tmp_path, store, monkeypatch):
    def unsupported(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr(local, "_renameat2", unsupported)
    with pytest.raises(StorageError, match="cannot create a file if absent"):
        store.create("a", b"x")
    assert _files(tmp_path) == []


def test_a_link_that_happened_but_was_reported_as_failed_counts_as_ours(store, monkeypatch):
    real = os.link

    def link(*args, **kwargs):
        real(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link)
    store.create("a", b"x")
    with pytest.raises(ObjectExists):
        store.create("a", b"y")
    assert store.read("a", size_max=1) == b"x"


def _append_a_megabyte(writer: ObjectWriter) -> None:
    for _ in range(110):
        writer.append(b"x" * 10_000)


@pytest.mark.root
def test_a_full_file_system_is_out_of_space_and_usable_again(tmp_path):
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("this test must run in CI, and needs root to mount a tmpfs")
        pytest.skip("needs root to mount a tmpfs")
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", mount], check=True)
    try:
        store = LocalStore(mount / "repository")
        store.create("a", b"kept")
        writer = store.write("b")
        with pytest.raises(OutOfSpace, match="'b'"):
            _append_a_megabyte(writer)
        writer.abandon()
        with pytest.raises(OutOfSpace, match="'c'"):
            store.create("c", b"x" * 1_000_000)
        assert _files(mount) == ["repository/a"]
        store.create("d", b"x" * 100_000)
        assert store.read("a", size_max=4) == b"kept"
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.root
@pytest.mark.usefixtures("need_root")
def test_the_room_that_is_left_is_what_the_file_system_says_and_none_if_it_takes_no_more_files(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,nr_inodes=5", "none", tmp_path], check=True)
    try:
        store = LocalStore(tmp_path / "not" / "there" / "yet")
        assert store.free_bytes() == 256 << 10
        store = LocalStore(tmp_path / "repository")
        store.create("a", bytes(100_000))
        assert store.free_bytes() == (256 << 10) - 25 * 4096
        while files := os.statvfs(tmp_path).f_favail:
            (tmp_path / f"file-{files}").touch()
        assert store.free_bytes() == 0
        with pytest.raises(OutOfSpace, match="bytes and 0 files are free"):
            store.write("b")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Direct transfers, and doing without.


def _aligned(size: int, phase: int = 0) -> memoryview:
    return memoryview(mmap.mmap(-1, size + phase))[phase:]


def _need_direct(store: LocalStore) -> None:
    writer = store.write("probe")
    writer.append(_aligned(MEBIBYTE))
    writer.abandon()
    if not store.direct:
        pytest.skip("no direct I/O where temporary files are")


def test_what_lies_as_in_the_file_is_written_and_read_from_where_it_lies(store, monkeypatch):
    _need_direct(store)
    moved = []

    def recording(name: str) -> None:
        real = getattr(os, name)

        def call(file, pieces, offset):
            moved.append((offset, [(transfers.address(piece) - start, len(piece)) for piece in pieces]))
            return real(file, pieces, offset)

        monkeypatch.setattr(os, name, call)

    recording("pwritev")
    recording("preadv")
    content = _aligned(MEBIBYTE, 5)
    content[:] = random.Random(1).randbytes(MEBIBYTE)
    start = transfers.address(content) - 5
    writer = store.write("a")
    assert writer.append(b"01234") == 0
    writer.append(content)
    ((offset, pieces),) = moved
    assert (offset, pieces[1:]) == (0, [(4096, MEBIBYTE - 4096)]), "all but the edges"
    writer.finish()
    moved.clear()
    back = _aligned(MEBIBYTE, 5)
    start = transfers.address(back) - 5
    store.read_into("a", 5, back)
    ((offset, pieces),) = moved
    assert (offset, pieces[1]) == (0, (4096, MEBIBYTE - 4096))
    assert back == content


@pytest.mark.parametrize("refuse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_pieces_at_random_places_arrive_and_are_read_back(store, monkeypatch, seed, refuse):
    _use_small_buffers(monkeypatch)
    if refuse:
        _refuse_direct_transfers(monkeypatch)
    else:
        _need_direct(store)
    generator = random.Random(seed)
    memory = _aligned(100_000)
    memory[:] = generator.randbytes(len(memory))
    for number in range(10):
        writer, content = store.write(f"a/{number}", bytes_expected=generator.randrange(300_000)), b""
        for _ in range(generator.randrange(10)):
            begin = generator.choice([0, 1, 511, 512, 4095, len(content) % 4096, generator.randrange(5000)])
            size = generator.choice([0, 1, 100, 4096, 12288, generator.randrange(90_000)])
            assert writer.append(memory[begin : begin + size]) == len(content)
            content += memory[begin : begin + size]
        assert writer.finish() == len(content)
        assert _path(store, f"a/{number}").read_bytes() == content
        for _ in range(10):
            offset = generator.randrange(len(content) + 1)
            size = generator.randrange(len(content) - offset + 1)
            phase = generator.choice([offset % 4096, generator.randrange(4096)])
            target = _aligned(size + 1, phase)
            target[size] = 0xEE
            store.read_into(f"a/{number}", offset, target[:size])
            assert target[:size] == content[offset : offset + size]
            assert target[size] == 0xEE
    assert store.direct is not refuse, "nothing but the file system may be a reason to do without"


def _refuse_the_flag(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    refused = []
    real = fcntl.fcntl

    def call(file, command, argument=0):
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            refused.append("F_SETFL")
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", call)
    return refused


@pytest.mark.parametrize("refuse", [_refuse_the_flag, _refuse_direct_transfers])
@pytest.mark.parametrize("first", ["write", "read"])
def test_a_refused_direct_transfer_is_done_through_the_page_cache_and_not_tried_again(
    tmp_path, monkeypatch, caplog, refuse, first
):
    content = random.Random(1).randbytes(3 * MEBIBYTE + 7)
    LocalStore(tmp_path / "repository").create("there", content)
    refused = refuse(monkeypatch)
    store = LocalStore(tmp_path / "repository")
    assert store.direct is None
    with caplog.at_level(logging.INFO, "fastckpt"):
        for number, verb in enumerate([first, "write", "read", "write"]):
            if verb == "write":
                writer = store.write(f"a{number}")
                writer.append(content)
                writer.finish()
                assert _path(store, f"a{number}").read_bytes() == content
            else:
                back = bytearray(len(content))
                store.read_into("there", 0, memoryview(back))
                assert back == content
            assert store.direct is False
    assert len(refused) == 1
    assert caplog.messages == [
        f"{store.url}: no direct I/O here ({os.strerror(errno.EINVAL)}): files go through the page cache"
    ]


def test_a_file_that_may_not_be_direct_is_not_taken_for_anothers(tmp_path, monkeypatch):
    """A kernel that refuses the flag while creating a file has created it."""
    opened = []
    real = os.open

    def recording(path, flags, mode=0o777, *, dir_fd=None):
        opened.append(flags)
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", recording)
    writer = LocalStore(tmp_path).write("a")
    writer.append(bytes(MEBIBYTE))
    writer.finish()
    assert not any(flags & os.O_DIRECT for flags in opened)


def test_a_direct_write_that_ends_inside_a_block_is_continued_and_speaks_against_no_other_file(store, monkeypatch):
    _need_direct(store)
    real, cut = os.pwritev, []

    def pwritev(file, pieces, offset):
        if cut:
            return real(file, pieces, offset)
        fcntl.fcntl(file, fcntl.F_SETFL, 0)
        cut.append(real(file, [pieces[0][:9]], offset))
        fcntl.fcntl(file, fcntl.F_SETFL, os.O_DIRECT)
        return cut[0]

    monkeypatch.setattr(os, "pwritev", pwritev)
    content = random.Random(1).randbytes(3 * MEBIBYTE + 7)
    writer = store.write("a")
    writer.append(content)
    writer.finish()
    assert cut == [9]
    assert _path(store, "a").read_bytes() == content
    assert store.direct


def test_what_is_too_small_for_a_direct_transfer_says_nothing_about_them(store):
    for size in (0, 1, 4096, 5000):
        writer = store.write(f"a{size}")
        writer.append(bytes(size))
        writer.finish()
        store.read_into(f"a{size}", 0, memoryview(bytearray(size)))
    assert store.direct is None


def test_two_that_are_refused_at_the_same_moment_say_it_once(store, monkeypatch, caplog):
    writers = [store.write("a"), store.write("b")]
    real, began = os.pwritev, []

    def pwritev(file, pieces, offset):
        if not fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            return real(file, pieces, offset)
        began.append(file)
        if len(began) == 1:
            writers[1].append(bytes(MEBIBYTE))
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "pwritev", pwritev)
    with caplog.at_level(logging.INFO, "fastckpt"):
        writers[0].append(bytes(MEBIBYTE))
    assert len(began) == 2
    assert len(caplog.messages) == 1
    assert [writer.finish() for writer in writers] == [MEBIBYTE, MEBIBYTE]


@pytest.mark.parametrize("missing", [False, True])
def test_through_the_page_cache_writing_starts_long_before_the_sync(store, monkeypatch, missing):
    _refuse_direct_transfers(monkeypatch)
    started = []
    real = transfers.system_call

    def recording(name, file, *arguments):
        if name == "sync_file_range":
            if missing:
                started.append(0)
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            started.append((arguments[0].value, arguments[1].value))
        real(name, file, *arguments)

    monkeypatch.setattr(transfers, "system_call", recording)
    content = bytes(12 * MEBIBYTE)
    writer = store.write("a")
    for _ in range(2):
        writer.append(content)
    assert writer.finish() == 24 * MEBIBYTE
    if missing:
        assert started == [0], "not asked for again"
    else:
        assert [offset for offset, _ in started] == [0, started[0][1]]
        assert sum(count for _, count in started) > 20 * MEBIBYTE


def test_what_cannot_be_started_to_be_written_is_an_error(store, monkeypatch):
    _refuse_direct_transfers(monkeypatch)

    def fail(name, *_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(transfers, "system_call", fail)
    writer = store.write("a")
    with pytest.raises(StorageError, match=os.strerror(errno.EIO)):
        writer.append(bytes(12 * MEBIBYTE))


def test_room_that_was_set_aside_and_not_needed_is_given_back(store):
    writer = store.write("a", bytes_expected=64 * MEBIBYTE)
    writer.append(bytes(MEBIBYTE) + b"x")
    path = _path(store, "a")
    assert path.stat().st_size == MEBIBYTE, "nobody sees more than was written"
    allocated = path.stat().st_blocks * 512
    writer.finish()
    if allocated < 64 * MEBIBYTE:
        pytest.skip("no fallocate where temporary files are")
    assert path.stat().st_blocks * 512 < 2 * MEBIBYTE
    assert path.stat().st_size == MEBIBYTE + 1


@pytest.mark.parametrize(("code", "asked"), [(errno.EOPNOTSUPP, 1), (errno.ENOSYS, 1), (errno.ENOSPC, 2)])
def test_room_that_cannot_be_set_aside_is_gone_without(store, monkeypatch, code, asked):
    calls = []

    def fail(name, *_):
        calls.append(name)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(transfers, "system_call", fail)
    for number in range(2):
        writer = store.write(f"a{number}", bytes_expected=2 * MEBIBYTE)
        writer.append(bytes(2 * MEBIBYTE))
        assert writer.finish() == 2 * MEBIBYTE
    assert calls == ["fallocate"] * asked


def test_no_more_room_is_asked_for_than_there_is(store, monkeypatch):
    def fail(name, *_):
        raise AssertionError(name)

    monkeypatch.setattr(transfers, "system_call", fail)
    store.write("a", bytes_expected=1 << 60).abandon()


def test_a_forked_child_takes_buffers_of_its_own(store, monkeypatch):
    writer = store.write("a")
    writer.append(bytes(100_000))
    writer.finish()
    (buffer,) = store._transfers._buffers
    child = os.fork()
    if child == 0:
        own = store._transfers.take_buffer()
        os._exit(transfers.address(own) == transfers.address(buffer))
    assert os.waitpid(child, 0)[1] == 0


# Directories that nobody needs any more.


def _directories(path: Path) -> set[str]:
    return {str(p.relative_to(path / "repository")) for p in (path / "repository").rglob("*") if p.is_dir()}


def test_a_directory_goes_with_its_last_object_but_for_the_uppermost(tmp_path, store):
    for name in ("a/b/c/1", "a/b/2", "a/3"):
        store.create(name, b"x")
    store.delete("a/b/c/1")
    assert _directories(tmp_path) == {"a", "a/b"}
    store.delete("a/b/2")
    store.delete("a/3")
    assert _directories(tmp_path) == {"a"}


def test_what_failed_leaves_no_directories(tmp_path, store, monkeypatch):
    store.write("a/b/c").abandon()
    assert _directories(tmp_path) == {"a"}
    real = os.open

    def full(path, flags, mode=0o777, *, dir_fd=None):
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", full)
    for call in (lambda: store.create("a/b/c", b"x"), lambda: store.write("a/b/c")):
        with pytest.raises(OutOfSpace):
            call()
        assert _directories(tmp_path) == {"a"}


def test_a_directory_is_not_removed_from_under_those_who_write_there(store):
    """All of them use the same directory, which is empty again and again."""
    wrong = []

    def come_and_go(thread: int) -> None:
        generator = random.Random(thread)
        for number in range(100):
            name = f"a/b/{thread}-{number}"
            try:
                store.create(name, b"x") if generator.random() < 0.5 else store.write(name).finish()
                assert store.size(name) < 2
                store.delete(name)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=come_and_go, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong, wrong[0]
    assert list(store.list("")) == []


# Other processes, and what else may lie around.


def test_of_several_processes_creating_one_name_exactly_one_wins(tmp_path):
    program = (
        "import sys\n"
        "from fastckpt.errors import ObjectExists\n"
        "from fastckpt.storage.local import LocalStore\n"
        "store = LocalStore(sys.argv[1])\n"
        "for number in range(60):\n"
        "    try:\n"
        "        store.create(f'decisions/{number}', sys.argv[2].encode() * 1000)\n"
        "        print(number)\n"
        "    except ObjectExists:\n"
        "        pass\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "r"), letter], stdout=subprocess.PIPE, text=True
        )
        for letter in "ABCD"
    ]
    won = {letter: p.communicate(timeout=60)[0].split() for letter, p in zip("ABCD", processes, strict=True)}
    assert sorted(int(number) for numbers in won.values() for number in numbers) == list(range(60))
    store = LocalStore(tmp_path / "r")
    for letter, numbers in won.items():
        for number in numbers:
            assert store.read(f"decisions/{number}", size_max=1000) == letter.encode() * 1000


def test_no_temporary_file_is_left_or_ever_listed(tmp_path, store, monkeypatch):
    store.create("a/b", b"x")
    with pytest.raises(ObjectExists):
        store.create("a/b", b"y")
    assert _files(tmp_path) == ["repository/a/b"]
    listed = []
    real = os.link

    def link(*args, **kwargs):
        listed.extend([*store.list(""), *store.children("a")])
        assert len(_files(tmp_path)) == 2
        real(*args, **kwargs)

    monkeypatch.setattr(os, "link", link)
    store.create("c/d", b"x")
    assert [getattr(entry, "name", entry) for entry in listed] == ["a/b", "b"]


def test_sweeping_removes_what_dead_processes_left_and_nothing_else(tmp_path, store):
    for name in ("FORMAT", "a/b", "a/c/d"):
        store.create(name, b"x")
    root = tmp_path / "repository"
    (root / "a/e/f").mkdir(parents=True)
    (root / "empty").mkdir()
    left = [f".FORMAT.{'0' * 32}", f"a/.b.{'1f' * 16}", f"a/c/.index.{'a' * 32}", f"a/e/.x.{'b' * 32}"]
    kept = [".hidden", f"a/.b.{'1f' * 15}", f".{'0' * 32}", f"a/b.{'c' * 32}"]
    for name in (*left, *kept):
        (root / name).write_bytes(b"half")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f".x.{'0' * 32}").write_bytes(b"somebody else's")
    (root / "a/link").symlink_to(outside)
    (root / "logs/today").mkdir(parents=True)
    (root / f"logs/.x.{'0' * 32}").write_bytes(b"somebody else's")
    store.sweep(["a", "empty"])
    (root / "a/link").unlink()
    assert _files(root) == sorted([*kept, "FORMAT", "a/b", "a/c/d", f"logs/.x.{'0' * 32}"])
    assert (root / "logs/today").exists()
    assert not (root / "a/e").exists()
    assert (root / "empty").exists()
    assert _files(outside)
    assert store.sweep(["a"]) == 0


def test_an_operation_that_is_swept_away_is_done_again(tmp_path, store, monkeypatch):
    other = LocalStore(tmp_path / "repository")
    real_link, real_mkdir, links, made = os.link, os.mkdir, [], []

    def link(*args, **kwargs):
        links.append(args)
        if len(links) == 1:
            assert other.sweep(["a", "p"]) == 1
        real_link(*args, **kwargs)

    def mkdir(*args, **kwargs):
        made.append(args)
        real_mkdir(*args, **kwargs)
        if len(made) == 2:
            assert other.sweep(["a", "p"]) == 1

    store.create("a/first", b"x")
    monkeypatch.setattr(os, "link", link)
    store.create("a/second", b"created")
    assert len(links) == 2
    monkeypatch.setattr(os, "mkdir", mkdir)
    stream = store.write("p/q/r/s")
    stream.append(b"streamed")
    stream.finish()
    assert len(made) > 3
    assert other.read("a/second", size_max=100) == b"created"
    assert other.read("p/q/r/s", size_max=100) == b"streamed"


def test_an_object_that_reuses_a_swept_files_inode_is_not_taken_for_ours(tmp_path, store, monkeypatch):
    """Between closing its file and naming it a writer may stand still; meanwhile the file is swept, and another
    writer's object gets its inode and the name."""
    real_link, links = os.link, []

    def link(*args, **kwargs):
        links.append(args)
        if len(links) > 1:
            return real_link(*args, **kwargs)
        LocalStore(tmp_path / "repository").sweep(["a"])
        LocalStore(tmp_path / "repository").create("a/b", b"theirs")
        return real_link(*args, **kwargs)  # its file is gone

    store.create("a/first", b"x")
    # Every file has one inode: whether a file system uses it again at once is its business.
    monkeypatch.setattr(local, "_identity", lambda found: (found.st_dev, 7))
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ObjectExists):
        store.create("a/b", b"ours")
    assert store.read("a/b", size_max=100) == b"theirs"


def test_files_that_no_store_wrote_are_no_objects(tmp_path, store):
    store.create("a", b"x")
    for foreign in (".hidden", "with space", "lost+found", "\u00e9"):
        (tmp_path / "repository" / foreign).write_bytes(b"")
    assert [info.name for info in store.list("")] == ["a"]
    assert list(store.children("")) == ["a"]


def test_symbolic_links_inside_the_repository_are_refused(tmp_path, store):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "b").write_bytes(b"secret")
    store.create("real/b", b"x")
    (tmp_path / "repository" / "a").symlink_to(outside)
    (tmp_path / "repository" / "real" / "link").symlink_to(outside / "b")
    (tmp_path / "repository" / "real" / "dangling").symlink_to(outside / "new")
    for call in (
        lambda: store.read("a/b", size_max=100),
        lambda: store.read_into("a/b", 0, memoryview(bytearray(1))),
        lambda: store.size("a/b"),
        lambda: store.create("a/c", b"x"),
        lambda: store.write("a/c"),
        lambda: store.delete("a/b"),
        lambda: store.list("a"),
        lambda: store.children("a"),
        lambda: store.list(""),
        lambda: store.children(""),
        lambda: store.read("real/link", size_max=100),
        lambda: store.size("real/link"),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        assert not isinstance(caught.value, ObjectNotFound)
    for name in ("real/link", "real/dangling"):
        with pytest.raises(ObjectExists):
            store.create(name, b"y")
        with pytest.raises(ObjectExists):
            store.write(name)
    assert _files(outside) == ["b"]
    assert (outside / "b").read_bytes() == b"secret"


def test_the_root_itself_may_be_a_symbolic_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    store = LocalStore(tmp_path / "link")
    store.create("a/b", b"x")
    assert _files(tmp_path / "disk") == ["a/b"]
    assert [info.name for info in store.list("")] == ["a/b"]


def test_a_fifo_in_place_of_an_object_is_an_error_and_never_a_hang(tmp_path, store):
    store.create("a/b", b"x")
    os.mkfifo(tmp_path / "repository" / "a" / "fifo")
    outcomes = []

    def read():
        for call in (
            lambda: store.read("a/fifo", size_max=100),
            lambda: store.read_into("a/fifo", 0, memoryview(bytearray(1))),
            lambda: store.size("a/fifo"),
        ):
            with pytest.raises(StorageError, match="not a regular file"):
                call()
            outcomes.append("refused")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert outcomes == ["refused"] * 3
    with pytest.raises(ObjectExists):
        store.write("a/fifo")
    assert [info.name for info in store.list("")] == ["a/b"]


def test_a_directory_is_no_object_and_an_object_no_directory(tmp_path, store):
    store.create("a/b", b"x")
    with pytest.raises(ObjectNotFound):
        store.read("a", size_max=1)
    store.delete("a")
    with pytest.raises(StorageError, match=os.strerror(errno.ENOTDIR)):
        store.create("a/b/c", b"x")
    with pytest.raises(ObjectExists):
        store.create("a", b"x")
    (tmp_path / "file").write_bytes(b"")
    for call in (
        lambda: LocalStore(tmp_path / "file").list(""),
        lambda: LocalStore(tmp_path / "file").create("a", b""),
    ):
        with pytest.raises(StorageError, match=os.strerror(errno.ENOTDIR)):
            call()


def test_reading_creates_nothing(tmp_path, store):
    assert list(store.list("a")) == []
    assert list(store.children("")) == []
    store.delete("a/b")
    with pytest.raises(ObjectNotFound):
        store.size("a/b")
    assert list(tmp_path.iterdir()) == []


def test_modes_follow_the_umask(tmp_path, store):
    before = os.umask(0o027)
    try:
        store.create("a/b", b"x")
        store.write("a/c").finish()
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "repository").rglob("*")}
    assert modes == {"a": 0o750, "b": 0o640, "c": 0o640}


def test_two_hundred_operations_leave_no_descriptor(tmp_path, store):
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        store.create(f"a/{number}", b"x")
        for call in (
            lambda: store.create("a/0", b"y"),
            lambda: store.write("a/0"),
            lambda: store.read("b/0", size_max=1),
            lambda: store.read("a/0", size_max=0),
            lambda: store.read_into("a/0", 5, memoryview(bytearray(1))),
            lambda: store.create("a/0/x", b""),
        ):
            with pytest.raises(StorageError):
                call()
        writer = store.write(f"w/{number}")
        writer.append(b"x")
        writer.finish() if number % 2 else writer.abandon()
        next(store.list(""))
        next(store.children(""))
        store.delete(f"a/{number + 1}")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_stream_nobody_ended_stays_as_a_dead_process_leaves_it(store):
    before = len(os.listdir("/proc/self/fd"))
    writer = store.write("a")
    writer.append(CONTENT * 100)
    del writer
    assert len(os.listdir("/proc/self/fd")) == before
    assert store.read("a", size_max=len(CONTENT) * 100) == (CONTENT * 100)[:MEBIBYTE], "what was not yet held back"


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_cannot_be_is_refused(path):
    with pytest.raises(ValueError):
        LocalStore(path)
