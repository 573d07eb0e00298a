"""From what a rank wants and a layout to what it reads: resharding is this step and only this. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastckpt.format.shard import Box, boxes_of_flat_range
from fastckpt.format.tables import Chunks, Piece


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
