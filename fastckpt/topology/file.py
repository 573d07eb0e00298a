"""The form of a topology in TOML and JSON: a table for each level, and in it what each of its edges holds and carries.

    [node]
    names = "cn[0001-1024]"          # a host list; or count = 1024
    ranks = 8                        # of each; or of one after the other: "8(x1000),4(x24)"; or a table of which
                                     # ranks are on which node: cn0001 = "0-7"
    capacity = "25 GB/s"             # or bytes per second; left out where no limit is known

    [supernode]
    nodes = 256                      # as above; in a table: row-a = "cn[0001-0256]", which may stand for node.names
    capacity = "400 GB/s"

    [supernode.capacities]           # exceptions
    "2-3" = "200 GB/s"

    [storage]                        # the root: everything is below it
    capacity = "1.2 TB/s"

Levels are ``rank``, ``node``, ``supernode``, ``gateway`` and ``storage``, as far as the file has them; others, and
other orders, by ``levels = ["rank", "node", "rack", "storage"]``. The field that says what an edge holds is called
after the level below: ``nodes`` in the table above ``node``. ``[planes.compute]`` has levels and tables of another
network above the same nodes; what they do not say of its edges is as for the storage.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fastckpt.errors import TopologyError
from fastckpt.topology.capacity import read_capacity
from fastckpt.topology.host_list import check_name, expand, expand_counts, expand_numbers
from fastckpt.topology.lines import Path, key_twice, line_of
from fastckpt.topology.nearest import nearest
from fastckpt.topology.plane import RANKS_MAX, Numbers, Plane, are_numbers
from fastckpt.topology.shown import shown

STANDARD_LEVELS: Final[tuple[str, ...]] = ("rank", "node", "supernode", "gateway", "storage")
PLANES: Final = ("storage", "compute")
LEVELS_MAX: Final = 16

_TOML_TWICE: Final = re.compile(r"(?:Cannot|Duplicate) .*\(at (?:line ([0-9]+), column [0-9]+|end of document)\)")
"""What the parser says of keys and tables that are there already, which it does not always name."""
_LEVEL: Final = re.compile(r"[a-z][a-z0-9_-]{0,62}")


def check_level(level: str) -> None:
    """Raises ``ValueError`` for what no level can be called."""
    if not _LEVEL.fullmatch(level) or level in ("levels", "planes"):
        raise ValueError(f"{shown(level)} cannot be a level's name; use a word like 'rack'")


@dataclass(frozen=True)
class Document:
    """A parsed file, and where in its text a value is."""

    root: Any
    source: str = ""
    text: str = ""

    def error(self, path: Path, message: str) -> TopologyError:
        where = f"{self.source}:{line_of(self.text, path)}: " if self.source else ""
        field = ".".join(map(str, path))
        return TopologyError(f"{where}{field}: {message}" if field else f"{where}{message}")

    def table(self, value: Any, path: Path) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(path, f"is {_kind(value)}; it must be a table")
        for key in value:
            if not isinstance(key, str):
                raise self.error(path, f"has a key that is {_kind(key)}; keys are texts")
        return value


def parse_text(text: str, *, toml: bool, source: str) -> Document:
    """Raises ``TopologyError`` with the line where the text is neither TOML nor JSON."""
    try:
        root = tomllib.loads(text) if toml else json.loads(text, object_pairs_hook=_no_key_twice)
    except RecursionError:
        raise TopologyError(f"{source}: is nested too deeply to be a topology") from None
    except _KeyTwice:
        path, line = key_twice(text)
        raise TopologyError(f"{source}:{line}: {_dotted(path)}: is a second time in the same table") from None
    except ValueError as error:  # both parsers say line and column
        if toml and (at := _TOML_TWICE.fullmatch(str(error))):
            path, line = key_twice("\n".join(text.split("\n")[: int(at[1]) if at[1] else None]))
            if path:
                raise TopologyError(f"{source}:{line}: {_dotted(path)}: is a second time in the same table") from None
        raise TopologyError(f"{source}: is not {'TOML' if toml else 'JSON'}: {error}") from None
    return Document(root, source, text)


def planes_of(document: Document) -> tuple[dict[str, Plane], bool]:
    """The planes by name, and whether the document says which ranks are on which node."""
    top = document.table(document.root, ())
    storage = _Reader(document, (), top, None)
    planes = {"storage": storage.plane()}
    others = document.table(top.get("planes", {}), ("planes",))
    for name, table in others.items():
        path = ("planes", name)
        if name == "storage":
            raise document.error(path, "the plane of the storage is what the top of the file describes; move it there")
        if name not in PLANES:
            raise document.error(path, f"no plane is called so: {nearest(name, PLANES)}")
        planes[name] = _Reader(document, path, document.table(table, path), storage).plane()
    return planes, storage.says_which_ranks


def field_of_edges(levels: Sequence[str], position: int) -> str:
    """The field of a level that says which edges of the level below it holds."""
    below = levels[position - 1]
    return f"{below}es" if below.endswith(("s", "x", "z", "ch", "sh")) else f"{below}s"


# --- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Claim:
    """What one field says of the edges of a level: their names, or how many they are."""

    path: Path
    edges: Sequence[str] | int

    @property
    def names(self) -> Sequence[str] | None:
        return None if isinstance(self.edges, int | Numbers) else self.edges

    @property
    def count(self) -> int:
        return self.edges if isinstance(self.edges, int) else len(self.edges)


def _claim_of_names(path: Path, names: Sequence[str]) -> _Claim:
    return _Claim(path, Numbers(len(names)) if are_numbers(names) else names)


class _Reader:
    """Reads the tables of one plane. What a further plane does not say of its edges, ``storage`` says."""

    def __init__(self, document: Document, path: Path, top: Mapping[str, Any], storage: _Reader | None) -> None:
        self._document = document
        self._path = path
        self._top = top
        self.levels = self._read_levels(storage)
        self._tables: list[Mapping[str, Any]] = []
        self._edge_fields: list[dict[str, tuple[Any, Path]]] = []
        for position, level in enumerate(self.levels):
            self._add_level(position, level, storage)
        self._as_storage = (
            {}
            if storage is None
            else {
                position: storage.names[position]
                for position, fields in enumerate(self._edge_fields[:-1])
                if fields is storage._edge_fields[position] and position < len(storage.names) - 1
            }
        )
        self.says_which_ranks = False
        self.names: list[Sequence[str]] = self._names()

    def plane(self) -> Plane:
        names = self.names
        parents = [
            self._parents(position, names[position - 1], names[position]) for position in range(1, len(self.levels))
        ]
        capacities = [self._capacities(position, edges) for position, edges in enumerate(names)]
        return Plane(self.levels, tuple(names), tuple(parents), tuple(capacities))

    def _read_levels(self, storage: _Reader | None) -> tuple[str, ...]:
        document, path = self._document, (*self._path, "levels")
        others = ("levels",) if storage else ("levels", "planes")
        tables = [key for key in self._top if key not in others]
        if "levels" not in self._top:
            levels = tuple(level for level in STANDARD_LEVELS if level in {*tables, "rank", "node", "storage"})
            levels = storage.levels if storage else levels
            known = levels if storage else STANDARD_LEVELS
            for key in tables:
                if key not in known:
                    raise document.error(
                        (*self._path, key),
                        f"no level is called so: {nearest(key, [*known, *others])} "
                        f"(other levels are listed from the rank upwards in `levels`)",
                    )
            if not tables:
                raise document.error(
                    self._path, "the topology is empty: describe at least its nodes, in a table [node]"
                )
            return levels
        listed = self._top["levels"]
        if not isinstance(listed, list) or not all(isinstance(level, str) for level in listed):
            raise document.error(path, 'must be a list of names, like ["rank", "node", "rack", "storage"]')
        if len(listed) > LEVELS_MAX:
            raise document.error(path, f"{len(listed)} levels are more than {LEVELS_MAX}")
        for position, level in enumerate(listed):
            if listed.index(level) < position:
                raise document.error((*path, position), f"{level!r} is listed twice")
            try:
                check_level(level)
            except ValueError as error:
                raise document.error((*path, position), str(error)) from None
        if listed[:2] != ["rank", "node"] or len(listed) < 3:
            raise document.error(
                path, "must begin with rank and node, and end with the storage, or what takes its place"
            )
        for key in tables:
            if key not in listed:
                raise document.error((*self._path, key), f"is not in `levels`: {nearest(key, [*listed, *others])}")
        return tuple(listed)

    def _add_level(self, position: int, level: str, storage: _Reader | None) -> None:
        document, path = self._document, (*self._path, level)
        table = document.table(self._top.get(level, {}), path)
        root = position == len(self.levels) - 1
        edges = () if root or position == 0 else ("names", "count", field_of_edges(self.levels, position))
        if storage and position < 2:
            edges = ()  # the nodes of all planes are the same
        for key in table:
            known = (*edges, "capacity", *(() if root else ("capacities",)))
            if key not in known:
                raise document.error((*path, key), f"no field is called so: {nearest(key, known)}")
        fields = {key: (table[key], (*path, key)) for key in edges if key in table}
        for key in edges[2:]:
            if isinstance(table.get(key), str):
                fields[key] = (self._counts(table[key], (*path, key)), (*path, key))
        if storage and not fields and not root and self.levels[: position + 1] == storage.levels[: position + 1]:
            fields = storage._edge_fields[position]
        self._tables.append(table)
        self._edge_fields.append(fields)

    def _held(self, position: int) -> tuple[Any, Path] | None:
        """What the level says that its edges hold."""
        if position == len(self.levels) - 1:
            return None
        return self._edge_fields[position].get(field_of_edges(self.levels, position))

    # Names and numbers of edges: what fields say of a level, and what follows from the numbers of others.

    def _names(self) -> list[Sequence[str]]:
        document = self._document
        root = len(self.levels) - 1
        claims = [self._claims(position) for position in range(root)]
        counts: list[int | None] = [found[0].count if found else None for found in claims] + [1]
        for position in (*reversed(range(root)), *range(1, root), *reversed(range(root))):
            held, above = self._held(position + 1), counts[position + 1]
            if counts[position] is None and held and _is_count(held[0]) and above is not None:
                counts[position] = self._checked_count(held[0] * above, held[1])
            held, below = self._held(position), counts[position - 1] if position else None
            if counts[position] is None and held and _is_count(held[0]) and below is not None:
                counts[position] = -(-below // held[0])
        for position in range(1, root):
            path = (*self._path, self.levels[position])
            if self._held(position) is None:
                field = field_of_edges(self.levels, position)
                raise document.error((*path, field), f"is missing: say how many {field} each holds, or which")
            if counts[position] is None:
                raise document.error(
                    path, f"says neither which {self.levels[position]}s there are nor how many: give names or count"
                )
        return [self._agreed(position, counts[position] or 0, claims[position]) for position in range(root)] + [
            (self.levels[root],)
        ]

    def _claims(self, position: int) -> list[_Claim]:
        """What fields say of the edges of a level, those with names first."""
        fields = self._edge_fields[position]
        claims = []
        if position in self._as_storage:
            claims.append(_Claim((self.levels[position],), self._as_storage[position]))
        else:
            held = self._held(position)
            if "names" in fields:
                claims.append(_claim_of_names(fields["names"][1], self._host_list(*fields["names"])))
            if held and isinstance(held[0], Mapping):
                claims.append(_claim_of_names(held[1], list(self._document.table(*held))))
                for name in held[0]:
                    self._check_name(name, (*held[1], name))
            elif held and isinstance(held[0], list):
                claims.append(_Claim(held[1], len(held[0])))
            if "count" in fields:
                claims.append(_Claim(fields["count"][1], self._count(*fields["count"])))
        holder = self._held(position + 1)
        if holder:
            numbered = position == 0 or any(claim.names is None for claim in claims)
            found = self._held_edges(position, *holder, numbered=numbered)
            if found is not None:
                claims.append(_Claim(holder[1], found))
        for claim in claims:
            if not claim.count:
                raise self._document.error(claim.path, "is empty")
        return sorted(claims, key=lambda claim: claim.names is None)  # stable: of names, the first field's order holds

    def _held_edges(self, position: int, held: Any, path: Path, *, numbered: bool) -> Sequence[str] | int | None:
        """What the field of the level above says of this one's edges, unless it is a number for each."""
        values = list(held.items()) if isinstance(held, Mapping) else None
        if isinstance(held, list):
            values = list(enumerate(held))
        if values is None:
            self._count(held, path)
            return None
        if not values:
            raise self._document.error(path, "is empty")
        if all(_is_count(value) for _, value in values):
            return self._checked_count(sum(self._count(value, (*path, key)) for key, value in values), path)
        if not isinstance(held, Mapping):
            wrong = next(key for key, value in values if not _is_count(value))
            raise self._document.error((*path, wrong), f"is {_kind(values[wrong][1])}; a list holds a number for each")
        for key, value in values:
            if _is_count(value):
                raise self._document.error(
                    (*path, key),
                    f"is a number, where others say which {self.levels[position]}s they are; do the same for all",
                )
        if numbered:
            return self._count_listed(position, values, path)
        names: list[str] = []
        for key, value in values:
            names += self._host_list(value, (*path, key), RANKS_MAX - len(names))
        return names

    def _count_listed(self, position: int, values: Sequence[tuple[Any, Any]], path: Path) -> int:
        """How many edges are listed by their numbers, each once."""
        runs: list[tuple[int, int, int]] = []  # its first number, where it stands, and the number after its last
        total = 0
        for at, (key, value) in enumerate(values):
            for run in self._numbers(value, (*path, key)):
                runs.append((run.start, at, run.stop))
                total += len(run)
            self._checked_count(total, path)
        level = self.levels[position]
        end, holder, missing = 0, 0, -1  # the number after the last so far, where that stands, and the first left out
        for start, at, stop in sorted(runs):
            if start < end:
                again, first = max(at, holder), min(at, holder)
                raise self._document.error(
                    (*path, values[again][0]), f"{level} {start} is listed twice: {values[first][0]} has it already"
                )
            if start > end and missing < 0:
                missing = end
            end, holder = stop, at
        if position == 0 and missing >= 0:  # of other levels, a field may say how many there are
            raise self._document.error(
                (*path, values[holder][0]),
                f"{level} {end - 1} is unknown, since {level} {missing} is missing: {total} {level}s are listed, so "
                f"they must be 0 to {total - 1}",
            )
        return total

    def _agreed(self, position: int, count: int, claims: Sequence[_Claim]) -> Sequence[str]:
        """The names of a level's edges, in the order of the first field that says them, if all fields agree."""
        level = self.levels[position]
        for claim in claims:
            seen: set[str] = set()
            for name in claim.names or ():
                if name in seen:
                    raise self._document.error(self._where(claim.path, name, -1), f"{level} {name!r} is named twice")
                seen.add(name)
        for claim in claims[1:]:
            first = claims[0]
            if claim.names is not None and first.names is not None:
                theirs, ours = set(claim.names), set(first.names)
                unknown = next((name for name in claim.names if name not in ours), None)
                if unknown is not None:
                    raise self._document.error(
                        self._where(claim.path, unknown, 0),
                        f"{level} {unknown!r} is unknown to {_dotted(first.path)}: {nearest(unknown, first.names)}",
                    )
                missing = next((name for name in first.names if name not in theirs), None)
                if missing is not None:
                    raise self._document.error(claim.path, f"{level} {missing!r} of {_dotted(first.path)} is missing")
            elif claim.count != count:
                raise self._document.error(
                    claim.path, f"says that there are {claim.count} {level}s, but {_dotted(first.path)} has {count}"
                )
        names = claims[0].names if claims else None
        return Numbers(count) if names is None else tuple(names)

    def _where(self, path: Path, name: str, occurrence: int) -> Path:
        """Of a field that says which edge holds which, the key under which ``name`` is."""
        value = next((value for fields in self._edge_fields for value, where in fields.values() if where == path), None)
        if not isinstance(value, Mapping) or name in value:
            return path if not isinstance(value, Mapping) else (*path, name)
        return (
            *path,
            [key for key, held in value.items() for found in self._host_list(held, path) if found == name][occurrence],
        )

    # Which edge holds which.

    def _parents(self, position: int, below: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.intp]:
        held = self._held(position)
        if held is None:
            return np.zeros(len(below), np.intp)
        value, path = held
        if isinstance(value, Mapping) and not _is_count(next(iter(value.values()))):
            return self._parents_listed(position, value, path, below, names)
        edges = np.arange(len(names), dtype=np.intp)
        if _is_count(value):
            counts = np.full(len(names), value, np.int64)
        elif isinstance(value, Mapping):
            number = {name: edge for edge, name in enumerate(names)}
            edges = np.array([number[name] for name in value], np.intp)
            counts = np.array(list(value.values()), np.int64)
        else:
            counts = np.array(value, np.int64)
        if counts.sum() != len(below):
            level, lower = self.levels[position], self.levels[position - 1]
            raise self._document.error(
                path, f"{len(names)} {level}s hold {counts.sum()} {lower}s in all, but there are {len(below)}"
            )
        return np.repeat(edges, counts)

    def _parents_listed(
        self, position: int, held: Mapping[str, Any], path: Path, below: Sequence[str], names: Sequence[str]
    ) -> npt.NDArray[np.intp]:
        parents = np.full(len(below), -1, np.intp)
        lower = self.levels[position - 1]
        number = {name: edge for edge, name in enumerate(names)}
        find = self._finder(below, lower)
        for key, value in held.items():
            found = find(value, (*path, key))
            if not found:
                raise self._document.error((*path, key), f"holds no {lower}")
            for edges in found:
                parents[edges] = number[key]
        assert (parents >= 0).all()  # as many are listed as there are, and none twice
        if position == 1:
            self.says_which_ranks = True
        return parents

    def _finder(self, names: Sequence[str], level: str) -> Callable[[Any, Path], list[npt.NDArray[np.intp]]]:
        """What finds the edges of a level that a list in the file means."""
        if isinstance(names, Numbers):

            def find_numbers(value: Any, path: Path) -> list[npt.NDArray[np.intp]]:
                runs = self._numbers(value, path)
                for run in runs:
                    if run[-1] >= len(names):
                        first = max(run[0], len(names))
                        raise self._document.error(
                            path, f"{level} {first} is unknown: the {len(names)} {level}s are 0 to {len(names) - 1}"
                        )
                return [np.arange(run.start, run.stop, dtype=np.intp) for run in runs]

            return find_numbers
        number = {name: edge for edge, name in enumerate(names)}

        def find_names(value: Any, path: Path) -> list[npt.NDArray[np.intp]]:
            found = self._host_list(value, path)
            unknown = next((name for name in found if name not in number), None)
            if unknown is not None:
                raise self._document.error(path, f"{level} {unknown!r} is unknown: {nearest(unknown, names)}")
            return [np.array([number[name]], np.intp) for name in found]

        return find_names

    # Capacities.

    def _capacities(self, position: int, names: Sequence[str]) -> npt.NDArray[np.float64]:
        level, table = self.levels[position], self._tables[position]
        path = (*self._path, level)
        default = self._capacity(table["capacity"], (*path, "capacity")) if "capacity" in table else math.inf
        capacities = np.full(len(names), default)
        exceptions = self._document.table(table.get("capacities", {}), (*path, "capacities"))
        if exceptions and position == 0 and not self.says_which_ranks:
            raise self._document.error(
                (*path, "capacities"),
                "ranks are only counted here, and a job numbers its own: give node.ranks as lists, or node.capacities",
            )
        given = np.zeros(len(names), bool)
        if not exceptions:
            return capacities
        find = self._finder(names, level)
        for key, value in exceptions.items():
            where = (*path, "capacities", key)
            for edges in find(key, where):
                if given[edges].any():
                    raise self._document.error(
                        where, f"{level} {names[int(edges[given[edges]][0])]} has two capacities"
                    )
                given[edges] = True
                capacities[edges] = self._capacity(value, where)
        return capacities

    def _capacity(self, value: Any, path: Path) -> float:
        try:
            return read_capacity(value)
        except ValueError as error:
            raise self._document.error(path, str(error)) from None

    # Values.

    def _count(self, value: Any, path: Path) -> int:
        if not _is_count(value):
            raise self._document.error(path, f"is {_kind(value)}; it must be a number, or a table that says which")
        return self._checked_count(value, path)

    def _checked_count(self, count: int, path: Path) -> int:
        if count < 1:
            raise self._document.error(path, f"is {count}; how many there are must be at least 1")
        if count > RANKS_MAX:
            raise self._document.error(path, f"more than {RANKS_MAX} are not possible")
        return count

    def _counts(self, text: str, path: Path) -> list[int]:
        try:
            return expand_counts(text, RANKS_MAX)
        except ValueError as error:
            raise self._document.error(path, str(error)) from None

    def _check_name(self, name: str, path: Path) -> None:
        try:
            check_name(name)
        except ValueError as error:
            raise self._document.error(path, str(error)) from None

    def _host_list(self, value: Any, path: Path, count_max: int = RANKS_MAX) -> list[str]:
        texts = value if isinstance(value, list) else [value]
        names: list[str] = []
        for index, text in enumerate(texts):
            where = (*path, index) if isinstance(value, list) else path
            if not isinstance(text, str):
                raise self._document.error(where, f'is {_kind(text)}; it must be a host list, like "cn[001-256]"')
            try:
                names += expand(text, count_max - len(names))
            except ValueError as error:
                raise self._document.error(where, str(error)) from None
        return names

    def _numbers(self, value: Any, path: Path) -> list[range]:
        runs = []
        for index, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            where = path if index is None else (*path, index)
            if _is_count(item) and index is not None and 0 <= item < RANKS_MAX:
                runs.append(range(item, item + 1))
            elif isinstance(item, str):
                try:
                    runs += expand_numbers(item, RANKS_MAX)
                except ValueError as error:
                    raise self._document.error(where, str(error)) from None
            else:
                shown = item if _is_count(item) and abs(item) < RANKS_MAX else _kind(item)
                raise self._document.error(
                    where, f'is {shown}; it must be a list of numbers from 0, like "0-7" or [0, 1]'
                )
        if not runs:
            raise self._document.error(path, "is empty")
        return runs


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        str: "a text",
        float: "a fraction",
        list: "a list",
        dict: "a table",
        int: "a number",
    }
    return kinds.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


class _KeyTwice(ValueError):
    pass


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise _KeyTwice
    return table
