"""A topology that each rank finds out by a function: called once, and what goes wrong on one rank all hear at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from jobs import rank, same

from fastckpt import Checkpointer, Options, RankPath, TopologyError
from fastckpt.job import group as job_groups

pytestmark = pytest.mark.distributed

RANKS = 3
OPTIONS = Options(chunk_bytes=4096, commit_seconds_max=60, read_fanout="job")


def state() -> dict[str, Any]:
    return {"weights": torch.arange(5000.0)}


class Counted:
    """A function that counts its calls."""

    def __init__(self, find: Callable[[], Any]) -> None:
        self._find = find
        self.calls = 0

    def __call__(self) -> Any:
        self.calls += 1
        return self._find()


def path() -> RankPath:
    return RankPath.of(f"cn{rank()}", "rack", capacities={"node": "1 GB/s"})


def path_of_nowhere() -> RankPath:
    raise ValueError(f"cn{rank()} is nowhere")


def no_path() -> RankPath:
    return RankPath.of({}["SLURM_TOPOLOGY_ADDR"])


def wrong_type() -> list[str]:
    return [f"cn{rank()}", "rack"]


def exits() -> RankPath:
    raise SystemExit("no scheduler")


def saves_and_restores(url: str) -> None:
    job_groups._node = lambda: str(rank())
    find = Counted(path)
    with Checkpointer(url, options=OPTIONS, topology=find) as ckpt:
        ckpt.prepare(state())
        assert find.calls == 1
        pending = ckpt.save(1, state())
        pending.wait()
        if rank() == 0:
            assert pending.snapshot.environment["placement"]["bound_seconds"] > 0  # of capacities that it gave
        found = {"weights": torch.zeros(5000)}
        assert ckpt.restore(found) == 1
        assert torch.equal(found["weights"], state()["weights"])
        assert find.calls == 1
    find = Counted(lambda: None)
    with Checkpointer(url, options=OPTIONS, topology=find) as ckpt:
        assert ckpt.restore({"weights": torch.zeros(5000)}) == 1
        ckpt.save(2, state()).wait()
        assert find.calls == 1


def hears(url: str, saved: str, on_one: dict[str, Any]) -> dict[str, str]:
    """What is raised where rank 1 is given each of these, and the others a function."""
    job_groups._node = lambda: str(rank())
    messages = {}
    for name, wrong in on_one.items():
        find = Counted(path if rank() != 1 or not callable(wrong) else wrong)
        given = wrong if rank() == 1 and not callable(wrong) else find
        with Checkpointer(url, options=OPTIONS, topology=given) as ckpt:
            if name == "exits" and rank() == 1:
                with pytest.raises(SystemExit, match="no scheduler"):
                    ckpt.prepare(state())
            else:
                with pytest.raises(TopologyError) as prepared:
                    ckpt.prepare(state())
                messages[name] = str(prepared.value)
                assert rank() != 1 or (prepared.value.__cause__ is not None) == (name in ("raises", "misses"))
            with pytest.raises(TopologyError) as again:
                ckpt.save(1, state())
            assert messages.setdefault(name, str(again.value)) == str(again.value)
        with Checkpointer(saved, options=OPTIONS, topology=given) as ckpt:
            if name == "exits" and rank() == 1:
                with pytest.raises(SystemExit):
                    ckpt.restore(state())
            else:
                with pytest.raises(TopologyError) as restored:
                    ckpt.restore(state())
                assert messages[name] == str(restored.value)
            with pytest.raises(TopologyError):
                ckpt.prepare(state())
        assert find.calls == (2 if given is find else 0), "once for each Checkpointer"
    return messages


def test_each_rank_finds_its_path_by_a_function_that_is_called_once(tmp_path: Path) -> None:
    ranks.run(RANKS, saves_and_restores, str(tmp_path / "repository"))


def test_what_is_wrong_with_the_topology_of_one_rank_all_hear_at_once(tmp_path: Path) -> None:
    saved, url = tmp_path / "saved", tmp_path / "repository"
    with Checkpointer(saved, options=OPTIONS) as ckpt:
        ckpt.save(1, state()).wait()
    wrong = {
        "raises": path_of_nowhere,
        "misses": no_path,
        "exits": exits,
        "returns": wrong_type,
        "name": RankPath.of("cn1", "[rack", capacities={"node": "1 GB/s"}),
        "text": "topology.toml",
        "nothing": None,
    }
    assert same(ranks.run(RANKS, hears, str(url), str(saved), wrong)) == {
        "raises": "rank 1: the function given as topology raised ValueError: cn1 is nowhere",
        "misses": "rank 1: the function given as topology raised KeyError: 'SLURM_TOPOLOGY_ADDR'",
        "exits": "rank 1: the function given as topology raised SystemExit: no scheduler",
        "returns": "rank 1: the function given as topology returned ['cn1', 'rack'], which is not a fastckpt.Topology, "
        "a fastckpt.RankPath or None",
        "name": "rank 1: the path: supernode: the name '[rack' contains '['",
        "text": "rank 1: topology='topology.toml' is not a fastckpt.Topology, a fastckpt.RankPath or None; "
        "Topology.load reads a file",
        "nothing": "what the ranks know of the topology differs: ranks 0, 2: a path of their own, rank 1: nothing. "
        "Give all ranks the same kind of topology",
    }
    assert not url.exists()
