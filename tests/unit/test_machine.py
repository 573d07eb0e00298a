"""The limits set on a process are found wherever they are set, in either version of cgroups."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastckpt.cli import machine

GIB = 1024**3


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8388608 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "4:memory:/a/b\n3:cpuset:/\n1:cpu,cpuacct:/a\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "limit", "cpus"),
    [
        ({}, None, None),
        (V2, None, None),
        ({**V2, "sys/fs/cgroup/a/b/memory.max": "max\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None, None),
        ({**V2, "sys/fs/cgroup/a/b/memory.max": f"{4 * GIB}\n"}, 4 * GIB, None),
        ({**V2, "sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/memory.max": f"{2 * GIB}"}, 2 * GIB, None),
        ({**V2, "sys/fs/cgroup/memory.max": f"{2 * GIB}", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2 * GIB, 1.5),
        ({**V1, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712"}, None, None),
        ({**V1, "sys/fs/cgroup/memory/a/memory.limit_in_bytes": f"{3 * GIB}"}, 3 * GIB, None),
        (
            {**V1, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000", "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000"},
            None,
            0.5,
        ),
        ({**V1, "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1"}, None, None),
    ],
)
def test_the_smallest_limit_on_the_way_up_counts(
    tmp_path: Path, files: dict[str, str], limit: int | None, cpus: float | None
) -> None:
    root = tree(tmp_path, files)
    memory = machine.memory(root)
    assert (memory.state, memory.facts["available_bytes"], memory.facts["cgroup_bytes_max"]) == ("ok", 8 * GIB, limit)
    assert machine.cpu(root).facts["cgroup_cpus"] == cpus


@pytest.mark.parametrize(
    "files",
    [
        {"proc/meminfo": "MemAvailable: 1000 kB\n"},
        {**V2, "sys/fs/cgroup/a/memory.max": "500000000"},
    ],
)
def test_little_memory_is_a_warning(tmp_path: Path, files: dict[str, str]) -> None:
    finding = machine.memory(tree(tmp_path, files))
    assert finding.state == "warn"
    assert finding.change


def test_without_proc_nothing_is_claimed(tmp_path: Path) -> None:
    finding = machine.memory(tmp_path)
    assert (finding.state, finding.facts["available_bytes"]) == ("ok", None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("RLIMIT_NOFILE", 200, "open files"),
        ("RLIMIT_FSIZE", 10 * 1024**2, "file size"),
        ("RLIMIT_AS", 64 * 1024**3, "address space"),
    ],
)
def test_a_limit_that_a_save_can_reach_is_a_warning(name: str, value: int, words: str) -> None:
    """In a process of its own: lowered limits stay."""
    code = (
        f"import resource; resource.setrlimit(resource.{name}, ({value}, resource.getrlimit(resource.{name})[1]))\n"
        "from fastckpt.cli import machine; found = machine.limits(); print(found.state, found.change)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("warn ")
    assert words in result.stdout


def test_limits_are_given_as_numbers() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert machine.limits().facts["open_files_max"] == soft


@pytest.mark.parametrize(
    ("version", "state"), [(None, "ok"), ("2.9.1", "fail"), ("2.10.0a0+git", "ok"), ("2.13.0+cpu", "ok"), ("3.0", "ok")]
)
def test_a_pytorch_that_is_too_old_is_a_failure_and_none_is_not(
    monkeypatch: pytest.MonkeyPatch, version: str | None, state: str
) -> None:
    real = machine.importlib.metadata.version

    def installed(name: str) -> str:
        if name != "torch":
            return real(name)
        if version is None:
            raise machine.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(machine.importlib.metadata, "version", installed)
    finding = machine.software()
    assert (finding.state, finding.facts["torch"]) == (state, version)


def test_the_pool_that_saves_stage_through_can_be_made() -> None:
    assert machine.shared_memory().state == "ok"
