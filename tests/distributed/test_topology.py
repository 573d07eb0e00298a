"""Ranks on a topology: who writes how much is what the plan says, and ranks that disagree hear of it together."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from click.testing import CliRunner
from jobs import prints, rank, same, whole
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastckpt
from fastckpt import Checkpointer, Options, RankPath, Topology, TopologyError
from fastckpt.cli.main import commands
from fastckpt.plan import rates
from fastckpt.storage.local import LocalStore

pytestmark = pytest.mark.distributed

CHUNK_BYTES = 4096
OPTIONS = Options(chunk_bytes=CHUNK_BYTES, commit_seconds_max=60)
UPLINKS = {"slow": "1 GB/s", "fast": "3 GB/s"}


def replicated() -> nn.Module:
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Linear(512, 400), broadcast_buffers=False)


def topology() -> Topology:
    """Four ranks on nodes of their own, two behind each uplink."""
    document = {
        "node": {"count": 4, "ranks": {"0": "0", "1": "1", "2": "2", "3": "3"}},
        "supernode": {"names": list(UPLINKS), "nodes": 2, "capacities": UPLINKS},
    }
    return Topology.parse(document)


def written(url: str, step: int) -> list[int]:
    """Bytes in the packs of each rank."""
    snapshot = fastckpt.open(url).snapshot(step)
    tables = [snapshot.table(number) for number in range(snapshot.world_size)]
    return [int(np.frombuffer(table.length, "<u4").sum()) for table in tables]


def save_and_restore(url: str) -> dict[str, str]:
    model = replicated()
    before = prints(whole(model))
    with Checkpointer(url, options=OPTIONS, topology=topology()) as ckpt:
        pending = ckpt.save(1, {"model": model})
        pending.wait()
        if rank() == 0:
            planned = pending.timeline()["otherData"]["placement"]
            assert planned == pending.snapshot.environment["placement"]
            assert planned["writers"] == 4
            assert planned["binding"] == ["all 2 supernodes"]
            assert planned["gap"] == planned["makespan_seconds"] / planned["bound_seconds"] - 1 < 0.05
            assert planned["objects"] == 16
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with Checkpointer(url, options=OPTIONS) as ckpt:
        ckpt.restore({"model": model})
    assert prints(whole(model)) == before
    return before


def test_the_packs_of_a_save_hold_what_the_plan_gives_each_writer(tmp_path: Path) -> None:
    url = str(tmp_path / "repository")
    same(ranks.run(4, save_and_restore, url))
    sizes = written(url, 1)
    total = sum(sizes)
    assert total == 400 * 513 * 4
    for size, share in zip(sizes, (1 / 8, 1 / 8, 3 / 8, 3 / 8), strict=True):
        assert abs(size - total * share) <= 0.005 * total + 2 * CHUNK_BYTES
    shown = CliRunner().invoke(commands, ["show", url]).output
    assert "placement    4 writers, planned to take" in shown
    assert "all 2 supernodes (gap " in shown
    assert "16 objects, 0.016 s to make" in shown


def save_with(url: str, others: dict[int, Any]) -> str:
    given = others.get(rank(), others[0])
    model = replicated()
    with Checkpointer(url, options=OPTIONS, topology=given) as ckpt:
        with pytest.raises(TopologyError) as prepared:
            ckpt.prepare({"model": model})
        with pytest.raises(TopologyError) as saved:
            ckpt.save(1, {"model": model})
        assert str(saved.value) == str(prepared.value)
    return str(saved.value)


def other_uplink() -> Topology:
    return Topology.parse(
        {**topology().to_dict(), "supernode": {"names": list(UPLINKS), "nodes": 2, "capacities": {"slow": "2 GB/s"}}}
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({0: topology(), 3: other_uplink()}, ["rank 3", "supernode", "capacities"]),
        ({0: topology(), 1: None}, ["rank 1: nothing", "ranks 0, 2-3: a topology"]),
        ({0: RankPath.of("a", "s"), 2: RankPath.of("b", levels=("node",))}, ["rank 2", "levels"]),
        ({0: Topology.from_hosts(["a", "b"])}, ["2", "4"]),
        ({0: Topology.parse({"node": {"names": "cn[1-4]", "ranks": 1}})}, ["cn"]),
    ],
    ids=["capacity", "none", "levels", "ranks", "hosts"],
)
def test_ranks_that_do_not_agree_all_hear_who_and_in_what(
    given: dict[int, Any], words: list[str], tmp_path: Path
) -> None:
    message = same(ranks.run(4, save_with, str(tmp_path / "repository"), given))
    for word in words:
        assert word in message
    assert not (tmp_path / "repository").exists()


def save_beside_a_slow_writer(url: str) -> None:
    rates.SAMPLE_BYTES_MIN = 1
    if rank() == 3:
        write = LocalStore.write

        def slow(store: LocalStore, name: str, **options: int) -> Any:
            if name.startswith("packs/"):
                time.sleep(0.4)
            return write(store, name, **options)

        LocalStore.write = slow  # type: ignore[method-assign]
    model = replicated()
    path = RankPath.of(f"node {rank()}", "all")
    with Checkpointer(url, options=OPTIONS, topology=path) as ckpt:
        for step in range(1, 5):
            ckpt.save(step, {"model": model}).wait()
        before = prints(whole(model))
        ckpt.restore({"model": model})
        assert prints(whole(model)) == before


def test_a_writer_that_was_slow_is_given_less_by_the_saves_that_follow(tmp_path: Path) -> None:
    url = str(tmp_path / "repository")
    ranks.run(4, save_beside_a_slow_writer, url)
    first, last = written(url, 1), written(url, 4)
    assert max(first) - min(first) <= 2 * CHUNK_BYTES
    assert last[3] < 0.3 * first[3]
    assert sum(last) == sum(first)
