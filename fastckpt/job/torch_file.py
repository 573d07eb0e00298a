"""Reads a file written by ``torch.save``, in a process of its own: ``python -I -m fastckpt.job.torch_file``.

The file is untrusted, and ``torch.load`` reads it with a great deal of C++. So it is read here, by a process that has
nothing to lose: no environment, no directory, no files but the one on its standard input, little time and memory. It
answers to whoever started it, who trusts none of it (``cli/import_torch.py``).

    stdin      the file
    control    (number in argv) a list of tensor numbers: which to send, in which order; or its end: stop
    stdout     a header, then the bytes of the tensors asked for, back to back

A message is its length, u64 LE, then msgpack. The header is ``["ok", torch version, tensors, values]`` with tensors as
``[key, dtype, shape, number of the tensor that is the same memory, or -1]`` and values as encoded by
``format/value.py``, by name; or ``["error", kind, text]`` where kind is code, damaged, unsupported, torch or memory.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from fastckpt.format import value
from fastckpt.format.value import TensorReference

if TYPE_CHECKING:
    import torch

MEMORY_BYTES = 4 * 1024**3
"""What a process may take besides twice the file."""
CPU_SECONDS = 300
CPU_BYTES_SECOND = 10 * 1024**2
"""CPU time allowed: ``CPU_SECONDS``, and a second for so many bytes of the file."""
FILES_MAX = 32
TORCH_VERSION_MIN = (2, 10)
"""``weights_only`` of older ones has known holes: CVE-2025-32434, CVE-2026-24747."""
WRITE_BYTES = 1024**2

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38


class Refused(Exception):
    """Why a file is not read, for the header."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def main() -> None:
    control = int(sys.argv[1])
    # Whatever a library prints must not end up between the bytes.
    answer = os.dup(1)
    os.dup2(2, 1)
    _confine()
    try:
        header, tensors = _read()
    except MemoryError:
        _send(answer, ["error", "memory", "it takes more memory than its size allows for"])
        return
    except Refused as refused:
        _send(answer, ["error", refused.kind, str(refused)])
        return
    _send(answer, header)
    for number in _asked_for(control):
        _write(answer, _bytes_of(tensors[number]))


def _confine() -> None:
    os.chdir("/")
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    seconds = CPU_SECONDS + os.fstat(0).st_size // CPU_BYTES_SECOND
    for limit, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CPU, seconds),
    ):
        _limit(limit, most)


def _confine_further() -> None:
    """What torch itself needs for its import is not needed any more: other files, threads, address space."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, used + 2 * os.fstat(0).st_size + MEMORY_BYTES)
    _limit(resource.RLIMIT_NOFILE, FILES_MAX)
    _limit(resource.RLIMIT_NPROC, 0)


def _limit(limit: int, most: int) -> None:
    _, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(limit, (most, most))


def _read() -> tuple[list[Any], list[torch.Tensor]]:
    try:
        import torch
    except ImportError:
        raise Refused("torch", "torch is not installed; pip install 'fastckpt-torch[torch]'") from None
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH_VERSION_MIN:
        raise Refused("torch", f"torch {torch.__version__} cannot read untrusted files safely; install 2.10 or newer")
    torch.set_num_threads(1)  # no further thread may be started from here on
    from fastckpt.job.values import to_plain

    _confine_further()
    content = _load(torch)
    walk = _Walk(torch, to_plain)
    walk.top(content)
    try:
        values = {name: value.encode(tree) for name, tree in walk.values.items()}
    except (TypeError, ValueError) as error:
        raise Refused("unsupported", str(error)) from None
    return ["ok", str(torch.__version__), walk.described, values], walk.tensors


def _load(torch: Any) -> Any:
    if os.pread(0, 4, 0)[:4] != b"PK\x03\x04" and os.pread(0, 1, 0) != b"\x80":
        raise Refused("damaged", "it is not a file that torch.save wrote")
    try:
        with os.fdopen(0, "rb", closefd=False) as file:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except MemoryError:
        raise
    except Exception as error:
        text = str(error)
        # What weights_only would have to import is a GLOBAL; what it got in another way and does not know has no name.
        if (found := re.search(r"GLOBAL (\S+)", text)) or "add_safe_globals" in text or "unrecognized function" in text:
            raise Refused("code", f"it needs {found[1] if found else 'something of its own'} to be called") from None
        if "TorchScript" in text:
            raise Refused("code", "it is a TorchScript archive, which is a program") from None
        if "can't allocate memory" in text or "not enough memory" in text:
            raise MemoryError from None
        first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
        if "weights_only" in first:  # torch's advice is to load it without protection
            first = "neither an archive nor the older form, or cut short"
        raise Refused("damaged", f"torch cannot read it ({first[:300]})") from None


class _Walk:
    """From nested containers to tensors by key and plain values by name."""

    def __init__(self, torch: Any, to_plain: Any) -> None:
        self._torch = torch
        self._to_plain = to_plain
        self.tensors: list[torch.Tensor] = []
        self.described: list[tuple[str, str, list[int], int]] = []
        self.values: dict[str, object] = {}
        self._keys: set[str] = set()
        self._memory: dict[tuple[Any, ...], int] = {}

    def top(self, content: Any) -> None:
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            raise Refused("unsupported", f"it holds a {kind}, not a dict of names (a state dict)")
        try:
            self.entries("", content)
        except (TypeError, ValueError, RecursionError) as error:
            raise Refused("unsupported", str(error)) from None

    def entries(self, prefix: str, mapping: Mapping[Any, Any]) -> None:
        """A state dict: an entry is a tensor, a state dict again, or a plain value of that name."""
        for name, item in mapping.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"{prefix or 'the file'}: names are non-empty strings, not {name!r}")
            if isinstance(item, self._torch.Tensor):
                self.tensor(prefix + name, item)
            elif self.is_state_dict(item):
                self.entries(f"{prefix}{name}.", item)
            else:
                self.value(prefix + name, item)

    def is_state_dict(self, item: Any) -> bool:
        return (
            isinstance(item, Mapping)
            and all(isinstance(name, str) and name for name in item)
            and any(isinstance(entry, self._torch.Tensor) or self.is_state_dict(entry) for entry in item.values())
        )

    def value(self, name: str, item: Any) -> None:
        if name in self.values:
            raise ValueError(f"{name}: two things in the file have this name")
        plain, elsewhere = self._to_plain(self.without_tensors(item, name), name)
        if elsewhere:
            raise TypeError(f"{name}: tensors may lie in dicts, lists and tuples only")
        self.values[name] = plain

    def without_tensors(self, item: Any, key: str) -> Any:
        if isinstance(item, self._torch.Tensor):
            self.tensor(key, item)
            return TensorReference(key)
        kind = type(item)
        if isinstance(item, dict):
            mapping = kind()
            for name, entry in item.items():
                mapping[name] = self.without_tensors(entry, f"{key}.{name}")
            return mapping
        if kind in (list, tuple):
            return kind(self.without_tensors(entry, f"{key}.{at}") for at, entry in enumerate(item))
        return item

    def tensor(self, key: str, tensor: Any) -> None:
        self._to_plain(tensor, key)  # refuses, naming the key, what cannot be saved
        if key in self._keys:
            raise ValueError(f"{key}: two tensors in the file have this key")
        self._keys.add(key)
        tensor = tensor.detach()
        number = len(self.tensors)
        same = -1
        if tensor.numel():
            memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            first = self._memory.setdefault(memory, number)
            same = -1 if first == number else first
        self.tensors.append(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.described.append((key, dtype, list(tensor.shape), same))


def _asked_for(control: int) -> list[int]:
    with os.fdopen(control, "rb") as file:
        data = file.read()
    return msgspec.msgpack.decode(data, type=list[int]) if data else []


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    # As in values.py: one-byte types become bytes first, and what a conjugated view stands for is not in memory.
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor.resolve_conj().resolve_neg()
    array: Any = raw.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _send(answer: int, message: object) -> None:
    data = msgspec.msgpack.encode(message)
    _write(answer, memoryview(len(data).to_bytes(8, "little") + data))


def _write(answer: int, data: memoryview) -> None:
    while data:
        data = data[os.write(answer, data[:WRITE_BYTES]) :]


if __name__ == "__main__":
    main()
