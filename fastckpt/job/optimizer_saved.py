"""An optimizer as the ranks of a snapshot saved it, put together by the names of its parameters.

Each rank has saved a value for the parameters it had (``job/optimizer`` says what is in it): a stage of a pipeline has
others than the next. However they were grouped, and on whichever rank they were, a parameter is found by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastckpt.format import value
from fastckpt.job.values import references
from fastckpt.plan.restore_plan import Selection

if TYPE_CHECKING:
    from fastckpt.job.targets import RestoredValue


class NoOptimizer(Exception):
    """The value is not that of an optimizer; says so, for the user."""


class RanksDiffer(Exception):
    """Ranks saved different things of a parameter, and none of them is this rank's own; says so, for the user."""


@dataclass(frozen=True)
class SavedParameter:
    """One parameter as one rank saved it."""

    group: int
    options: Mapping[str, Any]
    """Of its group, but for the names of its members, which a restore leaves to the state."""
    entries: tuple[Any, ...] | None
    """What was kept for it, in order; None if another rank kept it."""
    trees: Mapping[Any, Any]
    """Those of the entries that are plain values."""


class SavedOptimizer:
    """What a restore finds of an optimizer; parameters by the names they have in the state."""

    def __init__(
        self,
        name: str,
        found: RestoredValue,
        wanted: Collection[str],
        selection: Selection,
        stored_directly: Callable[[str], Sequence[str]],
    ) -> None:
        """``wanted``: the parameters of the state. ``stored_directly(parameter)`` lists the entries that are tensors of
        their own, for values that do not say. ``NoOptimizer`` if the value is another."""
        self.unused: list[str] = []
        """Saved parameters that are not wanted, and of which no tensor of their own tells."""
        self.local: set[str] = set()
        """Keys of tensors with dimensions that were not distributed though their parameter was."""
        self.distributed: set[str] = set()
        """Keys of tensors without dimensions that were distributed."""
        self.moved = False
        """This rank holds other boxes of the parameters than it did in the job of the same size that saved."""
        self._name = name
        self._found = found
        self._wanted = wanted
        self._selection = selection
        self._stored_directly = stored_directly
        self._mine: dict[str, SavedParameter] = {}
        """As this rank saved them, in a world of the same size, or as all did."""
        self._all: dict[str, list[SavedParameter]] = {}
        self._one_for_all = False
        try:
            self._tree: Any = value.decode(found.blob)
            self._read(wanted)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise NoOptimizer(f"{name}: an optimizer in the state, but another value in the snapshot") from error

    def _read(self, wanted: Collection[str]) -> None:
        """Reads what this rank saved and, only if that does not tell all, what the others did."""
        if self._found.exact:
            self._mine = self._parameters(self._tree, wanted)
            if all(own in self._mine and self._mine[own].entries is not None for own in wanted):
                return
        self._read_all(wanted)

    def _read_all(self, wanted: Collection[str]) -> None:
        snapshot, saved = self._found.value.snapshot, self._found.saved
        seen: set[str] = set()
        for rank in range(snapshot.world_size):
            digest = snapshot.value_digests(rank).get(saved)
            if digest is not None and digest not in seen:
                seen.add(digest)
                tree = value.decode(snapshot.value_blob(saved, rank))
                for own, parameter in self._parameters(tree, wanted).items():
                    self._all.setdefault(own, []).append(parameter)

    def moved_from(self, saved: object, here: object) -> None:
        """``saved`` and ``here``: the ``placement`` of this rank then and now. If it holds other parts now, what it
        saved goes no longer before what others did."""
        if self._found.resized or saved == here:
            return
        self.moved = True
        if not self._all:
            self._read_all(self._wanted)
        self._mine.clear()

    def _parameters(self, tree: Any, wanted: Collection[str]) -> dict[str, SavedParameter]:
        lists = tree.get("entries")
        self._one_for_all |= bool(tree.get("common"))
        self.local.update(map(self._selection.renamed, tree.get("local", ())))
        self.distributed.update(map(self._selection.renamed, tree.get("distributed", ())))
        found: dict[str, SavedParameter] = {}
        for at, group in enumerate(tree["param_groups"]):
            options = _without_names(group["options"])
            numbers = group.get("entries", [None] * len(group["params"]))
            for saved, own, number in zip(group["params"], self._renamed(group["params"]), numbers, strict=True):
                trees = tree["state"].get(saved, {})
                if lists is None:  # saved before values had lists of entries
                    entries: tuple[Any, ...] | None = (*self._stored_directly(own), *trees)
                else:
                    entries = None if number is None else tuple(lists[number])
                if own in wanted:
                    found[own] = SavedParameter(at, options, entries, trees)
                elif entries is not None and len(entries) == len(trees) and not references(trees):
                    self.unused.append(own)
        return found

    def _renamed(self, names: Sequence[str]) -> Iterator[str]:
        prefix = f"{self._found.saved}.state."
        for own in names:
            renamed = self._selection.renamed(f"{prefix}{own}.")
            yield renamed.removeprefix(f"{self._name}.state.")[:-1]

    @property
    def exact(self) -> bool:
        """This rank's own, or the same on all ranks."""
        return self._found.exact

    @property
    def one_for_all(self) -> bool:
        """Something was kept for no one parameter."""
        return self._one_for_all

    @property
    def groups(self) -> list[list[str]]:
        """Of this rank's own or, in a world of another size, of the lowest rank that had one."""
        return [list(self._renamed(group["params"])) for group in self._tree["param_groups"]]

    def group_options(self, number: int) -> Mapping[str, Any]:
        """Of one of ``groups``."""
        return _without_names(self._tree["param_groups"][number]["options"])

    def regrouped(self, groups: Sequence[Sequence[str]]) -> str | None:
        """A parameter that is in a group of another number now than where it was saved; None if there is none."""
        for number, names in enumerate(groups):
            for own in names:
                mine = self._mine.get(own)
                if any(each.group != number for each in ([mine] if mine else self._all.get(own, []))):
                    return own
        return None

    @property
    def common(self) -> Mapping[Any, Any]:
        """What was kept for no one parameter."""
        found: Mapping[Any, Any] = self._tree.get("common", {})
        return found

    def options(self, own: str) -> Mapping[str, Any] | None:
        """The options of the group a parameter was in; None if no rank had it. ``RanksDiffer``."""
        if own in self._mine:
            return self._mine[own].options
        found = [each.options for each in self._all.get(own, ())]
        self._check_same(own, "options", found)
        return found[0] if found else None

    def kept(self, own: str) -> SavedParameter | None:
        """What was kept for a parameter; None if no rank had it. ``RanksDiffer``."""
        mine = self._mine.get(own)
        if mine is not None and mine.entries is not None:
            return mine
        found = self._all.get(own, [])
        full = [each for each in found if each.entries]
        self._check_same(own, "state", [(each.entries, each.trees) for each in full])
        return next(iter(full or found), None)

    def _check_same(self, own: str, what: str, found: Sequence[object]) -> None:
        if not all(same(each, found[0]) for each in found[1:]):
            raise RanksDiffer(
                f"{self._name}: ranks saved different {what} for parameter {own}, and none of them is this rank's own; "
                "restore it on the ranks it was saved on"
            )


def _without_names(options: Mapping[str, Any]) -> dict[str, Any]:
    # Of an optimizer that was given named_parameters(): the members of the group as they were called there.
    return {option: setting for option, setting in options.items() if option != "param_names"}


def same(a: object, b: object) -> bool:
    """Whether two trees are equal, NaN to NaN."""
    return a is b or a == b or value.encode(a) == value.encode(b)
