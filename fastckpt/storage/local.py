"""LocalStore: objects as files below one directory, durable in the POSIX sense. Raw file descriptors only, since
bytes in a Python buffer are what an fsync does not see. Nobody else in fastckpt opens files of a repository. How bytes
get into them and out of them is in ``transfers.py``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from fastckpt.errors import ObjectExists, ObjectNotFound
from fastckpt.storage.names import check_name, check_prefix, is_component
from fastckpt.storage.reasons import storage_error
from fastckpt.storage.store import Bytes, Capabilities, ObjectInfo
from fastckpt.storage.transfers import FileAppender, Transfers, as_bytes, system_call

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# Opening a FIFO to read it would wait for somebody to write it.
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

# What a file system says that has no fsync of directories; there, names are as durable as it chooses to make them.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_RENAME_FLAGS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_RENAME_NOREPLACE = 1

_TRIES_MAX = 20
_DEPTH_MAX = 64
_DURABLE_DIRECTORIES_MAX = 10_000

_Result = TypeVar("_Result")
_Identity = tuple[int, int]


class LocalStore:
    """A store of files below ``path``, a directory that the first write creates.

    ``path`` itself may be a symbolic link. Below it symbolic links are refused and only regular files are read, so
    that nothing put there leads out of the repository or makes a reader wait. Modes follow the umask. A crash may
    leave hidden temporary files behind; no listing shows them, and ``sweep`` removes them.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        text = os.fspath(path)
        if not text or "\0" in text:
            raise ValueError("the path of a store must not be empty or contain NUL")
        self._root = str(Path(text).absolute())
        self.url = "file://" + quote(os.fsencode(self._root))
        self.capabilities = Capabilities(durable=True, create_if_absent=True)
        self._transfers = Transfers(self.url)
        # Directories (below the root, "" is the root) whose own name this store has made durable, by identity: one
        # removed and made again has to be synced again. Single operations on a dict need no lock.
        self._durable_directories: dict[str, _Identity] = {}

    @property
    def direct(self) -> bool | None:
        """Whether large objects are read and written by direct I/O; None until that was tried."""
        return self._transfers.direct

    def create(self, name: str, data: Bytes) -> None:
        check_name(name)
        content = as_bytes(data)
        with self._explained("create", name, writing=len(content)):
            created = self._in_parent(name, lambda parent, leaf: _create(parent, leaf, content))
        if not created:
            raise ObjectExists(f"cannot create {name!r} in {self.url}: it exists")

    def write(self, name: str, *, bytes_expected: int = 0) -> _LocalWriter:
        check_name(name)
        with self._explained("write", name):
            try:
                return self._in_parent(
                    name, lambda parent, leaf: _LocalWriter(self, parent, leaf, name, bytes_expected)
                )
            except _LeafExistsError as error:
                raise ObjectExists(f"cannot write {name!r} in {self.url}: it exists") from error

    def read(self, name: str, *, size_max: int) -> bytes:
        check_name(name)
        with self._explained("read", name, reading=True), self._opened(name) as (file, size):
            if size > size_max:
                raise OSError(f"it has {size} bytes, at most {size_max} are allowed here")
            pieces = []
            remaining = size
            while remaining:
                piece = os.read(file, remaining)
                if not piece:
                    raise OSError(f"it lost its last {remaining} bytes while being read")
                pieces.append(piece)
                remaining -= len(piece)
            return b"".join(pieces)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        check_name(name)
        if offset < 0:
            raise ValueError(f"offset must not be negative: {offset}")
        content = as_bytes(buffer)
        with self._explained("read", name, reading=True), self._opened(name) as (file, size):
            end = offset + len(content)
            if size < end:
                raise OSError(f"it has {size} bytes, bytes {offset} to {end} were asked for")
            self._transfers.read(file, offset, content)

    def size(self, name: str) -> int:
        check_name(name)
        with self._explained("read the size of", name, reading=True), self._parent(name) as (parent, leaf):
            return _regular_size(os.stat(leaf, dir_fd=parent, follow_symlinks=False))

    def children(self, prefix: str) -> Iterator[str]:
        check_prefix(prefix)
        with self._explained("list", prefix, reading=True), self._directory_or_none(prefix) as directory:
            if directory is None:
                return iter(())
            # A directory without objects is no child: it is what deleted objects leave behind.
            return iter(sorted(entry.name for entry in _entries(directory) if _has_objects(directory, entry)))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._explained("list", prefix, reading=True), self._directory_or_none(prefix) as directory:
            if directory is None:
                return iter(())
            # All of it now: a half-used iterator would hold descriptors.
            return iter(tuple(_objects(directory, prefix)))

    def delete(self, name: str) -> None:
        check_name(name)
        # A directory is no object: none has that name.
        absent = suppress(FileNotFoundError, IsADirectoryError)
        with self._explained("delete", name):
            with absent, self._parent(name) as (parent, leaf):
                os.unlink(leaf, dir_fd=parent)
            self._remove_empty_directories(name)

    def sweep(self, folders: Sequence[str]) -> int:
        with self._explained("sweep", ""), self._directory_or_none("") as root:
            return 0 if root is None else _sweep(root, folders)

    def free_bytes(self) -> int | None:
        found = self._file_system()
        if found is None or not found.f_blocks:
            return None
        # Some file systems do not count files, and say 0 of 0.
        return 0 if found.f_files and not found.f_favail else found.f_bavail * found.f_frsize

    def _file_system(self) -> os.statvfs_result | None:
        """What the system says of the one that ``path`` is on, or will be."""
        path = self._root
        while True:
            try:
                return os.statvfs(path)
            except FileNotFoundError:
                path = os.path.dirname(path)
            except OSError:
                return None

    @contextmanager
    def _explained(self, verb: str, name: str, *, reading: bool = False, writing: int | None = None) -> Iterator[None]:
        """Turns what the system says into our errors. ``writing``: the bytes that were to be written."""
        try:
            yield
        except OSError as error:
            what = f"cannot {verb} {name!r} in {self.url}"
            if error.errno == errno.ENOENT and reading:
                raise ObjectNotFound(f"{what}: {error.strerror}") from error
            raise storage_error(what, error, self._room(writing) if error.errno == errno.ENOSPC else "") from error

    def _room(self, writing: int | None) -> str:
        found = self._file_system()
        if found is None:
            return ""
        files = f" and {found.f_favail:,} files" if found.f_files else ""
        wanted = f", {writing:,} bytes were to be written" if writing is not None else ""
        return f"{found.f_bavail * found.f_frsize:,} bytes{files} are free{wanted}"

    # Reading: directories as they are.

    @contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        prefix, _, leaf = name.rpartition("/")
        directory = self._open_directory(prefix)
        try:
            yield directory, leaf
        finally:
            _release(directory)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, int]]:
        with self._parent(name) as (parent, leaf):
            try:
                file = os.open(leaf, _READ, dir_fd=parent)
            except OSError:
                # A socket, or a device that is not there, says that it is gone: that is not what is wrong with it.
                _regular_size(os.stat(leaf, dir_fd=parent, follow_symlinks=False))
                raise
        try:
            yield file, _regular_size(os.fstat(file))
        finally:
            _release(file)

    @contextmanager
    def _directory_or_none(self, prefix: str) -> Iterator[int | None]:
        try:
            directory = self._open_directory(prefix)
        except FileNotFoundError:
            yield None
            return
        try:
            yield directory
        finally:
            _release(directory)

    def _open_directory(self, prefix: str) -> int:
        directory = os.open(self._root, _DIRECTORY)
        for component in prefix.split("/") if prefix else ():
            parent = directory
            try:
                directory = _open_subdirectory(parent, component)
            except NotADirectoryError as error:  # an object: there is nothing below it
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from error
            finally:
                _release(parent)
        return directory

    # Writing: directories are made, and their names made durable, on the way.

    def _in_parent(self, name: str, action: Callable[[int, str], _Result]) -> _Result:
        """Calls ``action(directory, leaf)``; from the start again if a directory was removed under our feet."""
        *components, leaf = name.split("/")
        tries = 0
        while True:
            try:
                parent = self._open_durable_directory(components)
                try:
                    return action(parent, leaf)
                finally:
                    _release(parent)
            except FileNotFoundError:
                tries += 1
                if tries == _TRIES_MAX:
                    raise
            except OSError:
                self._remove_empty_directories(name)
                raise

    def _open_durable_directory(self, components: Sequence[str]) -> int:
        """Opens the directory, making what is missing. Also syncs what was there when first seen: another process
        may have made it a moment ago and not have come to the sync yet."""
        parent = self._open_durable_root()
        try:
            path = ""
            for component in components:
                path += "/" + component
                try:
                    directory = _open_subdirectory(parent, component)
                except FileNotFoundError:
                    self._durable_directories.pop(path, None)
                    with suppress(FileExistsError):
                        os.mkdir(component, dir_fd=parent)
                    directory = _open_subdirectory(parent, component)
                above, parent = parent, directory
                try:
                    if self._durable_directories.get(path) != _identity(os.fstat(directory)):
                        _sync_directory(above)
                        self._remember_durable(path, directory)
                finally:
                    _release(above)
        except BaseException:
            _release(parent)
            raise
        return parent

    def _remove_empty_directories(self, name: str) -> None:
        """Removes the directories above ``name`` that hold nothing, so that failures do not fill the disk with them.
        The uppermost stays: everybody else makes directories in it. Whoever was about to use one makes it again."""
        directory = name.rpartition("/")[0]
        with suppress(OSError):
            while "/" in directory:
                with suppress(FileNotFoundError), self._parent(directory) as (parent, leaf):
                    os.rmdir(leaf, dir_fd=parent)
                self._durable_directories.pop("/" + directory, None)
                directory = directory.rpartition("/")[0]

    def _open_durable_root(self) -> int:
        try:
            root = os.open(self._root, _DIRECTORY)
        except FileNotFoundError:
            self._durable_directories.pop("", None)
            os.makedirs(self._root, exist_ok=True)
            root = os.open(self._root, _DIRECTORY)
        try:
            if self._durable_directories.get("") != _identity(os.fstat(root)):
                _sync_ancestors(self._root)
                self._remember_durable("", root)
        except BaseException:
            _release(root)
            raise
        return root

    def _remember_durable(self, path: str, directory: int) -> None:
        if len(self._durable_directories) >= _DURABLE_DIRECTORIES_MAX:
            self._durable_directories.clear()
        self._durable_directories[path] = _identity(os.fstat(directory))


class _LocalWriter:
    """A file being written under its final name. Any error abandons it at once, so that no descriptor is left."""

    def __init__(self, store: LocalStore, parent: int, leaf: str, name: str, bytes_expected: int) -> None:
        self._store, self._leaf, self._name = store, leaf, name
        self._file = self._parent = -1
        self._content = FileAppender(store._transfers)
        try:
            self._file = os.open(leaf, _CREATE, 0o666, dir_fd=parent)
        except FileExistsError as error:
            raise _LeafExistsError(*error.args) from error
        try:
            # finish syncs this directory, not one that may since stand in its place.
            self._parent = os.dup(parent)
            self._content.begin(self._file, bytes_expected)
        except BaseException:
            self._close()
            with suppress(OSError):
                os.unlink(leaf, dir_fd=parent)
            raise

    def append(self, data: Bytes) -> int:
        content = as_bytes(data)
        with self._abandoned_on_error("append to", len(content)):
            start = self._content.size
            self._content.append(content)
            return start

    def finish(self) -> int:
        size = self._content.size
        with self._abandoned_on_error("finish", size):
            self._content.complete()
            os.fsync(self._file)
            file, self._file = self._file, -1
            os.close(file)  # network file systems and quotas report late, here
            _sync_directory(self._parent)
            found = os.stat(self._leaf, dir_fd=self._parent, follow_symlinks=False).st_size
            if found != size:
                raise OSError(f"{size} bytes were written, {found} are there: somebody else writes to it")
        self._close()
        return size

    def abandon(self) -> None:
        if self._parent >= 0:
            with suppress(OSError):
                os.unlink(self._leaf, dir_fd=self._parent)
            self._store._remove_empty_directories(self._name)
        self._close()

    def __del__(self) -> None:
        # Neither finished nor abandoned: the file stays as a dead process would leave it.
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, -1
        parent, self._parent = self._parent, -1
        for descriptor in (file, parent):
            if descriptor >= 0:
                _release(descriptor)
        self._content.close()

    @contextmanager
    def _abandoned_on_error(self, verb: str, writing: int | None = None) -> Iterator[None]:
        if self._file < 0:
            raise ValueError(f"{self._name!r} was finished, abandoned or has failed; nothing may follow")
        try:
            with self._store._explained(verb, self._name, writing=writing):
                yield
        except BaseException:
            self.abandon()
            raise


class _LeafExistsError(OSError):
    """The object's own name is taken. (A plain EEXIST could also be about a directory.)"""


def _create(parent: int, leaf: str, content: memoryview) -> bool:
    """Whether the object is now there because of us. Its name, whoever made it, is durable in both cases: a caller
    may read it back and rely on it."""
    temporary = _temporary(leaf)
    file = os.open(temporary, _CREATE, 0o666, dir_fd=parent)
    try:
        try:
            _write(file, content)
            os.fsync(file)
            identity = _identity(os.fstat(file))
        except BaseException:
            _release(file)
            raise
        os.close(file)
        created = _link_if_absent(parent, temporary, leaf, identity, content)
    finally:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=parent)
    _sync_directory(parent)
    return created


def _temporary(leaf: str) -> str:
    """Random, since processes of several hosts may share the file system."""
    return f".{leaf}.{secrets.token_hex(16)}"


_IS_TEMPORARY = re.compile(r"\.[A-Za-z0-9_-][A-Za-z0-9._-]*\.[0-9a-f]{32}").fullmatch


def _link_if_absent(parent: int, temporary: str, leaf: str, identity: _Identity, content: memoryview) -> bool:
    try:
        try:
            os.link(temporary, leaf, src_dir_fd=parent, dst_dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            _rename_if_absent(parent, temporary, leaf)
    except OSError as error:
        # A network file system may have done it, lost the answer, and report its own second try: look who is there.
        with suppress(OSError):
            # By its bytes too: if the temporary file was swept, its inode may be another writer's object by now.
            file = os.open(leaf, _READ, dir_fd=parent)
            try:
                if _identity(os.fstat(file)) == identity and os.read(file, len(content) + 1) == content:
                    return True
            finally:
                _release(file)
        if isinstance(error, FileExistsError):
            return False
        raise
    return True


def _rename_if_absent(parent: int, temporary: str, leaf: str) -> None:
    try:
        _renameat2(parent, temporary, leaf, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in _NO_RENAME_FLAGS:
            raise
        raise OSError(
            "this file system cannot create a file if absent (neither link nor renameat2 with RENAME_NOREPLACE); "
            "use another one"
        ) from error


def _renameat2(parent: int, old: str, new: str, flags: int) -> None:
    system_call("renameat2", parent, os.fsencode(old), parent, os.fsencode(new), ctypes.c_uint(flags))


def _write(file: int, content: memoryview) -> int:
    remaining = content
    while remaining:
        count = os.write(file, remaining)
        if not count:
            raise OSError("the system wrote nothing and gave no reason")
        remaining = remaining[count:]
    return len(content)


def _sync_directory(directory: int) -> None:
    """Unlike a file's, a directory's failed sync may be tried again: a file system with a journal stops for good when
    that cannot be written, so a later success is the truth."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    # An XFS that has shut itself down, its log unwritten, says to fsync that all is well, and to this that it is not.
    os.fstat(directory)


def _sync_ancestors(root: str) -> None:
    """Makes the names of ``root`` and of all directories above it durable, up to the mount point: this process or
    another of the job may just have made them."""
    path = os.path.realpath(root)
    while (above := os.path.dirname(path)) != path and os.stat(above).st_dev == os.stat(path).st_dev:
        try:
            directory = os.open(above, _DIRECTORY)
        except PermissionError:
            if os.access(above, os.W_OK):
                raise
            # Where we cannot write, neither we nor the rest of the job made anything.
        else:
            try:
                _sync_directory(directory)
            finally:
                _release(directory)
        path = above


def _open_subdirectory(parent: int, component: str) -> int:
    try:
        return os.open(component, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            _refuse_link(os.stat(component, dir_fd=parent, follow_symlinks=False), component)
        raise


def _refuse_link(found: os.stat_result, component: str) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise OSError(f"{component!r} is a symbolic link, and a repository may not contain any")


def _regular_size(found: os.stat_result) -> int:
    if stat.S_ISDIR(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    return found.st_size


def _entries(directory: int) -> list[os.DirEntry[str]]:
    """Regular files and directories that can be part of a name."""
    with os.scandir(directory) as found:
        entries = [entry for entry in found if is_component(entry.name)]
    for entry in entries:
        if entry.is_symlink():  # skipping it could hide objects
            _refuse_link(entry.stat(follow_symlinks=False), entry.name)
    return [e for e in entries if e.is_dir(follow_symlinks=False) or e.is_file(follow_symlinks=False)]


def _objects(directory: int, prefix: str, depth: int = 0) -> Iterator[ObjectInfo]:
    """All objects below ``directory``, sorted by whole name: ``a-b`` comes before ``a/c``."""
    if depth > _DEPTH_MAX:
        raise OSError(f"directories are nested more than {_DEPTH_MAX} deep")
    names = {e.name + "/" if e.is_dir(follow_symlinks=False) else e.name: e for e in _entries(directory)}
    for _, entry in sorted(names.items()):
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        try:
            if entry.is_file(follow_symlinks=False):
                yield ObjectInfo(name, os.stat(entry.name, dir_fd=directory, follow_symlinks=False).st_size)
                continue
            below = _open_subdirectory(directory, entry.name)
        except FileNotFoundError:  # deleted meanwhile
            continue
        try:
            yield from _objects(below, name, depth + 1)
        finally:
            _release(below)


def _sweep(directory: int, folders: Sequence[str] | None = None, depth: int = 0) -> int:
    """Removes temporary files, and directories below ``folders`` that are empty. Whoever was about to give a temporary
    file its name, or to use a directory, finds it gone and makes it again."""
    with os.scandir(directory) as found:
        entries = list(found)
    count = 0
    for entry in entries:
        if _IS_TEMPORARY(entry.name) and entry.is_file(follow_symlinks=False):
            with suppress(FileNotFoundError):
                os.unlink(entry.name, dir_fd=directory)
                count += 1
        elif (
            (is_component(entry.name) if folders is None else entry.name in folders)
            and entry.is_dir(follow_symlinks=False)
            and depth < _DEPTH_MAX
        ):
            with suppress(FileNotFoundError):
                below = _open_subdirectory(directory, entry.name)
                try:
                    count += _sweep(below, None, depth + 1)
                finally:
                    _release(below)
            if depth:
                with suppress(OSError):  # not empty, as a rule
                    os.rmdir(entry.name, dir_fd=directory)
                    count += 1
    return count


def _has_objects(directory: int, entry: os.DirEntry[str]) -> bool:
    if entry.is_file(follow_symlinks=False):
        return True
    try:
        below = _open_subdirectory(directory, entry.name)
    except FileNotFoundError:
        return False
    try:
        return next(_objects(below, ""), None) is not None
    finally:
        _release(below)


def _identity(found: os.stat_result) -> _Identity:
    return found.st_dev, found.st_ino


def _release(descriptor: int) -> None:
    """Closes what was only read, or is given up: an error here says nothing about bytes anybody relies on."""
    with suppress(OSError):
        os.close(descriptor)
