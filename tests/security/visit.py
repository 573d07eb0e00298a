"""Goes through every front door of a repository that somebody else wrote: opens, lists, shows, compares, verifies,
reads, restores and exports it. Each visit is a process of its own, watched, with limits on memory, file size and time.

    python -m tests.security.visit 'a chunk ...'      # visits by name, one JSON line each
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastckpt
from fastckpt.cli.main import commands
from fastckpt.errors import FastckptError
from fastckpt.group import SoloGroup
from fastckpt.plan.restore_plan import Selection
from fastckpt.repository.reader import Snapshot
from fastckpt.restore import Restores, values_of
from fastckpt.storage.local import LocalStore
from tests.crash.numpy_job import stored_tensors, stored_values
from tests.security.audit import Watch
from tests.security.author import NEW, OLD, SIZE, SPEC, Author, written
from tests.security.corpus import ATTACKS, ESCAPES, Attack

MEMORY_BYTES_MAX = 64 * 1024**2
"""What a visit may take beyond what the repository declares to hold, and proves to."""
ADDRESS_BYTES_MAX = 3 * 1024**3
"""What it may ask for: more is refused, as on a small machine."""
FILE_BYTES_MAX = 64 * 1024**2
CPU_SECONDS_MAX = 8
SECONDS_MAX = 60
"""Of waiting; no visit has anything to wait for but a machine that is busy with others."""
EXIT_CODES = {0, 1, 10, 13, 14, 15, 16}


class Visit:
    """One visit, and what was wrong about it."""

    def __init__(self, repository: Path, target: Path) -> None:
        self._repository = repository
        self._target = target
        self.violations: list[str] = []
        self.error = ""
        """The kind of error that reading the newest snapshot ended with, if any."""
        self.message = ""
        self.exit_codes: dict[str, int] = {}

    def all_doors(self) -> None:
        self._door("read", self._read)
        self._door("choose", self._choose)
        for arguments in (
            ["ls"],
            ["ls", "--long"],
            ["ls", "--long", "--json"],
            ["show", "--values"],
            ["show", "--values", "--json"],
            ["show", "--environment"],
            ["diff", str(OLD), str(NEW)],
            ["diff", str(OLD), str(NEW), "--environment", "--json"],
            ["verify", "--all"],
            ["verify", "--json"],
            ["restore", "--to", str(self._target / "a.safetensors")],
        ):
            self._command(arguments)
        if self.exit_codes["restore"] == 0:
            self._check_file(self._target / "a.safetensors")
        if left := [thread for thread in threading.enumerate() if thread is not threading.main_thread()]:
            self.violations.append(f"threads are left: {left}")

    def _door(self, name: str, enter: Callable[[], None]) -> None:
        try:
            enter()
        except FastckptError as error:
            if name == "read":
                self.error, self.message = type(error).__name__, str(error)
        except BaseException as error:
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            self.violations.append(f"{name} raised {error!r:.300} in {frame.f_code.co_filename}:{line}")
            if name == "read":
                self.error, self.message = type(error).__name__, str(error)

    def _read(self) -> None:
        snapshot = fastckpt.open(str(self._repository)).snapshot()
        for key in snapshot.keys():  # noqa: SIM118 - a snapshot is no dict
            self._check_tensor(snapshot, key, snapshot.read(key).tobytes())
        self._check_values(snapshot)

    def _choose(self) -> None:
        """As a job on one rank does: falls back to the snapshot before, if the newest is damaged."""
        snapshot = Restores(LocalStore(self._repository), SoloGroup(), 10.0).choose(None, [])
        if snapshot is None and self.error != "SnapshotNotFound":
            self.violations.append("a restore found no snapshot, and no damage either")
        if snapshot is None:
            return
        values_of(snapshot, 0, SIZE, Selection())
        self._check_values(snapshot)

    def _check_values(self, snapshot: Snapshot) -> None:
        for rank in range(min(snapshot.world_size, 4)):
            for name in snapshot.value_digests(rank):
                found = snapshot.value(name, rank)
                right = stored_values(snapshot.step, rank).get(name, found)
                if found != right:
                    self.violations.append(f"value {name} of rank {rank} is {found!r:.100}")

    def _check_tensor(self, snapshot: Snapshot, key: str, found: bytes) -> None:
        right = stored_tensors(SPEC, snapshot.step, SIZE).get(key)
        if right is not None and snapshot.world_size == SIZE and found != right.tobytes():
            self.violations.append(f"{key} has other bytes than were saved")

    def _command(self, arguments: list[str]) -> None:
        gc.collect()  # each command is a process of its own in life
        out, err = io.StringIO(), io.StringIO()
        name = arguments[0]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                commands([name, str(self._repository), *arguments[1:]])
            raise AssertionError("a command ends by SystemExit")
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            self.violations.append(f"{arguments} raised {error!r:.300}")
            code = -1
        said = err.getvalue()
        if code not in EXIT_CODES or "internal error" in said or "Traceback" in said:
            self.violations.append(f"{arguments} exited with {code}: {said[:300]}")
        for text in (out.getvalue(), said):
            if raw := sorted({c for c in text if not c.isprintable() and c != "\n"}):
                self.violations.append(f"{arguments} printed {raw!r}")
        assert isinstance(code, int)
        self.exit_codes[name] = max(code, self.exit_codes.get(name, 0))

    def _check_file(self, path: Path) -> None:
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        step = int(header.pop("__metadata__")["step"])
        right = stored_tensors(SPEC, step, SIZE)
        for key, entry in header.items():
            start, stop = entry["data_offsets"]
            if key in right and set(right) == set(header) and data[end + start : end + stop] != right[key].tobytes():
                self.violations.append(f"{key} has other bytes in the file than were saved")


def _tree(directory: Path) -> list[tuple[str, int, int]]:
    found = []
    for folder, _, names in os.walk(directory):
        for path in (os.path.join(folder, name) for name in names):
            seen = os.lstat(path)
            found.append((path, seen.st_mode, seen.st_mtime_ns))
    return sorted(found)


def in_child(attack: Attack, repository: Path, target: Path) -> dict[str, Any]:
    """Visits in a process of its own, and looks at what it did to the files."""
    before = _tree(repository)
    report = _forked(attack, repository, target)
    if _tree(repository) != before:
        report["violations"].append("the repository was changed")
    restored = report.get("exit_codes", {}).get("restore") == 0
    if (left := os.listdir(target)) != (["a.safetensors"] if restored else []):
        report["violations"].append(f"a restore that {'succeeded' if restored else 'failed'} left {left}")
    return report


def _forked(attack: Attack, repository: Path, target: Path) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.write(writing, json.dumps(_limited(attack, repository, target)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        signal_name = signal.Signals(os.WTERMSIG(status)).name
        return {"violations": [f"the process died of {signal_name}; SIGXCPU: it calculates on, SIGALRM: it waits"]}
    report: dict[str, Any] = json.loads(data) if data else {"violations": ["the process died"]}
    return report


def _limited(attack: Attack, repository: Path, target: Path) -> dict[str, Any]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS_MAX)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES_MAX, ADDRESS_BYTES_MAX))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS_MAX, CPU_SECONDS_MAX + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES_MAX, FILE_BYTES_MAX))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    visit, watch = Visit(repository, target), Watch(repository, target)
    watch.start()
    visit.all_doors()
    used = resource.getrusage(resource.RUSAGE_SELF)
    taken = (used.ru_maxrss - before) * 1024
    if taken > attack.declared_bytes + MEMORY_BYTES_MAX:
        visit.violations.append(f"took {taken >> 20} MiB where {attack.declared_bytes >> 20} are declared")
    return {
        "violations": [*visit.violations, *(f"did {each}" for each in watch.violations)],
        "error": visit.error,
        "message": visit.message,
        "exit_codes": visit.exit_codes,
        "opened": watch.opened,
        "memory": taken,
        "seconds": used.ru_utime + used.ru_stime,
    }


def visits(chosen: list[Attack]) -> Iterator[dict[str, Any]]:
    valid = written()
    with tempfile.TemporaryDirectory() as scratch:
        for number, attack in enumerate(chosen):
            repository, target = Path(scratch, f"{number}", "repository"), Path(scratch, f"{number}", "target")
            repository.mkdir(parents=True)
            target.mkdir()
            author = Author(valid)
            attack.change(author)
            author.write(repository)
            yield {"name": attack.name, **in_child(attack, repository, target)}


def warm_up() -> None:
    """Loads what is loaded on first use, for repositories that are right and that are not."""
    import ml_dtypes  # noqa: F401 - for the first tensor of such a dtype

    valid = written()
    with tempfile.TemporaryDirectory() as scratch:
        for number, change in enumerate(
            (
                lambda a: None,
                lambda a: a.one_tensor([3]),
                lambda a: a.format.update(version=9),
                lambda a: a.label(note=ESCAPES),
            )
        ):
            repository, target = Path(scratch, f"{number}"), Path(scratch, f"{number}-target")
            target.mkdir()
            author = Author(valid)
            change(author)  # type: ignore[no-untyped-call]
            repository.mkdir()
            author.write(repository)
            visit = Visit(repository, target)
            visit.all_doors()
            assert not visit.violations, visit.violations


def main() -> None:
    logging.getLogger("fastckpt").addHandler(logging.NullHandler())  # falling back is logged
    warm_up()
    gc.collect()
    gc.freeze()
    known = {attack.name: attack for attack in ATTACKS}
    for report in visits([known[name] for name in sys.argv[1:]] or list(ATTACKS)):
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
