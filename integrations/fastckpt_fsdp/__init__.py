"""Snapshots of FSDP training in loops one does not own: FSDP1 and FSDP2, saved after the steps of an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from fastckpt import Callback, Checkpointer

__all__ = ["attach"]

_SHOWN_MAX = 4


def attach(checkpointer: Checkpointer, state: dict[str, Any], stepper: Any, **arguments: Any) -> Callback:
    """Restores ``state`` from the newest snapshot and from then on saves it when due, at the end of each step of
    ``stepper``: an optimizer, or the learning-rate scheduler that steps after it. Returns the callback.

    ``arguments`` are those of ``fastckpt.Callback``, such as ``every_steps``, and mean the same. All ranks call this
    with the same arguments, on the training thread, outside of forward and backward; before the first forward or
    after it is the same. End training with ``on_train_end`` of the callback, which waits for the last save.

    ``ValueError`` if no module of the state is sharded by FSDP, or if an optimizer was made before its model was: it
    then works on parameters that the model has no longer, so that training would change nothing. Besides these, what
    ``Callback.attach`` and ``Checkpointer.restore`` raise.
    """
    modules = [item for item in state.values() if isinstance(item, nn.Module)]
    if not any(isinstance(part, FullyShardedDataParallel | FSDPModule) for each in modules for part in each.modules()):
        raise ValueError(
            "no module of the state is sharded by FSDP; shard the model first and put the sharded one into the state, "
            "or use fastckpt.Callback"
        )
    theirs = {id(parameter) for each in modules for parameter in _of_module(each)}
    for name, optimizer in _optimizers(state, stepper):
        strange = [shown for shown, parameter in _of_optimizer(optimizer) if id(parameter) not in theirs]
        if strange:
            shown = ", ".join(strange[:_SHOWN_MAX])
            more = f" and {len(strange) - _SHOWN_MAX} more" if len(strange) > _SHOWN_MAX else ""
            raise ValueError(
                f"{name}: works on parameters that no module of the state has: {shown}{more}. FSDP "
                "replaces a model's parameters: make the optimizer after the model is sharded"
            )
    return Callback(checkpointer, state, **arguments).attach(stepper)


def _optimizers(state: Mapping[str, Any], stepper: Any) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    yield from ((name, item) for name, item in state.items() if isinstance(item, torch.optim.Optimizer))
    stepping = getattr(stepper, "optimizer", stepper)  # a scheduler's
    if isinstance(stepping, torch.optim.Optimizer) and not any(item is stepping for item in state.values()):
        yield "the optimizer that steps", stepping


def _of_module(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters to make an optimizer of, also after a forward without backward, which leaves others in place."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
        elif isinstance(part, FullyShardedDataParallel) and part._flat_param is not None:
            yield from part._flat_param._params or ()
    yield from module.parameters()


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Nothing knows their names any more: told by group, position and shape."""
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            yield f"param_groups[{number}]['params'][{position}] of shape {list(parameter.shape)}", parameter
