"""What a job saves in any layout, a job in any other restores: every tensor, to the last bit."""

from __future__ import annotations

import os
import random
import secrets
from pathlib import Path

import layouts
import pytest
import ranks
from jobs import prints, same

from fastckpt import Checkpointer, Options

pytestmark = pytest.mark.distributed

Prints = dict[str, str]
SMALL = Options(chunk_bytes=4096, commit_seconds_max=30)
RESTORED_AT = {
    8: ["hsdp x tp"],
    4: [kind for kind, world in layouts.WORLDS.items() if world == 4],
    3: ["fsdp1 flat", "fsdp2"],
    2: ["ddp", "fsdp1", "tp x fsdp", "ep", "ep dtensor"],
    1: ["single"],
}


def save(kinds: list[str], folder: str) -> dict[str, Prints]:
    saved = {}
    for seed, kind in enumerate(kinds):
        trainee = layouts.build(kind, seed)
        trainee.train(range(2))
        with Checkpointer(f"{folder}/{kind}", options=SMALL) as ckpt:
            ckpt.save(2, trainee.state)
            saved[kind] = prints(trainee.whole())
    return saved


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Prints]]:
    """A folder with a repository for each layout, and what was saved there."""
    folder = str(tmp_path_factory.mktemp("saved"))
    found: dict[str, Prints] = {}
    for world in sorted(set(layouts.WORLDS.values())):
        kinds = [kind for kind, size in layouts.WORLDS.items() if size == world]
        found |= same(ranks.run(world, save, kinds, folder))
    return folder, found


def restore(kinds: list[str], folder: str, sources: list[str]) -> dict[str, Prints]:
    restored = {}
    for number, kind in enumerate(kinds):
        trainee = layouts.build(kind, seed=100)
        for source in (*sources[number:], *sources[:number]):  # a fresh optimizer takes another one first each time
            with Checkpointer(f"{folder}/{source}", options=SMALL) as ckpt:
                assert ckpt.restore(trainee.state) == 2
            restored[f"{source} into {kind}"] = prints(trainee.whole())
    return restored


@pytest.mark.parametrize("world", RESTORED_AT)
def test_every_layout_restores_what_any_other_has_saved(saved: tuple[str, dict[str, Prints]], world: int) -> None:
    folder, expected = saved
    restored = same(ranks.run(world, restore, RESTORED_AT[world], folder, list(expected)))
    assert len(restored) == len(expected) * len(RESTORED_AT[world])
    differ = {
        name: {key for key in found | expected[source] if found.get(key) != expected[source].get(key)}
        for name, found in restored.items()
        if found != expected[source := name.partition(" into ")[0]]
    }
    assert not differ


WORLDS = {
    "single": [1],
    "ddp": [2, 3, 4, 5],
    "fsdp1": [1, 2, 3, 4, 5],
    "fsdp1 flat": [1, 2, 3, 4, 5],
    "fsdp2": [1, 2, 3, 4, 5],
    "hsdp": [2, 4, 6],
    "tp x fsdp": [2, 4, 6],
    "hsdp x tp": [8],
    "ep": [1, 2, 4, 8],
    "ep dtensor": [1, 2, 4, 8],
}


def leg(kind: str, url: str, options: Options, step: int) -> tuple[Prints, Prints]:
    """Restores what the leg before has saved, trains on and saves it."""
    trainee = layouts.build(kind, seed=step)
    with Checkpointer(url, options=options) as ckpt:
        assert (ckpt.restore(trainee.state) or 0) == step
        restored = prints(trainee.whole())
        trainee.train(range(step, step + 1))
        ckpt.save(step + 1, trainee.state)
        return restored, prints(trainee.whole())


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_job_that_moves_through_many_layouts_and_sizes_loses_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**32))
    print(f"TEST_SEED={seed}")
    for number in range(int(os.environ.get("SOAK_ROUNDS", "10"))):
        choose = random.Random(seed + number)
        path, saved = [], None
        for step in range(20):
            kind = choose.choice(sorted(WORLDS))
            world = choose.choice(WORLDS[kind])
            path.append(f"{kind} on {world}")
            options = Options(
                chunk_bytes=4096,
                commit_seconds_max=30,
                codec=choose.choice(["raw", "zstd"]),
                staging_bytes_max=choose.choice([None, 8192]),
            )
            restored, now = same(ranks.run(world, leg, kind, f"{tmp_path}/{number}", options, step))
            assert step == 0 or restored == saved, f"TEST_SEED={seed + number}: {path}"
            saved = now
