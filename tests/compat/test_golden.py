"""Repositories that are on people's disks stay readable, and FORMAT.md says all that it takes to read them."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import independent_reader
import make_golden
import msgspec
import numpy as np
import pytest
from independent_reader import BadRepository

import fastckpt

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
NAMES = (
    r"FORMAT",
    r"decisions/[0-9]{12}",
    r"layouts/[0-9a-f]{64}",
    r"attempts/[0-9]{12}-[0-9a-f]{16}-[0-9]{6,}/part-[0-9]{6}",
    r"attempts/[0-9]{12}-[0-9a-f]{16}-[0-9]{6,}/index",
    r"packs/[0-9]{12}-[0-9a-f]{16}-[0-9]{6,}/[0-9]{2,}/[0-9]+-[0-9]+\.pack",
)

Found = list[dict[str, Any]]


def objects(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def by_reference(folder: Path) -> Found:
    found = []
    for snapshot in fastckpt.open(str(folder)).snapshots():
        dtypes = dict(zip(snapshot.keys(), snapshot.layout.dtypes, strict=True))
        arrays = {key: snapshot.read(key) for key in dtypes}
        values = [
            {name: snapshot.value(name, rank) for name in snapshot.value_digests(rank)}
            for rank in range(snapshot.world_size)
        ]
        found.append(texts(snapshot.step, dtypes, arrays, values))
    return found


def by_page(folder: Path) -> Found:
    """As the independent reader finds it; the footer of every pack is read as well."""
    repository = independent_reader.Repository(folder)
    found = []
    for entry in repository.snapshots:
        snapshot = repository.open(entry)
        arrays, dtypes = {}, {}
        for number, ((key, owner), array) in enumerate(snapshot.tensors().items()):
            name = key if owner == -1 else f"{key}@{owner}"
            arrays[name], dtypes[name] = array, snapshot.layout.dtypes[number]
        found.append(texts(entry["step"], dtypes, arrays, snapshot.values()))
    for name in objects(folder):
        if name.startswith("packs/"):
            repository.pack_footer(name)
    return found


def texts(step: int, dtypes: dict[str, str], arrays: dict[str, Any], values: list[dict[str, Any]]) -> dict[str, Any]:
    tensors = {key: make_golden.tensor_text(dtypes[key], a.shape, a.tobytes()) for key, a in sorted(arrays.items())}
    shown = [{n: make_golden.shortened(make_golden.value_text(v)) for n, v in one.items()} for one in values]
    return {"step": step, "tensors": tensors, "values": shown}


@pytest.mark.parametrize("name", EXPECTED)
def test_fastckpt_finds_what_was_saved(name: str) -> None:
    assert by_reference(GOLDEN / name) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_reader_written_from_the_page_finds_what_was_saved(name: str) -> None:
    assert by_page(GOLDEN / name) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_object_has_a_name_of_the_page(name: str) -> None:
    found = objects(GOLDEN / name)
    assert all(any(re.fullmatch(pattern, one) for one in found) for pattern in NAMES)
    assert not [one for one in found if not any(re.fullmatch(pattern, one) for pattern in NAMES)]


def test_the_golden_repositories_hold_what_is_hard_to_read() -> None:
    seen = set()
    for name in EXPECTED:
        repository = independent_reader.Repository(GOLDEN / name)
        for snapshot in map(repository.open, repository.snapshots):
            layout = snapshot.layout
            seen |= {f"codec {number}" for table in snapshot.tables.values() for number in table["codec"]}
            seen |= {"bundle" for pieces in layout.chunks if len(pieces) > 1}
            seen |= {"alias" for _ in layout.aliases}
            seen |= {"own tensor" for owner in layout.owners if owner >= 0}
            seen |= {f"{len(set(layout.rank_nodes))} nodes"}
            for family in layout.families:
                seen |= {"listed mesh" if family["mesh"]["ranks"] else "mesh", f"split in {len(family['sharded'])}"}
                seen |= {"copies of parts" for _ in family["sharded"] if len(family["mesh"]["sizes"]) > 1}
                seen |= {"cut twice" for splits in family["splits"] if len({dim for dim, _ in splits}) < len(splits)}
            seen |= {"empty tensor" for shape in layout.shapes if 0 in shape}
            seen |= {"no dimensions" for shape in layout.shapes if not shape}
            for tensor, _, sizes in layout.shards:
                shape = layout.shapes[tensor]
                row = math.prod(shape[1:]) * layout.item_bytes(tensor)
                seen |= {"long row"} if row > layout.chunk_bytes else set()
                seen |= {"part of a long row"} if row > layout.chunk_bytes and sizes[1:] != shape[1:] else set()
    assert seen == {
        *("codec 0", "codec 1", "bundle", "alias", "own tensor", "1 nodes", "2 nodes"),
        *("empty tensor", "no dimensions", "long row", "part of a long row"),
        *("mesh", "listed mesh", "split in 0", "split in 1", "split in 2", "copies of parts", "cut twice"),
    }


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_both_readers_agree_on_what_is_written_today(tmp_path: Path, codec: str) -> None:
    expected = make_golden.one_rank(tmp_path / "new", codec)
    with fastckpt.Checkpointer(str(tmp_path / "new")) as ckpt:
        for step in range(3, 20):  # until decisions no longer all repeat the list of live snapshots
            ckpt.save(step, {"epoch": step})
            expected.append({"step": step, "tensors": {}, "values": [{"epoch": str(step)}]})
    for step in expected:
        step["tensors"] = dict(sorted(step["tensors"].items()))
    assert any('"live":null' in path.read_text() for path in (tmp_path / "new" / "decisions").iterdir())
    assert by_reference(tmp_path / "new") == by_page(tmp_path / "new") == expected


@pytest.mark.parametrize("pattern", NAMES)
@pytest.mark.parametrize("name", ["v1-raw", "v1-two-ranks"])
def test_the_reader_of_the_page_finds_every_flipped_byte(tmp_path: Path, name: str, pattern: str) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "damaged")
    damaged = next(one for one in objects(tmp_path / "damaged") if re.fullmatch(pattern, one))
    path = tmp_path / "damaged" / damaged
    data = path.read_bytes()
    for at in sorted({0, len(data) // 3, len(data) // 2, len(data) - 50, len(data) - 1}):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BadRepository):
            by_page(tmp_path / "damaged")
    path.write_bytes(data[:-1])
    with pytest.raises(BadRepository):
        by_page(tmp_path / "damaged")
    path.unlink()
    with pytest.raises(BadRepository):
        by_page(tmp_path / "damaged")


def test_the_reader_of_the_page_writes_numbers_as_documents_do() -> None:
    patterns = np.random.default_rng(3).integers(0, 2**64, 2000, np.uint64)
    numbers = [struct.unpack("<d", struct.pack("<Q", int(bits)))[0] for bits in patterns]
    numbers += [sign * base * 10.0**power for sign in (1, -1) for base in (0, 1, 1.25, 99) for power in range(-9, 20)]
    for number in filter(math.isfinite, numbers):
        assert independent_reader.number(number) == msgspec.json.encode(number).decode()
