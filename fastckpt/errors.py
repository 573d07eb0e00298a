"""Every error fastckpt raises on purpose.

    FastckptError
      SaveError            SnapshotExists, RankFailed, CommitTimeout, AttemptAborted, AnotherWriter
      RestoreError         SnapshotNotFound, SnapshotDamaged, StateMismatch
      FormatError          RepositoryNotFound, UnsupportedVersion, LimitExceeded
      StorageError         ObjectExists, ObjectNotFound, OutOfSpace
      TopologyError

Wrong arguments stay ``ValueError`` and ``TypeError``. A message says what happened, where (step, rank, key, object)
and what to do next. All of them pickle, since they cross processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class FastckptError(Exception):
    """Base of all errors raised by fastckpt."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[FastckptError], args: tuple[Any, ...], fields: dict[str, Any]) -> FastckptError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(fields)
    return error


class SaveError(FastckptError):
    """A snapshot was not committed. Training state and earlier snapshots are untouched."""


class SnapshotExists(SaveError):
    """This writer has already saved, or is saving, a snapshot of the same step."""


class RankFailed(SaveError):
    """One or more ranks failed; ``failures`` maps each of them to its error, and every rank raises."""

    def __init__(self, message: str, failures: Mapping[int, BaseException] | None = None) -> None:
        super().__init__(message)
        self.failures: dict[int, BaseException] = dict(failures or {})


class CommitTimeout(SaveError):
    """Some ranks were not heard of within the deadline; ``missing_ranks`` names them."""

    def __init__(self, message: str, missing_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.missing_ranks = tuple(missing_ranks)


class AttemptAborted(SaveError):
    """The attempt was given up before its decision, for example because the fence took too long."""


class AnotherWriter(SaveError):
    """A later job has opened the repository for writing; this one may never commit again."""


class RestoreError(FastckptError):
    """A restore did not succeed."""


class SnapshotNotFound(RestoreError):
    """The repository holds no such snapshot."""


class SnapshotDamaged(RestoreError):
    """Stored bytes are not what was saved. ``key``, ``shard``, ``object`` and ``offset`` say where, as far as known."""

    def __init__(
        self,
        message: str,
        *,
        key: str | None = None,
        shard: str | None = None,
        object: str | None = None,  # noqa: A002 - the glossary's word
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.key = key
        self.shard = shard
        self.object = object
        self.offset = offset


class StateMismatch(RestoreError):
    """The snapshot does not fit the state it is to be restored into; the message lists every key and why."""


class FormatError(FastckptError):
    """Bytes that are not a fastckpt object, or break its rules."""


class RepositoryNotFound(FormatError):
    """There is no fastckpt repository at the URL."""


class UnsupportedVersion(FormatError):
    """Written by a newer fastckpt, or with a feature this one does not know."""


class LimitExceeded(FormatError):
    """A size or count is beyond the limits of the format."""


class StorageError(FastckptError):
    """The store failed. ``transient``: it says nothing about what is stored, and trying again may help, at once or once
    the cause is removed."""

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class ObjectExists(StorageError):
    """An object of that name exists already."""


class ObjectNotFound(StorageError):
    """No object has that name."""


class OutOfSpace(StorageError):
    """The store has no room (or no quota) left."""


class TopologyError(FastckptError):
    """The topology is wrong, or ranks disagree about it."""
