"""What a rank of one node gives to ranks of others: to those who show the token, and to each what it asks for, once."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from fastckpt.errors import CommitTimeout
from fastckpt.group import PeerGaveUp
from fastckpt.repository.peers import TOKEN_BYTES, Client, RunName, Server

TOKEN = secrets.token_bytes(TOKEN_BYTES)
FIRST, SECOND = RunName(1, 0), RunName(2, 0)
READER, FETCHER, OTHER_NODE = 4, 7, 1


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(READER, 5.0)
    server.start(TOKEN, [{OTHER_NODE}, {OTHER_NODE}])
    yield server
    server.close()


@contextlib.contextmanager
def client(port: int, token: bytes = TOKEN, seconds_max: float = 5.0) -> Iterator[Client]:
    fetching = Client({READER: ("localhost", port)}, token, FETCHER, OTHER_NODE, seconds_max)
    yield fetching
    fetching.close()


def buffers() -> list[memoryview]:
    return [memoryview(bytearray(3)), memoryview(bytearray(2))]


def test_a_run_is_fetched_once_it_is_published(server: Server) -> None:
    views = buffers()
    with client(server.port) as fetching:
        thread = threading.Thread(target=fetching.fetch, args=(READER, FIRST, views))
        thread.start()
        server.publish(FIRST, [memoryview(b"abc"), memoryview(b"de")], {OTHER_NODE})
        thread.join(10)
        assert [bytes(view) for view in views] == [b"abc", b"de"]
        server.publish(SECOND, [memoryview(b"12345")], {OTHER_NODE})
        wait_for(server, lambda: FIRST not in server._published)
        assert server.is_out(FIRST)
        assert not server.is_out(SECOND)
        assert not server.finished
        assert server.late == {OTHER_NODE: FETCHER}
        fetching.fetch(READER, SECOND, views)
        assert [bytes(view) for view in views] == [b"123", b"45"]
        wait_for(server, lambda: not server._left[OTHER_NODE])
        assert server.finished
    server.check()


def wait_for(server: Server, what: Callable[[], bool]) -> None:
    with server._changed:
        assert server._changed.wait_for(what, 10)


def test_who_has_not_the_token_gets_nothing(server: Server) -> None:
    server.publish(FIRST, [memoryview(b"abcde")], {OTHER_NODE})
    told = pytest.raises(CommitTimeout, match="rank 7 cannot fetch from rank 4, at localhost port")
    with client(server.port, bytes(TOKEN_BYTES)) as stranger, told as caught:
        stranger.fetch(READER, FIRST, buffers())
    assert caught.value.missing_ranks == (READER,)
    assert not server.is_out(FIRST)
    server.check()  # and nobody is taken to be lost for it


def test_who_only_connects_keeps_nobody_waiting(server: Server) -> None:
    server.publish(FIRST, [memoryview(b"abcde")], {OTHER_NODE})
    with socket.create_connection(("localhost", server.port)), client(server.port) as fetching:
        fetching.fetch(READER, FIRST, buffers())


def test_a_run_of_another_size_is_refused(server: Server) -> None:
    server.publish(FIRST, [memoryview(b"abcdef")], {OTHER_NODE})
    with client(server.port) as fetching, pytest.raises(CommitTimeout, match="does not speak as it should"):
        fetching.fetch(READER, FIRST, buffers())


@pytest.mark.parametrize(("blamed", "kind"), [(READER, PeerGaveUp), (2, CommitTimeout), (FETCHER, PeerGaveUp)])
def test_a_reader_that_gives_up_tells_who_waits_for_it(server: Server, blamed: int, kind: type[CommitTimeout]) -> None:
    server.give_up(blamed)
    with client(server.port) as fetching, pytest.raises(CommitTimeout) as caught:
        fetching.fetch(READER, FIRST, buffers())
    assert type(caught.value) is kind
    assert caught.value.missing_ranks == (2 if blamed == 2 else READER,)


@pytest.mark.parametrize(("blamed", "kind"), [(FETCHER, PeerGaveUp), (2, CommitTimeout), (None, CommitTimeout)])
def test_a_reader_hears_of_a_fetcher_that_gives_up_or_is_lost(
    server: Server, blamed: int | None, kind: type[CommitTimeout]
) -> None:
    server.publish(FIRST, [memoryview(b"abcde")], {OTHER_NODE})
    with client(server.port) as fetching:
        fetching.fetch(READER, FIRST, buffers())
        if blamed is None:
            for connection in fetching._open:  # as the system does for a process that is gone
                connection.close()
        else:
            fetching.give_up(blamed)
    wait_for(server, lambda: server._lost is not None)
    with pytest.raises(CommitTimeout) as caught:
        server.check()
    assert type(caught.value) is kind
    assert caught.value.missing_ranks == (2 if blamed == 2 else FETCHER,)


def test_a_fetcher_that_has_all_it_wants_is_not_lost_although_its_node_wants_more(server: Server) -> None:
    """What another rank of the node fetches."""
    for name in (FIRST, SECOND):
        server.publish(name, [memoryview(b"abcde")], {OTHER_NODE})
        with client(server.port) as fetching:
            fetching.fetch(READER, name, buffers())
        wait_for(server, lambda: not server._connections)
        server.check()
    assert server.finished


def test_a_fetcher_that_gives_up_before_it_has_connected_is_heard(server: Server) -> None:
    with client(server.port) as fetching:
        fetching.give_up(2)
    wait_for(server, lambda: server._lost is not None)
    with pytest.raises(CommitTimeout) as caught:
        server.check()
    assert caught.value.missing_ranks == (2,)


def test_all_who_wait_hear_whom_the_reader_blames(server: Server) -> None:
    heard: list[tuple[int, ...]] = []

    def fetch() -> None:
        with client(server.port) as fetching, pytest.raises(CommitTimeout) as caught:
            fetching.fetch(READER, FIRST, buffers())
        heard.append(tuple(caught.value.missing_ranks))

    threads = [threading.Thread(target=fetch) for _ in range(20)]
    for thread in threads[:10]:
        thread.start()
    wait_for(server, lambda: len(server._connections) == 10)
    server.give_up(2)
    server.give_up(3)  # the first is the reason
    for thread in threads[10:]:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert heard == [(2,)] * 20


def test_a_silent_reader_is_named() -> None:
    late = pytest.raises(CommitTimeout, match="timed out")
    with (
        socket.create_server(("localhost", 0)) as silent,
        client(silent.getsockname()[1], seconds_max=0.2) as fetching,
        late as caught,
    ):
        fetching.fetch(READER, FIRST, buffers())
    assert caught.value.missing_ranks == (READER,)
