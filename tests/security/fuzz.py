"""Fuzzers for every parser of the format, guided by coverage. A parser raises ``FormatError`` or returns what encodes
to the very bytes it was given, since one thing has one encoding.

    python -m tests.security.fuzz part --runs 1000000 --seed 7
    python -m tests.security.fuzz part --replay part-crash-...        # one input again, with a traceback

The first byte of an input says what the rest is: now and then a whole object; the content of one, closed so that its
digests match; or a program of edits to a valid one, which gets far deeper than bytes do.
"""

from __future__ import annotations

import argparse
import marshal
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["fastckpt.format"]):
    from fastckpt.errors import FormatError
    from fastckpt.format import value
    from tests.property.metadata_objects import ATTEMPT, DIGEST, KINDS, WRITER, tree_of

MEMORY_BYTES_MAX = 2 * 1024**3
SECONDS_MAX = 20
"""For one input."""
EDIT_BYTES = 3
EDITS_MAX = 8
MARSHAL_VERSION = 2
"""The quickest way to copy a tree; later versions keep what occurs twice as one, and an edit would be made in both."""

Path_ = tuple[Any, ...]
INTERESTING: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 255, 256, 4096, 4097, -1, -2, 0.0, 1.0, -0.0, 2.5),
    *(2**31, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**62, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 1e300),
    *("", "a", "b", "../x", "\0", "é", WRITER, ATTEMPT, DIGEST, "0" * 32, "float64", "int4", "bfloat16", "cpu"),
    *(f"packs/{ATTEMPT}/00/0-1.pack", f"packs/{ATTEMPT}/../x.pack", "open", "commit", "abort", "str", "list", "set"),
    *("tuple", "dict", "int", "bytes", "array", "tensor", "scalar", "deque", "counter", "reference", "torch_size"),
    *(b"", b"\0", b"\1\2", bytes(4), bytes(8), bytes(32), bytes(64), b"\xff" * 4, b"\xff" * 8, b"\xff" * 32),
    *([], {}, [[]], [0], [0, 0], [0, 1], [4, 256], [[0, 1]], [0] * 65, {"a": 1}),
]


class Parser:
    """One parser under test."""

    def __init__(self, name: str) -> None:
        self._kind = KINDS[name]
        self._is_value = name == "value"
        trees = [tree_of(thing) for thing in self._kind.valid]
        self._trees = [marshal.dumps(tree, MARSHAL_VERSION) for tree in trees]
        self._places = [list(_places(tree)) for tree in trees]

    def seeds(self) -> list[bytes]:
        contents = [self._kind.encode(thing) for thing in self._kind.valid]
        return [
            *(b"\1" + content for content in contents),
            *(b"\0" + self._kind.close(content) for content in contents),
            *(bytes([128 + number]) for number in range(len(contents))),
        ]

    def check(self, data: bytes) -> None:
        """One input."""
        first, rest = data[0] if data else 0, data[1:]
        whole = rest
        if first >= 128:
            try:
                content = self._kind.encode(self._edited(first % len(self._trees), rest[2:]))
                whole = self._kind.close(_respelled(content, rest) if first & 64 else content)
            except (TypeError, OverflowError, AttributeError):  # what JSON or msgpack cannot hold cannot be stored
                return
        elif first % 16:
            whole = self._kind.close(rest)
        try:
            found = self._kind.read(whole)
        except FormatError:
            return
        if first % 16 or first >= 128:  # a whole object may hold any of the frames that decode to one content
            again = value.encode(found) if self._is_value else self._kind.close(self._kind.encode(found))
            assert again == whole, f"has two encodings: {found}"

    def _edited(self, number: int, program: bytes) -> Any:
        tree, places = marshal.loads(self._trees[number]), self._places[number]
        for at in range(0, min(len(program), EDITS_MAX * EDIT_BYTES) - EDIT_BYTES + 1, EDIT_BYTES):
            where, what, argument = program[at : at + EDIT_BYTES]
            *way, last = places[where % len(places)]
            try:
                parent = tree
                for step in way:
                    parent = parent[step]
                _edit(parent, last, what, argument, tree)
            except (LookupError, TypeError):  # an earlier edit took that place away
                continue
        return tree


def _respelled(content: bytes, how: bytes) -> bytes:
    """The same said in another way, if the place happens to be right for it: JSON with a space, msgpack with an int or
    text longer than need be, either with a piece of it twice."""
    what, where = [*how[:2], 0, 0][:2]
    at = where % (len(content) + 1)
    head, tail = content[:at], content[at:]
    if what % 4 == 0:
        return head + b" " + tail
    if what % 4 == 1:
        return head + b"\xcc" + tail
    if what % 4 == 2:
        return head + b"\xd9" + bytes([tail[0] & 0x1F]) + tail[1:] if tail else content
    return head + tail[: what // 4] + tail


def _places(tree: Any, way: Path_ = ()) -> Any:
    """The way to everything inside a tree."""
    for step in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*way, step)
        yield from _places(tree[step], (*way, step))


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(inner) for key, inner in tree.items()}
    return [_copy(inner) for inner in tree] if isinstance(tree, list) else tree


def _edit(parent: Any, last: Any, what: int, argument: int, tree: Any) -> None:
    kind = what % 8
    old = parent[last]
    if kind == 0:
        del parent[last]
    elif kind == 1 and isinstance(parent, list):
        parent.insert(last, _copy(old))
    elif kind == 2 and isinstance(old, int):
        parent[last] = old + argument - 128
    elif kind == 3 and isinstance(old, bytes) and old:
        at = (what >> 3) % len(old)
        parent[last] = old[:at] + bytes([argument]) + old[at + 1 :]
    elif kind == 4 and isinstance(old, bytes | list):
        parent[last] = old[: argument % (len(old) + 1)]
    elif kind == 5 and isinstance(old, bytes | list | str):
        parent[last] = old + old
    elif kind == 6 and isinstance(old, list):
        old.reverse()
    else:
        parent[last] = _copy(INTERESTING[argument % len(INTERESTING)])


def fuzz(name: str, runs: int, seed: int, seconds: int, artifacts: Path) -> None:
    """Does not return: the fuzzer ends the process, with 0 if it found nothing."""
    parser = Parser(name)
    with tempfile.TemporaryDirectory() as corpus:
        seeds = parser.seeds()
        for number, data in enumerate(seeds):
            (Path(corpus) / str(number)).write_bytes(data)
        options = {
            "runs": runs,
            "seed": seed,
            "max_total_time": seconds,
            "max_len": 2 * max(map(len, seeds)),
            "keep_seed": 1,  # programs reach what contents reach in fewer bytes, but not the other way round
            "reduce_inputs": 0,
            "timeout": SECONDS_MAX,
            "rss_limit_mb": MEMORY_BYTES_MAX >> 20,
            "artifact_prefix": f"{artifacts}/{name}-",
            "print_final_stats": 1,
        }
        atheris.Setup([sys.argv[0], *(f"-{key}={chosen}" for key, chosen in options.items()), corpus], parser.check)
        atheris.Fuzz()


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("kind", choices=sorted(KINDS))
    arguments.add_argument("--runs", type=int, default=-1)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--seconds", type=int, default=0, help="stop after so many; 0: never")
    arguments.add_argument("--artifacts", type=Path, default=Path(), help="where an input that fails is left")
    arguments.add_argument("--replay", type=Path, help="run this one input and stop")
    given = arguments.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES_MAX, MEMORY_BYTES_MAX))
    if given.replay:
        Parser(given.kind).check(given.replay.read_bytes())
    else:
        fuzz(given.kind, given.runs, given.seed, given.seconds, given.artifacts)


if __name__ == "__main__":
    main()
