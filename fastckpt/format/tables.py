"""The layout, the parts and the index: what a snapshot consists of and where each chunk lies.

A layout says which chunks there are (they follow from shapes, boxes, meshes and ``chunk_bytes``) and which rank wrote
each; a part holds, for the ranks of one node, the hash and place of each of their chunks; the index names the layout
and parts.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import codec, document, names
from fastckpt.format.chunk import (
    CHUNKS_MAX,
    HASH_BYTES,
    bundle_bytes_max,
    check_chunk_bytes,
    chunk_count,
    chunk_cuts,
    is_tiny,
)
from fastckpt.format.dtype import ITEM_BYTES, item_bytes
from fastckpt.format.families import (
    FAMILIES_MAX,
    HOLDERS_MAX,
    WORK_MAX,
    Family,
    FamilyChunks,
    Place,
    Spread,
    Unit,
    check_mesh,
    split_box,
)
from fastckpt.format.shard import Box, check_inside, check_shape, covers_exactly

KEY_BYTES_MAX = 4096
VALUE_BYTES_MAX = 64 * 1024 * 1024
"""Bytes of one encoded plain value."""
ENVIRONMENT_DEPTH_MAX = 16
"""Maps and lists inside each other in the record of software and hardware."""
SHARED = -1
"""The owner of a tensor that belongs to the job and not to one rank."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, dict=True):
    """Keys, shapes, dtypes, boxes, and who writes which chunk. Columns of equal length belong together.

    Shards are numbered: those that are listed first, then, family by family, one for each class and tensor, whether it
    has elements or not. These are never listed.
    """

    chunk_bytes: Count
    keys: list[str]
    """Sorted by (key, owner), each pair once."""
    owners: list[Annotated[int, msgspec.Meta(ge=-1)]]
    """For each key, the rank whose own tensor it is, or ``SHARED``."""
    dtypes: list[str]
    shapes: list[list[Count]]
    aliases: list[tuple[Count, Count]]
    """Pairs (key number, key number of the tensor that holds its bytes): tied tensors are stored once."""
    shard_keys: list[Count]
    shard_offsets: list[list[Count]]
    shard_sizes: list[list[Count]]
    units: list[list[Count]]
    """Shard numbers. A unit of one shard is cut on the grid; a unit of several is a bundle: one chunk, back to back."""
    writers: list[tuple[Count, Count]]
    """Pairs (rank, number of chunks): the chunks of all units, in order, are dealt out in these runs."""
    rank_nodes: list[Count]
    """For each rank, the number of its node, which is the number of the part that holds its table."""
    families: list[Family] = []
    """Tensors whose shards follow from a mesh. Not stored where there are none."""

    @functools.cached_property
    def _family_shards(self) -> list[int]:
        """The number of the first shard of each family, and of none."""
        counts = (
            math.prod(family.mesh.sizes[axis] for axis in family.sharded) * len(family.tensors)
            for family in self.families
        )
        return list(itertools.accumulate(counts, initial=len(self.shard_keys)))

    def _in_family(self, shard: int) -> tuple[Family, int, int]:
        """The family of a shard that is not listed, its class, and the position of its tensor."""
        number = bisect.bisect_right(self._family_shards, shard) - 1
        family = self.families[number]
        return family, *divmod(shard - self._family_shards[number], len(family.tensors))

    def shard_key(self, shard: int) -> int:
        """The number of the key that a shard is of."""
        if shard < len(self.shard_keys):
            return self.shard_keys[shard]
        family, _, position = self._in_family(shard)
        return family.tensors[position]

    def box(self, shard: int) -> Box:
        """Where a shard lies in its tensor; of no elements if nothing is stored of it."""
        if shard < len(self.shard_keys):
            return Box(tuple(self.shard_offsets[shard]), tuple(self.shard_sizes[shard]))
        family, number, position = self._in_family(shard)
        at: dict[int, int] = {}
        for axis in reversed(family.sharded):
            number, at[axis] = divmod(number, family.mesh.sizes[axis])
        return split_box(self.shapes[family.tensors[position]], family.splits[position], family.mesh.sizes, at)

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard's elements."""
        return self.box(shard).elements * self.item_bytes(shard)

    def item_bytes(self, shard: int) -> int:
        """Bytes an element of a shard."""
        return item_bytes(self.dtypes[self.shard_key(shard)])

    def label(self, key: int) -> str:
        """The key as shown to people: ``key``, or ``key@rank`` for one rank's own tensor."""
        return self.keys[key] if self.owners[key] == SHARED else f"{self.keys[key]}@{self.owners[key]}"

    def bytes(self) -> int:
        """Logical bytes of all tensors; tied ones count once."""
        tied = {key for key, _ in self.aliases}
        return sum(
            math.prod(shape) * item_bytes(dtype)
            for key, (dtype, shape) in enumerate(zip(self.dtypes, self.shapes, strict=True))
            if key not in tied
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a shard's elements, in the shard's C order, as found at ``byte`` of a chunk's raw bytes."""

    shard: int
    start: int
    stop: int
    byte: int


class Chunks:
    """The chunks of a layout: what each holds, who wrote it, and which row of that rank's table describes it."""

    def __init__(self, layout: Layout, name: str = "layout") -> None:
        """``LimitExceeded``, naming ``name``, for too many chunks; ``FormatError`` where the counts of a family are not
        those of its classes."""
        self.layout = layout
        counts = (self._listed_count(shards) for shards in layout.units)
        self._unit_first = list(itertools.accumulate(counts, initial=0))
        if self.listed > CHUNKS_MAX:
            raise LimitExceeded(f"{name}: {self.listed} chunks, at most {CHUNKS_MAX} are allowed")
        self._run_first = list(itertools.accumulate((count for _, count in layout.writers), initial=0))
        if self.dealt > CHUNKS_MAX:
            raise FormatError(f"{name}: its writers wrote {self.dealt} chunks of {self.listed}")
        rows: dict[int, int] = {}
        self._run_row: list[int] = []
        for rank, count in layout.writers:
            self._run_row.append(rows.get(rank, 0))
            rows[rank] = rows.get(rank, 0) + count
        self._rows: npt.NDArray[np.int64] = np.zeros(len(layout.rank_nodes), np.int64)
        for rank, count in rows.items():
            self._rows[rank] = count
        self._bundles: dict[int, tuple[dict[int, int], int]] = {}
        """For the listed bundles that were asked for, where each shard begins, and their bytes."""
        self._families: list[FamilyChunks] = []
        self._place: dict[int, tuple[FamilyChunks, int]] = {}
        """By key number, of tensors of families: the family and the position in it."""
        first, work = self.listed, 0
        shard = len(layout.shard_keys)
        for family in layout.families:
            shapes = [layout.shapes[key] for key in family.tensors]
            items = [item_bytes(layout.dtypes[key]) for key in family.tensors]
            spread = Spread(family, shapes, items, layout.chunk_bytes, name)
            work += spread.work
            if work > WORK_MAX:
                raise LimitExceeded(f"{name}: too many different sizes of shards in families of too many tensors")
            placed = FamilyChunks(spread, first, shard, self._rows, name)
            self._families.append(placed)
            self._place |= {key: (placed, position) for position, key in enumerate(family.tensors)}
            first += placed.count
            shard += spread.classes * len(family.tensors)
        self._firsts = [placed.first for placed in self._families]
        self._first_shards = [placed.first_shard for placed in self._families]
        self._count = first

    def __len__(self) -> int:
        return self._count

    @property
    def spreads(self) -> list[Spread]:
        """The families, over the classes of their meshes."""
        return [placed.spread for placed in self._families]

    @property
    def dealt(self) -> int:
        """Chunks of listed units that the writers' runs cover."""
        return self._run_first[-1]

    @property
    def listed(self) -> int:
        """Chunks of listed units."""
        return self._unit_first[-1]

    @functools.cached_property
    def node_ranks(self) -> list[list[int]]:
        """By node, its ranks, ascending."""
        found: list[list[int]] = [[] for _ in range(max(self.layout.rank_nodes) + 1)]
        for rank, node in enumerate(self.layout.rank_nodes):
            found[node].append(rank)
        return found

    def row_count(self, rank: int) -> int:
        """The number of chunks that a rank wrote."""
        return int(self._rows[rank])

    # Units.

    def _listed_count(self, shards: list[int]) -> int:
        if len(shards) > 1:
            return 1
        layout = self.layout
        shape = layout.shapes[layout.shard_keys[shards[0]]]
        return chunk_count(shape, layout.item_bytes(shards[0]), layout.box(shards[0]), layout.chunk_bytes)

    def _listed(self, unit: int) -> Unit:
        shards, first = self.layout.units[unit], self._unit_first[unit]
        return Unit(first, self._unit_first[unit + 1] - first, tuple(shards), len(shards) > 1)

    def units(self) -> Iterator[Unit]:
        """All units in order. Takes time for each of them, which may be very many."""
        chunk = 0
        while chunk < len(self):
            unit = self.unit_at(chunk)
            yield unit
            chunk += unit.count

    def unit_at(self, chunk: int) -> Unit:
        """The unit that a chunk belongs to."""
        if chunk < self.listed:
            return self._listed(bisect.bisect_right(self._unit_first, chunk) - 1)
        return self._families[bisect.bisect_right(self._firsts, chunk) - 1].unit_at(chunk)

    def places(self, key: int, wanted: Box | None = None) -> Iterator[Place]:
        """Where the shards of a key are that have elements in ``wanted``, or any."""
        wanted = wanted or Box.whole(self.layout.shapes[key])
        if not wanted.elements:
            return
        if key in self._place:
            placed, position = self._place[key]
            yield from placed.places(position, wanted)
            return
        for shard in self._listed_shards.get(key, ()):
            box = self.layout.box(shard)
            if box.touches(wanted):
                yield self._listed_place(shard, box)

    @functools.cached_property
    def _listed_shards(self) -> dict[int, list[int]]:
        """By key."""
        found: dict[int, list[int]] = {}
        for shard, key in enumerate(self.layout.shard_keys):
            found.setdefault(key, []).append(shard)
        return found

    @functools.cached_property
    def _unit_of(self) -> list[int]:
        """By listed shard."""
        found = [0] * len(self.layout.shard_keys)
        for number, shards in enumerate(self.layout.units):
            for shard in shards:
                found[shard] = number
        return found

    def _listed_place(self, shard: int, box: Box) -> Place:
        number = self._unit_of[shard]
        first, count = self._unit_first[number], self._unit_first[number + 1] - self._unit_first[number]
        if len(self.layout.units[number]) == 1:
            return Place(shard, box, first, count, 0, 0)
        if number not in self._bundles:
            shards = self.layout.units[number]
            starts = list(itertools.accumulate(map(self.layout.shard_bytes, shards), initial=0))
            self._bundles[number] = dict(zip(shards, starts, strict=False)), starts[-1]
        byte, bundle_bytes = self._bundles[number]
        return Place(shard, box, first, 1, byte[shard], bundle_bytes)

    def shard_count(self, key: int) -> int:
        """Shards of a key that have elements."""
        if key in self._place:
            placed, position = self._place[key]
            return placed.spread.shard_count(position)
        return len(self._listed_shards.get(key, ()))

    def pieces(self, unit: Unit) -> list[list[Piece]]:
        """For each chunk of a unit, what it holds."""
        if not unit.is_bundle:
            (shard,) = unit.shards
            place = Place(shard, self.layout.box(shard), unit.first, unit.count, 0, 0)
            return [[piece] for piece in self.pieces_of(place)]
        starts = itertools.accumulate(map(self.layout.shard_bytes, unit.shards), initial=0)
        sizes = (self.layout.box(shard).elements for shard in unit.shards)
        return [[Piece(*each) for each in zip(unit.shards, itertools.repeat(0), sizes, starts, strict=False)]]

    def pieces_of(self, place: Place) -> list[Piece]:
        """A shard in pieces, as it is in the chunks from ``place.first`` on."""
        if place.bundle_bytes:
            return [Piece(place.shard, 0, place.box.elements, place.byte)]
        layout = self.layout
        shape, size = layout.shapes[layout.shard_key(place.shard)], layout.item_bytes(place.shard)
        cuts = chunk_cuts(shape, size, place.box, layout.chunk_bytes)
        return [Piece(place.shard, start, stop, 0) for start, stop in itertools.pairwise(cuts)]

    def sizes(self, numbers: Iterable[int]) -> Iterator[int]:
        """Raw bytes of each of these chunks, whose numbers ascend."""
        unit = range(0)
        pieces: list[list[Piece]] = []
        for number in numbers:
            if number not in unit:
                found = self.unit_at(number)
                unit, pieces = range(found.first, found.first + found.count), self.pieces(found)
            yield self.raw_bytes(pieces[number - unit.start])

    def raw_bytes(self, pieces: Sequence[Piece]) -> int:
        """Raw bytes of a chunk that holds ``pieces``."""
        last = pieces[-1]
        return last.byte + (last.stop - last.start) * self.layout.item_bytes(last.shard)

    # Writers.

    def writer(self, chunk: int) -> tuple[int, int]:
        """The rank that wrote a chunk, and the row of its table."""
        if chunk >= self.listed:
            return self._families[bisect.bisect_right(self._firsts, chunk) - 1].writer(chunk)
        run = bisect.bisect_right(self._run_first, chunk) - 1
        return self.layout.writers[run][0], self._run_row[run] + chunk - self._run_first[run]

    def writers_of(self, place: Place) -> set[int]:
        """The ranks that wrote any chunk of a shard's."""
        first, last = place.first, place.first + place.count - 1
        if first >= self.listed:
            return self._families[bisect.bisect_right(self._firsts, first) - 1].writers_of(first, last)
        low, high = (bisect.bisect_right(self._run_first, chunk) - 1 for chunk in (first, last))
        return {rank for rank, _ in self.layout.writers[low : high + 1]}

    @functools.cached_property
    def _runs(self) -> dict[int, list[range]]:
        """For each rank that writes listed units, its chunks of these."""
        found: dict[int, list[range]] = {}
        for (rank, count), first in zip(self.layout.writers, self._run_first, strict=False):
            found.setdefault(rank, []).append(range(first, first + count))
        return found

    def runs_of(self, rank: int) -> list[range]:
        """The chunks a rank writes, ascending: the order of the rows of its table."""
        families = (placed.run_of(rank) for placed in self._families)
        return [run for run in (*self._runs.get(rank, ()), *families) if run]

    def of_rank(self, rank: int) -> Iterator[tuple[int, list[Piece]]]:
        """The chunks a rank writes, as (chunk number, pieces), ascending: the order of the rows of its table."""
        for run in self.runs_of(rank):
            chunk = run.start
            while chunk < run.stop:
                unit = self.unit_at(chunk)
                pieces = self.pieces(unit)
                stop = min(run.stop, unit.first + unit.count)
                yield from ((number, pieces[number - unit.first]) for number in range(chunk, stop))
                chunk = stop


def decode_layout(data: bytes, digest: str) -> Chunks:
    """The chunks of the layout whose stored bytes have ``digest``, every rule checked; ``FormatError`` otherwise."""
    name = names.layout(digest)
    if document.digest(data) != digest:
        raise FormatError(f"{name}: damaged: its bytes do not have the digest it is named by")
    layout: Layout = document.unpack_table(data, Layout, name)
    return check_layout(layout, name)


def check_layout(layout: Layout, name: str) -> Chunks:
    """The chunks of a layout. ``FormatError`` or ``LimitExceeded``, naming ``name``, unless it keeps every rule of
    FORMAT.md."""
    check_chunk_bytes(layout.chunk_bytes, name)
    count = len(layout.keys)
    if not count == len(layout.owners) == len(layout.dtypes) == len(layout.shapes):
        raise FormatError(f"{name}: columns of keys have different lengths")
    for key, owner, dtype, shape in zip(layout.keys, layout.owners, layout.dtypes, layout.shapes, strict=True):
        if not 0 < len(key.encode()) <= KEY_BYTES_MAX:
            raise LimitExceeded(f"{name}: a key of {len(key.encode())} bytes")
        if owner >= len(layout.rank_nodes):
            raise FormatError(f"{name}: {key} belongs to rank {owner}, of {len(layout.rank_nodes)}")
        if dtype not in ITEM_BYTES:
            raise FormatError(f"{name}: {key} has the unknown dtype {dtype!r}")
        check_shape(shape, f"{name}: {key}")
        if math.prod(size for size in shape if size) * item_bytes(dtype) > 2**62:
            raise LimitExceeded(f"{name}: {key} has more than 2**62 bytes")
    identities = list(zip(layout.keys, layout.owners, strict=True))
    if any(a >= b for a, b in itertools.pairwise(identities)):
        raise FormatError(f"{name}: keys are not sorted, or one is there twice")
    if not len(layout.shard_keys) == len(layout.shard_offsets) == len(layout.shard_sizes):
        raise FormatError(f"{name}: columns of shards have different lengths")
    _check_families(layout, name)
    _check_cover(layout, name)
    _check_units(layout, name)
    firsts = list(dict.fromkeys(layout.rank_nodes))
    if not firsts or firsts != list(range(len(firsts))):
        raise FormatError(f"{name}: nodes are not numbered 0, 1, ... by their lowest rank")
    if any(rank >= len(layout.rank_nodes) for rank, _ in layout.writers):
        raise FormatError(f"{name}: a writer that is none of its {len(layout.rank_nodes)} ranks")
    chunks = Chunks(layout, name)
    if len(chunks) > CHUNKS_MAX:
        raise LimitExceeded(f"{name}: {len(chunks)} chunks, at most {CHUNKS_MAX} are allowed")
    if chunks.dealt != chunks.listed:
        raise FormatError(f"{name}: its writers do not cover its {chunks.listed} chunks exactly")
    return chunks


def _check_cover(layout: Layout, name: str) -> None:
    """Every element of every stored tensor lies in exactly one shard."""
    aliases = {key for key, _ in layout.aliases}
    if len(aliases) != len(layout.aliases):
        raise FormatError(f"{name}: one key is tied twice")
    for key, target in layout.aliases:
        if key >= len(layout.keys) or target >= len(layout.keys) or target in aliases:
            raise FormatError(f"{name}: a key is tied to one that stores nothing")
        if layout.shapes[key] != layout.shapes[target] or layout.dtypes[key] != layout.dtypes[target]:
            raise FormatError(f"{name}: {layout.keys[key]} is tied to a tensor of another shape or dtype")
    # What a mesh holds by the rule it holds exactly once.
    ruled = {key for family in layout.families for key in family.tensors}
    if ruled & aliases:
        raise FormatError(f"{name}: a family holds a key that is tied to another")
    boxes: list[list[Box]] = [[] for _ in layout.keys]
    for shard, key in enumerate(layout.shard_keys):
        if key >= len(layout.keys) or key in aliases or key in ruled:
            raise FormatError(f"{name}: shard {shard} belongs to no stored key, or to one of a family")
        box = layout.box(shard)
        check_inside(box, layout.shapes[key], f"{name}: {layout.keys[key]}")
        boxes[key].append(box)
    for key, parts in enumerate(boxes):
        if parts if key in aliases or key in ruled else not covers_exactly(parts, layout.shapes[key]):
            raise FormatError(f"{name}: the shards of {layout.keys[key]} do not cover it exactly once")


def _check_families(layout: Layout, name: str) -> None:
    """Every family is a mesh of ranks of the job, and splits tensors that no other has over the same dimensions."""
    if len(layout.families) > FAMILIES_MAX or sum(len(family.counts) for family in layout.families) > 4 * HOLDERS_MAX:
        raise LimitExceeded(f"{name}: more than {FAMILIES_MAX} families, or than {HOLDERS_MAX} ranks in them")
    seen: set[int] = set()
    for family in layout.families:
        if len(family.splits) != len(family.tensors) or len(family.counts) != 4 * math.prod(family.mesh.sizes):
            raise FormatError(f"{name}: columns of a family have different lengths")
        check_mesh(family.mesh, len(layout.rank_nodes), name)
        axes = set(family.sharded)
        if sorted(axes) != family.sharded or (axes and family.sharded[-1] >= len(family.mesh.sizes)):
            raise FormatError(f"{name}: a family that is sharded over no dimensions of its mesh")
        if not family.tensors or any(a >= b for a, b in itertools.pairwise(family.tensors)):
            raise FormatError(f"{name}: the tensors of a family are not sorted, or it has none")
        if family.tensors[-1] >= len(layout.keys) or not seen.isdisjoint(family.tensors):
            raise FormatError(f"{name}: a family has a tensor that is not there, or that another has")
        seen.update(family.tensors)
        for key, splits in zip(family.tensors, family.splits, strict=True):
            if layout.owners[key] != SHARED:
                raise FormatError(f"{name}: {layout.keys[key]} is one rank's own, and in a family")
            if len(splits) != len(axes) or {axis for _, axis in splits} != axes:
                raise FormatError(f"{name}: {layout.keys[key]} is not split over the dimensions of its family")
            if any(dim >= len(layout.shapes[key]) for dim, _ in splits):
                raise FormatError(f"{name}: {layout.keys[key]} is split in a dimension it has not")


def _check_units(layout: Layout, name: str) -> None:
    seen = bytearray(len(layout.shard_keys))
    for unit in layout.units:
        for shard in unit:
            if shard >= len(seen) or seen[shard]:
                raise FormatError(f"{name}: shard {shard} is in no unit, or in two")
            seen[shard] = 1
        if not unit:
            raise FormatError(f"{name}: an empty unit")
        if len(unit) > 1:
            sizes = [layout.shard_bytes(shard) for shard in unit]
            if sum(sizes) > bundle_bytes_max(layout.chunk_bytes) or not all(
                is_tiny(size, layout.chunk_bytes) for size in sizes
            ):
                raise LimitExceeded(f"{name}: a bundle of {sum(sizes)} bytes")
    if not all(seen):
        raise FormatError(f"{name}: shard {seen.index(0)} is in no unit")


class PackInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A pack and its size in bytes."""

    name: str
    size: Count


class RankTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The chunks one rank wrote, in ascending order of chunk number. Columns are little-endian arrays."""

    rank: Count
    packs: list[PackInfo]
    pack: bytes
    """uint32: position in ``packs``."""
    offset: bytes
    """uint64: where in the pack the stored bytes start."""
    length: bytes
    """uint32: stored bytes."""
    codec: bytes
    """uint8."""
    hashes: bytes
    """32 bytes a chunk: its id."""
    stored_hashes: bytes
    """32 bytes for each chunk whose codec is not raw, in order: BLAKE3-256 of the stored bytes."""
    values: dict[str, bytes]
    """Digest of each per-rank value's encoding, by name."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the ranks of one node wrote."""

    attempt: str
    node: Count
    layout: str
    """Digest."""
    tables: list[RankTable]
    """Sorted by rank; one for each rank of the node."""
    blobs: list[bytes]
    """Encoded values that the tables name and that node 0's part does not hold already."""


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Where a chunk lies and what its bytes must be."""

    pack: str
    offset: int
    length: int
    codec: int
    hash: bytes
    stored_hash: bytes | None


class Rows:
    """A rank's table as arrays."""

    def __init__(self, table: RankTable) -> None:
        self.packs = table.packs
        self._hashes = table.hashes
        self._stored = table.stored_hashes
        self.pack: npt.NDArray[Any] = np.frombuffer(table.pack, "<u4")
        self.offset: npt.NDArray[Any] = np.frombuffer(table.offset, "<u8")
        self.length: npt.NDArray[Any] = np.frombuffer(table.length, "<u4")
        self.codec: npt.NDArray[Any] = np.frombuffer(table.codec, "u1")
        self._stored_row: npt.NDArray[Any] = np.cumsum(self.codec != codec.RAW) - 1

    def place(self, row: int) -> ChunkPlace:
        at, kind = row * HASH_BYTES, int(self.codec[row])
        stored = int(self._stored_row[row]) * HASH_BYTES
        return ChunkPlace(
            self.packs[int(self.pack[row])].name,
            int(self.offset[row]),
            int(self.length[row]),
            kind,
            self._hashes[at : at + HASH_BYTES],
            None if kind == codec.RAW else self._stored[stored : stored + HASH_BYTES],
        )


def decode_part(data: bytes, info: PartInfo, attempt: str, layout: Layout, layout_digest: str, chunks: Chunks) -> Part:
    """Part ``info`` of ``attempt``, with every rule checked; ``FormatError`` otherwise."""
    name = names.part(attempt, info.node)
    if len(data) != info.size or document.digest(data) != info.digest:
        raise FormatError(f"{name}: damaged: its bytes do not have the digest its index names")
    part: Part = document.unpack_table(data, Part, name)
    ranks = chunks.node_ranks[info.node]
    if part.attempt != attempt or part.node != info.node or part.layout != layout_digest:
        raise FormatError(f"{name}: belongs to another attempt, node or layout")
    if [table.rank for table in part.tables] != ranks:
        raise FormatError(f"{name}: does not hold one table for each of ranks {ranks}")
    for table in part.tables:
        _check_table(table, chunks.row_count(table.rank), layout.chunk_bytes, f"{name}, rank {table.rank}")
    if any(len(blob) > VALUE_BYTES_MAX for blob in part.blobs):
        raise LimitExceeded(f"{name}: a value of more than {VALUE_BYTES_MAX} bytes")
    return part


def _check_table(table: RankTable, count: int, chunk_bytes: int, name: str) -> None:
    columns = ((table.pack, 4), (table.offset, 8), (table.length, 4), (table.codec, 1), (table.hashes, HASH_BYTES))
    if any(len(column) != count * width for column, width in columns):
        raise FormatError(f"{name}: a column has not one entry for each of {count} chunks")
    if any(len(value) != HASH_BYTES for value in table.values.values()):
        raise FormatError(f"{name}: a value's digest is not {HASH_BYTES} bytes")
    for info in table.packs:
        try:
            names.pack_attempt(info.name)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
    if len(table.packs) > max(1, count):
        raise LimitExceeded(f"{name}: more packs than chunks")
    rows = Rows(table)
    compressed = int(np.count_nonzero(rows.codec != codec.RAW))
    if len(table.stored_hashes) != compressed * HASH_BYTES or not np.isin(rows.codec, (codec.RAW, codec.ZSTD)).all():
        raise FormatError(f"{name}: an unknown codec, or hashes missing")
    if count == 0:
        return
    if int(rows.pack.max()) >= len(table.packs):
        raise FormatError(f"{name}: names a pack it does not list")
    # zstd never makes a chunk larger than this; anything more is not ours.
    if int(rows.length.min()) == 0 or int(rows.length.max()) > chunk_bytes + chunk_bytes // 128 + 1024:
        raise FormatError(f"{name}: a chunk of impossible length")
    sizes = np.array([info.size for info in table.packs], dtype=np.uint64)
    ends = rows.offset + rows.length
    if bool((ends < rows.offset).any()) or bool((ends > sizes[rows.pack]).any()):
        raise FormatError(f"{name}: a chunk that is not inside its pack")


class PartInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part as named by the index."""

    node: Count
    digest: str
    size: Count


class RollInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A roll as named by the index."""

    digest: str
    size: Count


ValueKind: TypeAlias = Literal["same", "own", "some"]
"""Of a plain value: every rank has one, and all are equal; every rank has one; not every rank has one."""


class Index(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """The root of a snapshot; its own digest is in the COMMIT decision."""

    attempt: str
    step: Count
    layout: str
    """Digest."""
    layout_bytes: Count
    """Size of the layout object."""
    parts: list[PartInfo]
    """Sorted by node; one for each node, or none where there are rolls."""
    bytes: Count
    """Logical bytes: tensors and values."""
    stored_bytes: Count
    """Bytes this attempt added to the packs."""
    environment: dict[str, Any]
    """Software and hardware at the save; for people."""
    values: dict[str, ValueKind] | None = None
    """By the name of a plain value. Not stored in repositories whose readers do not know it; nor are"""
    rolls: list[RollInfo] = []
    """In order, where nodes are many."""


def decode_index(data: bytes, digest: str, attempt: str) -> Index:
    """The index of ``attempt`` whose stored bytes have ``digest``; ``FormatError`` otherwise."""
    name = names.index(attempt)
    if document.digest(data) != digest:
        raise FormatError(f"{name}: damaged: its bytes do not have the digest its COMMIT names")
    index: Index = document.unseal(data, Index, name)
    if index.attempt != attempt:
        raise FormatError(f"{name}: belongs to attempt {index.attempt}")
    if [info.node for info in index.parts] != list(range(len(index.parts))):
        raise FormatError(f"{name}: its parts are not those of nodes 0, 1, ...")
    if index.parts and index.rolls:
        raise FormatError(f"{name}: names parts and rolls")
    named: list[PartInfo | RollInfo] = [*index.parts, *index.rolls]
    if not all(document.is_digest(text) for text in (index.layout, *(info.digest for info in named))):
        raise FormatError(f"{name}: a digest that is none")
    if max((info.size for info in named), default=0) > document.TABLE_BYTES_MAX:
        raise LimitExceeded(f"{name}: a part of more than {document.TABLE_BYTES_MAX} bytes")
    if index.values is not None and list(index.values) != sorted(index.values):
        raise FormatError(f"{name}: its values are not sorted")
    level: list[Any] = [index.environment]
    for _ in range(ENVIRONMENT_DEPTH_MAX):
        level = [inner for at in level for inner in (at.values() if isinstance(at, dict) else at)]
        level = [inner for inner in level if isinstance(inner, dict | list)]
    if level:  # what shows it would run out of stack
        raise LimitExceeded(f"{name}: an environment more than {ENVIRONMENT_DEPTH_MAX} deep")
    return index
