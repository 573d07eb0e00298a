"""On which line of a TOML or JSON text a value is, since their parsers keep no positions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

Path = tuple[str | int, ...]

_TOKEN: Final = re.compile(
    r'''("""(?:\\.|[^\\])*?"""(?!")|\'\'\'.*?\'\'\'(?!\')|"(?:\\.|[^"\\\n])*"|'[^'\n]*')'''  # a string
    r"|(\#[^\n]*|[ \t\r]+)"  # nothing
    r"|(\n|[\[\]{}=:,.])"  # a mark
    r"|([^\s\[\]{}=:,.\#\"']+)",  # a word
    re.DOTALL,
)


def line_of(text: str, path: Sequence[str | int]) -> int:
    """The line, from 1, of the value at ``path``, or of the innermost table around it that is found.

    ``text`` is a document that a parser has accepted: it is not checked again.
    """
    lines = _lines(text)
    return next((lines[at] for end in range(len(path), 0, -1) if (at := tuple(path[:end])) in lines), 1)


def key_twice(text: str) -> tuple[Path, int]:
    """The first key or header that is a second time in the same table, and on which line it is again; an empty path if
    none is.

    ``text`` is a JSON document that a parser has accepted, or the lines of a TOML one as far as a parser came.
    """
    again: list[tuple[Path, int]] = []
    _lines(text, again)
    return again[0] if again else ((), 1)


def _lines(text: str, again: list[tuple[Path, int]] | None = None) -> dict[Path, int]:
    """For each key and each element of an array, the line where it is first mentioned; into ``again``, what has a value
    already."""
    lines: dict[Path, int] = {}
    table: Path = ()  # of the last header
    inside: list[tuple[Path, int | None]] = []  # open brackets of values; an array with the index it has come to
    key: list[str] = []  # its words so far
    brackets = 0  # of the header that is being read: [[ is one more table of an array
    last: dict[Path, int] = {}  # the index of an array's last table
    defined: set[Path] = set()  # what has a value or a header
    value: Path | None = None  # where the value belongs that comes next
    line = 1
    for match in _TOKEN.finditer(text):
        string, nothing, mark, word = match.groups()
        if nothing:
            continue
        if value is not None and mark not in ("]", "\n"):
            lines.setdefault(value, line)
        if string or word:
            if value is None:
                key.append(_unquoted(string) if string else word)
            line += string.count("\n") if string else 0
        elif mark == "\n":
            line += 1
            if not inside:
                brackets, key, value = 0, [], None
        elif mark in "=:" and value is None:
            value = (inside[-1][0] if inside else table) + tuple(key)
            if again is not None and value in lines:
                again.append((value, line))
            defined.add(value)
            for end in range(1, len(value) + 1):
                lines.setdefault(value[:end], line)
            key = []
        elif mark in "[{" and value is None and not inside:
            if mark == "{":  # the whole document, in JSON
                inside.append(((), None))
            else:
                brackets += 1
        elif mark in "[{":
            where = value or ()
            inside.append((where, 0 if mark == "[" else None))
            value = (*where, 0) if mark == "[" else None
        elif mark == "]" and brackets:
            if key:
                if brackets > 1:
                    array = (*_table(key[:-1], last), key[-1])
                    last[array] = last.get(array, -1) + 1
                table = _table(key, last)
                if again is not None and table in defined:
                    again.append((table, line))
                defined.add(table)
                for end in range(1, len(table) + 1):
                    lines.setdefault(table[:end], line)
            key = []
        elif mark in "]}" and inside:
            where = inside.pop()[0]
            key = []
            value = where if inside else None
        elif mark == "," and inside:
            where, index = inside[-1]
            key, value = [], None
            if index is not None:
                inside[-1] = (where, index + 1)
                value = (*where, index + 1)
    return lines


def _table(key: Sequence[str], last: Mapping[Path, int]) -> Path:
    """The path that a header means: of an array of tables, the last one."""
    path: Path = ()
    for word in key:
        path += (word,)
        if path in last:
            path += (last[path],)
    return path


def _unquoted(string: str) -> str:
    if string[0] == "'":
        return string[1:-1]
    try:
        return str(json.loads(string, strict=False))
    except ValueError:  # an escape that only TOML has
        return string[1:-1]
