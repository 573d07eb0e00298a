"""An optimizer of the state: the tensors it keeps for each parameter, and the rest as a plain value.

The value is ``{"param_groups": [{"params": names, "options": {...}, "entries": numbers}], "entries": [[entry, ...],
...], "state": {name: {entry: tree}}, "local": keys, "distributed": keys, "common": {entry: tree}}``. For each
parameter, ``entries`` has the number of the list of what is kept for it, in that order, or None where another rank
keeps it. An entry that is in ``state`` is a plain value, with references to the tensors in it; any other is the tensor
``<optimizer>.state.<name>.<entry>``. Of what is kept for distributed parameters, ``local`` are the tensors with
dimensions that are not distributed, ``distributed`` those without that are. ``common`` is what is kept for no one
parameter. Where ranks hold parts of parameters, a value of its own, ``<optimizer>.placement``, has a digest of the
boxes that this rank holds of all of them, in their order: what is its own goes back to the same boxes, to no others.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from fastckpt.format.value import DEPTH_MAX, TensorReference
from fastckpt.job.modules import Boxed, Owned, Parameters, Place
from fastckpt.job.tensors import Held, hold
from fastckpt.plan.save_plan import OWN

TARGET_ONLY_OPTIONS = frozenset({"capturable", "differentiable", "foreach", "fused"})
"""Options of a parameter group that say how a step is computed, not what it computes: a restore keeps the target's."""


def describe_optimizer(
    name: str, optimizer: torch.optim.Optimizer, parameters: Parameters
) -> tuple[list[Held], dict[str, Any], bytes | None]:
    """The tensors of an optimizer's state, the value with all else but ``options``, and the ``placement`` if it
    matters."""
    keeper = state_keeper(name, optimizer)
    kept = _Kept(name)
    groups: list[dict[str, object]] = []
    for members in parameters.of(optimizer):
        names: list[str] = []
        numbers: list[int | None] = []
        for owned in members:
            state = keeper.state.get(owned.parameter, {})
            for own, place in owned.places:
                names.append(own)
                if place.has_state and keeper.keeps(owned.parameter):
                    numbers.append(kept.number(tuple(state)))
                    kept.state_of(own, place, owned, state)
                elif state and not place.has_state:
                    raise ValueError(
                        f"{name}: keeps {sorted(map(str, state))} for {own}, of which FSDP1 has no elements on this "
                        "rank; use torch.distributed.fsdp.fully_shard"
                    )
                else:
                    numbers.append(None)
        groups.append({"params": names, "entries": numbers})
    for entry, item in keeper.common():
        kept.common[entry] = kept.tree(item, f"{name}.common.{entry}", lambda key, one: hold(key, one, sharing=OWN))
    tree: dict[str, Any] = {"param_groups": groups, "entries": list(map(list, kept.entries)), "state": kept.trees}
    rest = {"local": kept.local, "distributed": kept.distributed, "common": kept.common}
    may_be_own = kept.trees or any(held.sharing == OWN for held in kept.held)
    placed = placement(parameters.of(optimizer)) if may_be_own else None
    return kept.held, tree | {member: found for member, found in rest.items() if found}, placed


def with_options(tree: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The value of an optimizer, of which ``describe_optimizer`` has given all but the options, which change."""
    groups = []
    for group, described in zip(optimizer.param_groups, tree["param_groups"], strict=True):
        options = {option: group[option] for option in group if option != "params"}
        groups.append({"params": described["params"], "options": options, "entries": described["entries"]})
    return {**tree, "param_groups": groups}


def placement(members: Sequence[Sequence[Owned]]) -> bytes | None:
    """A digest of the boxes that this rank holds of an optimizer's parameters; None if it has all of them whole."""
    held = [place.boxes for owners in members for owned in owners for _, place in owned.places]
    if all(boxes is None for boxes in held):
        return None
    texts = ("whole" if boxes is None else repr([box for box in boxes if box.elements]) for boxes in held)
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=16).digest()


@dataclass
class _Kept:
    """What one optimizer keeps, as it is found."""

    name: str
    held: list[Held] = field(default_factory=list)
    entries: dict[tuple[object, ...], int] = field(default_factory=dict)
    """Lists of entries, by which they are numbered."""
    trees: dict[str, dict[object, object]] = field(default_factory=dict)
    local: list[str] = field(default_factory=list)
    distributed: list[str] = field(default_factory=list)
    common: dict[object, object] = field(default_factory=dict)

    def number(self, entries: tuple[object, ...]) -> int:
        return self.entries.setdefault(entries, len(self.entries))

    def state_of(self, own: str, place: Place, owned: Owned, state: Mapping[Any, Any]) -> None:
        """What is kept for one parameter."""
        before = len(self.held)
        for entry, item in state.items():
            key = f"{self.name}.state.{own}.{entry}"
            if isinstance(item, torch.Tensor) and is_direct(entry):
                self.held.append(place.hold(key, item))
                continue
            count = len(self.held)
            tree = self.tree(item, key, lambda key, tensor: _hold_nested(key, tensor, place))
            if len(owned.places) > 1 and len(self.held) > count:
                raise TypeError(
                    f"{key}: holds tensors inside other objects, kept for a flat parameter of several; use "
                    "FullyShardedDataParallel(..., use_orig_params=True), or torch.distributed.fsdp.fully_shard"
                )
            self.trees.setdefault(own, {})[entry] = tree
        if isinstance(owned.parameter, DTensor):  # then so is what has its dimensions, and a number is not
            for held in self.held[before:]:
                if held.sharing == OWN and held.shape:
                    self.local.append(held.key)
                elif held.sharing != OWN and not held.shape:
                    self.distributed.append(held.key)

    def tree(self, item: object, key: str, held: Callable[[str, torch.Tensor], Held]) -> object:
        tree, tensors = without_tensors(item, key)
        self.held += [held(at, tensor) for at, tensor in tensors]
        return tree


def is_direct(entry: object) -> bool:
    """Whether a tensor under this entry has a key that tells the entry, and needs no mention in the value."""
    return type(entry) is str and entry != "" and "." not in entry


def without_tensors(item: object, key: str) -> tuple[object, list[tuple[str, torch.Tensor]]]:
    """``item`` with a reference in place of every tensor, and the tensors by key.

    Unlike other values' tensors none travels inside the value, however small: together they are as large as the model.
    Keys depend on the structure alone.
    """
    tensors: dict[str, torch.Tensor] = {}

    def visit(item: Any, key: str, depth: int) -> object:
        kind: Any = type(item)
        if isinstance(item, torch.Tensor):
            # {"a.b": ...} and {"a": {"b": ...}} ask for the same key.
            others = (f"{key}#{count}" for count in itertools.count(2))
            free = next(each for each in itertools.chain((key,), others) if each not in tensors)
            tensors[free] = item
            return TensorReference(free)
        if depth > DEPTH_MAX:  # refused, by name, by whoever encodes it
            return item
        if kind in (dict, OrderedDict):
            return kind((at, visit(each, f"{key}.{at}", depth + 1)) for at, each in item.items())
        if kind in (list, tuple, deque):
            items = [visit(each, f"{key}.{at}", depth + 1) for at, each in enumerate(item)]
            return deque(items, item.maxlen) if kind is deque else kind(items)
        return item

    return visit(item, key, 0), list(tensors.items())


def _hold_nested(key: str, tensor: torch.Tensor, place: Place) -> Held:
    if isinstance(place, Boxed) and not isinstance(tensor, DTensor):
        # A factor may have the form of the box by chance: only what is kept under a name of its own is taken for it.
        return hold(key, tensor, sharing=OWN)
    held = place.hold(key, tensor)
    if isinstance(tensor, DTensor) or held.shape != tuple(tensor.shape):
        return held
    # Factors and the like may be shared out among the ranks in ways that nothing here knows of.
    return replace(held, sharing=OWN, among=())


@dataclass(frozen=True)
class StateKeeper:
    """Where an optimizer has its state on this rank."""

    name: str
    optimizer: torch.optim.Optimizer
    state: Any
    """By parameter; what is kept for no one parameter is under other keys."""
    mine: frozenset[int] | None = None
    """Ids of the parameters whose state is kept on this rank, if not of all."""

    def keeps(self, parameter: torch.Tensor) -> bool:
        """Whether the state of ``parameter`` is kept on this rank."""
        return self.mine is None or id(parameter) in self.mine

    def common(self) -> Iterator[tuple[Any, Any]]:
        """What is kept for no one parameter. ``ValueError`` for state of a parameter that is in no group."""
        known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for key, state in self.state.items():
            if not isinstance(key, torch.Tensor):
                yield key, state
            elif id(key) not in known and state:
                raise ValueError(
                    f"{self.name}: keeps {sorted(map(str, state))} for a parameter of shape {list(key.shape)} that is "
                    "in none of its groups; delete it from the optimizer's state, or add the parameter to a group"
                )


def state_keeper(name: str, optimizer: torch.optim.Optimizer) -> StateKeeper:
    """Where ``optimizer`` has its state; ``ValueError`` for one that wraps others which keep theirs to themselves."""
    # Importing it costs time and warns; an optimizer of the class can only be there if its module is.
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer):
        if not hasattr(optimizer, "optim"):
            raise ValueError(
                f"{name}: a ZeroRedundancyOptimizer with overlap_with_ddp=True has no state before its first steps; "
                "save and restore after them, or use overlap_with_ddp=False"
            )
        inner = optimizer.optim
        mine = frozenset(id(parameter) for group in inner.param_groups for parameter in group["params"])
        return StateKeeper(name, optimizer, inner.state, mine)
    for attribute, wrapped in _wrapped(optimizer):
        if wrapped.state is not optimizer.state:
            raise ValueError(
                f"{name}: a {type(optimizer).__qualname__} that wraps another optimizer ({attribute}, a "
                f"{type(wrapped).__qualname__}) without showing its state; put the optimizers inside into the state, "
                "each under a name of its own, or an object of your own with state_dict and load_state_dict"
            )
    return StateKeeper(name, optimizer, optimizer.state)


def _wrapped(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    for attribute, item in vars(optimizer).items():
        if attribute in ("state", "param_groups"):
            continue
        members: Any = (item,)
        if isinstance(item, Mapping):
            members = item.values()
        elif isinstance(item, list | tuple):
            members = item
        for member in members:
            if isinstance(member, torch.optim.Optimizer) and member is not optimizer:
                yield attribute, member


def broken_step_hook_reason(optimizers: list[torch.optim.Optimizer]) -> str | None:
    """Why the optimizer-step hook cannot be relied on for these optimizers, or None."""
    for optimizer in optimizers:
        if any(group.get("capturable") for group in optimizer.param_groups):
            return "a capturable optimizer may step inside a captured graph, which runs no hooks"
    return None
