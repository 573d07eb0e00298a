"""Sharded, asynchronous, verified checkpoints for PyTorch training of any size.

The public names, loaded on first use: ``import fastckpt`` and ``fastckpt.open`` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastckpt.callback import Callback as Callback
    from fastckpt.checkpointer import Checkpointer as Checkpointer
    from fastckpt.errors import AnotherWriter as AnotherWriter
    from fastckpt.errors import AttemptAborted as AttemptAborted
    from fastckpt.errors import CommitTimeout as CommitTimeout
    from fastckpt.errors import FastckptError as FastckptError
    from fastckpt.errors import FormatError as FormatError
    from fastckpt.errors import LimitExceeded as LimitExceeded
    from fastckpt.errors import ObjectExists as ObjectExists
    from fastckpt.errors import ObjectNotFound as ObjectNotFound
    from fastckpt.errors import OutOfSpace as OutOfSpace
    from fastckpt.errors import RankFailed as RankFailed
    from fastckpt.errors import RepositoryNotFound as RepositoryNotFound
    from fastckpt.errors import RestoreError as RestoreError
    from fastckpt.errors import SaveError as SaveError
    from fastckpt.errors import SnapshotDamaged as SnapshotDamaged
    from fastckpt.errors import SnapshotExists as SnapshotExists
    from fastckpt.errors import SnapshotNotFound as SnapshotNotFound
    from fastckpt.errors import StateMismatch as StateMismatch
    from fastckpt.errors import StorageError as StorageError
    from fastckpt.errors import TopologyError as TopologyError
    from fastckpt.errors import UnsupportedVersion as UnsupportedVersion
    from fastckpt.job.per_rank import PerRank as PerRank
    from fastckpt.job.rng import RNGState as RNGState
    from fastckpt.job.tensors import Shard as Shard
    from fastckpt.options import Options as Options
    from fastckpt.pending import Pending as Pending
    from fastckpt.repository.reader import Snapshot as Snapshot
    from fastckpt.repository.repository import open as open  # noqa: A004 - the public name
    from fastckpt.topology.offer import RankPath as RankPath
    from fastckpt.topology.topology import Topology as Topology

_HOME = {
    "Callback": "callback",
    "Checkpointer": "checkpointer",
    "Options": "options",
    "Pending": "pending",
    "PerRank": "job.per_rank",
    "RNGState": "job.rng",
    "RankPath": "topology.offer",
    "Shard": "job.tensors",
    "Snapshot": "repository.reader",
    "Topology": "topology.topology",
    "open": "repository.repository",
    **dict.fromkeys(
        (
            "FastckptError",
            "SaveError",
            "SnapshotExists",
            "RankFailed",
            "CommitTimeout",
            "AttemptAborted",
            "AnotherWriter",
            "RestoreError",
            "SnapshotNotFound",
            "SnapshotDamaged",
            "StateMismatch",
            "FormatError",
            "RepositoryNotFound",
            "UnsupportedVersion",
            "LimitExceeded",
            "StorageError",
            "ObjectExists",
            "ObjectNotFound",
            "OutOfSpace",
            "TopologyError",
        ),
        "errors",
    ),
}
_NEEDS_TORCH = ("Callback", "Checkpointer", "Pending", "PerRank", "RNGState", "Shard")

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastckpt' has no attribute {name!r}")
    try:
        value = getattr(importlib.import_module(f"fastckpt.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name == "torch" and name in _NEEDS_TORCH:
            raise ImportError(
                f"fastckpt.{name} needs PyTorch, which is not installed. Install the build your machine's vendor "
                "provides, or `pip install 'fastckpt-torch[torch]'`"
            ) from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
