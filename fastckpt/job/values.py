"""Plain values that hold torch things: to the neutral tree that ``format/value.py`` encodes, and back.

Small tensors travel inside the value, larger ones by reference beside it. Only what torch has is converted here; what
no snapshot can hold is refused by ``encode``, except tensors, whose kinds only torch can tell.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

from fastckpt.errors import FormatError, UnsupportedVersion
from fastckpt.format.dtype import ITEM_BYTES
from fastckpt.format.value import (
    DEPTH_MAX,
    TensorReference,
    TensorValue,
    TorchDevice,
    TorchDtype,
    TorchSize,
    show_path,
)

INLINE_BYTES_MAX: Final = 64 * 1024
"""Tensors up to this size are part of the value."""

_SCALARS = frozenset({type(None), bool, int, float, str})

NamedTensors = list[tuple[str, torch.Tensor]]


def to_plain(value: object, path: str) -> tuple[object, NamedTensors]:
    """``value`` without torch, and the tensors that it refers to by key; keys start with ``path``, joined by dots.

    Keys depend on the structure of the value alone, so ranks that hold the same structure give the same keys. Small
    tensors are copied now; tensors returned are the live ones, whatever their type (a DTensor stays one). Whether a
    tensor was a ``Parameter`` or required a gradient is not kept.

    ``TypeError`` names the path of a tensor that cannot be saved: meta, sparse, nested, quantized, or of a class of its
    own; ``ValueError`` that of a value that is nested too deep.
    """
    flattening = _Flattening(path)
    return flattening.tree(value, [], []), flattening.tensors


def from_plain(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that ``to_plain`` was given. ``tensors`` holds every tensor that the tree refers to, by key.

    A tensor that was part of the value comes back on the type of device it was on, if this process has that, else on
    the CPU. ``FormatError`` for a reference without its tensor; ``UnsupportedVersion`` for what this torch lacks.
    """
    kind: Any = type(tree)
    if kind in (dict, OrderedDict, Counter):
        mapping = kind()
        for key, item in tree.items():
            mapping[from_plain(key, {})] = from_plain(item, tensors)
        return mapping
    if kind in (list, tuple, set, frozenset):
        return kind(from_plain(item, tensors) for item in tree)
    if isinstance(tree, deque):
        return deque((from_plain(item, tensors) for item in tree), tree.maxlen)
    if isinstance(tree, TensorValue):
        return _tensor(tree)
    if isinstance(tree, TensorReference):
        if tree.key not in tensors:
            raise FormatError(f"the value refers to a tensor {tree.key!r}, which the snapshot does not have")
        return tensors[tree.key]
    if isinstance(tree, TorchSize):
        return torch.Size(tree.sizes)
    if isinstance(tree, TorchDtype):
        return torch_dtype(tree.name)
    if isinstance(tree, TorchDevice):
        try:
            return torch.device(tree.name)
        except RuntimeError as error:
            raise UnsupportedVersion(f"this torch has no device {tree.name!r}; use a build that does") from error
    return tree


def references(tree: object) -> list[str]:
    """The keys of the tensors that a plain tree refers to."""
    if isinstance(tree, TensorReference):
        return [tree.key]
    if isinstance(tree, Mapping):
        return [key for item in tree.values() for key in references(item)]
    if isinstance(tree, list | tuple | deque):
        return [key for item in tree for key in references(item)]
    return []


class _Flattening:
    """One walk over one value. ``path`` is for messages, ``names`` for keys: the two differ for odd dict keys."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.tensors: NamedTensors = []
        self.keys: set[str] = set()

    def tree(self, value: Any, path: list[object], names: list[str]) -> object:
        if len(path) > DEPTH_MAX:
            raise ValueError(
                f"{self.show(path)}: more than {DEPTH_MAX} containers inside each other; does it hold itself?"
            )
        kind: Any = type(value)
        if kind in (dict, OrderedDict, Counter):
            result = kind()
            for position, (key, item) in enumerate(value.items()):
                name = str(key) if type(key) in (str, int, float, bool) else str(position)
                result[self.key_or_member(key, path)] = self.tree(item, [*path, key], [*names, name])
            return result
        if kind in (list, tuple, deque):
            if _SCALARS.issuperset(map(type, value)):  # such as the names of an optimizer's parameters
                return copy.copy(value)
            items = [self.tree(item, [*path, at], [*names, str(at)]) for at, item in enumerate(value)]
            return deque(items, value.maxlen) if kind is deque else kind(items)
        if isinstance(value, torch.Tensor):
            return self.tensor(value, path, names)
        return self.key_or_member(value, path)

    def key_or_member(self, value: Any, path: list[object]) -> Any:
        kind: Any = type(value)
        if isinstance(value, torch.Tensor):
            raise TypeError(
                f"{self.show(path)}: a tensor as a key or in a set, which compares tensors by identity; "
                "use a list, or numbers"
            )
        if kind in (tuple, set, frozenset):
            return kind(self.key_or_member(member, path) for member in value)
        if isinstance(value, torch.Size):
            return TorchSize(tuple(value))
        if isinstance(value, torch.dtype):
            return TorchDtype(self.dtype_name(value, path))
        if isinstance(value, torch.device):
            return TorchDevice(str(value))
        return value

    def tensor(self, tensor: torch.Tensor, path: list[object], names: list[str]) -> TensorValue | TensorReference:
        distributed = _is_dtensor(tensor)
        if not distributed:
            problem = _problem(tensor)
            if problem is not None:
                raise TypeError(f"{self.show(path)}: {problem}")
        dtype = self.dtype_name(tensor.dtype, path)
        if distributed or tensor.numel() * tensor.element_size() > INLINE_BYTES_MAX:
            key = self.unique_key(names)
            self.tensors.append((key, tensor))
            return TensorReference(key)
        return TensorValue(dtype, tuple(tensor.shape), _tensor_bytes(tensor), tensor.device.type)

    def unique_key(self, names: list[str]) -> str:
        # {"a.b": ...} and {"a": {"b": ...}} ask for the same key.
        plain = ".".join((self.prefix, *names))
        for key in itertools.chain((plain,), (f"{plain}#{count}" for count in itertools.count(2))):
            if key not in self.keys:
                self.keys.add(key)
                return key
        raise AssertionError("counting ended")

    def dtype_name(self, dtype: torch.dtype, path: list[object]) -> str:
        name = str(dtype).removeprefix("torch.")
        if name not in ITEM_BYTES:
            raise TypeError(f"{self.show(path)}: {dtype} cannot be saved; leave it out, or convert it in state_dict()")
        return name

    def show(self, path: list[object]) -> str:
        return self.prefix + (show_path(path) if path else "")


def _is_dtensor(tensor: torch.Tensor) -> bool:
    # A DTensor can only be there if its module is; importing it here would cost everybody half a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _problem(tensor: torch.Tensor) -> str | None:
    """Why the tensor cannot be saved, and what to do; ``None`` if it can."""
    if tensor.is_meta:
        return "a meta tensor has no data; materialize it (to_empty) or leave it out"
    if tensor.is_nested:
        return "a nested tensor cannot be saved; save its values() and offsets(), or use to_padded_tensor"
    if tensor.is_quantized:
        return "a quantized tensor cannot be saved; save int_repr() with its scale and zero point"
    if tensor.layout is not torch.strided:
        return f"a sparse tensor ({tensor.layout}) cannot be saved; save its indices and values, or to_dense()"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        kind = type(tensor)
        return (
            f"a tensor of class {kind.__module__}.{kind.__qualname__} cannot be saved as a plain value; "
            "convert it in state_dict()"
        )
    return None


def _tensor_bytes(tensor: torch.Tensor) -> bytes:
    tensor = tensor.detach()
    # One-byte types become bytes first of all, since torch cannot copy some (uint4 and its like) under their own name.
    # In a conjugated or negated view of the wider ones, memory does not hold the values.
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor.resolve_conj().resolve_neg()
    raw = raw.cpu().contiguous()
    # A view of no or one element counts as contiguous whatever its strides are, and then cannot be seen as bytes.
    return raw.as_strided((raw.numel(),), (1,)).view(torch.uint8).numpy().tobytes()


def _tensor(value: TensorValue) -> torch.Tensor:
    dtype = torch_dtype(value.dtype)
    raw = torch.from_numpy(np.frombuffer(value.data, np.uint8).copy()) if value.data else torch.empty(0).byte()
    tensor = raw.view(dtype).reshape(value.shape)
    device = value.device.partition(":")[0]
    if device not in _devices():
        return tensor
    # Moved as bytes, like the way out.
    return raw.to(device).view(dtype).reshape(value.shape)


def _devices() -> Iterator[str]:
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            yield accelerator.type


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedVersion(f"this torch ({torch.__version__}) has no {name}; use a newer one")
    return dtype
