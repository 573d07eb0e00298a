"""Metadata at scale, as the benchmark measures it, at a size that takes a moment: what grows with ranks must not grow
with ranks times keys, and what is alike is said once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import fastckpt
from bench.metadata import __main__ as bench
from bench.metadata import jobs
from bench.metadata.crowd import Crowd
from fastckpt import agreement
from fastckpt.format import document
from fastckpt.format.decision import VERSION, Format
from fastckpt.options import Options
from fastckpt.save import Saves
from fastckpt.storage.local import LocalStore
from fastckpt.trace import Trace

RANKS, KEYS = 256, 120
LINE_BYTES_MAX = 128


def by_name(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in found["exchanges"]}


@pytest.mark.parametrize("name", jobs.JOBS)
def test_a_node_says_little_when_all_is_alike_and_a_rank_of_another_job_size_reads_little(
    tmp_path: Path, name: str
) -> None:
    job = jobs.JOBS[name](RANKS, KEYS)
    found = bench.saving(job, str(tmp_path))
    exchanges = by_name(found)
    for exchange in ("hello", "topology", "offers-digests", "content-digests", "commit"):
        assert exchanges[exchange]["line_bytes_max"] <= LINE_BYTES_MAX
    assert exchanges["offers"]["line_bytes_median"] <= LINE_BYTES_MAX, "one rank of a kind says it in full"
    assert [one["name"] for one in found["exchanges"]][-2:] == ["hello", "commit"], "nothing has changed"
    assert found["shards"] >= found["keys"]
    assert found["layout_bytes"] < 40 * found["keys"]
    taken = bench.taking(job, str(tmp_path))
    assert taken["rank_chunks"] <= found["chunks"]
    restored = bench.restoring(job, jobs.JOBS[name](RANKS // 2, KEYS), str(tmp_path))
    parts = {path.name: path.stat().st_size for path in (tmp_path / "attempts").glob("*2/part-*")}
    assert len(parts) == RANKS // jobs.RANKS_A_NODE
    if name in ("fsdp", "3d"):
        assert restored["restore_parts"] <= 3
        first = parts["part-000000"]  # has the values that are the same on all
        assert restored["restore_read_bytes"] <= restored["restore_own_bytes"] + first + 100 * len(parts) + 1000


def test_the_layout_of_more_ranks_is_hardly_larger(tmp_path: Path) -> None:
    sizes = []
    for ranks in (64, 1024):
        (tmp_path / str(ranks)).mkdir()
        sizes.append(bench.saving(jobs.fsdp(ranks, KEYS), str(tmp_path / str(ranks)))["layout_bytes"])
    assert sizes[1] < 1.5 * sizes[0]


def saved(job: jobs.Job, directory: Path) -> fastckpt.Snapshot:
    crowd = Crowd(job.offers(), job.nodes)
    saves = Saves(LocalStore(str(directory)), crowd, Options())
    crowd.begin(1, saves)
    crowd.commit(saves.agree(1, crowd.kinds[0], Trace()))
    return fastckpt.open(str(directory)).snapshot()


def test_a_repository_that_older_readers_know_gets_every_shard_listed(tmp_path: Path) -> None:
    job = jobs.three_d(128, 100)
    compact = saved(job, tmp_path / "compact")
    header = Format(version=VERSION, features=[], id="0" * 32, chunk_bytes=compact.layout.chunk_bytes, created="")
    LocalStore(str(tmp_path / "old")).create("FORMAT", document.seal(header))
    old = saved(job, tmp_path / "old")
    assert compact.layout.families
    assert compact.index.values == {"epoch": "same", "rng": "own", "scheduler": "same"}
    assert not old.layout.families
    assert old.index.values is None
    assert old.layout.keys == compact.layout.keys
    for number in range(len(old.layout.keys)):
        boxes = [{s.layout.box(place.shard) for place in s.chunks.places(number)} for s in (old, compact)]
        assert boxes[0] == boxes[1]


def test_shards_that_are_too_small_for_so_many_get_larger_chunks(tmp_path: Path) -> None:
    job = jobs.hsdp(256, 100)
    usual = saved(job, tmp_path / "usual").chunks
    with mock.patch.object(agreement, "AUTO_CHUNKS_MAX", len(usual) // 4):
        fewer = saved(job, tmp_path / "fewer").chunks
    assert len(fewer) <= len(usual) // 4
    assert fewer.layout.chunk_bytes > usual.layout.chunk_bytes
