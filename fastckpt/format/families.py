"""Families: tensors that a mesh of ranks holds by a rule, so that neither their shards nor their units are listed.

The ranks of a mesh that hold the same boxes are a *class*. What a class holds, and how it is cut into chunks, follows
from shapes, mesh and splits by arithmetic, and is computed for the classes that are asked for. ``check_families`` looks
at all of them at once, in arrays, and never makes a list of shards.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format.chunk import CHUNKS_MAX, bundle_bytes_max, chunk_cuts, tiny_bytes_max
from fastckpt.format.shard import Box

FAMILIES_MAX = 4096
HOLDERS_MAX = 2**23
"""Ranks of the meshes of all families of a layout together."""
MESH_DIMS_MAX = 16
LENGTHS_MAX = 2**22
"""Ways to split a dimension times runs of classes with equal lengths, of a family: these are in memory together."""
WORK_MAX = 2**26
"""Numbers that checking all families of a layout may look at, see ``Spread.work``."""
WAY_WORK = 256
"""A way to split is looked at anew for each set of classes with equal lengths, which takes as long as so many numbers,
be the set as small as it may."""
_CACHED = 64
_CACHED_TENSORS = 2**22

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Ints = npt.NDArray[np.int64]


class Mesh(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Ranks in a grid: by arithmetic, or listed."""

    sizes: list[Count]
    """Of each dimension."""
    start: Count
    """The rank at coordinate 0, 0, ..., and for each dimension the step to the next in ``strides``."""
    strides: list[Count]
    ranks: list[Count]
    """All ranks in C order instead; then there are no strides, and ``start`` is 0."""

    def array(self) -> Ints:
        """The ranks, in an array of ``sizes``. Only of a mesh that is checked."""
        if self.ranks:
            return np.array(self.ranks, np.int64).reshape(self.sizes)
        found = np.full(self.sizes, self.start, np.int64)
        for dim, (size, stride) in enumerate(zip(self.sizes, self.strides, strict=True)):
            steps = np.arange(size, dtype=np.int64) * stride
            found += steps.reshape([size if at == dim else 1 for at in range(len(self.sizes))])
        return found


def mesh_of(ranks: npt.NDArray[Any]) -> Mesh:
    """The mesh of an array of distinct ranks."""
    sizes = list(ranks.shape)
    start = int(ranks.flat[0])
    strides = [int(np.take(ranks, 1, dim).flat[0]) - start if size > 1 else 0 for dim, size in enumerate(sizes)]
    if min(strides, default=0) >= 0:
        mesh = Mesh(sizes=sizes, start=start, strides=strides, ranks=[])
        if np.array_equal(mesh.array(), ranks):
            return mesh
    return Mesh(sizes=sizes, start=0, strides=[], ranks=[int(rank) for rank in ranks.flat])


Splits = list[tuple[Count, Count]]
"""Pairs (dimension of the tensor, dimension of the mesh): each splits what the ones before it left."""


class Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Tensors that are split over the same dimensions of one mesh."""

    mesh: Mesh
    sharded: list[Count]
    """The dimensions of the mesh that split, ascending. Ranks that differ in none of them are a class."""
    tensors: list[Count]
    """Key numbers, ascending."""
    splits: list[Splits]
    """For each tensor, one for each of ``sharded``."""
    counts: bytes
    """uint32: for each class, in C order of the sharded dimensions, and each of its ranks, in C order of the others,
    the number of chunks it wrote."""


def check_mesh(mesh: Mesh, world_size: int, name: str) -> None:
    """``FormatError`` unless these are distinct ranks of a job of ``world_size``."""
    if len(mesh.sizes) > MESH_DIMS_MAX:
        raise LimitExceeded(f"{name}: a mesh of {len(mesh.sizes)} dimensions, at most {MESH_DIMS_MAX} are allowed")
    if 0 in mesh.sizes or math.prod(mesh.sizes) > world_size:
        raise FormatError(f"{name}: a mesh of sizes {mesh.sizes} of {world_size} ranks")
    if mesh.ranks:
        fits = len(mesh.ranks) == math.prod(mesh.sizes) and not mesh.strides and not mesh.start
        last = max(mesh.ranks)
    else:
        fits = len(mesh.strides) == len(mesh.sizes)
        last = mesh.start + sum((size - 1) * step for size, step in zip(mesh.sizes, mesh.strides, strict=False))
    if fits and last < world_size:
        ranks = np.sort(mesh.array(), axis=None)
        fits = not (ranks[1:] == ranks[:-1]).any()
    if not fits or last >= world_size:
        raise FormatError(f"{name}: the ranks of a mesh are not distinct ranks of the job")


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive chunks that hold one shard, cut on the grid, or one chunk that holds several, back to back."""

    first: int
    """Number of its first chunk."""
    count: int
    shards: tuple[int, ...]
    is_bundle: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where a shard, which has elements, is among the chunks."""

    shard: int
    box: Box
    first: int
    """Number of the first chunk of its unit."""
    count: int
    """Chunks of it."""
    byte: int
    """Where in its bundle it begins, or 0."""
    bundle_bytes: int
    """Bytes of its bundle; 0 if it is a unit of its own."""


def part_of(length: int, count: int, at: int) -> tuple[int, int]:
    """Where part ``at`` of ``count`` begins, and its length: equal parts, rounded up, as long as there is some left."""
    size = -(-length // count)
    start = min(at * size, length)
    return start, min(size, length - start)


def _parts_of(length: Any, count: int, at: Ints) -> tuple[Ints, Ints]:
    """``part_of`` for arrays."""
    size = -(-length // count)
    start = np.minimum(at * size, length)
    return start, np.minimum(size, length - start)


def split_box(
    shape: Sequence[int], splits: Iterable[tuple[int, int]], sizes: Sequence[int], at: Mapping[int, int]
) -> Box:
    """What the rank at a coordinate of a mesh of ``sizes`` holds of a tensor; perhaps nothing: a box of no elements.
    ``at`` has the coordinate in the dimensions that split."""
    offsets, lengths = [0] * len(shape), list(shape)
    for dim, axis in splits:
        start, lengths[dim] = part_of(lengths[dim], sizes[axis], at[axis])
        offsets[dim] += start
    return Box(tuple(offsets), tuple(lengths))


@dataclass(frozen=True)
class _Sized:
    """What is the same for all classes whose shards have the same sizes."""

    bytes: Ints
    """Of each tensor's shard."""
    bundles: list[Ints]
    """Positions of tensors."""
    bundle_bytes: list[int]
    bundle_of: Ints
    """For each tensor the number of its bundle, or -1."""
    byte: Ints
    """For each tensor in a bundle, where it begins there."""
    grid: Ints
    """Positions of the tensors whose shards are units of their own."""


class Spread:
    """A family's tensors over the classes of its mesh. Any thread may use it."""

    def __init__(
        self, family: Family, shapes: Sequence[Sequence[int]], items: Sequence[int], chunk_bytes: int, name: str
    ) -> None:
        """``shapes`` and ``items`` (bytes an element) are those of the family's tensors; mesh and splits are checked.
        ``LimitExceeded`` naming ``name`` for what would take too much work to look through."""
        self.family = family
        self.shapes = shapes
        self._items: Ints = np.array(items, np.int64)
        self._chunk_bytes = chunk_bytes
        self._name = name
        sizes = family.mesh.sizes
        self.class_sizes = [sizes[axis] for axis in family.sharded]
        self.classes = math.prod(self.class_sizes)
        others = [axis for axis in range(len(sizes)) if axis not in set(family.sharded)]
        ranks = family.mesh.array().transpose([*family.sharded, *others])
        self.ranks: Ints = ranks.reshape(self.classes, -1)
        """By class, its ranks."""
        self.replicas = math.prod(sizes[axis] for axis in others)
        self._axis = {axis: position for position, axis in enumerate(family.sharded)}
        # Many tensors are split alike: each distinct way to split one dimension is looked at once.
        ways: dict[tuple[int, tuple[int, ...]], int] = {}
        count = len(family.tensors)
        width = max((len({dim for dim, _ in splits}) for splits in family.splits), default=0)
        self._ways_of: npt.NDArray[np.int32] = np.full((count, width), -1, np.int32)
        self._first_way: npt.NDArray[np.int32] = np.full(count, -1, np.int32)
        self._rest: Ints = np.zeros(count, np.int64)
        """Bytes of what is not split: a shard's bytes are this times its lengths in the split dimensions."""
        for position, (shape, item, splits) in enumerate(zip(shapes, items, family.splits, strict=True)):
            by_dim: dict[int, list[int]] = {}
            for dim, axis in splits:
                by_dim.setdefault(dim, []).append(axis)
            for column, (dim, axes) in enumerate(by_dim.items()):
                way = ways.setdefault((shape[dim], tuple(axes)), len(ways))
                self._ways_of[position, column] = way
                if dim == 0:
                    self._first_way[position] = way
            self._rest[position] = item * math.prod(size for dim, size in enumerate(shape) if dim not in by_dim)
        self._way_list = list(ways)
        self._way_steps = sum(len(axes) for _, axes in ways)
        self._row_bytes: Ints = np.array(
            [math.prod(shape[1:]) * item for shape, item in zip(shapes, items, strict=True)], np.int64
        )
        self._find_sizes()
        self._sized = functools.lru_cache(max(1, min(_CACHED, _CACHED_TENSORS // max(1, count))))(self._make_sized)
        self._grid_firsts = functools.lru_cache(_CACHED)(self._make_grid_firsts)

    def _find_sizes(self) -> None:
        """Tells classes apart by the lengths of all ways to split."""
        ways = len(self._way_list)
        if self._way_steps * self.classes > WORK_MAX:
            raise LimitExceeded(f"{self._name}: {ways} ways to split over {self.classes} classes of ranks")
        at = np.unravel_index(np.arange(self.classes), self.class_sizes) if self.class_sizes else ()
        begins = np.zeros(self.classes, bool)
        begins[0] = True
        for way in range(ways):
            _, lengths = self._lay(way, at)
            begins[1:] |= lengths[1:] != lengths[:-1]
        starts = np.flatnonzero(begins)
        if ways * len(starts) > LENGTHS_MAX:
            raise LimitExceeded(f"{self._name}: {ways} ways to split of {len(starts)} different lengths")
        found = np.empty((len(starts), ways), np.int64)
        for way in range(ways):
            _, found[:, way] = self._lay(way, [axis[starts] for axis in at])
        numbers: dict[bytes, int] = {}
        of_run = [numbers.setdefault(lengths.tobytes(), len(numbers)) for lengths in found]
        self._size_of: npt.NDArray[np.int32] = np.repeat(
            np.array(of_run, np.int32), np.diff(np.append(starts, self.classes))
        )
        """For each class the number of its lengths in ``_lengths``."""
        self._lengths = [np.frombuffer(data, np.int64) for data in numbers]
        self._by_size: Ints = np.argsort(self._size_of, kind="stable")
        self._size_first: Ints = np.searchsorted(self._size_of[self._by_size], np.arange(len(numbers) + 1))

    def _classes_of(self, number: int) -> Ints:
        """The classes whose lengths are ``number``'s, ascending."""
        return self._by_size[self._size_first[number] : self._size_first[number + 1]]

    @property
    def work(self) -> int:
        """Numbers that ``totals`` has to look at."""
        sizes = len(self._lengths)
        of_sizes = sizes * (len(self.family.tensors) + WAY_WORK * len(self._way_list))
        return self._way_steps * self.classes + of_sizes

    def _lay(self, way: int, at: Sequence[Ints]) -> tuple[Any, Any]:
        """Offsets and lengths of one way to split, at coordinates in the sharded dimensions."""
        length, axes = self._way_list[way]
        offsets: Any = 0
        lengths: Any = length
        for axis in axes:
            starts, lengths = _parts_of(lengths, self.family.mesh.sizes[axis], at[self._axis[axis]])
            offsets = offsets + starts
        return offsets, lengths

    def _make_sized(self, number: int) -> _Sized:
        lengths = np.append(self._lengths[number], 1)  # for tensors that are split in fewer dimensions
        size = self._rest * lengths[self._ways_of].prod(axis=1)
        tiny = np.flatnonzero((size > 0) & (size <= tiny_bytes_max(self._chunk_bytes)))
        ends = np.cumsum(size[tiny])
        bundles: list[Ints] = []
        bundle_bytes: list[int] = []
        bundle_of, byte = np.full(len(size), -1, np.int64), np.zeros(len(size), np.int64)
        start = before = 0
        while start < len(tiny):
            stop = int(np.searchsorted(ends, before + bundle_bytes_max(self._chunk_bytes), "right"))
            bundle = tiny[start:stop]
            bundle_of[bundle] = len(bundles)
            byte[bundle] = ends[start:stop] - size[bundle] - before
            bundles.append(bundle)
            bundle_bytes.append(int(ends[stop - 1]) - before)
            start, before = stop, int(ends[stop - 1])
        grid = np.flatnonzero((size > 0) & (bundle_of < 0))
        return _Sized(size, bundles, bundle_bytes, bundle_of, byte, grid)

    def _grid_counts(self, number: int, classes: Ints) -> Ints:
        """Chunks of each shard that is a unit of its own, by class, of classes whose sizes are ``number``'s."""
        sized = self._sized(number)
        counts = np.empty((len(classes), len(sized.grid)), np.int64)
        at = np.unravel_index(classes, self.class_sizes) if self.class_sizes else ()
        for way in sorted(set(self._first_way[sized.grid].tolist())):
            columns = np.flatnonzero(self._first_way[sized.grid] == way)
            chosen = sized.grid[columns]
            first: Any = 0
            rows = np.array([self.shapes[position][:1] for position in chosen], np.int64)[:, 0]
            if way >= 0:
                first, rows = self._lay(way, at)[0][:, None], np.full_like(rows, self._lengths[number][way])
            items, row_bytes = self._items[chosen], self._row_bytes[chosen]
            step = self._chunk_bytes // np.minimum(row_bytes, self._chunk_bytes)
            crossed = (first + rows - 1) // step - first // step + 1
            elements = sized.bytes[chosen] // items // rows
            one_by_one = rows * -(-elements // (self._chunk_bytes // items))
            counts[:, columns] = np.where(row_bytes <= self._chunk_bytes, crossed, one_by_one)
        return counts

    def totals(self) -> Ints:
        """The number of chunks of each class."""
        found = np.zeros(self.classes, np.int64)
        looked_at = 0
        for number in range(len(self._lengths)):
            classes = self._classes_of(number)
            looked_at += len(classes) * len(self._sized(number).grid)
            if looked_at > CHUNKS_MAX:
                raise LimitExceeded(f"{self._name}: more than {CHUNKS_MAX} chunks")
            counts = self._grid_counts(number, classes)
            if counts.size and int(counts.max()) > CHUNKS_MAX:
                raise LimitExceeded(f"{self._name}: a shard of more than {CHUNKS_MAX} chunks")
            found[classes] = len(self._sized(number).bundles) + counts.sum(axis=1)
        self._sized.cache_clear()  # a layout may have many families of which little is asked afterwards
        return found

    def class_bytes(self) -> Ints:
        """The bytes that each class holds."""
        return np.array([self._sized(number).bytes.sum() for number in range(len(self._lengths))])[self._size_of]

    def _make_grid_firsts(self, class_number: int) -> list[int]:
        """Where in its class the chunks of each unit on the grid begin; at last, how many chunks there are."""
        number = int(self._size_of[class_number])
        (counts,) = self._grid_counts(number, np.array([class_number]))
        return list(itertools.accumulate(map(int, counts), initial=len(self._sized(number).bundles)))

    # What one class holds. Chunks and shards are counted from the class's first: shards by position of their tensor.

    def box(self, class_number: int, position: int) -> Box:
        """A class's box of a tensor, perhaps of no elements."""
        at = dict(zip(self.family.sharded, self._coordinate(class_number), strict=True))
        return split_box(self.shapes[position], self.family.splits[position], self.family.mesh.sizes, at)

    def _coordinate(self, class_number: int) -> list[int]:
        """Of a class, in the sharded dimensions."""
        found = []
        for size in reversed(self.class_sizes):
            class_number, at = divmod(class_number, size)
            found.append(at)
        return found[::-1]

    def unit_at(self, class_number: int, chunk: int) -> Unit:
        """The unit that a chunk belongs to."""
        sized = self._sized(int(self._size_of[class_number]))
        if chunk < len(sized.bundles):
            return Unit(chunk, 1, tuple(map(int, sized.bundles[chunk])), True)
        firsts = self._grid_firsts(class_number)
        at = bisect.bisect_right(firsts, chunk) - 1
        return Unit(firsts[at], firsts[at + 1] - firsts[at], (int(sized.grid[at]),), False)

    def place_of(self, class_number: int, position: int) -> Place:
        """Where a class's shard of a tensor is; it has elements."""
        box = self.box(class_number, position)
        sized = self._sized(int(self._size_of[class_number]))
        if (bundle := int(sized.bundle_of[position])) >= 0:
            return Place(position, box, bundle, 1, int(sized.byte[position]), sized.bundle_bytes[bundle])
        at = int(np.searchsorted(sized.grid, position))
        firsts = self._grid_firsts(class_number)
        return Place(position, box, firsts[at], firsts[at + 1] - firsts[at], 0, 0)

    def shard_count(self, position: int) -> int:
        """Classes that hold elements of a tensor."""
        shape, sizes = self.shapes[position], self.family.mesh.sizes
        axes: dict[int, tuple[int, ...]] = {}
        for dim, axis in self.family.splits[position]:
            axes[dim] = (*axes.get(dim, ()), sizes[axis])

        @functools.cache
        def parts(length: int, counts: tuple[int, ...]) -> int:
            if not counts or not length:
                return int(length > 0)
            whole, rest = divmod(length, size := -(-length // counts[0]))
            return whole * parts(size, counts[1:]) + (parts(rest, counts[1:]) if rest else 0)

        return math.prod(parts(length, axes.get(dim, ())) for dim, length in enumerate(shape))

    def touching(self, position: int, wanted: Box) -> Iterator[int]:
        """The classes that hold any element of a box of a tensor, each once. ``wanted`` has elements."""
        sizes = self.family.mesh.sizes
        splits = self.family.splits[position]

        def walk(depth: int, at: int, offsets: list[int], lengths: list[int]) -> Iterator[int]:
            if depth == len(splits):
                yield at
                return
            dim, axis = splits[depth]
            size = -(-lengths[dim] // sizes[axis])
            low = max(wanted.offsets[dim] - offsets[dim], 0)
            high = min(wanted.offsets[dim] + wanted.sizes[dim] - offsets[dim], lengths[dim])
            for step in range(low // size, -(-high // size)):
                start, length = part_of(lengths[dim], sizes[axis], step)
                inner_offsets, inner_lengths = list(offsets), list(lengths)
                inner_offsets[dim] += start
                inner_lengths[dim] = length
                yield from walk(depth + 1, at + step * self._class_steps[axis], inner_offsets, inner_lengths)

        shape = self.shapes[position]
        yield from walk(0, 0, [0] * len(shape), list(shape))

    @functools.cached_property
    def _class_steps(self) -> dict[int, int]:
        """By dimension of the mesh, how far apart the numbers of neighbouring classes are."""
        steps = [math.prod(self.class_sizes[at + 1 :]) for at in range(len(self.class_sizes))]
        return dict(zip(self.family.sharded, steps, strict=True))

    # For the planner.

    def shards_alike(self) -> Iterator[tuple[Ints, Ints]]:
        """Sets of classes whose shards have equal sizes, and these sizes, in bytes, by tensor."""
        for number in range(len(self._lengths)):
            yield self._classes_of(number), self._sized(number).bytes

    def alike(self) -> Iterator[tuple[Ints, list[int]]]:
        """Sets of classes whose chunks are of equal sizes, and these sizes, in bytes, in order."""
        for number in range(len(self._lengths)):
            sized = self._sized(number)
            classes = self._classes_of(number)
            for members in self._by_phase(number, classes):
                yield (
                    members,
                    [
                        *sized.bundle_bytes,
                        *self._grid_sizes(int(members[0]), sized),
                    ],
                )

    def _by_phase(self, number: int, classes: Ints) -> list[Ints]:
        """Classes by where the lines of the grid lie in their shards."""
        grid = self._sized(number).grid
        cut = grid[self._row_bytes[grid] <= self._chunk_bytes]
        phases: set[tuple[int, int]] = set()
        for position in cut:
            if (way := int(self._first_way[position])) >= 0:
                phases.add((way, self._chunk_bytes // int(self._row_bytes[position])))
        if not phases:
            return [classes]
        at = np.unravel_index(classes, self.class_sizes)
        rows = np.stack([self._lay(way, at)[0] % step for way, step in sorted(phases)], axis=1)
        alike: dict[bytes, list[int]] = {}
        for number, row in zip(classes.tolist(), rows, strict=True):
            alike.setdefault(row.tobytes(), []).append(number)
        return [np.array(members) for members in alike.values()]

    def _grid_sizes(self, class_number: int, sized: _Sized) -> Iterator[int]:
        for position in map(int, sized.grid):
            item, box = int(self._items[position]), self.box(class_number, position)
            cuts = chunk_cuts(self.shapes[position], item, box, self._chunk_bytes)
            yield from ((stop - start) * item for start, stop in itertools.pairwise(cuts))


class FamilyChunks:
    """Where the chunks and shards of a family are among all, and who wrote which."""

    def __init__(self, spread: Spread, first: int, first_shard: int, rows: Ints, name: str) -> None:
        """``rows``: for each rank its chunks that come before; those of this family are added."""
        self.spread = spread
        self.first = first
        self.first_shard = first_shard
        counts = np.frombuffer(spread.family.counts, "<u4").reshape(spread.ranks.shape).astype(np.int64)
        if not np.array_equal(counts.sum(axis=1), spread.totals()):
            raise FormatError(f"{name}: the writers of a family do not cover its chunks exactly")
        self.count = int(counts.sum())
        flat = counts.reshape(-1)
        self._run_first = first + np.cumsum(flat) - flat
        """Of each class and rank of it, the first chunk."""
        self._counts = flat
        self._class_first = self._run_first.reshape(counts.shape)[:, 0]
        self._ranks = spread.ranks.reshape(-1)
        self._row: Ints = rows[self._ranks]
        rows[self._ranks] += flat
        self._order = np.argsort(self._ranks)
        self._sorted = self._ranks[self._order]

    def unit_at(self, chunk: int) -> Unit:
        number = int(np.searchsorted(self._class_first, chunk, "right")) - 1
        first = int(self._class_first[number])
        unit = self.spread.unit_at(number, chunk - first)
        base = self.first_shard + number * len(self.spread.family.tensors)
        return Unit(first + unit.first, unit.count, tuple(base + shard for shard in unit.shards), unit.is_bundle)

    def places(self, position: int, wanted: Box) -> Iterator[Place]:
        for number in self.spread.touching(position, wanted):
            place = self.spread.place_of(number, position)
            shard = self.first_shard + number * len(self.spread.family.tensors) + position
            first = int(self._class_first[number]) + place.first
            yield Place(shard, place.box, first, place.count, place.byte, place.bundle_bytes)

    def _run(self, chunk: int) -> int:
        return int(np.searchsorted(self._run_first, chunk, "right")) - 1

    def writer(self, chunk: int) -> tuple[int, int]:
        run = self._run(chunk)
        return int(self._ranks[run]), int(self._row[run]) + chunk - int(self._run_first[run])

    def writers_of(self, first: int, last: int) -> set[int]:
        return set(self._ranks[self._run(first) : self._run(last) + 1].tolist())

    def run_of(self, rank: int) -> range:
        at = int(np.searchsorted(self._sorted, rank))
        if at == len(self._sorted) or self._sorted[at] != rank:
            return range(0)
        run = self._order[at]
        first = int(self._run_first[run])
        return range(first, first + int(self._counts[run]))
