"""Kills a job before a chosen system call, or makes that call fail, and looks at what is left.

    python -m tests.crash.syscalls kill --scenario "first save" --directory /dev/shm/x
    python -m tests.crash.syscalls kill-twice --scenario "first save" --directory /dev/shm/x --seed 1 --count 100
    python -m tests.crash.syscalls fail --scenario "first save" --directory /dev/shm/x --seed 1 --count 300

Run by test_syscalls.py. Prints one JSON object. One process imports everything and forks the jobs, since an interpreter
takes far longer to start than a job to run. Each job is a real process with a ``LocalStore`` on a real directory, where
all calls to stores are made by one thread: so "the 7th fsync" is the same in every run, and strace, which counts by
thread, is attached to that one. Errors and signals are strace's, in place of or before the call. A short read or write
cannot be faked from outside (bytes that were reported written would not be there), so the job itself asks for less.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from fastckpt import save
from fastckpt.buffers import Pool
from fastckpt.repository import pull, repository
from fastckpt.storage import transfers
from fastckpt.storage.local import LocalStore
from tests.crash import numpy_job
from tests.crash.numpy_job import saved_as
from tests.crash.scenarios import SCENARIOS, Run, Scenario, prepared, violations

JOBS = 2
"""How many jobs run at the same time, each in a directory of its own."""
SECONDS_MAX = 20.0
"""For a job that takes a hundredth of a second: one that has not ended by then hangs."""
MESSAGE_BYTES_MAX = 1 << 20

WRITING = {
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "fsync", "fdatasync", "sync_file_range", "ftruncate",
    "truncate", "fallocate", "copy_file_range", "sendfile", "link", "linkat", "symlink", "symlinkat", "rename",
    "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "chmod", "fchmod", "fchmodat",
    "memfd_create",
}  # fmt: skip
"""And opening with O_CREAT, and closing what was opened for writing."""
READING = {
    "open", "openat", "openat2", "close", "read", "pread64", "readv", "preadv", "preadv2", "stat", "lstat", "fstat",
    "newfstatat", "statx", "statfs", "fstatfs", "getdents64", "readlink", "readlinkat", "access", "faccessat",
    "faccessat2", "fcntl", "dup", "dup2", "dup3", "lseek", "flock",
}  # fmt: skip

ERRORS = ["EIO", "ENOSPC", "EDQUOT", "EINTR", "EAGAIN", "EMFILE", "EROFS", "ESTALE", "ENOMEM"]
_ALWAYS = frozenset({"EIO", "ESTALE", "EINTR", "ENOMEM"})
_NO_SPACE = frozenset({"ENOSPC", "EDQUOT"})
LIKELY = {
    **dict.fromkeys(WRITING | READING, _ALWAYS),
    **dict.fromkeys(["link", "linkat", "unlink", "unlinkat", "mkdir", "mkdirat"], _ALWAYS | _NO_SPACE | {"EROFS"}),
    **dict.fromkeys(["open", "openat"], _ALWAYS | _NO_SPACE | {"EROFS", "EMFILE"}),
    **dict.fromkeys(["memfd_create", "fcntl"], _ALWAYS | {"EMFILE"}),
    **dict.fromkeys(["read", "preadv", "preadv2"], _ALWAYS | {"EAGAIN"}),
    **dict.fromkeys(["write", "pwritev", "pwritev2"], _ALWAYS | _NO_SPACE | {"EAGAIN"}),
    "fallocate": _ALWAYS | _NO_SPACE,
    "fsync": _ALWAYS | _NO_SPACE | {"EROFS"},
    "close": _ALWAYS | _NO_SPACE,
}
"""The errors that a call gives on some file system. The others are tried too, but each once a call and scenario."""
SHORT = {
    "write": "write",
    "pwritev": "pwritev",
    "pwritev2": "pwritev",
    "read": "read",
    "preadv": "preadv",
    "preadv2": "preadv",
}
"""System calls that may do less than they are asked to, and who makes them in ``os``."""
EINTR_RUN = 20
"""How often in a row a call is interrupted. For ever, the interpreter itself would try again for ever."""

NEXT_NUMBERS = (7, 8)
"""What the jobs save that come after one that was disturbed, each one."""

_Result = TypeVar("_Result")


class Point(NamedTuple):
    """Where and how a run is disturbed."""

    call: str
    number: int
    """From 1, among the calls of that name."""
    fault: str
    """``KILL``, ``short`` or the name of an error."""
    persistent: bool = False
    """Not only this call, but also all later ones of that name."""

    def __str__(self) -> str:
        return f"{self.fault} at {self.call} {self.number}{' and all later' if self.persistent else ''}"

    @property
    def injection(self) -> str:
        """As strace wants it."""
        what = "signal=KILL" if self.fault == "KILL" else f"error={self.fault}"
        last = f"..{self.number + EINTR_RUN - 1}" if self.fault == "EINTR" else "+"
        return f"inject={self.call}:{what}:when={self.number}{last if self.persistent else ''}"


class Ended(NamedTuple):
    """How a job ended, as seen from outside."""

    status: int
    """As of ``waitpid``."""
    told: list[int]
    """What it reported committed, in that order."""
    wrong: list[str]
    failures: list[str]
    log: str
    """The strace log, empty if it was not traced."""

    @property
    def summary(self) -> tuple[list[int], list[str]]:
        """What was reported, and the kinds of the errors."""
        return self.told, [failure.partition(":")[0] for failure in self.failures]

    @property
    def killed(self) -> bool:
        return os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL

    def reached(self, point: Point) -> bool:
        """Whether it came to the point at which it was to be disturbed."""
        if point.fault == "KILL":
            return self.killed
        return point.fault == "short" or "(INJECTED)" in self.log


# --- the job --------------------------------------------------------------------------------------------------------


class StorageThread:
    """Makes calls for others, one after another."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1)

    def run(self, function: Callable[..., _Result], *arguments: Any, **named: Any) -> _Result:
        return self._executor.submit(function, *arguments, **named).result()


class Elsewhere:
    """An object whose methods are run by another thread; also those of the writers that they return."""

    def __init__(self, target: Any, thread: StorageThread) -> None:
        self._target = target
        self._thread = thread

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._target, name)
        if not callable(attribute):
            return attribute

        def method(*arguments: Any, **named: Any) -> Any:
            result = self._thread.run(attribute, *arguments, **named)
            return Elsewhere(result, self._thread) if hasattr(result, "finish") else result

        return method


def go_on(number: int, run: Run) -> None:
    """A job that comes after one that was disturbed, and goes on from what is there."""
    run.restore()
    run.save(run.job(), number)


def run_job(acts: Callable[[Run], None], root: Path, channel: socket.socket, point: Point | None) -> None:
    """Says which thread to trace, waits for the word, and runs. What it is told, it tells at once."""
    storage = StorageThread()
    numpy_job.Pool = lambda *sizes: storage.run(Pool, *sizes)  # type: ignore[assignment, misc]
    # Reports are in the trace between the other calls. They are no calls to files, and never disturbed.
    run = Run(lambda: Elsewhere(LocalStore(root), storage), lambda number: storage.run(say, channel, told=number))
    say(channel, thread=storage.run(threading.get_native_id))
    channel.recv(1)
    if point is not None and point.fault == "short":
        fall_short(point)
    try:
        acts(run)
    except BaseException as error:
        run.wrong.append(f"the job ended with {type(error).__name__}: {error}")
    say(channel, wrong=run.wrong, failures=[f"{type(error).__name__}: {error}" for error in run.failures])


def say(channel: socket.socket, **what: object) -> None:
    channel.send(json.dumps(what).encode())


def fall_short(point: Point) -> None:
    """From now on, calls of this kind do about half of what they are asked to: one of them, or all."""
    name = SHORT[point.call]
    real = getattr(os, name)
    numbers = itertools.count(1)

    def short(file: int, what: Any, *rest: Any) -> Any:
        number = next(numbers)
        if number == point.number or (point.persistent and number > point.number):
            if name == "read":
                what = what // 2 or 1
            elif name == "write":
                what = what[: len(what) // 2 or 1]
            else:
                what = [what[0][: len(what[0]) // 2 or 1]]
        return real(file, what, *rest)

    setattr(os, name, short)


# --- what a trace tells ---------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """One line of the strace log."""

    name: str
    arguments: str
    result: str

    @property
    def failed(self) -> bool:
        return self.result.startswith("-1")

    @property
    def creates(self) -> bool:
        return self.name in ("open", "openat") and "O_CREAT" in self.arguments

    @property
    def path(self) -> str:
        """What it is about: the first name in it, or else what its descriptor was opened as."""
        return self.names[0] if self.names else re.sub(r"^\d+<([^>]*)>.*", r"\1", self.arguments)

    @property
    def names(self) -> list[str]:
        """The names in it, each made whole. (Strings that are no names are empty in the log.)"""
        found = re.findall(r'(?:(?:\d+|AT_FDCWD)<([^>]*)>, )?"([^"]+)"', self.arguments)
        return [os.path.join(directory, name) for directory, name in found]


def parsed(log: str) -> Iterator[Call]:
    """The calls that were made; not the one that the process died before."""
    for line in log.splitlines():
        if found := re.match(r"(\w+)\((.*)\) += (-?\d.*)$", line):
            yield Call(*found.groups())


def numbered(calls: Iterable[Call]) -> Iterator[tuple[int, Call]]:
    """Each call with its number among those of its name."""
    counts: Counter[str] = Counter()
    for call in calls:
        counts[call.name] += 1
        yield counts[call.name], call


def writing(calls: Iterable[Call]) -> Iterator[tuple[int, Call]]:
    """The calls that change something, with their numbers."""
    open_for_writing: set[str] = set()
    for number, call in numbered(calls):
        descriptor = call.arguments.partition("<")[0]
        if call.name == "close" and descriptor in open_for_writing:
            open_for_writing.discard(descriptor)
            yield number, call
        elif call.name == "memfd_create" or call.creates:
            open_for_writing.add(call.result.partition("<")[0])
            yield number, call
        elif call.name in WRITING:
            yield number, call


class Synced:
    """Follows a trace, and says what a report of a commit must not rest on: a file that was changed after its fsync,
    whose fsync or close failed, or whose name or folder's name has not been synced since it appeared.

    Without this an error of fsync that is ignored, or tried again until the system no longer remembers it, would pass:
    nothing is lost until the power is cut.
    """

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._writable: set[str] = set()
        """Descriptors."""
        self._files: dict[str, str] = {}
        """For each file made in this run, why it must not be relied upon; empty if it may."""
        self._failed: dict[str, str] = {}
        """The same, for good: whatever comes later, and also for a new file of that name."""
        self._new_names: set[str] = set()
        self.wrong: list[str] = []

    def follow(self, call: Call) -> None:
        path = call.path
        descriptor = call.arguments.partition("<")[0]
        if call.name in ("fsync", "close") and call.failed:
            # An interrupted fsync has not failed; the interpreter itself tries it again.
            if descriptor in self._writable and path in self._files and "EINTR" not in call.result:
                self._failed[path] = f"had a failed {call.name}"
        elif call.failed:
            return
        elif call.creates:
            self._complain_of(path, "is made again")
            self._writable.add(call.result.partition("<")[0])
            self._files[path] = "was never synced"
            self._new_names.add(path)
        elif call.name in ("mkdir", "mkdirat"):
            self._new_names.add(path)
        elif call.name in ("write", "pwritev", "pwritev2", "ftruncate", "fallocate"):
            self._files[path] = "was written to after its last fsync"
        elif call.name == "fsync":
            self._complain_of(path, "is synced again")
            self._files[path] = ""
            self._new_names = {name for name in self._new_names if os.path.dirname(name) != path}
        elif call.name == "close":
            self._writable.discard(descriptor)
        elif call.name in ("link", "linkat", "rename", "renameat2"):
            old, new = call.names
            self._complain_of(old, f"becomes {new}")
            self._files[new] = self._files[old]
            self._new_names.add(new)
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            self._files.pop(path, None)
            self._new_names.discard(path)

    def relied_upon(self, attempt: str) -> list[str]:
        """What is wrong if ``attempt`` is reported committed now."""
        objects = re.compile(rf"{self._root}/(FORMAT|(decisions|layouts|(packs|attempts)/{attempt}).*/[^.][^/]*)")
        relied = [path for path in self._files if objects.fullmatch(path)]
        whys = {path: self._failed.get(path) or self._files[path] for path in relied}
        names = [name for name in self._new_names if any(f"{path}/".startswith(f"{name}/") for path in relied)]
        return [
            *(f"{path} {why}" for path, why in whys.items() if why),
            *(f"the name {name} is not synced" for name in sorted(names)),
        ]

    def _complain_of(self, path: str, what: str) -> None:
        if path in self._failed:
            self.wrong.append(f"{path}, which {self._failed[path]}, {what}")


# --- where to disturb -----------------------------------------------------------------------------------------------


def kill_points(calls: Iterable[Call]) -> list[Point]:
    """Before every call that changes something."""
    return [Point(call.name, number, "KILL") for number, call in writing(calls)]


def kills_in_a_row(first: list[Point], second: list[Point], seed: int, count: int | None) -> list[list[Point]]:
    """A job is killed, and then also the one that comes after it: ``count`` such pairs, evenly chosen, or all."""
    pairs = [[one, other] for one, other in itertools.product(first, second)]
    return random.Random(seed).sample(pairs, len(pairs) if count is None else count)


def fault_points(calls: Iterable[Call], seed: int, count: int | None) -> list[Point]:
    """Every call, with every error, once or persistently: ``count`` of these, evenly chosen, of every kind at least one
    and of the likely ones more; or all."""
    kinds: dict[tuple[str, str, bool], list[Point]] = {}
    for number, call in numbered(calls):
        faults = [*ERRORS, "short"] if call.name in SHORT else ERRORS
        for fault, persistent in itertools.product(faults, (False, True)):
            kinds.setdefault((call.name, fault, persistent), []).append(Point(call.name, number, fault, persistent))
    assert count is None or count >= len(kinds), f"{len(kinds)} kinds of failure, of which {count} would be tried"
    generator = random.Random(seed)
    chosen = []
    for (name, fault, _), points in kinds.items():
        generator.shuffle(points)
        likely = count is None or fault == "short" or fault in LIKELY[name]
        chosen.append(points if likely else points[:1])
    rounds = itertools.zip_longest(*chosen)
    return [point for points in rounds for point in points if point is not None][:count]


# --- the process that disturbs --------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What came of one run."""

    reached: bool
    """Whether it came to every point at which it was to be disturbed."""
    wrong: list[str]


class Disturber:
    """Runs one scenario again and again, each time disturbed at another point."""

    def __init__(self, scenario: Scenario, directory: Path) -> None:
        self._scenario = scenario
        self._directory = directory
        self._before = directory / "before"
        self._reported = prepared(scenario, lambda: LocalStore(self._before))
        self._undisturbed(scenario.acts)  # so that what is loaded on first use is loaded
        self._example = self._undisturbed(scenario.acts)

    def calls(self) -> list[Call]:
        """Those of the scenario's jobs if nothing disturbs them."""
        return without_reports(self._example)

    def calls_of_next_job(self) -> list[Call]:
        """Those of the job after it, as far as they do not depend on what was left."""
        return without_reports(self._undisturbed(partial(go_on, NEXT_NUMBERS[0])))

    def run(self, points: Sequence[Point]) -> Outcome:
        """The scenario disturbed at the first point and, if there is one, the next job at the second; then one more job
        that nothing disturbs."""
        root = self._fresh()
        acts = [self._scenario.acts, *(partial(go_on, number) for number in NEXT_NUMBERS)]
        ended = [self._job(root, *each) for each in zip(acts, [*points, None], strict=False)]
        wrong = self._what_is_wrong(ended, root)
        reached = [each.reached(point) for each, point in zip(ended, points, strict=False)]
        for each, point in itertools.zip_longest(ended, points):
            if each.status and not (each.killed and point is not None and point.fault == "KILL"):
                wrong.append(f"a job ended with status {each.status}")
        if ended[-1].failures or not ended[-1].told:
            wrong.append(f"the next job failed: {ended[-1].failures}")
        if points[0].fault == "short" and ended[0].summary != self._example.summary:
            wrong.append(f"nothing has failed, but it reported {ended[0].told} and {ended[0].failures}")
        if wrong:
            lines = [line for each in ended for line in each.log.splitlines()]
            wrong += [f"log: {line}" for line in lines[:-60] if "(INJECTED)" in line]
            wrong += [f"log: {line}" for line in lines[-60:]]
            wrong += sorted(f"left: {path.relative_to(root)}" for path in root.rglob("*") if path.is_file())
        label = ", then ".join(map(str, points))
        return Outcome(all(reached), [f"{label}: {text}" for text in wrong])

    def run_all(self, runs: Sequence[Sequence[Point]]) -> dict[str, Any]:
        with multiprocessing.get_context("fork").Pool(JOBS) as pool:
            outcomes = pool.map(self.run, runs, chunksize=4)
        last = [points[-1] for points in runs]
        return {
            "runs": len(runs),
            "calls": Counter(point.call for point in last),
            "faults": Counter(point.fault for point in last),
            "not reached": sum(not outcome.reached for outcome in outcomes),
            "violations": [text for outcome in outcomes for text in outcome.wrong],
        }

    def _undisturbed(self, acts: Callable[[Run], None]) -> Ended:
        root = self._fresh()
        ended = self._job(root, acts, None)
        wrong = self._what_is_wrong([ended], root)
        assert not wrong, wrong
        return ended

    def _fresh(self) -> Path:
        """A directory of this process, with what the scenario's jobs find."""
        own = self._directory / str(os.getpid())
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        if self._before.exists():
            shutil.copytree(self._before, own / "repository")
        return own / "repository"

    def _what_is_wrong(self, jobs: Sequence[Ended], root: Path) -> list[str]:
        wrong = [text for ended in jobs for text in ended.wrong]
        reported = self._reported.union(*(ended.told for ended in jobs))
        possible = self._reported | self._scenario.numbers.union(NEXT_NUMBERS)
        wrong += violations(LocalStore(root), reported, possible)
        wrong += [f"the next job left {path.name}" for path in root.rglob(".*")]  # no listing of the store shows these
        return wrong or not_synced(jobs, root)

    def _job(self, root: Path, acts: Callable[[Run], None], point: Point | None) -> Ended:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            pid = os.fork()
            if not pid:
                ours.close()
                end_after(lambda: run_job(acts, root, theirs, point))
            theirs.close()
            ours.settimeout(SECONDS_MAX)
            log = root.parent / "log"
            told, last = [], {}
            with traced(json.loads(ours.recv(MESSAGE_BYTES_MAX))["thread"], point, log):
                try:
                    ours.send(b"!")
                    while message := ours.recv(MESSAGE_BYTES_MAX):
                        last = json.loads(message)
                        told += [last["told"]] if "told" in last else []
                except TimeoutError:
                    last = {"wrong": [f"the job hangs: it has not ended after {SECONDS_MAX:g} s"]}
                    os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
        return Ended(status, told, last.get("wrong", []), last.get("failures", []), log.read_text())


def end_after(function: Callable[[], None]) -> NoReturn:
    """What a forked process does; it must not go on with what its parent was doing."""
    try:
        function()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


@contextlib.contextmanager
def traced(thread: int, point: Point | None, log: Path) -> Iterator[None]:
    """Within, strace is attached to the thread, and disturbs it if it is to. The log is whole afterwards."""
    log.write_text("")
    if point is not None and point.fault == "short":
        yield
        return
    calls = ",".join(f"?{name}" for name in sorted({*WRITING, *READING, "sendto"}))
    filters = [f"trace={calls}", "signal=none", *([point.injection] if point is not None else [])]
    options = [part for each in filters for part in ("-e", each)]
    command = ["strace", "-y", "-s", "0", "-o", str(log), *options, "-p", str(thread)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        assert "attached" in said, said
        yield


def use_small_buffers() -> None:
    """So that the packs of tiny states are written by direct I/O, in several calls each. File systems in memory take
    blocks of any size."""
    transfers.BLOCK_BYTES = transfers.DIRECT_BYTES_MIN = 128
    transfers.BUFFER_BYTES = 2 * transfers.BLOCK_BYTES


def without_reports(ended: Ended) -> list[Call]:
    return [call for call in parsed(ended.log) if call.name != "sendto"]


def not_synced(jobs: Sequence[Ended], root: Path) -> list[str]:
    """What reports of commits rested on without being synced, also by a job before, and what was trusted after a failed
    fsync or close."""
    attempts = {}
    if any(ended.told for ended in jobs):
        snapshots = repository.Repository(LocalStore(root)).snapshots()
        attempts = {saved_as(snapshot, 1)[0]: snapshot.attempt for snapshot in snapshots}
    synced = Synced(root)
    told = itertools.chain.from_iterable(ended.told for ended in jobs)
    wrong = []
    for call in itertools.chain.from_iterable(parsed(ended.log) for ended in jobs):
        if call.name == "sendto":
            number = next(told)
            wrong += [f"{number} was reported, but {why}" for why in synced.relied_upon(attempts[number])]
        else:
            synced.follow(call)
    return wrong + synced.wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["kill", "kill-twice", "fail"])
    parser.add_argument("--scenario", choices=[scenario.name for scenario in SCENARIOS], required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    given = parser.parse_args()
    logging.getLogger("fastckpt").setLevel(logging.CRITICAL)
    save.STREAMS, pull.BATCH_BYTES = 1, 1  # each chunk by itself
    use_small_buffers()
    scenario = next(scenario for scenario in SCENARIOS if scenario.name == given.scenario)
    disturber = Disturber(scenario, given.directory)
    calls = disturber.calls()
    if given.what == "kill":
        runs = [[point] for point in kill_points(calls)]
    elif given.what == "kill-twice":
        second = kill_points(disturber.calls_of_next_job())
        runs = kills_in_a_row(kill_points(calls), second, given.seed, given.count)
    else:
        runs = [[point] for point in fault_points(calls, given.seed, given.count)]
    seen = disturber.run_all(runs)
    seen["direct"] = sum(call.name == "fcntl" and "O_DIRECT" in call.arguments for call in calls)
    seen["cpu seconds"] = round(sum(os.times()[:4]), 1)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
