"""Every example does what it says, also where README.md shows it. The demo has tests of its own in ``test_demo.py``."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import fastckpt
from bench.headline import table as headline
from fastckpt.cli.main import commands

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
README = (EXAMPLES.parent / "README.md").read_text()
ON_ONE_PROCESS = {"loop.py", "callback.py", "read_without_torch.py", "roll_back.py", "topology_sources.py"}
UNDER_TORCHRUN = {"fsdp2.py", "ddp.py", "dataloader.py", "moe.py"}
PARTS_OF_THE_DEMO = {"demo.py", "train_lm.py"}


def run(name: str, *arguments: str, processes: int = 1) -> str:
    """What an example prints. Warnings are errors: an example is what people copy."""
    launcher = [sys.executable, "-W", "error"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name in UNDER_TORCHRUN:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    if name in UNDER_TORCHRUN and processes == 1:  # it starts much sooner without torchrun, which would tell it this
        launcher = [sys.executable]
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [*launcher, str(EXAMPLES / name), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == ON_ONE_PROCESS | UNDER_TORCHRUN | PARTS_OF_THE_DEMO


@pytest.mark.parametrize("name", sorted({*ON_ONE_PROCESS, *UNDER_TORCHRUN}))
def test_an_example_is_at_most_a_screen_and_a_half(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 66


def test_the_loop_goes_on_where_it_was(tmp_path: Path) -> None:
    assert "trained steps 1 to 20" in run("loop.py", str(tmp_path))
    assert "trained steps 21 to 40" in run("loop.py", str(tmp_path))


def test_the_callback_saves_when_due_and_restores_plain_values(tmp_path: Path) -> None:
    first = run("callback.py", str(tmp_path))
    assert [line.split(":")[0] for line in first.splitlines()[:-1]] == [f"committed step {n}" for n in (4, 8, 12)]
    again = run("callback.py", str(tmp_path))
    assert again.splitlines() == first.splitlines()[-1:]  # nothing left to train, and the count is the same
    assert "96 examples seen" in again


def test_a_snapshot_is_read_without_torch() -> None:
    printed = run("read_without_torch.py")
    assert "model.0.weight: (256, 64) float32" in printed
    assert "step 20" in printed


def test_rolling_back_makes_the_last_commit_the_newest(tmp_path: Path) -> None:
    printed = run("roll_back.py", str(tmp_path)).splitlines()
    assert printed[0] == "a restart goes on after step 20"
    assert [line.split(":")[0] for line in printed[1:]] == ["step 10", "step 20", "step 30", "step 20"]
    assert [line.split("lr ")[1] for line in printed[1:]] == ["0.1", "2.0", "2.0", "0.05"]
    losses = [float(line.split()[3].strip(",")) for line in printed[1:]]
    assert losses[0] < losses[1] < losses[2]
    with torch.random.fork_rng():  # as if it had never gone wrong: the same model, the same random numbers
        torch.manual_seed(0)
        model = torch.nn.Linear(16, 1)
        for step in range(20):
            inputs = torch.randn(8, 16)
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1 if step < 10 else 0.05).step()
            model.zero_grad()
    assert printed[-1].split()[3] == f"{loss.item():.3g},"


def test_kubernetes_the_driver_and_ray_say_where_ranks_are() -> None:
    printed = run("topology_sources.py").splitlines()
    assert printed == [
        "Kubernetes: <Topology rank=6 node=3 rack=3 zone=2> {'racks': {'z1': 'r[1-2]', 'z2': 'r3'}}",
        "NVLink: <Topology rank=6 node=3 supernode=1>",
        "Ray: <Topology rank=3 node=3 supernode=2> "
        "{'nodes': {'nvl-0': 'a[0-1]', 'nvl-1': 'b0'}, 'capacity': '400 GB/s'}",
    ]


def test_the_readme_shows_what_is_planned_for_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    ((command, shown),) = re.findall(r"^\$ fastckpt (plan .*)\n((?:.*\n)*?)```", README, re.MULTILINE)
    monkeypatch.chdir(EXAMPLES.parent)
    planned = CliRunner().invoke(commands, command.split())
    assert planned.exit_code == 0, planned.output
    assert planned.stdout == shown


def test_the_readme_shows_the_headline_of_the_largest_example() -> None:
    table = [line for line in headline.table().splitlines() if line.startswith("|")]
    assert "\n".join(table) in README


def test_saves_take_the_topology_and_the_path_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (document,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "topology=" in block]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "gethostname", lambda: "cn017")
    (tmp_path / "topology.toml").write_text(document)
    names: dict[str, object] = {"fastckpt": fastckpt, "state": {"model": torch.nn.Linear(4, 4)}}
    bindings = []
    for block, url in zip(blocks, ((tmp_path / "topology").as_uri(), (tmp_path / "path").as_uri()), strict=True):
        assert "file:///tmp/run-42" in block
        exec(compile(block.replace("file:///tmp/run-42", url), "README.md", "exec"), names)
        ckpt = names["ckpt"]
        assert isinstance(ckpt, fastckpt.Checkpointer)
        if block is blocks[-1]:
            ckpt.save(1, names["state"])  # type: ignore[arg-type]
        ckpt.close()
        bindings.append(fastckpt.open(url).snapshot(1).environment["placement"]["binding"])
    # The one rank's way is the least of its rank, node and supernode, of which only the last has a capacity.
    assert bindings == [["supernode"], ["supernode"]]


@pytest.mark.distributed
def test_an_fsdp2_job_of_another_size_goes_on(tmp_path: Path) -> None:
    assert "restored None; step 10 was saved by 2 ranks" in run("fsdp2.py", str(tmp_path), processes=2)
    assert "restored 10; step 20 was saved by 3 ranks" in run("fsdp2.py", str(tmp_path), processes=3)


@pytest.mark.distributed
def test_a_ddp_job_writes_its_model_once(tmp_path: Path) -> None:
    printed = run("ddp.py", str(tmp_path), processes=2)
    # 17 thousand parameters, their two moments and the statistics of 256 features, in float32, and little else.
    total = int(printed.partition(": ")[2].split()[0])
    assert printed.startswith("step 10")
    assert 17_409 * 12 < total < 17_409 * 12 * 1.2


@pytest.mark.distributed
def test_a_loader_goes_on_in_the_middle_of_an_epoch_at_another_world_size(tmp_path: Path) -> None:
    url = str(tmp_path)
    first, rest = (run("dataloader.py", url, processes=processes).split("sample ")[1:] for processes in (2, 1))
    assert (len(first), len(rest)) == (64, 32)
    assert sorted(map(int, first + rest)) == list(range(96))


@pytest.mark.distributed
def test_experts_go_on_with_the_same_loss_on_half_as_many_ranks_and_on_one(tmp_path: Path) -> None:
    """What the ranks compute together does not depend on how many they are, to the last bit."""

    def losses(name: str, processes: int, steps: int) -> list[tuple[int, str]]:
        words = run("moe.py", str(tmp_path / name), str(steps), processes=processes).replace(",", "").split()
        assert words[:3] == [str(processes), "ranks:", "loss"]
        return [(int(words[6]), words[3]), (int(words[10]), words[7])]

    moved = [losses("moved", processes, 10) for processes in (4, 2, 1)]
    assert [[step for step, _ in pair] for pair in moved] == [[0, 10], [10, 20], [20, 30]]
    assert [last for _, last in moved[:-1]] == [first for first, _ in moved[1:]]
    assert [moved[0][0], moved[-1][-1]] == losses("alone", 1, 30)
