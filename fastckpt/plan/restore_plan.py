"""From what a rank wants and a layout to what it reads: resharding is this step and only this. Pure functions."""

from __future__ import annotations

import bisect
import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import msgspec

from fastckpt.format.shard import Box, boxes_of_flat_range
from fastckpt.format.tables import SHARED, Chunks, Layout, Piece


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a snapshot under the name it is looked for by."""

    number: int
    """Of the key in the layout."""
    dtype: str
    shape: tuple[int, ...]


class Selection:
    """Which names of a snapshot a restore looks at, and what it calls them."""

    def __init__(self, only: Sequence[str] = (), rename: Mapping[str, str] | None = None) -> None:
        """``only``: globs on names of the state; none means all. ``rename``: prefixes of the snapshot's names to
        prefixes of the state's; the longest that fits counts."""
        self.only = tuple(only)
        # A glob for all that is below a name means the name too: an optimizer's own value carries its name.
        self._only = (*only, *(glob.removesuffix(".*") for glob in only if glob.endswith(".*") and glob != "*.*"))
        self._rename = sorted((rename or {}).items(), key=lambda item: len(item[0]), reverse=True)

    def renamed(self, name: str) -> str:
        """What a name of the snapshot is called in the state."""
        for old, new in self._rename:
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    def may_have(self, top: str) -> bool:
        """Whether anything at or below a top-level name of the state may be selected."""
        return not self._only or any(
            fnmatch.fnmatchcase(top, glob) or glob.startswith((f"{top}.", "*")) for glob in self._only
        )

    def has(self, name: str) -> bool:
        """Whether a name of the state is selected: a glob that fits a name selects all that is below it."""
        return not self._only or any(fnmatch.fnmatchcase(head, glob) for glob in self._only for head in heads(name))


class Catalog:
    """The tensors of a snapshot that one rank may restore, by their names in the state."""

    def __init__(self, layout: Layout, rank: int, world_size: int, selection: Selection) -> None:
        self.tensors: dict[str, Stored] = {}
        self.lost: dict[str, int] = {}
        """Tensors that each rank had its own of, in a world of that many ranks, which is not this one."""
        self._stored_by = dict(layout.aliases)
        self._owners = layout.owners
        same_world = len(layout.rank_nodes) == world_size
        for number, (key, owner) in enumerate(zip(layout.keys, layout.owners, strict=True)):
            name = selection.renamed(key)
            if not selection.has(name):
                continue
            if owner in (SHARED, rank) and (owner == SHARED or same_world):
                if name in self.tensors and {owner, layout.owners[self.tensors[name].number]} != {SHARED, rank}:
                    raise ValueError(f"rename makes {name} of two names of the snapshot")
                self.tensors[name] = Stored(number, layout.dtypes[number], tuple(layout.shapes[number]))
            elif not same_world:
                self.lost[name] = len(layout.rank_nodes)

    def same_tensor(self, a: int, b: int) -> bool:
        """Whether two keys, by number, are one stored tensor."""
        return self._stored_by.get(a, a) == self._stored_by.get(b, b)

    def is_shared(self, number: int) -> bool:
        """Whether a key, by number, is not one rank's own."""
        return self._owners[number] == SHARED

    def in_order(self) -> Iterator[tuple[int, bool, str]]:
        """By key number: number, whether the tensor is shared, and its name in the state."""
        for name, stored in sorted(self.tensors.items(), key=lambda item: item[1].number):
            yield stored.number, self._owners[stored.number] == SHARED, name

    def below(self, prefix: str) -> dict[str, Stored]:
        """The tensors whose name starts with ``prefix``, by the rest of their name."""
        return {name[len(prefix) :]: stored for name, stored in self.tensors.items() if name.startswith(prefix)}


UNUSED_NAMES_MAX = 1000
PROBLEMS_SHOWN_MAX = 50


class Fit(msgspec.Struct, array_like=True, frozen=True):
    """How a snapshot fits the state of one rank, as the coordinator hears of it."""

    problems: list[str]
    """The first ``PROBLEMS_SHOWN_MAX``."""
    problem_count: int
    asked: list[str]
    """Top-level names of the state."""
    any_used: bool
    unused: list[tuple[int, int]]
    """Shared tensors that this rank has no place for, as runs (start, stop) of key numbers. What lies between two of
    them and is no shared tensor of the selection may be in a run."""
    unused_own: list[int]
    """Key numbers of this rank's own tensors that it has no place for."""
    unused_names: list[str]
    """Likewise of plain values, as far as this rank knows them; none if there are more than ``UNUSED_NAMES_MAX``."""


def fit(
    catalog: Catalog, asked: Sequence[str], used: Set[str], unused_names: Sequence[str], problems: Sequence[str]
) -> Fit:
    """``used``: names of the catalog that have a place in the state."""
    runs: list[tuple[int, int]] = []
    own: list[int] = []
    open_run = False
    for number, shared, name in catalog.in_order():
        if name in used:
            open_run = False
        elif not shared:
            own.append(number)
        elif open_run:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
            open_run = True
    names = sorted(set(unused_names)) if len(unused_names) <= UNUSED_NAMES_MAX else []
    shown = list(problems[:PROBLEMS_SHOWN_MAX])
    return Fit(shown, len(problems), list(asked), bool(used), runs, own, names)


def misfits(fits: Mapping[int, Fit], layout: Layout, selection: Selection) -> list[str]:
    """What is wrong, as lines for the user: what ranks found, each with the ranks unless all did; and what the snapshot
    has below the names that were asked for, and no rank has a place for. On a stage of a pipeline, what the other
    stages have is not in the state."""
    found: dict[str, list[int]] = {}
    for rank, one in sorted(fits.items()):
        for problem in one.problems:
            found.setdefault(problem, []).append(rank)
    lines = [text if len(ranks) == len(fits) else f"{text} (on {_ranks(ranks)})" for text, ranks in found.items()]
    if selection.only and not found and not any(one.any_used for one in fits.values()):
        lines.append(f"only={list(selection.only)} selects nothing that is both in the state and the snapshot")
    lines += [f"{name}: in the snapshot but not in the state" for name in _extra(fits, layout, selection)]
    more = len(lines) - PROBLEMS_SHOWN_MAX + max(one.problem_count - len(one.problems) for one in fits.values())
    return lines[:PROBLEMS_SHOWN_MAX] + ([f"and {more} more"] if more > 0 else [])


def _extra(fits: Mapping[int, Fit], layout: Layout, selection: Selection) -> list[str]:
    """Names that some rank asked for and none has a place for, sorted."""
    everywhere = _common_runs([one.unused for one in fits.values()])
    shared = [n for start, stop in everywhere for n in range(start, stop) if layout.owners[n] == SHARED]
    numbers = sorted({*shared, *(number for one in fits.values() for number in one.unused_own)})
    names = [selection.renamed(layout.keys[number]) for number in numbers]
    asked = {rank: frozenset(one.asked) for rank, one in fits.items()}
    anywhere = frozenset().union(*asked.values())
    extra = {name for name in names if selection.has(name) and not anywhere.isdisjoint(heads(name))}
    unused = {rank: frozenset(one.unused_names) for rank, one in fits.items()}
    for name in frozenset().union(*unused.values()):
        # A rank that asked for what is above it and has not got it among what is unused has a place for it.
        askers = [rank for rank in fits if not asked[rank].isdisjoint(heads(name))]
        if askers and all(name in unused[rank] for rank in askers):
            extra.add(name)
    return sorted(extra)


def _common_runs(each: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The intersection of sets given as ascending runs."""
    if not all(each):
        return []
    edges = sorted(edge for runs in each for start, stop in runs for edge in ((start, 1), (stop, -1)))
    common: list[tuple[int, int]] = []
    depth = since = 0
    for at, step in edges:
        if depth == len(each) and step < 0:
            common.append((since, at))
        depth += step
        since = at
    return [(start, stop) for start, stop in common if start < stop]


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def heads(name: str) -> list[str]:
    """A name and the names above it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


@dataclass(frozen=True, slots=True)
class Want:
    """A box of a stored tensor, and who it is for."""

    key: int
    """Number of the key in the layout."""
    box: Box
    target: int
    """Whatever the caller knows the receiver by."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Part of a chunk that goes to a target."""

    piece: Piece
    shard: Box
    """That the piece is of."""
    target: int
    box: Box
    """The box wanted by the target."""


@dataclass(frozen=True, slots=True)
class ChunkRead:
    chunk: int
    raw_bytes: int
    deliveries: tuple[Delivery, ...]


def plan_reads(chunks: Chunks, wants: Sequence[Want]) -> list[ChunkRead]:
    """The chunks that hold any wanted element, ascending, each once, with everything in them that is wanted."""
    stored = dict(chunks.layout.aliases)
    found: dict[int, list[Delivery]] = {}
    raw_bytes: dict[int, int] = {}
    for want in wants:
        for place in chunks.places(stored.get(want.key, want.key), want.box):
            pieces = chunks.pieces_of(place)
            for at in _touched(place.box, pieces, want.box):
                chunk = place.first + at
                found.setdefault(chunk, []).append(Delivery(pieces[at], place.box, want.target, want.box))
                raw_bytes[chunk] = place.bundle_bytes or chunks.raw_bytes([pieces[at]])
    return [ChunkRead(chunk, raw_bytes[chunk], tuple(found[chunk])) for chunk in sorted(found)]


def _touched(shard: Box, pieces: Sequence[Piece], wanted: Box) -> Iterable[int]:
    """The positions of the pieces, which are a shard in order, that hold any wanted element."""
    common = shard if shard == wanted else shard.intersect(wanted)
    if common is None:
        return ()
    if common == shard:
        return range(len(pieces))
    # Rows that are not wanted are skipped by arithmetic; within the others, pieces are looked at one by one.
    row = math.prod(shard.sizes[1:])
    first = (common.offsets[0] - shard.offsets[0]) * row
    low = bisect.bisect_right(pieces, first, key=lambda piece: piece.start) - 1
    high = bisect.bisect_left(pieces, first + common.sizes[0] * row, key=lambda piece: piece.start)
    if common.sizes[1:] == shard.sizes[1:]:
        return range(low, high)
    return [at for at in range(low, high) if any(True for _ in regions(shard, pieces[at], wanted))]


def regions(shard: Box, piece: Piece, wanted: Box) -> Iterator[tuple[Box, Box, int]]:
    """Where wanted elements lie in a piece: (region in whole-tensor coordinates, contiguous box it is in, in the same
    coordinates, element position of that box in the piece)."""
    at = 0
    for local in boxes_of_flat_range(shard.sizes, piece.start, piece.stop):
        run = local.shifted(shard.offsets)
        if region := run.intersect(wanted):
            yield region, run, at
        at += run.elements
