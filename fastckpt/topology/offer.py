"""How the ranks of a job agree on their topology: each offers what it knows, one function makes one of all offers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from fastckpt.errors import TopologyError
from fastckpt.topology.capacity import write_capacity
from fastckpt.topology.host_list import check_name, fold_numbers
from fastckpt.topology.slurm import levels_of, path_of_address
from fastckpt.topology.topology import Capacities, Topology, check_path, read_capacities

FIELD_BYTES: Final = 4


@dataclass(frozen=True)
class RankPath:
    """What one rank knows of its own way to the storage."""

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
        """The path of the rank that calls it; all ranks must give the same levels and capacities."""
        found = read_capacities(capacities, ("rank", *levels, "storage"))
        return cls(path, tuple(levels), tuple(sorted(found.items())))

    @classmethod
    def from_slurm(cls, environment: Mapping[str, str], *, capacities: Capacities | None = None) -> RankPath:
        """The path that Slurm set in the environment of a task, in ``SLURM_TOPOLOGY_ADDR``."""
        path = path_of_address(environment)
        return cls.of(*path, levels=levels_of(len(path) - 1), capacities=capacities)


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


def offer(given: Topology | RankPath | None, host: str) -> Offer:
    """What a rank on ``host`` offers that was given a topology, knows its own path, or knows nothing."""
    if isinstance(given, Topology):
        fields = b"".join(digest[:FIELD_BYTES] for digest in given.field_digests.values())
        return Offer(host, given.digest(), fields)
    if isinstance(given, RankPath):
        return Offer(host, path=given.path, levels=given.levels, capacities=given.capacities)
    return Offer(host)


def agree(offers: Sequence[Offer], given: Topology | RankPath | None, nodes: Sequence[int]) -> Topology:
    """The topology of the job whose rank ``r`` offered ``offers[r]`` and is on ``nodes[r]``; ``given`` is what rank 0
    was given.

    Raises ``TopologyError`` that names the ranks, and the field, in which offers differ.
    """
    if not offers:
        raise TopologyError("the job has no ranks")
    for rank, each in enumerate(offers):
        try:
            check_name(each.host)
        except ValueError as error:
            raise TopologyError(f"the host of rank {rank}: {error}") from None
    _same((_kind(each) for each in offers), "what the ranks know of the topology differs")
    hosts = [each.host for each in offers]
    if isinstance(given, Topology):
        _same_topology(offers, given)
        return given.for_hosts(hosts)
    if isinstance(given, RankPath):
        _same((", ".join(each.levels) for each in offers), "the levels of the ranks' paths differ")
        _same((_shown(each.capacities) for each in offers), "the capacities of the ranks' paths differ")
        for rank, each in enumerate(offers):
            check_path(rank, each.path, each.levels)
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
        f"{', '.join(differences)}. Give all ranks the same file"
    )


def _same(values: Iterable[str], what: str) -> None:
    groups = _ranks_by(values)
    if len(groups) > 1:
        listed = ", ".join(f"{_who(ranks)}: {value}" for value, ranks in groups.items())
        raise TopologyError(f"{what}: {listed}. Give all ranks the same kind of topology")


def _ranks_by(values: Iterable[Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        groups[value].append(rank)
    return dict(groups)


def _who(ranks: Sequence[int]) -> str:
    shown = fold_numbers(np.array(ranks, np.intp)).split(",")
    more = f" and others, {len(ranks)} in all" if len(shown) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown[:8])}{more}"


def _kind(each: Offer) -> str:
    return "a topology" if each.digest else "a path of their own" if each.path else "nothing"


def _field(fields: bytes, at: int) -> bytes:
    return fields[at * FIELD_BYTES : (at + 1) * FIELD_BYTES]


def _shown(capacities: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{level} {write_capacity(value)}" for level, value in capacities) or "none"
