"""What the user's state holds: names, shapes and boxes of its tensors as they lie on this rank, and its plain values.

Describing only looks. It takes no optimizer step, runs no collective and copies no tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastckpt.errors import FormatError
from fastckpt.format.dtype import ITEM_BYTES
from fastckpt.format.shard import Box, check_inside
from fastckpt.job import dtensor
from fastckpt.job.values import to_plain
from fastckpt.plan.save_plan import COMPARED, KNOWN, LOWEST, OWN

TARGET_ONLY_OPTIONS = frozenset({"capturable", "differentiable", "foreach", "fused"})
"""Options of a parameter group that say how a step is computed, not what it computes: a restore keeps the target's."""


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state: schedulers, data loaders, samplers, scalers."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass(frozen=True)
class Shard:
    """This rank's box of a larger tensor: experts, pipeline stages, hand-made tensor parallelism.

    ``tensor`` holds the elements from ``offsets`` on of a tensor of ``shape``. Ranks may hold equal boxes (then the
    content must be equal) but not overlapping ones, and together they must hold all of it.
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


class RNGState:
    """The random number generators of this rank: Python's, NumPy's, torch's on the CPU and on the accelerator.

    Restored at another world size, each rank derives new streams from the saved state of rank 0 and its own rank.
    """

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        if (device := _accelerator()) is not None:
            state["accelerator"] = torch.get_device_module(device).get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        # A snapshot of a machine without an accelerator leaves that generator as it is, and the other way round.
        if (device := _accelerator()) is not None and "accelerator" in state:
            torch.get_device_module(device).set_rng_state(state["accelerator"].cpu())

    def derive(self, saved: bytes, rank: int) -> None:
        """Seeds everything from a saved state and the rank: new streams, the same ones every time."""
        seed = int.from_bytes(hashlib.blake2b(saved + rank.to_bytes(8, "little"), digest_size=8).digest(), "little")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


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


@dataclass
class Description:
    """The state of this rank. ``values`` are trees that ``format/value.py`` can encode."""

    held: dict[str, Held]
    aliases: dict[str, str]
    """Keys that are the same tensor as an earlier key of ``held``."""
    values: dict[str, object]
    optimizers: list[torch.optim.Optimizer]
    mesh: DeviceMesh | None
    """The device mesh of the first distributed parameter, for the environment record."""


def describe(state: Mapping[str, Any]) -> Description:
    """Describes a user's state. ``ValueError`` or ``TypeError`` naming the key of anything that cannot be saved."""
    walk = _Walk(state)
    for name, item in state.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"names in the state are non-empty strings, not {name!r}")
        walk.item(name, item)
    aliases = _find_aliases(walk.held)
    for alias, target in aliases.items():
        if walk.held.pop(alias).volatile and not walk.held[target].volatile:
            walk.held[target] = dataclasses.replace(walk.held[target], volatile=True)
    return Description(walk.held, aliases, walk.values, walk.optimizers, walk.mesh)


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


def holds_something(name: str, item: object) -> bool:
    """Whether an item of the state has anything to save: a loss module, for one, has not."""
    return not isinstance(item, nn.Module) or any(describe_modules(name, item))


def hold_shard(key: str, shard: Shard) -> Held:
    """A box of a larger tensor as this rank holds it."""
    if isinstance(shard.tensor, DTensor):
        raise TypeError(f"{key}: a Shard of a DTensor; a DTensor knows its own boxes, save it as it is")
    local = hold(key, shard.tensor)
    box = Box(tuple(shard.offsets), tuple(shard.tensor.shape))
    pieces = ((box, shard.tensor.detach()),) if box.elements else ()
    identity = ("shard", tuple(shard.shape), box, local.identity)
    return Held(key, tuple(shard.shape), local.dtype, pieces, COMPARED, (), True, identity)


def describe_modules(name: str, root: nn.Module) -> tuple[list[Held], dict[str, nn.Module]]:
    """The parameters and persistent buffers below a module, and the modules that have an extra state, by its key."""
    held: list[Held] = []
    extra: dict[str, nn.Module] = {}
    for path, module, replicas in walk_modules(root):
        prefix = f"{name}.{path}." if path else f"{name}."
        for own, parameter in module._parameters.items():
            if parameter is not None:
                among = replicas.of(f"{path}.{own}" if path else own)
                sharing = KNOWN if among else COMPARED
                held.append(hold(prefix + own, parameter, sharing=sharing, among=among))
        for own, buffer in module._buffers.items():
            if buffer is not None and own not in module._non_persistent_buffers_set:
                held.append(hold(prefix + own, buffer, sharing=LOWEST, volatile=True))
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            extra[f"{prefix}_extra_state"] = module
    return held, extra


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


class _Walk:
    def __init__(self, state: Mapping[str, Any]) -> None:
        self.held: dict[str, Held] = {}
        self.values: dict[str, object] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.mesh: DeviceMesh | None = None
        self.names = ParameterNames(state)

    def item(self, name: str, item: Any) -> None:
        if isinstance(item, nn.Module):
            self.module(name, item)
        elif isinstance(item, torch.optim.Optimizer):
            self.optimizer(name, item)
        elif isinstance(item, Shard):
            self.add(hold_shard(name, item))
        elif isinstance(item, torch.Tensor):
            self.add(hold(name, item, volatile=True))
        else:
            self.value(name, item.state_dict() if isinstance(item, Stateful) else item)

    def add(self, held: Held) -> None:
        if held.key in self.held:
            raise ValueError(f"{held.key}: two things in the state have this key; rename one")
        self.held[held.key] = held

    def module(self, name: str, root: nn.Module) -> None:
        held, extra = describe_modules(name, root)
        for entry in held:
            self.add(entry)
        meshes = (parameter.device_mesh for parameter in root.parameters() if isinstance(parameter, DTensor))
        self.mesh = self.mesh or next(meshes, None)
        for key, module in extra.items():
            self.value(key, module.get_extra_state())

    def optimizer(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        self.optimizers.append(optimizer)
        names = self.names.of(optimizer)
        scalars: dict[str, dict[str, object]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                own = names[id(parameter)]
                among = self.names.replicas(parameter)
                for entry, value in optimizer.state.get(parameter, {}).items():
                    key = f"{name}.state.{own}.{entry}"
                    if not isinstance(entry, str) or "." in entry:
                        raise TypeError(f"{key}: names of optimizer state are strings without dots, not {entry!r}")
                    if isinstance(value, torch.Tensor):
                        self.add(hold(key, value, sharing=KNOWN if among else COMPARED, among=among))
                    elif value is None or isinstance(value, bool | int | float | str):
                        scalars.setdefault(own, {})[entry] = value
                    else:
                        raise TypeError(
                            f"{key}: optimizer state may be tensors and numbers; "
                            f"a {type(value).__name__} cannot be saved yet"
                        )
        groups = [
            {
                "params": [names[id(parameter)] for parameter in group["params"]],
                "options": {entry: value for entry, value in group.items() if entry != "params"},
            }
            for group in optimizer.param_groups
        ]
        self.value(name, {"param_groups": groups, "state": scalars})

    def value(self, name: str, value: object) -> None:
        tree, tensors = to_plain(value, name)
        for key, tensor in tensors:
            self.add(hold(key, tensor, sharing=OWN, volatile=True))
        if name in self.values:
            raise ValueError(f"{name}: two things in the state have this name; rename one")
        self.values[name] = tree


@dataclass(frozen=True)
class Replicas:
    """The ranks DDP keeps parameters equal on, except those it was told to ignore."""

    ranks: tuple[int, ...] = ()
    root: str = ""
    """Path of the module that DDP wraps."""
    ignored: frozenset[str] = frozenset()

    def of(self, path: str) -> tuple[int, ...]:
        """The ranks that are known to hold the parameter at ``path`` equal; none if nothing is known."""
        own = path.removeprefix(f"{self.root}.") if self.root else path
        return () if own in self.ignored else self.ranks


def walk_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module, Replicas]]:
    """Every module below ``root`` with its path, wrappers left out, and what DDP keeps equal there.

    A module reached by two paths comes twice: its tensors then are tied.
    """

    def visit(path: str, module: nn.Module, replicas: Replicas) -> Iterator[tuple[str, nn.Module, Replicas]]:
        while (inner := _unwrapped(module)) is not None:
            if isinstance(module, DistributedDataParallel):
                ranks = tuple(torch.distributed.get_process_group_ranks(module.process_group))
                replicas = Replicas(ranks, path, frozenset(module.parameters_to_ignore))
            module = inner
        if isinstance(module, FullyShardedDataParallel):
            raise TypeError(
                f"{path or 'the module'}: FSDP1 (FullyShardedDataParallel) is not supported yet; use "
                "torch.distributed.fsdp.fully_shard, whose snapshots any layout can restore"
            )
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without backward the parameters still are the gathered ones
        yield path, module, replicas
        for name, child in module._modules.items():
            if child is not None:
                yield from visit(f"{path}.{name}" if path else name, child, replicas)

    return visit("", root, Replicas())


def _unwrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper wraps, told by the wrapper's type; None for a module that is no wrapper."""
    inner: Any = None
    if isinstance(module, DistributedDataParallel):
        inner = module.module
    elif isinstance(module, CheckpointWrapper):
        inner = module._checkpoint_wrapped_module
    elif isinstance(module, torch._dynamo.OptimizedModule):
        inner = module._orig_mod
    return inner if isinstance(inner, nn.Module) else None


class ParameterNames:
    """Names of the parameters an optimizer works on: those they have in the modules of the same state.

    The name is the parameter's name in its module; where an optimizer works on several modules of the state, the
    module's name comes before it; a parameter in no module of the state is named by group and position.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._found: dict[int, tuple[str, str, tuple[int, ...]]] = {}
        for name, root in state.items():
            if isinstance(root, nn.Module):
                for path, module, replicas in walk_modules(root):
                    for own, parameter in module._parameters.items():
                        if parameter is not None:
                            full = f"{path}.{own}" if path else own
                            found = (name, full, replicas.of(full))
                            self._found.setdefault(id(parameter), found)

    def of(self, optimizer: torch.optim.Optimizer) -> dict[int, str]:
        """The name of each parameter of ``optimizer``, by ``id``."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        modules = {self._found[id(parameter)][0] for parameter in parameters if id(parameter) in self._found}
        names: dict[int, str] = {}
        for number, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                module, path, _ = self._found.get(id(parameter), ("", f"{number}.{position}", ()))
                names[id(parameter)] = f"{module}.{path}" if len(modules) > 1 and module else path
        return names

    def replicas(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """The ranks DDP keeps this parameter equal on, or none."""
        return self._found.get(id(parameter), ("", "", ()))[2]


def _find_aliases(held: Mapping[str, Held]) -> dict[str, str]:
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


def broken_step_hook_reason(optimizers: list[torch.optim.Optimizer]) -> str | None:
    """Why the optimizer-step hook cannot be relied on for these optimizers, or None."""
    for optimizer in optimizers:
        if any(group.get("capturable") for group in optimizer.param_groups):
            return "a capturable optimizer may step inside a captured graph, which runs no hooks"
    return None
