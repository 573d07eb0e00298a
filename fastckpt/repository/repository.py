"""The repository: FORMAT, the history of decisions, and the snapshots they name."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Sequence

from fastckpt.errors import (
    FastckptError,
    FormatError,
    LimitExceeded,
    ObjectExists,
    ObjectNotFound,
    RepositoryNotFound,
    SnapshotDamaged,
    StorageError,
    UnsupportedVersion,
)
from fastckpt.format import document, names
from fastckpt.format.decision import COMPACT, VERSION, Format, Open, decode_decision, decode_format
from fastckpt.repository.history import History, now
from fastckpt.repository.metadata import read_metadata
from fastckpt.repository.reader import Snapshot, find, newest
from fastckpt.storage.open import open_store
from fastckpt.storage.store import Store

log = logging.getLogger("fastckpt")

_FORMAT_BYTES_MAX = 64 * 1024
_DECISION_BYTES_MAX = document.DOCUMENT_BYTES_MAX + 66
_MISSING_SHOWN_MAX = 5
_PASSED_OVER_SHOWN_MAX = 10


class Repository:
    """A repository as found in a store. Any thread may read; ``history`` belongs to one thread at a time."""

    def __init__(self, store: Store) -> None:
        """``FormatError`` if the store holds no repository, ``UnsupportedVersion`` if it holds a newer one."""
        self.store = store
        try:
            data = read_metadata(store, names.FORMAT, _FORMAT_BYTES_MAX)
        except ObjectNotFound:
            raise _no_repository(store) from None
        try:
            self.format: Format = decode_format(data)
        except (UnsupportedVersion, LimitExceeded) as error:
            raise type(error)(f"{store.url}: {error}") from error
        except FormatError as error:
            raise SnapshotDamaged(f"{store.url}: {error}", object=names.FORMAT) from error
        self.format_digest = document.digest(data)
        self.history = History(store, self.format_digest)

    @property
    def url(self) -> str:
        return self.store.url

    def snapshots(self) -> list[Snapshot]:
        """All live snapshots as of now, oldest COMMIT first. The last one is the latest, whatever its step; where a
        step was committed twice, the later counts for that step."""
        self._read_history()
        return [Snapshot(self.store, live) for live in self.history.live]

    def snapshot(self, step: int | None = None) -> Snapshot:
        """The snapshot of ``step``, or the latest. ``SnapshotNotFound`` naming the steps there are."""
        return find(self.snapshots(), step, self.url)

    def last_open(self) -> Open | None:
        """The decision by which the newest job opened the repository for writing; None if none has."""
        self._read_history()
        number = self.history.number
        while number:  # twice at most: every decision names the OPEN of its writer
            entry = decode_decision(self.store.read(names.decision(number), size_max=_DECISION_BYTES_MAX), number)
            if isinstance(entry, Open):
                return entry
            number = names.writer_open_number(entry.writer)
        return None

    def choose(
        self,
        step: int | None,
        lacks: Callable[[Snapshot], list[str]],
        *,
        before: int | None = None,
        or_earlier: bool = False,
    ) -> Snapshot | None:
        """The snapshot to restore, among those committed by a decision with a number smaller than ``before``.

        An explicit step is exact, unless ``or_earlier``. Otherwise it is the last one that has what is asked for
        (``lacks`` names no key) and whose metadata checks out; newer ones passed over are named in the log with the
        reason. None if there is no snapshot at all. If there are some but none will do, it is the newest whose metadata
        checks out, or else the first error found is raised.
        """
        snapshots = [snapshot for snapshot in self.snapshots() if before is None or snapshot.live.decision < before]
        if step is not None:
            wanted = find(snapshots, step, self.url)
            if not or_earlier:
                wanted.check()
                return wanted
            snapshots = [snapshot for snapshot in snapshots if snapshot.live.decision <= wanted.live.decision]
        by_step = newest(snapshots)
        first_error: FastckptError | None = None
        lacking: list[Snapshot] = []
        passed_over = 0
        for snapshot in reversed(snapshots):
            if by_step[snapshot.step] is not snapshot:
                continue
            try:
                # First, since a check asks for every pack, and what is new in a model may be in none of many snapshots.
                if not (missing := lacks(snapshot)):
                    snapshot.check()
                    self._log_older(passed_over)
                    return snapshot
                lacking.append(snapshot)
                reason = f"it has no {_listed(missing)}"
            except StorageError:
                raise  # says nothing about the snapshot, and falling back would lose training without need
            except FastckptError as error:
                first_error, reason = first_error or error, str(error)
            passed_over += 1
            if passed_over <= _PASSED_OVER_SHOWN_MAX:
                log.warning("%s: passing over step %d: %s", self.url, snapshot.step, reason)
        self._log_older(passed_over)
        for snapshot in lacking:  # none has everything: let the caller's plan say what is missing from a whole one
            try:
                snapshot.check()
            except StorageError:
                raise
            except FastckptError as error:
                first_error = first_error or error
            else:
                return snapshot
        if first_error:
            raise first_error
        return None

    def _log_older(self, passed_over: int) -> None:
        if passed_over > _PASSED_OVER_SHOWN_MAX:
            log.warning("%s: passing over %d older snapshots too", self.url, passed_over - _PASSED_OVER_SHOWN_MAX)

    def _read_history(self) -> None:
        if self.history.number:
            self.history.refresh()
        else:
            self.history.load()


def exists(store: Store) -> bool:
    """Whether the store holds a repository. ``FormatError`` if it holds something else."""
    if _has_format(store):
        return True
    if next(iter(store.children("")), None) is None:
        return False
    if not _has_format(store):  # a job that makes the repository just now begins with FORMAT
        raise _no_repository(store)
    return True


def _has_format(store: Store) -> bool:
    try:
        store.size(names.FORMAT)
    except ObjectNotFound:
        return False
    return True


def create(store: Store, chunk_bytes: int) -> Repository:
    """The repository in the store, made now unless it is there already (then with the chunk size it has)."""
    if not exists(store):
        header = Format(
            version=VERSION, features=[COMPACT], id=secrets.token_hex(16), chunk_bytes=chunk_bytes, created=now()
        )
        with contextlib.suppress(ObjectExists):  # another job was first; its FORMAT holds
            store.create(names.FORMAT, document.seal(header))
    return Repository(store)


def open(url: str | os.PathLike[str]) -> Repository:  # noqa: A001 - the public name is fastckpt.open
    """Opens a repository for reading, without torch. ``FormatError`` if there is none at ``url``."""
    return Repository(open_store(url))


def _listed(missing: Sequence[str]) -> str:
    """The first of many keys, and how many more there are."""
    more = len(missing) - _MISSING_SHOWN_MAX
    return ", ".join(missing[:_MISSING_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")


def _no_repository(store: Store) -> RepositoryNotFound:
    children = [child for child, _ in zip(store.children(""), range(4), strict=False)]
    if not children:
        found = "there is nothing there; check the URL (the first save of a job makes a repository)"
    elif "decisions" in children:
        found = "its FORMAT object is missing; put it back from a copy of the repository"
    else:
        found = f"it holds {', '.join(children)}, but no FORMAT object; give a repository, or a new directory"
    return RepositoryNotFound(f"{store.url}: not a fastckpt repository: {found}")
