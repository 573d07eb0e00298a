"""The environment record: an allow-list, cheap, and never in the way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastckpt.job import environment as module
from fastckpt.job.environment import environment

CANARY = "canary-5ecret"

PROGRAM = f"""
import json, sys
sys.argv.append("--token={CANARY}")
from fastckpt.job.environment import environment
print(json.dumps(environment()))
"""


@pytest.fixture(autouse=True)
def fresh_record() -> Iterator[None]:
    module._constant.cache_clear()
    yield
    module._constant.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A training program in a repository whose every name is a secret."""
    folder = tmp_path / CANARY
    folder.mkdir()
    path = folder / f"{CANARY}.py"
    path.write_text(PROGRAM)
    git(folder, "init", "-q", "-b", CANARY)
    git(folder, "remote", "add", "origin", f"https://user:{CANARY}@example.org/{CANARY}.git")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", CANARY)
    return path


def record_of(program: Path, **variables: str) -> dict[str, Any]:
    result = subprocess.run(
        [sys.executable, str(program), CANARY],
        check=True,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "AWS_SECRET_ACCESS_KEY": CANARY,
            CANARY: "x",
            "USER": CANARY,
            "HOME": f"/{CANARY}",
            "CUBLAS_WORKSPACE_CONFIG": f":16:8{CANARY}",
            **variables,
        },
    )
    assert CANARY not in result.stdout
    assert socket.gethostname() not in result.stdout
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_secrets_around_the_job_are_not_recorded_and_its_commit_is(program: Path) -> None:
    record = record_of(program, GIT_DIR="/nonexistent")
    assert record["code"] == {"commit": git(program.parent, "rev-parse", "HEAD"), "dirty": False}
    assert record["determinism"]["cublas_workspace"] == "other"


def test_a_changed_program_is_dirty_and_an_ignored_one_has_no_commit(program: Path) -> None:
    program.write_text(PROGRAM + "\n")
    assert record_of(program)["code"]["dirty"] is True
    ignored = program.parent / "launcher.py"
    ignored.write_text(PROGRAM)
    (program.parent / ".gitignore").write_text("launcher.py\n")
    assert "code" not in record_of(ignored)


def test_a_program_outside_any_repository_has_no_commit(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    assert "code" not in record_of(path, GIT_CEILING_DIRECTORIES=str(tmp_path))


def test_the_record_is_plain_data_from_a_fixed_list() -> None:
    mesh = SimpleNamespace(shape=(2, 4), mesh_dim_names=("dp", "tp"))
    record = environment(mesh=mesh, nodes=(0, 0, 0, 1))
    assert json.loads(json.dumps(record)) == record
    assert set(record) <= {
        *("python", "torch", "distributions", "platform", "code", "world_size", "ranks_per_node", "mesh"),
        *("accelerator", "determinism"),
    }
    assert record["torch"]["version"] == torch.__version__
    assert record["distributions"]["numpy"]
    assert record["world_size"] == 4
    assert record["ranks_per_node"] == [3, 1]
    assert record["mesh"] == {"shape": [2, 4], "dim_names": ["dp", "tp"]}
    assert record["platform"]["memory_bytes"] > 0


def test_host_names_are_recorded_only_when_asked_for() -> None:
    assert "host" not in environment()
    assert environment(hosts=True)["host"] == socket.gethostname()


def test_flags_are_those_of_the_moment_and_versions_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment()["determinism"]["default_dtype"] == "float32"
    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    assert environment()["determinism"]["default_dtype"] == "float64"


DETERMINISM = {
    "deterministic_algorithms",
    "deterministic_warn_only",
    "fill_uninitialized_memory",
    "cudnn_benchmark",
    "cudnn_deterministic",
    "cublas_workspace",
    "float32_matmul_precision",
    "cuda_matmul_fp32_precision",
    "cudnn_conv_fp32_precision",
    "cudnn_rnn_fp32_precision",
    "fp16_accumulation",
    "fp16_reduced_precision_reduction",
    "bf16_reduced_precision_reduction",
    "sdpa_backends",
    "default_dtype",
    "threads",
}


def test_every_switch_that_decides_about_bits_is_recorded_as_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(environment()["determinism"]) == DETERMINISM
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = environment()["determinism"]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        after = environment()["determinism"]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_flash_sdp(True)
    assert before["cudnn_benchmark"] is True
    assert before["fill_uninitialized_memory"] is False
    assert before["cublas_workspace"] == ":4096:8"
    assert after["deterministic_algorithms"] is after["deterministic_warn_only"] is True
    assert after["sdpa_backends"] == ["mem_efficient", "math", "cudnn"]


def test_precision_set_by_the_newer_switches_is_recorded_where_the_older_one_refuses_to_answer() -> None:
    code = (
        "import json, torch; torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "from fastckpt.job.environment import environment; print(json.dumps(environment()['determinism']))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    flags = json.loads(result.stdout)
    assert "float32_matmul_precision" not in flags
    assert flags["cuda_matmul_fp32_precision"] == "tf32"


def test_a_caller_may_change_its_record() -> None:
    environment()["torch"]["version"] = "none"
    assert environment()["torch"]["version"] == torch.__version__


def test_whatever_cannot_be_found_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(subprocess, "run", broken)
    monkeypatch.setattr(os, "sysconf", broken)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", broken)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", broken)
    record = environment(mesh=object())
    assert "memory_bytes" not in record["platform"]
    assert "float32_matmul_precision" not in record["determinism"]
    assert not {"code", "mesh", "accelerator"} & set(record)
    assert record["world_size"] == 1


def test_an_accelerator_is_described_once_the_job_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    used = False
    device = SimpleNamespace(
        is_initialized=lambda: used,
        get_device_name=lambda: "Accelerator 9",
        get_device_properties=lambda: SimpleNamespace(driver_version="1.2"),
    )
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    assert "accelerator" not in environment()
    used = True
    assert environment()["accelerator"] == {"type": "xpu", "count": 8, "name": "Accelerator 9", "driver": "1.2"}


def test_a_git_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "git"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "GIT_SECONDS_MAX", 0.2)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "train.py"), raising=False)
    assert "code" not in environment()
