"""One network of a topology: which edge lies above which, what they are called, and what each can carry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, overload

import numpy as np
import numpy.typing as npt

from fastckpt.errors import TopologyError

RANKS_MAX: Final = 10**7


class Numbers(Sequence[str]):
    """The names of edges that have none: "0", "1", ..."""

    def __init__(self, count: int) -> None:
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        chosen = self._numbers[index]
        return str(chosen) if isinstance(chosen, int) else [str(number) for number in chosen]


def are_numbers(names: Sequence[str]) -> bool:
    """Whether these names are those that edges without names have."""
    return isinstance(names, Numbers) or all(name == str(number) for number, name in enumerate(names))


@dataclass(frozen=True, eq=False)
class Plane:
    """Paths from ranks to the root of one network. Arrays are as in ``topology.Tree``."""

    levels: tuple[str, ...]
    names: tuple[Sequence[str], ...]
    """By level; of ranks, and of levels that are only counted, ``Numbers``."""
    parents: tuple[npt.NDArray[np.intp], ...]
    capacities: tuple[npt.NDArray[np.float64], ...]

    def __post_init__(self) -> None:
        for array in (*self.parents, *self.capacities):
            array.setflags(write=False)

    def of_job(self, node_of: npt.NDArray[np.intp]) -> Plane:
        """The plane of a job whose rank ``r`` is on node ``node_of[r]``: without the nodes that it does not use, and
        without what nothing is left below."""
        names: list[Sequence[str]] = [Numbers(len(node_of))]
        parents = []
        capacities = [np.full(len(node_of), self.capacities[0][0])]
        above = node_of
        for level in range(1, len(self.levels)):
            used, index = np.unique(above, return_inverse=True)
            parents.append(index.astype(np.intp))
            names.append([self.names[level][edge] for edge in used.tolist()])
            capacities.append(self.capacities[level][used])
            if level < len(self.parents):
                above = self.parents[level][used]
        return Plane(self.levels, tuple(names), tuple(parents), tuple(capacities))

    def with_ranks(self, count: int) -> Plane:
        """The plane with ``count`` ranks on each node, where it has one."""
        nodes = len(self.names[1])
        names = (Numbers(nodes * count), *self.names[1:])
        parents = (np.repeat(self.parents[0], count), *self.parents[1:])
        return Plane(self.levels, names, parents, (np.repeat(self.capacities[0], count), *self.capacities[1:]))


def plane_of_paths(
    paths: Sequence[Sequence[str]], levels: Sequence[str], root: str, capacities: Mapping[str, float]
) -> Plane:
    """The plane in which rank ``r`` reaches ``root`` by ``paths[r]``: the names of its edges at ``levels``, upwards.

    An edge is known by its name, so that one which lies below two others is an error.
    """
    names: list[Sequence[str]] = [Numbers(len(paths))]
    parents: list[npt.NDArray[np.intp]] = []
    below = list(range(len(paths)))  # by edge of the level below, a rank that goes through it
    for position in range(len(levels)):
        number: dict[str, int] = {}
        ranks: list[int] = []
        above = np.empty(len(below), np.intp)
        for edge, rank in enumerate(below):
            name = paths[rank][position]
            if name not in number:
                number[name] = len(ranks)
                ranks.append(rank)
            above[edge] = number[name]
        if position:
            _one_parent(paths, levels, position)
        names.append(list(number))
        parents.append(above)
        below = ranks
    names.append([root])
    parents.append(np.zeros(len(below), np.intp))
    every = ("rank", *levels, root)
    arrays = tuple(
        np.full(len(name), capacities.get(level, math.inf)) for level, name in zip(every, names, strict=True)
    )
    return Plane(every, tuple(names), tuple(parents), arrays)


def _one_parent(paths: Sequence[Sequence[str]], levels: Sequence[str], position: int) -> None:
    """Every edge of the level below ``position`` lies below one edge of it."""
    first: dict[str, int] = {}
    for rank, path in enumerate(paths):
        one = first.setdefault(path[position - 1], rank)
        if paths[one][position] != path[position]:
            raise TopologyError(
                f"{levels[position - 1]} {path[position - 1]!r} lies below {levels[position]} {paths[one][position]!r} "
                f"by the path of rank {one}, and below {path[position]!r} by that of rank {rank}. Each has one path to "
                f"the storage; if they are two, give them two names"
            )
