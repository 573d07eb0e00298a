"""Cuts the power of a file system on a loop device while another process saves to it, and looks at what is left.

    python -m tests.crash.power_cut cut --file-system ext4 --directory /tmp/x --cuts 10 --seed 1

Run by test_power_cut.py as root, in mount and process namespaces of its own: when those end, however they end, the
mount and its loop device are gone. Prints one JSON object. ``FS_IOC_SHUTDOWN`` makes a file system forget at once what
it has not written, as a power cut would.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import random
import select
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastckpt.errors import FastckptError
from fastckpt.format.dtype import item_bytes
from fastckpt.group import SoloGroup
from fastckpt.plan.save_plan import KNOWN
from fastckpt.storage.local import LocalStore
from tests.crash.numpy_job import (
    OPTIONS,
    RankSaves,
    State,
    Tensor,
    leftovers,
    repository_violations,
    save_alone,
    stored_values,
    whole,
)

FS_IOC_SHUTDOWN = 0x8004587D
LOG_FLUSHED, LOG_LOST = 1, 2
IMAGE_BYTES = {"ext4": 128 << 20, "xfs": 320 << 20}
SPEC = {
    "big": Tensor("float32", (256, 256), KNOWN),
    "small": Tensor("float32", (8,), KNOWN),
    "count": Tensor("int64", (), KNOWN),
}
SECONDS_MAX = 30.0
"""For anything that the saving process is waited for."""


# --- the process that saves -----------------------------------------------------------------------------------------


def save_until_the_lights_go_out(directory: str, first_step: int, through: str, sync: str) -> None:
    """Reports each step on stdout once its save has returned. Ends with the first error."""
    spare_syncs(sync)
    save = {"saves": through_saves, "checkpointer": through_checkpointer}[through](directory)
    report("ready")
    try:
        for step in itertools.count(first_step):
            save(step)
            report(str(step))
    except FastckptError as error:
        report(f"failed {type(error).__name__}: {error}")


def report(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def spare_syncs(sync: str) -> None:
    """The planted mistakes: no fsync at all, or of directories only."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if sync == "names" and stat.S_ISDIR(os.fstat(descriptor).st_mode):
            real(descriptor)

    if sync != "all":
        os.fsync = fsync  # type: ignore[assignment]


def through_saves(directory: str) -> Callable[[int], object]:
    saves = RankSaves(LocalStore(directory), SoloGroup())
    return lambda step: saves.save(step, State(step, 0, 1, SPEC))


def through_checkpointer(directory: str) -> Callable[[int], object]:
    import torch

    from fastckpt import Checkpointer

    checkpointer = Checkpointer(directory, options=OPTIONS)

    def save(step: int) -> None:
        tensors = {key: torch.from_numpy(whole(key, tensor, step).copy()) for key, tensor in SPEC.items()}
        checkpointer.save(step, {**tensors, **stored_values(step, 0)}).wait()

    return save


# --- the process that cuts ------------------------------------------------------------------------------------------


class Mount:
    """A new file system on a loop device."""

    def __init__(self, file_system: str, directory: Path) -> None:
        self.path = directory / "mount"
        self._image = directory / "image"
        self.path.mkdir()
        with self._image.open("wb") as image:
            image.truncate(IMAGE_BYTES[file_system])
        quiet = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}[file_system]
        run([*quiet, str(self._image)])
        self.mount()

    def mount(self) -> None:
        run(["mount", "-o", "loop", str(self._image), str(self.path)])

    def unmount(self) -> None:
        for _ in range(200):  # the process that died may still be letting go
            if subprocess.run(["umount", str(self.path)], capture_output=True).returncode == 0:
                return
            time.sleep(0.02)
        run(["umount", str(self.path)])

    def cut_power(self, flag: int) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(descriptor)


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


class VictimFailed(Exception):
    """The process that saves came to an end before the power was cut."""


class Victim:
    """The process that saves, as seen from here."""

    def __init__(self, directory: Path, first_step: int, through: str, sync: str) -> None:
        own = [sys.executable, "-m", "tests.crash.power_cut", "save", "--directory", str(directory)]
        options = ["--first-step", str(first_step), "--through", through, "--sync", sync]
        self._first_step = first_step
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen([*own, *options], stdout=subprocess.PIPE, stderr=self._errors, bufsize=0)
        self._text = b""
        self.reported: list[int] = []

    def wait_until_ready(self) -> None:
        if self._line() != "ready":
            raise VictimFailed(f"the saving process did not start: {self._said()}")

    def wait_for_reports(self, count: int) -> None:
        while len(self.reported) < count:
            if not self._take():
                raise VictimFailed(f"the saving process ended by itself: {self._said()}")

    def end(self) -> list[str]:
        """Waits for its end; what it reported meanwhile counts too. A save that the cut makes fail has to end with one
        of our errors."""
        while self._take():
            pass
        try:
            code = self._process.wait(SECONDS_MAX)
        except subprocess.TimeoutExpired:
            return [f"the saving process had not ended {SECONDS_MAX:g} s after the cut"]
        return [f"the saving process ended like this: {self._said()}"] if code else []

    def _take(self) -> bool:
        """Takes one line of what it says in; False at the end, and after a failure."""
        line = self._line()
        if line.isdigit():
            self.reported.append(int(line))
        return line.isdigit()

    def _line(self) -> str:
        assert self._process.stdout is not None
        until = time.monotonic() + SECONDS_MAX
        while b"\n" not in self._text:
            if not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                return ""
            if not (more := os.read(self._process.stdout.fileno(), 65536)):
                return ""
            self._text += more
        line, _, self._text = self._text.partition(b"\n")
        return line.decode()

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-2000:]

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def tried(self) -> set[int]:
        return set(range(self._first_step, max(self.reported, default=self._first_step - 1) + 2))


def cut_many(file_system: str, directory: Path, cuts: int, seed: int, sync: str) -> dict[str, Any]:
    generator = random.Random(seed)
    mount = Mount(file_system, directory)
    seen: dict[str, Any] = {"violations": [], "moments": [], "reported": 0, "bytes": state_bytes()}
    reported: set[int] = set()
    tried: set[int] = set()
    try:
        for number in range(cuts):
            if sync != "all":
                reported, tried = set(), set()
            # Mistakes lose all kinds of things, so each gets a repository of its own to lose.
            repository = mount.path / ("repository" if sync == "all" else f"repository-{number}")
            through = "checkpointer" if sync == "all" and number % 5 == 4 else "saves"
            victim = Victim(repository, 1000 * number + 1, through, sync)
            try:
                moment = cut_at_a_moment(mount, victim, number, generator)
                wrong = victim.end()
            except VictimFailed as error:
                seen["violations"].append(f"before cut {number}: {error}")
                return seen
            finally:
                victim.kill()
            reported |= set(victim.reported)
            tried |= victim.tried
            seen["reported"] += len(victim.reported)
            seen["moments"].append(f"{through}: {moment}, {len(victim.reported)} reported")
            mount.unmount()
            mount.mount()
            wrong += what_is_wrong(repository, reported, tried, next_step=1000 * number + 999, go_on=sync == "all")
            seen["violations"] += [f"cut {number} ({moment}): {text}" for text in wrong]
    finally:
        mount.unmount()
    return seen


def cut_at_a_moment(mount: Mount, victim: Victim, number: int, generator: random.Random) -> str:
    """Cuts the power; says when."""
    flag = generator.choice([LOG_LOST, LOG_LOST, LOG_FLUSHED])
    kind = ("any moment", "a report", "a stranger's fsync")[number % 3]
    victim.wait_until_ready()
    count = 0 if kind == "any moment" else generator.randint(1, 4)
    victim.wait_for_reports(count)
    if kind != "a report":
        time.sleep(generator.uniform(0, 0.1))  # any moment will do
    if kind == "a stranger's fsync":
        with (mount.path / f"stranger-{number}").open("wb") as file:
            file.write(b"x" * 10_000)
            file.flush()
            os.fsync(file.fileno())
    mount.cut_power(flag)
    return f"after {kind}, {count} reports awaited, flag {flag}"


def what_is_wrong(directory: Path, reported: set[int], tried: set[int], *, next_step: int, go_on: bool) -> list[str]:
    store = LocalStore(directory)
    wrong, _ = repository_violations(store, reported, tried, 1, SPEC)
    if not go_on:
        return wrong
    try:
        save_alone(store, next_step, SPEC)
    except FastckptError as error:
        return [*wrong, f"the next save failed: {type(error).__name__}: {error}"]
    reported.add(next_step)
    tried.add(next_step)
    after, _ = repository_violations(store, reported, tried, 1, SPEC)
    return [*wrong, *after, *(f"left behind: {name}" for name in ([] if after else leftovers(store)))]


def state_bytes() -> int:
    return sum(whole(key, tensor, 0).size * item_bytes(tensor.dtype) for key, tensor in SPEC.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["save", "cut"])
    parser.add_argument("--directory", required=True)
    parser.add_argument("--sync", choices=["all", "names", "none"], default="all")
    parser.add_argument("--first-step", type=int, default=1)
    parser.add_argument("--through", choices=["saves", "checkpointer"], default="saves")
    parser.add_argument("--file-system", choices=sorted(IMAGE_BYTES), default="ext4")
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.what == "save":
        with contextlib.suppress(BrokenPipeError):
            save_until_the_lights_go_out(given.directory, given.first_step, given.through, given.sync)
    else:
        print(json.dumps(cut_many(given.file_system, Path(given.directory), given.cuts, given.seed, given.sync)))


if __name__ == "__main__":
    main()
