"""``fastckpt doctor`` as an operator meets it: on real file systems, where nothing is yet, and where much is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import fastckpt
from fastckpt.cli.main import commands
from fastckpt.format import document as documents

FASTCKPT = str(Path(sys.executable).parent / "fastckpt")
ENVIRONMENT = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
MACHINE = ["cpu", "memory", "shared memory", "limits", "software"]
PROBED = ["fsync", "fsync of directories", "objects", "create if absent", "direct I/O", "locks", "clock", "delete"]
EVERYTHING = ["directory", "file system", "space", "write", *PROBED, "repository", *MACHINE]


def run(*args: object, **settings: Any) -> Result:
    return CliRunner().invoke(commands, ["doctor", *map(str, args)], **settings)


def findings(output: str) -> dict[str, dict[str, Any]]:
    """By what they are about."""
    found = {finding.pop("about"): finding for finding in json.loads(output)["findings"]}
    assert all(finding["change"] for finding in found.values() if finding["state"] != "ok"), "it says what to change"
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "repository"
    for step in (1, 2):
        with fastckpt.Checkpointer(str(path), options=fastckpt.Options(chunk_bytes=4096)) as checkpointer:
            checkpointer.save(step, {"w": torch.arange(5000.0) * step})
    return path


@pytest.fixture
def repo(template: Path, tmp_path: Path) -> Path:
    """A copy, to harm."""
    return Path(shutil.copytree(template, tmp_path / "repository"))


def tree(path: Path) -> dict[str, tuple[int, int, int]]:
    """Size, inode and time of change of everything below. (The directory itself has held a hidden one.)"""
    return {str(p.relative_to(path)): (s.st_size, s.st_ino, s.st_mtime_ns) for p in path.rglob("*") if (s := p.lstat())}


# --- what is found -------------------------------------------------------------------------------------------------


def test_a_repository_is_examined_and_not_touched(template: Path) -> None:
    before = tree(template)
    result = run(template, "--json")
    found = findings(result.stdout)
    assert list(found) == EVERYTHING
    assert [about for about, finding in found.items() if finding["state"] == "fail"] == []
    assert tree(template) == before
    repository, opened = found["repository"], fastckpt.open(str(template)).last_open()
    assert opened is not None
    assert repository["facts"] == {
        "exists": True,
        "version": 1,
        "snapshots": 2,
        "newest_step": 2,
        "newest_bytes": 20000,
        "opened": opened.created,
        "writer": opened.writer,
    }
    assert opened.writer == fastckpt.open(str(template)).snapshot().attempt.rpartition("-")[0]
    assert found["directory"]["facts"]["path"] == str(template)


def test_people_get_a_line_a_finding_and_a_sum(template: Path) -> None:
    *lines, last = run(template).stdout.splitlines()
    assert [line[6:].split("  ")[0] for line in lines] == EVERYTHING
    assert all(line[:6] in ("ok    ", "warn  ", "fail  ") for line in lines)
    assert last.startswith(f"{len(EVERYTHING)} checks: 0 failed, ")
    assert "\x1b" not in "".join(lines)


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    result = run(tmp_path / "a" / "b", "--json")
    found = findings(result.stdout)
    assert list(found) == EVERYTHING
    assert found["directory"]["facts"] == {
        "path": str(tmp_path / "a" / "b"),
        "looked_at": str(tmp_path),
        "owner": os.geteuid(),
        "mode": f"{stat.S_IMODE(tmp_path.stat().st_mode):04o}",
    }
    assert found["repository"]["facts"] == {"exists": False}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["file", "file/run", "link", "link/run"])
def test_a_file_or_a_link_to_nothing_in_the_way_is_a_failure_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    before = tree(tmp_path)
    result = run(tmp_path / name, "--json")
    assert result.exit_code == 1
    found = findings(result.stdout)
    assert found["directory"]["state"] == "fail"
    assert str(tmp_path / name.split("/")[0]) in found["directory"]["what"]
    assert list(found) == ["directory", *MACHINE]
    assert tree(tmp_path) == before


def test_a_directory_of_something_else_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "notes.txt" in result.stdout
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("pattern", ["FORMAT", "decisions/*", "attempts/*/index"])
def test_damage_is_a_failure_that_names_the_object(repo: Path, pattern: str) -> None:
    file = sorted(repo.glob(pattern))[-1]
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    result = run(repo, "--json")
    assert result.exit_code == 1
    repository = findings(result.stdout)["repository"]
    assert (repository["state"], repository["facts"]) == ("fail", {"exists": True})
    assert str(file.relative_to(repo)) in repository["what"]


def test_a_newer_format_is_a_failure_that_says_to_upgrade(repo: Path) -> None:
    header = json.loads((repo / "FORMAT").read_bytes().splitlines()[0])
    (repo / "FORMAT").write_bytes(documents.seal({**header, "version": 99}))
    repository = findings(run(repo, "--json").stdout)["repository"]
    assert repository["state"] == "fail"
    assert "newer" in repository["change"]


def test_what_others_may_change_is_a_warning(repo: Path) -> None:
    repo.chmod(0o777)
    result = run(repo, "--json")
    assert result.exit_code == 3
    assert findings(result.stdout)["directory"]["state"] == "warn"


def test_memory_stores_are_said_to_be_for_tests() -> None:
    result = run("memory://doctor", "--json")
    assert result.exit_code == 3
    found = findings(result.stdout)
    assert list(found) == ["directory", "repository", *MACHINE]
    assert "nothing outlives it" in found["directory"]["what"]


@pytest.mark.parametrize("url", ["file://user:hunter2@host/x", "s3://user:hunter2@bucket", "file:///x?token=hunter2"])
def test_no_url_is_repeated_that_could_hold_a_secret(url: str) -> None:
    for option in ("-q", "--json", "-vv"):
        result = run(url, option)
        assert result.exit_code == 2
        assert "hunter2" not in result.output


def test_no_environment_variable_is_shown(template: Path) -> None:
    environment = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "TORCH_TOKEN", "FASTCKPT_TOKEN", "USER"), "hunter2")
    for option in ("--json", "-vv"):
        assert "hunter2" not in run(template, option, env=environment).output


# --- real file systems ---------------------------------------------------------------------------------------------


def on(directory: Path, script: str, *tools: str) -> subprocess.CompletedProcess[str]:
    """Runs a script that may mount what it likes: nobody else sees it, and it is gone afterwards."""
    missing = [tool for tool in ("unshare", "mount", *tools) if shutil.which(tool, path=ENVIRONMENT["PATH"]) is None]
    if missing:
        reason = f"needs {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    alone = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    (directory / "mnt").mkdir(exist_ok=True)
    return subprocess.run(
        [*alone, "sh", "-ec", script], cwd=directory, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


root = pytest.mark.root
need_root = pytest.mark.usefixtures("need_root")


@root
@need_root
@pytest.mark.parametrize("file_system", ["ext4", "xfs"])
def test_a_disk_is_found_to_have_all_that_saves_need(file_system: str, tmp_path: Path) -> None:
    script = f"truncate -s 400M image; mkfs.{file_system} -q image; mount -o loop image mnt; mkdir mnt/r"
    result = on(tmp_path, f"{script}; {FASTCKPT} doctor --json mnt/r; ls -A mnt/r >&2", f"mkfs.{file_system}")
    assert (result.returncode, result.stderr) == (0, ""), result
    found = findings(result.stdout)
    assert list(found) == EVERYTHING
    assert found["file system"]["facts"]["type"] == file_system
    assert found["create if absent"]["facts"]["primitive"] == "link"
    assert found["fsync of directories"]["facts"]["supported"] is True
    assert found["direct I/O"]["facts"]["supported"] is True
    assert found["direct I/O"]["facts"]["alignment"] in (512, 4096)


@root
@need_root
@pytest.mark.parametrize("option", ["nobarrier", "data=writeback"])
def test_a_mount_that_gives_durability_away_is_a_warning(option: str, tmp_path: Path) -> None:
    script = f"truncate -s 60M image; mkfs.ext4 -q image; mount -o loop,{option} image mnt"
    result = on(tmp_path, f"{script}; {FASTCKPT} doctor --json mnt/r", "mkfs.ext4")
    assert result.returncode == 3, result.stderr
    found = findings(result.stdout)
    assert found["file system"]["state"] == "warn"
    assert option in found["file system"]["what"]


@root
@need_root
@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ("mount -t tmpfs -o size=8m tmpfs mnt", "it is memory"),
        ("mkdir l u w; mount -t overlay -o lowerdir=l,upperdir=u,workdir=w overlay mnt", "container"),
    ],
)
def test_what_outlives_no_reboot_or_container_is_a_warning(mount: str, words: str, tmp_path: Path) -> None:
    if "overlay" in mount:  # cannot lie on an overlay itself, as where tests run in a container
        mount = f"mount -t tmpfs tmpfs .; cd {tmp_path}; mkdir mnt; {mount}"
    result = on(tmp_path, f"{mount}; {FASTCKPT} doctor --json mnt/r; code=$?; ls -A mnt >&2; exit $code")
    assert result.returncode == 3, result.stderr
    assert result.stderr == ""
    found = findings(result.stdout)
    assert found["file system"]["state"] == "warn"
    assert words in found["file system"]["what"]


@root
@need_root
def test_where_nothing_can_be_written_restores_work_and_that_is_said(template: Path, tmp_path: Path) -> None:
    before = tree(template)
    script = f"mount --bind {template} mnt; mount -o remount,ro,bind mnt; {FASTCKPT} doctor --json mnt"
    result = on(tmp_path, script)
    assert result.returncode == 3, result.stderr
    found = findings(result.stdout)
    assert "cannot write here: Read-only file system" in found["write"]["what"]
    assert found["repository"]["state"] == "ok"
    assert not set(PROBED) & set(found)
    assert tree(template) == before


@root
@need_root
@pytest.mark.parametrize(
    ("name", "about", "words"), [("shut/x", "directory", "cannot look at"), ("open", "write", "cannot write here")]
)
def test_a_directory_that_this_user_may_not_enter_or_write_is_said_to_be_so(
    tmp_path: Path, name: str, about: str, words: str
) -> None:
    other = f"setpriv --reuid 65534 --regid 65534 --clear-groups {FASTCKPT}"
    if subprocess.run(["sh", "-c", f"cd /; {other} --version"], env=ENVIRONMENT, capture_output=True).returncode:
        pytest.skip("another user cannot run the command line where it is installed")
    # Not below tmp_path, where others may not go. Nobody else sees what is mounted.
    script = f"mount -t tmpfs tmpfs /mnt; mkdir -m 0700 /mnt/shut; mkdir -m 0755 /mnt/open; cd /; {other}"
    result = on(tmp_path, f"{script} doctor --json /mnt/{name}", "setpriv")
    assert result.returncode in (1, 3), result.stderr
    assert words in findings(result.stdout)[about]["what"]


@root
@need_root
@pytest.mark.parametrize(
    ("limit", "fill"),
    [("size=64k", "dd if=/dev/zero of=mnt/full bs=4k status=none || true"), ("nr_inodes=2", "touch mnt/full")],
)
def test_a_full_disk_is_a_failure_and_not_a_crash(limit: str, fill: str, tmp_path: Path) -> None:
    script = f"mount -t tmpfs -o {limit} tmpfs mnt; ({fill}) 2>/dev/null; {FASTCKPT} doctor --json mnt/r"
    result = on(tmp_path, f"{script}; code=$?; ls -A mnt >&2; exit $code".replace("; code", " && code=0 || code", 1))
    assert result.stderr == "full\n", result
    found = findings(result.stdout)
    assert "No space left on device" in " ".join(f["what"] for f in found.values() if f["state"] == "fail")
    assert result.returncode == 1


@root
@need_root
def test_a_disk_too_small_for_another_snapshot_is_a_warning(tmp_path: Path) -> None:
    with fastckpt.Checkpointer(str(tmp_path / "r")) as checkpointer:
        checkpointer.save(1, {"w": torch.ones(1024, 1024)})
    script = f"mount -t tmpfs -o size=6m tmpfs mnt; cp -r r mnt/r; {FASTCKPT} doctor --json mnt/r"
    result = on(tmp_path, script)
    assert result.returncode == 3, result.stderr
    repository = findings(result.stdout)["repository"]
    assert repository["state"] == "warn"
    assert "make room" in repository["change"]


FUSE = """
    import os, sys, warnings
    import mfusepy

    class Mirror(mfusepy.Operations):
        "A directory, without hard links and without fsync of directories."
        use_ns = True
        def getattr(self, path, fh=None):
            found = os.lstat(sys.argv[1] + path)
            names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")
            times = {f"st_{n}time": getattr(found, f"st_{n}time_ns") for n in "amc"}
            return {**{name: getattr(found, name) for name in names}, **times}
        def readdir(self, path, fh): return [".", "..", *os.listdir(sys.argv[1] + path)]
        def mkdir(self, path, mode): os.mkdir(sys.argv[1] + path, mode)
        def rmdir(self, path): os.rmdir(sys.argv[1] + path)
        def unlink(self, path): os.unlink(sys.argv[1] + path)
        def rename(self, old, new): os.rename(sys.argv[1] + old, sys.argv[1] + new)
        def open(self, path, flags): return os.open(sys.argv[1] + path, flags & ~os.O_DIRECT)
        def create(self, path, mode, fi=None): return os.open(sys.argv[1] + path, os.O_RDWR | os.O_CREAT, mode)
        def read(self, path, size, offset, fh): return os.pread(fh, size, offset)
        def write(self, path, data, offset, fh): return os.pwrite(fh, data, offset)
        def release(self, path, fh): os.close(fh)
        def fsync(self, path, datasync, fh): os.fsync(fh)
        def fsyncdir(self, path, datasync, fh): raise mfusepy.FuseOSError(22)

    mfusepy.FUSE(Mirror(), sys.argv[2], foreground=True)
"""


def fuse(tmp_path: Path, then: str) -> subprocess.CompletedProcess[str]:
    """Runs ``then`` with the mirror mounted on ``mnt`` and its process in ``$server``."""
    pytest.importorskip("mfusepy")
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse")
    (tmp_path / "mirror.py").write_text(textwrap.dedent(FUSE))
    (tmp_path / "back").mkdir()
    wait = "tries=0; until mountpoint -q mnt; do tries=$((tries+1)); [ $tries -lt 600 ]; sleep 0.1; done"
    serve = f"{sys.executable} -W ignore mirror.py $PWD/back mnt >/dev/null 2>&1 & server=$!"
    return on(tmp_path, f"{serve}; {wait}; {then}", "mountpoint", "fusermount3")


@root
@need_root
def test_without_hard_links_and_fsync_of_directories_saves_work_with_warnings(tmp_path: Path) -> None:
    result = fuse(tmp_path, f"{FASTCKPT} doctor --json mnt/r")
    assert result.returncode == 3, result
    found = findings(result.stdout)
    states = {about: finding["state"] for about, finding in found.items()}
    assert [about for about, state in states.items() if state == "fail"] == []
    assert states["file system"] == states["create if absent"] == states["fsync of directories"] == "warn"
    assert found["create if absent"]["facts"]["primitive"] == "renameat2"
    assert os.listdir(tmp_path / "back") == []


@root
@need_root
def test_storage_that_does_not_answer_is_given_up_and_named(tmp_path: Path) -> None:
    """The server of the file system is stopped; whoever asks it waits for ever."""
    result = fuse(tmp_path, f"kill -STOP $server; {FASTCKPT} doctor --json --timeout 2 mnt/r")
    assert result.returncode == 1, result
    (finding,) = findings(result.stdout).values()
    assert "no answer for 2 s" in finding["what"]


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "link", "preadv", "rmdir"])
def test_a_signal_at_any_moment_leaves_nothing_behind(template: Path, call: str, number: int, code: int) -> None:
    """The call that the signal comes in has been carried out, and is held up until the signal has come."""
    before = tree(template)
    script = (
        "import os, sys, threading; from fastckpt.cli import main\n"
        f"real, held = os.{call}, []\n"
        "def stuck(*args, **settings):\n"
        "    result = real(*args, **settings)\n"
        "    if not held:\n"
        "        held.append(print('here', flush=True))\n"
        "        sys.stdin.readline()\n"
        "    return result\n"
        f"os.{call} = stuck\n"
        "main.main()"
    )
    command = [sys.executable, "-c", script, "doctor", str(template)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        child.send_signal(number)
        child.stdin.close()
        assert child.wait(timeout=60) == code
    assert tree(template) == before


# --- as a process --------------------------------------------------------------------------------------------------


def test_it_loads_neither_torch_nor_rich(template: Path) -> None:
    code = (
        "import sys; from fastckpt.cli.main import commands\n"
        "try: commands()\n"
        "finally: print([m for m in ('torch', 'rich') if m in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "doctor"]
    environment = {"FASTCKPT_REPOSITORY": str(template)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode in (0, 3), result.stderr
    assert result.stderr == "[]\n"


def test_on_a_terminal_the_verdicts_have_colours(template: Path) -> None:
    ours, theirs = os.openpty()
    with subprocess.Popen([FASTCKPT, "doctor", template], stdout=theirs, stderr=theirs) as child:
        os.close(theirs)
        output = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # what Linux says at the end
                break
            if not piece:
                break
            output += piece
        assert child.wait(timeout=60) in (0, 3)
    os.close(ours)
    assert b"\x1b[32mok" in output
    assert b"create if absent" in output
