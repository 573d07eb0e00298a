"""Cuts the power of a file system on a loop device while another process runs a scenario on it, and looks at what is
left.

    unshare --mount --propagation private --pid --fork --kill-child \\
        python -m tests.crash.power_cut --file-system ext4 --directory /tmp/x --cuts 150 --seed 1

Run by test_power_cut.py as root, in mount and process namespaces of its own: when those end, however they end, the
mount and its loop device are gone. Prints one JSON object. ``FS_IOC_SHUTDOWN`` makes a file system forget at once what
it has not written, as a power cut would; the image lies in memory, so that an fsync costs no more than it must.

Power is cut before a chosen system call of the saving process (which covers what is between two operations of its
store), or at any moment. The process goes on, on a dead file system: whatever it reports committed counts, before the
cut or after, and it has to come to an end with nothing but our errors.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import fcntl
import importlib
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from fastckpt import save
from fastckpt.errors import FastckptError
from fastckpt.repository import pull
from fastckpt.storage import transfers
from fastckpt.storage.local import LocalStore
from tests.crash.numpy_job import OPTIONS, stored_tensors, stored_values
from tests.crash.scenarios import SCENARIOS, SPEC, Run, Scenario, nothing, prepared, violations

ALONE = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
"""In such namespaces nobody else sees the mount, and all processes end with the first one."""
FS_IOC_SHUTDOWN = 0x8004587D
LOG_FLUSHED, LOG_LOST = 1, 2
MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
IMAGE_BYTES = {"ext4": 128 << 20, "xfs": 320 << 20}
SECONDS_MAX = 30.0
"""For anything that the saving process is waited for."""

# Forked, since importing takes longer than a cut. At that moment no thread of ours is running.
_context = multiprocessing.get_context("fork")


# --- the file system ------------------------------------------------------------------------------------------------


class Mount:
    """A new file system on a loop device, its image in memory."""

    def __init__(self, file_system: str, directory: Path) -> None:
        """Mounts below ``directory``: to be used in a mount namespace of one's own."""
        # Beside each other: an image below which its own file system is mounted could keep itself alive for good.
        memory, self.path = directory / "memory", directory / "mount"
        memory.mkdir()
        self.path.mkdir()
        run(["mount", "-t", "tmpfs", "-o", f"size={2 * IMAGE_BYTES[file_system]}", "image", str(memory)])
        # All that may be seen of it outside of the namespace is the name.
        self._image = memory / f"image-{directory.name}"
        with self._image.open("wb") as image:
            image.truncate(IMAGE_BYTES[file_system])
        run([*MKFS[file_system], str(self._image)])
        self.mount()

    def mount(self) -> None:
        run(["mount", "-o", "loop", str(self._image), str(self.path)])

    def unmount(self) -> None:
        run(["umount", str(self.path)])

    def sync(self) -> None:
        run(["sync", "--file-system", str(self.path)])

    def cut_power(self, manner: str) -> None:
        """See ``MANNERS``. Afterwards every operation on the file system fails; mount it anew to see what is left."""
        if manner == "a stranger's fsync":
            with (self.path / "stranger").open("wb") as file:
                file.write(b"x" * 10_000)
                file.flush()
                os.fsync(file.fileno())
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", MANNERS[manner]))
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Removes all that is there. A later cut may bring some of it back: names are not used again."""
        for path in self.path.iterdir():
            if path.name == "lost+found":
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


MANNERS = {"at once": LOG_LOST, "a stranger's fsync": LOG_LOST, "journal flushed": LOG_FLUSHED}
"""What becomes of what no fsync has asked for: all is lost; or the journal is written because another process syncs a
file of its own, or because its time has come, so that names and sizes may be there and the data not."""


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


# --- the process that saves -----------------------------------------------------------------------------------------


class LocalRun(Run):
    """A run on a directory."""

    def __init__(self, directory: Path, report: Callable[[int], None] = lambda number: None) -> None:
        super().__init__(lambda: LocalStore(directory), report)
        self.directory = directory
        self.report = report


def through_checkpointer(run: Run) -> None:
    """What users call, with torch."""
    import torch

    from fastckpt import Checkpointer

    assert isinstance(run, LocalRun)
    with contextlib.suppress(FastckptError), Checkpointer(run.directory, options=OPTIONS) as checkpointer:
        for step in (1, 2, 3):
            tensors = {key: torch.from_numpy(array.copy()) for key, array in stored_tensors(SPEC, step, 1).items()}
            checkpointer.save(step, {**tensors, **stored_values(step, 0)}).wait()
            run.report(step)


CHECKPOINTER = Scenario("through the Checkpointer", nothing, through_checkpointer, frozenset({1, 2, 3}))

CHANGING = ("open", "write", "fsync", "link", "unlink", "mkdir", "rmdir", "rename", "replace")
"""What a store of files changes them with; ``open`` counts where it may create one."""


class Calls:
    """Numbers the system calls that change files, of all threads, and stops them all before a chosen one."""

    def __init__(self, stop_before: int, stop: Callable[[str], None]) -> None:
        self._stop_before, self._stop = stop_before, stop
        self._lock = threading.Lock()
        self.seen: list[str] = []

    def watch(self) -> None:
        for name in CHANGING:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if name != "open" or arguments[1] & os.O_CREAT:
                with self._lock:
                    self.seen.append(f"{name} of {_shown(arguments[0])}")
                    if len(self.seen) == self._stop_before:
                        self._stop(self.seen[-1])
            return real(*arguments, **named)

        return call


def _shown(file: object) -> str:
    name = Path(os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)).name
    return f"{name[:20]}~" if len(name) > 20 else name


# Mistakes that the saving process can be made to make. The calls that they still make are counted, no others.


def no_mistake() -> None:
    pass


def no_fsync() -> None:
    _sync_only(lambda mode: False)


def no_fsync_of_data() -> None:
    _sync_only(stat.S_ISDIR)


def no_fsync_of_directories() -> None:
    _sync_only(stat.S_ISREG)


def _sync_only(wanted: Callable[[int], bool]) -> None:
    fsync = os.fsync

    def fsync_if_wanted(descriptor: int) -> None:
        if wanted(os.fstat(descriptor).st_mode):
            fsync(descriptor)

    os.fsync = fsync_if_wanted  # type: ignore[assignment]


def link_before_fsync() -> None:
    """What is written under a temporary name gets its own first, and is synced then."""
    fsync, link = os.fsync, os.link
    waiting = threading.local()

    def fsync_later(descriptor: int) -> None:
        if _shown(descriptor).startswith("."):
            waiting.file = os.dup(descriptor)
        else:
            fsync(descriptor)

    def link_then_fsync(*arguments: Any, **named: Any) -> None:
        link(*arguments, **named)
        fsync(waiting.file)
        os.close(waiting.file)

    os.fsync, os.link = fsync_later, link_then_fsync  # type: ignore[assignment]


MISTAKES = {
    mistake.__name__: mistake
    for mistake in (no_mistake, no_fsync, no_fsync_of_data, no_fsync_of_directories, link_before_fsync)
}


class Ending(NamedTuple):
    wrong: list[str]
    calls: Sequence[str] = ()
    seconds: float = 0.0


def run_scenario(
    pipe: Connection, scenario: Scenario, directory: Path, stop_before: int | None, mistake: Callable[[], None]
) -> None:
    """Stops before that call until told to go on; before none if it is 0. None: calls are not looked at."""
    faulthandler.enable()
    talking = threading.Lock()

    def say(kind: str, what: object = None) -> None:
        with talking:
            pipe.send((kind, what))

    def stop(call: str) -> None:
        say("stopped", call)
        pipe.recv()

    calls = Calls(stop_before or 0, stop)
    if stop_before is not None:
        calls.watch()
        save.STREAMS = 1  # so that a call has the same number in each run
        pull.BATCH_BYTES = 1
    mistake()
    run = LocalRun(directory, lambda number: say("committed", number))
    say("started")
    start = time.perf_counter()
    try:
        scenario.acts(run)
    except BaseException:
        run.wrong.append(traceback.format_exc())
    say("ended", Ending(run.wrong, calls.seen, time.perf_counter() - start))


# --- the process that cuts ------------------------------------------------------------------------------------------


class Victim:
    """The process that saves, as seen from here."""

    def __init__(
        self, scenario: Scenario, directory: Path, stop_before: int | None, mistake: Callable[[], None]
    ) -> None:
        self._pipe, theirs = _context.Pipe()
        given = (theirs, scenario, directory, stop_before, mistake)
        self._process = _context.Process(target=run_scenario, args=given, daemon=True)
        self._process.start()
        theirs.close()
        self.reported: set[int] = set()
        self.ending: Ending | None = None
        self._listen("started")

    def stopped(self) -> str:
        """Waits until it has stopped, and says before which call; or until it has ended."""
        call: str | None = self._listen("stopped")
        return call or "the end"

    def end(self) -> Ending:
        """Lets it go on if it has stopped, and waits for its end."""
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send("go on")
        self._listen("ended")
        assert self.ending is not None
        self._process.join(SECONDS_MAX)
        if self._process.is_alive():
            self.ending.wrong.append("threads of the saving process do not come to an end")
        self.kill()
        return self.ending

    def _listen(self, wanted: str) -> Any:
        while self.ending is None:
            try:
                if not self._pipe.poll(SECONDS_MAX):
                    assert self._process.pid is not None
                    os.kill(self._process.pid, signal.SIGABRT)  # it shows its stacks
                    self.ending = Ending([f"the saving process says nothing for {SECONDS_MAX:g} s"])
                    break
                kind, what = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                self.ending = Ending(["the saving process died"])
                break
            if kind == "committed":
                self.reported.add(what)
            if kind == "ended":
                self.ending = what
            if kind == wanted:
                return what
        return None

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


class Cut(NamedTuple):
    scenario: Scenario
    stop_before: int | None
    """The call before which power is cut; None: at any moment."""
    share: float
    """When that is, as a share of the time that the scenario takes undisturbed."""
    manner: str


def planned(points: Mapping[str, Sequence[int]], scenarios: Sequence[Scenario], seed: int) -> Iterator[Cut]:
    """Takes the scenarios in turn; in every fourth round power is cut at any moment, else before one of the calls
    ``points``. From one to the next is about a golden section of them all, so that any number of cuts is spread
    evenly; after as many as there are each was considered, after three times as many in every manner."""
    generators = {scenario.name: random.Random(f"{seed} {scenario.name}") for scenario in scenarios}
    starts = {name: generator.randrange(len(points[name])) for name, generator in generators.items()}
    considered = itertools.count()
    for round_number in itertools.count():
        if round_number % 4 == 3:
            for scenario in scenarios:
                generator = generators[scenario.name]
                yield Cut(scenario, None, generator.random(), generator.choice([*MANNERS]))
            continue
        number = next(considered)
        for scenario in scenarios:
            count = len(points[scenario.name])
            step = next(step for step in itertools.count(round(count * 0.618)) if math.gcd(step, count) == 1)
            call = points[scenario.name][(starts[scenario.name] + number * step) % count]
            yield Cut(scenario, call, 0.0, [*MANNERS][(number % count + number // count) % len(MANNERS)])


class Outcome(NamedTuple):
    moment: str
    reported: int
    violations: list[str]


def cut_once(mount: Mount, cut: Cut, repository: Path, seconds: float, mistake: Callable[[], None]) -> Outcome:
    """``seconds``: how long the scenario takes undisturbed."""
    before = prepared(cut.scenario, lambda: LocalStore(repository))
    victim = Victim(cut.scenario, repository, cut.stop_before, mistake)
    try:
        if cut.stop_before is None:
            time.sleep(cut.share * seconds)
            moment = f"after {cut.share:.2f} of its time"
        else:
            moment = f"before call {cut.stop_before}, {victim.stopped()}"
        mount.cut_power(cut.manner)
        wrong = victim.end().wrong
    finally:
        victim.kill()
    mount.unmount()
    mount.mount()
    wrong += violations(LocalStore(repository), before | victim.reported, before | cut.scenario.numbers)
    mount.clear()
    reported = len(victim.reported)
    return Outcome(f"{cut.scenario.name}, {moment}, {cut.manner}, {reported} reported", reported, wrong)


def undisturbed(mount: Mount, scenario: Scenario, mistake: Callable[[], None]) -> Ending:
    repository = mount.path / scenario.name
    prepared(scenario, lambda: LocalStore(repository))
    victim = Victim(scenario, repository, 0, mistake)
    try:
        ending = victim.end()
    finally:
        victim.kill()
    assert not ending.wrong, ending.wrong
    mount.clear()
    return ending


def cut_many(
    mount: Mount, scenarios: Sequence[Scenario], cuts: int, seed: int, before: str, mistake: Callable[[], None]
) -> dict[str, Any]:
    """``before``: how the calls to cut before begin; "" for all. With a mistake, until it is found."""
    endings = {scenario.name: undisturbed(mount, scenario, mistake) for scenario in scenarios}
    points = {
        name: [number for number, call in enumerate([*ending.calls, "the end"], 1) if call.startswith(before)]
        for name, ending in endings.items()
    }
    seen: dict[str, Any] = {"calls": {name: len(ending.calls) for name, ending in endings.items()}}
    seen |= {"moments": [], "reported": 0, "violations": []}
    for number, cut in enumerate(itertools.islice(planned(points, scenarios, seed), cuts)):
        repository = mount.path / f"repository-{number}"
        outcome = cut_once(mount, cut, repository, endings[cut.scenario.name].seconds, mistake)
        seen["moments"].append(outcome.moment)
        seen["reported"] += outcome.reported
        seen["violations"] += [f"cut {number} ({outcome.moment}): {text}" for text in outcome.violations]
        if outcome.violations and mistake is not no_mistake:
            break
    return seen


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--file-system", choices=sorted(MKFS), default="ext4")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--through-checkpointer", action="store_true")
    parser.add_argument("--before", default="", help="cut only before calls that begin so: 'fsync of decisions'")
    parser.add_argument("--mistake", choices=sorted(MISTAKES), default=no_mistake.__name__)
    given = parser.parse_args()
    # Packs as small as these are written directly too.
    transfers.BLOCK_BYTES = transfers.DIRECT_BYTES_MIN = 512
    transfers.BUFFER_BYTES = 1024
    scenarios = SCENARIOS
    if given.through_checkpointer:
        importlib.import_module("fastckpt.checkpointer")  # once, here, with torch
        scenarios = [CHECKPOINTER]
    mount = Mount(given.file_system, given.directory)
    try:
        seen = cut_many(mount, scenarios, given.cuts, given.seed, given.before, MISTAKES[given.mistake])
    finally:
        mount.unmount()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
