"""Values that each rank has of its own, in jobs of the same and of another size."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from jobs import rank, same
from torch import nn

from fastckpt import Checkpointer, Options, PerRank, RestoreError, RNGState, Shard, SnapshotDamaged, StateMismatch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)
LARGE = 40_000
"""Elements of a tensor that is stored beside the value it is in."""


class Samples:
    """The samples of one epoch, each for one rank: what all took before this job's size was what it is, and what this
    rank has taken since."""

    COUNT = 53

    def __init__(self) -> None:
        self.before = 0
        self.taken = 0
        self.loads = 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.COUNT, generator=torch.Generator().manual_seed(3)).tolist()
        for sample in order[self.before + rank() :: dist.get_world_size()][self.taken :]:
            self.taken += 1
            yield sample

    def state_dict(self) -> dict[str, Any]:
        own, common = torch.full((LARGE,), rank(), dtype=torch.bfloat16), torch.arange(LARGE).view(2, -1)
        return {"before": self.before, "taken": self.taken, "seen": [own, {"common": common}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loads += 1
        self.before, self.taken = state["before"], state["taken"]
        self.seen = state["seen"]


def merge(states: Sequence[Any], rank: int, world_size: int) -> Any:
    """Every state once, by index; those of every ``world_size``-th rank once more, by slice."""
    return {
        "before": states[0]["before"] + sum(state["taken"] for state in states),
        "taken": 0,
        "seen": [seen for state in states[rank::world_size] for seen in state["seen"]],
    }


def take(url: str, count: int | None) -> tuple[list[int], Any]:
    """Goes on with the epoch for ``count`` steps, saves, and trains a step more, whose sample is lost with the job."""
    samples = Samples()
    state = {"data": PerRank(samples, merge=merge), "step": 0}
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.restore(state)
        batches = iter(samples)
        taken = list(itertools.islice(batches, count))
        state["step"] += 1
        ckpt.save(state["step"], state).wait()
        next(batches, None)
        assert samples.loads == (state["step"] > 1)
        return taken, getattr(samples, "seen", None)


def test_at_every_world_size_the_right_samples_follow_each_once(tmp_path: Path) -> None:
    url, taken = str(tmp_path), []
    for world, count in ((4, 5), (4, 2), (2, 3), (3, 2), (3, None)):
        results = ranks.run(world, take, url, count)
        taken += [sample for samples, _ in results for sample in samples]
        if world == 2:
            for number, (_, seen) in enumerate(results):
                assert [set(own.tolist()) for own in seen[::2]] == [{number}, {number + 2}]
                assert all(own.dtype == torch.bfloat16 and own.shape == (LARGE,) for own in seen[::2])
                assert all(torch.equal(each["common"], torch.arange(LARGE).view(2, -1)) for each in seen[1::2])
    assert sorted(taken) == list(range(Samples.COUNT))


def large(number: int) -> dict[str, torch.Tensor]:
    return {"part": torch.full((LARGE,), number)}


def save_kinds(url: str) -> None:
    samples = Samples()
    samples.taken = rank()
    state = {"equal": 5, "own": PerRank([rank()]), "data": samples, "large": PerRank(large(rank()))}
    with Checkpointer(url, options=SMALL) as ckpt:
        ckpt.save(1, {**state, "weight": torch.zeros(3)})


def fail(states: Sequence[Any], rank: int, world_size: int) -> Any:
    if rank == 1:
        raise LookupError(f"no state for rank {rank} of {world_size}, of {len(states)}")
    return 0


def restore_kinds(url: str, world_size: int) -> None:
    """What was saved with and without PerRank, into the one and the other, by a job of the same or another size."""
    same_world = dist.get_world_size() == world_size
    own, equal, samples = PerRank([-1]), PerRank(-1), Samples()
    with Checkpointer(url, options=SMALL) as ckpt:
        if same_world:
            state: dict[str, Any] = {"own": None, "equal": equal, "data": PerRank(samples), "large": PerRank(None)}
            ckpt.restore(state)
            assert (state["own"], equal.obj, samples.taken) == ([rank()], 5, rank())
            assert torch.equal(state["large"].obj["part"], large(rank())["part"])
            ckpt.restore({"own": own})
            assert own.obj == [rank()]
            return

        weight = torch.ones(3)
        with pytest.raises(StateMismatch) as refused:
            ckpt.restore({"own": None, "equal": equal, "data": samples, "large": None, "weight": weight})
        text = str(refused.value)
        assert "own: its value differed between the 3 ranks" in text
        assert "equal: each of the 3 ranks that saved it had its own, and this job has 2" in text
        assert "data: its value differed" in text
        assert "large.part: a tensor in large; each of the 3 ranks that saved it had its own" in text
        assert text.count("fastckpt.PerRank(obj, merge=...)") == text.count("only=") == 4
        failure = r"equal: merge raised LookupError: no state for rank 1 of 2, of 3"
        with pytest.raises(RestoreError, match=failure):
            ckpt.restore({"equal": PerRank(-1, merge=fail), "weight": weight, "data": PerRank(samples, merge=merge)})
        assert (weight.tolist(), samples.loads) == ([1, 1, 1], 0)
        ckpt.save(2, {"weight": weight}).wait()  # the state is whole still
        own.merge = lambda states, rank, world_size: [states[-1], *states[:2], rank, world_size]
        equal.merge = lambda states, rank, world_size: sum(states)
        ckpt.restore({"own": own, "equal": equal}, step=1)
        assert own.obj == [[2], [0], [1], rank(), 2]
        assert equal.obj == 15


def test_what_each_rank_has_of_its_own_is_merged_or_refused_at_another_world_size(tmp_path: Path) -> None:
    ranks.run(3, save_kinds, str(tmp_path))
    ranks.run(3, restore_kinds, str(tmp_path), 3)
    ranks.run(2, restore_kinds, str(tmp_path), 3)


def test_damage_that_merge_comes_upon_is_raised_as_damage(tmp_path: Path) -> None:
    ranks.run(3, save_kinds, str(tmp_path))
    for pack in (tmp_path / "packs").rglob("*.pack"):
        pack.chmod(0o644)
        pack.write_bytes(bytes(byte ^ 1 for byte in pack.read_bytes()))
    item = PerRank(None, merge=lambda states, rank, world_size: states[-1])
    with Checkpointer(str(tmp_path)) as ckpt:
        with pytest.raises(SnapshotDamaged) as caught:
            ckpt.restore({"large": item})
        assert caught.value.key == "large.part@2"
        ckpt.save(2, {"large": item}).wait()  # nothing was changed


@pytest.mark.parametrize(
    "thing",
    [nn.Linear(2, 2), torch.zeros(2), Shard(torch.zeros(2), (0,), (4,)), PerRank(1)],
    ids=lambda it: type(it).__name__,
)
def test_what_has_a_name_of_its_own_in_the_state_is_no_value_of_a_rank(thing: Any) -> None:
    with pytest.raises(TypeError, match=f"PerRank of a {type(thing).__name__}"):
        PerRank(thing)


def test_what_cannot_merge_or_be_saved_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="merge is a function of states, rank and world_size, not 'sum'"):
        PerRank(1, merge="sum")  # type: ignore[arg-type]
    with Checkpointer("memory://refused-per-rank") as ckpt:
        with pytest.raises(TypeError, match=r"data\['file'\].*object"):
            ckpt.save(1, {"data": PerRank({"file": object()})})
        with pytest.raises(TypeError, match=r"data\['inner'\].*PerRank"):
            ckpt.save(1, {"data": {"inner": PerRank(1)}})


class Logged(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Drawing:
    """Draws when it is asked for its state, and when it takes one over: as a data loader does."""

    def state_dict(self) -> int:
        torch.rand(())
        return 0

    def load_state_dict(self, state: int) -> None:
        torch.rand(())


def streams(url: str, seed: int | None) -> tuple[float, list[str]]:
    """Saves the random numbers of a seed, or restores them; the number after that, and what was logged."""
    logged = Logged()
    logging.getLogger("fastckpt").addHandler(logged)
    state = {"a loader": Drawing(), "rng": RNGState(), "the loader": Drawing()}
    with Checkpointer(url, options=SMALL) as ckpt:
        if seed is None:
            ckpt.restore(state)
        else:
            for start in (random.seed, np.random.seed, torch.manual_seed):
                start(seed)
            ckpt.save(1, state).wait()
            torch.manual_seed(seed)
    return float(torch.rand(())), [line for line in logged.lines if line.startswith("rng")]


def save_two_streams(url: str) -> list[float]:
    return [streams(f"{url}/own", rank())[0], streams(f"{url}/common", 8)[0]]


def restore_two_streams(url: str) -> list[tuple[float, list[str]]]:
    return [streams(f"{url}/{which}", None) for which in ("own", "common")]


def test_random_numbers_in_new_streams_are_reported_by_rank_0_and_common_ones_go_on(tmp_path: Path) -> None:
    saved = ranks.run(2, save_two_streams, str(tmp_path))
    again = ranks.run(2, restore_two_streams, str(tmp_path))
    assert again == [[(own, []), (common, [])] for own, common in saved]
    resized = ranks.run(3, restore_two_streams, str(tmp_path))
    reports = [lines for (_, lines), _ in resized]
    assert reports[1:] == [[], []]
    assert len(reports[0]) == 1
    assert "saved by 2 ranks" in reports[0][0]
    assert "in this job of 3 they continue in new streams" in reports[0][0]
    assert len({own for (own, _), _ in resized} | {own for own, _ in saved}) == 5
    assert same([common for _, common in resized]) == (saved[0][1], [])
