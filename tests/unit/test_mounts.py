"""Which file system holds a path is read from the table of mounts; only what is known is shown of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastckpt.storage import mounts

TABLE = r"""
22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw
23 22 0:5 / /data rw shared:1 - nfs4 secret-user:secret-pass@server:/x rw,soft,username=secret
24 22 0:6 / /data\040two rw - xfs /dev/sdb rw
25 22 0:7 / /data/scratch rw - tmpfs tmpfs rw,size=1m
26 22 8:2 / /data/scratch rw - ext4 /dev/sdc rw,nobarrier,data=writeback
nonsense
27 22 0:8 / /box rw - overlay overlay rw,lowerdir=/secret,volatile
28 22 0:9 / /f rw - fuse.sshfs secret@host:/ rw
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "mountinfo").write_text(TABLE.lstrip())
    return tmp_path / "mountinfo"


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/nowhere/x", "/", "ext4"),
        ("/database", "/", "ext4"),
        ("/data", "/data", "nfs4"),
        ("/data/run", "/data", "nfs4"),
        ("/data two/run", "/data two", "xfs"),
        ("/data/scratch/run", "/data/scratch", "ext4"),
    ],
)
def test_the_longest_and_latest_mount_holds_a_path(table: Path, path: str, point: str, kind: str) -> None:
    mount = mounts.mount_of(path, table)
    assert mount is not None
    assert (mount.point, mount.type) == (point, kind)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/data", ["network file system", "soft"]),
        ("/data/scratch", ["nobarrier", "data=writeback"]),
        ("/box", ["container", "volatile"]),
        ("/f", ["process"]),
    ],
)
def test_what_cannot_be_durable_is_a_warning_and_no_secret_is_shown(table: Path, path: str, words: list[str]) -> None:
    finding = mounts.file_system(path, table)
    assert finding.state == "warn"
    assert finding.change
    assert all(word in finding.what for word in words)
    assert "secret" not in str(finding)


def test_a_disk_is_no_warning(table: Path) -> None:
    assert mounts.file_system("/data two", table).state == "ok"


def test_where_there_is_no_table_the_file_system_is_unknown(tmp_path: Path) -> None:
    assert mounts.mount_of("/", tmp_path / "none") is None
    assert mounts.file_system("/", tmp_path / "none").state == "ok"
