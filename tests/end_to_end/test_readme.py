"""The code shown in README.md runs as it stands there, but for where it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import fastckpt

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block: str, tmp_path: Path, names: dict[str, object]) -> dict[str, object]:
    assert "file:///tmp/run-42" in block
    exec(compile(block.replace("file:///tmp/run-42", (tmp_path / "run").as_uri()), "README.md", "exec"), names)
    return names


def test_the_first_loop_of_the_readme_saves_and_resumes(tmp_path: Path) -> None:
    run(BLOCKS[0], tmp_path, {})
    assert [snapshot.step for snapshot in fastckpt.open(str(tmp_path / "run")).snapshots()] == [50, 100]
    assert run(BLOCKS[0], tmp_path, {})["first"] == 101


def test_the_callback_of_the_readme_saves_and_resumes(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    names = {"fastckpt": fastckpt, "state": {"model": model}, "steps": 500, "train_step": lambda: 0.5}
    for _ in range(2):
        with fastckpt.Checkpointer((tmp_path / "run").as_uri()) as ckpt:
            exec(compile(BLOCKS[1], "README.md", "exec"), {**names, "ckpt": ckpt})
            assert ckpt.restore({"model": model}) == 500
    (snapshot,) = fastckpt.open(str(tmp_path / "run")).snapshots()
    assert snapshot.metrics == {"loss": 0.5}


def test_the_timelines_of_the_readme_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fastckpt.Checkpointer(tmp_path / "run") as ckpt:
        pending = ckpt.save(1, {"model": torch.nn.Linear(4, 4)})
        pending.wait()
    names: dict[str, object] = {"pending": pending, "rank": 0, "json": json, "Path": Path}
    for names["rank"] in (0, 1):
        exec(compile(BLOCKS[2], "README.md", "exec"), names)
    assert names["events"] == pending.timeline()["traceEvents"] * 2


def test_the_restores_of_the_readme_run(tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 16)])
    renamed = torch.nn.Module()
    renamed.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 16)])
    renamed.head = torch.nn.Linear(16, 2)
    head = renamed.head.weight.clone()
    state = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    with fastckpt.Checkpointer((tmp_path / "run").as_uri()) as ckpt:
        ckpt.save(500, state)
        names = {"ckpt": ckpt, "state": state, "model": model, "fastckpt": fastckpt}
        lines = BLOCKS[3].splitlines()
        (rename,) = (line for line in lines if "rename=" in line)
        run("\n".join(line for line in lines if line is not rename), tmp_path, names)
        exec(compile(rename, "README.md", "exec"), {"ckpt": ckpt, "model": renamed})
    assert torch.equal(renamed.blocks[0].weight, model.layers[0].weight)
    assert torch.equal(renamed.head.weight, head)


def test_the_readme_shows_the_commands_that_exist() -> None:
    import click

    from fastckpt.cli.main import commands

    shown = set(re.findall(r"^fastckpt +([a-z]+)", README, re.MULTILINE))
    assert shown == set(commands.list_commands(click.Context(commands))) - {"completion"}
