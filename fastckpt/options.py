"""Every knob, in one place. A knob exists because two of its values are each best somewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHUNK_BYTES_MIN = 4 * 1024
CHUNK_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a ``Checkpointer`` works. The defaults suit a training job on a local or parallel file system."""

    chunk_bytes: int | None = None
    """Unit of hash and reuse: a power of two from 4 KiB to 64 MiB, fixed when a repository is created. None chooses
    the smallest from 4 MiB on that keeps the snapshot far below 10^7 chunks. Below 4 MiB only for small states."""
    codec: Literal["raw", "zstd"] = "raw"
    """How chunks are stored. zstd trades CPU for space; dense float32 training shrinks by a tenth at most. A chunk that
    does not shrink is stored raw either way."""
    fence: Literal["hook", "explicit", "copy"] = "hook"
    """What keeps the optimizer from changing parameters while they are staged. "hook": every ``Optimizer.step`` waits.
    "explicit": you call ``wait_staged`` before it. "copy": ``save`` itself waits until everything is staged."""
    fence_seconds_max: float = 60.0
    """A fence that takes longer gives up the attempt and lets training go on."""
    staging_bytes_max: int | None = None
    """Host memory for staging, in bytes. None: the smaller of this rank's share of the snapshot and a quarter of the
    available memory divided by the ranks of the node. Smaller budgets stream, which holds the fence longer."""
    writers: int | None = None
    """Ranks that write what several ranks hold, of each set of ranks that holds the same, at most. None: as many as
    make the save faster."""
    streams: int | None = None
    """Threads of a rank that write, each into packs of its own. None: four."""
    read_fanout: Literal["node", "job"] = "node"
    """Who reads what several ranks restore. "node": of each node one rank, for the others. "job": of the whole job one,
    and ranks of other nodes fetch it from there, over TCP and the interface by which they reach the job's key-value
    store: for storage that all nodes together could wear out, and networks that are faster. It takes 64 MiB more a
    rank."""
    copy: tuple[str, ...] = ()
    """Globs of keys to copy before ``save`` returns: tensors that something other than ``Optimizer.step`` changes."""
    commit_seconds_max: float = 600.0
    """Longest wait for other ranks, in a save or a restore, before it fails and names those that are missing; and, less
    a quarter, for any one answer of the storage, such as to the fsync of 1 GiB, before it is taken to be dead."""
    record_hosts: bool = False
    """Put host names into the environment record of each snapshot."""

    def __post_init__(self) -> None:
        for name in ("chunk_bytes", "staging_bytes_max", "writers", "streams"):
            number: object = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
                raise ValueError(f"Options.{name}={number!r} is not a whole number")
        for name in ("fence_seconds_max", "commit_seconds_max"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"Options.{name}={number!r} is not a number of seconds")
        size = self.chunk_bytes
        if size is not None and not (CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX and size.bit_count() == 1):
            raise ValueError(f"Options.chunk_bytes={size} is not a power of two from 4 KiB to 64 MiB")
        if self.codec not in ("raw", "zstd"):
            raise ValueError(f"Options.codec={self.codec!r} is not 'raw' or 'zstd'")
        if self.fence not in ("hook", "explicit", "copy"):
            raise ValueError(f"Options.fence={self.fence!r} is not 'hook', 'explicit' or 'copy'")
        if self.read_fanout not in ("node", "job"):
            raise ValueError(f"Options.read_fanout={self.read_fanout!r} is not 'node' or 'job'")
        for name in ("fence_seconds_max", "commit_seconds_max"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Options.{name}={getattr(self, name)} is not positive")
        for name in ("staging_bytes_max", "writers", "streams"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"Options.{name}={value} is not positive")
        if not isinstance(self.record_hosts, bool):  # "no" would be taken for yes
            raise ValueError(f"Options.record_hosts={self.record_hosts!r} is not True or False")
        globs: object = self.copy  # a bare string is the likely mistake, and is itself made of strings
        if not isinstance(globs, tuple | list) or not all(isinstance(glob, str) for glob in globs):
            raise ValueError(f"Options.copy={self.copy!r} is not a tuple of globs")
