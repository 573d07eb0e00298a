"""What this machine, and the limits set on this process, mean for saves. Reads no environment variable."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
from pathlib import Path
from typing import Final

from fastckpt.buffers import Pool
from fastckpt.cli.terminal import size_text
from fastckpt.storage.probe import Checks, Fact, Finding

_MEMORY_BYTES_MIN: Final = 1024**3
_OPEN_FILES_MIN: Final = 1024
_TORCH_MIN: Final = (2, 10)


def checks() -> Checks:
    """Every check of the machine."""
    yield "cpu", cpu
    yield "memory", memory
    yield "shared memory", shared_memory
    yield "limits", limits
    yield "software", software


def cpu(root: Path = Path("/")) -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota(root)
    text = f"{usable} of {os.cpu_count()} for this process"
    text += "" if quota is None else f", and the cgroup allows the time of {quota:g}"
    return Finding("cpu", "ok", text, facts={"usable": usable, "cgroup_cpus": quota})


def memory(root: Path = Path("/")) -> Finding:
    """Saves stage through a quarter of what is available, unless told otherwise."""
    available = _memory_available(root)
    limit = _memory_limit(root)
    facts: dict[str, Fact] = {"available_bytes": available, "cgroup_bytes_max": limit}
    text = "available memory is unknown" if available is None else f"{size_text(available)} available"
    text += ", no cgroup limit" if limit is None else f", cgroup limit {size_text(limit)}"
    if min(number for number in (available, limit, 2**63) if number is not None) < _MEMORY_BYTES_MIN:
        change = "give the job more memory, or expect saves to hold the training loop longer"
        return Finding("memory", "warn", text, change, facts)
    return Finding("memory", "ok", text, facts=facts)


def shared_memory() -> Finding:
    """Makes the pool that saves stage through, as small as can be."""
    about = "shared memory"
    pool = Pool(1, 1)
    try:
        slot = pool.take()
        slot.view[:] = bytes(len(slot.view))
        pool.give(slot)
    finally:
        pool.close()
    kind = "by memfd" if hasattr(os, "memfd_create") else "by an anonymous map"
    return Finding(about, "ok", f"{kind}; the size of /dev/shm does not matter", facts={"memfd": kind == "by memfd"})


def limits() -> Finding:
    found = {
        name: None if soft == resource.RLIM_INFINITY else soft
        for name, number in {
            "open_files_max": resource.RLIMIT_NOFILE,
            "file_bytes_max": resource.RLIMIT_FSIZE,
            "address_space_bytes_max": resource.RLIMIT_AS,
            "locked_memory_bytes_max": resource.RLIMIT_MEMLOCK,
        }.items()
        for soft, _ in [resource.getrlimit(number)]
    }
    files, size, space = found["open_files_max"], found["file_bytes_max"], found["address_space_bytes_max"]
    locked = found["locked_memory_bytes_max"]
    text = ", ".join(
        [
            f"open files: {'no limit' if files is None else files}",
            f"file size: {_limit_text(size)}",
            f"address space: {_limit_text(space)}",
            f"locked memory: {_limit_text(locked)}",
        ]
    )
    changes = []
    if files is not None and files < _OPEN_FILES_MIN:
        changes.append(f"allow {_OPEN_FILES_MIN} open files or more (ulimit -n)")
    if size is not None:
        changes.append("lift the limit of the file size (ulimit -f): a save that reaches it fails")
    if space is not None:
        changes.append("lift the limit of the address space (ulimit -v): mapped memory counts, used or not")
    return Finding("limits", "warn" if changes else "ok", text, "; ".join(changes), found)


def software() -> Finding:
    """Found without importing torch: that takes seconds, and this must work where it is broken."""
    torch: str | None = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        torch = importlib.metadata.version("torch")
    facts: dict[str, Fact] = {
        "fastckpt": importlib.metadata.version("fastckpt-torch"),
        "python": platform.python_version(),
        "torch": torch,
        "kernel": platform.release(),
    }
    text = f"fastckpt {facts['fastckpt']}, Python {facts['python']}, {platform.system()} {facts['kernel']}"
    if torch is None:
        return Finding(
            "software", "ok", f"{text}, no PyTorch (only saving and restoring in a job needs it)", facts=facts
        )
    if tuple(int(number) for number in torch.split("+")[0].split(".")[:2] if number.isdigit()) < _TORCH_MIN:
        change = f"install PyTorch {_TORCH_MIN[0]}.{_TORCH_MIN[1]} or newer"
        return Finding("software", "fail", f"{text}, PyTorch {torch}", change, facts)
    return Finding("software", "ok", f"{text}, PyTorch {torch}", facts=facts)


def _limit_text(limit: int | None) -> str:
    return "no limit" if limit is None else size_text(limit)


def _memory_available(root: Path) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _memory_limit(root: Path) -> int | None:
    """The smallest on the way up the cgroups."""
    texts = [_read(d / "memory.max") or _read(d / "memory.limit_in_bytes") for d in _cgroups(root, "memory")]
    # Version 1 has no word for "no limit" but a number near 2**63.
    return min((int(text) for text in texts if text.isdigit() and int(text) < 2**60), default=None)


def _cpu_quota(root: Path) -> float | None:
    """CPUs; the smallest on the way up the cgroups."""
    texts = [
        _read(d / "cpu.max") or f"{_read(d / 'cpu.cfs_quota_us')} {_read(d / 'cpu.cfs_period_us')}"
        for d in _cgroups(root, "cpu")
    ]
    quotas = [text.split() for text in texts]
    return min((int(q[0]) / int(q[1]) for q in quotas if len(q) == 2 and q[0].isdigit()), default=None)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The directory of this process's cgroup and those above it, in either version of cgroups."""
    found: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        # In a container the path may be that of the host: then only what is mounted can be seen.
        below = base / path.lstrip("/")
        found += [directory for directory in (below, *below.parents) if directory.is_relative_to(base)]
    return found


def _read(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text().strip()
    return ""
