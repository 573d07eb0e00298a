"""What differs between the tensors of two snapshots: by chunk hashes where they decide it, else byte by byte.

same box on both sides, alone in its chunks       hashes: nothing is read, and whole chunks count
at the same byte of equal bundles                 hashes
anything else (another world size, other bundles) both are read and verified, a piece at a time; elements count
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fastckpt.format.chunk import chunk_cuts
from fastckpt.format.dtype import item_bytes
from fastckpt.format.families import Place
from fastckpt.format.shard import Box, boxes_of_flat_range
from fastckpt.plan.restore_plan import Want
from fastckpt.repository.reader import ArraySink, Snapshot

COMPARED_BYTES_MAX = 32 * 1024 * 1024
"""Read of each snapshot at once, unless a single chunk is larger."""
_BLOCK_BYTES = 1024
"""What a block takes beside its bytes."""

OnProgress = Callable[[int, int], None]
"""Told bytes compared and bytes in all, of those that must be read."""


@dataclass(frozen=True)
class Form:
    """What a key is in a snapshot, apart from its content."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * item_bytes(self.dtype)


@dataclass(frozen=True)
class Changed:
    """A key with the same shape and dtype and other content."""

    key: str
    form: Form
    changed_bytes: int
    """By hashes: of the chunks that differ. By bytes: of the elements that differ."""
    by: Literal["hashes", "bytes"]


@dataclass(frozen=True)
class Comparison:
    """Keys as shown to people, sorted. What is in none of the lists is the same in both."""

    added: dict[str, Form]
    removed: dict[str, Form]
    other_form: dict[str, tuple[Form, Form]]
    """Another shape or dtype: the content is not compared."""
    changed: list[Changed]
    same: int
    """Number of keys with equal content."""


Identity = tuple[str, int]
"""A key and its owner."""
Pair = tuple[int, int]
"""Numbers of the keys that hold the bytes, in the two layouts: tied keys are one pair."""


def compare(a: Snapshot, b: Snapshot, on_progress: OnProgress = lambda done, total: None) -> Comparison:
    """What differs from ``a`` to ``b``, two snapshots of one repository. ``SnapshotDamaged`` where metadata, or bytes
    that must be read, are damaged.

    Memory: the layouts, the tables, ``COMPARED_BYTES_MAX`` or one chunk of each, and what reading takes.
    """
    ours, theirs = _Side(a), _Side(b)
    common = [identity for identity in ours.numbers if identity in theirs.numbers]
    forms = {identity: (ours.form(identity), theirs.form(identity)) for identity in common}
    pairs = {key: (ours.stored(key), theirs.stored(key)) for key, (one, other) in forms.items() if one == other}
    by_hashes = {pair: _changed_by_hashes(ours, theirs, pair) for pair in dict.fromkeys(pairs.values())}
    undecided = [pair for pair, count in by_hashes.items() if count is None]
    by_bytes = _changed_by_bytes(ours, theirs, undecided, on_progress)
    changed = [
        Changed(ours.label(key), forms[key][0], count, "bytes" if pair in by_bytes else "hashes")
        for key, pair in pairs.items()
        if (count := by_bytes.get(pair, by_hashes[pair]))
    ]
    return Comparison(
        added={theirs.label(key): theirs.form(key) for key in theirs.numbers if key not in ours.numbers},
        removed={ours.label(key): ours.form(key) for key in ours.numbers if key not in theirs.numbers},
        other_form={ours.label(key): pair for key, pair in forms.items() if key not in pairs},
        changed=changed,
        same=len(pairs) - len(changed),
    )


class _Side:
    """A snapshot, and where the bytes of each of its tensors lie."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        layout = self.layout = snapshot.layout
        self.numbers: dict[Identity, int] = {
            identity: number for number, identity in enumerate(zip(layout.keys, layout.owners, strict=True))
        }
        self._stored_by = dict(layout.aliases)

    def form(self, identity: Identity) -> Form:
        number = self.numbers[identity]
        return Form(self.layout.dtypes[number], tuple(self.layout.shapes[number]))

    def label(self, identity: Identity) -> str:
        return self.layout.label(self.numbers[identity])

    def stored(self, identity: Identity) -> int:
        number = self.numbers[identity]
        return self._stored_by.get(number, number)

    def places(self, number: int) -> dict[Box, Place]:
        return {place.box: place for place in self.snapshot.chunks.places(number)}

    def hash(self, chunk: int) -> bytes:
        return self.snapshot.place(chunk).hash


def _changed_by_hashes(a: _Side, b: _Side, pair: Pair) -> int | None:
    """Bytes of the chunks that differ; None where hashes do not decide it."""
    ours, theirs = a.places(pair[0]), b.places(pair[1])
    if ours.keys() != theirs.keys():
        return None
    count = 0
    for box, one in ours.items():
        other = theirs[box]
        if (one.count, one.byte) != (other.count, other.byte):
            return None
        differing = [at for at in range(one.count) if a.hash(one.first + at) != b.hash(other.first + at)]
        if differing and (one.bundle_bytes or other.bundle_bytes):
            return None
        if differing:
            item = item_bytes(a.layout.dtypes[pair[0]])
            cuts = chunk_cuts(a.layout.shapes[pair[0]], item, box, a.layout.chunk_bytes)
            count += sum(cuts[position + 1] - cuts[position] for position in differing) * item
    return count


@dataclass(frozen=True)
class _Block:
    """A run of elements of both tensors of a pair, in C order."""

    pair: Pair
    boxes: list[Box]
    bytes: int


def _changed_by_bytes(a: _Side, b: _Side, pairs: Sequence[Pair], on_progress: OnProgress) -> dict[Pair, int]:
    """Bytes of the elements that differ."""
    changed = dict.fromkeys(pairs, 0)
    total = sum(Form(a.layout.dtypes[one], tuple(a.layout.shapes[one])).bytes for one, _ in pairs)
    done = 0
    # Small tensors are read together: they share bundles.
    for blocks in _batches(block for pair in pairs for block in _blocks(a, pair)):
        ours = _read(a, [(block.pair[0], block) for block in blocks])
        theirs = _read(b, [(block.pair[1], block) for block in blocks])
        for block, one, other in zip(blocks, ours, theirs, strict=True):
            for x, y in zip(one, other, strict=True):
                changed[block.pair] += int(np.count_nonzero((x != y).any(axis=-1))) * x.shape[-1]
        done += sum(block.bytes for block in blocks)
        on_progress(done, total)
    return changed


def _blocks(a: _Side, pair: Pair) -> Iterator[_Block]:
    """As large as may be, in whole rows where these are not larger: a chunk that lies in two blocks is read twice."""
    shape, item = tuple(a.layout.shapes[pair[0]]), item_bytes(a.layout.dtypes[pair[0]])
    step = max(COMPARED_BYTES_MAX, a.layout.chunk_bytes) // item
    row = math.prod(shape[1:])
    if 0 < row <= step:
        step -= step % row
    elements = math.prod(shape)
    for start in range(0, elements, step):
        stop = min(start + step, elements)
        yield _Block(pair, boxes_of_flat_range(shape, start, stop), (stop - start) * item)


def _batches(blocks: Iterator[_Block]) -> Iterator[list[_Block]]:
    batch: list[_Block] = []
    size = 0
    for block in blocks:
        cost = block.bytes + _BLOCK_BYTES
        if batch and size + cost > COMPARED_BYTES_MAX:
            yield batch
            batch, size = [], 0
        batch.append(block)
        size += cost
    if batch:
        yield batch


def _read(side: _Side, blocks: Sequence[tuple[int, _Block]]) -> list[list[npt.NDArray[np.uint8]]]:
    """For each block, the bytes of its boxes."""
    wants: list[Want] = []
    sinks: list[ArraySink] = []
    found: list[list[npt.NDArray[np.uint8]]] = []
    for number, block in blocks:
        item = item_bytes(side.layout.dtypes[number])
        arrays = [np.empty((*box.sizes, item), np.uint8) for box in block.boxes]
        for box, array in zip(block.boxes, arrays, strict=True):
            wants.append(Want(number, box, len(sinks)))
            sinks.append(ArraySink(box, array))
        found.append(arrays)
    side.snapshot.read_into(wants, sinks)
    return found
