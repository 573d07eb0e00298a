"""One tensor as this rank holds it: its boxes, and the live memory that has their elements."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fastckpt.errors import FormatError
from fastckpt.format.dtype import ITEM_BYTES
from fastckpt.format.shard import Box, check_inside
from fastckpt.job import dtensor
from fastckpt.plan.save_plan import COMPARED, KNOWN


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
    form: object = None
    """Of a tensor subclass: what, beside its parts, makes it what it is; a tree that ``format/value.py`` can encode."""


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
    _refuse(key, tensor)
    dtype = dtype_name(tensor, key)
    if isinstance(tensor, DTensor):
        pieces = tuple((box, view) for box, view in dtensor.local_boxes(tensor, key) if box.elements)
        # Its placements say which ranks of its mesh hold equal boxes, wherever in the state it is.
        sharing = KNOWN
        among = tuple(dtensor.mesh_ranks(tensor))
    else:
        box = Box.whole(tuple(tensor.shape))
        pieces = ((box, tensor.detach()),) if box.elements else ()
    identity = _identity(tensor, pieces)
    return Held(key, tuple(tensor.shape), dtype, pieces, sharing, among, volatile, identity)


def hold_shard(key: str, shard: Shard, *, volatile: bool = False) -> Held:
    """A box of a larger tensor as this rank holds it."""
    if isinstance(shard.tensor, DTensor):
        raise TypeError(f"{key}: a Shard of a DTensor; a DTensor knows its own boxes, save it as it is")
    local = hold(key, shard.tensor)
    box = Box(tuple(shard.offsets), tuple(shard.tensor.shape))
    pieces = ((box, shard.tensor.detach()),) if box.elements else ()
    identity = ("shard", tuple(shard.shape), box, local.identity)
    return Held(key, tuple(shard.shape), local.dtype, pieces, COMPARED, (), volatile, identity)


def memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for views of the same elements: a parameter and what ``detach`` makes of it."""
    if not tensor.numel():
        return ("empty", id(tensor))
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _identity(tensor: torch.Tensor, pieces: tuple[tuple[Box, torch.Tensor], ...]) -> tuple[Any, ...]:
    if not pieces:
        return ("empty", id(tensor))
    memory = tuple((box, view.data_ptr(), view.stride(), str(view.device)) for box, view in pieces)
    return (str(tensor.dtype), tuple(tensor.shape), tensor.is_conj(), tensor.is_neg(), memory)


def _refuse(key: str, tensor: torch.Tensor) -> None:
    kind: str | None = None
    plain = type(tensor) in (torch.Tensor, nn.Parameter, DTensor)
    if tensor.is_meta:
        kind = "on the meta device; materialise it first"
    elif tensor.is_sparse or tensor.layout != torch.strided:
        kind = f"of layout {tensor.layout}; save its indices and values as tensors of their own"
    elif tensor.is_nested:
        kind = "nested; save its values and offsets as tensors of their own"
    elif tensor.is_quantized:
        kind = "quantized; save tensor.int_repr() with its scales and zero points"
    elif not plain:
        kind = f"of class {type(tensor).__module__}.{type(tensor).__qualname__}; save the plain tensors it is made of"
    if kind:
        raise TypeError(f"{key}: cannot save a tensor {kind}")
