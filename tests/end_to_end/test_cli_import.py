"""``fastckpt import torch``: what is in the file comes back from the snapshot, and a hostile file gets nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import fastckpt
from fastckpt.cli import import_torch
from fastckpt.cli.main import commands
from fastckpt.format.value import TensorReference


def run(*args: object) -> Result:
    return CliRunner().invoke(commands, [str(arg) for arg in args])


def saved(path: Path, content: object, **settings: Any) -> Path:
    torch.save(content, path / "file.pt", **settings)
    return path / "file.pt"


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 40)
        self.norm = nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 300)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_a_state_dict_restores_into_a_module(tmp_path: Path, zip_format: bool) -> None:
    module = Tied()
    file = saved(tmp_path, module.state_dict(), _use_new_zipfile_serialization=zip_format)
    result = run("import", "torch", file, tmp_path / "r", "--name", "model", "--step", 7, "--note", "from elsewhere")
    assert result.exit_code == 0, result.output
    assert "imported 8 tensors and 0 plain values" in result.stdout
    other = Tied()
    with fastckpt.Checkpointer(str(tmp_path / "r")) as checkpointer:
        assert checkpointer.restore({"model": other}) == 7
    for name, tensor in module.state_dict().items():
        assert raw(other.state_dict()[name]) == raw(tensor), name
    shown = json.loads(run("show", tmp_path / "r", "--json").stdout)
    assert shown["note"] == "from elsewhere"
    assert {k["key"]: k["tied_to"] for k in shown["keys"]}["model.head.weight"] == "model.embed.weight"
    assert run("verify", tmp_path / "r").exit_code == 0


def test_nested_dicts_become_dotted_keys_and_the_rest_plain_values(tmp_path: Path) -> None:
    moment = torch.rand(20, 30)
    content = {
        "model": OrderedDict(weight=torch.rand(6, 7), version=3),
        "optimizer": {"state": {0: {"exp_avg": moment, "step": torch.tensor(5.0)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 12,
        "size": torch.Size([1, 2]),
    }
    assert run("import", "torch", saved(tmp_path, content), tmp_path / "r").exit_code == 0
    snapshot = fastckpt.open(str(tmp_path / "r")).snapshot(0)
    assert snapshot.keys() == ["model.weight", "optimizer.state.0.exp_avg", "optimizer.state.0.step"]
    assert snapshot.read("optimizer.state.0.exp_avg").tobytes() == raw(moment)
    assert sorted(snapshot.value_digests(0)) == ["epoch", "model.version", "optimizer", "size"]
    assert snapshot.value("epoch") == 12
    assert snapshot.value("model.version") == 3
    assert snapshot.value("optimizer") == {
        "state": {
            0: {
                "exp_avg": TensorReference("optimizer.state.0.exp_avg"),
                "step": TensorReference("optimizer.state.0.step"),
            }
        },
        "param_groups": [{"lr": 0.1}],
    }


def test_a_name_goes_before_keys_values_and_references(tmp_path: Path) -> None:
    content = {"a": [torch.ones(2)], "b": torch.zeros(3)}
    assert run("import", "torch", saved(tmp_path, content), tmp_path / "r", "--name", "x.y").exit_code == 0
    snapshot = fastckpt.open(str(tmp_path / "r")).snapshot()
    assert snapshot.keys() == ["x.y.a.0", "x.y.b"]
    assert snapshot.value("x.y.a") == [TensorReference("x.y.a.0")]


def test_odd_tensors_keep_their_bytes(tmp_path: Path) -> None:
    base = torch.arange(4000, dtype=torch.float32).reshape(50, 80)
    content = {
        "transposed": base.t(),
        "slice": base[::2, 3:5],
        "expanded": torch.ones(1, 3).expand(40, 3),
        "conjugated": torch.randn(5, 2, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "empty": torch.empty(0, 3),
        "bfloat": torch.randn(33).bfloat16(),
        "float8": torch.randn(9).to(torch.float8_e5m2),
        "bool": torch.rand(11) > 0.5,
        "parameter": nn.Parameter(torch.rand(2)),
    }
    assert run("import", "torch", saved(tmp_path, content), tmp_path / "r").exit_code == 0
    snapshot = fastckpt.open(str(tmp_path / "r")).snapshot()
    for key, tensor in content.items():
        array = snapshot.read(key)
        assert list(array.shape) == list(tensor.shape)
        assert array.tobytes() == raw(tensor.resolve_conj()), key


def test_large_and_many_tensors_come_in_the_order_the_save_wants(tmp_path: Path) -> None:
    """Bundles of tiny tensors, tensors of several chunks, and keys that do not sort as the file has them."""
    generator = torch.Generator().manual_seed(1)
    content = {}
    for number in range(60):
        size = (3_000_000, 50, 70_000)[number % 3]
        content[f"k{number * 37 % 60}"] = torch.randint(0, 255, (size // 8,), generator=generator, dtype=torch.int64)
    assert run("import", "torch", saved(tmp_path, content), tmp_path / "r").exit_code == 0
    snapshot = fastckpt.open(str(tmp_path / "r")).snapshot()
    assert all(np.array_equal(snapshot.read(key), tensor.numpy()) for key, tensor in content.items())


def test_dry_run_says_what_would_be_saved_and_saves_nothing(tmp_path: Path) -> None:
    file = saved(tmp_path, {"w": torch.rand(3, 4), "epoch": 3})
    result = run("import", "torch", file, tmp_path / "r", "--dry-run", "--step", 9)
    assert result.exit_code == 0
    assert "would import 1 tensor and 1 plain value" in result.stdout
    assert "[3, 4]" in result.stdout
    summary = json.loads(run("import", "torch", file, tmp_path / "r", "-n", "--json").stdout.splitlines()[-1])
    assert summary["dry_run"] is True
    assert summary["keys"] == ["w"]
    assert summary["values"] == ["epoch"]
    assert not (tmp_path / "r").exists()


def test_a_step_that_is_there_is_not_saved_again(tmp_path: Path) -> None:
    file = saved(tmp_path, {"w": torch.rand(3)})
    assert run("import", "torch", file, tmp_path / "r").exit_code == 0
    result = run("import", "torch", file, tmp_path / "r")
    assert result.exit_code == 1
    assert "step 0 already" in result.stderr
    assert run("import", "torch", file, tmp_path / "r", "--step", 1).exit_code == 0
    assert len(fastckpt.open(str(tmp_path / "r")).snapshots()) == 2


def test_something_else_is_not_made_a_repository(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("x")
    assert run("import", "torch", saved(tmp_path, {"w": torch.rand(3)}), tmp_path / "home").exit_code == 10
    assert [entry.name for entry in (tmp_path / "home").iterdir()] == ["thesis.txt"]


# --- hostile and broken files --------------------------------------------------------------------------------------


class Shell:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "legacy"])
def test_a_file_that_needs_code_is_refused_and_nothing_runs(tmp_path: Path, zip_format: bool) -> None:
    witness = tmp_path / "witness"
    file = saved(
        tmp_path, {"w": torch.rand(3), "x": Shell(f"touch {witness}")}, _use_new_zipfile_serialization=zip_format
    )
    result = run("import", "torch", file, tmp_path / "r")
    assert result.exit_code == 15
    assert "posix.system" in result.stderr
    assert not witness.exists()
    assert not (tmp_path / "r").exists()
    # The file is what it is taken for: whoever trusts it is the victim.
    torch.load(file, weights_only=False)
    assert witness.exists()


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    result = run("import", "torch", saved(tmp_path, nn.Linear(2, 2)), tmp_path / "r")
    assert result.exit_code == 15
    assert "torch.nn.modules.linear.Linear" in result.stderr
    assert "state_dict()" in result.stderr


@pytest.mark.parametrize("keep", [0, 1, 100, -1000, -1])
def test_a_cut_file_is_damage(tmp_path: Path, keep: int) -> None:
    file = saved(tmp_path, {"w": torch.rand(3000)})
    file.write_bytes(file.read_bytes()[:keep])
    result = run("import", "torch", file, tmp_path / "r")
    assert result.exit_code == 14, result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "r").exists()


def test_random_bytes_are_damage(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    for seed in range(3):
        file.write_bytes(np.random.default_rng(seed).bytes(1000))
        assert run("import", "torch", file, tmp_path / "r").exit_code == 14


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.rand(3), "not a dict"),
        ([torch.rand(3)], "not a dict"),
        ({3: torch.rand(3)}, "non-empty strings"),
        ({"a.b": torch.rand(3), "a": {"b": torch.rand(3)}}, "a.b: two tensors"),
        ({"s": torch.eye(3).to_sparse()}, "s: a sparse tensor"),
    ],
)
def test_what_cannot_be_a_snapshot_is_refused_by_name(tmp_path: Path, content: object, words: str) -> None:
    result = run("import", "torch", saved(tmp_path, content), tmp_path / "r")
    assert result.exit_code == 15
    assert words in result.stderr


def test_a_small_file_may_not_claim_a_huge_tensor(tmp_path: Path) -> None:
    result = run("import", "torch", saved(tmp_path, {"w": torch.ones(1).expand(2**40)}), tmp_path / "r")
    assert result.exit_code == 15
    assert "claims tensors of" in result.stderr
    assert not (tmp_path / "r").exists()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert run("import", "torch", tmp_path / "fifo", tmp_path / "r").exit_code == 1
    assert run("import", "torch", tmp_path / "nothing", tmp_path / "r").exit_code == 2


def test_the_importing_process_itself_never_loads_torch(tmp_path: Path) -> None:
    file = saved(tmp_path, {"w": torch.rand(3)})
    code = (
        "import sys; from fastckpt.cli.main import commands\n"
        "try: commands()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    args = ["import", "torch", str(file), str(tmp_path / "r")]
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "False"


# --- the child -----------------------------------------------------------------------------------------------------


def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Result:
    """An import whose child is a script of the test's own. It finds the pipe that asks for tensors in ``control``."""
    file = saved(tmp_path, {"w": torch.rand(3)})
    start = "import os, sys, time, struct, msgspec; control = int(sys.argv[1])\n"
    start += "def send(data): os.write(1, struct.pack('<Q', len(data)) + data)\n"
    real = subprocess.Popen

    def popen(command: list[str], **settings: Any) -> subprocess.Popen[bytes]:
        return real([command[0], "-I", "-c", start + script, command[-1]], **settings)

    monkeypatch.setattr(import_torch.subprocess, "Popen", popen)
    return run("import", "torch", file, tmp_path / "r")


def header(*tensors: tuple[Any, ...], values: Any = None) -> str:
    return f"send({msgspec.msgpack.encode(['ok', '2.13', list(tensors), values or {}])!r})\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("pass", "ended with 0"),
        ("sys.exit(3)", "ended with 3"),
        ("os.kill(os.getpid(), 9)", "more CPU time or memory"),
        ("os.kill(os.getpid(), 24)", "more CPU time or memory"),
        ("os.kill(os.getpid(), 11)", "died of signal 11"),
        ("os.write(1, b'x' * 5)", "ended with 0"),
        ("os.write(1, b'\\xff' * 100)", "a header of"),
        ("send(b'nonsense')", "header that is none"),
        (header(("w", "float32", [3], -1, 5)), "header that is none"),
        (header(("w", "float99", [3], -1)), "what cannot be"),
        (header(("w", "float32", [-3], -1)), "what cannot be"),
        (header(("w", "float32", [2**62, 4], -1)), "what cannot be"),
        (header(("w", "float32", [3], 0)), "what cannot be"),
        (header(("w", "float32", [3], -1), ("w", "float32", [3], -1)), "what cannot be"),
        (header(("w", "float32", [3], -1), ("v", "int8", [3], 0)), "what cannot be"),
        (header(("", "float32", [3], -1)), "what cannot be"),
        (header(("k" * 5000, "float32", [3], -1)), "what cannot be"),
        (header(values={"epoch": b"nonsense"}), "what cannot be"),
        (header(("w", "float32", [3], -1)) + "os.write(1, b'x' * 11)", "ended with 0"),
        (header(("w", "float32", [3], -1)) + "os.read(control, 99); os.kill(os.getpid(), 9)", "more CPU time"),
    ],
)
def test_whatever_the_child_does_is_a_clear_error_and_no_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    result = instead(tmp_path, monkeypatch, script)
    assert result.exit_code in (1, 14), result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == 1
    repository = tmp_path / "r"
    assert not repository.exists() or fastckpt.open(str(repository)).snapshots() == []


def test_a_child_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_torch, "SILENT_SECONDS_MAX", 0.2)
    result = instead(tmp_path, monkeypatch, "time.sleep(600)")
    assert result.exit_code == 1
    assert "said nothing" in result.stderr


CONFINED = """
import os, sys, resource
sys.argv = ["x", "0"]
from fastckpt.job import torch_file
import torch
torch_file._confine(); torch_file._confine_further()
def tried(what):
    try: what()
    except (OSError, MemoryError, RuntimeError) as error: return type(error).__name__
    return "allowed"
def write():
    fd = os.open({path!r}, os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x")
def many():
    for _ in range(100): os.open("/dev/null", os.O_RDONLY)
print(tried(write), tried(lambda: bytearray(1 << 40)), tried(many), os.getcwd(), *set(os.environ) - {{'LC_CTYPE'}})
print(resource.getrlimit(resource.RLIMIT_CORE)[1], resource.getrlimit(resource.RLIMIT_NPROC)[1])
print(resource.getrlimit(resource.RLIMIT_CPU)[1] < 10000)
"""


def test_the_child_can_write_no_file_and_take_no_memory_beyond_its_share(tmp_path: Path) -> None:
    file = saved(tmp_path, {"w": torch.rand(3)})
    with file.open("rb") as stdin:
        result = subprocess.run(
            [sys.executable, "-I", "-c", CONFINED.format(path=str(tmp_path / "loot"))],
            stdin=stdin,
            capture_output=True,
            text=True,
            env={},
        )
    assert result.stdout.splitlines() == ["OSError MemoryError OSError /", "0 0", "True"], result.stderr


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed while its child waits to be asked leaves no process behind."""
    file = saved(tmp_path, {"w": torch.rand(3)})
    code = (
        "import os, sys, time; from fastckpt.cli import import_torch\n"
        f"child = import_torch._Child('f', os.open({str(file)!r}, os.O_RDONLY))\n"
        "child.content(''); print(child._process.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
    for _ in range(600):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")
