"""Values that each rank has of its own, and how a job of another size makes its own of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
import torch
from torch import nn

from fastckpt.errors import LimitExceeded, RestoreError, SnapshotDamaged, StorageError
from fastckpt.format.dtype import item_bytes
from fastckpt.format.shard import Box
from fastckpt.format.tables import SHARED
from fastckpt.job.tensors import Shard
from fastckpt.job.values import from_plain, references, torch_dtype
from fastckpt.plan.restore_plan import Want
from fastckpt.repository.reader import ArraySink

if TYPE_CHECKING:
    from fastckpt.restore import SavedValue

Merge: TypeAlias = Callable[[Sequence[Any], int, int], Any]
"""``merge(states, rank, world_size)``: the state of a rank of this job, from those of all ranks that saved."""


@dataclass(eq=False)
class PerRank:
    """An item of the state that each rank has of its own, even where all happen to be equal.

    ``obj`` has ``state_dict`` and ``load_state_dict`` (a data loader, a sampler), or is a plain value. A snapshot does
    not say whether what it holds was saved with PerRank or without; either restores from the other.

    A job of the size that saved gives each rank its own back: by ``obj.load_state_dict``, or, for a plain value, as the
    new ``obj``. In a job of another size every rank calls ``merge(states, rank, world_size)``:

    * ``states``: what the ranks that saved had, in rank order: a sequence of plain values, tensors on the CPU. Each is
      read from the snapshot when it is asked for, so one that is large costs a rank only what it looks at, and is
      merge's own to change;
    * ``rank`` and ``world_size``: of this job;
    * what it returns is given to ``obj.load_state_dict``, or becomes ``obj``.

    It runs on the thread that restores, on all ranks at the same time, and must not wait for other ranks. It is called
    when all that this rank asks for is known to fit, and before anything in the state changes on any rank: if it
    raises, all ranks raise ``RestoreError`` naming the item, and nothing has changed. Without ``merge`` a job of
    another size gets ``StateMismatch``.

    For example, readers that share the data between them go on behind all that was read::

        def merge(states, rank, world_size):
            return {"position": sum(state["position"] for state in states)}

        state = {"model": model, "reader": fastckpt.PerRank(reader, merge=merge)}

    ``TypeError`` for modules, optimizers, tensors and ``Shard``, whose parts have names of their own in the state.
    """

    obj: Any
    merge: Merge | None = None

    def __post_init__(self) -> None:
        if isinstance(self.obj, nn.Module | torch.optim.Optimizer | torch.Tensor | Shard | PerRank):
            raise TypeError(
                f"PerRank of a {type(self.obj).__name__}: it is for objects with a state_dict and for plain values. If "
                "each rank has its own, give it a name of its own in the state, such as f'experts.{rank}'"
            )
        if self.merge is not None and not callable(self.merge):
            raise TypeError(f"PerRank: merge is a function of states, rank and world_size, not {self.merge!r}")


class States(Sequence[Any]):
    """What the ranks of a snapshot saved under one name, in rank order; each read when it is asked for."""

    def __init__(self, saved: SavedValue) -> None:
        self._saved = saved

    def __len__(self) -> int:
        return len(self._saved.ranks)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._state(rank) for rank in self._saved.ranks[index]]
        return self._state(self._saved.ranks[index])

    def _state(self, rank: int) -> Any:
        snapshot = self._saved.snapshot
        tree = snapshot.value(self._saved.name, rank)
        tensors: dict[str, torch.Tensor] = {}
        for key in references(tree):
            for number in (snapshot.key_number(key, owner) for owner in (rank, SHARED)):
                if number is not None and key not in tensors:
                    tensors[key] = self._tensor(number)
        return from_plain(tree, tensors)

    def _tensor(self, number: int) -> torch.Tensor:
        snapshot, layout = self._saved.snapshot, self._saved.snapshot.layout
        shape, dtype = tuple(layout.shapes[number]), layout.dtypes[number]
        box = Box.whole(shape)
        try:
            array = np.empty((*shape, item_bytes(dtype)), np.uint8)
        except (MemoryError, ValueError) as error:
            raise LimitExceeded(
                f"step {snapshot.step}: {layout.label(number)} of shape {list(shape)} does not fit into memory: {error}"
            ) from error
        if box.elements:
            snapshot.read_into([Want(number, box, 0)], [ArraySink(box, array)])
        return torch.from_numpy(array.reshape(-1)).view(torch_dtype(dtype)).reshape(shape)


def merged(name: str, merge: Merge, saved: SavedValue, rank: int) -> Any:
    """What ``merge`` makes of the saved states; ``RestoreError`` naming the item if it raises."""
    try:
        return merge(States(saved), rank, saved.world_size)
    except (SnapshotDamaged, StorageError):
        raise
    except Exception as error:
        raise RestoreError(
            f"{name}: merge raised {type(error).__name__}: {error}. It had the states of the {len(saved.ranks)} ranks "
            f"that saved step {saved.snapshot.step}, for rank {rank} of {saved.world_size}; nothing was changed"
        ) from error
