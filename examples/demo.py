"""What fastckpt promises, tried on real training: `make demo`.

1. Two processes train a language model with FSDP2 and save nothing: the reference.
2. They train it again, saving every few steps. One is killed with SIGKILL in the middle of a save; torchrun restarts
   them, and they go on from the last committed snapshot. Every loss must equal the reference's to the last bit.
3. One process restores what two have saved; the command line verifies it and exports it to safetensors.

Exit code 1, and the reason, if anything is not as claimed. Everything it makes lies below demo-output/.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastckpt

HERE = Path(__file__).resolve().parent
RANKS = range(2)
COMMITTED_MIN = 3
"""Snapshots there must be before a worker is killed."""
KILLS_MAX = 3
RUN_SECONDS_MAX = 300.0

errors = Console(stderr=True)


class NotAsClaimedError(Exception):
    pass


def claim(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotAsClaimedError(otherwise)


@dataclass(frozen=True)
class Run:
    """One training run, by what its ranks wrote down."""

    output: Path
    steps: int
    arguments: tuple[str, ...]

    def journal(self, rank: int) -> list[dict[str, Any]]:
        path = self.output / f"rank-{rank}.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    def starts(self, rank: int) -> list[dict[str, Any]]:
        """One entry for the start of the job and for each restart."""
        return [entry for entry in self.journal(rank) if "pid" in entry]

    def losses(self, rank: int) -> list[tuple[int, str]]:
        """Steps in the order in which they were trained; after a restart some come again."""
        return [(entry["step"], entry["loss"]) for entry in self.journal(rank) if "step" in entry]

    def digests(self) -> dict[str, str]:
        found: dict[str, str] = json.loads((self.output / "digests.json").read_text())
        return found

    @property
    def log(self) -> Path:
        return self.output / "log"

    def train(self, look: Callable[[], None] = lambda: None) -> None:
        """Runs it to the end under torchrun, which restarts workers that die. ``look`` is called all the while."""
        self.output.mkdir(parents=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(RANKS)}"]
        command += [f"--max-restarts={KILLS_MAX}", "--monitor-interval=0.1", str(HERE / "train_lm.py")]
        command += ["--output", str(self.output), "--steps", str(self.steps), *self.arguments]
        # One thread a process: sums are taken in the same order every time. And a key-value store of its own for every
        # restart: in the one before, gloo may find the addresses of workers that are dead.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        deadline = time.monotonic() + RUN_SECONDS_MAX
        with self.log.open("wb") as log, self._progress() as update:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            try:
                while process.poll() is None:
                    look()
                    update()
                    claim(time.monotonic() < deadline, f"training took over {RUN_SECONDS_MAX:.0f} s; see {self.log}")
                    time.sleep(0.001)
            finally:
                if process.poll() is None:
                    process.terminate()  # torchrun ends its workers
                process.wait(timeout=60)
        if process.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise NotAsClaimedError(
                f"training failed with exit code {process.returncode}; {self.log} ends with\n{tail}"
            )

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        """A bar on a terminal, a line at the end otherwise."""
        started = due = time.monotonic()
        columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=errors, refresh_per_second=2, disable=not errors.is_terminal) as progress:
            task = progress.add_task(self.output.name, total=self.steps)

            def update() -> None:
                nonlocal due
                if time.monotonic() >= due:
                    due = time.monotonic() + 0.5
                    progress.update(task, completed=max((step for step, _ in self.losses(0)), default=0))

            yield update
            progress.update(task, completed=max((step for step, _ in self.losses(0)), default=0))
        if not errors.is_terminal:
            errors.print(f"{self.output.name}: {self.steps} steps, {time.monotonic() - started:.0f} s")


@dataclass(frozen=True)
class Kill:
    attempt: str
    step: int
    """What was being saved."""
    pack_bytes: int
    """What the killed worker had written of it."""
    starts: int
    """How often the job had been started by then."""


@dataclass
class Killer:
    """Kills a worker in the middle of a save, going by what the repository shows: packs of an attempt, no COMMIT.

    The save may be committed before the signal arrives. Whether it was, the repository tells once torchrun has
    restarted the workers; then the next save is tried.
    """

    repository: Path
    run: Run
    every_steps: int
    kills: list[Kill] = field(default_factory=list)
    hit: bool = False
    """The last kill was in the middle of a save."""
    _restarting: bool = False
    _seen: set[str] = field(default_factory=set)

    def look(self) -> None:
        if self.hit:
            return
        if self._restarting:
            if len(self.run.starts(1)) > self.kills[-1].starts:
                self._restarting = False
                self.hit = self.kills[-1].attempt not in self._committed()
            return
        for folder in (self.repository / "packs").glob("*"):
            if folder.name not in self._seen and self._written(folder):
                self._seen.add(folder.name)
                committed = self._committed()
                if folder.name not in committed and len(committed) >= COMMITTED_MIN and len(self.kills) < KILLS_MAX:
                    self._kill(folder.name)
                    return

    def _kill(self, attempt: str) -> None:
        starts = self.run.starts(1)
        os.kill(starts[-1]["pid"], signal.SIGKILL)
        written = self._written(self.repository / "packs" / attempt)
        # Attempts are numbered from 1 in every start of the job.
        step = (starts[-1]["restored"] or 0) + int(attempt.rpartition("-")[2]) * self.every_steps
        self.kills.append(Kill(attempt, step, written, len(starts)))
        self._restarting = True

    @staticmethod
    def _written(folder: Path) -> int:
        return sum(pack.stat().st_size for pack in folder.glob("*/1-*.pack"))

    def _committed(self) -> set[str]:
        return {snapshot.attempt for snapshot in fastckpt.open(str(self.repository)).snapshots()}


def check_losses(reference: Run, run: Run) -> int:
    """Every loss of ``run``, of each step as often as it was trained, is the reference's. Returns how often a step was
    trained again."""
    again = 0
    for rank in RANKS:
        expected, found = dict(reference.losses(rank)), run.losses(rank)
        claim(sorted(expected) == list(range(1, reference.steps + 1)), "the reference has not trained every step")
        claim(dict(found).keys() == expected.keys(), f"rank {rank} has not trained every step")
        wrong = [(step, loss) for step, loss in found if loss != expected[step]]
        if wrong:
            step, loss = wrong[0]
            raise NotAsClaimedError(
                f"losses differ in {len(wrong)} steps of rank {rank}, first in step {step}: "
                f"{expected[step]} in the reference, {loss} after the restart"
            )
        again = max(again, len(found) - len(expected))
    return again


def check_resumed(run: Run, killer: Killer) -> tuple[int, float]:
    """The workers went on from the last snapshot that was committed before the kill. Returns its step and how long the
    restore took."""
    claim(bool(killer.kills), "no worker was killed: no save was seen while it was being written")
    claim(killer.hit, f"{len(killer.kills)} workers were killed, but never in the middle of a save; try again")
    kill = killer.kills[-1]
    snapshots = fastckpt.open(str(killer.repository)).snapshots()
    claim(kill.attempt not in {snapshot.attempt for snapshot in snapshots}, "the interrupted save became a snapshot")
    left = [path for path in (killer.repository / "packs" / kill.attempt).rglob("*") if path.is_file()]
    claim(not left, f"what the interrupted save had written was not removed: {left}")
    starts = [run.starts(rank) for rank in RANKS]
    claim({len(own) for own in starts} == {len(killer.kills) + 1}, "the workers were restarted for another reason too")
    before = [snapshot.step for snapshot in snapshots if snapshot.attempt < kill.attempt]  # ids count up
    resumed = {own[kill.starts]["restored"] for own in starts}
    claim(resumed == {before[-1]}, f"resumed from {resumed}, not from the last committed snapshot, {before[-1]}")
    return before[-1], max(own[kill.starts]["restore_seconds"] for own in starts)


def restore_on_one_process(repository: Path, steps: int, size: str) -> tuple[dict[str, str], float]:
    """What two processes have saved, in a process without torch.distributed: digests of all tensors, and seconds."""
    import torch
    from train_lm import SIZES, LanguageModel, digests, optimizer_and_schedule

    torch.manual_seed(99)
    model = LanguageModel(SIZES[size])
    optimizer, schedule = optimizer_and_schedule(model, steps)
    started = time.perf_counter()
    with fastckpt.Checkpointer(str(repository), create=False) as ckpt:
        # The loader is left out: two ranks were at two places, and one process cannot be at both.
        step = ckpt.restore({"model": model, "optimizer": optimizer, "schedule": schedule})
    seconds = time.perf_counter() - started
    claim(step == steps, f"restored step {step} instead of the newest, {steps}")
    return digests(model, optimizer), seconds


def check_equal(what: str, found: dict[str, str], expected: dict[str, str]) -> None:
    wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    claim(not wrong, f"{what}: {len(wrong)} of {len(expected)} tensors differ, such as {wrong[:3]}")


def fastckpt_command(*arguments: str) -> str:
    command = Path(sys.executable).with_name("fastckpt")  # beside this interpreter, activated or not
    result = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=120)
    claim(result.returncode == 0, f"fastckpt {' '.join(arguments)}: exit code {result.returncode}\n{result.stderr}")
    return result.stdout


def check_command_line(repository: Path, export: Path, steps: int, expected: dict[str, str]) -> None:
    import safetensors.torch

    listed = json.loads(fastckpt_command("ls", str(repository), "--json"))
    claim(listed["snapshots"][-1]["step"] == steps, "fastckpt ls does not end with the last step")
    fastckpt_command("verify", str(repository), "--all")
    fastckpt_command("restore", str(repository), "--to", str(export))
    exported = safetensors.torch.load_file(export)
    found = {key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for key, tensor in exported.items()}
    check_equal("the exported file", {key: digest for key, digest in found.items() if key in expected}, expected)


def saves_of(run: Run) -> list[tuple[float, float]]:
    """Of each committed save, in ms, the slower rank: how long training stood still, and the time to the COMMIT."""
    saves: dict[int, tuple[float, float]] = {}
    for rank in RANKS:
        for entry in run.journal(rank):
            if "committed_seconds" in entry:
                stall, commit = saves.get(entry["saved"], (0.0, 0.0))
                waited = entry["return_seconds"] + entry.get("fence_seconds", 0.0)
                saves[entry["saved"]] = (max(stall, waited * 1e3), max(commit, entry["committed_seconds"] * 1e3))
    return list(saves.values())


def show(facts: dict[str, str]) -> None:
    console = Console()
    if not console.is_terminal:
        for name, fact in facts.items():
            print(f"{name}: {fact}")
        return
    table = Table(show_header=False)
    for name, fact in facts.items():
        table.add_row(name, fact)
    console.print(table)


def demonstrate(output: Path, quick: bool, forget: str) -> dict[str, str]:
    steps, every, size = (24, 2, "tiny") if quick else (48, 4, "small")
    arguments = ("--size", size, "--save-every", str(every))
    repository = output / "repository"

    reference = Run(output / "reference", steps, arguments)
    reference.train()

    run = Run(output / "interrupted", steps, (*arguments, "--repository", str(repository), "--forget", forget))
    killer = Killer(repository, run, every)
    run.train(killer.look)
    resumed, restore_seconds = check_resumed(run, killer)
    again = check_losses(reference, run)
    check_equal("the state after the restart", run.digests(), reference.digests())

    alone, alone_seconds = restore_on_one_process(repository, steps, size)
    check_equal("the state restored on one process", alone, run.digests())
    check_command_line(repository, output / "snapshot.safetensors", steps, alone)

    snapshots = fastckpt.open(str(repository)).snapshots()
    stalls, commits = zip(*saves_of(run), strict=True)
    kill = killer.kills[-1]
    return {
        "steps": f"{steps} on {len(RANKS)} processes, {again} of them trained twice",
        "snapshots": f"{len(snapshots)} of {snapshots[-1].bytes / 2**20:.1f} MiB",
        "stall per save": f"{statistics.median(stalls):.0f} ms (median), {max(stalls):.0f} ms (longest)",
        "time to committed": f"{statistics.median(commits):.0f} ms (median), {max(commits):.0f} ms (longest)",
        "killed": f"rank 1, saving step {kill.step}, with {kill.pack_bytes / 1024:,.0f} KiB of its half written",
        "resumed": f"after step {resumed}, the last one committed; restored in {restore_seconds * 1e3:.0f} ms",
        "losses equal to the last bit": "yes",
        "restored on 1 process": f"all {len(alone)} tensors equal, in {alone_seconds * 1e3:.0f} ms",
        "exported to safetensors": "all tensors equal",
        "verified": f"all {len(snapshots)} snapshots, every chunk",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "demo-output")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps")
    parser.add_argument(
        "--forget", default="", help="do not restore this part of the state (rng, data, schedule): must fail"
    )
    arguments = parser.parse_args()
    for name in ("reference", "interrupted", "repository"):  # what an earlier demo left
        shutil.rmtree(arguments.output / name, ignore_errors=True)
    (arguments.output / "snapshot.safetensors").unlink(missing_ok=True)
    try:
        show(demonstrate(arguments.output.resolve(), arguments.quick, arguments.forget))
    except NotAsClaimedError as error:
        errors.print(f"NOT AS CLAIMED: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
