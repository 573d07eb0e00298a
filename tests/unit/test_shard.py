"""Boxes: the edges that the properties in property/test_geometry.py rarely meet."""

from __future__ import annotations

import pytest

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format.shard import Box, boxes_of_flat_range, check_inside, check_shape, find_overlap


def test_a_box_reads_as_slices() -> None:
    assert str(Box((4, 0), (2, 3))) == "[4:6, 0:3]"
    assert str(Box((), ())) == "[]"
    assert Box((4, 0), (2, 3)).slices() == (slice(4, 6), slice(0, 3))


def test_a_scalar_is_one_box_of_one_element() -> None:
    scalar = Box.whole(())
    assert scalar.elements == 1
    assert boxes_of_flat_range((), 0, 1) == [scalar]
    assert boxes_of_flat_range((), 0, 0) == []
    assert scalar.intersect(scalar) == scalar


def test_a_tensor_without_elements_has_no_boxes() -> None:
    assert boxes_of_flat_range((3, 0, 2), 0, 0) == []
    assert Box.whole((3, 0)).intersect(Box.whole((3, 0))) is None


def test_boxes_that_touch_do_not_intersect() -> None:
    assert Box((0,), (4,)).intersect(Box((4,), (4,))) is None
    assert find_overlap([Box((0,), (4,)), Box((4,), (4,))]) is None


def test_frames_are_left_as_they_were_entered() -> None:
    box, frame = Box((5, 7), (1, 2)), Box((4, 6), (3, 3))
    assert box.relative_to(frame) == Box((1, 1), (1, 2))
    assert box.relative_to(frame).shifted(frame.offsets) == box


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 7), (4, 3)])
def test_a_flat_range_outside_the_tensor_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match=f"flat range {start}:{stop} is not inside shape"):
        boxes_of_flat_range((2, 3), start, stop)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_boxes_do_not_overlap(count: int) -> None:
    assert find_overlap([Box((), ())] * count) is None
    assert find_overlap([Box((0,), (1,))] * count) is None


def test_two_scalars_or_two_equal_boxes_overlap() -> None:
    assert find_overlap([Box((), ())] * 2) is not None
    assert find_overlap([Box((1, 1), (2, 2))] * 2) is not None


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 2**61), (2**62,), (1,) * 64])
def test_a_shape_within_the_limits_is_taken(shape: tuple[int, ...]) -> None:
    check_shape(shape, "x")


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((1,) * 65, LimitExceeded),
        ((2**62 + 1,), LimitExceeded),
        ((2**31, 2**32), LimitExceeded),
        ((2**32, 2**32, 0), LimitExceeded),  # a product that wraps, hidden by the zero
        ((2**63, 2), LimitExceeded),
        ((-1,), FormatError),
        ((-1, -1), FormatError),
    ],
)
def test_a_shape_beyond_the_limits_is_refused_by_name(shape: tuple[int, ...], error: type[FormatError]) -> None:
    with pytest.raises(error, match="the tensor"):
        check_shape(shape, "the tensor")


@pytest.mark.parametrize(
    "box",
    [
        Box((0,), (4,)),
        Box((0, 0), (4, 0)),
        Box((0, 0), (5, 1)),
        Box((1, 0), (4, 1)),
        Box((-1, 0), (1, 1)),
        Box((0, 2), (1, 2)),
        Box((0, 0, 0), (1, 1, 1)),
        pytest.param(
            Box((0, 0), (1,)),
        ),
        Box((2**62, 0), (2**62, 1)),
    ],
    ids=repr,
)
def test_a_box_that_is_not_inside_is_refused(box: Box) -> None:
    with pytest.raises(FormatError, match="the tensor"):
        check_inside(box, (4, 3), "the tensor")
    check_inside(Box((3, 2), (1, 1)), (4, 3), "the tensor")
