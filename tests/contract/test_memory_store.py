"""MemoryStore keeps the contract of stores."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastckpt.errors import ObjectExists, StorageError
from fastckpt.storage.memory import MemoryStore, memory_store
from fastckpt.storage.store import Store
from fastckpt.testing import StoreContract


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def make_store(self) -> Callable[[], Store]:
        store = MemoryStore("test")
        return lambda: store

    def raw_write(self, store: Store, name: str, data: bytes) -> None:
        assert isinstance(store, MemoryStore)
        store._add(name, bytearray(data))

    def raw_read(self, store: Store, name: str) -> bytes:
        assert isinstance(store, MemoryStore)
        return bytes(store._objects[name])


def test_an_unfinished_object_is_visible_as_far_as_it_was_written():
    store = MemoryStore("test")
    writer = store.write("a")
    writer.append(b"abc")
    assert store.read("a", size_max=3) == b"abc"
    assert [info.size for info in store.list("")] == [3]


def test_a_name_means_one_store_in_the_process():
    memory_store("test/one").create("a", b"x")
    assert memory_store("test/one").size("a") == 1
    assert list(memory_store("test/two").list("")) == []
    assert memory_store("test/one").url == "memory://test/one"


def test_no_object_is_a_directory_of_another():
    store = MemoryStore("test")
    store.create("a", b"x")
    with pytest.raises(StorageError, match="'a' is an object"):
        store.create("a/b", b"x")
    store.create("c/d/e", b"x")
    with pytest.raises(ObjectExists):
        store.create("c/d", b"x")
    store.delete("c/d/e")
    store.create("c/d", b"x")


def test_a_deleted_object_cannot_be_finished():
    store = MemoryStore("test")
    writer = store.write("a")
    store.delete("a")
    with pytest.raises(StorageError, match="deleted"):
        writer.finish()
    with pytest.raises(ValueError, match="nothing may follow"):
        writer.append(b"x")


def test_abandon_does_not_remove_what_others_put_in_its_place():
    store = MemoryStore("test")
    writer = store.write("a")
    store.delete("a")
    store.create("a", b"other")
    writer.abandon()
    assert store.read("a", size_max=5) == b"other"
