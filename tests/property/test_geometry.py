"""Boxes and the chunk grid against numpy: what an index array says is what the geometry says."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.format.chunk import chunk_count, chunk_cuts
from fastckpt.format.shard import Box, boxes_of_flat_range, covers_exactly, find_overlap

shapes = st.lists(st.integers(1, 5), max_size=4).map(tuple)
any_shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def flat(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return Box(offsets, tuple(draw(st.integers(1, size - at)) for size, at in zip(shape, offsets, strict=True)))


@st.composite
def boxed(draw: st.DrawFn, count: int) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(shapes)
    return shape, [draw(boxes_in(shape)) for _ in range(count)]


@given(any_shapes, st.data())
def test_a_flat_range_is_its_boxes_back_to_back(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, math.prod(shape)))
    stop = data.draw(st.integers(start, math.prod(shape)))
    boxes = boxes_of_flat_range(shape, start, stop)
    values = flat(shape)
    found = [value for box in boxes for value in values[box.slices()].ravel().tolist()]
    assert found == list(range(start, stop))  # in order, disjoint, and all of it
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    for box in boxes:  # what is read as one run lies in memory as one run
        run = values[box.slices()].ravel()
        assert run.tolist() == list(range(run[0], run[0] + box.elements))


@given(boxed(2))
def test_boxes_intersect_in_the_elements_they_share(given: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (a, b) = given
    values = flat(shape)
    shared = set(values[a.slices()].ravel().tolist()) & set(values[b.slices()].ravel().tolist())
    common = a.intersect(b)
    assert common == b.intersect(a)
    assert (set(values[common.slices()].ravel().tolist()) if common else set()) == shared
    if common:
        relative = common.relative_to(a)
        assert (values[a.slices()][relative.slices()] == values[common.slices()]).all()


@given(st.integers(0, 6).flatmap(boxed))
def test_an_overlap_is_found_if_and_only_if_there_is_one(given: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = given
    count = np.zeros(shape, int)
    for box in boxes:
        count[box.slices()] += 1
    found = find_overlap(boxes)
    assert (found is not None) == bool((count > 1).any())
    if found:
        a, b = found
        assert a.intersect(b)
        assert boxes.count(a) > 1 if a == b else {a, b} <= set(boxes)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape cut along a grid of its own: shards that cover it, none overlapping."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    edges = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    cells = itertools.product(*(itertools.pairwise(line) for line in edges))
    return shape, [Box(tuple(a for a, _ in cell), tuple(b - a for a, b in cell)) for cell in cells]


@given(partitions())
def test_shards_that_partition_a_tensor_do_not_overlap(given: tuple[tuple[int, ...], list[Box]]) -> None:
    assert find_overlap(given[1]) is None


@given(partitions(), st.data())
def test_boxes_cover_exactly_if_and_only_if_each_element_is_in_one(
    given: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, boxes = given
    assert covers_exactly(boxes, shape)
    for _ in range(data.draw(st.integers(1, 3)) if boxes else 0):  # moved ones may cover it again
        boxes[data.draw(st.integers(0, len(boxes) - 1))] = data.draw(boxes_in(shape))
    held = np.zeros(shape, int)
    for box in boxes:
        held[box.slices()] += 1
    assert covers_exactly(boxes, shape) == bool((held == 1).all())


def test_scalars_and_empty_tensors_are_covered_by_one_box_and_by_none() -> None:
    assert covers_exactly([Box((), ())], ())
    assert covers_exactly([], (0, 2**62))
    assert not covers_exactly([], ())
    assert not covers_exactly([Box((), ())] * 2, ())
    assert not covers_exactly([], (2, 2))


@given(boxed(1), st.sampled_from([1, 2, 4, 8, 16]), st.integers(4, 9).map(lambda power: 2**power))
def test_the_grid_covers_a_shard_in_ascending_chunks_none_too_large(
    given: tuple[tuple[int, ...], list[Box]], item_bytes: int, chunk_bytes: int
) -> None:
    shape, (box,) = given
    cuts = chunk_cuts(shape, item_bytes, box, chunk_bytes)
    assert cuts[0] == 0
    assert cuts[-1] == box.elements
    sizes = [after - before for before, after in itertools.pairwise(cuts)]
    assert min(sizes) > 0
    assert max(sizes) * item_bytes <= chunk_bytes
    assert chunk_count(shape, item_bytes, box, chunk_bytes) == len(sizes)


@given(boxed(1), st.sampled_from([1, 2, 4, 8, 16]), st.integers(4, 9).map(lambda power: 2**power))
def test_a_shard_is_cut_at_the_grid_lines_of_the_whole_tensor(
    given: tuple[tuple[int, ...], list[Box]], item_bytes: int, chunk_bytes: int
) -> None:
    shape, (box,) = given
    row = math.prod(shape[1:])
    if not shape or row * item_bytes > chunk_bytes:
        return
    whole = chunk_cuts(shape, item_bytes, Box.whole(shape), chunk_bytes)
    lines = {cut // row for cut in whole[:-1]}
    assert all(cut % row == 0 for cut in whole)
    assert len({after - before for before, after in itertools.pairwise(whole[:-1])}) <= 1, "the grid is regular"
    first, rows = box.offsets[0], box.sizes[0]
    inside = sorted(line - first for line in lines if first < line < first + rows)
    per_row = math.prod(box.sizes[1:])
    expected = [0, *(line * per_row for line in inside), rows * per_row]
    assert chunk_cuts(shape, item_bytes, box, chunk_bytes) == expected
