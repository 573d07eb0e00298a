"""One tensor as this rank holds it: its boxes, and the live memory that has their elements."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from fastckpt.errors import FormatError
from fastckpt.format.dtype import ITEM_BYTES
from fastckpt.format.families import Mesh
from fastckpt.format.shard import Box, check_inside
from fastckpt.job import dtensor, subclass
from fastckpt.plan.save_plan import COMPARED, KNOWN, OWN


@dataclass(frozen=True)
class Shard:
    """This rank's box of a larger tensor: experts, pipeline stages, hand-made tensor parallelism.

    ``tensor`` holds the elements from ``offsets`` on of a tensor of ``shape``. Ranks may hold equal boxes (then the
    content must be equal) but not overlapping ones, and together they must hold all of it.

    A parameter of a module in the same state may be given, under any name: then the parameter, and what an optimizer
    keeps for it in tensors of its shape, is this box wherever it appears, and is stored once.
    """

    tensor: torch.Tensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        box = Box(tuple(self.offsets), tuple(self.tensor.shape))
        try:
            if box.elements:  # an empty shard is nowhere
                check_inside(box, self.shape, "Shard")
        except FormatError as error:
            raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Held:
    """One tensor of the state as this rank holds it."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[Box, torch.Tensor], ...]
    """Boxes with elements, each with the live tensor of the same sizes."""
    sharing: int
    among: tuple[int, ...]
    """For ``KNOWN`` sharing: the ranks among which equal boxes are known to hold equal bytes."""
    volatile: bool
    """May change by other means than ``Optimizer.step``: is copied before ``save`` returns."""
    identity: tuple[Any, ...] = field(compare=False)
    """Equal for keys that are the same tensor."""
    parts: tuple[Held, ...] = ()
    """Of a tensor subclass that was taken apart: the plain tensors it is made of. It has no pieces of its own."""
    form: Mapping[str, object] | None = None
    """Of a tensor subclass: what, beside its parts, makes it what it is, as ``subclass.record`` has it."""
    local: torch.Tensor | None = field(default=None, compare=False)
    """What ``pieces`` are views of, where that is a tensor of the state or the local part of one."""
    rule: Rule | None = None
    """Of ``KNOWN`` sharing: by which the only piece follows from the coordinate of this rank."""


@dataclass(frozen=True)
class Rule:
    """How the ranks of a mesh split a tensor between them."""

    mesh: Mesh
    splits: dtensor.Splits


def dtype_name(tensor: torch.Tensor, key: str) -> str:
    """The format's name of a tensor's dtype; ``TypeError`` naming ``key`` if it has none."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise TypeError(f"{key}: cannot save tensors of dtype {tensor.dtype}; convert it, or leave it out")
    return name


def hold(
    key: str, tensor: torch.Tensor, *, sharing: int = COMPARED, among: tuple[int, ...] = (), volatile: bool = False
) -> Held:
    """A tensor, whole or distributed, as this rank holds it."""
    tensor = subclass.settled(tensor)
    _refuse(key, tensor)
    if type(tensor) is DTensor:
        boxes = tuple((box, at) for box, at in dtensor.local_boxes(tensor, key) if box.elements)
        # Its placements say which ranks of its mesh hold equal boxes, wherever in the state it is.
        mesh, among = dtensor.mesh_ranks(tensor)
        splits = dtensor.splits_of(tensor, boxes[0][0]) if len(boxes) == 1 else None
        rule = None if splits is None else Rule(mesh, splits)
        portion = _Portion(tuple(tensor.shape), tensor.stride(), boxes, KNOWN, among, volatile, rule)
        return _hold_portion(key, subclass.settled(tensor._local_tensor), portion)
    if subclass.is_plain(tensor):
        box = Box.whole(tuple(tensor.shape))
        portion = _Portion(box.sizes, tensor.stride(), ((box, box),) if box.elements else (), sharing, among, volatile)
        return _hold_portion(key, tensor, portion)
    inner, context = _take_apart(key, tensor)
    parts = tuple(
        hold(f"{key}.{name}", part, sharing=sharing, among=among, volatile=volatile) for name, part in inner.items()
    )
    record = subclass.record(tensor, context, list(inner), shape=tensor.shape, stride=tensor.stride(), boxes=None)
    return _made_of(key, tuple(tensor.shape), parts, record, sharing, among, volatile)


def hold_shard(key: str, shard: Shard, *, volatile: bool = False) -> Held:
    """A box of a larger tensor as this rank holds it."""
    tensor = subclass.settled(shard.tensor)
    if isinstance(tensor, DTensor):
        raise TypeError(f"{key}: a Shard of a DTensor; a DTensor knows its own boxes, save it as it is")
    _refuse(key, tensor)
    shape, box = tuple(shard.shape), Box(tuple(shard.offsets), tuple(tensor.shape))
    boxes = ((box, Box.whole(box.sizes)),) if box.elements else ()
    held = _hold_portion(key, tensor, _Portion(shape, tensor.stride(), boxes, COMPARED, (), volatile))
    return dataclasses.replace(held, identity=("shard", box, held.identity))


@dataclass(frozen=True)
class _Portion:
    """What a tensor of this process is of a whole one."""

    shape: tuple[int, ...]
    """Of the whole, as are the strides."""
    stride: tuple[int, ...]
    boxes: tuple[tuple[Box, Box], ...]
    """Boxes of the whole, each with the box here that has its elements."""
    sharing: int
    among: tuple[int, ...]
    volatile: bool
    rule: Rule | None = None


def _hold_portion(key: str, local: torch.Tensor, portion: _Portion) -> Held:
    _refuse(key, local)
    if subclass.is_plain(local):
        if local.untyped_storage().nbytes() < storage_bytes(local):
            raise ValueError(f"{key}: the memory of its storage has been freed; resize the storage first")
        dtype = dtype_name(local, key)
        elements = subclass.plain(local)
        pieces = tuple(
            (box, elements if at.sizes == elements.shape else elements[at.slices()]) for box, at in portion.boxes
        )
        identity = _identity(local, portion.shape, pieces)
        sharing, among, volatile = portion.sharing, portion.among, portion.volatile
        rule = portion.rule
        return Held(key, portion.shape, dtype, pieces, sharing, among, volatile, identity, local=local, rule=rule)
    inner, context = _take_apart(key, local)
    parts = tuple(_hold_part(f"{key}.{name}", part, local, portion) for name, part in inner.items())
    boxes = [box for box, _ in portion.boxes] if any(_is_own(part) for part in parts) else None
    record = subclass.record(local, context, list(inner), shape=portion.shape, stride=portion.stride, boxes=boxes)
    return _made_of(key, portion.shape, parts, record, portion.sharing, portion.among, portion.volatile)


def _hold_part(key: str, part: torch.Tensor, local: torch.Tensor, portion: _Portion) -> Held:
    if part.shape == local.shape and not isinstance(part, DTensor):  # one element of it for each of the outer tensor
        return _hold_portion(key, part, portion)
    # Scales of blocks and the like: which part of a whole they are nobody can tell.
    return hold(key, part, sharing=OWN, volatile=portion.volatile)


def _is_own(held: Held) -> bool:
    return held.sharing == OWN or any(_is_own(part) for part in held.parts)


def _made_of(
    key: str,
    shape: tuple[int, ...],
    parts: tuple[Held, ...],
    record: subclass.Record,
    sharing: int,
    among: tuple[int, ...],
    volatile: bool,
) -> Held:
    identity = (record[subclass.RECORD], *(part.identity for part in parts))
    return Held(key, shape, str(record["dtype"]), (), sharing, among, volatile, identity, parts, record)


def _take_apart(key: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], object]:
    try:
        return subclass.take_apart(tensor)
    except subclass.CannotTakeApart as reason:
        raise TypeError(f"{key}: cannot save a tensor {reason}") from reason.__cause__


def storage_bytes(tensor: torch.Tensor) -> int:
    """How large the storage of a tensor must at least be, which torch does not look at whenever it copies."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()


def memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for views of the same elements: a parameter and what ``detach`` makes of it."""
    if is_lazy(tensor) or not tensor.numel():
        return ("empty", id(tensor))
    if not subclass.is_plain(tensor):
        try:
            inner, _ = subclass.take_apart(tensor)
        except subclass.CannotTakeApart:  # refused as soon as it is held
            return ("unknown", id(tensor))
        return tuple(memory(part) for part in inner.values())
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _identity(
    tensor: torch.Tensor, shape: tuple[int, ...], pieces: tuple[tuple[Box, torch.Tensor], ...]
) -> tuple[Any, ...]:
    if not pieces:
        return ("empty", id(tensor))
    memory = tuple((box, view.data_ptr(), view.stride(), str(view.device)) for box, view in pieces)
    return (str(tensor.dtype), shape, tensor.is_conj(), tensor.is_neg(), memory)


def _refuse(key: str, tensor: torch.Tensor) -> None:
    kind: str | None = None
    if tensor.is_meta:
        kind = "on the meta device; materialise it first"
    elif tensor.is_sparse or tensor.layout != torch.strided:
        kind = f"of layout {tensor.layout}; save its indices and values as tensors of their own"
    elif tensor.is_nested:
        kind = "nested; save its values and offsets as tensors of their own"
    elif tensor.is_quantized:
        kind = "quantized; save tensor.int_repr() with its scales and zero points"
    if kind:
        raise TypeError(f"{key}: cannot save a tensor {kind}")
