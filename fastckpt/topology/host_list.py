"""Host lists: many names in few characters. ``cn[0001-0256,0300],login1`` is 258 names.

The notation is that of Slurm and ClusterShell. A range keeps the width of its first number, so ``[08-10]`` is 08, 09,
10; a name may have several brackets, of which the last varies fastest.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from fastckpt.topology.shown import shown

NAME_CHARACTERS_MAX: Final = 255
_PIECE: Final = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)|(,)|(.)", re.DOTALL)
_RANGE: Final = re.compile(r"\s*([0-9]{1,18})\s*(?:-\s*([0-9]{1,18})\s*)?")
_REPEATED: Final = re.compile(r"\s*([0-9]{1,18})(?:\(x([0-9]{1,18})\))?\s*")
_NUMBERED: Final = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*)", re.DOTALL)


def expand(text: str, count_max: int) -> list[str]:
    """The names of a host list, in its order, duplicates and all.

    Raises ``ValueError`` for what is no host list, and, before it makes any, for more than ``count_max`` names.
    """
    hosts: list[list[str | list[tuple[str, int]]]] = [[]]
    for bracket, word, comma, wrong in _PIECE.findall(text):
        if wrong:
            raise ValueError(f"{wrong!r} in {shown(text)} has no counterpart")
        if comma:
            hosts.append([])
        else:
            hosts[-1].append(word if word else _ranges(bracket, text))
    counts = [
        math.prod(sum(count for _, count in part) for part in host if not isinstance(part, str)) for host in hosts
    ]
    if sum(counts) > count_max:
        raise ValueError(f"{shown(text)} is {sum(counts)} names; at most {count_max} are possible here")
    names: list[str] = []
    for host in hosts:
        parts = [[part] if isinstance(part, str) else _numbers(part) for part in host]
        found = ["".join(chosen).strip() for chosen in itertools.product(*parts)]
        for name in found:
            check_name(name)
        names += found
    return names


def expand_numbers(text: str, count_max: int) -> list[range]:
    """The runs of a list of numbers, ``0-7,16`` or ``[0-7,16]``. Raises ``ValueError`` as ``expand`` does."""
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    runs = [range(int(first), int(first) + count) for first, count in _ranges(inner, text)]
    if sum(map(len, runs)) > count_max:
        raise ValueError(f"{shown(text)} is {sum(map(len, runs))} numbers; at most {count_max} are possible here")
    return runs


def expand_counts(text: str, count_max: int) -> list[int]:
    """The numbers of ``8(x15),4``, which is 15 times 8 and then 4: the notation of ``SLURM_TASKS_PER_NODE``.

    Raises ``ValueError`` as ``expand`` does.
    """
    counts: list[int] = []
    for piece in text.split(","):
        match = _REPEATED.fullmatch(piece)
        if not match:
            raise ValueError(f"{shown(piece)} in {shown(text)} is neither a number nor a repeated one like 8(x15)")
        times = int(match[2] or 1)
        if len(counts) + times > count_max:
            raise ValueError(f"{shown(text)} is more than the {count_max} numbers that are possible here")
        counts += [int(match[1])] * times
    return counts


def fold_counts(counts: Sequence[int]) -> str:
    """What ``expand_counts`` gives back as these numbers."""
    runs = ((count, len(list(run))) for count, run in itertools.groupby(counts))
    return ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)


def fold_numbers(numbers: npt.NDArray[np.intp]) -> str:
    """The list of these numbers, in their order: ``expand_numbers`` gives them back."""
    cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
    starts = numbers[np.r_[0, cuts]].tolist()
    ends = numbers[np.r_[cuts, len(numbers)] - 1].tolist()
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))


def fold(names: Sequence[str]) -> str:
    """The host list of these names, in their order: ``expand`` gives them back."""
    groups: list[tuple[str, str, list[tuple[str, str]]]] = []  # prefix, suffix, ranges of digits
    last = -1
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if not match:
            groups.append((name, "", []))
            continue
        prefix, digits, suffix = match.groups()
        if groups and groups[-1][2] and groups[-1][:2] == (prefix, suffix):
            ranges = groups[-1][2]
            start = ranges[-1][0]
            if int(digits) == last + 1 and digits == f"{last + 1:0{len(start)}d}":
                ranges[-1] = (start, digits)
            else:
                ranges.append((digits, digits))
        else:
            groups.append((prefix, suffix, [(digits, digits)]))
        last = int(digits)
    return ",".join(_folded(*group) for group in groups)


def check_name(name: str) -> None:
    """Raises ``ValueError`` for what no host or switch is called, and no host list could hold."""
    if not name:
        raise ValueError("a name is empty")
    if len(name) > NAME_CHARACTERS_MAX:
        raise ValueError(f"the name {shown(name)} is longer than {NAME_CHARACTERS_MAX} characters")
    wrong = next((character for character in name if character in "[]," or not character.isprintable()), None)
    if wrong or name != name.strip():
        raise ValueError(f"the name {shown(name)} contains {wrong or ' '!r}")


def _ranges(bracket: str, text: str) -> list[tuple[str, int]]:
    """First number, as written, and how many."""
    ranges = []
    for piece in bracket.split(","):
        match = _RANGE.fullmatch(piece)
        if not match:
            raise ValueError(f"{shown(piece)} in {shown(text)} is neither a number nor a range like 01-16")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise ValueError(f"{shown(piece)} in {shown(text)} runs backwards")
        ranges.append((first, int(last) - int(first) + 1))
    return ranges


def _numbers(ranges: list[tuple[str, int]]) -> list[str]:
    return [f"{number:0{len(first)}d}" for first, count in ranges for number in range(int(first), int(first) + count)]


def _folded(prefix: str, suffix: str, ranges: list[tuple[str, str]]) -> str:
    if not ranges:
        return prefix + suffix
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return prefix + ranges[0][0] + suffix
    written = ",".join(first if first == last else f"{first}-{last}" for first, last in ranges)
    return f"{prefix}[{written}]{suffix}"
