"""What a restore is asked for, and what of a snapshot goes where in the state for that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastckpt.job.asked import Asked, ask
from fastckpt.job.targets import RestoredValue, Targets, find_targets
from fastckpt.plan.restore_plan import Catalog, Fit, Selection
from fastckpt.repository.reader import Snapshot
from fastckpt.restore import values_elsewhere, values_of


@dataclass(frozen=True)
class Request:
    """The arguments of one restore, on one rank."""

    state: dict[str, Any]
    selection: Selection
    asked: Asked
    keep_missing: bool
    cast: bool

    @property
    def names(self) -> list[str]:
        """What the snapshot must have something for."""
        return [] if self.keep_missing else self.asked.names

    def targets(self, snapshot: Snapshot, rank: int, world_size: int) -> tuple[Targets, Fit]:
        """Where in the state of this rank what is stored goes, and how that fits."""
        catalog = Catalog(snapshot.layout, rank, world_size, self.selection)
        found = values_of(snapshot, rank, world_size, self.selection)
        # What is at the top is this rank's own, or missing; below are what modules say of themselves.
        below = {name for name in self.asked.names if name not in self.state}
        found |= values_elsewhere(snapshot, below - {*found, *catalog.tensors}, world_size, self.selection)
        values = {
            name: RestoredValue(saved, exact, snapshot.world_size, saved_name)
            for name, (saved, exact, saved_name) in found.items()
        }
        targets = find_targets(
            self.state,
            catalog,
            values,
            self.selection,
            self.asked,
            keep_missing=self.keep_missing,
            cast=self.cast,
            rank=rank,
        )
        assert targets.fit is not None
        return targets, targets.fit


def checked_request(
    state: object, only: Sequence[str], rename: Mapping[str, str] | None, missing: str, cast: bool, policy: str
) -> Request:
    """The request that these arguments of ``Checkpointer.restore`` are. ``TypeError`` or ``ValueError`` if they are
    wrong, or naming the key of what can be neither saved nor restored."""
    if not isinstance(state, dict):
        raise TypeError(f"the state is a dict of names, such as {{'model': model}}, not a {type(state).__name__}")
    if not all(isinstance(name, str) for name in state):
        raise TypeError(f"names in the state are strings: {list(state)!r}")
    rename = {} if rename is None else rename
    if not isinstance(rename, Mapping) or not all(isinstance(name, str) for name in (*rename, *rename.values())):
        raise TypeError(f"rename={rename!r} is not a mapping of prefixes to prefixes")
    if isinstance(only, str) or not isinstance(only, Collection) or not all(isinstance(each, str) for each in only):
        raise TypeError(f"only={only!r} is not a list of globs")
    if missing not in ("raise", "keep") or policy not in ("strict", "previous"):
        raise ValueError(
            f"missing={missing!r}, policy={policy!r}: missing is 'raise' or 'keep', policy 'strict' or 'previous'"
        )
    if missing == "keep" and policy == "previous":
        raise ValueError(
            "missing='keep' with policy='previous' could keep what was restored from a snapshot that proved to be "
            "damaged; restore with policy='strict', and pass the step to go back to"
        )
    selection = Selection(only, rename)
    return Request(state, selection, ask(state, selection), missing == "keep", cast)
