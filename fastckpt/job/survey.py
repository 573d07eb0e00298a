"""A quick look at a state: everything that the description of its modules, tensors and optimizers is made from.

Describing takes tens of microseconds a tensor, a survey about one. Two surveys with equal facts are described alike, so
a description without its tensors may be used again. Plain values are not looked at: they are read anew for each save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastckpt.job.modules import has_extra_state, inner_name, kept_equal
from fastckpt.job.optimizer import state_keeper
from fastckpt.job.tensors import Shard

_PLAIN = frozenset({torch.Tensor, nn.Parameter})


class _Kind(NamedTuple):
    """What the type of a module says of it."""

    inner: str | None
    extra: bool
    sharded: bool
    """By FSDP2."""


class Survey:
    """What one look has found. It holds the tensors, and is to be let go of when the description is made."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        """Parameters that a forward under FSDP2 left gathered are let go of."""
        self._facts: list[object] = []
        self._found: list[Any] = []
        """Everything that is where a tensor may be, in the order of the walk."""
        self._telling = True
        self._kinds: dict[type, _Kind] = {}
        self.extra: list[nn.Module] = []
        """The modules that have an extra state, once for each of their paths, in the order of the walk."""
        optimizers: list[tuple[str, torch.optim.Optimizer]] = []
        for name, item in state.items():
            self._facts.append(name)
            if isinstance(item, nn.Module):
                self._module(item)
            elif isinstance(item, torch.optim.Optimizer):
                optimizers.append((name, item))
                self._facts.append("optimizer")
            elif isinstance(item, Shard):
                self._facts.append((tuple(item.offsets), tuple(item.shape)))
                self._found.append(item.tensor)
            elif isinstance(item, torch.Tensor):
                self._facts.append("tensor")
                self._found.append(item)
            else:
                self._facts.append("value")
        for name, optimizer in optimizers:  # which parameters are in no module is known now
            self._optimizer(name, optimizer)
        self.tensors, self._forms = tensor_forms(self._found, pointers=True)
        """The memory of every tensor found, as a tensor of this process."""

    def facts(self) -> list[object] | None:
        """Equal only for states that are described alike. None where this look does not tell enough: FSDP1 units,
        tensors of classes of their own, optimizers that keep other things than tensors.

        Objects are told by ``id``. One that took the place of another that is gone, in everything else the same, is
        described the same.
        """
        if not self._telling or self._forms is None:
            return None
        return [*self._facts, list(map(id, self._found)), *self._forms]

    def _module(self, module: nn.Module) -> None:
        kind = self._kinds.get(type(module)) or self._kind(type(module))
        if kind.sharded:
            module.reshard()  # type: ignore[operator]
        if kind.inner is not None and isinstance(inner := getattr(module, kind.inner), nn.Module):
            self._facts.append(type(module))
            if isinstance(module, FullyShardedDataParallel):
                self._telling = False
            elif isinstance(module, DistributedDataParallel):
                self._facts += (kept_equal(module), frozenset(module.parameters_to_ignore))
            self._module(inner)
            return
        if kind.extra:
            self.extra.append(module)
        parameters, children = module._parameters, module._modules
        passing = module._non_persistent_buffers_set
        buffers = {own: buffer for own, buffer in module._buffers.items() if own not in passing}
        self._facts += (type(module), kind.extra, tuple(parameters), tuple(buffers), tuple(children))
        self._found += parameters.values()
        self._found += buffers.values()
        for child in children.values():
            if child is None:
                self._facts.append(None)
            else:
                self._module(child)

    def _kind(self, kind: type[nn.Module]) -> _Kind:
        found = _Kind(inner_name(kind), has_extra_state(kind), issubclass(kind, FSDPModule))
        self._kinds[kind] = found
        return found

    def _optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        keeper = state_keeper(name, optimizer)
        usual = all(isinstance(key, torch.Tensor) and type(kept) is dict for key, kept in keeper.state.items())
        if keeper.mine is not None or not usual:
            self._telling = False
            return
        known = set(map(id, self._found))
        self._facts.append(len(optimizer.param_groups))
        for group in optimizer.param_groups:
            self._facts.append(list(map(id, group["params"])))
            self._found += [parameter for parameter in group["params"] if id(parameter) not in known]
        self._facts.append(list(map(id, keeper.state)))
        self._facts.append(entries := list(map(tuple, keeper.state.values())))
        self._telling = self._telling and all(type(entry) is str for kept in set(entries) for entry in kept)
        for kept in keeper.state.values():
            self._found += kept.values()


def tensor_forms(found: Sequence[Any], *, pointers: bool) -> tuple[list[torch.Tensor], list[object] | None]:
    """The memory of tensors, without the None among them, and all that their descriptions are made from, with
    ``pointers`` also where the memory is; None instead of all if it cannot be told of some."""
    kinds = list(map(type, found))
    if not {*kinds} <= {*_PLAIN, DTensor, type(None)}:
        return [], None
    forms: list[object] = [kinds]
    tensors: list[torch.Tensor] = list(found)
    if {*kinds} - _PLAIN:
        # A spec says all of the whole tensor. It is not changed, but replaced.
        forms.append([tensor._spec for tensor in found if type(tensor) is DTensor])
        tensors = [each._local_tensor if type(each) is DTensor else each for each in found if each is not None]
        if not set(map(type, tensors)) <= _PLAIN:
            return [], None
    try:
        forms += (
            list(map(torch.Tensor.data_ptr, tensors)) if pointers else (),
            [tensor.layout for tensor in tensors],
            [tensor.shape for tensor in tensors],
            list(map(torch.Tensor.stride, tensors)),
            [tensor.dtype for tensor in tensors],
            [tensor.device for tensor in tensors],
            list(map(torch.Tensor.is_conj, tensors)),
            list(map(torch.Tensor.is_neg, tensors)),
        )
    except RuntimeError:  # sparse, nested: no memory of its own, no strides, or no shape
        return [], None
    return tensors, forms
