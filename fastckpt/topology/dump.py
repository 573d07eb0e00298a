"""A topology written as TOML or JSON, in the form that ``file`` describes and reads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fastckpt.topology.capacity import write_capacity
from fastckpt.topology.file import STANDARD_LEVELS, field_of_edges
from fastckpt.topology.host_list import fold, fold_counts, fold_numbers
from fastckpt.topology.plane import Numbers, Plane

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def document_of(planes: Mapping[str, Plane], says_which_ranks: bool) -> dict[str, Any]:
    """What ``planes_of`` reads as these planes."""
    storage = planes["storage"]
    root = _written(storage, says_which_ranks, None)
    for name, plane in planes.items():
        if name != "storage":
            root.setdefault("planes", {})[name] = _written(plane, says_which_ranks, storage)
    return root


def toml_of(document: Mapping[str, Any]) -> str:
    """The document as TOML."""
    return "\n".join(_toml_tables(document, ())).lstrip("\n") + "\n"


def _written(plane: Plane, says_which_ranks: bool, storage: Plane | None) -> dict[str, Any]:
    """The table of a plane; of a further one, without what it has in common with ``storage``."""
    root = len(plane.levels) - 1
    tables: dict[str, dict[str, Any]] = {level: {} for level in plane.levels}
    listed = [False] * (root + 1)  # whether the level above lists the names of a level, in its order
    for position in reversed(range(1, root)):
        if storage and position < len(storage.levels) - 1 and _same_edges(plane, storage, position):
            continue
        field = field_of_edges(plane.levels, position)
        held, listed[position - 1] = _written_edges(plane, position, says_which_ranks)
        names = plane.names[position]
        if not isinstance(names, Numbers) and not isinstance(held, dict) and not listed[position]:
            tables[plane.levels[position]]["names"] = fold(names)
        if isinstance(held, int) and isinstance(names, Numbers):
            tables[plane.levels[position]]["count"] = len(names)
        tables[plane.levels[position]][field] = held
    for position, level in enumerate(plane.levels):
        tables[level] |= _written_capacities(plane, position, says_which_ranks)
    standard = tuple(level for level in STANDARD_LEVELS if level in plane.levels)
    document: dict[str, Any] = {level: table for level, table in tables.items() if table}
    implied = (
        storage.levels
        if storage
        else tuple(level for level in standard if level in {*document, "rank", "node", "storage"})
    )
    return document if plane.levels == implied and document else {"levels": list(plane.levels), **document}


def _same_edges(plane: Plane, storage: Plane, position: int) -> bool:
    """Whether a level and all below it are the same on both planes."""
    end = position + 1
    return (
        plane.levels[:end] == storage.levels[:end]
        and all(list(one) == list(other) for one, other in zip(plane.names[:end], storage.names[:end], strict=True))
        and all(map(np.array_equal, plane.parents[:position], storage.parents[:position]))
    )


def _written_edges(plane: Plane, position: int, says_which_ranks: bool) -> tuple[Any, bool]:
    """What the edges of a level hold, and whether that says the names of the level below, in their order."""
    parents, names, below = plane.parents[position - 1], plane.names[position], plane.names[position - 1]
    in_order = bool((np.diff(parents) >= 0).all())
    counts = np.bincount(parents, minlength=len(names))
    numbered = isinstance(names, Numbers) or isinstance(below, Numbers)
    if in_order and numbered and not (position == 1 and says_which_ranks):
        same = bool((counts == counts[0]).all())
        return (int(counts[0]) if same else fold_counts(counts.tolist())), False
    order = np.argsort(parents, kind="stable")
    held = np.split(order, np.cumsum(counts)[:-1])
    if isinstance(below, Numbers):
        return {name: fold_numbers(edges) for name, edges in zip(names, held, strict=True)}, False
    return {
        name: fold([below[edge] for edge in edges.tolist()]) for name, edges in zip(names, held, strict=True)
    }, in_order


def _written_capacities(plane: Plane, position: int, says_which_ranks: bool) -> dict[str, Any]:
    capacities, names = plane.capacities[position], plane.names[position]
    values, counts = np.unique(capacities, return_counts=True)
    default = float(values[np.argmax(counts)])
    table: dict[str, Any] = {} if default == math.inf else {"capacity": write_capacity(default)}
    exceptions = {}
    for value in values[values != default].tolist():
        edges = np.flatnonzero(capacities == value)
        key = fold_numbers(edges) if isinstance(names, Numbers) else fold([names[edge] for edge in edges.tolist()])
        exceptions[key] = write_capacity(value)
    return table | ({"capacities": exceptions} if exceptions else {})


def _toml_tables(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    """The lines of a table: its values first, since what follows a header belongs to it."""
    values = [(key, value) for key, value in table.items() if not isinstance(value, Mapping)]
    lines = ["", f"[{'.'.join(map(_toml_key, path))}]"] if path and (values or not table) else []
    lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in values]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _toml_tables(value, (*path, key))
    return lines


def _toml_key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    """A text, a number, or a list of them. Names have no control characters, so that TOML reads what JSON writes."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)
