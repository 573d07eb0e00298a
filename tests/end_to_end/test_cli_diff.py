"""``fastckpt diff`` as an operator meets it: what changed between two snapshots, and between their machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import fastckpt
from fastckpt import checkpointer
from fastckpt.cli.main import commands
from fastckpt.plan.save_plan import KNOWN
from fastckpt.storage.local import LocalStore
from tests.crash.numpy_job import Job, Tensor, tiny_spec

ESCAPES = "a\x1b[31m\u202eb\n"


def run(*args: object, **settings: Any) -> Result:
    return CliRunner().invoke(commands, [str(arg) for arg in args], **settings)


def document(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a job, on machines that differ."""
    path = tmp_path_factory.mktemp("diff") / "repository"
    rows = torch.arange(4096.0).reshape(64, 64)  # four chunks
    states: list[dict[str, Any]] = [
        {
            "rows": rows.clone(),
            "same": torch.ones(9),
            "old": torch.ones(3),
            "form": torch.ones(4),
            "epoch": 1,
            "lr": 0.5,
        },
        {
            "rows": rows.clone(),
            "same": torch.ones(9),
            "new": torch.ones(3),
            "form": torch.ones(5),
            "epoch": 2,
            "lr": 0.5,
        },
    ]
    states[1]["rows"][17] += 1
    states[1][ESCAPES] = torch.zeros(1)
    metrics: list[dict[str, float]] = [{"loss": 2.5, "accuracy": 0.5}, {"loss": 2.25, "accuracy": 0.5, "norm": 1.0}]
    records = [
        {"torch": {"version": "2.13.0"}, "world_size": 8, "platform": {"release": "6.1"}, "code": {"commit": "1" * 40}},
        {"torch": {"version": "2.14.0"}, "world_size": 4, "platform": {"release": ESCAPES}},
    ]
    with pytest.MonkeyPatch.context() as patch:
        for step, (state, record) in enumerate(zip(states, records, strict=True), 1):
            patch.setattr(checkpointer, "environment", lambda record=record, **_: record)
            with fastckpt.Checkpointer(str(path), options=fastckpt.Options(chunk_bytes=4096)) as ckpt:
                ckpt.save(step, state, metrics=metrics[step - 1], note=["", ESCAPES][step - 1])
    return path


def test_diff_names_what_was_added_removed_reshaped_and_changed_and_by_how_much(repo: Path) -> None:
    found = document("diff", repo, 1, "latest")
    assert (found["a"]["step"], found["b"]["step"], found["b"]["ranks"]) == (1, 2, 1)
    form = {"dtype": "float32", "shape": [3], "bytes": 12}
    assert found["keys"] == {
        "removed": [{"key": "old", **form}],
        "added": [{"key": ESCAPES, "dtype": "float32", "shape": [1], "bytes": 4}, {"key": "new", **form}],
        "other_form": [
            {
                "key": "form",
                "a": {"dtype": "float32", "shape": [4], "bytes": 16},
                "b": {"dtype": "float32", "shape": [5], "bytes": 20},
            }
        ],
        "changed": [
            {
                "key": "rows",
                "dtype": "float32",
                "shape": [64, 64],
                "bytes": 16384,
                "changed_bytes": 4096,
                "by": "hashes",
            }
        ],
        "same": 1,
    }
    assert found["values"] == {"added": [], "removed": [], "changed": {"epoch": [0]}}
    assert found["metrics"] == {"loss": {"a": 2.5, "b": 2.25}, "norm": {"a": None, "b": 1.0}}


def test_diff_for_people_has_the_same_in_tables_without_control_characters(repo: Path) -> None:
    result = run("diff", repo, 1, 2)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    for row in (
        "removed old float32 [3]",
        "added new float32 [3]",
        "other form form float32 [4] float32 [5]",
        "changed rows float32 [64, 64] float32 [64, 64] up to 4.0 KiB of 16.0 KiB",
        "changed epoch 0",
        "loss 2.5 2.25",
        "norm 1",
        r"note a\x1b[31m\u202eb\n",
        "keys 1 changed, 2 added, 1 removed, 1 of another shape or dtype, 1 the same",
    ):
        assert row.split() in rows, result.stdout
    assert all(c.isprintable() or c == "\n" for c in result.output)


def test_diff_of_a_step_and_itself_finds_nothing(repo: Path) -> None:
    assert [line.split()[0] for line in run("diff", repo, 2, 2).stdout.splitlines()] == ["from", "to", "keys"]
    assert run("diff", repo, 2, 2, "--environment").stdout == "the environments of steps 2 and 2 do not differ\n"


def test_diff_of_environments_has_a_severity_for_each_fact_that_differs(repo: Path) -> None:
    found = document("diff", repo, 1, 2, "--environment")["environment"]
    assert [tuple(one.values()) for one in found] == [
        ("world_size", 8, 4, "training", None),
        ("code.commit", "1" * 40, None, "training", None),
        ("torch.version", "2.13.0", "2.14.0", "numerics", None),
        ("platform.release", "6.1", ESCAPES, "info", None),
    ]
    head, *rows = run("diff", repo, 1, 2, "--environment").stdout.splitlines()
    assert head.split() == ["severity", "fact", "step", "1", "step", "2", "note"]
    assert rows[0].split() == ["training", "world_size", "8", "4"]
    assert rows[3].split() == ["info", "platform.release", "6.1", r"a\x1b[31m\u202eb\n"]


def test_diff_of_two_world_sizes_compares_the_whole_tensors_and_the_values_of_ranks_both_have(tmp_path: Path) -> None:
    spec = {**tiny_spec(2), "w": Tensor("float32", (64, 64), KNOWN, split=0)}
    for size in (2, 1):
        Job([LocalStore(tmp_path)] * size, spec=spec).run([size])
    found = document("diff", tmp_path, 2, 1)
    assert {one["key"]: one["by"] for one in found["keys"]["changed"]} == {"b": "bytes", "t": "bytes", "w": "bytes"}
    assert found["values"]["changed"] == {"progress": [0], "rng": [0]}
    assert "w" in run("diff", tmp_path, 2, 1).stdout


def test_diff_of_damage_exits_with_14_and_names_it(tmp_path: Path) -> None:
    for size in (2, 1):
        Job([LocalStore(tmp_path)] * size, spec=tiny_spec(2)).run([size])
    for pack in tmp_path.rglob("*.pack"):
        data = bytearray(pack.read_bytes())
        data[0] ^= 1
        pack.write_bytes(data)
    result = run("diff", tmp_path, 2, 1)
    assert result.exit_code == 14
    assert "has other bytes than were saved" in result.stderr
    assert result.stdout == ""


def test_the_repository_may_be_left_out_and_too_much_is_refused(repo: Path) -> None:
    variables = {"FASTCKPT_REPOSITORY": str(repo)}
    assert run("diff", 1, 2, env=variables).stdout == run("diff", repo, 1, 2).stdout
    for args, words in (
        ([1, 2], "REPO"),
        ([repo, 1], "STEP_B"),
        ([1], "STEP_B"),
        ([repo, "1", "1.5"], "step number"),
        ([repo, repo, 1, 2], "one REPO"),
    ):
        result = run("diff", *args, env={"FASTCKPT_REPOSITORY": None})
        assert result.exit_code == 2, args
        assert words in result.stderr
