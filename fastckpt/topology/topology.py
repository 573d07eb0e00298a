"""Which rank reaches the storage through which node, supernode and gateway, and what each of them can carry.

How a file describes it is in ``file``; how the ranks of a job agree on it, in ``offer``.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar, overload

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from fastckpt.errors import TopologyError
from fastckpt.topology.capacity import read_capacity
from fastckpt.topology.dump import document_of, toml_of
from fastckpt.topology.file import LEVELS_MAX, PLANES, Document, check_level, parse_text, planes_of
from fastckpt.topology.host_list import check_name
from fastckpt.topology.nearest import nearest
from fastckpt.topology.plane import RANKS_MAX, Plane, are_numbers, plane_of_paths
from fastckpt.topology.shown import shown
from fastckpt.topology.slurm import levels_of, paths_of_conf

FILE_BYTES_MAX: Final = 64 * 2**20

T = TypeVar("T")

Capacities = Mapping[str, float | str]
"""By level, what each of its edges carries: bytes/s, or a text like "25 GB/s"."""


@dataclass(frozen=True, eq=False)
class Tree:
    """Paths from ranks to storage on one plane, as a tree of edges by level; level 0 has an edge per rank, the last
    level one edge, the storage."""

    levels: tuple[str, ...]
    """From "rank" upwards; two or more."""
    parents: tuple[npt.NDArray[np.intp], ...]
    """``parents[k][i]``: the edge of level k + 1 above edge i of level k; one array fewer than levels."""
    capacities: tuple[npt.NDArray[np.float64], ...]
    """Bytes/s of each edge, by level; ``math.inf`` where no limit is known."""
    names: tuple[Sequence[str], ...]
    """For people, by level: "rank 17", "node cn0042", "supernode 3"."""

    def edges_of_ranks(self) -> Iterator[npt.NDArray[np.intp]]:
        """For each level, the edge that each rank goes through."""
        edges = np.arange(len(self.capacities[0]), dtype=np.intp)
        yield edges
        for parents in self.parents:
            edges = parents[edges]
            yield edges


class Labels(Sequence[str]):
    """The names of a level's edges, each after the level's own. The root is called as its level is."""

    def __init__(self, level: str, names: Sequence[str]) -> None:
        self._level = level
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return Labels(self._level, self._names[index])
        name = self._names[index]
        return name if name == self._level else f"{self._level} {name}"


@dataclass(frozen=True, eq=False)
class Topology:
    """Which rank is on which node, supernode and gateway, and what each can carry, on the plane of the storage and
    perhaps others. Immutable; all threads may use it. Every constructor raises ``TopologyError`` for what is none.

    A file describes a cluster, whose ranks are counted, or a job, with which ranks are on which node. A job saves by
    ``for_hosts`` of either.
    """

    planes: Mapping[str, Plane]
    ranks_are_known: bool
    """Whether it says which ranks are on which node, rather than how many."""
    source: str = "the topology"
    """What messages call it: the file it is from."""

    @property
    def ranks(self) -> int:
        """How many ranks there are: 0 to ``ranks - 1``."""
        return len(self.planes["storage"].names[0])

    @property
    def node_of(self) -> npt.NDArray[np.intp]:
        """The number of the node that each rank is on."""
        return self.planes["storage"].parents[0]

    def tree(self, plane: str = "storage") -> Tree:
        """The paths of all ranks on a plane; one that was not described is as that of the storage."""
        if plane not in PLANES:
            raise ValueError(f"no plane is called {plane!r}; there are {' and '.join(PLANES)}")
        found = self.planes.get(plane, self.planes["storage"])
        labels = tuple(Labels(level, names) for level, names in zip(found.levels, found.names, strict=True))
        return Tree(found.levels, found.parents, found.capacities, labels)

    # Of one job.

    def for_hosts(self, hosts: Sequence[str]) -> Topology:
        """The topology of a job whose rank ``r`` runs on the host ``hosts[r]``.

        Nodes are found by the names that they have in the file; where only one of the two is qualified with a domain,
        by what is before the first dot. A topology that says which ranks are on which node is taken at its word.
        """
        if self.ranks_are_known:
            self._check_ranks(len(hosts))
            return self
        if not hosts:
            raise TopologyError("the job has no ranks")
        plane = self.planes["storage"]
        if are_numbers(plane.names[1]):
            raise TopologyError(
                f"{self.source} only counts its nodes, so that the hosts of a job cannot be found in it: give "
                f"node.names, or which ranks are on which node in node.ranks"
            )
        nodes = _Nodes(plane.names[1])
        number = {host: nodes.find(host) for host in set(hosts)}
        unknown = [rank for rank, host in enumerate(hosts) if number[host] is None]
        if unknown:
            first = unknown[0]
            others = len({hosts[rank] for rank in unknown}) - 1
            more = f" (and {others} more hosts of other ranks are not in it)" if others else ""
            raise TopologyError(
                f"{self.source} has no node {hosts[first]!r}, on which rank {first} runs{more}: "
                f"{nearest(hosts[first], plane.names[1])}"
            )
        found: dict[int | None, str] = {}
        for host, node in number.items():
            if found.setdefault(node, host) != host:
                raise TopologyError(
                    f"{self.source} has one node for the hosts {found[node]!r} and {host!r}: give both their domains"
                )
        node_of = np.array([number[host] for host in hosts], np.intp)
        return Topology({name: each.of_job(node_of) for name, each in self.planes.items()}, True, self.source)

    def _check_ranks(self, ranks: int) -> None:
        if ranks == self.ranks:
            return
        low, high = sorted((ranks, self.ranks))
        which = f"rank {low}" if high == low + 1 else f"ranks {low} to {high - 1}"
        wrong = f"misses {which}" if ranks > self.ranks else f"has {which}, which the job has not"
        raise TopologyError(f"{self.source} {wrong}: of ranks, the job has {ranks} and the topology {self.ranks}")

    # Files.

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Topology:
        """Reads a ``.toml`` or ``.json`` file."""
        path = Path(path)
        toml = _is_toml(path)
        try:
            text = _read(path).decode()
        except OSError as error:
            raise TopologyError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise TopologyError(f"{path}:{line}: is not UTF-8") from None
        return cls._of(parse_text(text, toml=toml, source=str(path)), str(path))

    def dump(self, path: str | os.PathLike[str]) -> None:
        """Writes a ``.toml`` or ``.json`` file, from which ``load`` makes an equal topology. Not atomic."""
        path = Path(path)
        document = self.to_dict()
        text = toml_of(document) if _is_toml(path) else json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Topology:
        """Makes a topology of what such a file holds, as dicts, lists, texts and numbers."""
        return cls._of(Document(document), "the topology")

    def to_dict(self) -> dict[str, Any]:
        """What ``parse`` makes an equal topology of."""
        return document_of(self.planes, self.ranks_are_known)

    @classmethod
    def _of(cls, document: Document, source: str) -> Topology:
        planes, ranks_are_known = planes_of(document)
        return cls(planes, ranks_are_known, source)

    # Other sources.

    @classmethod
    def from_hosts(cls, hosts: Sequence[str]) -> Topology:
        """One supernode, and no capacity known: rank ``r`` is on the node called ``hosts[r]``."""
        return cls.from_paths([(host, "all") for host in _listed("hosts", hosts)])

    @classmethod
    def from_paths(
        cls,
        paths: Sequence[Sequence[str]],
        *,
        levels: Sequence[str] = ("node", "supernode"),
        capacities: Capacities | None = None,
    ) -> Topology:
        """Rank ``r`` reaches the storage by ``paths[r]``: its names at ``levels``, from the node upwards.

        An edge is known by its name alone, so each must have one path. ``capacities`` may also have "rank" and
        "storage".
        """
        levels = check_levels(levels)
        capacities = read_capacities(capacities, levels)
        paths = _listed("paths", paths)
        if not 0 < len(paths) <= RANKS_MAX:
            raise TopologyError(f"{len(paths)} ranks cannot be; from 1 to {RANKS_MAX} can")
        found = [check_path(f"the path of rank {rank}", path, levels) for rank, path in enumerate(paths)]
        return cls({"storage": plane_of_paths(found, levels, "storage", capacities)}, True)

    @classmethod
    def from_slurm(cls, text: str, *, ranks_per_node: int = 1, capacities: Capacities | None = None) -> Topology:
        """The cluster that a ``topology.conf`` describes, or what ``scontrol show topology`` prints.

        A leaf switch, or a block, is a supernode; higher switches are the levels switch2, switch3 and so on. The text
        is all that is read: a file that it includes is refused. ``ValueError`` for a ``ranks_per_node`` that cannot be.
        """
        if not isinstance(text, str):
            raise TypeError(f"the text of a topology.conf is {shown(text)}; read the file first")
        if isinstance(ranks_per_node, bool) or not isinstance(ranks_per_node, int):
            raise ValueError(f"ranks_per_node is {shown(ranks_per_node)}; it must be a whole number")
        if not 1 <= ranks_per_node <= RANKS_MAX:
            raise ValueError(f"ranks_per_node is {shown(ranks_per_node)}; it must be from 1 to {RANKS_MAX}")
        paths = paths_of_conf(text, "topology.conf", RANKS_MAX)
        if len(paths) * ranks_per_node > RANKS_MAX:
            raise TopologyError(
                f"topology.conf: {len(paths)} nodes of {ranks_per_node} ranks each are more than {RANKS_MAX} ranks"
            )
        levels = check_levels(levels_of(len(paths[0]) - 1))
        plane = plane_of_paths(paths, levels, "storage", read_capacities(capacities, levels))
        return cls({"storage": plane.with_ranks(ranks_per_node)}, False, "topology.conf")

    # Equality.

    @cached_property
    def field_digests(self) -> Mapping[str, bytes]:
        """A digest of each thing that topologies can differ in, by what to call it: "storage: nodes of supernodes"."""
        digests = {"ranks": _digest(str(self.ranks_are_known).encode())}
        for name, plane in sorted(self.planes.items()):
            digests[f"{name}: levels"] = _digest("\0".join(plane.levels).encode())
            for position, level in enumerate(plane.levels):
                names = plane.names[position]
                written = str(len(names)) if are_numbers(names) else "\0".join(names)
                digests[f"{name}: names of level {level}"] = _digest(written.encode())
                digests[f"{name}: capacities of level {level}"] = _digest(
                    plane.capacities[position].astype("<f8").tobytes()
                )
                if position:
                    lower = plane.levels[position - 1]
                    held = plane.parents[position - 1].astype("<i8").tobytes()
                    digests[f"{name}: which {lower} is below which {level}"] = _digest(held)
        return digests

    def digest(self) -> bytes:
        """16 bytes, the same for equal topologies, and for those alone."""
        return _digest(b"".join(key.encode() + digest for key, digest in self.field_digests.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Topology) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __repr__(self) -> str:
        plane = self.planes["storage"]
        levels = zip(plane.levels[:-1], plane.names[:-1], strict=True)
        return f"<Topology {' '.join(f'{level}={len(names)}' for level, names in levels)}>"


def check_levels(levels: Sequence[str]) -> tuple[str, ...]:
    """Those of paths. Raises ``TopologyError`` for what are none."""
    if isinstance(levels, str) or not isinstance(levels, Sequence) or not all(isinstance(each, str) for each in levels):
        raise TopologyError(f"levels are {shown(levels)}: they must be a list of names, like ['node', 'rack']")
    known = ("rank", *levels, "storage")
    if not levels or levels[0] != "node" or len(set(known)) < len(known):
        raise TopologyError(
            f"levels are {shown(levels)}: they must begin with node, and have no name twice, nor rank or storage, "
            f"which are below and above all others"
        )
    if len(known) > LEVELS_MAX:
        raise TopologyError(f"levels are {shown(levels)}: with rank and storage {len(known)}, more than {LEVELS_MAX}")
    for level in levels:
        try:
            check_level(level)
        except ValueError as error:
            raise TopologyError(f"levels: {error}") from None
    return tuple(levels)


def check_path(what: str, path: Sequence[str], levels: Sequence[str]) -> tuple[str, ...]:
    """The path. Raises ``TopologyError`` that calls it ``what`` if it is not a name for each level."""
    names = () if isinstance(path, str) or not isinstance(path, Sequence) else tuple(path)
    if len(names) != len(levels) or not all(isinstance(name, str) for name in names):
        raise TopologyError(f"{what} is {shown(path)}; it must be a list of names, one for each of {', '.join(levels)}")
    for level, name in zip(levels, names, strict=True):
        try:
            check_name(name)
        except ValueError as error:
            raise TopologyError(f"{what}: {level}: {error}") from None
    return names


def read_capacities(capacities: Capacities | None, levels: Sequence[str]) -> dict[str, float]:
    """Bytes/s by level: of ``levels``, the ranks below them and the storage above.

    Raises ``TopologyError`` for a level that is not there, and for what is no capacity.
    """
    if capacities is not None and not isinstance(capacities, Mapping):
        raise TopologyError(f"capacities are {shown(capacities)}: give a dict by level, like {{'node': '25 GB/s'}}")
    known = ("rank", *levels, "storage")
    found = {}
    for level, value in (capacities or {}).items():
        if level not in known:
            meant = nearest(level, known) if isinstance(level, str) else f"known are {', '.join(known)}"
            raise TopologyError(f"capacities: there is no level {shown(level)}: {meant}")
        try:
            found[level] = read_capacity(value)
        except ValueError as error:
            raise TopologyError(f"capacities: {level}: {error}") from None
    return found


def _listed(what: str, values: Sequence[T]) -> Sequence[T]:
    """``values`` if they are of ranks, one after the other."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TopologyError(f"{what} are {shown(values)}; they must be a list with one for each rank")
    return values


class _Nodes:
    """Finds nodes by the names of hosts."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._number = {name: node for node, name in enumerate(names)}
        self._short: dict[str, list[int]] = {}
        for node, name in enumerate(names):
            self._short.setdefault(_short(name), []).append(node)

    def find(self, host: str) -> int | None:
        if host in self._number:
            return self._number[host]
        nodes = self._short.get(_short(host), [])
        unqualified = len(nodes) == 1 and ("." in host) != ("." in self._names[nodes[0]])
        return nodes[0] if unqualified else None


def _short(name: str) -> str:
    """A host's name without its domain; an address of numbers has none."""
    first = name.partition(".")[0]
    return name if first.isdigit() else first


def _is_toml(path: Path) -> bool:
    if path.suffix not in (".toml", ".json"):
        raise TopologyError(f"{path}: a topology is a .toml or a .json file")
    return path.suffix == ".toml"


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would be waited for
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise TopologyError(f"{path}: is not a file")
        data = file.read(FILE_BYTES_MAX + 1)
    if len(data) > FILE_BYTES_MAX:
        raise TopologyError(f"{path}: is longer than {FILE_BYTES_MAX} bytes; ranges like cn[0001-1024] are short")
    return data


def _digest(data: bytes) -> bytes:
    return blake3(data).digest(16)
