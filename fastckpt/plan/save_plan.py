"""From what each rank holds to a layout: which chunks there are and which rank writes each. Pure functions.

Each byte is written once. A shard that several ranks hold is split between them by bytes, at chunk boundaries.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from fastckpt.errors import LimitExceeded
from fastckpt.format.chunk import CHUNK_BYTES_MAX, CHUNKS_MAX, bundle_bytes_max, is_tiny
from fastckpt.format.dtype import item_bytes
from fastckpt.format.families import (
    FAMILIES_MAX,
    HOLDERS_MAX,
    WORK_MAX,
    Family,
    Mesh,
    Spread,
    check_mesh,
    split_box,
)
from fastckpt.format.shard import Box, find_overlap
from fastckpt.format.tables import SHARED, Chunks, Layout
from fastckpt.plan.alike import runs_of
from fastckpt.plan.classes import as_written, of_layout
from fastckpt.plan.deal import Dealer
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
    """Offsets and sizes of the parts this rank holds; none where its shard is empty, or follows from a mesh."""
    sharing: int
    among: int
    """For ``KNOWN``: position in ``RankOffer.groups``."""
    alias: str
    """The key of this rank's tensor that is the same memory, or empty."""
    mesh: int = -1
    """Position in ``RankOffer.meshes`` of the mesh whose ranks hold the tensor by ``splits``, this one its part; or -1.
    Then it is known to be equal among them."""
    splits: list[tuple[int, int]] = []
    """Pairs (dimension of the tensor, dimension of the mesh) as in ``format/families``."""


class RankOffer(msgspec.Struct, array_like=True, frozen=True):
    """Everything one rank holds. Ranks that hold their parts of the same meshes offer the same."""

    tensors: list[Offer]
    groups: list[list[int]]
    meshes: list[Mesh] = []


class Comparison(msgspec.Struct, array_like=True, frozen=True):
    """Keys that a set of ranks must find equal before every save."""

    runs: list[tuple[int, int]]
    """The ranks, as runs (start, stop)."""
    keys: list[str]

    def has(self, rank: int) -> bool:
        return any(start <= rank < stop for start, stop in self.runs)


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
    different = {id(rank): rank for rank in offers.values()}
    sizes = {
        offer.key: math.prod(offer.shape) * item_bytes(offer.dtype)
        for rank in different.values()
        for offer in rank.tensors
    }
    return sum(sizes.values())


@dataclass(frozen=True, eq=False)
class _Kind:
    """Ranks that offer the same, with equal digests."""

    ranks: tuple[int, ...]
    """Ascending."""
    offer: RankOffer
    digests: Mapping[str, bytes]


_Holders: TypeAlias = list[tuple[_Kind, Offer]]
"""Who has something under a key, and what; in order of their lowest ranks."""
_Identity: TypeAlias = tuple[str, int]


class _Classes:
    """Sets of ranks: equal ones are one, and are told apart by a number."""

    def __init__(self) -> None:
        self.members: list[tuple[int, ...]] = []
        """Ascending."""
        self._numbers: dict[tuple[int, ...], int] = {}
        self._of_kinds: dict[tuple[int, ...], int] = {}
        self._groups: dict[int, frozenset[int]] = {}
        self._within: dict[tuple[int, int], bool] = {}
        self._alone: dict[tuple[int, int], _Kind] = {}

    def of(self, kinds: Sequence[_Kind]) -> int:
        """The ranks of some kinds, which live as long as this. Quick where it was asked before: they may be many."""
        key = tuple(map(id, kinds))
        if key not in self._of_kinds:
            self._of_kinds[key] = self.number(sorted(rank for kind in kinds for rank in kind.ranks))
        return self._of_kinds[key]

    def number(self, ranks: Sequence[int]) -> int:
        """Of ranks that ascend."""
        ranks = tuple(ranks)
        if ranks not in self._numbers:
            self._numbers[ranks] = len(self.members)
            self.members.append(ranks)
        return self._numbers[ranks]

    def alone(self, kind: _Kind, rank: int) -> _Kind:
        """One rank of a kind."""
        if (id(kind), rank) not in self._alone:
            self._alone[id(kind), rank] = _Kind((rank,), kind.offer, kind.digests)
        return self._alone[id(kind), rank]

    def is_within(self, number: int, group: list[int]) -> bool:
        """Whether all of these ranks are in a group, a list that lives as long as this."""
        key = (number, id(group))
        if key not in self._within:
            if id(group) not in self._groups:
                self._groups[id(group)] = frozenset(group)
            self._within[key] = self._groups[id(group)].issuperset(self.members[number])
        return self._within[key]


_T = TypeVar("_T", Box, tuple[Box, ...])


def keys_to_digest(offers: Mapping[int, RankOffer], world_size: int) -> list[str]:
    """Sorted keys of tensors that several ranks hold, and that are not known to be equal wherever they are held:
    ``plan_save`` is to be given digests of these."""
    return _Plan(_kinds(offers, {}), [0] * world_size).to_digest()


def plan_save(
    offers: Mapping[int, RankOffer],
    digests: Mapping[int, Mapping[str, bytes]],
    nodes: Sequence[int],
    chunk_bytes: int,
    *,
    families: bool = True,
    chunks_max: int = CHUNKS_MAX,
    dealer: Dealer | None = None,
) -> tuple[Layout, list[Comparison]]:
    """The layout of a save, and what has to be compared before each save that uses it.

    Ranks that offer alike are to be given one and the same object; then the time it takes grows with the number of
    different offers and digests, and not with that of the ranks times tensors. ``digests`` holds, for each rank, a
    digest of the whole content of every tensor that ``keys_to_digest`` names. Without ``families`` all shards are
    listed. ``dealer`` chooses who writes what several ranks hold; without one, all ranks are taken for equal.
    ``LimitExceeded`` for more than ``chunks_max`` chunks. ``ValueError`` naming key and ranks if ranks disagree
    about a tensor, or do not hold all of it.
    """
    dealer = dealer or Dealer(Topology.from_hosts([str(node) for node in nodes]).tree())
    return _Plan(_kinds(offers, digests), nodes, chunk_bytes, families, chunks_max).make(dealer)


def _kinds(offers: Mapping[int, RankOffer], digests: Mapping[int, Mapping[str, bytes]]) -> list[_Kind]:
    """In order of their lowest ranks. A rank without digests has none."""
    none: dict[str, bytes] = {}
    ranks: dict[tuple[int, int], list[int]] = {}
    for rank in sorted(offers):
        ranks.setdefault((id(offers[rank]), id(digests.get(rank, none))), []).append(rank)
    return [_Kind(tuple(same), offers[same[0]], digests.get(same[0], none)) for same in ranks.values()]


def _held(kinds: Iterable[_Kind]) -> dict[str, _Holders]:
    held: dict[str, _Holders] = {}
    for kind in kinds:
        for offer in kind.offer.tensors:
            held.setdefault(offer.key, []).append((kind, offer))
    return held


class _Plan:
    def __init__(
        self,
        kinds: list[_Kind],
        nodes: Sequence[int],
        chunk_bytes: int = 0,
        families: bool = True,
        chunks_max: int = CHUNKS_MAX,
    ) -> None:
        self._kinds = kinds
        self._nodes = nodes
        self._chunk_bytes = chunk_bytes
        self._families = families
        self._chunks_max = chunks_max
        self._classes = _Classes()
        self._meshes = _Meshes(len(nodes))
        self._keys: list[_Identity] = []
        self._described: dict[_Identity, Offer] = {}
        self._listed: dict[int, list[tuple[_Identity, Box]]] = {}
        """By class, the boxes whose holders are listed."""
        self._ruled: dict[tuple[int, tuple[int, ...]], list[tuple[_Identity, _Holders]]] = {}
        """By mesh and its sharded dimensions, tensors that are split by rule."""
        self._compared: dict[int, list[str]] = {}
        """By class, keys that it must find equal."""

    def to_digest(self) -> list[str]:
        """Sorted keys of tensors that several ranks hold, and that are not known to be equal wherever they are held."""
        found = []
        for key, holders in sorted(_held(self._kinds).items()):
            first = holders[0][1]
            alone = len(holders) == 1 and len(holders[0][0].ranks) == 1
            if first.alias or first.sharing == LOWEST or alone or self._mesh_of(holders) is not None:
                continue
            if first.sharing != KNOWN or any(
                len(self._classes.members[number]) > 1 and not self._known(holders, number)
                for number in self._by_box(self._boxes(holders)).values()
            ):
                found.append(key)
        return found

    def make(self, dealer: Dealer) -> tuple[Layout, list[Comparison]]:
        aliases: dict[_Identity, _Identity] = {}
        held = _held(self._kinds)
        for key in sorted(held):
            for owner, holders in _owners(key, held[key], self._classes):
                identity = (key, owner)
                self._keys.append(identity)
                self._described[identity] = holders[0][1]
                if target := _alias(key, holders):
                    aliases[identity] = (target, owner)
                elif self._families and (mesh := self._mesh_of(holders)) is not None:
                    sharded = tuple(sorted(axis for _, axis in holders[0][1].splits))
                    self._ruled.setdefault((mesh, sharded), []).append((identity, holders))
                else:
                    self._list(identity, holders)
        for identity, to in aliases.items():
            if to not in self._described or to in aliases:
                raise ValueError(
                    f"{identity[0]}: tied to {to[0]}, of which ranks differ in what they hold. {_WAYS_OUT}"
                )
        spreads, count = self._make_families()
        layout, listed = self._lay_out(aliases)
        chunks = Chunks(layout)
        self._check_count(chunks.listed + count)
        classes = of_layout(chunks, listed, spreads)
        writers, counts = as_written(classes, dealer.deal(classes).runs, spreads)
        families = [
            msgspec.structs.replace(spread.family, counts=each) for spread, each in zip(spreads, counts, strict=True)
        ]
        layout = msgspec.structs.replace(layout, writers=writers, families=families)
        members = self._classes.members
        return layout, [
            Comparison(runs_of(members[number]), sorted(names))
            for number, names in sorted(self._compared.items(), key=lambda item: members[item[0]])
        ]

    def _mesh_of(self, holders: _Holders) -> int | None:
        """The mesh whose ranks hold a tensor by the rule, each its part, if that is so."""
        kind, first = holders[0]
        if first.mesh < 0:
            return None
        mesh = self._meshes.number(kind.offer.meshes[first.mesh])
        for other, offer in holders[1:]:
            if offer.mesh < 0 or self._meshes.number(other.offer.meshes[offer.mesh]) != mesh:
                return None
            if (offer.splits, offer.shape) != (first.splits, first.shape):
                return None
        number = self._classes.of([kind for kind, _ in holders])
        return mesh if self._meshes.holds(mesh, first.shape, first.splits, self._classes, number) else None

    # Tensors whose boxes are listed.

    def _list(self, identity: _Identity, holders: _Holders) -> None:
        key, owner = identity
        held = self._boxes(holders)
        boxes = self._by_box(held)
        writers = {box: self._writers(key, holders, number) for box, number in boxes.items()}
        members = self._classes.members
        _check_cover(key, holders[0][1].shape, {box: members[number] for box, number in writers.items()})
        for box, number in writers.items():
            self._listed.setdefault(number, []).append((identity, box))
        several = any(len(members[number]) > 1 for number in boxes.values())
        if several and owner == SHARED and holders[0][1].sharing != LOWEST:
            for number in self._by_box([(kind, (boxes,)) for kind, boxes in held if boxes]).values():
                if len(members[number]) > 1 and not self._known(holders, number):
                    self._compared.setdefault(number, []).append(key)

    def _boxes(self, holders: _Holders) -> list[tuple[_Kind, tuple[Box, ...]]]:
        """Who holds which boxes."""
        held: list[tuple[_Kind, tuple[Box, ...]]] = []
        for kind, offer in holders:
            if offer.mesh < 0:
                held.append((kind, tuple(Box(tuple(offsets), tuple(sizes)) for offsets, sizes in offer.boxes)))
                continue
            mesh = self._meshes.number(kind.offer.meshes[offer.mesh])
            for rank in kind.ranks:
                box = split_box(
                    offer.shape, offer.splits, self._meshes.sizes(mesh), self._meshes.coordinate(mesh, rank)
                )
                if box.elements:
                    held.append((self._classes.alone(kind, rank), (box,)))
        return held

    def _by_box(self, held: Iterable[tuple[_Kind, tuple[_T, ...]]]) -> dict[_T, int]:
        """The class that holds each box, or each set of boxes."""
        found: dict[_T, list[_Kind]] = {}
        for kind, boxes in held:
            for box in boxes:
                found.setdefault(box, []).append(kind)
        return {box: self._classes.of(kinds) for box, kinds in found.items()}

    def _writers(self, key: str, holders: _Holders, number: int) -> int:
        """The class among which the bytes may be split that a class holds."""
        ranks = self._classes.members[number]
        if holders[0][1].sharing == LOWEST:
            return self._classes.number(ranks[:1])
        if len(ranks) == 1 or self._known(holders, number):
            return number
        # Found equal, but not known to be: written whole by one rank, so that ranks that drift apart are never mixed.
        different = {kind.digests.get(key, b"") for kind, _ in holders}
        if len(different) == 1 and b"" not in different:
            return self._classes.number(ranks[:1])
        by_digest: dict[bytes, list[int]] = {}
        members = set(ranks)
        for kind, _ in holders:
            by_digest.setdefault(kind.digests.get(key, b""), []).extend(members.intersection(kind.ranks))
        by_digest = {digest: sorted(same) for digest, same in by_digest.items() if same}
        if len(by_digest) > 1 or b"" in by_digest:
            groups = " from ".join(_ranks(same) for same in sorted(by_digest.values()))
            raise ValueError(
                f"{key}: differs between ranks ({groups}); keeping one of them would lose the others. {_WAYS_OUT}"
            )
        return self._classes.number(ranks[:1])

    def _known(self, holders: _Holders, number: int) -> bool:
        """Whether what a class holds of a tensor is equal by what the tensor is, as its lowest rank tells."""
        lowest = self._classes.members[number][0]
        kind, offer = holders[0]
        if len(holders) > 1:
            kind, offer = next((kind, offer) for kind, offer in holders if _has(kind, lowest))
        if offer.sharing != KNOWN:
            return False
        if offer.mesh >= 0:
            return self._classes.is_within(number, self._meshes.group(kind.offer.meshes[offer.mesh]))
        return self._classes.is_within(number, kind.offer.groups[offer.among])

    # The layout.

    def _lay_out(self, aliases: Mapping[_Identity, _Identity]) -> tuple[Layout, list[tuple[tuple[int, ...], int]]]:
        """The layout without families and writers, and the ranks of each class with the number of its units."""
        number = {identity: position for position, identity in enumerate(self._keys)}
        shards: list[tuple[int, Box]] = []
        units: list[list[int]] = []
        class_units: list[tuple[tuple[int, ...], int]] = []
        members = self._classes.members
        for ranks in sorted(self._listed, key=members.__getitem__):
            first_unit = len(units)
            bundle: list[int] = []
            bundle_bytes = 0
            for identity, box in sorted(self._listed[ranks]):
                size = box.elements * item_bytes(self._described[identity].dtype)
                shard = len(shards)
                shards.append((number[identity], box))
                if not is_tiny(size, self._chunk_bytes):
                    units.append([shard])
                    continue
                if bundle and bundle_bytes + size > bundle_bytes_max(self._chunk_bytes):
                    units.append(bundle)
                    bundle, bundle_bytes = [], 0
                bundle.append(shard)
                bundle_bytes += size
            if bundle:
                units.append(bundle)
            class_units.append((members[ranks], len(units) - first_unit))
        layout = Layout(
            chunk_bytes=self._chunk_bytes,
            keys=[key for key, _ in self._keys],
            owners=[owner for _, owner in self._keys],
            dtypes=[self._described[identity].dtype for identity in self._keys],
            shapes=[self._described[identity].shape for identity in self._keys],
            aliases=[(number[key], number[target]) for key, target in aliases.items()],
            shard_keys=[key for key, _ in shards],
            shard_offsets=[list(box.offsets) for _, box in shards],
            shard_sizes=[list(box.sizes) for _, box in shards],
            units=units,
            writers=[],
            rank_nodes=list(self._nodes),
        )
        return layout, class_units

    def _check_count(self, chunks: int) -> None:
        if chunks > self._chunks_max:
            raise LimitExceeded(
                f"the state takes more than {self._chunks_max} chunks of up to {self._chunk_bytes} bytes; save to a "
                "new repository, with a larger Options(chunk_bytes)"
            )

    def _make_families(self) -> tuple[list[Spread], int]:
        """The families of the tensors that are split by rule, and the number of their chunks. Those that would take a
        reader too much work to check are listed instead."""
        number = {identity: position for position, identity in enumerate(self._keys)}
        found: list[Spread] = []
        work = holding = chunks = 0
        for (mesh, sharded), tensors in sorted(self._ruled.items(), key=lambda item: number[item[1][0][0]]):
            offers = [self._described[identity] for identity, _ in tensors]
            family = Family(
                mesh=self._meshes.meshes[mesh],
                sharded=list(sharded),
                tensors=[number[identity] for identity, _ in tensors],
                splits=[list(offer.splits) for offer in offers],
                counts=b"",
            )
            shapes, items = [offer.shape for offer in offers], [item_bytes(offer.dtype) for offer in offers]
            try:
                spread = Spread(family, shapes, items, self._chunk_bytes, "layout")
                if (
                    len(found) == FAMILIES_MAX
                    or work + spread.work > WORK_MAX
                    or holding + spread.ranks.size > HOLDERS_MAX
                ):
                    raise LimitExceeded("layout")
            except LimitExceeded:
                for identity, holders in tensors:
                    self._list(identity, holders)
                continue
            work, holding = work + spread.work, holding + spread.ranks.size
            chunks += int(spread.totals().sum())
            self._check_count(chunks)
            found.append(spread)
        return found, chunks


class _Meshes:
    """The meshes of all offers: equal ones are one, and are told apart by a number."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self.meshes: list[Mesh] = []
        self._numbers: dict[bytes, int] = {}
        self._by_id: dict[int, int] = {}
        self._arrays: dict[int, npt.NDArray[np.int64]] = {}
        self._groups: dict[int, list[int]] = {}
        self._flat: dict[int, dict[int, int]] = {}
        self._holds: dict[tuple[object, ...], bool] = {}

    def number(self, mesh: Mesh) -> int:
        """``mesh`` is of an offer, which lives as long as this. ``FormatError`` if it is none of this job."""
        if id(mesh) not in self._by_id:
            check_mesh(mesh, self._world_size, "the state")
            number = self._numbers.setdefault(msgspec.msgpack.encode(mesh), len(self._numbers))
            if number == len(self.meshes):
                self.meshes.append(mesh)
                self._arrays[number] = mesh.array()
            self._by_id[id(mesh)] = number
        return self._by_id[id(mesh)]

    def sizes(self, number: int) -> list[int]:
        return self.meshes[number].sizes

    def group(self, mesh: Mesh) -> list[int]:
        """The ranks of a mesh; for equal meshes one list."""
        number = self.number(mesh)
        if number not in self._groups:
            self._groups[number] = sorted(self._arrays[number].reshape(-1).tolist())
        return self._groups[number]

    def coordinate(self, number: int, rank: int) -> dict[int, int]:
        """Of a rank of the mesh, by dimension."""
        if number not in self._flat:
            ranks = self._arrays[number].reshape(-1).tolist()
            self._flat[number] = {rank: at for at, rank in enumerate(ranks)}
        at = self._flat[number][rank]
        found: dict[int, int] = {}
        for axis in reversed(range(len(self.sizes(number)))):
            at, found[axis] = divmod(at, self.sizes(number)[axis])
        return found

    def holds(
        self, number: int, shape: Sequence[int], splits: Sequence[tuple[int, int]], classes: _Classes, have: int
    ) -> bool:
        """Whether all ranks of a mesh that hold elements of a tensor by the rule are in a class."""
        sizes = self.sizes(number)
        # A rank has some if its coordinate is below this in each dimension, unless parts are split again.
        below = tuple((axis, _parts(shape[dim], sizes[axis])) for dim, axis in splits)
        again = len({dim for dim, _ in splits}) < len(splits)
        key = (number, have, below, tuple((dim, shape[dim]) for dim, _ in splits) if again else ())
        if key not in self._holds:
            bounds = dict(below)
            some = self._arrays[number][tuple(slice(bounds.get(axis)) for axis in range(len(sizes)))]
            absent = some[~np.isin(some, np.array(classes.members[have]))].tolist()
            self._holds[key] = not any(
                split_box(shape, splits, sizes, self.coordinate(number, rank)).elements for rank in absent
            )
        return 0 in shape or self._holds[key]


def _parts(length: int, count: int) -> int:
    """How many of ``count`` parts of a length are not empty."""
    return -(-length // -(-length // count)) if length else 0


def _has(kind: _Kind, rank: int) -> bool:
    at = bisect.bisect_left(kind.ranks, rank)
    return at < len(kind.ranks) and kind.ranks[at] == rank


def _owners(key: str, holders: _Holders, classes: _Classes) -> Iterable[tuple[int, _Holders]]:
    """One shared tensor, or, for tensors that may differ and do, one for each rank."""
    by_sharing: dict[int, list[_Kind]] = {}
    for kind, offer in holders:
        by_sharing.setdefault(offer.sharing, []).append(kind)
    if len(by_sharing) > 1:
        groups = " unlike ".join(map(_ranks_of, by_sharing.values()))
        raise ValueError(f"{key}: ranks hold different kinds of things under this key ({groups}). {_WAYS_OUT}")
    first = holders[0][1]
    if first.sharing == OWN:
        same = all(offer == first for _, offer in holders)
        if not (same and len({kind.digests.get(key) for kind, _ in holders}) == 1):
            own = {rank: (classes.alone(kind, rank), offer) for kind, offer in holders for rank in kind.ranks}
            return [(rank, [own[rank]]) for rank in sorted(own)]
    by_form: dict[tuple[str, tuple[int, ...]], list[_Kind]] = {}
    for kind, offer in holders:
        by_form.setdefault((offer.dtype, tuple(offer.shape)), []).append(kind)
    if len(by_form) > 1:
        forms = "; ".join(f"{dtype} {list(shape)} on {_ranks_of(kinds)}" for (dtype, shape), kinds in by_form.items())
        raise ValueError(f"{key}: ranks hold tensors of different shape or dtype under this key: {forms}. {_WAYS_OUT}")
    return [(SHARED, holders)]


_WAYS_OUT = (
    "If these are parts of one tensor, say so with fastckpt.Shard(tensor, offsets, shape) or a DTensor; "
    "if each rank has its own, put it under a name of its own, such as f'experts.{rank}'"
)


def _alias(key: str, holders: _Holders) -> str:
    targets: dict[str, list[_Kind]] = {}
    for kind, offer in holders:
        targets.setdefault(offer.alias, []).append(kind)
    if len(targets) > 1:
        how = "; ".join(
            f"{'to ' + target if target else 'to nothing'} on {_ranks_of(kinds)}" for target, kinds in targets.items()
        )
        raise ValueError(f"{key}: tied differently on different ranks: {how}; tie it on every rank, or on none")
    return next(iter(targets))


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


def _ranks_of(kinds: Iterable[_Kind]) -> str:
    return _ranks(sorted(rank for kind in kinds for rank in kind.ranks))


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
