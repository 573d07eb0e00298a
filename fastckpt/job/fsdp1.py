"""FSDP1 (``FullyShardedDataParallel``): where the parameters of its units lie in their flat parameters on this rank.

A unit lays its parameters one behind the other, with padding, and gives each rank an equal run of the elements. So a
rank holds a flat range of a parameter, which is a few boxes. All of it is read from the unit's own tables: no
collective runs, and torch's sharded state dicts, which cut anew, are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState, _is_fsdp_flattened
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.distributed.fsdp._runtime_utils import _reshard

from fastckpt.format.shard import Box, boxes_of_flat_range
from fastckpt.job import subclass
from fastckpt.job.tensors import Held, dtype_name, hold
from fastckpt.plan.save_plan import KNOWN, OWN


@dataclass(frozen=True)
class Range:
    """One parameter of a unit: its elements ``start`` to ``start + count``, in the order of its memory, are here."""

    parameter: torch.Tensor
    """What an optimizer is given: the parameter itself (``use_orig_params=True``) or the flat one."""
    position: int
    """Of the parameter in the flat one."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    count: int
    offset: int
    """Of the first of these elements in ``local``."""
    local: torch.Tensor
    """This rank's part of the flat parameter, in full precision."""
    original: bool
    """``parameter`` is the parameter itself."""
    cut: bool
    """Not ``NO_SHARD``, with which every rank has all of it."""
    among: tuple[int, ...]
    """Ranks known to hold equal ranges equal."""


@dataclass(frozen=True)
class FlatPlace:
    """The place of a parameter that lies in a flat parameter."""

    path: str
    range: Range

    @property
    def shape(self) -> tuple[int, ...]:
        return self.range.shape

    @property
    def has_state(self) -> bool:
        # FSDP1 gives no gradient to an original parameter that has no elements here.
        return not self.range.original or self.range.count > 0

    @property
    def boxes(self) -> list[Box] | None:
        part = self.range
        return [box for box, _, _ in _boxes(part.shape, part.strides, part.start, part.count)] if part.cut else None

    def hold(self, key: str, tensor: torch.Tensor) -> Held:
        part = self.range
        flat, offset = tensor.detach(), 0 if part.original else part.offset
        if tensor is part.parameter:
            flat, offset = part.local, part.offset
        elif part.original and not part.cut and tensor.shape == part.shape:
            return hold(key, tensor, sharing=KNOWN, among=part.among)
        elif tensor.shape != ((part.count,) if part.original else part.local.shape):
            # Not kept for each element, such as a step counter: need not be equal elsewhere.
            return hold(key, tensor, sharing=OWN)
        if not subclass.is_plain(flat):
            raise TypeError(
                f"{key}: a {type(tensor).__qualname__}, which is not taken apart under FSDP1; use "
                "torch.distributed.fsdp.fully_shard"
            )
        try:
            boxes = _boxes(part.shape, part.strides, part.start, part.count)
        except ValueError as error:
            raise ValueError(f"{key}: a parameter {error}; FSDP1 needs contiguous() ones") from None
        at = flat.storage_offset() + offset
        pieces = tuple((box, flat.as_strided(box.sizes, steps, at + skip)) for box, steps, skip in boxes)
        # Tied parameters are the same range of the same memory, also where none of it is here.
        memory = (flat.data_ptr(), str(flat.device)) if pieces else ("empty", id(tensor))
        identity = ("flat", *memory, str(flat.dtype), part.position, part.shape, part.start)
        return Held(key, part.shape, dtype_name(flat, key), pieces, KNOWN, part.among, False, identity)


def ranges(path: str, unit: FullyShardedDataParallel) -> Iterator[tuple[nn.Module, str, Range]]:
    """The parameters of a unit: module, name in it, and range; tied ones under each of their names.

    Parameters that a forward without backward left gathered are let go of: the next forward would use them again, and
    not see what a restore has brought. ``ValueError`` or ``TypeError`` naming ``path`` for what cannot be saved now.
    """
    handle = unit._handle
    if handle is None:  # no parameters of its own
        return
    flat: Any = handle.flat_param
    _check(path or "the module", unit, handle, flat)
    _let_go(unit, handle, flat)
    local, among = flat.data, _known_equal(unit)
    kept: dict[tuple[nn.Module, str], Range] = {}
    for position, (info, shard) in enumerate(zip(flat._param_infos, flat._shard_param_infos, strict=True)):
        shape, count = tuple(flat._shapes[position]), shard.numel_in_shard or 0
        one = kept[info.module, info.param_name] = Range(
            parameter=flat._params[position] if handle._use_orig_params else flat,
            position=position,
            shape=shape,
            strides=tuple(flat._strides[position]),
            start=shard.intra_param_start_idx or 0,
            count=count,
            offset=shard.offset_in_shard or 0,
            local=local,
            original=handle._use_orig_params,
            cut=handle.uses_sharded_strategy,
            among=among,
        )
        yield info.module, info.param_name, one
    for tied in flat._shared_param_infos:
        yield tied.module, tied.param_name, kept[tied.prim_module, tied.prim_param_name]


def buffer_dtypes(path: str, unit: FullyShardedDataParallel) -> dict[str, torch.dtype]:
    """By path, the dtypes of buffers of a unit as it was given them, if it converts them in its first forward pass."""
    if unit.mixed_precision.buffer_dtype is None:
        return {}
    prefix = f"{path}." if path else ""
    return {prefix + name: dtype for name, dtype in unit._buffer_name_to_orig_dtype.items()}


def check_not_stray(path: str, module: nn.Module, own: Mapping[str, Range], in_unit: bool) -> None:
    """``ValueError`` for a module with parameters that lie in a flat parameter, but not among ``own``, its ranges."""
    # With use_orig_params=False a module has no parameters any more; only this mark is left of them.
    lost = not in_unit and module.__dict__.get("_fsdp_use_orig_params") is False
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in own and not isinstance(parameter, FlatParameter):
            lost = lost or _is_fsdp_flattened(parameter)
    if lost:
        raise ValueError(
            f"{path or 'the module'}: its parameters are pieces in the flat parameter of an FSDP1 unit that is not "
            "above it in the state; put the FullyShardedDataParallel module itself into the state, not a module inside "
            "it, and tie parameters only within one unit"
        )


def _check(path: str, unit: FullyShardedDataParallel, handle: FlatParamHandle, flat: Any) -> None:
    if handle._training_state != HandleTrainingState.IDLE:
        summoned = handle._training_state == HandleTrainingState.SUMMON_FULL_PARAMS
        inside = "summon_full_params" if summoned else "a forward or backward pass"
        raise ValueError(f"{path}: this FSDP1 unit is inside {inside}; save and restore outside of it")
    for extension, name in zip(flat._param_extensions, flat._fqns, strict=True):
        if extension is not None:
            raise TypeError(
                f"{path}: {name} is a DTensor inside an FSDP1 unit (tensor parallelism), whose pieces are no boxes of "
                "the whole; use torch.distributed.fsdp.fully_shard, whose snapshots any layout can restore"
            )
    if flat.is_meta:
        raise TypeError(f"{path}: cannot save an FSDP1 unit on the meta device; materialise it first")
    # What FSDP1 goes on with is what it found at its first forward; it does not notice what is moved later.
    if unit._is_root is not None and flat.data_ptr() != flat._local_shard.data_ptr():
        raise ValueError(
            f"{path}: this FSDP1 unit was moved or converted after its first forward pass, which FSDP1 does not "
            "notice; do that before"
        )
    if handle._use_orig_params and not handle._skipped_use_sharded_views:
        start, item = flat.data_ptr(), flat.element_size()
        for parameter, info, shard in zip(flat._params, flat._param_infos, flat._shard_param_infos, strict=True):
            if shard.numel_in_shard and (
                info.module._parameters.get(info.param_name) is not parameter
                or parameter.data_ptr() != start + shard.offset_in_shard * item
            ):
                raise ValueError(
                    f"{path}: parameter {info.param_name} of {info.module_name or 'it'} was given another tensor, "
                    "which FSDP1 takes over in the next forward pass only; change it in place, with copy_"
                )


def _let_go(unit: FullyShardedDataParallel, handle: FlatParamHandle, flat: Any) -> None:
    """Frees what is gathered; the next forward, or the backward, gathers anew."""
    names = ("_full_param_padded", "_full_prec_full_param_padded")
    storages = [getattr(flat, name).untyped_storage() for name in names if hasattr(flat, name)]
    if any(storage.size() for storage in storages):
        _reshard(unit, handle, True)
        for storage in storages:  # of the two only that of the present mode was freed
            storage.resize_(0)


def _known_equal(unit: FullyShardedDataParallel) -> tuple[int, ...]:
    """The ranks among which equal ranges of a unit's parameters are known to be equal."""
    parts = dist.get_process_group_ranks(unit.process_group)
    own = unit.__dict__  # a unit looks for attributes it has not got in what it wraps
    if (copies := own.get("_inter_node_pg")) is None:
        return tuple(parts)
    if (mesh := own.get("_device_mesh")) is not None:
        return tuple(sorted(mesh.mesh.flatten().tolist()))
    if len(parts) * copies.size() == dist.get_world_size():
        return tuple(range(dist.get_world_size()))
    return tuple(dist.get_process_group_ranks(copies))


@lru_cache(maxsize=65536)
def _boxes(
    shape: tuple[int, ...], strides: tuple[int, ...], start: int, count: int
) -> tuple[tuple[Box, tuple[int, ...], int], ...]:
    """The boxes that are a run of a parameter's elements in the order of its memory; for each the strides it has in the
    run, and where it starts there. ``ValueError`` for a parameter with gaps."""
    if 0 in shape:
        return ()
    # From the slowest dimension to the fastest: a weight in channels_last has its memory in another order than C.
    order = sorted(range(len(shape)), key=lambda d: (-strides[d] if shape[d] != 1 else 0, d))
    step = 1
    for dim in reversed(order):
        if shape[dim] != 1 and strides[dim] != step:
            raise ValueError(f"of shape {list(shape)} and strides {list(strides)} has gaps")
        step *= shape[dim]
    found = []
    skip = 0
    for run in boxes_of_flat_range([shape[dim] for dim in order], start, start + count):
        offsets, sizes, steps = [0] * len(shape), [0] * len(shape), [0] * len(shape)
        step = 1
        for dim, at, size in reversed(list(zip(order, run.offsets, run.sizes, strict=True))):
            offsets[dim], sizes[dim], steps[dim] = at, size, step
            step *= size
        found.append((Box(tuple(offsets), tuple(sizes)), tuple(steps), skip))
        skip += run.elements
    return tuple(found)
