"""A job is killed at a moment that is drawn, in a step or in a save, as often as it likes: it goes on from the newest
snapshot with the same losses to the last bit; at another size with the same samples, each once.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastckpt
from fastckpt import Callback, Checkpointer, Options, RNGState
from fastckpt import save as save_flow
from fastckpt.errors import SnapshotNotFound
from fastckpt.job.staging import Staging
from fastckpt.repository.history import History
from fastckpt.repository.writer import Committer, PackStream

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))
import caught
import layouts
import ranks
from jobs import prints, same

pytestmark = pytest.mark.distributed

KINDS = ["single", "ddp", "fsdp1", "fsdp1 flat", "fsdp2", "hsdp", "tp x fsdp", "ep"]
OPTIONS = Options(chunk_bytes=4096, commit_seconds_max=30)
BATCH = 8
STEPS = 7
EVERY = 2
KILLED_SECONDS_MAX = 60.0

Hook = Callable[[Callable[[], None]], None]
IN_A_SAVE: dict[str, Hook] = {
    "before staging": lambda happen: caught.before(Staging, "source", happen),
    "before a chunk is written": lambda happen: caught.before(PackStream, "write", happen),
    "before a pack is finished": lambda happen: caught.before(PackStream, "close", happen),
    "with its packs written": lambda happen: caught.before(save_flow.Saves, "_written", happen),
}
OF_THE_COORDINATOR: dict[str, Hook] = {
    "before the index": lambda happen: caught.before(Committer, "commit", happen),
    "before the decision": lambda happen: caught.before(History, "append_commit", happen),
    "after the decision": lambda happen: caught.after(Committer, "commit", happen),
}


@dataclass(frozen=True)
class Kill:
    """Where all ranks are killed: once ``rank`` has come to ``where`` in ``step``, and ``seconds`` later."""

    where: str
    step: int
    rank: int
    seconds: float

    @classmethod
    def draw(cls, choose: random.Random, world: int, first: int, in_a_save: bool) -> Kill:
        """In some step from ``first`` on, or in a save there, if there is one."""
        rank = choose.randrange(world)
        saves = [step for step in range(first, STEPS + 1) if step % EVERY == 0]
        if not saves or not in_a_save:
            return cls("in a step", choose.randint(first, STEPS), rank, 0.0)
        where = choose.choice([*IN_A_SAVE, *(OF_THE_COORDINATOR if rank == 0 else ())])
        seconds = 0.0
        if choose.random() < 0.5:
            where, seconds = "after save was called", choose.uniform(0.0, 0.04)
        return cls(where, choose.choice(saves), rank, seconds)


class Samples:
    """An epoch in an order of its own, ``BATCH`` at a time over all ranks; where it is, is its whole state."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._order = torch.randperm(STEPS * BATCH, generator=torch.Generator().manual_seed(5)).tolist()
        self._position = 0

    def __next__(self) -> list[int]:
        batch = self._order[self._position : self._position + BATCH]
        self._position += BATCH
        return batch[self._rank :: self._size]

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state["position"]


def sample(number: int) -> torch.Tensor:
    return torch.randint(layouts.VOCABULARY, (layouts.CONTEXT,), generator=torch.Generator().manual_seed(number))


def strike() -> None:
    """Asks the test to kill all ranks, and holds this thread here until it does."""
    ranks.store().set("struck", b"")
    threading.Event().wait(KILLED_SECONDS_MAX)


def train_until_killed(kind: str, folder: str, kill: Kill) -> None:
    try:
        train(kind, folder, kill)
    except BaseException:
        ranks.store().set("struck", b"by an error")
        raise


def train(kind: str, folder: str, kill: Kill | None = None, every_steps: int = EVERY) -> dict[str, str]:
    """To the end, from wherever it was; the journal has every step. What all tensors are in the end."""
    trainee = layouts.build(kind, seed=1)
    torch.manual_seed(trainee.data_rank)
    data = Samples(trainee.data_rank, trainee.data_size)
    schedule = torch.optim.lr_scheduler.ExponentialLR(trainee.optimizer, 0.9)
    state = {**trainee.state, "data": data, "schedule": schedule, "rng": RNGState()}
    me = dist.get_rank()
    journal = os.open(f"{folder}/rank-{me}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    mine = kill if kill is not None and kill.rank == me else None
    with Checkpointer(f"{folder}/repository", options=OPTIONS) as ckpt:
        callback = Callback(ckpt, state, every_steps=every_steps)
        for step in range(callback.on_train_begin(), STEPS + 1):
            if mine and step == mine.step:
                if mine.where == "in a step":
                    strike()
                elif mine.where != "after save was called":
                    (IN_A_SAVE | OF_THE_COORDINATOR)[mine.where](strike)
            numbers = next(data)
            loss = trainee.step(torch.stack([sample(number) for number in numbers]))
            schedule.step()
            os.write(journal, f"{step} {loss.item().hex()} {','.join(map(str, numbers))}\n".encode())
            callback.on_step_end(step)
            if mine and step == mine.step and mine.where == "after save was called":
                ranks.store().set("struck", b"")
        callback.on_train_end()
        if mine:  # at the latest: of a small state a rank may have nothing to write
            strike()
    os.close(journal)
    whole = prints(trainee.whole())
    if dist.is_initialized():
        dist.barrier()  # who ends before it has read all that was sent to it resets what others are reading from it
    return whole


@dataclass(frozen=True)
class Trained:
    step: int
    loss: str
    samples: tuple[int, ...]


def taken(folder: Path, rank: int) -> list[Trained]:
    """The journal of a rank, which the next job begins anew."""
    found = []
    journal = folder / f"rank-{rank}"
    for line in journal.read_text().splitlines() if journal.exists() else ():
        step, loss, samples = line.split()
        found.append(Trained(int(step), loss, tuple(map(int, samples.split(",")))))
    journal.unlink(missing_ok=True)
    return found


def committed(folder: Path) -> int:
    """The newest snapshot's step; 0 if there is none."""
    try:
        return fastckpt.open(str(folder / "repository")).snapshot().step
    except (SnapshotNotFound, fastckpt.RepositoryNotFound):
        return 0


class Run:
    """One training of a whole epoch, in as many jobs as it takes."""

    def __init__(self, kind: str, folder: Path, choose: random.Random) -> None:
        self._kind = kind
        self._folder = folder
        self._choose = choose
        self.told: list[str] = []
        """What was done to it, for the reader of a failure."""
        self.jobs: list[tuple[int, list[list[Trained]]]] = []
        """The step that each job went on from, and what each of its ranks trained."""
        folder.mkdir()

    def kill(self, world: int) -> None:
        before = committed(self._folder)
        kill = Kill.draw(self._choose, world, before + 1, in_a_save=len(self.jobs) % 2 == 0)
        self.told.append(f"from step {before} on {world} ranks: {kill}")
        with ranks.started(world, train_until_killed, self._kind, str(self._folder), kill) as job:
            struck = job.wait_keys(["struck"], KILLED_SECONDS_MAX) and not job.store.get("struck")
            assert struck, f"never came to where it was to be killed: {self.told[-1]}: {job.outcomes()}"
            time.sleep(kill.seconds)
        self._look(before, world)

    def finish(self, world: int, every_steps: int = EVERY) -> dict[str, str]:
        before = committed(self._folder)
        self.told.append(f"from step {before} on {world} ranks to the end")
        found: dict[str, str] = same(ranks.run(world, train, self._kind, str(self._folder), None, every_steps))
        self._look(before, world)
        return found

    def _look(self, before: int, world: int) -> None:
        self.jobs.append((before, [taken(self._folder, rank) for rank in range(world)]))


def check_exact(kind: str, directory: Path, seed: int, kills: int) -> None:
    """Killed again and again, it trains the steps that a run does which is never killed, and never saves."""
    world = layouts.WORLDS[kind]
    uninterrupted = Run(kind, directory / "uninterrupted", random.Random())
    whole = uninterrupted.finish(world, every_steps=STEPS + 1)
    [(_, reference)] = uninterrupted.jobs
    run = Run(kind, directory / "killed", random.Random(seed))
    for _ in range(kills):
        run.kill(world)
    restored = run.finish(world)
    shown = "\n".join([f"TEST_SEED={seed}, {kind}:", *run.told])
    for before, ran in run.jobs:
        for rank, steps in enumerate(ran):
            assert steps == reference[rank][before : before + len(steps)], f"{shown}\nrank {rank} after step {before}"
    before, ran = run.jobs[-1]
    assert [len(steps) for steps in ran] == [STEPS - before] * world, shown
    assert restored == whole, shown


def check_samples(kind: str, directory: Path, seed: int, worlds: Sequence[int]) -> None:
    """Killed at all sizes but the last. What was trained after a snapshot is trained again, and counts once."""
    run = Run(kind, directory / "resized", random.Random(seed))
    for world in worlds[:-1]:
        run.kill(world)
    run.finish(worlds[-1])
    counts: Counter[int] = Counter()
    upto = [before for before, _ in run.jobs[1:]] + [STEPS]
    for (_, ran), last in zip(run.jobs, upto, strict=True):
        counts.update(number for steps in ran for each in steps if each.step <= last for number in each.samples)
    assert counts == Counter(range(STEPS * BATCH)), "\n".join([f"TEST_SEED={seed}, {kind}:", *run.told])


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**32))
    print(f"TEST_SEED={chosen}")
    return chosen


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_killed_at_any_moment_trains_on_with_the_same_losses_to_the_last_bit(
    kind: str, tmp_path: Path, seed: int
) -> None:
    check_exact(kind, tmp_path, seed, kills=2)


def test_a_job_that_goes_on_at_another_size_trains_on_each_sample_once(tmp_path: Path, seed: int) -> None:
    check_samples("fsdp2", tmp_path, seed, (4, 2, 1))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_jobs_of_every_layout_killed_many_times_train_on_exactly(tmp_path: Path, seed: int) -> None:
    for number in range(int(os.environ.get("SOAK_ROUNDS", "10"))):
        for kind in layouts.WORLDS:
            folder = tmp_path / f"{kind} {number}"
            folder.mkdir()
            check_exact(kind, folder, seed + number, kills=8)
            if kind in ("ddp", "fsdp1", "fsdp2"):  # each of whose ranks has data of its own, at any size
                check_samples(kind, folder, seed + number, (4, 2, 4, 1, 2))
            shutil.rmtree(folder)
