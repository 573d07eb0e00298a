"""How long ``fastckpt ls`` takes for a repository of many snapshots, as a process, from start to end: P-ls."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fastckpt

COMMAND = "from fastckpt.cli.main import main; main()"


def measure(snapshots: int, runs: int, directory: Path) -> dict[str, Any]:
    """In a process of its own; the snapshots are small, and made in memory if the machine has a file system there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else directory) as made:
        parameter = torch.nn.Parameter(torch.randn(61, 7))
        with fastckpt.Checkpointer(made) as checkpointer:
            for step in range(1, snapshots + 1):
                checkpointer.save(step, {"model": torch.nn.ParameterList([parameter])}).wait()
        shutil.copytree(made, directory / "repository")
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        listed = subprocess.run(
            [sys.executable, "-c", COMMAND, "ls", str(directory / "repository")],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(time.perf_counter() - start)
    if str(snapshots) not in listed.stdout:
        raise RuntimeError(f"fastckpt ls does not list step {snapshots}: {listed.stdout[-500:]}")
    return {"snapshots": snapshots, "seconds": seconds[1:]}
