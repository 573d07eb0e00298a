"""Decisions and FORMAT: each rule that one document can break alone has a case that breaks it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from fastckpt.errors import FormatError, LimitExceeded, UnsupportedVersion
from fastckpt.format import document
from fastckpt.format.decision import (
    Abort,
    Commit,
    Decision,
    Format,
    Live,
    Open,
    check_labels,
    decode_decision,
    decode_format,
)

WRITER = "000000000001-0123456789abcdef"
LIVE = Live(
    step=5,
    attempt=f"{WRITER}-000001",
    decision=3,
    created="now",
    bytes=9,
    index="a" * 64,
    metrics={"loss": 0.5},
    note="é",
)
HEAD: dict[str, Any] = {
    "number": 3,
    "previous": "b" * 64,
    "writer": WRITER,
    "created": "now",
    "live": [LIVE],
    "live_at": 3,
}
COMMIT = Commit(**HEAD, snapshot=LIVE)


@pytest.mark.parametrize(
    "entry",
    [
        Open(number=1, previous="", writer=WRITER, created="now", live=[], live_at=1),
        COMMIT,
        msgspec.structs.replace(COMMIT, live=None, live_at=1),
        Abort(**HEAD, attempt=LIVE.attempt),
    ],
    ids=lambda entry: type(entry).__name__,
)
def test_a_decision_comes_back(entry: Decision) -> None:
    assert decode_decision(document.seal(entry), entry.number) == entry


def live(**fields: Any) -> Live:
    return msgspec.structs.replace(LIVE, **fields)


def commit(**fields: Any) -> Commit:
    return msgspec.structs.replace(COMMIT, **fields)


BAD_DECISIONS: dict[str, Decision] = {
    "another number": commit(number=4),
    "a list said to be elsewhere": commit(live_at=2),
    "no list where it is said to be": commit(live=None),
    "a list in the future": commit(live=None, live_at=4),
    "no digest of the one before": commit(previous=""),
    "a digest that is none": commit(previous="B" * 64),
    "a writer that is none": commit(writer="me"),
    "a writer from the future": commit(writer="000000000004-0123456789abcdef"),
    "an OPEN under another number": Open(**HEAD),
    "an attempt that is none": commit(snapshot=live(attempt=WRITER)),
    "an attempt in the list that is none": commit(live=[live(attempt="../../x")]),
    "an ABORT of no attempt": Abort(**HEAD, attempt="x"),
    "a snapshot of a later decision": commit(snapshot=live(decision=4)),
    "a snapshot in the list of a later decision": commit(live=[live(decision=4)]),
    "an index digest that is none": commit(snapshot=live(index="")),
    "a step beyond 2**53": commit(snapshot=live(step=2**53 + 1)),
    "a note too long": commit(snapshot=live(note="n" * 4097)),
    "a note too long in bytes": commit(snapshot=live(note="é" * 2049)),
    "too many metrics": commit(snapshot=live(metrics={str(number): 0.0 for number in range(65)})),
    "a metric with a long name": commit(snapshot=live(metrics={"é" * 129: 0.0})),
    "a metric that is not a number": commit(snapshot=live(metrics={"loss": float("nan")})),
    "a metric in the list that is not a number": commit(live=[live(metrics={"loss": float("inf")})]),
    "a negative step": commit(snapshot=live(step=-1)),
    "negative bytes": commit(snapshot=live(bytes=-1)),
}


@pytest.mark.parametrize("rule", BAD_DECISIONS)
def test_a_decision_that_breaks_one_rule_is_refused(rule: str) -> None:
    with pytest.raises(FormatError):
        decode_decision(document.seal(BAD_DECISIONS[rule]), 3)


def test_a_later_decision_carries_a_digest_of_what_comes_before_it() -> None:
    second = Open(number=2, previous="", writer=WRITER.replace("1", "2", 1), created="now", live=[], live_at=2)
    with pytest.raises(FormatError, match="decisions/000000000002: "):
        decode_decision(document.seal(second), 2)


def test_a_kind_of_decision_that_we_do_not_know_is_refused() -> None:
    data = document.seal({"kind": "retire", **msgspec.to_builtins(HEAD)})
    with pytest.raises(FormatError, match="retire"):
        decode_decision(data, 3)


@pytest.mark.parametrize(
    ("step", "metrics", "note"),
    [
        (-1, {}, ""),
        (2**53 + 1, {}, ""),
        (0, {}, "é" * 2049),
        (0, {str(number): 0.0 for number in range(65)}, ""),
        (0, {"m" * 257: 0.0}, ""),
        (0, {"loss": float("nan")}, ""),
        (0, {"loss": float("-inf")}, ""),
    ],
)
def test_labels_too_large_for_a_decision_are_refused(step: int, metrics: dict[str, float], note: str) -> None:
    with pytest.raises(LimitExceeded):
        check_labels(step, metrics, note)


def test_labels_at_the_limits_are_taken() -> None:
    check_labels(2**53, {f"{number:0256}": 1e308 for number in range(64)}, "n" * 4096)


# --- FORMAT --------------------------------------------------------------------------------------------------------

FORMAT = Format(version=1, features=[], id="0" * 32, chunk_bytes=2**22, created="now")


def read_format(**fields: Any) -> Format:
    return decode_format(document.seal({**msgspec.to_builtins(FORMAT), **fields}))


def test_format_comes_back() -> None:
    assert read_format() == FORMAT
    assert read_format(chunk_bytes=4096).chunk_bytes == 4096
    assert read_format(chunk_bytes=2**26).chunk_bytes == 2**26


@pytest.mark.parametrize("chunk_bytes", [0, 1, -4096, 2048, 4095, 4097, 6144, 2**27, 2**64])
def test_a_chunk_size_that_is_no_power_of_two_from_4_kib_to_64_mib_is_refused(chunk_bytes: int) -> None:
    with pytest.raises(FormatError, match="FORMAT: "):
        read_format(chunk_bytes=chunk_bytes)


def test_a_future_format_is_refused_as_such_whatever_else_it_holds() -> None:
    for fields in ({"version": 2}, {"version": 2, "chunk_bytes": "auto", "more": 1}, {"features": ["packs-v2"]}):
        with pytest.raises(UnsupportedVersion):
            read_format(**fields)


def test_an_unknown_field_in_format_is_refused() -> None:
    with pytest.raises(FormatError, match="more"):
        read_format(more=1)


@pytest.mark.parametrize("version", [0, -3])
def test_a_version_before_the_first_is_refused(version: int) -> None:
    with pytest.raises(FormatError):
        read_format(version=version)


@pytest.mark.parametrize("identity", ["", "zz", "A" * 32, "0" * 31])
def test_an_id_that_is_not_32_hex_digits_is_refused(identity: str) -> None:
    with pytest.raises(FormatError):
        read_format(id=identity)
