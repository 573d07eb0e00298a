"""What a rank of a job of another size reads of plain values: what the index says of them, and little else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import fastckpt
from bench.metadata import jobs
from bench.metadata.crowd import Crowd
from fastckpt.errors import SnapshotDamaged
from fastckpt.format import value
from fastckpt.options import Options
from fastckpt.plan.restore_plan import Selection
from fastckpt.restore import values_elsewhere, values_of
from fastckpt.save import Saves
from fastckpt.storage.local import LocalStore
from fastckpt.trace import Trace

RANKS = 64
EVERYTHING = Selection()


def saved(path: Path, change: dict[int, dict[str, Any]] | None = None) -> fastckpt.Snapshot:
    """All ranks have an epoch, and a seed of their own. ``change``: what else a rank has."""
    job = jobs.fsdp(RANKS, 20)
    crowd = Crowd(job.offers(), job.nodes)
    crowd.values = {
        rank: {name: value.encode(v) for name, v in {"epoch": 3, "seed": rank, **(change or {}).get(rank, {})}.items()}
        for rank in range(RANKS)
    }
    saves = Saves(LocalStore(str(path)), crowd, Options())
    crowd.begin(1, saves)
    crowd.commit(saves.agree(1, crowd.kinds[0], Trace()))
    return fastckpt.open(str(path)).snapshot()


def found(
    snapshot: fastckpt.Snapshot, selection: Selection = EVERYTHING
) -> dict[str, tuple[object, tuple[int, ...], bool]]:
    values = values_of(snapshot, 5, 48, selection)
    return {name: (value.decode(one.blob), one.ranks, exact) for name, (one, exact, _) in values.items()}


def test_what_all_ranks_have_is_read_from_the_first_part_alone(tmp_path: Path) -> None:
    snapshot = saved(tmp_path)
    everyone = tuple(range(RANKS))
    assert found(snapshot) == {"epoch": (3, everyone, True), "seed": (0, everyone, False)}
    assert values_elsewhere(snapshot, ["late"], 48, EVERYTHING) == {}
    assert list(snapshot._parts) == [0]


def test_what_only_some_ranks_have_is_looked_for_in_all_parts(tmp_path: Path) -> None:
    snapshot = saved(tmp_path, {rank: {"late": 7} for rank in (9, 60)})
    everyone = tuple(range(RANKS))
    assert found(snapshot, Selection(["epoch"])) == {"epoch": (3, everyone, True)}
    assert list(snapshot._parts) == [0], "it was not asked for"
    assert found(snapshot)["late"] == (7, (9, 60), True)
    assert set(values_elsewhere(snapshot, ["late"], 48, EVERYTHING)) == {"late"}


def test_one_rank_that_differs_makes_a_value_each_ranks_own(tmp_path: Path) -> None:
    snapshot = saved(tmp_path, {63: {"epoch": 4}})
    assert snapshot.index.values == {"epoch": "own", "seed": "own"}
    assert found(snapshot)["epoch"] == (3, tuple(range(RANKS)), False)


LIES = {
    "a name is missing": ({"epoch": "same"}, "says nothing of value 'seed', which rank 0 has"),
    "a name too many": (
        {"epoch": "same", "more": "own", "seed": "own"},
        "says that every rank has a value 'more', and rank 0 has not",
    ),
    "ranks of the first node differ": (
        {"epoch": "same", "seed": "same"},
        "says that every rank has an equal value 'seed', and rank 1 has not",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_says_what_the_first_part_does_not_is_damaged(tmp_path: Path, lie: str) -> None:
    values, says = LIES[lie]
    snapshot = saved(tmp_path)
    snapshot._index = msgspec.structs.replace(snapshot.index, values=values)
    with pytest.raises(SnapshotDamaged, match=says) as caught:
        values_of(snapshot, 5, 48, EVERYTHING)
    assert caught.value.object == f"attempts/{snapshot.attempt}/index"


@pytest.mark.parametrize("kind", ["same", "own"])
def test_an_index_that_other_parts_belie_is_damaged_for_whoever_reads_them(tmp_path: Path, kind: str) -> None:
    odd = {63: {"epoch": 4}} if kind == "same" else {rank: {"late": 7} for rank in range(60)}
    name = "epoch" if kind == "same" else "late"
    snapshot = saved(tmp_path, odd)
    assert snapshot.index.values is not None
    snapshot._index = msgspec.structs.replace(snapshot.index, values={**snapshot.index.values, name: kind})
    assert name in found(snapshot), "it reads one part"
    for read in (lambda: snapshot.value(name, 63), lambda: snapshot.read(snapshot.keys()[0])):
        with pytest.raises(SnapshotDamaged, match=f"value '{name}', and rank 6[0-3] has not"):
            read()
