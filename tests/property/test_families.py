"""What a mesh holds by rule is what DTensor's placements say, each byte is written once, and any resharding reads it.

The oracle splits index ranges one mesh dimension after another, and cuts and bundles shards one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from random import Random
from unittest import mock

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import families
from fastckpt.format.chunk import chunk_cuts
from fastckpt.format.document import digest, pack_table
from fastckpt.format.dtype import ITEM_BYTES
from fastckpt.format.families import Mesh, mesh_of
from fastckpt.format.shard import Box
from fastckpt.format.tables import Chunks, Layout, check_layout, decode_layout
from fastckpt.plan.classes import ChunkedClasses
from fastckpt.plan.deal import Dealer, Dealt
from fastckpt.plan.restore_plan import Want, plan_reads, regions
from fastckpt.plan.save_plan import KNOWN, Offer, RankOffer, plan_save
from fastckpt.topology.topology import Topology

CHUNK_BYTES = 4096

shapes = st.one_of(
    st.tuples(st.integers(0, 3000)),
    st.tuples(st.integers(1, 40), st.sampled_from([1, 3, 16, 300])),
    st.tuples(st.integers(1, 6), st.sampled_from([600, 1100, 2500])),
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40)),
)
dtypes = st.sampled_from(["bool", "bfloat16", "float32", "complex128"])


@dataclass
class Job:
    """Ranks, a mesh of some of them, and tensors that the mesh holds."""

    world_size: int
    ranks: np.ndarray
    tensors: list[tuple[str, str, tuple[int, ...], list[tuple[int, int]]]]
    """Key, dtype, shape, splits."""

    def box(self, rank: int, shape: tuple[int, ...], splits: list[tuple[int, int]]) -> Box | None:
        """The oracle's."""
        ((*at,),) = np.argwhere(self.ranks == rank).tolist()
        held = [list(range(size)) for size in shape]
        for dim, axis in splits:
            count, rows = self.ranks.shape[axis], held[dim]
            size = math.ceil(len(rows) / count)
            held[dim] = rows[at[axis] * size : (at[axis] + 1) * size]
        if not all(held):
            return None
        return Box(tuple(rows[0] for rows in held), tuple(len(rows) for rows in held))

    def offers(self, *, by_rule: bool) -> dict[int, RankOffer]:
        """By rule, equal ones are one object; otherwise each rank lists its own boxes."""
        mesh, members = mesh_of(self.ranks), sorted(self.ranks.reshape(-1).tolist())
        kinds: dict[tuple[str, ...], RankOffer] = {}
        found = {}
        for rank in range(self.world_size):
            offers = []
            for key, dtype, shape, splits in self.tensors if rank in members else ():
                box = self.box(rank, shape, splits)
                boxes = [] if box is None else [(list(box.offsets), list(box.sizes))]
                if by_rule and boxes:
                    offers.append(Offer(key, dtype, list(shape), [], KNOWN, 0, "", 0, splits))
                elif boxes or 0 in shape:
                    offers.append(Offer(key, dtype, list(shape), boxes, KNOWN, 0, ""))
            offer = RankOffer(offers, [members], [mesh])
            found[rank] = kinds.setdefault(tuple(offer.key for offer in offers), offer) if by_rule else offer
        return found

    def plan(self, *, by_rule: bool = True, families: bool = True, dealer: Dealer | None = None) -> Layout:
        offers, nodes = self.offers(by_rule=by_rule), [0] * self.world_size
        layout, comparisons = plan_save(offers, {}, nodes, CHUNK_BYTES, families=families, dealer=dealer)
        assert comparisons == []
        return layout


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = math.prod(sizes)
    world_size = count + draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["arithmetic", "transposed", "any"]))
    ranks = np.arange(count).reshape(sizes) + draw(st.integers(0, world_size - count))
    if kind == "transposed":
        ranks = ranks.transpose(draw(st.permutations(range(len(sizes)))))
    elif kind == "any":
        ranks = np.array(draw(st.permutations(range(world_size)))[:count]).reshape(sizes)
    tensors = []
    for number in range(draw(st.integers(1, 6))):
        shape = draw(shapes)
        axes = draw(st.lists(st.integers(0, ranks.ndim - 1), unique=True))
        splits = [(draw(st.integers(0, len(shape) - 1)), axis) for axis in axes]
        tensors.append((f"{draw(st.sampled_from('ab'))}.{number}", draw(dtypes), shape, splits))
    return Job(world_size, ranks, tensors)


def content(job: Job, key: str) -> np.ndarray:
    _, dtype, shape, _ = next(tensor for tensor in job.tensors if tensor[0] == key)
    return np.random.default_rng(len(key) + math.prod(shape)).integers(0, 256, (*shape, ITEM_BYTES[dtype]), np.uint8)


def written(job: Job, layout: Layout) -> dict[int, bytes]:
    """What the ranks write, each of what it holds."""
    chunks, stored = Chunks(layout), {}
    splits = {key: (shape, splits) for key, _, shape, splits in job.tensors}
    for rank in range(job.world_size):
        numbers = [number for number, _ in chunks.of_rank(rank)]
        assert numbers == sorted(numbers)
        assert len(numbers) == chunks.row_count(rank)
        for row, (number, pieces) in enumerate(chunks.of_rank(rank)):
            assert chunks.writer(number) == (rank, row)
            assert number not in stored, "written twice"
            data = b""
            for piece in pieces:
                key, box = layout.keys[layout.shard_key(piece.shard)], layout.box(piece.shard)
                assert box == job.box(rank, *splits[key]), f"rank {rank} writes {key} {box}, which it does not hold"
                assert piece.byte == len(data)
                local = content(job, key)[box.slices()].reshape(box.elements, -1)
                data += local[piece.start : piece.stop].tobytes()
            assert 0 < len(data) == chunks.raw_bytes(pieces) <= CHUNK_BYTES
            stored[number] = data
    assert sorted(stored) == list(range(len(chunks)))
    return stored


@given(jobs())
def test_what_is_split_by_rule_is_accepted_and_written_once_by_ranks_that_hold_it(job: Job) -> None:
    layout = job.plan()
    data = pack_table(layout)
    chunks = decode_layout(data, digest(data))
    assert chunks.layout == layout
    whole = [key for key, (_, _, shape, _) in enumerate(sorted(job.tensors)) if 0 not in shape]
    assert sorted(key for family in layout.families for key in family.tensors) == whole
    assert layout.shard_keys == []
    written(job, layout)


@given(jobs(), st.data())
@settings(max_examples=60)
def test_any_resharding_of_what_is_split_by_rule_gives_the_same_array(job: Job, data: st.DataObject) -> None:
    layout = job.plan()
    stored, chunks = written(job, layout), Chunks(layout)
    wants = []
    for number, shape in enumerate(layout.shapes):
        for whole in (True, False) if math.prod(shape) else ():
            offsets = tuple(0 if whole else data.draw(st.integers(0, size - 1)) for size in shape)
            sizes = tuple(
                size if whole else data.draw(st.integers(1, size - at)) for size, at in zip(shape, offsets, strict=True)
            )
            wants.append(Want(number, Box(offsets, sizes), len(wants)))
    targets = [np.zeros((*want.box.sizes, ITEM_BYTES[layout.dtypes[want.key]]), np.uint8) for want in wants]
    filled = [np.zeros(want.box.sizes, int) for want in wants]
    reads = plan_reads(chunks, wants)
    assert [read.chunk for read in reads] == sorted({read.chunk for read in reads})
    for read in reads:
        assert read.raw_bytes == len(stored[read.chunk])
        raw = np.frombuffer(stored[read.chunk], np.uint8)
        for delivery in read.deliveries:
            piece, target = delivery.piece, targets[delivery.target]
            size = target.shape[-1]
            for region, run, at in regions(layout.box(piece.shard), piece, delivery.box):
                start = piece.byte + at * size
                block = raw[start : start + run.elements * size].reshape(*run.sizes, size)
                place = region.relative_to(delivery.box).slices()
                target[place] = block[region.relative_to(run).slices()]
                filled[delivery.target][place] += 1
    for want, target, count in zip(wants, targets, filled, strict=True):
        assert (count == 1).all()
        assert np.array_equal(target, content(job, layout.keys[want.key])[want.box.slices()])


@given(jobs())
def test_units_and_places_are_those_that_shards_cut_and_bundled_one_by_one_have(job: Job) -> None:
    layout = job.plan()
    chunks = Chunks(layout)
    expected: list[tuple[int, tuple[tuple[str, Box], ...], bool]] = []
    for family in layout.families:
        axes = [range(family.mesh.sizes[axis]) for axis in family.sharded]
        for at in itertools.product(*axes):
            rank = int(
                job.ranks[
                    tuple(at[family.sharded.index(a)] if a in family.sharded else 0 for a in range(job.ranks.ndim))
                ]
            )
            bundles: list[tuple[int, list[tuple[str, Box]]]] = []
            single = []
            for number, splits in zip(family.tensors, family.splits, strict=True):
                item, shape = ITEM_BYTES[layout.dtypes[number]], tuple(layout.shapes[number])
                if (box := job.box(rank, shape, splits)) is None:
                    continue
                shard, size = (layout.keys[number], box), box.elements * item
                if size > CHUNK_BYTES // 64:
                    single.append((len(chunk_cuts(shape, item, box, CHUNK_BYTES)) - 1, (shard,), False))
                elif bundles and bundles[-1][0] + size <= CHUNK_BYTES // 4:
                    bundles[-1] = (bundles[-1][0] + size, [*bundles[-1][1], shard])
                else:
                    bundles.append((size, [shard]))
            expected += [(1, tuple(bundle), True) for _, bundle in bundles] + single
    units = list(chunks.units())
    named = [
        (u.count, tuple((layout.keys[layout.shard_key(s)], layout.box(s)) for s in u.shards), u.is_bundle)
        for u in units
    ]
    assert named == expected
    assert [unit.first for unit in units] == [0, *itertools.accumulate(unit.count for unit in units)][:-1]
    for number in range(len(layout.keys)):
        places = list(chunks.places(number))
        assert chunks.shard_count(number) == len(places)
        for place in places:
            unit = chunks.unit_at(place.first)
            assert (unit.first, unit.count) == (place.first, place.count)
            pieces = [piece for chunk in chunks.pieces(unit) for piece in chunk if piece.shard == place.shard]
            assert chunks.pieces_of(place) == pieces
            assert place.box == layout.box(place.shard)
            assert place.bundle_bytes == (chunks.raw_bytes(chunks.pieces(unit)[0]) if unit.is_bundle else 0)


@given(jobs())
def test_a_repository_that_knows_no_families_gets_the_same_boxes_listed(job: Job) -> None:
    listed = job.plan(by_rule=False)
    assert job.plan(families=False) == listed
    assert not listed.families
    written(job, listed)
    shards = {(listed.keys[key], listed.box(shard)) for shard, key in enumerate(listed.shard_keys)}
    ruled = job.plan()
    places = [place for number in range(len(ruled.keys)) for place in Chunks(ruled).places(number)]
    assert {(ruled.keys[ruled.shard_key(place.shard)], ruled.box(place.shard)) for place in places} == shards


@given(jobs(), st.randoms(use_true_random=False))
def test_ranks_that_list_and_ranks_that_describe_agree_and_write_what_all_would_have_listed(
    job: Job, random: Random
) -> None:
    """And some ranks may have dropped out, of one tensor or of all: what the others hold is enough, or it is not."""
    by_rule, listed = job.offers(by_rule=True), job.offers(by_rule=False)
    lacking = [rank for rank in range(job.world_size) if random.random() < 0.15]
    mixed, plain = {}, {}
    for rank in range(job.world_size):
        rules = {offer.key: offer for offer in by_rule[rank].tensors}
        offers = [o for o in listed[rank].tensors if rank not in lacking or random.random() < 0.5]
        plain[rank] = msgspec.structs.replace(listed[rank], tensors=offers)
        chosen = [rules[o.key] if o.key in rules and random.random() < 0.8 else o for o in offers]
        mixed[rank] = msgspec.structs.replace(by_rule[rank], tensors=chosen)
    nodes = [0] * job.world_size
    try:
        expected, _ = plan_save(plain, {}, nodes, CHUNK_BYTES)
    except ValueError as error:
        with pytest.raises(ValueError, match=f"^{str(error).split(':')[0]}: ranks hold"):
            plan_save(mixed, {}, nodes, CHUNK_BYTES)
        return
    assert plan_save(mixed, {}, nodes, CHUNK_BYTES, families=False)[0] == expected
    layout, comparisons = plan_save(mixed, {}, nodes, CHUNK_BYTES)
    assert comparisons == []
    check_layout(layout, "x")
    holders = {key: {rank for rank in plain if any(o.key == key for o in plain[rank].tensors)} for key in layout.keys}
    for rank in range(job.world_size):
        for _, pieces in Chunks(layout).of_rank(rank):
            assert all(rank in holders[layout.keys[layout.shard_key(piece.shard)]] for piece in pieces)
    written(job, layout)


@given(jobs())
def test_tensors_of_families_that_would_take_too_much_work_are_listed(job: Job) -> None:
    with mock.patch.object(families, "LENGTHS_MAX", 0):
        layout = job.plan()
        assert not any(family.sharded for family in layout.families)
        check_layout(layout, "x")
        written(job, layout)


class Told(Dealer):
    """Keeps what it was given, and what it dealt; by lot, if there is one."""

    def __init__(self, job: Job, lot: Random | None = None) -> None:
        super().__init__(Topology.from_hosts(["a"] * job.world_size).tree(), writers=job.world_size)
        self._lot = lot

    def deal(self, classes: ChunkedClasses) -> Dealt:
        self.given, self.dealt = classes, super().deal(classes)
        if self._lot is not None:
            runs: list[int] = []
            for count, holders in zip(classes.chunks.tolist(), np.diff(classes.classes.starts).tolist(), strict=True):
                cuts = [self._lot.choice([0, count, self._lot.randint(0, count)]) for _ in range(holders - 1)]
                runs += np.diff([0, *sorted(cuts), count]).tolist()
            self.dealt = dataclasses.replace(self.dealt, runs=np.array(runs, np.int64))
        return self.dealt


@given(jobs(), st.booleans())
def test_ranks_write_the_bytes_that_they_were_dealt(job: Job, by_rule: bool) -> None:
    dealer = Told(job)
    chunks = Chunks(job.plan(by_rule=by_rule, dealer=dealer))
    sizes = [chunks.raw_bytes(pieces) for unit in chunks.units() for pieces in chunks.pieces(unit)]
    runs = [chunks.runs_of(rank) for rank in range(job.world_size)]
    assert [sum(sum(sizes[run.start : run.stop]) for run in own) for own in runs] == dealer.dealt.written.tolist()


@given(jobs())
def test_holders_of_a_class_write_equal_shares_where_they_hold_nothing_else(job: Job) -> None:
    dealer = Told(job)
    layout = job.plan(dealer=dealer)
    if len(layout.families) != 1:
        return
    chunks = Chunks(layout)
    sizes = [chunks.raw_bytes(pieces) for unit in chunks.units() for pieces in chunks.pieces(unit)]
    counts = np.frombuffer(layout.families[0].counts, "<u4").reshape(-1, chunks.spreads[0].replicas)
    first = 0
    for each in counts.tolist():
        shares = []
        for count in each:
            shares.append(sum(sizes[first : first + count]))
            first += count
        largest = max(sizes[first - sum(each) : first], default=0)
        writers = max(min(len(each), sum(each)), 1)
        assert all(not share or abs(share - sum(shares) / writers) <= largest for share in shares)


@given(jobs(), st.booleans(), st.randoms(use_true_random=False))
def test_holders_write_the_runs_that_a_dealer_gives_them(job: Job, by_rule: bool, random: Random) -> None:
    dealer = Told(job, random)
    layout = job.plan(by_rule=by_rule, dealer=dealer)
    chunks = check_layout(layout, "x")
    assert int(dealer.given.classes.bytes.sum()) == layout.bytes()
    given_chunks = np.zeros(job.world_size, np.int64)
    np.add.at(given_chunks, dealer.given.classes.holders, dealer.dealt.runs)
    assert [chunks.row_count(rank) for rank in range(job.world_size)] == given_chunks.tolist()
    written(job, layout)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_a_mesh_is_the_array_it_was_made_of(sizes: list[int], data: st.DataObject) -> None:
    count = math.prod(sizes)
    ranks = np.array(data.draw(st.permutations(range(count + 2)))[:count]).reshape(sizes)
    assert np.array_equal(mesh_of(ranks).array(), ranks)
    grid = np.arange(count).reshape(sizes).transpose(data.draw(st.permutations(range(len(sizes))))) + 1
    assert np.array_equal(mesh_of(grid).array(), grid)
    assert mesh_of(grid).ranks == []


def one(**changes: object) -> Layout:
    """Two tensors that four ranks hold, two and two the same."""
    mesh = Mesh(sizes=[2, 2], start=0, strides=[2, 1], ranks=[])
    family = families.Family(
        mesh=mesh,
        sharded=[1],
        tensors=[0, 1],
        splits=[[(0, 1)], [(1, 1)]],
        counts=np.array([1, 1, 1, 1], "<u4").tobytes(),
    )
    family = msgspec.structs.replace(family, **{k: v for k, v in changes.items() if k in family.__struct_fields__})
    layout = Layout(
        chunk_bytes=CHUNK_BYTES,
        keys=["a", "b", "c"],
        owners=[-1, -1, -1],
        dtypes=["float32", "float32", "int8"],
        shapes=[[16, 64], [4, 3], []],
        aliases=[],
        shard_keys=[2],
        shard_offsets=[[]],
        shard_sizes=[[]],
        units=[[0]],
        writers=[(3, 1)],
        rank_nodes=[0, 0, 1, 1],
        families=[family],
    )
    return msgspec.structs.replace(layout, **{k: v for k, v in changes.items() if k in layout.__struct_fields__})


def test_the_layout_that_these_cases_are_made_from_is_right() -> None:
    chunks = check_layout(one(), "x")
    assert len(chunks) == 5
    assert [chunks.row_count(rank) for rank in range(4)] == [1, 1, 1, 2]
    assert chunks.layout.bytes() == 16 * 64 * 4 + 48 + 1
    assert [chunks.writers_of(place) for place in chunks.places(0)] == [{2}, {3}]
    assert [chunks.writers_of(place) for place in chunks.places(1)] == [{0}, {1}]


def over(sizes: list[int], shapes: list[list[int]], splits: list[tuple[int, int]]) -> Layout:
    """Tensors that are all split alike over all dimensions of a mesh."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    family = families.Family(
        mesh=Mesh(sizes=sizes, start=0, strides=strides, ranks=[]),
        sharded=list(range(len(sizes))),
        tensors=list(range(len(shapes))),
        splits=[splits] * len(shapes),
        counts=bytes(4 * math.prod(sizes)),
    )
    keys = [f"{number:04}" for number in range(len(shapes))]
    nothing: dict[str, list[object]] = {"shard_keys": [], "shard_offsets": [], "shard_sizes": [], "units": []}
    columns = {"keys": keys, "owners": [-1] * len(keys), "dtypes": ["int8"] * len(keys), "shapes": shapes}
    return one(families=[family], rank_nodes=[0] * math.prod(sizes), writers=[], **nothing, **columns)


def mesh(**changes: object) -> Mesh:
    return msgspec.structs.replace(Mesh(sizes=[2, 2], start=0, strides=[2, 1], ranks=[]), **changes)


BAD = {
    "a mesh beyond the ranks": (one(mesh=mesh(start=1)), FormatError),
    "a mesh of a huge stride": (one(mesh=mesh(strides=[2**62, 1])), FormatError),
    "a mesh with a rank twice": (one(mesh=mesh(strides=[1, 1])), FormatError),
    "a mesh of sizes without strides": (one(mesh=mesh(strides=[2])), FormatError),
    "a mesh of no ranks": (one(mesh=mesh(sizes=[2, 0]), counts=b""), FormatError),
    "a mesh of more ranks than there are": (one(mesh=mesh(sizes=[2, 3]), counts=bytes(24)), FormatError),
    "a mesh of sizes whose product is huge": (one(mesh=mesh(sizes=[2**31, 2**31])), FormatError),
    "a listed mesh with strides": (one(mesh=mesh(ranks=[0, 1, 2, 3])), FormatError),
    "a listed mesh with a rank twice": (one(mesh=mesh(strides=[], ranks=[0, 1, 2, 2])), FormatError),
    "a listed mesh with too few": (one(mesh=mesh(strides=[], ranks=[0, 1, 2])), FormatError),
    "a listed mesh with a start": (one(mesh=mesh(start=1, strides=[], ranks=[0, 1, 2, 3])), FormatError),
    "sharded over a dimension it has not": (one(sharded=[2]), FormatError),
    "sharded twice": (one(sharded=[1, 1]), FormatError),
    "a tensor not there": (one(tensors=[0, 3]), FormatError),
    "a tensor twice": (one(tensors=[0, 0]), FormatError),
    "no tensors": (one(tensors=[], splits=[]), FormatError),
    "a tensor that shards list": (one(tensors=[0, 2], splits=[[(0, 1)], []]), FormatError),
    "fewer splits than tensors": (one(splits=[[(0, 1)]]), FormatError),
    "a split missing": (one(splits=[[(0, 1)], []]), FormatError),
    "a split twice": (one(splits=[[(0, 1)], [(1, 1), (0, 1)]]), FormatError),
    "a split of another dimension": (one(splits=[[(0, 1)], [(1, 0)]]), FormatError),
    "a split of a dimension the tensor has not": (one(splits=[[(0, 1)], [(2, 1)]]), FormatError),
    "too few counts": (one(counts=bytes(12)), FormatError),
    "counts of too few chunks": (one(counts=np.array([1, 1, 1, 0], "<u4").tobytes()), FormatError),
    "counts in another class": (one(counts=np.array([2, 1, 1, 0], "<u4").tobytes()), FormatError),
    "counts of very many chunks": (one(counts=np.array([1, 1, 2**32 - 1, 1], "<u4").tobytes()), FormatError),
    "one rank's own tensor": (one(owners=[-1, 2, -1]), FormatError),
    "a tied tensor": (one(aliases=[(1, 0)], shapes=[[16, 64], [16, 64], []]), FormatError),
    "a tensor in two families": (one(families=[one().families[0]] * 2), FormatError),
    "more families than may be": (one(families=[one().families[0]] * (families.FAMILIES_MAX + 1)), LimitExceeded),
    "a mesh of very many dimensions": (
        one(mesh=mesh(sizes=[2, 2, *[1] * 15], strides=[2, 1, *[0] * 15])),
        LimitExceeded,
    ),
    "dimensions split over very many of the mesh": (
        over([2] * 16, [[2**16 + number] for number in range(65)], [(0, axis) for axis in range(16)]),
        LimitExceeded,
    ),
    "very many different shapes of shards": (
        over([30] * 3, [[number * 4 + 1] * 3 for number in range(20)], [(0, 0), (1, 1), (2, 2)]),
        LimitExceeded,
    ),
    "a tensor of very many chunks": (one(shapes=[[2**40, 1024], [4, 3], []]), LimitExceeded),
}


@pytest.mark.parametrize("case", BAD)
def test_a_family_that_breaks_one_rule_is_refused(case: str) -> None:
    layout, error = BAD[case]
    with pytest.raises(FormatError) as caught:
        check_layout(layout, "x")
    assert type(caught.value) is error
    assert str(caught.value).startswith("x")
