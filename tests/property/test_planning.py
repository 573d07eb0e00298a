"""Any tensors on any ranks: what is planned, written and read at another sharding is what numpy says it is.

The ranks' tensors are numpy arrays of bytes; the oracle slices them and knows nothing of chunks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastckpt.format.document import digest, pack_table
from fastckpt.format.dtype import ITEM_BYTES
from fastckpt.format.shard import Box
from fastckpt.format.tables import SHARED, Chunks, Layout, check_layout, decode_layout
from fastckpt.plan.restore_plan import Want, plan_reads, regions
from fastckpt.plan.save_plan import COMPARED, KNOWN, LOWEST, OWN, Offer, RankOffer, plan_save

Identity = tuple[str, int]

shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 3000)),
    st.tuples(st.integers(0, 20), st.sampled_from([0, 1, 3, 16, 300])),
    st.tuples(st.integers(1, 3), st.sampled_from([600, 1100, 2500])),  # rows longer than a chunk
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 40)),
    st.tuples(st.integers(1, 2), st.integers(2, 9), st.integers(150, 400)),  # and cut in several boxes
)
dtypes = st.sampled_from(["bool", "bfloat16", "float32", "int64", "complex128", "int4", "float4_e2m1fn_x2", "bits16"])


@dataclass
class World:
    """What the ranks of a job hold, and what the snapshot of it must contain."""

    size: int
    offers: dict[int, list[Offer]] = field(default_factory=lambda: defaultdict(list))
    digests: dict[int, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    contents: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    """Each rank's bytes of the whole tensor, by rank and key; it offers only its boxes of them."""
    expected: dict[Identity, np.ndarray] = field(default_factory=dict)
    unsplit: set[str] = field(default_factory=set)
    holders: dict[tuple[Identity, Box], tuple[int, ...]] = field(default_factory=dict)

    def plan(self, chunk_bytes: int = 4096) -> Layout:
        offers = {rank: RankOffer(self.offers[rank], [list(range(self.size))]) for rank in range(self.size)}
        layout, _ = plan_save(offers, self.digests, [0] * self.size, chunk_bytes)
        return layout

    def add(self, key: str, dtype: str, shape: tuple[int, ...], sharing: int, ranks: dict[int, list[Box]]) -> None:
        """A tensor whose content is equal on all ranks, unless its sharing says that it need not be."""
        for rank, boxes in ranks.items():
            content = random_bytes(key + (f"/{rank}" if sharing == LOWEST else ""), shape, dtype)
            self.offer(rank, key, dtype, shape, sharing, boxes, content)
        self.expected[key, SHARED] = self.contents[min(ranks), key]
        for box in {box for boxes in ranks.values() for box in boxes}:
            holding = tuple(sorted(rank for rank, boxes in ranks.items() if box in boxes))
            self.holders[(key, SHARED), box] = holding if sharing == KNOWN else holding[:1]
        if sharing == LOWEST:
            self.unsplit.add(key)

    def add_different(self, key: str, forms: dict[int, tuple[str, tuple[int, ...]]]) -> None:
        """A tensor that each rank has one of its own of."""
        for rank, (dtype, shape) in forms.items():
            content = random_bytes(f"{key}/{rank}", shape, dtype)
            whole = [Box.whole(shape)] if math.prod(shape) else []
            self.offer(rank, key, dtype, shape, OWN, whole, content)
            self.expected[key, rank] = content
            for box in whole:
                self.holders[(key, rank), box] = (rank,)

    def tie(self, target: str, key: str) -> None:
        for rank in range(self.size):
            for offer in [offer for offer in self.offers[rank] if offer.key == target]:
                self.offers[rank].append(
                    Offer(key, offer.dtype, offer.shape, offer.boxes, offer.sharing, offer.among, target)
                )
                self.digests[rank][key] = self.digests[rank].get(target, b"")
        for identity in [identity for identity in self.expected if identity[0] == target]:
            self.expected[key, identity[1]] = self.expected[identity]

    def offer(
        self,
        rank: int,
        key: str,
        dtype: str,
        shape: tuple[int, ...],
        sharing: int,
        boxes: list[Box],
        content: np.ndarray,
    ) -> None:
        raw = [(list(box.offsets), list(box.sizes)) for box in boxes]
        self.offers[rank].append(Offer(key, dtype, list(shape), raw, sharing, 0, ""))
        self.contents[rank, key] = content
        if sharing in (COMPARED, OWN):
            self.digests[rank][key] = hashlib.sha256(
                b"".join(content[box.slices()].tobytes() for box in boxes) + repr((dtype, shape)).encode()
            ).digest()


def random_bytes(seed: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little")
    return np.random.default_rng(number).integers(0, 256, (*shape, ITEM_BYTES[dtype]), np.uint8)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World(draw(st.integers(1, 4)))
    everyone = list(range(world.size))
    some = st.lists(st.sampled_from(everyone), min_size=1, unique=True)
    for number in range(draw(st.integers(1, 5))):
        key, dtype, shape = f"{draw(st.sampled_from('abc'))}.{number}", draw(dtypes), draw(shapes)
        kind = draw(st.sampled_from(["cells", "known cells", "known", "compared", "lowest", "own", "different"]))
        whole = [Box.whole(shape)] if math.prod(shape) else []
        if kind == "different" and world.size > 1:
            ranks = sorted(draw(st.lists(st.sampled_from(everyone), min_size=2, unique=True)))
            forms = draw(st.lists(st.tuples(dtypes, shapes), min_size=len(ranks), max_size=len(ranks)))
            if any(form != forms[0] for form in forms) or math.prod(forms[0][1]) > 8:
                world.add_different(key, dict(zip(ranks, forms, strict=True)))
        elif kind in ("cells", "known cells") and math.prod(shape) and shape:
            # Cut along one dimension, unevenly; some ranks hold nothing, some several parts.
            axis = draw(st.integers(0, len(shape) - 1))
            cuts = sorted({0, shape[axis], *draw(st.lists(st.integers(0, shape[axis]), max_size=4))})
            held: dict[int, list[Box]] = {rank: [] for rank in everyone}
            for low, high in itertools.pairwise(cuts):
                offsets = tuple(low if dimension == axis else 0 for dimension in range(len(shape)))
                box = Box(offsets, (*shape[:axis], high - low, *shape[axis + 1 :]))
                for rank in draw(some) if kind == "known cells" else [draw(st.sampled_from(everyone))]:
                    held[rank].append(box)
            world.add(key, dtype, shape, KNOWN if kind == "known cells" else COMPARED, held)
        else:
            sharing = {"known": KNOWN, "lowest": LOWEST, "own": OWN}.get(kind, COMPARED)
            world.add(key, dtype, shape, sharing, dict.fromkeys(draw(some), whole))
    keys = sorted({key for key, _ in world.expected})
    for target in draw(st.lists(st.sampled_from(keys), unique=True, max_size=2)) if keys else ():
        world.tie(target, draw(st.sampled_from(["a.", "z."])) + f"tied.{target}")
    return world


def written(world: World, layout: Layout) -> dict[int, bytes]:
    """What each rank writes, chunk by chunk, out of its own bytes of boxes it offered."""
    chunks = Chunks(layout)
    stored: dict[int, bytes] = {}
    for rank in range(world.size):
        held = {(offer.key, Box(tuple(o), tuple(s))) for offer in world.offers[rank] for o, s in offer.boxes}
        for row, (chunk, pieces) in enumerate(chunks.of_rank(rank)):
            assert chunk not in stored, "written twice"
            assert chunks.writer(chunk) == (rank, row)
            data = bytearray()
            for piece in pieces:
                key, box = layout.keys[layout.shard_key(piece.shard)], layout.box(piece.shard)
                assert (key, box) in held, f"rank {rank} is to write {key} {box}, which it does not hold"
                local = world.contents[rank, key][box.slices()].reshape(box.elements, -1)
                assert piece.byte == len(data)
                data += local[piece.start : piece.stop].tobytes()
            stored[chunk] = bytes(data)
            assert len(data) == chunks.raw_bytes(pieces) <= layout.chunk_bytes
    assert sorted(stored) == list(range(len(chunks)))
    return stored


def read(layout: Layout, stored: dict[int, bytes], wants: list[Want]) -> list[np.ndarray]:
    targets = []
    for want in wants:
        targets.append(np.zeros((*want.box.sizes, ITEM_BYTES[layout.dtypes[want.key]]), np.uint8))
    filled = [np.zeros(want.box.sizes, int) for want in wants]
    seen: list[int] = []
    for chunk_read in plan_reads(Chunks(layout), wants):
        seen.append(chunk_read.chunk)
        assert len(stored[chunk_read.chunk]) == chunk_read.raw_bytes
        raw = np.frombuffer(stored[chunk_read.chunk], np.uint8)
        for delivery in chunk_read.deliveries:
            piece, target = delivery.piece, targets[delivery.target]
            assert delivery.box == wants[delivery.target].box
            size = target.shape[-1]
            for region, run, at in regions(layout.box(piece.shard), piece, delivery.box):
                start = piece.byte + at * size
                block = raw[start : start + run.elements * size].reshape(*run.sizes, size)
                place = region.relative_to(delivery.box).slices()
                target[place] = block[region.relative_to(run).slices()]
                filled[delivery.target][place] += 1
    assert seen == sorted(set(seen)), "each chunk is read once, in order"
    assert all((count == 1).all() for count in filled), "each wanted element is delivered once"
    return targets


@given(worlds(), st.sampled_from([4096, 8192]))
def test_any_tensors_on_any_ranks_make_a_layout_that_a_reader_accepts(world: World, chunk_bytes: int) -> None:
    layout = world.plan(chunk_bytes)
    check_layout(layout, "x")
    data = pack_table(layout)
    assert decode_layout(data, digest(data)).layout == layout
    assert set(zip(layout.keys, layout.owners, strict=True)) == set(world.expected)


@given(worlds())
def test_each_byte_is_written_once_by_a_rank_that_holds_it(world: World) -> None:
    layout = world.plan()
    written(world, layout)
    counts = [np.zeros(shape, int) for shape in layout.shapes]
    chunks = Chunks(layout)
    for rank in range(world.size):
        for _, pieces in chunks.of_rank(rank):
            for piece in pieces:
                box = layout.box(piece.shard)
                local = np.zeros(box.elements, int)
                local[piece.start : piece.stop] = 1
                counts[layout.shard_key(piece.shard)][box.slices()] += local.reshape(box.sizes)
    tied = {key for key, _ in layout.aliases}
    for key, count in enumerate(counts):
        assert (count == (key not in tied)).all(), layout.label(key)


@given(worlds())
def test_ranks_write_as_equally_as_what_they_hold_allows_and_nothing_is_split_that_may_differ(world: World) -> None:
    layout = world.plan()
    chunks = Chunks(layout)
    held: dict[frozenset[int], int] = defaultdict(int)
    load = [0] * world.size
    largest = 0
    writers: dict[str, set[int]] = defaultdict(set)
    for rank in range(world.size):
        for _, pieces in chunks.of_rank(rank):
            for piece in pieces:
                key = layout.shard_key(piece.shard)
                holders = world.holders[(layout.keys[key], layout.owners[key]), layout.box(piece.shard)]
                writers[layout.keys[key]].add(rank)
            assert rank in holders
            held[frozenset(holders)] += chunks.raw_bytes(pieces)
            load[rank] += chunks.raw_bytes(pieces)
            largest = max(largest, chunks.raw_bytes(pieces))
    # What is held within a set of ranks alone, some rank of the set has to write at least its part of.
    subsets = (set(ranks) for count in range(1, world.size + 1) for ranks in combinations(range(world.size), count))
    least = max(sum(size for ranks, size in held.items() if ranks <= subset) / len(subset) for subset in subsets)
    assert max(load) <= least * 1.006 + largest * sum(len(ranks) > 1 for ranks in held)
    for key in world.unsplit:
        assert writers[key] <= {min(rank for rank in range(world.size) if (rank, key) in world.contents)}


@given(worlds(), st.randoms(use_true_random=False))
def test_the_layout_does_not_depend_on_the_order_of_ranks_or_tensors(world: World, random: Random) -> None:
    layout = world.plan()
    for offers in world.offers.values():
        random.shuffle(offers)
    ranks = list(range(world.size))
    random.shuffle(ranks)
    offers = {rank: RankOffer(world.offers[rank], [list(range(world.size))]) for rank in ranks}
    shuffled, _ = plan_save(offers, world.digests, [0] * world.size, 4096)
    assert shuffled == layout


@given(worlds(), st.data())
@settings(max_examples=150)
def test_any_resharding_gives_the_same_array(world: World, data: st.DataObject) -> None:
    layout = world.plan()
    stored = written(world, layout)
    wants: list[Want] = []
    for number, shape in enumerate(layout.shapes):
        for _ in range(data.draw(st.integers(0, 2)) if math.prod(shape) else 0):
            offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
            sizes = tuple(data.draw(st.integers(1, size - at)) for size, at in zip(shape, offsets, strict=True))
            wants.append(Want(number, Box(offsets, sizes), len(wants)))
    for want, found in zip(wants, read(layout, stored, wants), strict=True):
        expected = world.expected[layout.keys[want.key], layout.owners[want.key]]
        assert np.array_equal(found, expected[want.box.slices()]), layout.label(want.key)


@given(worlds())
def test_everything_comes_back_whole(world: World) -> None:
    layout = world.plan()
    wants = [Want(number, Box.whole(shape), number) for number, shape in enumerate(layout.shapes)]
    for want, found in zip(wants, read(layout, written(world, layout), wants), strict=True):
        assert np.array_equal(found, world.expected[layout.keys[want.key], layout.owners[want.key]])
