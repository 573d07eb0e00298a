"""Which plain values are equal on all ranks: found node by node, and kept in the index.

A job of another size then reads a value that all ranks had equal from one part, and not from all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from fastckpt.format.tables import ValueKind


class Differences(msgspec.Struct, array_like=True, frozen=True):
    """How the values of some ranks differ from the coordinator's, whose names are numbered in order."""

    own: list[int]
    """Names of values that each of these ranks has, not all equal to the coordinator's."""
    some: list[int]
    """Names of values that one of these ranks lacks."""
    others: list[str]
    """Names, sorted, that the coordinator lacks."""


def find_differences(coordinators: Sequence[tuple[str, bytes]], ranks: Sequence[Mapping[str, bytes]]) -> Differences:
    """``coordinators``: its names, sorted, and digests. ``ranks``: digests by name, of each rank."""
    own, some = [], []
    for number, (name, digest) in enumerate(coordinators):
        if not all(name in values for values in ranks):
            some.append(number)
        elif any(values[name] != digest for values in ranks):
            own.append(number)
    known = {name for name, _ in coordinators}
    return Differences(own, some, sorted({name for values in ranks for name in values if name not in known}))


def value_kinds(names: Sequence[str], differences: Iterable[Differences]) -> dict[str, ValueKind]:
    """The kind of every value of a job, by name. ``names`` are the coordinator's, sorted."""
    found: dict[str, ValueKind] = dict.fromkeys(names, "same")
    some: set[str] = set()
    for one in differences:
        found |= {names[number]: "own" for number in one.own}
        some |= {names[number] for number in one.some}.union(one.others)
    found |= dict.fromkeys(some, "some")
    return {name: found[name] for name in sorted(found)}
