"""Which keys of a state are one tensor; tensors that share only part of their memory are refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from fastckpt.job.tensors import Held
from fastckpt.plan.save_plan import OWN


def find_aliases(held: Mapping[str, Held]) -> dict[str, str]:
    """Keys that are the same tensor as an earlier one. ``ValueError`` where tensors share only part of their memory."""
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    extents: list[tuple[str, int, int, str, torch.Tensor]] = []
    for key in sorted(held):
        entry = held[key]
        if entry.sharing == OWN:
            continue
        target = first.setdefault(entry.identity, key)
        if target != key:
            aliases[key] = target
            continue
        for _, view in entry.pieces:
            start = view.data_ptr()
            span = 1 + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
            extents.append((str(view.device), start, start + span * view.element_size(), key, view))
    extents.sort(key=lambda extent: extent[:4])
    for number, (device, _, end, key, view) in enumerate(extents):
        for other_device, start, _, other, other_view in extents[number + 1 :]:
            if device != other_device or start >= end:
                break
            if other != key and _share_elements(view, other_view):
                raise ValueError(
                    f"{key} and {other} share part of their memory, so that restoring one would change the other; "
                    "leave one out of the state, or clone it"
                )
    return aliases


def _share_elements(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors whose extents overlap have a byte in common: column views of one matrix have none."""
    first, second = sorted((a, b), key=lambda view: view.data_ptr())
    apart = second.data_ptr() - first.data_ptr()
    return _overlap(apart, *((tuple(view.shape), view.stride(), view.element_size()) for view in (first, second)))


_Form = tuple[tuple[int, ...], tuple[int, ...], int]


@lru_cache(maxsize=4096)
def _overlap(apart: int, first: _Form, second: _Form) -> bool:
    """Whether two views have a byte in common, the second of which starts ``apart`` bytes behind the first."""
    (shape, stride, item), (other_shape, other_stride, other_item) = first, second
    if len(shape) == 2 and stride == other_stride and stride[1] == 1 and item == other_item and apart % item == 0:
        # Blocks of one matrix, counted from the first column of the first: apart if their columns are.
        column = apart // item % stride[0]
        if column + other_shape[1] <= stride[0]:
            return column < shape[1]
    marks = [_marks(start, form) for start, form in ((0, first), (apart, second))]
    size = min(mark.numel() for mark in marks)
    return bool((marks[0][:size] & marks[1][:size]).any())


def _marks(start: int, form: _Form) -> torch.Tensor:
    shape, stride, item = form
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    marks = torch.zeros(start + span * item, dtype=torch.bool)
    marks.as_strided((*shape, item), (*(step * item for step in stride), 1), start).fill_(True)
    return marks
