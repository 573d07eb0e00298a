"""``fastckpt plan`` as an operator meets it: what it shows, what it draws, and what it says of wrong input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import fastckpt
from bench.metadata import jobs
from bench.metadata.crowd import Crowd
from fastckpt.cli.main import commands
from fastckpt.plan.classes import of_sizes
from fastckpt.plan.deal import Dealer
from fastckpt.save import Saves
from fastckpt.storage.local import LocalStore
from fastckpt.topology.topology import Topology
from fastckpt.trace import Trace

EXAMPLES = Path(__file__).parents[2] / "examples"

TOPOLOGY = """
[rank]
capacity = "2 GB/s"

[node]
count = 16
ranks = 1

[supernode]
nodes = "8,4,2,2"
capacity = "12.5 GB/s"

[storage]
capacity = "40 GB/s"
"""

LAYOUT = "ranks = 16\n" + "".join(
    f'[[shards]]\nbytes = "1 GB"\ncount = 8\nholders = "{one},{one + 4},{one + 8},{one + 12}"\n' for one in range(4)
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    topology, layout = tmp_path / "topology.toml", tmp_path / "layout.toml"
    topology.write_text(TOPOLOGY)
    layout.write_text(LAYOUT)
    return topology, layout


def plan(topology: object, layout: object, *more: object) -> Result:
    arguments = ["plan", "--topology", str(topology), "--layout", str(layout), *map(str, more)]
    return CliRunner().invoke(commands, arguments)


def document(*arguments: object) -> Any:
    result = plan(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rows(result: Result, title: str) -> list[list[str]]:
    """The cells of the table whose first column is called so."""
    lines = iter(result.stdout.splitlines())
    next(line for line in lines if line.split()[:1] == [title])
    found = []
    for line in lines:
        if not line:
            break
        found.append([cell.strip() for cell in line.split("  ") if cell.strip()])
    return found


# --- what it shows -------------------------------------------------------------------------------------------------


def test_a_plan_is_shown_with_its_proof_and_beside_what_others_take(files: tuple[Path, Path]) -> None:
    result = plan(*files)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"topology     {files[0]}: 16 ranks, 16 nodes, 4 supernodes"
    assert lines[1] == f"layout       {files[1]}: 29.8 GiB, of which several ranks hold 29.8 GiB (4 sets of ranks)"
    assert lines[2] == "writers      16 of 16 ranks, who make 64 objects: 64 ms more, at 1000 a second"
    shown = dict(line.split(None, 1) for line in lines[3:7])
    # 32 GB by the uplink of supernode 0 and by all ranks elsewhere: 12.5 + 8 x 2 GB/s.
    assert shown["bound"] == "1.123 s: no placement is faster"
    assert float(shown["gap"].rstrip("%")) <= 1
    assert shown["binding"] == "rank 8, rank 9, rank 10, rank 11 and 4 more (16 GB/s); supernode 0 (12.5 GB/s)"
    supernodes = rows(result, "supernode")
    assert [row[:3] for row in supernodes] == [["0", "8", "8"], ["1", "4", "4"], ["2 to 3, each", "2", "2"]]
    placements = {row[0]: row[1:] for row in rows(result, "placement")}
    assert placements["planned"][1] == "1.00"
    assert placements["first replica"][0] == placements["first replica"][2] == "4 s"
    assert placements["first replica"][3:] == ["4", "1"]
    assert placements["even per replica"][0] == "1.28 s"
    assert list(placements) == [
        "planned",
        "planned, every holder",
        "even per replica",
        "whole shards, greedily",
        "first replica",
        "too few: 4 writers, one a supernode",
        "crowded: 8 writers in 1 of 4 supernodes",
    ]


def test_the_document_adds_up(files: tuple[Path, Path]) -> None:
    found = document(*files)
    assert found["topology"]["edges"] == {"rank": 16, "node": 16, "supernode": 4, "storage": 1}
    assert found["layout"]["bytes"] == found["layout"]["shared_bytes"] == 32_000_000_000
    assert found["level"] == "supernode"
    assert sum(group["bytes"] for group in found["groups"]) == 32_000_000_000
    assert [group["ranks"] for group in found["groups"]] == [8, 4, 2, 2]
    assert found["bound_seconds"] <= found["makespan_seconds"] <= found["bound_seconds"] * 1.01
    assert (found["writers"], found["streams"], found["objects"], found["object_seconds"]) == (16, 4, 64, 0.064)
    planned, *others = found["placements"]
    assert planned["makespan_seconds"] == found["makespan_seconds"]
    for other in others:
        assert other["makespan_seconds"] >= found["bound_seconds"]
        assert other["times_planned"] == pytest.approx(other["makespan_seconds"] / found["makespan_seconds"])
        assert other["simulated_seconds"] >= other["makespan_seconds"] * 0.999


@pytest.mark.parametrize("name", sorted(path.stem for path in (EXAMPLES / "layouts").iterdir()))
def test_an_example_is_planned_within_a_hundredth_and_nobody_is_faster(name: str) -> None:
    found = document(EXAMPLES / f"topologies/{name}.toml", EXAMPLES / f"layouts/{name}.toml")
    assert found["gap"] <= 0.01
    assert all(other["times_planned"] >= 0.99 for other in found["placements"])
    assert found["placements"][4]["name"] == "first replica"
    assert found["placements"][4]["times_planned"] > 1.5


def test_what_is_planned_is_what_a_save_deals(files: tuple[Path, Path]) -> None:
    """With the writers and streams that its options would say."""
    tree = Topology.load(files[0]).tree()
    given = of_sizes([([one, one + 4, one + 8, one + 12], [4 * 2**20] * 1907 + [1_462_272]) for one in range(4)])
    for options in ({}, {"writers": 2}, {"writers": 1, "streams": 1}):
        found = document(*files, *(f"--{name}={number}" for name, number in options.items()))
        dealer = Dealer(tree, **options)
        of_supernodes = np.bincount(np.repeat(range(4), [8, 4, 2, 2]), dealer.deal(given).written)
        assert [group["bytes"] for group in found["groups"]] == of_supernodes.tolist()
        told = dealer.outlook()
        told["binding"] = len(told["binding"])
        assert {name: found[name] for name in told} | {"binding": len(found["binding"])} == told


def test_without_capacities_there_is_no_time_but_a_ratio(files: tuple[Path, Path]) -> None:
    files[0].write_text("[node]\ncount = 16\nranks = 1\n")
    result = plan(*files)
    assert "makespan     ?, no capacity is known; all ranks count as equally fast" in result.stdout
    assert ["first replica", "?", "4.00", "?", "4", "4"] in rows(result, "placement")
    found = document(*files)
    assert found["makespan_seconds"] is found["bound_seconds"] is None
    assert found["placements"][4]["times_planned"] == pytest.approx(4, rel=0.002)


def test_long_tables_are_cut_and_verbose_ones_are_not(tmp_path: Path) -> None:
    topology, layout = tmp_path / "t.toml", tmp_path / "l.toml"
    topology.write_text('[rank]\ncapacity = "1 GB/s"\n[node]\ncount = 60\nranks = 1\n')
    layout.write_text(
        "ranks = 60\n" + "".join(f'[[shards]]\nbytes = {1000 * (n + 1)}\nholders = "{n}"\n' for n in range(60))
    )
    result = plan(topology, layout)
    assert len(rows(result, "node")) == 40
    assert "and 20 rows more" in result.stderr
    assert "every byte has one holder that is known, so there is nothing to choose\n" in result.stderr
    assert len(rows(plan(topology, layout, "-v"), "node")) == 60


# --- a repository --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "repository"
    with fastckpt.Checkpointer(str(path), options=fastckpt.Options(chunk_bytes=4096)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": torch.zeros(1000 * step), "epoch": step})
    return path


def test_a_snapshot_is_planned_as_far_as_it_tells_who_held_what(tmp_path: Path, repository: Path) -> None:
    topology = tmp_path / "t.toml"
    topology.write_text('[node]\ncount = 1\nranks = 1\ncapacity = "1 kB/s"\n')
    assert document(topology, repository)["layout"]["bytes"] == 8000
    assert document(topology, repository)["makespan_seconds"] == 8
    assert document(topology, repository, "--step", 1)["layout"]["bytes"] == 4000
    told = "a snapshot says who wrote what, and who else held it only of tensors on a mesh"
    assert told in plan(topology, repository).stderr
    assert plan(topology, repository, "--step", 7).exit_code == 13
    assert plan(topology, tmp_path / "nothing").exit_code == 10


def test_of_a_snapshot_of_tensors_on_a_mesh_all_is_known_whoever_wrote_them(tmp_path: Path) -> None:
    """64 copies of 4 shards; what is listed, steps of optimizers, the coordinator wrote."""
    job = jobs.hsdp(256, 100)
    crowd, path = Crowd(job.offers(), job.nodes), tmp_path / "repository"
    saves = Saves(LocalStore(str(path)), crowd, fastckpt.Options(writers=2))
    crowd.begin(1, saves)
    crowd.commit(saves.agree(1, crowd.kinds[0], Trace()))
    (tmp_path / "t.toml").write_text("[node]\ncount = 32\nranks = 8\n")
    found = document(tmp_path / "t.toml", path)
    layout = fastckpt.open(str(path)).snapshot().layout
    steps = sum(4 for key in layout.keys if key.endswith(".step"))
    assert found["layout"]["sets"] == 4
    assert found["layout"]["shared_bytes"] == layout.bytes() - steps
    assert found["layout"]["bytes"] == layout.bytes()
    assert found["placements"][0]["writers"] == 256
    (tmp_path / "t.toml").write_text("[node]\ncount = 40\nranks = 16\n")
    assert "ran on the first 32 nodes" in plan(tmp_path / "t.toml", path).stderr


# --- what is wrong -------------------------------------------------------------------------------------------------


def refused(topology: object, layout: object, *more: object) -> str:
    result = plan(topology, layout, *more)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[0]


def test_wrong_input_is_told_with_file_line_and_field(files: tuple[Path, Path], tmp_path: Path) -> None:
    topology, layout = files
    other = tmp_path / "other.toml"
    other.write_text(TOPOLOGY.replace("12.5 GB/s", "-1 GB/s"))
    assert f"{other}:11: supernode.capacity" in refused(other, layout)
    other.write_text(LAYOUT.replace("count = 8", "count = 0", 1))
    assert f"{other}:4: shards.count is 0: give a whole number" in refused(topology, other)
    other.write_bytes(b"ranks = 1 # \xff")
    assert f"{other}: byte 12 is not UTF-8" in refused(topology, other)
    other.write_bytes(b" " * (16 * 2**20 + 1))
    assert "more than 16.0 MiB is no layout file" in refused(topology, other)
    assert f"--step is for a repository, and {layout} is a file" in refused(topology, layout, "--step", 3)
    assert "does not exist" in refused(tmp_path / "nothing.toml", layout)


def test_a_topology_of_fewer_ranks_than_the_layout_is_refused(files: tuple[Path, Path]) -> None:
    files[1].write_text(LAYOUT.replace("ranks = 16", "ranks = 17"))
    message = refused(*files)
    assert f"{files[0]} has 16 ranks and {files[1]} has 17" in message
    assert "describe the same job in both" in message


def test_so_is_one_that_says_which_ranks_are_where_if_they_are_not_those_of_the_layout(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    files[0].write_text(
        '[node]\ncount = 17\nranks = "0-16"\n'.replace(
            '"0-16"', "{" + ",".join(f'{node} = "{node}"' for node in range(17)) + "}"
        )
    )
    assert f"{files[0]} has 17 ranks and {files[1]} has 16" in refused(*files)


def test_a_smaller_job_is_planned_on_the_first_nodes(files: tuple[Path, Path]) -> None:
    files[1].write_text('ranks = 5\n[[shards]]\nbytes = "1 GB"\nholders = "all"\n')
    result = plan(*files)
    assert (
        f"{files[0]} has 16 ranks and {files[1]} has 5: planned as if the job ran on the first 5 nodes" in result.stderr
    )
    assert [row[:3] for row in rows(result, "supernode")] == [["0", "5", "5"]]


def test_of_a_repository_ranks_of_one_node_stay_on_one_node(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "t.toml").write_text('[node]\ncount = 4\nranks = 8\ncapacity = "1 kB/s"\n')
    result = plan(tmp_path / "t.toml", repository)
    assert "has 32 ranks" in result.stderr
    assert "ran on the first 1 node\n" in result.stderr
    assert rows(result, "node")[0][:3] == ["0", "1", "1"]


def test_the_repository_may_be_named_by_the_environment(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.toml").write_text("[node]\ncount = 1\nranks = 1\n")
    monkeypatch.setenv("FASTCKPT_REPOSITORY", str(repository))
    result = CliRunner().invoke(commands, ["plan", "--topology", str(tmp_path / "t.toml"), "--json"])
    assert json.loads(result.stdout)["layout"]["source"] == str(repository)


# --- the picture ---------------------------------------------------------------------------------------------------


def test_a_plot_without_matplotlib_says_what_to_install(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(*files, "--plot", tmp_path / "plot.png")
    assert "plot.jpg does not end in .png, .svg, .pdf" in refused(*files, "--plot", tmp_path / "plot.jpg")
    assert "pip install matplotlib" in refused(*files, "--plot", tmp_path / "plot.PNG")


def test_where_no_plot_can_be_written_that_is_told_before_planning(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert f"nothing can be written in {tmp_path / 'none'}" in refused(*files, "--plot", tmp_path / "none" / "x.png")


def test_a_plot_that_cannot_be_written_after_all_takes_nothing_of_the_table_away(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = ModuleType("matplotlib.figure")
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    figure.Figure = MagicMock(**{"return_value.savefig.side_effect": OSError(28, "No space left")})  # type: ignore[attr-defined]
    result = plan(*files, "--plot", tmp_path / "x.svg")
    assert result.exit_code == 1
    assert len(rows(result, "placement")) == 7
    assert "x.svg: cannot be written: No space left" in result.stderr


def test_a_plot_shows_the_bytes_of_each_supernode_of_each_placement(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given to matplotlib; it is no dependency of the tests."""
    drawn: dict[str, Any] = {}

    class Figure:
        def __init__(self, **_: object) -> None:
            pass

        def add_subplot(self) -> Figure:
            return self

        def stairs(self, values: Any, borders: Any, *, label: str, **_: object) -> None:
            assert len(borders) == len(values) + 1
            drawn[label] = np.array(values)

        def savefig(self, path: str, **_: object) -> None:
            drawn["path"] = path

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    matplotlib, figure = ModuleType("matplotlib"), ModuleType("matplotlib.figure")
    figure.Figure = Figure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    result = plan(*files, "--plot", tmp_path / "plot.svg")
    assert result.exit_code == 0, result.output
    assert f"drawn to {tmp_path / 'plot.svg'}" in result.stderr
    assert drawn.pop("path") == str(tmp_path / "plot.svg")
    assert len(drawn) == 7
    assert all(values.sum() == pytest.approx(32) for values in drawn.values())
    (first,) = (values for label, values in drawn.items() if label.startswith("first replica: 4 s (3.5"))
    assert first.tolist() == pytest.approx([32, 0, 0, 0])


def test_a_plot_is_drawn(files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plan(*files, "--plot", tmp_path / "plot.png").exit_code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_planning_does_not_load_torch(files: tuple[Path, Path]) -> None:
    code = (
        "import sys; from fastckpt.cli.main import commands\n"
        f"try: commands(['plan', '--topology', {str(files[0])!r}, '--layout', {str(files[1])!r}])\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
