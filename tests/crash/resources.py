"""A job whose machine runs out of something, again and again, at every level; and what it makes of it.

    python -m tests.crash.resources full-ext4 --directory /tmp/x

Run by test_resources.py, in mount and process namespaces of its own. Prints one JSON object. Four ranks in one process
go on saving all the time: a save that is short of something, then one that is not, and so on.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import itertools
import json
import mmap
import os
import re
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastckpt.errors import RankFailed, StorageError
from fastckpt.format import names
from fastckpt.format.decision import Live
from fastckpt.options import Options
from fastckpt.plan.save_plan import KNOWN
from fastckpt.repository import repository
from fastckpt.storage import transfers
from fastckpt.storage.local import LocalStore
from fastckpt.storage.store import Store
from fastckpt.testing.faulty_store import FaultyStore
from tests.crash.numpy_job import OPTIONS, Job, Tensor, leftovers, repository_violations, snapshot_violations, tiny_spec
from tests.crash.power_cut import Mount

SIZE = 4
SPEC = {"big": Tensor("float32", (256, 384), KNOWN, split=0), **tiny_spec(SIZE)}
LEVELS = 100
M_ARENA_MAX = -8
BLOCK = 4096
BOUNDARY_BLOCKS = range(-4, 20)
"""How many blocks less than a save needs there is room for, one by one: its small files are written at the end."""
LEVELS_A_JOB = 8
GROWTH_BLOCKS = 5
"""What a failed save may keep beside its ABORT: the rest of that one's last block, and what directories grew."""

NAMED = re.compile(r"cannot [a-z ]+ '((?:packs|attempts|layouts|decisions)\b|FORMAT)([^']*)' in file:///")


@dataclass
class Seen:
    violations: list[str] = field(default_factory=list)
    failed: int = 0
    fitted: int = 0
    """Saves that were meant to be short of something, and how they ended."""
    objects: Counter[str] = field(default_factory=Counter)
    """Which objects there was no room for."""
    example: str = ""


@dataclass
class Shortage:
    """What is taken from the job before every second save, and given back after it."""

    path: Path
    """The job's file system."""
    reasons: Sequence[int]
    """The system's error numbers that tell of it."""
    take: Callable[[Any], object]
    """Is given the level."""
    give: Callable[[], object]
    wrap: Callable[[Store], Store] = lambda store: store
    spec: dict[str, Tensor] = field(default_factory=lambda: SPEC)
    options: Options = OPTIONS
    must_name: bool = True
    """Whether what is short is always missed by the store, so that the error names an object."""
    broken: bool = False
    """Whether the file system itself breaks: nothing can be removed then, and empty directories may stay for good."""
    hinders_removal: bool = False
    """Whether nothing may be removed for want of it: the next save does that, and empty directories go with a sweep."""
    _short_steps: set[int] = field(init=False, default_factory=set)

    def go_through(self, levels: Sequence[object]) -> Seen:
        """One repository; every job goes through some of the levels."""
        seen = Seen()
        store = LocalStore(self.path / "repository")
        steps = 0
        for first in range(0, len(levels), LEVELS_A_JOB):
            now = levels[first : first + LEVELS_A_JOB]
            self._job(store, steps, now, seen)
            steps += 2 * len(now) + 1
        reported = set(range(1, steps + 1)) - self._short_steps
        wrong, _ = repository_violations(store, reported, set(range(1, steps + 1)), SIZE, self.spec)
        seen.violations += wrong
        return seen

    def go_through_anew(self, levels: Sequence[object]) -> Seen:
        """A repository and a job for each level: the very first save is short of it."""
        seen = Seen()
        for number, level in enumerate(levels):
            self._job(LocalStore(self.path / f"repository-{number}"), 0, [level], seen, start_short=True)
        return seen

    def _job(self, store: Store, before: int, levels: Sequence[object], seen: Seen, start_short: bool = False) -> None:
        # Undisturbed, short, undisturbed, short, ..., undisturbed.
        short = {before + 2 * number + 2 - start_short: level for number, level in enumerate(levels)}
        steps = range(before + 1, before + 2 * len(levels) + 2 - start_short)
        self._short_steps |= set(short)
        job = Job([self.wrap(store)] * SIZE, spec=self.spec, options=self.options)
        state = State.now(self.path, store)

        def done(step: int) -> None:
            nonlocal state
            outcomes = [job.outcomes[rank][step] for rank in range(SIZE)]
            if step in short:
                self.give()
                found = self._after_short(store, outcomes, state, seen)
                if all(isinstance(outcome, Live) for outcome in outcomes):
                    self._short_steps.discard(step)  # it was reported after all, and has to restore
            else:
                found = after_undisturbed(store, step, outcomes, self.spec) or self._left_behind(store)
            if descriptors() != state.descriptors:
                found.append(f"{descriptors() - state.descriptors} descriptors are left open")
            level = short.get(step, short.get(step - 1))
            seen.violations += [f"level {level}, step {step}: {text}" for text in found]
            if step + 1 in short:
                state = State.now(self.path, store)
                self.take(short[step + 1])

        if start_short:
            self.take(levels[0])
        job.run(steps, on_each_step_done=done)

    def _after_short(self, store: Store, outcomes: Sequence[object], state: State, seen: Seen) -> list[str]:
        if all(isinstance(outcome, Live) for outcome in outcomes):
            seen.fitted += 1
            return []
        seen.failed += 1
        found = []
        texts = {str(outcome) for outcome in outcomes}
        if len(texts) > 1:
            found.append(f"ranks were told different things: {texts}")
        for outcome in outcomes:
            if not isinstance(outcome, RankFailed | StorageError):
                found.append(f"{type(outcome).__name__} was raised: {outcome}")
        text = texts.pop()
        seen.example = max(seen.example, text, key=len) if len(text) < 500 else seen.example
        objects = NAMED.findall(text)
        seen.objects.update({kind(*match) for match in objects})
        if not any(os.strerror(code) in text for code in self.reasons):
            found.append(f"the error does not give the reason: {text}")
        if self.must_name and not objects:
            found.append(f"the error names no object: {text}")
        # A COMMIT that was tried is in doubt until there can be an ABORT: the next save removes what it left.
        in_doubt = self.broken or self.hinders_removal or any(match[0] == "decisions" for match in objects)
        if repository.exists(store) and not in_doubt:
            found += self._left_behind(store)
            after = State.now(self.path, store)
            kept = state.free_bytes - after.free_bytes - (after.decision_bytes - state.decision_bytes)
            if kept > GROWTH_BLOCKS * BLOCK:
                found.append(f"{kept} bytes did not come back")
        return found

    def _left_behind(self, store: Store) -> list[str]:
        """Objects and files that no snapshot has, and directories that hold nothing."""
        found = leftovers(store)
        for directory, directories, files in os.walk(self.path):
            found += [f"{directory}/{name}" for name in files if name.startswith(".")]
            depth = len(Path(directory).relative_to(self.path).parts)
            if depth > 2 and not (directories or files or self.broken or self.hinders_removal):
                found.append(f"{directory}/")
        return [f"left behind: {name}" for name in found]


@dataclass
class State:
    """What a failed save must leave as it was."""

    free_bytes: int
    decision_bytes: int
    descriptors: int

    @classmethod
    def now(cls, path: Path, store: Store) -> State:
        return cls(free_bytes(path), sum(info.size for info in store.list("decisions")), descriptors())


def after_undisturbed(store: Store, step: int, outcomes: Sequence[object], spec: dict[str, Tensor]) -> list[str]:
    wrong = [f"rank {rank} could not save: {o!r}" for rank, o in enumerate(outcomes) if not isinstance(o, Live)]
    if wrong:
        return wrong
    return snapshot_violations(repository.Repository(store).snapshot(), step, SIZE, spec)


def kind(folder: str, rest: str) -> str:
    return "index" if rest.endswith("/index") else "part" if "/part-" in rest else folder


def descriptors() -> int:
    """Open ones, but for the pools of staging buffers: those stay from the first save to the last."""
    with os.scandir("/proc/self/fd") as found:
        return sum("fastckpt-staging" not in os.readlink(entry.path) for entry in found)


def free_bytes(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


# --- disks that are full ----------------------------------------------------------------------------------------------


class Filler:
    """A file that takes all room but some."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path / "filler"

    def leave(self, room: int) -> None:
        with self._file.open("ab") as file:
            part = free_bytes(self._path)
            while part >= BLOCK and (more := free_bytes(self._path) - room) >= BLOCK:
                part = min(part, more)
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, part // BLOCK * BLOCK)
                except OSError:  # the file's own administration takes room too
                    part //= 2

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)


def small_file_system(kind: str, directory: Path) -> Path:
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m,nr_inodes=100k", "none", str(directory)], check=True)
        return directory
    path = Mount(kind, directory).path
    device = subprocess.run(["findmnt", "-no", "SOURCE", str(path)], check=True, capture_output=True, text=True).stdout
    subprocess.run(["tune2fs", "-m", "0", device.strip()], check=True, capture_output=True)  # root may use it all
    return path


def full_disk(file_system: str, directory: Path) -> Seen:
    path = small_file_system(file_system, directory)
    needed, first_needed = room_needed(path)
    filler = Filler(path)
    shortage = Shortage(path, [errno.ENOSPC], filler.leave, filler.remove)
    hundredths = [level * needed // LEVELS for level in range(LEVELS)]
    boundary = [needed - blocks * BLOCK for blocks in BOUNDARY_BLOCKS]
    return together(
        shortage.go_through([*hundredths, *boundary]),
        shortage.go_through_anew([level * first_needed // 25 for level in range(25)]),
    )


def room_needed(path: Path) -> tuple[int, int]:
    """By a save, and by the first one."""
    free: list[int] = [free_bytes(path)]
    store = LocalStore(path / "measured")
    Job([store] * SIZE, spec=SPEC).run([1, 2, 3], on_each_step_done=lambda step: free.append(free_bytes(path)))
    return free[2] - free[3], free[0] - free[1]


def no_more_files(directory: Path) -> Seen:
    path = small_file_system("tmpfs", directory)

    def leave(files: int) -> None:
        used = os.statvfs(path).f_files - os.statvfs(path).f_ffree
        subprocess.run(["mount", "-o", f"remount,nr_inodes={used + files}", str(path)], check=True)

    def give() -> None:
        subprocess.run(["mount", "-o", "remount,nr_inodes=100k", str(path)], check=True)

    shortage = Shortage(path, [errno.ENOSPC], leave, give)
    return together(shortage.go_through(range(24)), shortage.go_through_anew(range(30)))


def read_only(directory: Path) -> Seen:
    """Between saves by the operator; and at any operation of a save by the file system itself, after an error."""
    mount = Mount("ext4", directory)
    operations = Countdown(mount.path)

    def take(operation: int) -> None:
        if operation == 0:
            subprocess.run(["mount", "-o", "remount,ro", str(mount.path)], check=True)
        else:
            operations.left = operation

    def give() -> None:
        operations.left = 0
        mount.unmount()
        mount.mount()

    reasons = [errno.EROFS, errno.EIO]
    shortage = Shortage(mount.path, reasons, take, give, broken=True, spec=tiny_spec(SIZE))
    shortage.wrap = lambda store: FaultyStore(store, only=operations)
    return shortage.go_through([0, *range(1, 80, 2)])


class Countdown:
    """Breaks the file system at an operation of the job's stores."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.left = 0

    def __call__(self, operation: str, name: str) -> bool:
        self.left -= 1
        if self.left == 0:
            subprocess.run(["mount", "-o", "remount,abort", str(self._path)], capture_output=True)
        return False


# --- limits of the process --------------------------------------------------------------------------------------------


class Limit:
    """One of the process."""

    def __init__(self, kind: int) -> None:
        self._kind = kind
        self._soft, self._hard = resource.getrlimit(kind)

    def set(self, to: int) -> None:
        resource.setrlimit(self._kind, (to, self._hard))

    def lift(self) -> None:
        self.set(self._soft)


def file_size(directory: Path) -> Seen:
    """Whoever writes beyond the limit is sent SIGXFSZ, too."""
    directory = small_file_system("tmpfs", directory)
    levels = [*range(0, 500, 50), *range(500, 2000, 250), *range(4096, 140_000, 8192)]
    limit = Limit(resource.RLIMIT_FSIZE)
    running = Shortage(directory, [errno.EFBIG], limit.set, limit.lift)
    anew = Shortage(directory, [errno.EFBIG], limit.set, limit.lift, must_name=False)  # the pool is a file, too
    return together(running.go_through(levels), anew.go_through_anew(levels))


def open_files(directory: Path) -> Seen:
    directory = small_file_system("tmpfs", directory)
    limit = Limit(resource.RLIMIT_NOFILE)

    def leave(count: int) -> None:
        used = set(map(int, os.listdir("/proc/self/fd")))
        unused = (number for number in itertools.count() if number not in used)
        limit.set(next(itertools.islice(unused, count, None)))

    running = Shortage(directory, [errno.EMFILE], leave, limit.lift, hinders_removal=True)
    anew = Shortage(directory, [errno.EMFILE], leave, limit.lift, must_name=False, hinders_removal=True)
    levels = [*range(40), *range(10)]  # the few that are too few, twice
    return together(running.go_through(levels), anew.go_through_anew(levels))


def memory(directory: Path) -> Seen:
    """No room for the staging buffers of a job's first save. It is taken once the job has opened the repository: by
    then it holds its own state."""
    directory = small_file_system("tmpfs", directory)
    limit = Limit(resource.RLIMIT_AS)
    threading.stack_size(1 << 20)  # what is short is to be the buffers, not the stacks
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    room = 0

    def take(level: int) -> None:
        nonlocal room
        room = level

    def take_now(operation: str, name: str) -> bool:
        if room and operation == "create" and name == names.decision(1):
            used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
            limit.set(used + room)
        return False

    chunk_bytes = 16 << 20
    shortage = Shortage(directory, [errno.ENOMEM], take, limit.lift, must_name=False)
    shortage.wrap = lambda store: FaultyStore(store, only=take_now)
    shortage.spec = {"big": Tensor("uint8", (SIZE * chunk_bytes,), KNOWN, split=0)}
    shortage.options = Options(chunk_bytes=chunk_bytes, commit_seconds_max=30.0)
    return shortage.go_through_anew([chunk_bytes])  # which with its alignment is more, for every rank


def together(*several: Seen) -> Seen:
    return Seen(
        [text for seen in several for text in seen.violations],
        sum(seen.failed for seen in several),
        sum(seen.fitted for seen in several),
        sum((seen.objects for seen in several), Counter()),
        max((seen.example for seen in several), key=len),
    )


CASES: dict[str, Callable[[Path], Seen]] = {
    "full-tmpfs": lambda directory: full_disk("tmpfs", directory),
    "full-ext4": lambda directory: full_disk("ext4", directory),
    "no-more-files": no_more_files,
    "read-only": read_only,
    "file-size": file_size,
    "open-files": open_files,
    "memory": memory,
}


def main(arguments: Iterable[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--directory", required=True, type=Path)
    given = parser.parse_args(list(arguments))
    # So that the packs are written by direct I/O, in several calls each.
    transfers.BUFFER_BYTES, transfers.DIRECT_BYTES_MIN = 2 * BLOCK, BLOCK
    print(json.dumps(vars(CASES[given.case](given.directory))))


if __name__ == "__main__":
    main(sys.argv[1:])
