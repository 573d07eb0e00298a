"""The watch over what a restore does sees whatever it is there for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.security.test_corpus import ROOT

# What must be seen, as code that runs watched, in a directory of two directories ``repository`` and ``target``; there
# is an ``outside`` beside them, and ``folder`` is the repository, open.
ACTS = {
    "reading a file outside": "os.open(os.path.abspath('outside'), os.O_RDONLY)",
    "reading outside by a way up": "os.open('../outside', os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)",
    "opening what is above": "os.open('..', os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)",
    "following links": "os.open('x', os.O_RDONLY, dir_fd=folder)",
    "writing into the repository": "os.open('y', os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, dir_fd=folder)",
    "writing outside": "open('outside', 'w')",
    "removing an object": "os.unlink('x', dir_fd=folder)",
    "renaming out of the target": "os.rename(os.path.abspath('target/z'), os.path.abspath('outside'))",
    "making a directory": "os.mkdir('target/d')",
    "listing another directory": "os.listdir('/')",
    "loading code": "import wave",
    "compiling": "compile('1', 'x', 'eval')",
    "running text": "exec('1')",
    "a process": "subprocess.run(['true'])",
    "a shell": "os.system('true')",
    "a fork": "os.fork() or os._exit(0)",
    "a socket": "socket.socket()",
    "a pickle": "pickle.loads(b'cos\\ngetcwd\\n.')",
    "marshalled code": "marshal.loads(marshal.dumps(1))",
    "a library": "ctypes.CDLL(None)",
    "a map of a file": "mmap.mmap(os.open('x', os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder), 1, prot=mmap.PROT_READ)",
}
HARMLESS = {
    "memory of one's own": "mmap.mmap(-1, 10)",
    "reading the repository": "os.close(os.open('x', os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder))",
    "writing the target": "open(os.path.abspath('target/z'), 'w').close()",
}
SCRIPT = """
import ctypes, json, marshal, mmap, os, pickle, socket, subprocess, sys
from pathlib import Path
from tests.security.audit import Watch
os.chdir(sys.argv[1])
folder = os.open(os.path.abspath("repository"), os.O_RDONLY)
act = compile(sys.argv[2], "act", "exec")
run = exec
watch = Watch(Path("repository").absolute(), Path("target").absolute())
watch.start()
run(act)
print(json.dumps(watch.violations[1:]))  # the first is that this script runs text
"""


def watched(act: str, directory: Path) -> list[str]:
    (directory / "repository").mkdir()
    (directory / "target").mkdir()
    for name in ("outside", "repository/x", "target/z"):
        (directory / name).write_text("x")
    command = [sys.executable, "-c", SCRIPT, str(directory), act]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    seen: list[str] = json.loads(result.stdout)
    return seen


@pytest.mark.parametrize("act", ACTS)
def test_what_a_reader_may_not_do_is_seen(act: str, tmp_path: Path) -> None:
    assert watched(ACTS[act], tmp_path), f"{act} went unseen"


@pytest.mark.parametrize("act", HARMLESS)
def test_what_a_reader_has_to_do_is_no_violation(act: str, tmp_path: Path) -> None:
    assert watched(HARMLESS[act], tmp_path) == []
