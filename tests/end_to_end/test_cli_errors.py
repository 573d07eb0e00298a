"""Errors as a stranger reads them: each says what happened, where, and what to do next."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner

import fastckpt
from fastckpt.cli.main import commands
from fastckpt.repository import export, repository
from fastckpt.storage.open import open_store


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors") / "repository"
    with fastckpt.Checkpointer(str(path), options=fastckpt.Options(chunk_bytes=4096)) as checkpointer:
        checkpointer.save(1, {"w": torch.arange(5000.0)})
    return path


@pytest.fixture
def repo(template: Path, tmp_path: Path) -> Path:
    """A copy, to harm."""
    return Path(shutil.copytree(template, tmp_path / "repository"))


class Told(NamedTuple):
    """What has to be in the message."""

    code: int
    what: str
    where: str
    next: str


def told(expected: Told, *args: object) -> None:
    result = CliRunner().invoke(commands, [str(arg) for arg in args])
    assert result.exit_code == expected.code, result.output
    message = result.stderr.splitlines()[0]
    assert message.startswith("fastckpt: ")
    assert [words for words in expected[1:] if words not in message] == [], message


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda repo: next(repo.glob(pattern)).unlink()


def grow(pattern: str) -> Callable[[Path], None]:
    return lambda repo: os.truncate(next(repo.glob(pattern)), 10**9)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (shutil.rmtree, Told(10, "there is nothing there", "{repo}", "check the URL")),
        (remove("FORMAT"), Told(10, "its FORMAT object is missing", "{repo}", "put it back from a copy")),
        (grow("FORMAT"), Told(14, "has 1000000000 bytes, more than", "FORMAT", "fastckpt verify")),
        (remove("attempts/*/index"), Told(14, "is missing", "step 1: attempts/", "Restore an earlier step")),
        (remove("layouts/*"), Told(14, "is missing", "step 1: layouts/", "fastckpt verify --all")),
        (remove("packs/*/*/*.pack"), Told(14, "is missing", "step 1: w", "Restore an earlier step")),
    ],
)
def test_a_harmed_repository(repo: Path, tmp_path: Path, harm: Callable[[Path], None], expected: Told) -> None:
    harm(repo)
    expected = expected._replace(where=expected.where.format(repo=repo))
    told(expected, "restore", repo, "--to", tmp_path / "out")


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("x")
    told(Told(10, "it holds notes, but no FORMAT", str(tmp_path), "give a repository"), "ls", tmp_path)


def test_a_repository_without_snapshots(tmp_path: Path) -> None:
    repository.create(open_store(str(tmp_path / "r")), 4096)
    told(Told(13, "holds no snapshot yet", str(tmp_path / "r"), "no save was committed"), "show", tmp_path / "r")


def test_keys_that_are_not_there(template: Path, tmp_path: Path) -> None:
    expected = Told(2, "no key of step 1 matches", "--only", "`fastckpt show` lists them")
    told(expected, "restore", template, "--only", "x*", "--to", tmp_path / "out")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_the_file(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(export.os, "posix_fallocate", full)
    target = tmp_path / "out.safetensors"
    told(Told(16, os.strerror(code), str(target), "the whole file takes 20"), "restore", template, "--to", target)
    assert os.listdir(tmp_path) == []


def test_slices_that_cannot_be_read(template: Path) -> None:
    snapshot = fastckpt.open(str(template)).snapshot()
    with pytest.raises(IndexError, match=r"2 slices for a tensor of shape \[5000\]; give at most one a dimension"):
        snapshot.read("w", (slice(0, 1), slice(0, 1)))
    with pytest.raises(IndexError, match="read the whole range and slice the array"):
        snapshot.read("w", slice(0, 10, 2))
