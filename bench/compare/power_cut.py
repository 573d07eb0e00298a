"""What a power cut leaves of a checkpoint whose save had returned: fastckpt beside the shapes in which others save.

    python -m bench.compare.power_cut --runs 10 [--out bench/compare/results/power_cut.jsonl]

As root, from the repository's root; on ext4 and XFS, on loop devices. A run: save step 1, sync the file system, save
step 2; when that has returned, cut the power (``FS_IOC_SHUTDOWN``), mount again, and load the newest checkpoint as a
user of that shape would. Step 2 is *kept* if it comes back bit for bit, *lost* if step 1 is what is loaded,
*unloadable* if loading raises, and *wrong* if it gives other bytes without an error. Power is cut at once; after
another process has synced a file of its own, which makes the file system write its journal; or with the journal
written and data not, as may happen whenever the journal's time has come.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import fastckpt
from tests.crash.power_cut import ALONE, MANNERS, MKFS, Mount

TENSOR_BYTES = 4 << 20
NAMES = {"ext4": "ext4", "xfs": "XFS"}


class Shape(NamedTuple):
    """A way to save; each as its documentation or its source has it."""

    name: str
    save: Callable[[Path, int, torch.Tensor], None]
    load: Callable[[Path], torch.Tensor]
    """Loads the newest checkpoint, or raises."""


def tensor_of(step: int) -> torch.Tensor:
    return torch.randn(TENSOR_BYTES // 4, generator=torch.Generator().manual_seed(step))


def newest(paths: list[Path]) -> Path:
    """By the number at the end of its name."""
    return max(paths, key=lambda path: int(path.stem.rpartition("-")[2]))


def replace_save(directory: Path, step: int, tensor: torch.Tensor) -> None:
    torch.save({"tensor": tensor}, directory / "checkpoint.pt.tmp")
    os.replace(directory / "checkpoint.pt.tmp", directory / "checkpoint.pt")


def replace_load(directory: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(directory / "checkpoint.pt")["tensor"]
    return tensor


def rename_save(directory: Path, step: int, tensor: torch.Tensor) -> None:
    torch.save({"tensor": tensor}, directory / f"{step}.tmp")
    os.rename(directory / f"{step}.tmp", directory / f"step-{step}.pt")


def rename_load(directory: Path) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(newest([*directory.glob("step-*.pt")]))["tensor"]
    return tensor


def dcp_save(directory: Path, step: int, tensor: torch.Tensor) -> None:
    dcp.save({"tensor": tensor}, checkpoint_id=directory / f"step-{step}", no_dist=True)


def dcp_load(directory: Path) -> torch.Tensor:
    complete = [path.parent for path in directory.glob("step-*/.metadata")]  # it is written last
    state = {"tensor": torch.zeros(TENSOR_BYTES // 4)}
    dcp.load(state, checkpoint_id=newest(complete), no_dist=True)
    return state["tensor"]


def tag_save(directory: Path, step: int, tensor: torch.Tensor) -> None:
    tag = directory / f"global_step{step}"
    tag.mkdir()
    model, optimizer = tensor.chunk(2)
    torch.save({"tensor": model.clone()}, tag / "model_states.pt")
    torch.save({"tensor": optimizer.clone()}, tag / "optim_states.pt")
    with open(directory / "latest", "w") as latest:
        latest.write(tag.name)


def tag_load(directory: Path) -> torch.Tensor:
    tag = directory / (directory / "latest").read_text().strip()
    return torch.cat([torch.load(tag / name)["tensor"] for name in ("model_states.pt", "optim_states.pt")])


def synced_save(directory: Path, step: int, tensor: torch.Tensor) -> None:
    temporary = directory / f"{step}.tmp"
    with open(temporary, "wb") as file:
        torch.save({"tensor": tensor}, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, directory / f"step-{step}.pt")
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fastckpt_save(directory: Path, step: int, tensor: torch.Tensor) -> None:
    with fastckpt.Checkpointer(directory) as checkpointer:
        checkpointer.save(step, {"tensor": tensor}).wait()


def fastckpt_load(directory: Path) -> torch.Tensor:
    state = {"tensor": torch.zeros(TENSOR_BYTES // 4)}
    with fastckpt.Checkpointer(directory) as checkpointer:
        checkpointer.restore(state)
    return state["tensor"]


SHAPES = [
    Shape("`torch.save`, `os.replace` over the last one", replace_save, replace_load),
    Shape("`torch.save`, rename to a new name", rename_save, rename_load),
    Shape("`dcp.save` to a new directory", dcp_save, dcp_load),
    Shape("`torch.save` to a tag's directory, then `latest` (DeepSpeed's shape)", tag_save, tag_load),
    Shape("`torch.save`, flush, fsync, rename, fsync of the directory", synced_save, rename_load),
    Shape("fastckpt", fastckpt_save, fastckpt_load),
]


def outcome(mount: Mount, shape: Shape, directory: Path, manner: str) -> tuple[str, str]:
    """One run: what became of step 2, and what its loading raised."""
    directory.mkdir()
    shape.save(directory, 1, tensor_of(1))
    mount.sync()
    shape.save(directory, 2, tensor_of(2))
    mount.cut_power(manner)
    mount.unmount()
    mount.mount()
    try:
        loaded = shape.load(directory)
    except CheckpointException as error:  # which is no Exception
        return "unloadable", said(error.failures[0][0], directory)
    except Exception as error:
        return "unloadable", said(error, directory)
    for name, step in (("kept", 2), ("lost", 1)):
        if loaded.equal(tensor_of(step)):
            return name, ""
    return "wrong", ""


def said(error: BaseException, directory: Path) -> str:
    return f"{type(error).__name__}: {error}".replace(str(directory), "DIR").splitlines()[0]


def measured(file_system: str, directory: Path, runs: int) -> list[dict[str, object]]:
    cells: list[dict[str, object]] = []
    mount = Mount(file_system, directory)
    try:
        for shape in SHAPES:
            for manner in MANNERS:
                outcomes: Counter[str] = Counter()
                errors: Counter[str] = Counter()
                for run in range(runs):
                    name, error = outcome(mount, shape, mount.path / f"{len(cells)}-{run}", manner)
                    outcomes[name] += 1
                    errors[error] += bool(error)
                    mount.clear()
                place = {"shape": shape.name, "file_system": file_system, "manner": manner}
                cells.append({**place, **outcomes, "errors": +errors})
    finally:
        mount.unmount()
    return cells


def table(cells: list[dict[str, object]], runs: int) -> str:
    """For the README."""

    def shown(cell: dict[str, object]) -> str:
        found = [name for name in ("kept", "lost", "unloadable", "wrong") if name in cell]
        return ", ".join(name if cell[name] == runs else f"{name} {cell[name]} of {runs}" for name in found)

    heads = [(manner, file_system) for manner in MANNERS for file_system in MKFS]
    by_place = {(cell["shape"], cell["manner"], cell["file_system"]): shown(cell) for cell in cells}
    lines = [["saved by", *(f"{manner}, {NAMES[file_system]}" for manner, file_system in heads)], ["---"] * 7]
    lines += [[shape.name, *(by_place[shape.name, *head] for head in heads)] for shape in SHAPES]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def version(command: str) -> str:
    said = subprocess.run([command, "-V"], capture_output=True, text=True)
    return (said.stdout + said.stderr).splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", type=Path, help="where to mount; given to the process that can do so unseen")
    given = parser.parse_args()
    if not given.alone:
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        with tempfile.TemporaryDirectory() as directory:
            command = [sys.executable, "-m", "bench.compare.power_cut", *sys.argv[1:], "--alone", directory]
            sys.exit(subprocess.run([*ALONE, *command]).returncode)
    logging.disable()  # the errors of loading are in the results
    warnings.simplefilter("ignore")
    cells: list[dict[str, object]] = []
    for file_system in MKFS:
        (given.alone / file_system).mkdir()
        cells += measured(file_system, given.alone / file_system, given.runs)
    record = {
        "bench": "compare/power_cut",
        "command": f"python -m bench.compare.power_cut --runs {given.runs}",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": {"cpus": os.cpu_count(), "kernel": platform.release()},
        "versions": {"fastckpt": metadata.version("fastckpt-torch"), "torch": torch.__version__}
        | {name: version(name) for name in ("mkfs.ext4", "mkfs.xfs")},
        "runs": given.runs,
        "tensor_bytes": TENSOR_BYTES,
        "cells": cells,
    }
    print(table(cells, given.runs))
    if given.out:
        with given.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
