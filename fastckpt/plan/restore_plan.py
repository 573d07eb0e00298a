"""From what a rank wants and a layout to what it reads: resharding is this step and only this. Pure functions."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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
        parts = name.split(".")
        heads = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        return not self._only or any(fnmatch.fnmatchcase(head, glob) for glob in self._only for head in heads)


class Catalog:
    """The tensors of a snapshot that one rank may restore, by their names in the state."""

    def __init__(self, layout: Layout, rank: int, world_size: int, selection: Selection) -> None:
        self.tensors: dict[str, Stored] = {}
        self.lost: dict[str, int] = {}
        """Tensors that each rank had its own of, in a world of that many ranks, which is not this one."""
        self._stored_by = dict(layout.aliases)
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

    def below(self, prefix: str) -> dict[str, Stored]:
        """The tensors whose name starts with ``prefix``, by the rest of their name."""
        return {name[len(prefix) :]: stored for name, stored in self.tensors.items() if name.startswith(prefix)}


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
    layout = chunks.layout
    stored = dict(layout.aliases)
    by_key: dict[int, list[Want]] = {}
    for want in wants:
        by_key.setdefault(stored.get(want.key, want.key), []).append(want)
    reads: list[ChunkRead] = []
    for unit, shards in enumerate(layout.units):
        wanted = {
            shard: touching
            for shard in shards
            if (touching := _touching(layout.box(shard), by_key.get(layout.shard_keys[shard], ())))
        }
        if not wanted:
            continue
        for chunk, pieces in zip(chunks.unit_chunks(unit), chunks.unit_pieces(unit), strict=True):
            deliveries = tuple(
                Delivery(piece, want.target, want.box)
                for piece in pieces
                for want in wanted.get(piece.shard, ())
                if any(True for _ in regions(layout.box(piece.shard), piece, want.box))
            )
            if deliveries:
                reads.append(ChunkRead(chunk, chunks.raw_bytes(pieces), deliveries))
    return reads


def _touching(shard: Box, wants: Sequence[Want]) -> list[Want]:
    return [want for want in wants if shard.intersect(want.box)]


def regions(shard: Box, piece: Piece, wanted: Box) -> Iterator[tuple[Box, Box, int]]:
    """Where wanted elements lie in a piece: (region in whole-tensor coordinates, contiguous box it is in, in the same
    coordinates, element position of that box in the piece)."""
    at = 0
    for local in boxes_of_flat_range(shard.sizes, piece.start, piece.stop):
        run = local.shifted(shard.offsets)
        if region := run.intersect(wanted):
            yield region, run, at
        at += run.elements
