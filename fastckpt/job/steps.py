"""Steps of optimizers and learning-rate schedulers: seen, and followed, by hooks on them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from fastckpt.job.optimizer import broken_step_hook_reason


class OptimizerSteps:
    """Whether the optimizers of a state have stepped since they were last asked about. On the training thread.

    Optimizers are those found in the state's values. The hooks go with ``close`` or with this object.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._optimizers = [item for item in state.values() if isinstance(item, torch.optim.Optimizer)]
        self._stepped = [False]
        stepped = self._stepped  # alone: a hook that held this object would keep it alive

        def hook(*_: object) -> None:
            stepped[0] = True

        handles = [optimizer.register_step_post_hook(hook) for optimizer in self._optimizers]
        self._finalizer = weakref.finalize(self, _remove_all, handles)

    def take(self) -> bool:
        """Whether any has stepped since this was last called."""
        stepped, self._stepped[0] = self._stepped[0], False
        return stepped

    def hold_gradients(self) -> bool:
        """Whether a parameter of theirs holds a gradient. Never where steps cannot be seen: a captured graph runs no
        hooks."""
        if broken_step_hook_reason(self._optimizers) is not None:
            return False
        groups = (group for optimizer in self._optimizers for group in optimizer.param_groups)
        return any(parameter.grad is not None for group in groups for parameter in group["params"])

    def close(self) -> None:
        self._finalizer()


def _remove_all(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def check_stepper(stepper: object) -> None:
    """``TypeError`` for what ``after_each_step`` does not take."""
    if not isinstance(stepper, torch.optim.Optimizer | LRScheduler):
        raise TypeError(
            f"attach to an optimizer or a learning-rate scheduler of torch.optim, not to a {type(stepper).__name__}; "
            "in a loop of your own, call on_step_end"
        )


def holds_optimizer_of(state: Mapping[str, Any], stepper: Any) -> bool:
    """Whether the optimizer that steps is in a state: as an item, or as an attribute of one, but for schedulers."""
    optimizer = getattr(stepper, "optimizer", stepper)
    items = [item for item in state.values() if not isinstance(item, LRScheduler)]
    return any(item is optimizer or optimizer in getattr(item, "__dict__", {}).values() for item in items)


def after_each_step(stepper: Any, call: Callable[[], None]) -> Callable[[], None]:
    """Has ``call`` called after each ``step`` of an optimizer or a learning-rate scheduler, on the thread that steps;
    what it raises, the step raises. Returns what ends that, and may be called again."""
    # A compiled step would otherwise compile the save too, again and again.
    call = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
    if isinstance(stepper, torch.optim.Optimizer):
        return stepper.register_step_post_hook(lambda *_: call()).remove
    kind = type(stepper)
    original = kind.__dict__.get("__wrapped__", kind)
    attached = True

    def step(self: Any, *arguments: Any, **named: Any) -> Any:
        result = kind.step(self, *arguments, **named)
        if attached:
            call()
        return result

    def reduce(self: Any, _: int) -> Any:
        # A copy is of the class that it was: steps of a copy are no steps of training, and pickle finds it by its name.
        return object.__new__, (original,), self.__getstate__()

    # A class for this one object: whatever is set on the object itself, a scheduler takes for its state.
    names = {"step": step, "__reduce_ex__": reduce, "__wrapped__": original, "__doc__": kind.__doc__}
    own = type(kind.__name__, (kind,), {**names, "__module__": kind.__module__})
    stepper.__class__ = own

    def detach() -> None:
        nonlocal attached
        attached = False  # what was attached later stays, and with it this class
        if type(stepper) is own:
            stepper.__class__ = kind

    return detach


class SchedulersBehind:
    """Tells whether a scheduler of a state stepped after the state was saved and before its optimizer stepped again:
    then the snapshot has it one step behind."""

    def __init__(self, state: Mapping[str, Any], optimizer: object) -> None:
        self._schedulers = {
            name: item
            for name, item in state.items()
            if isinstance(item, LRScheduler) and getattr(item, "optimizer", None) is optimizer
        }
        self._saved: dict[str, object] = {}

    def saved(self) -> None:
        """The state is being saved now."""
        self._saved = {name: scheduler.last_epoch for name, scheduler in self._schedulers.items()}

    def take(self) -> list[str]:
        """At the next step of the optimizer: names of the schedulers that have stepped since ``saved``."""
        saved, self._saved = self._saved, {}
        return [name for name, epoch in saved.items() if self._schedulers[name].last_epoch != epoch]
