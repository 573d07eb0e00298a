"""Checking what is stored, all of it, and saying everything that is wrong: for operators, not for a restore.

    history   every decision, alone and as a chain
    snapshot  index -> layout -> parts -> values, each against the digest that names it
    packs     size, name and footer, then every chunk against its hash, from front to back, several packs at a time

A restore stops at the first damage; here damage to one object never hides damage to another.
"""

from __future__ import annotations

import concurrent.futures
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fastckpt.errors import FormatError, ObjectNotFound, SnapshotDamaged, StorageError
from fastckpt.format import codec, document, names, pack, value
from fastckpt.format.chunk import HASH_BYTES, chunk_hash
from fastckpt.format.decision import Decision, Live, Open, decode_decision
from fastckpt.format.tables import ChunkPlace, PackInfo, Part, Piece, RankTable, Rows
from fastckpt.plan.value_kinds import find_differences, value_kinds
from fastckpt.repository.chunk_reader import READ_BYTES_MAX, READ_THREADS
from fastckpt.repository.history import History
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.repository import Repository
from fastckpt.storage.store import Store

_DECISION_BYTES_MAX = document.DOCUMENT_BYTES_MAX + 66


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong. What does not apply is None."""

    object: str
    """The object that is damaged or missing."""
    what: str
    step: int | None = None
    key: str | None = None
    shard: str | None = None
    offset: int | None = None
    """In the object, in bytes."""

    def __str__(self) -> str:
        where = [f"step {self.step}"] if self.step is not None else []
        where += [f"{self.key} {self.shard or ''}".rstrip()] if self.key is not None else []
        at = "" if self.offset is None else f" at offset {self.offset}"
        return f"{': '.join([*where, self.object])}{at}: {self.what}"


@dataclass(frozen=True)
class Progress:
    """How far the packs of one snapshot are."""

    step: int
    bytes_done: int
    bytes_total: int


OnProgress = Callable[[Progress], None]
"""Called from several threads, one at a time."""


def verify(repository: Repository, snapshots: Sequence[Snapshot], on_progress: OnProgress) -> list[Damage]:
    """Everything that is wrong with the history and with these snapshots; empty if nothing is.

    Raises ``StorageError`` only for what a second try may cure, since that says nothing about the bytes. Memory: the
    tables of one snapshot, and for each of ``READ_THREADS`` packs a buffer of ``READ_BYTES_MAX`` or one chunk.
    """
    found = check_history(repository)
    for snapshot in snapshots:
        found += _SnapshotCheck(repository.store, snapshot, on_progress).run()
    return found


# --- the history ---------------------------------------------------------------------------------------------------


def check_history(repository: Repository) -> list[Damage]:
    """Every decision that is missing or damaged; if none is, the first that breaks a rule."""
    entries, found = _decisions(repository.store)
    if found:
        return found
    try:
        read = History(repository.store, repository.format_digest).read_all()
    except (SnapshotDamaged, FormatError) as error:
        damaged = error.object if isinstance(error, SnapshotDamaged) else None
        return [Damage(object=damaged or "decisions", what=str(error))]
    # A decision may have been appended meanwhile, but none can go.
    assert len(read) >= len(entries)
    return []


def readable_snapshots(repository: Repository) -> list[Snapshot]:
    """The live snapshots; where the history is damaged, those that the decisions that can be read still name."""
    try:
        return repository.snapshots()
    except (SnapshotDamaged, FormatError):
        live: dict[str, Live] = {}
        for entry in _decisions(repository.store)[0]:
            for one in [*(entry.live or ()), *([entry.snapshot] if hasattr(entry, "snapshot") else [])]:
                live.setdefault(one.attempt, one)
        return [Snapshot(repository.store, one) for one in sorted(live.values(), key=lambda one: one.decision)]


def _decisions(store: Store) -> tuple[list[Decision], list[Damage]]:
    entries: list[Decision] = []
    found: list[Damage] = []
    numbers: set[int] = set()
    for child in store.children("decisions"):
        try:
            numbers.add(names.decision_number(child))
        except FormatError as error:
            found.append(Damage(object=f"decisions/{child}", what=str(error)))
    for number in sorted(numbers):
        name = names.decision(number)
        try:
            entries.append(decode_decision(store.read(name, size_max=_DECISION_BYTES_MAX), number))
        except FormatError as error:
            found.append(Damage(object=name, what=str(error)))
        except StorageError as error:
            if error.transient:
                raise
            found.append(Damage(object=name, what=f"cannot be read ({error})"))
    last = max(numbers, default=0)
    if last - len(numbers) > 1000:
        found.append(Damage(object="decisions", what=f"{last - len(numbers)} decisions are missing"))
    else:
        missing = sorted(set(range(1, last + 1)) - numbers)
        found += [Damage(object=names.decision(number), what="is missing from the history") for number in missing]
    return entries, found


# --- one snapshot --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """A chunk of a pack and what it must be."""

    number: int
    """In the layout."""
    place: ChunkPlace
    raw_bytes: int


@dataclass(frozen=True)
class _Footer:
    """Why a pack's own account of itself cannot be right, if it cannot."""

    what: str = ""
    other: bool = False
    """The whole pack is another one: its chunks need not be looked at."""


class _SnapshotCheck:
    def __init__(self, store: Store, snapshot: Snapshot, on_progress: OnProgress) -> None:
        self._store = store
        self._snapshot = snapshot
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._found: list[Damage] = []
        self._done = 0
        self._total = 0

    def run(self) -> list[Damage]:
        if not self._root():
            return self._found
        parts = [part for node in range(self._snapshot.node_count) if (part := self._part(node)) is not None]
        self._check_values(parts)
        tables = [table for part in parts for table in part.tables]
        self._total = sum(info.size for table in tables for info in table.packs)
        # Chunk numbers of each rank in the order of its rows, and where each unit starts.
        self._numbers = _chunk_numbers(self._snapshot, {table.rank for table in tables})
        self._unit_pieces = functools.lru_cache(maxsize=16)(self._snapshot.chunks.pieces)
        self._report(0)
        with concurrent.futures.ThreadPoolExecutor(READ_THREADS, "fastckpt-verify") as executor:
            futures = [
                executor.submit(self._check_pack, table, position)
                for table in tables
                for position in range(len(table.packs))
            ]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise
        return sorted(self._found, key=lambda damage: (damage.object, damage.offset or 0, damage.key or ""))

    def _add(self, name: str, what: str, **where: Any) -> None:
        with self._lock:
            self._found.append(Damage(object=name, what=what, step=self._snapshot.step, **where))

    def _report(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._on_progress(Progress(self._snapshot.step, self._done, self._total))

    # Metadata.

    def _root(self) -> bool:
        """Whether index and layout can be read; if not, nothing else can be understood."""
        snapshot = self._snapshot
        try:
            index = snapshot.index
            if index.step != snapshot.step or index.bytes != snapshot.bytes:
                self._add(names.index(snapshot.attempt), "names another step or size than its COMMIT")
            return snapshot.world_size > 0
        except (SnapshotDamaged, FormatError) as error:
            damaged = error.object if isinstance(error, SnapshotDamaged) else None
            self._add(damaged or names.index(snapshot.attempt), str(error))
        except StorageError as error:
            if error.transient:
                raise
            self._add(names.index(snapshot.attempt), f"cannot be read ({error})")
        return False

    def _part(self, node: int) -> Part | None:
        name = names.part(self._snapshot.attempt, node)
        try:
            return self._snapshot.part(node)
        except (SnapshotDamaged, FormatError) as error:
            damaged = (error.object if isinstance(error, SnapshotDamaged) else None) or name
            if not any(damage.object == damaged for damage in self._found):  # a roll is of many parts
                self._add(damaged, str(error))
        except StorageError as error:
            if error.transient:
                raise
            self._add(name, f"cannot be read ({error})")
        return None

    def _check_values(self, parts: Sequence[Part]) -> None:
        if not parts:
            return
        kinds = self._snapshot.index.values
        if kinds is not None and len(parts) == self._snapshot.node_count:
            tables = [table.values for part in parts for table in part.tables]
            if kinds != value_kinds(sorted(tables[0]), [find_differences(sorted(tables[0].items()), tables)]):
                self._add(names.index(self._snapshot.attempt), "says other things of its values than its parts do")
        blobs = {part.node: {chunk_hash(blob): blob for blob in part.blobs} for part in parts}
        decoded: dict[bytes, str] = {}
        for part in parts:
            name = names.part(self._snapshot.attempt, part.node)
            for table in part.tables:
                for label, digest in table.values.items():
                    blob = blobs[part.node].get(digest) or blobs.get(0, {}).get(digest)
                    if blob is None and 0 not in blobs:
                        continue  # it may have been in the part that is damaged
                    if digest not in decoded:
                        decoded[digest] = "is missing" if blob is None else _value_problem(blob)
                    if decoded[digest]:
                        self._add(name, f"the value of rank {table.rank} {decoded[digest]}", key=label)

    # Packs.

    def _check_pack(self, table: RankTable, position: int) -> None:
        info = table.packs[position]
        rows = Rows(table)
        mine = np.flatnonzero(rows.pack == position)
        mine = mine[np.argsort(rows.offset[mine], kind="stable")]
        try:
            size = self._store.size(info.name)
        except ObjectNotFound:
            self._lost(table, rows, mine, info, "is missing")
            self._report(info.size)
            return
        except StorageError as error:
            if error.transient:
                raise
            self._lost(table, rows, mine, info, f"cannot be read ({error})")
            self._report(info.size)
            return
        footer = self._footer(table, rows, mine, info, size)
        if footer.other:
            self._lost(table, rows, mine, info, footer.what)
            self._report(info.size)
            return
        if footer.what:
            self._add(info.name, footer.what)
        ends = rows.offset[mine] + rows.length[mine]
        beyond = ends > size
        if beyond.any():
            self._lost(table, rows, mine[beyond], info, f"is cut: it has {size} of {info.size} bytes")
        checked = 0
        claims: dict[tuple[ChunkPlace, int], str] = {}
        for run in _runs(rows, mine[~beyond]):
            length = self._check_run(table, rows, info, run, claims)
            checked += length
            self._report(length)
        self._report(info.size - checked)

    def _footer(self, table: RankTable, rows: Rows, mine: npt.NDArray[Any], info: PackInfo, size: int) -> _Footer:
        """Checks the size of a pack, and what it says it is against its name and its part."""
        wrong_size = "" if size == info.size else f"has {size} bytes where {info.size} were written"
        if size < pack.TRAILER_BYTES:
            return _Footer(wrong_size)
        try:
            trailer = bytes(self._read(info.name, size - pack.TRAILER_BYTES, pack.TRAILER_BYTES))
            body_bytes = pack.footer_bytes(trailer, size, info.name)
            data_bytes = size - pack.TRAILER_BYTES - body_bytes
            body = bytes(self._read(info.name, data_bytes, body_bytes))
            footer = pack.decode_footer(body, trailer, data_bytes, info.name)
        except FormatError as error:
            return _Footer(wrong_size or str(error))
        except StorageError as error:
            if error.transient:
                raise
            return _Footer(wrong_size or f"its footer cannot be read ({error})")
        name = _footer_name(footer)
        if name != info.name:
            return _Footer(f"holds another pack, {name}", other=True)
        if wrong_size or not _agree(footer, rows, mine):
            return _Footer(wrong_size or "its footer and its part do not agree")
        return _Footer()

    def _check_run(
        self,
        table: RankTable,
        rows: Rows,
        info: PackInfo,
        run: npt.NDArray[Any],
        claims: dict[tuple[ChunkPlace, int], str],
    ) -> int:
        """Reads neighbouring chunks at once and checks each; returns their bytes. ``claims``: places at one offset and
        what was found there, so that bytes that thousands of chunks are said to be are read and decoded once."""
        chunks = [self._chunk(table, rows, int(row)) for row in run]
        start = chunks[0].place.offset
        if claims and next(iter(claims))[0].offset != start:
            claims.clear()
        claim = (chunks[0].place, chunks[0].raw_bytes)
        if len(chunks) == 1 and claim in claims:
            if claims[claim]:
                self._blame(chunks[0].number, info.name, start, claims[claim])
            return 0
        length = sum(chunk.place.length for chunk in chunks)
        data: memoryview | None = None
        try:
            data = self._read(info.name, start, length)
        except StorageError as error:
            if error.transient:
                raise  # else one by one: an unreadable sector must not take its neighbours with it
        for chunk in chunks:
            place = chunk.place
            try:
                at = place.offset - start
                stored = data[at : at + place.length] if data is not None else self._read_chunk(place)
                problem = chunk_problem(place, chunk.raw_bytes, stored)
            except StorageError as error:
                if error.transient:
                    raise
                problem = f"cannot be read ({error})"
            if problem:
                self._blame(chunk.number, info.name, place.offset, problem)
        if len(chunks) == 1:
            claims[claim] = problem
        return length

    def _read(self, name: str, offset: int, length: int) -> memoryview:
        buffer = bytearray(length)
        self._store.read_into(name, offset, memoryview(buffer))
        return memoryview(buffer)

    def _read_chunk(self, place: ChunkPlace) -> memoryview:
        return self._read(place.pack, place.offset, place.length)

    def _chunk(self, table: RankTable, rows: Rows, row: int) -> _Chunk:
        number = int(self._numbers[table.rank][row])
        return _Chunk(number, rows.place(row), self._snapshot.chunks.raw_bytes(self._pieces(number)))

    def _pieces(self, number: int) -> list[Piece]:
        unit = self._snapshot.chunks.unit_at(number)
        return self._unit_pieces(unit)[number - unit.first]

    def _blame(self, number: int, name: str, offset: int, what: str) -> None:
        """One entry for each shard that the chunk holds something of."""
        layout = self._snapshot.layout
        for shard in dict.fromkeys(piece.shard for piece in self._pieces(number)):
            key = layout.label(layout.shard_key(shard))
            self._add(name, what, key=key, shard=str(layout.box(shard)), offset=offset)

    def _lost(self, table: RankTable, rows: Rows, lost: npt.NDArray[Any], info: PackInfo, what: str) -> None:
        """Many chunks lost for one reason: one entry a shard, at the first chunk of it that is lost."""
        seen: set[int] = set()
        layout = self._snapshot.layout
        for row in lost:
            for piece in self._pieces(int(self._numbers[table.rank][row])):
                if piece.shard not in seen:
                    seen.add(piece.shard)
                    key = layout.label(layout.shard_key(piece.shard))
                    offset = int(rows.offset[row])
                    self._add(info.name, what, key=key, shard=str(layout.box(piece.shard)), offset=offset)


def chunk_problem(place: ChunkPlace, raw_bytes: int, stored: memoryview) -> str:
    """What is wrong with the stored bytes of a chunk, or nothing."""
    if place.codec == codec.RAW:
        if place.length == raw_bytes and chunk_hash(stored) == place.hash:
            return ""
        return f"has other bytes than were saved ({place.length} bytes)"
    if chunk_hash(stored) != place.stored_hash:
        return f"has other bytes than were saved ({place.length} bytes)"
    try:
        raw = codec.decode_zstd(stored, raw_bytes, "chunk")
    except FormatError as error:
        return str(error)
    return "" if chunk_hash(raw) == place.hash else "decodes to other bytes than were saved"


def _value_problem(blob: bytes) -> str:
    try:
        value.decode(blob)
    except FormatError as error:
        return f"cannot be decoded ({error})"
    return ""


def _chunk_numbers(snapshot: Snapshot, ranks: set[int]) -> dict[int, npt.NDArray[np.int64]]:
    runs = {rank: snapshot.chunks.runs_of(rank) for rank in ranks}
    return {
        rank: np.concatenate([np.arange(run.start, run.stop, dtype=np.int64) for run in found])
        for rank, found in runs.items()
        if found
    }


def _runs(rows: Rows, ordered: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Rows in order of offset, cut where chunks are not neighbours or would be too many bytes to read at once."""
    start, length = 0, 0
    for at, row in enumerate(ordered):
        size = int(rows.length[row])
        if at > start:
            before = ordered[at - 1]
            apart = int(rows.offset[before]) + int(rows.length[before]) != int(rows.offset[row])
            if apart or length + size > READ_BYTES_MAX:
                yield ordered[start:at]
                start, length = at, 0
        length += size
    if start < len(ordered):
        yield ordered[start:]


def _footer_name(footer: pack.Footer) -> str:
    try:
        names.attempt_writer(footer.attempt)
        return names.pack(footer.attempt, footer.writer, footer.number)
    except FormatError:
        return repr(footer.attempt)


def _agree(footer: pack.Footer, rows: Rows, mine: npt.NDArray[Any]) -> bool:
    """Whether the footer has every chunk that the part places in its pack."""
    lengths = np.frombuffer(footer.lengths, "<u4")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.uint64)[:-1]]).astype(np.uint64)
    at = np.searchsorted(offsets, rows.offset[mine])
    if len(mine) and int(at.max()) >= len(offsets):
        return False
    kinds = np.frombuffer(footer.codecs, "u1")
    same = (offsets[at] == rows.offset[mine]) & (lengths[at] == rows.length[mine]) & (kinds[at] == rows.codec[mine])
    hashes = np.frombuffer(footer.hashes, "u1").reshape(-1, HASH_BYTES)
    return bool(same.all()) and all(
        hashes[position].tobytes() == rows.place(int(row)).hash for position, row in zip(at, mine, strict=True)
    )


# --- strays --------------------------------------------------------------------------------------------------------

Stray = Literal["left by an attempt that was never committed", "not an object of a repository"]


def strays(repository: Repository) -> dict[str, Stray]:
    """Objects that no decision names, with why they may be there. They do no harm but take room; the next job that
    opens the repository for writing removes those of attempts. What the newest writer has not committed yet is not
    counted: it may be at work."""
    history = History(repository.store, repository.format_digest)
    opened = max((entry.number for entry in history.refresh() if isinstance(entry, Open)), default=0)
    committed = {live.attempt for live in history.live}
    found: dict[str, Stray] = {}
    for info in repository.store.list(""):
        if (why := _stray(info.name, committed, opened)) is not None:
            found[info.name] = why
    return found


def _stray(name: str, committed: set[str], opened: int) -> Stray | None:
    folder, _, rest = name.partition("/")
    if name == names.FORMAT or folder == "decisions":
        return None
    if folder == "layouts" and document.is_digest(rest):
        return None  # snapshots share layouts, and a later one may need it
    try:
        if folder not in ("packs", "attempts"):
            raise FormatError(name)
        attempt = rest.partition("/")[0]
        number = names.writer_open_number(names.attempt_writer(attempt))
    except FormatError:
        return "not an object of a repository"
    if attempt in committed or number >= opened:
        return None
    return "left by an attempt that was never committed"
