"""The repository's serial history of decisions: numbered, each created once, never rewritten.

It is the one commit protocol, for files and object stores alike. The rules:

* Decision n + 1 carries the digest of decision n. Appending is create-if-absent of the next number; whoever loses the
  race reads what is there and checks again whether its own entry is still legal.
* OPEN: a job starts writing. Its number is part of the writer's id, and so of every attempt and pack of that writer.
* COMMIT of an attempt is legal only if no OPEN later than its writer's own exists (so zombies and second jobs are
  fenced), and if the attempt was not ABORTed. A snapshot exists if and only if a COMMIT names it.
* ABORT of an attempt is legal under the same rule; it lets its writer delete what the attempt wrote.
* After its OPEN, a writer may delete what uncommitted attempts of writers with a *smaller* number left behind: they can
  never commit any more. It may not touch writers with a larger number: those have fenced it.
* Decisions carry the list of live snapshots, or the number of the last decision that does; the list is repeated often
  enough that opening reads few decisions, and seldom enough that the history stays small.

No clocks, no locks, no leases: a writer may be paused for a year at any point.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Callable
from typing import TypeVar

import msgspec

from fastckpt.errors import (
    AnotherWriter,
    AttemptAborted,
    FormatError,
    ObjectExists,
    ObjectNotFound,
    SaveError,
    SnapshotDamaged,
    StorageError,
)
from fastckpt.format import document, names
from fastckpt.format.decision import Abort, Commit, Decision, Live, Open, decode_decision
from fastckpt.repository.metadata import read_metadata
from fastckpt.storage.store import Store

_Entry = TypeVar("_Entry", Open, Commit, Abort)
_RACES_MAX = 1000
_DECISION_BYTES_MAX = document.DOCUMENT_BYTES_MAX + 66


def now() -> str:
    """The time as decisions show it to people; no rule reads it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class History:
    """The decisions of one repository as far as they have been read. One thread at a time."""

    def __init__(self, store: Store, format_digest: str = "") -> None:
        """``format_digest``: of the FORMAT object the history belongs to, which its first decision must carry."""
        self._store = store
        self._format_digest = format_digest
        self.number = 0
        """Of the newest decision read; 0 before the first."""
        self._digest = format_digest
        self._live: list[Live] = []
        self._live_at = 0
        self._writer = ""
        """Of the newest OPEN: the only one whose decisions are legal."""
        self._aborted: set[str] = set()

    @property
    def live(self) -> list[Live]:
        """Live snapshots, oldest COMMIT first."""
        return list(self._live)

    def load(self) -> None:
        """Reads from the last list of live snapshots to the end. ``SnapshotDamaged`` naming the decision if one is
        damaged or missing, or breaks a rule."""
        try:
            numbers = sorted(names.decision_number(child) for child in self._store.children("decisions"))
        except FormatError as error:
            raise SnapshotDamaged(f"{self._store.url}: {error}", object="decisions") from error
        if numbers != list(range(1, len(numbers) + 1)):
            gap = next((n for n, have in enumerate(numbers, 1) if n != have), len(numbers) + 1)
            raise SnapshotDamaged(
                f"{self._store.url}: {names.decision(gap)} is missing from the history; put it back from a copy. "
                "`fastckpt verify --all` says what can still be read",
                object=names.decision(gap),
            )
        if not numbers:
            return
        newest, _ = self._read(numbers[-1])
        first, data = self._read(newest.live_at) if newest.live_at else (None, b"")
        if first is None or first.live is None:
            raise self._damaged(newest.number, "points to no list of live snapshots")
        self.number, self._digest = first.number, document.digest(data)
        self._live, self._live_at = list(first.live), first.number
        self._writer = first.writer
        if first.number == 1:
            self._check_previous(first, self._format_digest)
        elif newest.number > 1:
            self._check_previous(self._read(1)[0], self._format_digest)
        self.refresh()

    def refresh(self) -> list[Decision]:
        """Reads the decisions appended since, checks them, and returns them."""
        fresh: list[Decision] = []
        while True:
            try:
                entry, data = self._read(self.number + 1)
            except ObjectNotFound:
                return fresh
            self._follow(entry, data)
            fresh.append(entry)

    def read_all(self) -> list[Decision]:
        """Every decision from the first, with the whole chain checked; for ``verify``."""
        whole = History(self._store, self._format_digest)
        self.load()
        entries: list[Decision] = []
        while whole.number < self.number or not entries:  # a job beside this may be appending
            fresh = whole.refresh()
            if not fresh:
                break
            entries += fresh
            self.refresh()
        if whole.number != self.number or whole._digest != self._digest or whole._live != self._live:
            raise self._damaged(self.number, "does not follow from the history before it")
        return entries

    def append_open(self) -> str:
        """Appends OPEN and returns the new writer's id. Every earlier writer is fenced from then on."""
        nonce = secrets.token_hex(8)
        entry = self._append(
            lambda number: Open(
                number=number,
                previous=self._digest,
                writer=names.writer(number, nonce),
                created=now(),
                live=None,
                live_at=0,
            )
        )
        return entry.writer

    def append_commit(self, writer: str, snapshot: Callable[[int], Live]) -> Commit:
        """Appends COMMIT; ``snapshot`` is given the decision's number. ``AnotherWriter`` or ``AttemptAborted`` if it
        is not legal (any more). After any other error the outcome is unknown: ``committed`` tells."""

        def entry(number: int) -> Commit:
            new = snapshot(number)
            self._check_legal(writer, new.attempt)
            return Commit(
                number=number,
                previous=self._digest,
                writer=writer,
                created=new.created,
                live=None,
                live_at=0,
                snapshot=new,
            )

        return self._append(entry)

    def append_abort(self, writer: str, attempt: str) -> None:
        """Appends ABORT, unless the attempt is committed or aborted already. ``AnotherWriter`` once fenced."""

        def entry(number: int) -> Abort:
            self._check_legal(writer, attempt)
            return Abort(
                number=number,
                previous=self._digest,
                writer=writer,
                created=now(),
                live=None,
                live_at=0,
                attempt=attempt,
            )

        self.refresh()
        if self._is_decided(attempt):
            return
        try:
            self._append(entry)
        except AnotherWriter:
            raise
        except SaveError:
            # A create of its COMMIT that nobody waits for any more may come to light between two looks.
            if not self._is_decided(attempt):
                raise

    def confirm(self, number: int) -> None:
        """Makes sure that a decision that was read is durable too; raises ``StorageError`` if that cannot be known."""
        name = names.decision(number)
        _settle(self._store, name, self._store.read(name, size_max=_DECISION_BYTES_MAX))

    def committed(self, attempt: str) -> bool:
        """Whether a COMMIT of ``attempt`` is among the decisions read."""
        return any(snapshot.attempt == attempt for snapshot in self._live)

    def aborted(self, attempt: str) -> bool:
        """Whether an ABORT of ``attempt`` is among the decisions read."""
        return attempt in self._aborted

    def _is_decided(self, attempt: str) -> bool:
        return self.aborted(attempt) or self.committed(attempt)

    def fenced(self, writer: str) -> bool:
        """Whether a later OPEN than the writer's own is among the decisions read."""
        return bool(self._writer) and names.writer_open_number(writer) < names.writer_open_number(self._writer)

    def _check_legal(self, writer: str, attempt: str) -> None:
        if self.fenced(writer):
            raise AnotherWriter(
                f"{self._store.url}: a later job has opened this repository "
                f"(decision {names.writer_open_number(self._writer)}); attempt {attempt} of this one can never be "
                "committed. Stop one of the two jobs"
            )
        if attempt in self._aborted:
            raise AttemptAborted(f"{self._store.url}: attempt {attempt} was aborted")
        if writer != self._writer or names.attempt_writer(attempt) != writer:
            raise SaveError(f"{self._store.url}: attempt {attempt} is another writer's than {writer}")
        if self.committed(attempt):
            raise SaveError(f"{self._store.url}: attempt {attempt} is committed already")

    def _append(self, make: Callable[[int], _Entry]) -> _Entry:
        for _ in range(_RACES_MAX):
            self._check_still_there()
            self.refresh()
            entry = self._with_live(make(self.number + 1))
            data = document.seal(entry)
            name = names.decision(entry.number)
            decode_decision(data, entry.number)  # what no reader would accept must never be created
            if _settle(self._store, name, data):
                self._follow(entry, data)
                return entry
        raise StorageError(
            f"{self._store.url}: lost {_RACES_MAX} races for the next decision in a row: other jobs are saving here, "
            "stop all but one",
            transient=True,
        )

    def _check_still_there(self) -> None:
        """``AnotherWriter`` if the history that was read is gone or another one is in its place: whoever deletes a
        repository under a running job must not be told that its saves are committed."""
        known = [
            (names.FORMAT, self._format_digest),
            (names.decision(self.number), self._digest if self.number else ""),
        ]
        for name, digest in known:
            if not digest:
                continue
            try:
                same = document.digest(read_metadata(self._store, name, _DECISION_BYTES_MAX)) == digest
            except ObjectNotFound:
                same = False
            if not same:
                raise AnotherWriter(
                    f"{self._store.url}: {name} is not what this job has read: the repository was deleted or replaced "
                    "while the job was running; it can save here no more. Make a new Checkpointer"
                )

    def _with_live(self, entry: _Entry) -> _Entry:
        live = [*self._live, entry.snapshot] if isinstance(entry, Commit) else self._live
        if entry.number - self._live_at > len(live) // 16 or not self._live_at:
            return msgspec.structs.replace(entry, live=live, live_at=entry.number)
        return msgspec.structs.replace(entry, live=None, live_at=self._live_at)

    def _read(self, number: int) -> tuple[Decision, bytes]:
        name = names.decision(number)
        data = read_metadata(self._store, name, _DECISION_BYTES_MAX)
        try:
            return decode_decision(data, number), data
        except FormatError as error:
            raise SnapshotDamaged(f"{self._store.url}: {error}", object=name) from error

    def _follow(self, entry: Decision, data: bytes) -> None:
        """Takes in the next decision, holding it to the rules its writer was held to."""
        self._check_previous(entry, self._digest)
        if isinstance(entry, Open):
            self._writer = entry.writer
        elif entry.writer != self._writer:
            raise self._damaged(entry.number, "was appended by a writer that was fenced, or never opened")
        if isinstance(entry, Commit):
            snapshot = entry.snapshot
            if names.attempt_writer(snapshot.attempt) != entry.writer or snapshot.decision != entry.number:
                raise self._damaged(entry.number, "commits an attempt of another writer, or under another number")
            if snapshot.attempt in self._aborted or self.committed(snapshot.attempt):
                raise self._damaged(entry.number, f"commits attempt {snapshot.attempt}, aborted or committed before")
            self._live.append(snapshot)
        if isinstance(entry, Abort):
            if names.attempt_writer(entry.attempt) != entry.writer or self.committed(entry.attempt):
                raise self._damaged(entry.number, "aborts an attempt of another writer, or one that is committed")
            self._aborted.add(entry.attempt)
        if entry.live is not None and entry.live != self._live:
            raise self._damaged(entry.number, "lists live snapshots that do not follow from the history")
        if entry.live is None and entry.live_at != self._live_at:
            raise self._damaged(entry.number, "points to a list of live snapshots that is not the newest")
        self.number, self._digest, self._live_at = entry.number, document.digest(data), entry.live_at

    def _check_previous(self, entry: Decision, digest: str) -> None:
        if entry.previous != digest:
            before = "FORMAT" if entry.number == 1 else "the decision before it"
            raise self._damaged(entry.number, f"does not carry the digest of {before}")

    def _damaged(self, number: int, what: str) -> SnapshotDamaged:
        name = names.decision(number)
        return SnapshotDamaged(f"{self._store.url}: {name} {what}", object=name)


def _settle(store: Store, name: str, data: bytes) -> bool:
    """Creates a decision; True if it is there with these bytes, durably, False if others were first.

    A create may be applied and reported as a failure. Creating once more tells: the store's contract makes what
    ``ObjectExists`` finds as durable as what a successful create left.
    """
    try:
        store.create(name, data)
    except ObjectExists:
        return store.read(name, size_max=_DECISION_BYTES_MAX) == data
    except StorageError:
        try:
            store.create(name, data)
        except ObjectExists:
            return store.read(name, size_max=_DECISION_BYTES_MAX) == data
    return True
