"""Which file system holds a path, and what is known of such ones that no probe can find out: who keeps the bytes.

Of a mount only its type and those options that are worth a warning are ever shown: sources and other options can hold
names and passwords.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastckpt.storage.probe import Fact, Finding

_TABLE = Path("/proc/self/mountinfo")
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ncpfs"}
_WORRYING = {
    "nobarrier": "the disk's cache is never flushed",
    "barrier=0": "the disk's cache is never flushed",
    "volatile": "fsync does nothing",
    "soft": "a server that is slow makes writes fail",
    "softerr": "a server that is slow makes writes fail",
    "data=writeback": "after a crash files may hold old blocks of others (found by their hashes, but lost)",
}


@dataclass(frozen=True)
class Mount:
    point: str
    type: str
    options: frozenset[str]
    """Of the mount and of the file system. May hold secrets: shown only if known."""


def mount_of(path: str, table: Path = _TABLE) -> Mount | None:
    """The mount that holds ``path``; None where the system has no table of mounts."""
    path = os.path.realpath(path)
    try:
        lines = table.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    found: Mount | None = None
    for mount in filter(None, map(_parse, lines)):
        inside = path == mount.point or path.startswith(mount.point.rstrip("/") + "/")
        # A later mount on the same point hides the earlier one.
        if inside and (found is None or len(mount.point) >= len(found.point)):
            found = mount
    return found


def file_system(path: str, table: Path = _TABLE) -> Finding:
    """Whether what is written here can be durable at all."""
    mount = mount_of(path, table)
    if mount is None:
        return Finding("file system", "ok", "unknown: this system has no /proc/self/mountinfo")
    worrying = sorted(mount.options & _WORRYING.keys())
    texts, changes = [f"{mount.type} on {mount.point}"], []
    if mount.type in _IN_MEMORY:
        texts.append("it is memory: snapshots are gone after a power cut or a reboot")
        changes.append("for snapshots that last, use a directory on a disk")
    elif mount.type == "overlay":
        texts.append("a container's own layer: snapshots are gone when the container is removed")
        changes.append("mount a volume from outside and save there")
    elif mount.type in _NETWORK:
        texts.append("a network file system: durable only if its server is")
        changes.append("make sure that the server writes before it answers (NFS: export with sync, not async)")
    elif mount.type == "fuse" or mount.type.startswith("fuse."):
        texts.append("a file system in a process: durable only if that process makes it so")
        changes.append("ask who runs it what fsync does there")
    for option in worrying:
        texts.append(f"mounted with {option}: {_WORRYING[option]}")
        changes.append(f"mount it without {option}")
    facts: dict[str, Fact] = {"type": mount.type, "worrying_options": ",".join(worrying)}
    return Finding("file system", "warn" if changes else "ok", "; ".join(texts), "; ".join(changes), facts)


def _parse(line: str) -> Mount | None:
    """One line of mountinfo: ``id parent major:minor root point options [tags] - type source options``."""
    before, separator, after = line.partition(" - ")
    fields, described = before.split(" "), after.split(" ")
    if not separator or len(fields) < 6 or len(described) < 3:
        return None
    point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
    return Mount(point, described[0], frozenset([*fields[5].split(","), *described[2].split(",")]))
