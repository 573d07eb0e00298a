"""Whatever bytes a store returns, a decoder either returns what they say or raises ``FormatError``, and nothing else.

Bytes that merely are damaged stop at a digest. So most cases here carry digests that match: valid metadata with pieces
replaced, cut or doubled, sealed again, as a bug or an attacker would write it.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastckpt.errors import FormatError
from tests.property.metadata_objects import ATTEMPT, DIGEST, KINDS, WRITER, tree_of

each_kind = pytest.mark.parametrize("kind", KINDS)

numbers = st.integers(-2, 12) | st.sampled_from(
    [255, 256, 4096, 2**31, 2**32, 2**53, 2**62, 2**62 + 1, 2**63, 2**64 - 1]
)
junk = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([WRITER, ATTEMPT, DIGEST, "float64", "int4", f"packs/{ATTEMPT}/00/1-1.pack", "../x", "kind"])
    | st.binary(max_size=9)
    | st.sampled_from([[], {}, [[]], [0, 0], [[1]], {"a": 1}, [0] * 65])
)


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one to three places replaced, removed, doubled or added to."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        at = tree
        while True:
            places = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(at[place], (dict, list)) and at[place] and draw(st.integers(0, 3)):
                at = at[place]
                continue
            what = draw(st.sampled_from(["replace", "near", "remove", "double"]))
            if what == "remove":
                del at[place]
            elif what == "near" and type(at[place]) is int:
                at[place] += draw(st.sampled_from([-1, 1]))
            elif what == "near" and isinstance(at[place], bytes) and at[place]:
                position = draw(st.integers(0, len(at[place]) - 1))
                at[place] = at[place][:position] + draw(st.binary(max_size=2)) + at[place][position + 1 :]
            elif what == "double" and isinstance(at, list):
                at.insert(place, copy.deepcopy(at[place]))
            else:
                at[place] = copy.deepcopy(draw(junk))  # sampled_from hands out one and the same list
            break
    return tree


def survives(kind: str, data: bytes) -> None:
    with contextlib.suppress(FormatError):
        KINDS[kind].read(data)


@each_kind
def test_valid_metadata_is_read(kind: str) -> None:
    for thing in KINDS[kind].valid:
        KINDS[kind].read(KINDS[kind].close(KINDS[kind].encode(thing)))


@each_kind
@given(st.binary(max_size=300))
@example(b"")
def test_garbage_is_refused_by_format_error_only(kind: str, data: bytes) -> None:
    survives(kind, data)


@each_kind
@given(st.binary(max_size=300) | junk.map(msgspec.msgpack.encode) | st.text(max_size=20).map(str.encode))
def test_garbage_under_a_matching_digest_is_refused_by_format_error_only(kind: str, raw: bytes) -> None:
    survives(kind, KINDS[kind].close(raw))


@each_kind
@given(data=st.data())
@settings(max_examples=100)
def test_changed_bytes_under_a_matching_digest_raise_format_error_only(kind: str, data: st.DataObject) -> None:
    raw = bytearray(KINDS[kind].encode(data.draw(st.sampled_from(KINDS[kind].valid))))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        stop = data.draw(st.integers(start, min(len(raw), start + 4)))
        raw[start:stop] = data.draw(st.binary(max_size=4))
    survives(kind, KINDS[kind].close(bytes(raw)))


@each_kind
@given(data=st.data())
@settings(max_examples=250)
def test_changed_contents_under_a_matching_digest_raise_format_error_only(kind: str, data: st.DataObject) -> None:
    tree = data.draw(changed(tree_of(data.draw(st.sampled_from(KINDS[kind].valid)))))
    try:
        raw = KINDS[kind].encode(tree)
    except (TypeError, OverflowError):  # what JSON or msgpack cannot hold cannot be stored
        return
    survives(kind, KINDS[kind].close(raw))
