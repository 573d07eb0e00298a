"""The names of objects: made in one place, and read back only if made there."""

from __future__ import annotations

import pytest

from fastckpt.errors import FormatError
from fastckpt.format import names
from fastckpt.storage.names import check_name

WRITER = "000000000012-0123456789abcdef"
ATTEMPT = f"{WRITER}-000007"


def test_names_are_as_the_format_says() -> None:
    assert names.decision(12) == "decisions/000000000012"
    assert names.layout("ab") == "layouts/ab"
    assert names.writer(12, "0123456789abcdef") == WRITER
    assert names.attempt(WRITER, 7) == ATTEMPT
    assert names.part(ATTEMPT, 3) == f"attempts/{ATTEMPT}/part-000003"
    assert names.index(ATTEMPT) == f"attempts/{ATTEMPT}/index"
    assert names.pack(ATTEMPT, 5, 1) == f"packs/{ATTEMPT}/00/5-1.pack"
    assert names.pack(ATTEMPT, 256 * 300 + 5, 1) == f"packs/{ATTEMPT}/300/76805-1.pack"


def test_every_name_is_one_that_stores_take() -> None:
    for name in (
        names.FORMAT,
        names.decision(10**12 - 1),
        names.part(ATTEMPT, 10**7),
        names.index(names.attempt(WRITER, 10**9 - 1)),
        names.pack(ATTEMPT, 10**6, 10**6),
    ):
        check_name(name)


def test_names_are_read_back() -> None:
    assert names.decision_number("000000000012") == 12
    assert names.attempt_writer(ATTEMPT) == WRITER
    assert names.attempt_writer(names.attempt(WRITER, 10**6)) == WRITER
    assert names.writer_open_number(WRITER) == 12
    assert names.pack_attempt(names.pack(ATTEMPT, 256 * 300, 12)) == ATTEMPT


@pytest.mark.parametrize(
    "child",
    ["", "1", "000000000000", "0000000000012", "00000000001x", "000000000012\n", "٠٠٠٠٠٠٠٠٠٠١٢", "-00000000001"],
)
def test_what_is_not_the_name_of_a_decision_is_refused(child: str) -> None:
    with pytest.raises(FormatError, match="not the name of a decision"):
        names.decision_number(child)


@pytest.mark.parametrize(
    "text", ["", WRITER, ATTEMPT + "\n", ATTEMPT.upper(), ATTEMPT[1:], f"{WRITER}-00001", f"x{ATTEMPT}"]
)
def test_what_is_not_an_attempt_id_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="not an attempt id"):
        names.attempt_writer(text)


@pytest.mark.parametrize("text", ["", ATTEMPT, WRITER + "\n", WRITER[1:], WRITER[:-1] + "g"])
def test_what_is_not_a_writer_id_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="not a writer id"):
        names.writer_open_number(text)


@pytest.mark.parametrize("nonce", ["", "0123456789ABCDEF", "0123456789abcde", "../456789abcdef0"])
def test_a_writer_id_is_not_made_of_anything_else(nonce: str) -> None:
    with pytest.raises(ValueError, match="not a writer id"):
        names.writer(12, nonce)
    with pytest.raises(ValueError, match="not a writer id"):
        names.writer(10**12, "0123456789abcdef")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "FORMAT",
        f"packs/{ATTEMPT}/0/5-1.pack",
        f"packs/{ATTEMPT}/00/5-1.pack\n",
        f"packs/{ATTEMPT}/00/../5-1.pack",
        f"packs/{ATTEMPT}/00/5.pack",
        f"/packs/{ATTEMPT}/00/5-1.pack",
        f"packs/{WRITER}/00/5-1.pack",
        f"../packs/{ATTEMPT}/00/5-1.pack",
    ],
)
def test_what_is_not_the_name_of_a_pack_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="not the name of a pack"):
        names.pack_attempt(name)


@pytest.mark.parametrize("name", [f"packs/{ATTEMPT}/{'0' * 300}/5-1.pack", f"packs/{ATTEMPT}/00/5-{'1' * 300}.pack"])
def test_a_pack_name_that_no_store_takes_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="200"):
        check_name(name)
    with pytest.raises(FormatError):
        names.pack_attempt(name)
