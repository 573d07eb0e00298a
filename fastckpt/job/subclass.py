"""Tensors of classes of their own: what plain tensors they are made of, and what else makes them what they are.

A tensor whose class says how it is taken apart (``__tensor_flatten__``, as torch.compile needs it) is saved as its
inner tensors and a record: class, context, and the shape, dtype and strides it shows. A record that comes back is
compared, and nothing in it is imported or called. Where a new tensor is needed, its class must be loaded already, and
its context must consist of plain values.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from fastckpt.errors import UnsupportedVersion
from fastckpt.format import value
from fastckpt.format.shard import Box
from fastckpt.format.value import TorchDevice, TorchDtype, TorchSize
from fastckpt.job.values import torch_dtype
from fastckpt.plan.restore_plan import Stored

Record: TypeAlias = dict[str, object]
"""What, beside its inner tensors, makes a tensor what it is; a tree that ``format/value.py`` can encode."""

RECORD = "tensor_class"
"""The entry of a record that has the class."""
_CLASS = "class"
"""The entry of a part of a context that is no plain value: an enum member, a named tuple, a dataclass, a device."""
_DEVICE = "torch.device"

_LEAVES = (type(None), bool, int, float, complex, str, bytes)
_MARKS = frozenset({"_is_param", "_is_buffer", "persistent"})
"""What ``nn.Parameter`` and ``nn.Buffer`` note on a tensor of another class."""


class CannotTakeApart(Exception):
    """Why a tensor is refused, to go behind "cannot save a tensor"."""


def settled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, where it is one that a collective is still filling; waits for that."""
    if isinstance(tensor, AsyncCollectiveTensor):
        result = tensor.trigger_wait()  # type: ignore[no-untyped-call]
        assert isinstance(result, torch.Tensor)
        return result
    return tensor


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory has its elements, and they are all there is of it.

    So it is in a class that only adds methods: no operation is left to it (``__torch_dispatch__``), and it keeps no
    attributes.
    """
    kind = type(tensor)
    if kind in (torch.Tensor, nn.Parameter):
        return True
    return not (
        kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or hasattr(kind, "__tensor_flatten__")
        or is_lazy(tensor)
        or _attributes(tensor)
        or _has_no_memory(tensor)
    )


def _has_no_memory(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return bool(tensor.numel()) and not tensor.data_ptr()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of an ``is_plain`` tensor, without its class and its history."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(torch.Tensor)


def _attributes(tensor: torch.Tensor) -> list[str]:
    slots = [name for kind in type(tensor).__mro__ for name in kind.__dict__.get("__slots__", ())]
    return sorted(set(vars(tensor)) - _MARKS) + slots


def class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# --- taking apart ------------------------------------------------------------------------------------------------


def take_apart(tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], object]:
    """The inner tensors by attribute, and the context as a tree. ``CannotTakeApart`` says why it cannot be done."""
    kind = type(tensor)
    name = class_name(kind)
    if is_lazy(tensor):
        raise CannotTakeApart(f"of class {name}; it has no elements yet, run a forward first")
    if not hasattr(kind, "__tensor_flatten__"):
        kept = _attributes(tensor) if kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__ else []
        beside = f", which keeps {', '.join(kept)} beside its elements" if kept else ""
        raise CannotTakeApart(f"of class {name}{beside}; save the plain tensors it is made of")
    try:
        names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = {attribute: getattr(tensor, attribute) for attribute in names}
    except Exception as error:
        raise CannotTakeApart(
            f"of class {name}: its __tensor_flatten__ fails ({type(error).__name__}: {error}); save the plain tensors "
            "it is made of"
        ) from error
    odd = [attribute for attribute, held in inner.items() if not isinstance(held, torch.Tensor)]
    if odd or not inner:
        what = f"{', '.join(odd)} is no tensor" if odd else "it names no tensors"
        raise CannotTakeApart(f"of class {name}: by its __tensor_flatten__, {what}; save the tensors it is made of")
    try:
        return inner, _tree(context, "its context")
    except (TypeError, RecursionError) as error:
        raise CannotTakeApart(f"of class {name}: {error}; save the plain tensors it is made of") from None


def record(
    tensor: torch.Tensor,
    context: object,
    parts: Sequence[str],
    *,
    shape: Sequence[int],
    stride: Sequence[int],
    boxes: Sequence[Box] | None,
) -> Record:
    """What is saved of ``tensor`` beside its inner tensors. ``shape`` and ``stride`` are those of the whole tensor.
    ``boxes``: where parts are this rank's own, which boxes of the whole tensor they belong to; else None."""
    result: Record = {
        RECORD: class_name(type(tensor)),
        "context": context,
        "parts": list(parts),
        "shape": list(shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "stride": list(stride),
    }
    if boxes is not None:
        result["boxes"] = [[list(box.offsets), list(box.sizes)] for box in boxes]
    return result


def _tree(item: Any, path: str) -> object:
    """A context as a tree of plain values. A dict with the key ``class`` stands for something else, and such a dict of
    the context for itself in another. Where a device is, is for the job to say that restores: it is not recorded."""
    kind = type(item)
    if kind in _LEAVES:
        return item
    if kind in (list, tuple):
        return kind(_tree(member, f"{path}[{at}]") for at, member in enumerate(item))
    if kind in (set, frozenset) and all(type(member) in _LEAVES for member in item):
        return item
    if kind in (dict, OrderedDict) and all(type(key) in _LEAVES for key in item):
        entries = kind((key, _tree(member, f"{path}[{key!r}]")) for key, member in item.items())
        return {_CLASS: class_name(kind), "items": entries} if _CLASS in entries else entries
    if isinstance(item, torch.Size):
        return TorchSize(tuple(item))
    if isinstance(item, torch.dtype):
        return TorchDtype(str(item).removeprefix("torch."))
    if isinstance(item, torch.device):
        return {_CLASS: _DEVICE}
    if isinstance(item, torch.layout | torch.memory_format):
        return {_CLASS: class_name(kind), "member": str(item)}
    if isinstance(item, enum.Enum) and item.name is not None:
        return {_CLASS: class_name(kind), "member": item.name}
    if isinstance(item, tuple) and hasattr(kind, "_fields"):
        return {_CLASS: class_name(kind), "fields": _fields(item, kind._fields, path)}
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        names = [field.name for field in dataclasses.fields(item)]
        if set(getattr(item, "__dict__", ())) <= set(names):
            return {_CLASS: class_name(kind), "fields": _fields(item, names, path)}
    raise TypeError(f"{path} is of class {class_name(kind)}, which cannot be recorded")


def _fields(item: Any, names: Sequence[str], path: str) -> dict[str, object]:
    return {name: _tree(getattr(item, name), f"{path}.{name}") for name in names}


# --- comparing ---------------------------------------------------------------------------------------------------


def is_record(found: object) -> bool:
    """Whether a value of a snapshot says that it stands for a tensor."""
    return isinstance(found, Mapping) and isinstance(found.get(RECORD), str)


def describe(found: object) -> str:
    """The class of what a record, which nobody vouches for, stands for; for messages."""
    if not isinstance(found, Mapping) or not is_record(found):
        return "no tensor"
    name = _short(found[RECORD])
    return f"of class {name[1:-1]}"


def difference(found: object, ours: Mapping[str, object], *, cast: bool = False, anywhere: bool = False) -> str | None:
    """How a record of a snapshot differs from that of a tensor of the state, which must be alike to be filled.

    ``found`` is untrusted: it is only compared. With ``cast`` another dtype is no difference, with ``anywhere`` other
    boxes.
    """
    if not is_record(found):
        return f"no tensor in the snapshot, {describe(ours)} in the state"
    assert isinstance(found, dict)
    names = (RECORD, "parts", "shape", "dtype", "stride", "context", "boxes")
    for name in names:
        if (name == "dtype" and cast) or (name == "boxes" and anywhere) or _same(found.get(name), ours.get(name)):
            continue
        if name == RECORD:
            return f"{describe(found)} in the snapshot, {describe(ours)} in the state"
        theirs, own = (_short(record.get(name)) for record in (found, ours))
        if name == "boxes":
            return (
                f"parts of it are each rank's own, and belong to the boxes {theirs} in the snapshot, but {own} in the "
                "state; restore it with the placements and on the number of ranks it was saved with"
            )
        what = {"parts": "it is made of", "context": "its context is"}.get(name, f"its {name} is")
        return f"{describe(ours)}: {what} {theirs} in the snapshot, {own} in the state"
    return None if set(found) <= set(names) else f"{describe(ours)}: a record of a newer kind"


def _same(a: object, b: object) -> bool:
    # By their encodings: 1 is not True, and NaN is NaN.
    return value.encode(a) == value.encode(b)


def _short(tree: object) -> str:
    text = repr(tree)
    return text if len(text) <= 200 else text[:197] + "..."


# --- making ------------------------------------------------------------------------------------------------------


def make(key: str, like: torch.Tensor, records: Callable[[str], object], stored: Mapping[str, Stored]) -> torch.Tensor:
    """A tensor as the snapshot has under ``key``, to be filled, for a state that has none there: on the device of
    ``like`` and, where that is a DTensor, distributed like it. Its elements are not set.

    ``records(key)`` is the decoded value of the snapshot under a key, or None; ``stored`` its tensors. Both are
    untrusted: only a class that is loaded is made, out of plain values; and that what was made is what the snapshot has
    is for the caller to find out, by comparing records. ``ValueError`` says why it cannot be made.
    """
    local = settled(like._local_tensor) if isinstance(like, DTensor) else like
    found = records(key)
    if isinstance(like, DTensor) and not local.numel() and is_record(found):
        # Optimizers make plain state for no elements, whatever it is elsewhere.
        return torch.zeros_like(like, requires_grad=False)
    try:
        made = _make(key, local, tuple(like.shape), tuple(like.stride()), records, stored)
        if isinstance(like, DTensor):
            return DTensor.from_local(
                made, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
        return made
    except (ValueError, UnsupportedVersion):
        raise
    except Exception as error:  # a record of another kind, or a class that cannot do with what it says
        raise ValueError(
            f"{key}: {describe(found)} in the snapshot, which cannot be made ({type(error).__name__}: {error})"
        ) from error


def _make(
    key: str,
    local: torch.Tensor,
    whole: tuple[int, ...],
    stride: tuple[int, ...],
    records: Callable[[str], object],
    stored: Mapping[str, Stored],
) -> torch.Tensor:
    found = records(key)
    if not is_record(found):
        if key not in stored:
            raise ValueError(
                f"{key}: not among what this rank can restore; what is each rank's own goes back to the placements and "
                "the number of ranks it was saved with, and nowhere else"
            )
        shape = tuple(local.shape) if stored[key].shape == whole else stored[key].shape
        return torch.empty(shape, dtype=torch_dtype(stored[key].dtype), device=local.device)
    assert isinstance(found, dict)
    if (made := _zeros(local, found)) is not None:
        return made
    kind, parts = _loaded(key, found), found["parts"]
    if len(set(parts)) < len(parts):
        raise ValueError(f"{key}: its record names a part twice")
    inner = {name: _make(f"{key}.{name}", local, whole, stride, records, stored) for name in parts}
    shape, strides = tuple(found["shape"]), tuple(found["stride"])
    if (shape, strides) == (whole, stride):
        shape, strides = tuple(local.shape), local.stride()
    context = _context(key, found["context"], local.device)
    made = kind.__tensor_unflatten__(inner, context, torch.Size(shape), strides)  # type: ignore[attr-defined]
    if type(made) is not kind:
        raise ValueError(f"{key}: {describe(found)} in the snapshot, which its __tensor_unflatten__ does not make")
    assert isinstance(made, torch.Tensor)
    return made


def _zeros(local: torch.Tensor, found: Mapping[str, object]) -> torch.Tensor | None:
    """What optimizers make as state of a tensor of the class that was saved: its context, whatever it is, is there."""
    if found[RECORD] != class_name(type(local)):
        return None
    try:
        made = torch.zeros_like(local, requires_grad=False)
        alike = type(made) is type(local) and _same(take_apart(made)[1], found.get("context"))
    except Exception:  # a class need not support it
        return None
    return made if alike else None


def _loaded(key: str, found: Mapping[str, object]) -> type[torch.Tensor]:
    kinds = [kind for kind in set(_subclasses(torch.Tensor)) if class_name(kind) == found[RECORD]]
    able = [kind for kind in kinds if hasattr(kind, "__tensor_unflatten__") and not issubclass(kind, DTensor)]
    if len(able) != 1:
        how = "several classes of this name are loaded" if able else "no such class is loaded"
        raise ValueError(f"{key}: {describe(found)} in the snapshot, but {how}; import the module that defines it")
    return able[0]


def _subclasses(kind: type[torch.Tensor]) -> Iterator[type[torch.Tensor]]:
    for each in type.__subclasses__(kind):
        yield each
        yield from _subclasses(each)


def _context(key: str, tree: Any, device: torch.device) -> object:
    """The context that a record tells of, out of plain values alone."""
    kind = type(tree)
    if kind in (list, tuple):
        return kind(_context(key, member, device) for member in tree)
    if kind in (dict, OrderedDict):
        if _CLASS not in tree:
            return kind((key, _context(key, member, device)) for key, member in tree.items())
        if tree == {_CLASS: _DEVICE}:
            return device
        raise ValueError(
            f"{key}: the context of its class has a {_short(tree[_CLASS])} in the snapshot, which is not made from "
            "there; take one step before restoring, so that there is something to fill"
        )
    if isinstance(tree, TorchSize):
        return torch.Size(tree.sizes)
    if isinstance(tree, TorchDtype):
        return torch_dtype(tree.name)
    if isinstance(tree, TorchDevice):
        return device
    return tree
