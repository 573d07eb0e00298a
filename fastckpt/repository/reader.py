"""Reading a snapshot: metadata on demand, then chunks (``chunk_reader``). Every byte is verified before it is used."""

from __future__ import annotations

import bisect
import builtins
import fnmatch
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastckpt.buffers import Sink
from fastckpt.errors import (
    FormatError,
    LimitExceeded,
    ObjectNotFound,
    SnapshotDamaged,
    SnapshotNotFound,
)
from fastckpt.format import document, names, value
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.decision import Live
from fastckpt.format.dtype import item_bytes
from fastckpt.format.roll import NODES_MAX, decode_roll, roll_count
from fastckpt.format.shard import Box
from fastckpt.format.tables import (
    SHARED,
    ChunkPlace,
    Chunks,
    Index,
    Layout,
    Part,
    PartInfo,
    RankTable,
    Rows,
    ValueKind,
    decode_index,
    decode_layout,
    decode_part,
)
from fastckpt.plan.restore_plan import Want, plan_reads
from fastckpt.repository.chunk_reader import ChunkReader, PlacedChunk, Relay
from fastckpt.repository.metadata import read_metadata
from fastckpt.storage.store import Store
from fastckpt.trace import Trace


class Snapshot:
    """One committed snapshot. Any thread may use it; metadata is read from the store when first needed."""

    def __init__(self, store: Store, live: Live, trace: Trace | None = None) -> None:
        self._store = store
        self._live = live
        self.trace = trace or Trace()
        """Where reading is recorded."""
        self._lock = threading.RLock()
        self._index: Index | None = None
        self._chunks: Chunks | None = None
        self._rolls: dict[int, list[PartInfo]] = {}
        self._parts: dict[int, Part] = {}
        self._rows: dict[int, Rows] = {}
        self._tables: dict[int, RankTable] = {}
        """Those that were asked for."""
        self._blobs: dict[int, dict[builtins.bytes, builtins.bytes]] = {}

    def __repr__(self) -> str:
        return f"Snapshot(step={self.step}, bytes={self.bytes}, created={self.created!r})"

    @property
    def step(self) -> int:
        return self._live.step

    @property
    def attempt(self) -> str:
        """The id of the attempt that became this snapshot."""
        return self._live.attempt

    @property
    def created(self) -> str:
        """When it was committed: RFC 3339, UTC, by the coordinator's clock."""
        return self._live.created

    @property
    def bytes(self) -> int:
        """Logical bytes of all tensors and values."""
        return self._live.bytes

    @property
    def metrics(self) -> dict[str, float]:
        return dict(self._live.metrics)

    @property
    def note(self) -> str:
        return self._live.note

    @property
    def live(self) -> Live:
        """The entry of this snapshot in the history."""
        return self._live

    @property
    def counters(self) -> dict[str, float]:
        """Seconds and bytes by stage of what was read through this object: ``read_bytes`` (as stored),
        ``verify_seconds`` (of all threads together), ``place_bytes`` and so on; ``fastckpt/trace.py`` has the table."""
        return self.trace.counters()

    def timeline(self) -> dict[str, Any]:
        """The stages of what was read through this object, as ``Pending.timeline`` gives those of a save."""
        return self.trace.timeline(self.step)

    # Metadata, from the root down; each object is checked against the digest that names it.

    @property
    def index(self) -> Index:
        with self._lock:
            if self._index is None:
                name = names.index(self.attempt)
                data = self._metadata(name, document.DOCUMENT_BYTES_MAX + 66)
                index = self._undamaged(name, lambda: decode_index(data, self._live.index, self.attempt))
                if (index.step, index.bytes) != (self.step, self.bytes):
                    raise self._damaged(name, "is not of the step and size its COMMIT names")
                self._index = index
            return self._index

    @property
    def environment(self) -> dict[str, Any]:
        """The record of software and hardware at the save."""
        return self.index.environment

    @property
    def chunks(self) -> Chunks:
        with self._lock:
            if self._chunks is None:
                digest, name = self.index.layout, names.layout(self.index.layout)
                data = self._metadata(name, document.TABLE_BYTES_MAX)
                chunks: Chunks = self._undamaged(name, lambda: decode_layout(data, digest))
                nodes = max(chunks.layout.rank_nodes) + 1
                if self.index.rolls and len(self.index.rolls) != roll_count(nodes):
                    raise self._damaged(name, "has not as many nodes as the index has rolls for")
                if not self.index.rolls and len(self.index.parts) != nodes:
                    raise self._damaged(name, "has not as many nodes as the index has parts")
                self._chunks = chunks
            return self._chunks

    @property
    def layout(self) -> Layout:
        return self.chunks.layout

    @property
    def node_count(self) -> int:
        """Nodes of the job that saved it, each with a part."""
        return max(self.layout.rank_nodes) + 1

    @property
    def world_size(self) -> int:
        """Ranks of the job that saved it."""
        return len(self.layout.rank_nodes)

    def part(self, node: int) -> Part:
        with self._lock:
            if node not in self._parts:
                info, name = self._part_info(node), names.part(self.attempt, node)
                data = self._metadata(name, info.size)
                self._parts[node] = self._undamaged(
                    name, lambda: decode_part(data, info, self.attempt, self.layout, self.index.layout, self.chunks)
                )
            return self._parts[node]

    def _part_info(self, node: int) -> PartInfo:
        if not self.index.rolls:
            return self.index.parts[node]
        number, position = divmod(node, NODES_MAX)
        if number not in self._rolls:
            info, name = self.index.rolls[number], names.roll(self.attempt, number)
            data = self._metadata(name, info.size)
            self._rolls[number] = self._undamaged(
                name, lambda: decode_roll(data, info, self.attempt, number, self.node_count)
            )
        return self._rolls[number][position]

    def table(self, rank: int) -> RankTable:
        with self._lock:
            if rank not in self._tables:
                tables = self.part(self.layout.rank_nodes[rank]).tables
                table = tables[bisect.bisect_left(tables, rank, key=lambda table: table.rank)]
                self._check_kinds(table)
                self._tables[rank] = table
            return self._tables[rank]

    def _check_kinds(self, table: RankTable) -> None:
        """What the index says of values must be so in every table that is looked at: most are not."""
        kinds = self.index.values
        if kinds is None:
            return
        other = next(iter(self._tables.values()), table).values
        for name, kind in kinds.items():
            is_there = kind == "some" or name in table.values
            if not is_there or (kind == "same" and table.values[name] != other[name]):
                raise self._damaged(
                    names.index(self.attempt),
                    f"says that every rank has {'an equal' if kind == 'same' else 'a'} value {name!r}, and rank "
                    f"{table.rank} has not",
                    key=name,
                )
        if unknown := sorted(table.values.keys() - kinds.keys()):
            raise self._damaged(
                names.index(self.attempt), f"says nothing of value {unknown[0]!r}, which rank {table.rank} has"
            )

    def place(self, chunk: int) -> ChunkPlace:
        """Where a chunk lies."""
        rank, row = self.chunks.writer(chunk)
        with self._lock:
            if rank not in self._rows:
                self._rows[rank] = Rows(self.table(rank))
            return self._rows[rank].place(row)

    def check(self) -> None:
        """Reads all metadata and compares the size of every pack; raises ``SnapshotDamaged`` or ``StorageError``."""
        for node in range(self.node_count):
            for info in (info for table in self.part(node).tables for info in table.packs):
                try:
                    size = self._store.size(info.name)
                except ObjectNotFound as error:
                    raise self._damaged(info.name, "is missing") from error
                if size != info.size:
                    raise self._damaged(info.name, f"has {size} bytes where {info.size} were written", offset=size)
        for rank in range(self.world_size):
            for name in self.table(rank).values:
                self.value_blob(name, rank)

    def _metadata(self, name: str, size_max: int) -> builtins.bytes:
        try:
            return read_metadata(self._store, name, size_max)
        except ObjectNotFound as error:
            raise self._damaged(name, "is missing") from error

    def _damaged(self, name: str, what: str, *, key: str | None = None, offset: int | None = None) -> SnapshotDamaged:
        return SnapshotDamaged(f"step {self.step}: {name} {what}", key=key, object=name, offset=offset)

    def _undamaged(self, name: str, decode: Callable[[], Any]) -> Any:
        try:
            return decode()
        except FormatError as error:
            raise SnapshotDamaged(f"step {self.step}: {error}", object=name) from error

    # Values.

    def value_kinds(self) -> dict[str, ValueKind] | None:
        """What kind of value each name is, or None if only the tables of all ranks tell. Reads the first part, to see
        whether it agrees."""
        if self.index.values is not None:
            for table in self.part(0).tables:
                self.table(table.rank)
        return self.index.values

    def value_digests(self, rank: int) -> dict[str, str]:
        """The digest of every per-rank value of a rank, by name."""
        return {name: digest.hex() for name, digest in self.table(rank).values.items()}

    def value(self, name: str, rank: int = 0) -> object:
        """A plain value as one rank saved it. Tensors in it are ``fastckpt.format.value`` leaves. ``KeyError`` if that
        rank saved none of this name."""
        blob = self.value_blob(name, rank)
        return self._undamaged(names.part(self.attempt, self.layout.rank_nodes[rank]), lambda: value.decode(blob))

    def value_blob(self, name: str, rank: int = 0) -> builtins.bytes:
        """A plain value as it is encoded. ``KeyError`` if that rank saved none of this name."""
        digest = self.table(rank).values[name]
        for node in dict.fromkeys((self.layout.rank_nodes[rank], 0)):
            with self._lock:
                if node not in self._blobs:
                    self._blobs[node] = {chunk_hash(blob): blob for blob in self.part(node).blobs}
                if digest in self._blobs[node]:
                    return self._blobs[node][digest]
        part = names.part(self.attempt, self.layout.rank_nodes[rank])
        raise self._damaged(part, f"does not hold value {name!r} of rank {rank}", key=name)

    # Tensors.

    def keys(self) -> list[str]:
        """The keys of all tensors, sorted; a tensor that is one rank's own reads ``key@rank``."""
        return [self.layout.label(number) for number in range(len(self.layout.keys))]

    def key_number(self, key: str, owner: int = SHARED) -> int | None:
        """The number of a key in the layout, or None."""
        with self._lock:
            if not hasattr(self, "_key_numbers"):
                identities = zip(self.layout.keys, self.layout.owners, strict=True)
                self._key_numbers = {identity: number for number, identity in enumerate(identities)}
            return self._key_numbers.get((key, owner))

    def read(self, key: str, index: tuple[slice, ...] | slice | None = None) -> npt.NDArray[Any]:
        """A tensor, or a part of it, as a numpy array; reads and verifies only the chunks that hold it.

        ``index`` has at most one slice a dimension; negative bounds count from the end, steps are not allowed. bfloat16
        and float8 come as ``ml_dtypes``. ``KeyError`` for an unknown key, ``SnapshotDamaged`` if the bytes are not what
        was saved.
        """
        label, _, owner = key.rpartition("@")
        number = self.key_number(key)
        if number is None and label and owner.isdigit():
            number = self.key_number(label, int(owner))
        if number is None:
            near = [name for name in self.keys() if fnmatch.fnmatch(name, f"*{key.split('.')[-1]}*")][:5]
            raise KeyError(f"no tensor {key!r} in step {self.step}; similar: {', '.join(near) or 'none'}")
        shape, dtype = self.layout.shapes[number], self.layout.dtypes[number]
        box = _box(shape, index)
        wants = [Want(number, box, 0)] if box.elements else []
        self._check_tables(wants)
        try:
            array = np.empty((*box.sizes, item_bytes(dtype)), np.uint8)
        except (MemoryError, ValueError) as error:
            raise LimitExceeded(
                f"step {self.step}: {key} of shape {shape} does not fit into an array: {error}"
            ) from error
        self.read_into(wants, [ArraySink(box, array)])
        return array.reshape(-1).view(numpy_dtype(dtype)).reshape(box.sizes)

    def read_into(self, wants: Sequence[Want], sinks: Sequence[Sink]) -> None:
        """Reads what is wanted and places it; ``Want.target`` is a position in ``sinks``. Each chunk is read once.

        ``SnapshotDamaged`` naming key, shard, object and offset: no byte of the damaged chunk reached a sink, but
        others may have. Memory: see ``ChunkReader.read``.
        """
        self.read_chunks(self.plan(wants), sinks)

    def plan(self, wants: Sequence[Want]) -> list[PlacedChunk]:
        """What ``read_chunks`` reads of these wants, by chunk number; reads the metadata that it takes."""
        self._check_tables(wants)
        return [PlacedChunk(read, self.place(read.chunk)) for read in plan_reads(self.chunks, wants)]

    def read_chunks(self, chunks: Sequence[PlacedChunk], sinks: Sequence[Sink], relay: Relay | None = None) -> None:
        """Like ``read_into``, of what is planned; and does what ``relay`` has to do, of chunks that are not in it."""
        ChunkReader(self._store, self.step, self.chunks, sinks, self.trace).read(chunks, relay)

    def _check_tables(self, wants: Sequence[Want]) -> None:
        """Plans take memory for each chunk; first the tables must prove that a tensor of very many has them."""
        stored = dict(self.layout.aliases)
        for want in wants:
            for place in self.chunks.places(stored.get(want.key, want.key), want.box):
                if place.count > 10_000:
                    for rank in self.chunks.writers_of(place):
                        self.table(rank)


class ArraySink:
    """Places into an array of bytes whose shape is that of a box, then the bytes of an element."""

    def __init__(self, box: Box, array: npt.NDArray[np.uint8]) -> None:
        self._box = box
        self._array = array

    def place(self, offsets: tuple[int, ...], sizes: tuple[int, ...], data: memoryview) -> None:
        target = self._array[Box(offsets, sizes).relative_to(self._box).slices()]
        target[...] = np.frombuffer(data, np.uint8).reshape(target.shape)


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype of a tensor dtype; those numpy does not know come from ``ml_dtypes``, else as raw bytes."""
    if dtype in np.sctypeDict:
        return np.dtype(dtype)
    import ml_dtypes  # takes a tenth of a second, and most commands never need it

    if hasattr(ml_dtypes, dtype):
        extension: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype))
        return extension
    if dtype == "complex32":
        return np.dtype([("real", np.float16), ("imag", np.float16)])
    return np.dtype(f"u{item_bytes(dtype)}")


def _box(shape: Sequence[int], index: tuple[slice, ...] | slice | None) -> Box:
    slices = () if index is None else index if isinstance(index, tuple) else (index,)
    if not all(isinstance(piece, slice) for piece in slices):
        raise TypeError(f"index is a slice, or a tuple of slices, not {index!r}")
    if len(slices) > len(shape):
        raise IndexError(f"{len(slices)} slices for a tensor of shape {list(shape)}; give at most one a dimension")
    bounds = [piece.indices(size) for piece, size in itertools.zip_longest(slices, shape, fillvalue=slice(None))]  # type: ignore[arg-type]
    if any(step != 1 for _, _, step in bounds):
        raise IndexError("slices with a step are not supported; read the whole range and slice the array")
    return Box(tuple(low for low, _, _ in bounds), tuple(max(0, high - low) for low, high, _ in bounds))


def newest(snapshots: Sequence[Snapshot]) -> dict[int, Snapshot]:
    """The snapshots by step: where a step was committed more than once, the last one."""
    return {snapshot.step: snapshot for snapshot in snapshots}


def find(snapshots: Sequence[Snapshot], step: int | None, url: str) -> Snapshot:
    """The snapshot of a step, or the last one. ``SnapshotNotFound`` naming what there is."""
    by_step: Mapping[int, Snapshot] = newest(snapshots)
    if not snapshots:
        raise SnapshotNotFound(f"{url}: holds no snapshot yet: no save was committed")
    if step is None:
        return snapshots[-1]
    if step not in by_step:
        steps = ", ".join(str(known) for known in list(by_step)[-10:])
        raise SnapshotNotFound(f"{url}: no snapshot of step {step}; the newest are {steps}")
    return by_step[step]
