"""From what each rank holds to a layout: which chunks there are and which rank writes each. Pure functions.

Each byte is written once. A shard that several ranks hold is split between them by bytes, at chunk boundaries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import msgspec

from fastckpt.format.chunk import CHUNK_BYTES_MAX, bundle_bytes_max, is_tiny
from fastckpt.format.dtype import item_bytes
from fastckpt.format.shard import Box, find_overlap
from fastckpt.format.tables import SHARED, Chunks, Layout
from fastckpt.plan.deal import Class, Dealer
from fastckpt.topology.topology import Topology

KNOWN = 0
"""Equal on all ranks of ``among`` by what the tensor is (DTensor ``Replicate``, a DDP module's parameter)."""
COMPARED = 1
"""Equal only if the ranks' digests say so; then the lowest rank that has it writes it."""
LOWEST = 2
"""Not known to be equal and not split: the lowest rank that has it writes it for all (module buffers)."""
OWN = 3
"""Compared like ``COMPARED``; where the digests differ, each rank keeps its own (tensors of a ``Stateful``)."""

AUTO_CHUNK_BYTES_MIN = 4 * 1024 * 1024
AUTO_CHUNKS_MAX = 2_000_000

Boxes: TypeAlias = list[tuple[list[int], list[int]]]


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """One tensor as one rank holds it."""

    key: str
    dtype: str
    shape: list[int]
    boxes: Boxes
    """Offsets and sizes of the parts this rank holds; none where its shard is empty."""
    sharing: int
    among: int
    """For ``KNOWN``: position in ``RankOffer.groups``."""
    alias: str
    """The key of this rank's tensor that is the same memory, or empty."""


class RankOffer(msgspec.Struct, array_like=True, frozen=True):
    """Everything one rank holds."""

    tensors: list[Offer]
    groups: list[list[int]]


class Comparison(msgspec.Struct, array_like=True, frozen=True):
    """Keys that a set of ranks must find equal before every save."""

    ranks: list[int]
    keys: list[str]


class Agreement(msgspec.Struct, array_like=True, frozen=True):
    """What the coordinator publishes when the layout changes."""

    layout: bytes
    """The layout object as it will be stored."""
    comparisons: list[Comparison]


def auto_chunk_bytes(state_bytes: int) -> int:
    """The smallest power of two from 4 MiB on that keeps a snapshot of this size far below the limit of chunks."""
    size = AUTO_CHUNK_BYTES_MIN
    while state_bytes > size * AUTO_CHUNKS_MAX and size < CHUNK_BYTES_MAX:
        size *= 2
    return size


def offered_bytes(offers: Mapping[int, RankOffer]) -> int:
    """Logical bytes of everything offered, each key once."""
    sizes = {
        offer.key: math.prod(offer.shape) * item_bytes(offer.dtype)
        for rank in offers.values()
        for offer in rank.tensors
    }
    return sum(sizes.values())


def plan_save(
    offers: Mapping[int, RankOffer],
    digests: Mapping[int, Mapping[str, bytes]],
    nodes: Sequence[int],
    chunk_bytes: int,
    dealer: Dealer | None = None,
) -> tuple[Layout, list[Comparison]]:
    """The layout of a save, and what has to be compared before each save that uses it. ``dealer`` chooses who writes
    what several ranks hold; without one, they all do, evenly.

    ``digests`` holds, for each rank, a digest of the sampled content of every tensor that is not known to be equal
    everywhere. ``ValueError`` naming key and ranks if ranks disagree about a tensor, or do not hold all of it.
    """
    held: dict[str, dict[int, Offer]] = {}
    for rank in sorted(offers):
        for offer in offers[rank].tensors:
            held.setdefault(offer.key, {})[rank] = offer

    keys: list[tuple[str, int]] = []
    described: dict[tuple[str, int], Offer] = {}
    aliases: dict[tuple[str, int], tuple[str, int]] = {}
    classes: dict[tuple[int, ...], list[tuple[tuple[str, int], Box]]] = {}
    compared: dict[tuple[int, ...], list[str]] = {}
    for key in sorted(held):
        for owner, holders in _owners(key, held[key], digests):
            identity = (key, owner)
            first = next(iter(holders.values()))
            keys.append(identity)
            described[identity] = first
            if target := _alias(key, holders):
                aliases[identity] = (target, owner)
                continue
            boxes = _holders(key, holders, offers, digests)
            _check_cover(key, first.shape, boxes)
            for box, ranks in boxes.items():
                classes.setdefault(ranks, []).append((identity, box))
            if owner == SHARED:
                for ranks in _to_compare(holders, offers):
                    compared.setdefault(ranks, []).append(key)

    for identity, to in aliases.items():
        if to not in described or to in aliases:
            raise ValueError(f"{identity[0]}: tied to {to[0]}, of which ranks differ in what they hold. {_WAYS_OUT}")
    dealer = dealer or Dealer(Topology.from_hosts([str(node) for node in nodes]).tree())
    layout = _lay_out(keys, described, aliases, classes, nodes, chunk_bytes, dealer)
    return layout, [Comparison(list(ranks), names) for ranks, names in sorted(compared.items())]


def _owners(
    key: str, holders: dict[int, Offer], digests: Mapping[int, Mapping[str, bytes]]
) -> Iterable[tuple[int, dict[int, Offer]]]:
    """One shared tensor, or, for tensors that may differ and do, one for each rank."""
    offers = list(holders.values())
    by_kind: dict[int, list[int]] = {}
    for rank, offer in holders.items():
        by_kind.setdefault(offer.sharing, []).append(rank)
    if len(by_kind) > 1:
        groups = " unlike ".join(_ranks(ranks) for ranks in by_kind.values())
        raise ValueError(f"{key}: ranks hold different kinds of things under this key ({groups}). {_WAYS_OUT}")
    if offers[0].sharing == OWN:
        same = all(offer == offers[0] for offer in offers) and len({digests[rank].get(key) for rank in holders}) == 1
        if not same:
            return [(rank, {rank: offer}) for rank, offer in holders.items()]
    by_form: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank, offer in holders.items():
        by_form.setdefault((offer.dtype, tuple(offer.shape)), []).append(rank)
    if len(by_form) > 1:
        forms = "; ".join(f"{dtype} {list(shape)} on {_ranks(ranks)}" for (dtype, shape), ranks in by_form.items())
        raise ValueError(f"{key}: ranks hold tensors of different shape or dtype under this key: {forms}. {_WAYS_OUT}")
    return [(SHARED, holders)]


_WAYS_OUT = (
    "If these are parts of one tensor, say so with fastckpt.Shard(tensor, offsets, shape) or a DTensor; "
    "if each rank has its own, put it under a name of its own, such as f'experts.{rank}'"
)


def _alias(key: str, holders: Mapping[int, Offer]) -> str:
    targets: dict[str, list[int]] = {}
    for rank, offer in holders.items():
        targets.setdefault(offer.alias, []).append(rank)
    if len(targets) > 1:
        how = "; ".join(f"{'to ' + target if target else 'to nothing'} on {_ranks(r)}" for target, r in targets.items())
        raise ValueError(f"{key}: tied differently on different ranks: {how}; tie it on every rank, or on none")
    return next(iter(targets))


def _holders(
    key: str,
    holders: Mapping[int, Offer],
    offers: Mapping[int, RankOffer],
    digests: Mapping[int, Mapping[str, bytes]],
) -> dict[Box, tuple[int, ...]]:
    """For each box of a shared tensor, the ranks among which its bytes may be split."""
    boxes: dict[Box, list[int]] = {}
    for rank, offer in holders.items():
        for offsets, sizes in offer.boxes:
            boxes.setdefault(Box(tuple(offsets), tuple(sizes)), []).append(rank)
    result: dict[Box, tuple[int, ...]] = {}
    for box, ranks in boxes.items():
        first = holders[ranks[0]]
        if first.sharing == LOWEST:
            result[box] = (ranks[0],)
            continue
        result[box] = tuple(ranks)
        if len(ranks) == 1 or _known(first, ranks, offers):
            continue
        # Found equal, but not known to be: written whole by one rank, so that ranks that drift apart are never mixed.
        result[box] = (ranks[0],)
        by_digest: dict[bytes, list[int]] = {}
        for rank in ranks:
            by_digest.setdefault(digests[rank].get(key, b""), []).append(rank)
        if len(by_digest) > 1 or b"" in by_digest:
            groups = " from ".join(_ranks(same) for same in by_digest.values())
            raise ValueError(
                f"{key}: differs between ranks ({groups}); keeping one of them would lose the others. {_WAYS_OUT}"
            )
    return result


def _to_compare(holders: Mapping[int, Offer], offers: Mapping[int, RankOffer]) -> Iterable[tuple[int, ...]]:
    """Sets of ranks that hold the same boxes of a tensor, and are not known to hold the same bytes."""
    same_boxes: dict[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], list[int]] = {}
    for rank, offer in holders.items():
        boxes = tuple((tuple(offsets), tuple(sizes)) for offsets, sizes in offer.boxes)
        if boxes and offer.sharing != LOWEST:
            same_boxes.setdefault(boxes, []).append(rank)
    for ranks in same_boxes.values():
        if len(ranks) > 1 and not _known(holders[ranks[0]], ranks, offers):
            yield tuple(ranks)


def _known(offer: Offer, ranks: Sequence[int], offers: Mapping[int, RankOffer]) -> bool:
    """Whether what ``ranks`` hold of a tensor is equal by what the tensor is; ``offer`` is the first rank's."""
    return offer.sharing == KNOWN and set(offers[ranks[0]].groups[offer.among]).issuperset(ranks)


def _check_cover(key: str, shape: list[int], boxes: Mapping[Box, tuple[int, ...]]) -> None:
    if overlap := find_overlap(list(boxes)):
        a, b = overlap
        raise ValueError(
            f"{key}: {_ranks(boxes[a])} and {_ranks(boxes[b])} hold overlapping but different boxes "
            f"{a} and {b} of shape {shape}; each gives its own part, or all give the same"
        )
    covered, whole = sum(box.elements for box in boxes), math.prod(shape)
    if covered != whole:
        have = ", ".join(f"{box} on {_ranks(ranks)}" for box, ranks in itertools.islice(boxes.items(), 8))
        raise ValueError(
            f"{key}: ranks hold {covered} of the {whole} elements of shape {shape}: {have or 'nothing'}; every element "
            "must be held by some rank: does one not give its Shard, or has its optimizer not stepped it yet?"
        )


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _lay_out(
    keys: list[tuple[str, int]],
    described: Mapping[tuple[str, int], Offer],
    aliases: Mapping[tuple[str, int], tuple[str, int]],
    classes: Mapping[tuple[int, ...], list[tuple[tuple[str, int], Box]]],
    nodes: Sequence[int],
    chunk_bytes: int,
    dealer: Dealer,
) -> Layout:
    number = {identity: position for position, identity in enumerate(keys)}
    shards: list[tuple[int, Box]] = []
    units: list[list[int]] = []
    class_units: list[tuple[tuple[int, ...], int]] = []
    for ranks in sorted(classes):
        first_unit = len(units)
        bundle: list[int] = []
        bundle_bytes = 0
        for identity, box in sorted(classes[ranks]):
            size = box.elements * item_bytes(described[identity].dtype)
            shard = len(shards)
            shards.append((number[identity], box))
            if not is_tiny(size, chunk_bytes):
                units.append([shard])
                continue
            if bundle and bundle_bytes + size > bundle_bytes_max(chunk_bytes):
                units.append(bundle)
                bundle, bundle_bytes = [], 0
            bundle.append(shard)
            bundle_bytes += size
        if bundle:
            units.append(bundle)
        class_units.append((ranks, len(units) - first_unit))
    layout = Layout(
        chunk_bytes=chunk_bytes,
        keys=[key for key, _ in keys],
        owners=[owner for _, owner in keys],
        dtypes=[described[identity].dtype for identity in keys],
        shapes=[described[identity].shape for identity in keys],
        aliases=[(number[key], number[target]) for key, target in aliases.items()],
        shard_keys=[key for key, _ in shards],
        shard_offsets=[list(box.offsets) for _, box in shards],
        shard_sizes=[list(box.sizes) for _, box in shards],
        units=units,
        writers=[],
        rank_nodes=list(nodes),
    )
    return msgspec.structs.replace(layout, writers=_deal(Chunks(layout), class_units, dealer))


def _deal(chunks: Chunks, class_units: Iterable[tuple[tuple[int, ...], int]], dealer: Dealer) -> list[tuple[int, int]]:
    """Runs of chunks by writer."""
    classes: list[Class] = []
    unit = 0
    for ranks, count in class_units:
        units = range(unit, unit + count)
        sizes = [chunks.raw_bytes(pieces) for number in units for pieces in chunks.unit_pieces(number)]
        classes.append(Class(ranks, sizes))
        unit += count
    counts = dealer.deal(classes).counts
    runs = (pair for each, own in zip(classes, counts, strict=True) for pair in zip(each.ranks, own, strict=True))
    return [(rank, length) for rank, length in runs if length]
