"""The examples in FORMAT.md are what the code reads, and its tables name what the code knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastckpt.format import document, pack, value
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.decision import Abort, Commit, Entry, Live, Open, decode_format
from fastckpt.format.dtype import ITEM_BYTES
from fastckpt.format.tables import Index, Layout, Part, RankTable, decode_layout

TEXT = (Path(__file__).parents[2] / "fastckpt" / "format" / "FORMAT.md").read_text()


def block(kind: str) -> str:
    return re.search(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)[1]


def test_the_example_document_is_a_format_object() -> None:
    assert decode_format(block("document").encode()).chunk_bytes == 4194304


def test_the_example_layout_has_the_digest_the_page_states() -> None:
    data = bytes.fromhex(block("layout"))
    assert document.digest(data) in TEXT
    layout = decode_layout(data, document.digest(data)).layout
    assert (layout.keys, layout.shapes, layout.dtypes) == (["model.w"], [[2, 2]], ["float32"])


def test_the_example_pack_holds_the_chunk_the_page_says() -> None:
    data = bytes.fromhex(block("pack"))
    assert len(data) == 196
    assert data[:16] == bytes(range(16))
    trailer = data[-pack.TRAILER_BYTES :]
    size = pack.footer_bytes(trailer, len(data), "example")
    footer = pack.decode_footer(data[16 : 16 + size], trailer, 16, "example")
    assert footer.hashes == chunk_hash(data[:16])


@pytest.mark.parametrize("kind", [Open, Commit, Abort, Entry, Live, Layout, Part, RankTable, Index, pack.Footer])
def test_every_field_of_the_format_is_on_the_page(kind: type) -> None:
    assert not [name for name in kind.__struct_fields__ if f"`{name}`" not in TEXT]


def test_every_dtype_is_on_the_page_with_its_width() -> None:
    rows = dict(re.findall(r"^\| (1|2|4|8|16) \| (.*) \|$", TEXT, re.MULTILINE))
    for dtype, width in ITEM_BYTES.items():
        span = re.fullmatch(r"(u?int)[1-7]", dtype)
        assert f"`{dtype}`" in rows[str(width)] or (span and f"`{span[1]}1` ... `{span[1]}7`" in rows[str(width)]), (
            dtype
        )


def test_the_plain_values_of_the_page_are_those_of_the_module() -> None:
    section = TEXT[TEXT.index("## Plain values") :]
    assert value.__doc__[value.__doc__.index("## Plain values") :].strip() in section
