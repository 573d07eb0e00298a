"""Boxes: the geometry of shards. Pure functions on tuples of ints; a box is never empty unless a size is zero."""

from __future__ import annotations

import bisect
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastckpt.errors import FormatError, LimitExceeded

RANK_MAX = 64
ELEMENTS_MAX = 2**62

Shape = tuple[int, ...]


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """A hyper-rectangle of a tensor: ``offsets[d] <= index[d] < offsets[d] + sizes[d]`` for every dimension."""

    offsets: Shape
    sizes: Shape

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        return cls((0,) * len(shape), tuple(shape))

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=False)) + "]"

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None where there is no common element."""
        offsets, sizes = [], []
        for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            low, high = max(a, b), min(a + m, b + n)
            if low >= high:
                return None
            offsets.append(low)
            sizes.append(high - low)
        return Box(tuple(offsets), tuple(sizes))

    def touches(self, other: Box) -> bool:
        """Whether there is a common element, of two boxes that have some."""
        for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            if a >= b + n or b >= a + m:
                return False
        return True

    def shifted(self, offsets: Sequence[int]) -> Box:
        """This box seen from a frame whose origin is moved to ``-offsets``."""
        return Box(tuple(a + b for a, b in zip(self.offsets, offsets, strict=True)), self.sizes)

    def relative_to(self, frame: Box) -> Box:
        """This box in coordinates counted from the first element of ``frame``."""
        return self.shifted([-o for o in frame.offsets])

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))


def check_shape(shape: Sequence[int], what: str) -> None:
    """``FormatError`` or ``LimitExceeded`` unless ``shape`` can be the shape of a tensor."""
    if len(shape) > RANK_MAX:
        raise LimitExceeded(f"{what}: {len(shape)} dimensions, at most {RANK_MAX} are allowed")
    if any(size < 0 for size in shape):
        raise FormatError(f"{what}: negative size in shape {list(shape)}")
    # Zero-size tensors too must stay addressable once the zero is ignored, or offsets could overflow elsewhere.
    if math.prod(size for size in shape if size) > ELEMENTS_MAX:
        raise LimitExceeded(f"{what}: shape {list(shape)} has more than 2**62 elements")


def check_inside(box: Box, shape: Sequence[int], what: str) -> None:
    """``FormatError`` unless ``box`` is a box with elements inside ``shape``."""
    if len(box.offsets) != len(shape) or len(box.sizes) != len(shape):
        raise FormatError(f"{what}: box {box} has not the {len(shape)} dimensions of its tensor")
    for offset, size, whole in zip(box.offsets, box.sizes, shape, strict=True):
        if offset < 0 or size <= 0 or offset + size > whole:
            raise FormatError(f"{what}: box {box} is not inside shape {list(shape)}")


def boxes_of_flat_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes, in C order, that together are the elements ``start <= flat index < stop`` of a tensor of ``shape``.

    Each box is contiguous in C order, so the range's bytes are the boxes' bytes back to back. At most
    ``2 * len(shape) - 1`` boxes. ``ValueError`` if the range is not inside the tensor.
    """
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"flat range {start}:{stop} is not inside shape {list(shape)}")
    return list(_boxes(tuple(shape), start, stop))


def _boxes(shape: Shape, start: int, stop: int) -> Iterable[Box]:
    if start == stop:
        return
    if not shape:
        yield Box((), ())
        return
    inner = shape[1:]
    row = math.prod(inner)
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from _in_row(first, _boxes(inner, head, tail))
        return
    if head:
        yield from _in_row(first, _boxes(inner, head, row))
        first += 1
    if first < last:
        yield Box((first, *(0,) * len(inner)), (last - first, *inner))
    if tail:
        yield from _in_row(last, _boxes(inner, 0, tail))


def _in_row(row: int, boxes: Iterable[Box]) -> Iterable[Box]:
    return (Box((row, *box.offsets), (1, *box.sizes)) for box in boxes)


def covers_exactly(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether every element of ``shape`` is in exactly one of ``boxes``, all of which are inside it.

    Linear in the number of boxes, which no search for overlaps is for boxes made to be hard. The element at i, j, ...
    is worth ``x**i * y**j * ...`` modulo a prime, for x, y, ... drawn now. A box's worth, times ``(1 - x)(1 - y)...``,
    is a product of a difference a dimension. Another covering is another polynomial than the whole's, of a degree below
    2**63: it is mistaken for the whole with a probability below 2**-64, whoever made the boxes.
    """
    if len(boxes) == 1:
        return boxes[0].sizes == tuple(shape)
    powers = [_Powers(secrets.randbelow(_PRIME - 2) + 2) for _ in shape]
    worth = 0
    for box in boxes:
        product = 1
        for power, offset, size in zip(powers, box.offsets, box.sizes, strict=True):
            product = product * (power[offset] - power[offset + size]) % _PRIME
        worth += product
    whole = math.prod(1 - power[size] for power, size in zip(powers, shape, strict=True))
    return (worth - whole) % _PRIME == 0


_PRIME = 2**127 - 1


class _Powers(dict[int, int]):
    """Exponent to power modulo the prime: neighbouring boxes share their bounds."""

    def __init__(self, base: int) -> None:
        self._base = base

    def __missing__(self, exponent: int) -> int:
        power = self[exponent] = pow(self._base, exponent, _PRIME)
        return power


def find_overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two of ``boxes`` that share an element, or None. Equal boxes overlap. Sweeps along the first dimension."""
    if not boxes or not boxes[0].offsets:
        return (boxes[0], boxes[1]) if len(boxes) > 1 else None
    # Sweep along the dimension that separates the boxes best: with one active box at a time the sweep is linear.
    rank = len(boxes[0].offsets)
    axis = max(range(rank), key=lambda d: len({box.offsets[d] for box in boxes}))
    active: list[tuple[int, Box]] = []  # sorted by where they end
    for box in sorted(boxes, key=lambda b: b.offsets[axis]):
        del active[: bisect.bisect_right(active, box.offsets[axis], key=lambda entry: entry[0])]
        for _, other in active:
            if box.intersect(other):
                return other, box
        bisect.insort(active, (box.offsets[axis] + box.sizes[axis], box), key=lambda entry: entry[0])
    return None
