"""How the ranks of a job agree on their topology: each offers what it knows, one function makes one of all offers."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import msgspec
import numpy as np

from fastckpt.errors import FastckptError, TopologyError
from fastckpt.topology.capacity import write_capacity
from fastckpt.topology.host_list import check_name, fold_numbers
from fastckpt.topology.shown import shown
from fastckpt.topology.slurm import levels_of, path_of_address
from fastckpt.topology.topology import Capacities, Topology, check_levels, check_path, read_capacities

FIELD_BYTES: Final = 4
PROBLEM_CHARACTERS_MAX: Final = 500
LISTED_MAX: Final = 8


@dataclass(frozen=True)
class RankPath:
    """What one rank knows of its own way to the storage. The names are looked at when the ranks agree, so that all hear
    of wrong ones, and of whose they are."""

    path: tuple[str, ...]
    """Its names at ``levels``."""
    levels: tuple[str, ...] = ("node", "supernode")
    """From the node upwards."""
    capacities: tuple[tuple[str, float], ...] = ()
    """Bytes/s of every edge of a level."""

    @classmethod
    def of(
        cls, *path: str, levels: Sequence[str] = ("node", "supernode"), capacities: Capacities | None = None
    ) -> RankPath:
        """The path of the rank that calls it; all ranks must give the same levels and capacities. ``TopologyError`` for
        such as cannot be."""
        checked = check_levels(levels)
        return cls(path, checked, tuple(sorted(read_capacities(capacities, checked).items())))

    @classmethod
    def from_slurm(cls, environment: Mapping[str, str], *, capacities: Capacities | None = None) -> RankPath:
        """The path that Slurm set in the environment of a task, in ``SLURM_TOPOLOGY_ADDR``. ``TopologyError`` if it did
        not: called by a function that is given to the ``Checkpointer``, all ranks hear of it."""
        path = path_of_address(environment)
        return cls.of(*path, levels=levels_of(len(path) - 1), capacities=capacities)


TopologySource: TypeAlias = Topology | RankPath | Callable[[], Topology | RankPath | None] | None
"""What a rank may be given: what it knows, or a function that finds it out."""


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """What one rank knows. Small: every rank of the job sends one."""

    host: str
    digest: bytes = b""
    """Of the topology that it was given."""
    fields: bytes = b""
    """The first ``FIELD_BYTES`` of the digest of each of its fields."""
    path: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    capacities: tuple[tuple[str, float], ...] = ()
    problem: str = ""
    """What is wrong with what the rank was given, or with its host; then there is nothing else."""


class Given:
    """What one rank was given of the topology, as it takes part in agreements. One thread at a time.

    Whatever is wrong with it is no error here but part of the offer: the others, who would wait for this rank, hear of
    it with the agreement, as this rank does.
    """

    def __init__(self, source: TopologySource) -> None:
        self._source = source
        self._offer: Offer | None = None
        self._raised: BaseException | None = None
        """By the function."""
        self.known: Topology | RankPath | None = None
        """From the first offer on."""

    def offer(self, host: str) -> Offer:
        """What this rank, on ``host``, offers. A function is called by the first call, once for all."""
        if self._offer is None:
            try:
                self.known = self._find()
                self._offer = offer(self.known, host)
            except TopologyError as error:
                self._offer = Offer("", problem=_told(str(error)))
            except Exception as error:  # an object of ours that holds what it must not
                self._offer = Offer("", problem=_told(f"the topology cannot be used: {_said(error)}"))
        return self._offer

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """An agreement that fails in this block has what the function raised as its cause; an interrupt of the function
        goes on, now that the others know."""
        try:
            yield
        except FastckptError as error:
            raised = self._raised
            if raised is not None and not isinstance(raised, Exception):
                self._raised = None
                raise raised from None
            if raised is not None and isinstance(error, TopologyError):
                raise error from raised
            raise

    def _find(self) -> Topology | RankPath | None:
        found: object = self._source
        what = f"topology={shown(found)}"
        if callable(found):
            try:
                found = found()
            except BaseException as error:
                self._raised = error
                raise TopologyError(f"the function given as topology raised {_said(error)}") from error
            what = f"the function given as topology returned {shown(found)}, which"
        if found is None or isinstance(found, Topology | RankPath):
            return found
        hint = "; Topology.load reads a file" if isinstance(found, str) else ""
        raise TopologyError(f"{what} is not a fastckpt.Topology, a fastckpt.RankPath or None{hint}")


def offer(known: Topology | RankPath | None, host: str) -> Offer:
    """What a rank on ``host`` offers that knows this. Raises ``TopologyError`` for what cannot be offered."""
    try:
        check_name(host)
    except ValueError as error:
        raise TopologyError(f"the name of the host: {error}") from None
    if isinstance(known, Topology):
        fields = b"".join(digest[:FIELD_BYTES] for digest in known.field_digests.values())
        return Offer(host, known.digest(), fields)
    if isinstance(known, RankPath):
        levels = check_levels(known.levels)
        capacities = read_capacities(dict(known.capacities), levels)
        path = check_path("the path", known.path, levels)
        return Offer(host, path=path, levels=levels, capacities=tuple(sorted(capacities.items())))
    return Offer(host)


def _said(error: BaseException) -> str:
    """The kind of an error, and what it says."""
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _told(problem: str) -> str:
    """As it can be sent: it may be of any length, and hold what no encoding knows."""
    text = problem if len(problem) <= PROBLEM_CHARACTERS_MAX else problem[: PROBLEM_CHARACTERS_MAX - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def agree(offers: Sequence[Offer], given: Topology | RankPath | None, nodes: Sequence[int]) -> Topology:
    """The topology of the job whose rank ``r`` offered ``offers[r]`` and is on ``nodes[r]``; ``given`` is what rank 0
    was given.

    Raises ``TopologyError`` that names the ranks that have a problem, or else those whose offers differ, and the field.
    """
    if not offers:
        raise TopologyError("the job has no ranks")
    problems = _ranks_by(each.problem for each in offers)
    problems.pop("", None)
    if problems:
        raise TopologyError(_listed([f"{_who(ranks)}: {problem}" for problem, ranks in problems.items()], "; "))
    _same((_kind(each) for each in offers), "what the ranks know of the topology differs")
    hosts = [each.host for each in offers]
    if isinstance(given, Topology):
        _same_topology(offers, given)
        return given.for_hosts(hosts)
    if isinstance(given, RankPath):
        _same((", ".join(each.levels) for each in offers), "the levels of the ranks' paths differ")
        _same((_written(each.capacities) for each in offers), "the capacities of the ranks' paths differ")
        first = offers[0]
        return Topology.from_paths(
            [each.path for each in offers], levels=first.levels, capacities=dict(first.capacities)
        )
    # Host names of containers repeat; which ranks share a machine is known better.
    return Topology.from_hosts([str(node) for node in nodes])


def _same_topology(offers: Sequence[Offer], given: Topology) -> None:
    groups = _ranks_by(each.digest for each in offers)
    if len(groups) == 1:
        return
    names = list(given.field_digests)
    first = offers[0]
    differences = []
    for digest, ranks in groups.items():
        if digest != first.digest:
            fields = offers[ranks[0]].fields
            differing = [name for at, name in enumerate(names) if _field(fields, at) != _field(first.fields, at)]
            # With other levels or planes, fields do not correspond.
            found = "; ".join(differing) if len(fields) == len(first.fields) else "levels or planes"
            differences.append(f"that of {_who(ranks)} differs in {found}")
    raise TopologyError(
        f"the ranks were given different topologies: from that of {_who(groups[first.digest])}, "
        f"{_listed(differences, ', ')}. Give all ranks the same file"
    )


def _same(values: Iterable[str], what: str) -> None:
    groups = _ranks_by(values)
    if len(groups) > 1:
        listed = _listed([f"{_who(ranks)}: {value}" for value, ranks in groups.items()], ", ")
        raise TopologyError(f"{what}: {listed}. Give all ranks the same kind of topology")


def _ranks_by(values: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        groups[value].append(rank)
    return dict(groups)


def _who(ranks: Sequence[int]) -> str:
    runs = fold_numbers(np.array(ranks, np.intp)).split(",")
    more = f" and others, {len(ranks)} in all" if len(runs) > LISTED_MAX else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(runs[:LISTED_MAX])}{more}"


def _listed(lines: Sequence[str], separator: str) -> str:
    """As many as a message can hold."""
    more = f"{separator}and {len(lines) - LISTED_MAX} more" if len(lines) > LISTED_MAX else ""
    return separator.join(lines[:LISTED_MAX]) + more


def _kind(each: Offer) -> str:
    return "a topology" if each.digest else "a path of their own" if each.path else "nothing"


def _field(fields: bytes, at: int) -> bytes:
    return fields[at * FIELD_BYTES : (at + 1) * FIELD_BYTES]


def _written(capacities: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{level} {write_capacity(value)}" for level, value in capacities) or "none"
