"""Replies of many ranks that are mostly alike: a node says different ones once, and they are looked at once.

A line is a msgpack array of pairs: a reply, and the ranks that gave it, as runs (start, stop).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import msgspec

_T = TypeVar("_T")

_LINE = msgspec.msgpack.Decoder(list[tuple[bytes, list[tuple[int, int]]]])


def merged(replies: Mapping[int, bytes]) -> bytes:
    """The replies of a node, by rank, in one line."""
    ranks: dict[bytes, list[int]] = {}
    for rank, data in sorted(replies.items()):
        ranks.setdefault(data, []).append(rank)
    return msgspec.msgpack.encode([(data, runs_of(same)) for data, same in ranks.items()])


def runs_of(ranks: Iterable[int]) -> list[tuple[int, int]]:
    """Ranks that ascend, as runs (start, stop)."""
    runs: list[tuple[int, int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank:
            runs[-1] = (runs[-1][0], rank + 1)
        else:
            runs.append((rank, rank + 1))
    return runs


def by_rank(lines: Iterable[bytes]) -> dict[int, bytes]:
    """The replies in the lines of all nodes, equal ones as one object."""
    one: dict[bytes, bytes] = {}
    return {
        rank: data
        for line in lines
        for reply, runs in _LINE.decode(line)
        for data in [one.setdefault(reply, reply)]
        for start, stop in runs
        for rank in range(start, stop)
    }


def each(replies: Mapping[int, bytes], make: Callable[[bytes], _T]) -> dict[int, _T]:
    """What is made of each rank's reply, once of those that are one object."""
    made: dict[int, _T] = {}
    for data in replies.values():
        if id(data) not in made:
            made[id(data)] = make(data)
    return {rank: made[id(data)] for rank, data in replies.items()}
