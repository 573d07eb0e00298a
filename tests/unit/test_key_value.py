"""The job's key-value store behind calls that come back: connections are used again, but not after an error."""

from __future__ import annotations

from typing import Any

import pytest

from fastckpt import CommitTimeout
from fastckpt.job.group import StoreKeyValue


class Server:
    """A torch ``Store``, and the clones made of it."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.clones: list[Connection] = []

    def clone(self) -> Connection:
        self.clones.append(Connection(self))
        return self.clones[-1]


class Connection:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.broken = False

    def set(self, key: str, value: bytes) -> None:
        if self.broken:
            raise RuntimeError("Broken pipe")
        self.server.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.server.values for key in keys)

    def get(self, key: str) -> Any:
        return self.server.values[key]


def test_one_connection_serves_one_call_after_the_other() -> None:
    server = Server()
    kv = StoreKeyValue(server, 20)
    for number in range(5):
        kv.set("key", bytes([number]))
        assert kv.get("key", 0) == bytes([number])
        assert kv.get("another", 0) is None
    assert len(server.clones) == 1


def test_a_connection_that_failed_is_not_used_again() -> None:
    server = Server()
    kv = StoreKeyValue(server, 20)
    kv.set("key", b"1")
    server.clones[0].broken = True
    with pytest.raises(CommitTimeout, match="RuntimeError: Broken pipe"):
        kv.set("key", b"2")
    kv.set("key", b"3")
    assert len(server.clones) == 2


def test_a_forked_child_does_not_speak_over_its_parents_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    kv = StoreKeyValue(server, 20)
    kv.set("key", b"1")
    monkeypatch.setattr("os.getpid", lambda: -1)
    kv.set("key", b"2")
    assert len(server.clones) == 2
