"""A snapshot's tensors as one .safetensors file, written piece by piece: memory does not depend on its size.

The safetensors library writes only what it holds in memory whole, so the header is made here; it follows from the
layout before any byte is read. The format: header bytes (u64 LE), the header as JSON, the tensors back to back.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import itertools
import json
import math
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastckpt.errors import LimitExceeded, StateMismatch
from fastckpt.format.dtype import item_bytes
from fastckpt.format.shard import Box
from fastckpt.plan.restore_plan import Want
from fastckpt.repository.reader import Snapshot

FILE_BYTES_MAX = 2**62
HEADER_BYTES_MAX = 100_000_000
"""What the safetensors library accepts."""

DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""What safetensors calls a dtype; it has no name for the others."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor in the file."""

    number: int
    """Of the key in the layout."""
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file."""
    bytes: int


@dataclass(frozen=True)
class FilePlan:
    """A file that can be written: everything about it but the bytes of the tensors."""

    head: bytes
    """The header with its length."""
    tensors: tuple[FileTensor, ...]
    file_bytes: int


OnBytes = Callable[[int, int], None]
"""Told bytes written and bytes in all, from several threads, one at a time."""


def plan_file(snapshot: Snapshot, only: Sequence[str] = (), strip: str = "") -> FilePlan:
    """The file with the tensors whose key matches any of the globs (without globs: all), under names without the
    prefix ``strip``. ``StateMismatch`` naming the keys where safetensors has no such dtype or two names are the same.
    """
    layout = snapshot.layout
    chosen: list[tuple[int, str]] = []
    by_name: dict[str, str] = {}
    for number in range(len(layout.keys)):
        label = layout.label(number)
        if only and not any(fnmatch.fnmatchcase(label, glob) for glob in only):
            continue
        name = label.removeprefix(strip)
        if name in by_name or name in ("", "__metadata__"):
            other = f"{by_name[name]} and {label} would both" if name in by_name else f"{label} would"
            raise StateMismatch(
                f"{other} be called {name!r} in the file; choose another --strip, or fewer keys (--only)"
            )
        if layout.dtypes[number] not in DTYPES:
            raise StateMismatch(
                f"{label}: safetensors has no name for {layout.dtypes[number]}; leave it out with --only"
            )
        by_name[name] = label
        chosen.append((number, name))
    # Large elements first: then every tensor is aligned to its elements, as readers that map the file want it.
    chosen.sort(key=lambda entry: (-item_bytes(layout.dtypes[entry[0]]), entry[1]))
    sizes = [math.prod(layout.shapes[number]) * item_bytes(layout.dtypes[number]) for number, _ in chosen]
    starts = list(itertools.accumulate(sizes, initial=0))
    if starts[-1] > FILE_BYTES_MAX:
        raise LimitExceeded(f"a file of {starts[-1]} bytes; export fewer keys at a time (--only)")
    head = _head(snapshot, chosen, starts)
    tensors = tuple(
        FileTensor(number, name, layout.dtypes[number], tuple(layout.shapes[number]), len(head) + start, size)
        for (number, name), start, size in zip(chosen, starts, sizes, strict=False)
    )
    return FilePlan(head, tensors, len(head) + starts[-1])


def _head(snapshot: Snapshot, chosen: Sequence[tuple[int, str]], starts: Sequence[int]) -> bytes:
    layout = snapshot.layout
    # Transformers refuses files that do not say for which framework they are.
    header: dict[str, object] = {"__metadata__": {"format": "pt", "step": str(snapshot.step)}}
    for (number, name), (start, stop) in zip(chosen, itertools.pairwise(starts), strict=True):
        header[name] = {
            "dtype": DTYPES[layout.dtypes[number]],
            "shape": layout.shapes[number],
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_BYTES_MAX:
        raise LimitExceeded(f"a safetensors header of {len(text)} bytes; export fewer keys at a time (--only)")
    return len(text).to_bytes(8, "little") + text


def write_file(
    plan: FilePlan, snapshot: Snapshot, path: str, *, force: bool = False, on_progress: OnBytes | None = None
) -> None:
    """Writes the file: under a temporary name beside ``path``, durably, then renamed, so that ``path`` is the whole
    file or not there. ``FileExistsError`` if something is there already, unless ``force``. ``SnapshotDamaged`` if the
    snapshot is; then nothing is left behind."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "is a directory; name the file to write", path)
    if os.path.lexists(path) and not force:
        raise _exists(path)
    directory, leaf = os.path.split(os.path.abspath(path))
    # The name is cut so that even the longest leaves room for what makes it unique.
    temporary = os.path.join(directory, f".{leaf[:100]}.{secrets.token_hex(8)}.part")
    try:
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, directory) from error
    try:
        try:
            _allocate(file, plan.file_bytes)
            _write_at(file, 0, memoryview(plan.head))
            _write_tensors(file, plan, snapshot, on_progress)
            os.fsync(file)
        finally:
            os.close(file)
        _move(temporary, path, force)
    except OSError as error:  # calls by descriptor do not name the file
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        room = f"; the whole file takes {plan.file_bytes} bytes" if full else ""
        raise type(error)(error.errno, f"{error.strerror}{room}", path) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_directory(directory)


def _write_tensors(file: int, plan: FilePlan, snapshot: Snapshot, on_progress: OnBytes | None) -> None:
    counter = _Counter(plan.file_bytes - len(plan.head), on_progress)
    wants: list[Want] = []
    sinks: list[FileSink] = []
    for tensor in plan.tensors:
        if tensor.bytes:
            wants.append(Want(tensor.number, Box.whole(tensor.shape), len(sinks)))
            sinks.append(FileSink(file, tensor.start, tensor.shape, item_bytes(tensor.dtype), counter))
    snapshot.read_into(wants, sinks)


class _Counter:
    def __init__(self, total: int, on_progress: OnBytes | None) -> None:
        self._total = total
        self._on_progress = on_progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        if self._on_progress is not None:
            with self._lock:
                self._done += count
                self._on_progress(self._done, self._total)


class FileSink:
    """A whole tensor in C order in a file, from byte ``start`` on."""

    def __init__(self, file: int, start: int, shape: Sequence[int], item: int, counter: _Counter) -> None:
        self._file = file
        self._start = start
        self._shape = tuple(shape)
        self._item = item
        self._counter = counter

    def place(self, offsets: tuple[int, ...], sizes: tuple[int, ...], data: memoryview) -> None:
        at = 0
        for position, count in runs(self._shape, offsets, sizes):
            length = count * self._item
            _write_at(self._file, self._start + position * self._item, data[at : at + length])
            at += length
        assert at == len(data)
        self._counter.add(len(data))


def runs(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The runs of elements that a region is made of in the C order of a tensor: (position of the first, elements)."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # The innermost axes that the region spans fully, and the one before them, lie back to back.
    inner = len(shape)
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    outer = max(inner - 1, 0)
    count = math.prod(sizes[outer:])
    first = sum(offset * stride for offset, stride in zip(offsets[outer:], strides[outer:], strict=True))
    for index in itertools.product(*(range(o, o + s) for o, s in zip(offsets[:outer], sizes[:outer], strict=True))):
        yield first + sum(i * stride for i, stride in zip(index, strides, strict=False)), count


def _write_at(file: int, position: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(file, data, position)
        if not count:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        data = data[count:]
        position += count


def _allocate(file: int, size: int) -> None:
    """Takes the room now: better no file at once than half a file later."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
        os.ftruncate(file, size)


def _move(temporary: str, path: str, force: bool) -> None:
    if force:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path, follow_symlinks=False)  # unlike a rename it never replaces what came meanwhile
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        if os.path.lexists(path):
            raise _exists(path) from None
        os.rename(temporary, path)


def _exists(path: str) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "exists already; --force overwrites it", path)


def _sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
