"""The two envelopes: a sealed document shows any flipped bit; a table says how long it is before it is unpacked."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from fastckpt.errors import FormatError, LimitExceeded, UnsupportedVersion
from fastckpt.format import codec, document


class Thing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    count: int
    extra: dict[str, Any] = {}


def sealed(line: str | bytes) -> bytes:
    """Any line with a seal that matches: what an attacker or a bug could write."""
    data = line.encode() if isinstance(line, str) else line
    return data + b"\n" + document.digest(data).encode() + b"\n"


THING = Thing(name="é", count=3)
LINE = '{"name":"é","count":3,"extra":{}}'


def test_a_document_is_one_line_of_json_and_one_with_its_hash() -> None:
    assert document.seal(THING) == sealed(LINE)
    assert document.unseal(sealed(LINE), Thing, "x") == THING


def test_every_single_flipped_bit_is_refused() -> None:
    data = document.seal(THING)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError, match="the thing: damaged"):
            document.unseal(bytes(flipped), Thing, "the thing")


def test_every_cut_and_every_addition_is_refused() -> None:
    data = document.seal(THING)
    for changed in (*(data[:end] for end in range(len(data))), data[1:], data + b"\n", b"\n" + data, data + data):
        with pytest.raises(FormatError):
            document.unseal(changed, Thing, "x")


@pytest.mark.parametrize(
    "line",
    [
        '{"count":3,"name":"é","extra":{}}',
        '{"name": "é","count":3,"extra":{}}',
        '{"name":"é","count":3,"extra":{}} ',
        '{"name":"é","count":3}',
        '{"name":"\\u00e9","count":3,"extra":{}}',
        '{"name":"é","count":4,"count":3,"extra":{}}',
        '{"name":"é","count":3,"extra":{"a":1,"a":1}}',
        '{"name":"é","count":3,"extra":{"a":1.50}}',
        '{"name":"é","count":3.0,"extra":{}}',
    ],
)
def test_json_in_any_but_the_canonical_form_is_refused(line: str) -> None:
    assert json.loads(line)["name"] == "é", "the line is good JSON"
    with pytest.raises(FormatError, match=r"x: (not in canonical form|Expected `int`, got `float`)"):
        document.unseal(sealed(line), Thing, "x")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "[]",
        "{",
        '{"name":"é","count":"3","extra":{}}',
        '{"name":"é","extra":{}}',
        '{"name":"é","count":3,"extra":{},"more":1}',
        '{"name":"é","count":3,"extra":{"a":NaN}}',
        '{"name":"é","count":3,"extra":{"a":1e999}}',
        '{"name":"\\ud800","count":3,"extra":{}}',
        b'{"name":"\xff","count":3,"extra":{}}',
        '{"name":"é","count":3,"extra":{"a":' + "[" * 100_000 + "]" * 100_000 + "}}",
        '{"name":"é","count":1' + "0" * 5000 + ',"extra":{}}',
    ],
    ids=lambda line: ascii(line)[:40],
)
def test_what_is_not_exactly_the_declared_fields_is_refused(line: str | bytes) -> None:
    with pytest.raises(FormatError, match="x: "):
        document.unseal(sealed(line), Thing, "x")


@pytest.mark.parametrize("depth", range(900, 1010, 7))
def test_nesting_near_the_limit_of_recursion_is_read_or_refused(depth: int) -> None:
    line = '{"name":"é","count":3,"extra":{"a":' + "[" * depth + "]" * depth + "}}"
    try:
        document.unseal(sealed(line), Thing, "x")
    except FormatError as error:
        assert "recursion" in str(error)  # noqa: PT017 - either is right; anything else is not


def test_a_document_too_large_to_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "DOCUMENT_BYTES_MAX", 100)
    document.seal(Thing(name="n" * 60, count=1))
    with pytest.raises(LimitExceeded):
        document.seal(Thing(name="n" * 100, count=1))


# --- version and features ------------------------------------------------------------------------------------------


def version(line: str) -> None:
    document.unseal_version(sealed(line), 1, frozenset({"old"}), "FORMAT")


def test_a_known_version_with_known_features_passes() -> None:
    version('{"version":1,"features":["old"]}')
    version('{"version":1}')


def test_a_newer_version_is_named_before_anything_else_is_looked_at() -> None:
    with pytest.raises(UnsupportedVersion, match="format version 2, this fastckpt reads up to 1; install a newer"):
        version('{"nothing":{"we":"know"},"version":2,"features":["new"]}')


def test_an_unknown_feature_is_named() -> None:
    with pytest.raises(UnsupportedVersion, match="features unknown to this fastckpt: 3, newer"):
        version('{"version":1,"features":["old","newer",3]}')


@pytest.mark.parametrize("line", ["{}", '{"version":"1"}', '{"version":1.5}', '{"version":1,"features":"old"}', "[1]"])
def test_without_a_version_or_a_feature_list_it_is_not_ours(line: str) -> None:
    with pytest.raises(FormatError) as caught:
        version(line)
    assert type(caught.value) is FormatError


@pytest.mark.parametrize("feature", ["[]", "{}"])
def test_a_feature_that_is_no_text_is_refused(feature: str) -> None:
    with pytest.raises(FormatError):
        version('{"version":1,"features":[' + feature + "]}")


# --- tables --------------------------------------------------------------------------------------------------------


class Rows(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    keys: list[str]
    data: bytes


ROWS = Rows(keys=["a", "é"], data=bytes(range(256)))


def table(raw: bytes, declared: int | None = None) -> bytes:
    size = len(raw) if declared is None else declared
    return document.TABLE_MAGIC + size.to_bytes(8, "little") + codec.encode_zstd(raw)


def test_a_table_comes_back() -> None:
    assert document.unpack_table(document.pack_table(ROWS), Rows, "x") == ROWS
    assert document.pack_table(ROWS) == table(msgspec.msgpack.encode(ROWS))


def test_every_cut_of_a_table_is_refused() -> None:
    data = document.pack_table(ROWS)
    for end in range(len(data)):
        with pytest.raises(FormatError, match="the table"):
            document.unpack_table(data[:end], Rows, "the table")


@pytest.mark.parametrize(
    "data",
    [
        b"FCKTAB02" + document.pack_table(ROWS)[8:],
        b"fcktab01" + document.pack_table(ROWS)[8:],
        document.pack_table(ROWS) + b"x",
        table(msgspec.msgpack.encode(ROWS), 10),
        table(msgspec.msgpack.encode(ROWS) + b"\0"),
        table(msgspec.msgpack.encode(ROWS)[:-1]),
        table(msgspec.msgpack.encode({"keys": ["a"]})),
        table(msgspec.msgpack.encode({"keys": ["a"], "data": b"", "more": 1})),
        table(msgspec.msgpack.encode({"keys": [1], "data": b""})),
        table(msgspec.msgpack.encode({"keys": ["a"], "data": "text"})),
        table(b"\x82\xa4keys\x91\xa1\xff\xa4data\xc4\x00"),
        table(b"\x82\xa4keys\xdd\xff\xff\xff\xff"),  # an array that claims 2**32 - 1 items
        table(b"\xdf\xff\xff\xff\xff"),
        table(b"\x91" * 200_000),
        table(b""),
    ],
)
def test_what_is_not_exactly_the_declared_table_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError, match="the table"):
        document.unpack_table(data, Rows, "the table")


@pytest.mark.parametrize("declared", [document.TABLE_BYTES_MAX + 1, 2**64 - 1])
def test_a_table_that_declares_too_much_is_refused_unread(declared: int) -> None:
    with pytest.raises(LimitExceeded, match=f"declares {declared} bytes"):
        document.unpack_table(table(b"x", declared), Rows, "x")


def test_a_table_too_large_to_be_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "TABLE_BYTES_MAX", 100)
    with pytest.raises(LimitExceeded):
        document.pack_table(ROWS)


def test_a_digest_is_64_small_hex_digits() -> None:
    assert document.is_digest(document.digest(b""))
    for text in ("", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n"):
        assert not document.is_digest(text)
