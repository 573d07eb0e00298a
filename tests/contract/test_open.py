"""open_store takes the URLs it documents and repeats no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastckpt.storage.local import LocalStore
from fastckpt.storage.memory import memory_store
from fastckpt.storage.open import open_store


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("/data/run", "file:///data/run"),
        ("file:///data/run", "file:///data/run"),
        ("FILE://localhost/data/run", "file:///data/run"),
        ("file:///data/a%20b%23%25", "file:///data/a%20b%23%25"),
        ("/data/a b#%", "file:///data/a%20b%23%25"),
        ("file:///data/%ff", "file:///data/%FF"),
        ("file:///home/a@b/c", "file:///home/a%40b/c"),
        ("/data/link/../run", "file:///data/link/../run"),
        ("memory://open/test", "memory://open/test"),
    ],
)
def test_a_url_opens_the_store_it_names_and_so_does_the_stores_own_url(url, opened):
    assert open_store(url).url == opened
    assert open_store(opened).url == opened


def test_a_relative_path_is_below_the_working_directory_of_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = open_store(Path("run/1"))
    monkeypatch.chdir("/")
    assert isinstance(store, LocalStore)
    store.create("a", b"x")
    assert (tmp_path / "run" / "1" / "a").read_bytes() == b"x"


def test_a_tilde_is_neither_expanded_nor_made_a_folder():
    with pytest.raises(ValueError, match="expand it"):
        open_store("~/run")


def test_opening_creates_nothing(tmp_path):
    store = open_store(str(tmp_path / "new"))
    assert list(store.list("")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_memory_url_opens_the_same_store_every_time():
    assert open_store("memory://open/same") is memory_store("open/same")


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://bucket", "https://host/x"])
def test_another_scheme_is_refused_with_what_is_supported(url):
    scheme = url.partition(":")[0]
    with pytest.raises(ValueError, match=rf"'{scheme}'.*file:///absolute/path, memory://name and plain paths"):
        open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "file://user:hunter2@/data",
        "file://user:hunter2@localhost/data",
        "file:///data?token=hunter2",
        "file:///data#hunter2",
        "file://hunter2/data",
        "file:///data/%zzhunter2",
        "file:hunter2",
        "memory://user:hunter2@name",
        "memory://name?hunter2",
        "memory://hunter2 ",
        "s3://key:hunter2@bucket/run",
        "s3://bucket/run?signature=hunter2",
        "user:hunter2@host://data",
        "user_hunter2://data",
    ],
)
def test_a_refused_url_is_not_repeated(url):
    with pytest.raises(ValueError) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "url", ["", "file://", "file://localhost", "file://relative/path", "memory://", "memory:x", "a\0b"]
)
def test_what_names_no_place_is_refused(url):
    with pytest.raises(ValueError):
        open_store(url)
