"""Runs that a rank of one node gives to ranks of others, over TCP: one reads them from storage, the others fetch.

A rank that reads for other nodes listens; whoever wants a run of it connects, shows the token of this restore, and asks
for one run after the other. An answer comes when the run has been read; until then a sign of life comes every
``BEAT_SECONDS``, so that a reader that waits for others is told from one that is lost. Who gives up says so to all that
are connected to it, and whom it blames.

Nothing that comes over the network is believed: whoever fetches a run verifies it like one that it has read.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fastckpt.errors import CommitTimeout
from fastckpt.group import gave_up

BEAT_SECONDS = 1.0
CONNECT_SECONDS = 20.0
"""A refusal comes at once; silence is a firewall, or a node that is gone."""
BACKLOG = 1024
"""Ranks that may connect before they are let in; all of a large job come at once."""
TOKEN_BYTES = 16

_HELLO = struct.Struct(f"<{TOKEN_BYTES}sII")  # token, rank, node
_ASK = struct.Struct("<II")
"""A ``RunName``; or ``_GAVE_UP`` and a rank."""
_ANSWER = struct.Struct("<BI")
_BEAT, _BYTES, _BLAMED = range(3)
_GAVE_UP = 2**32 - 1


class RunName(NamedTuple):
    """What all nodes call a run that is read for several of them. The order of names is the order in which all of them
    read and fetch, so that no two wait for each other."""

    position: int
    """Among the runs of its portion."""
    portion: int
    """Position in ``Fanout.carried``."""


class _Waiting:
    """A published run, and the nodes that have not fetched it."""

    def __init__(self, views: Sequence[memoryview], nodes: set[int]) -> None:
        self.views = views
        self.nodes = nodes


class Server:
    """What ranks of other nodes fetch from this one. Any thread may call."""

    def __init__(self, rank: int, seconds_max: float) -> None:
        """Listens at a port of the system's choice. ``rank``: this one. ``seconds_max``: the longest that a fetching
        rank may take for the next bytes. ``OSError`` if there is no such port."""
        if socket.has_dualstack_ipv6():
            self._listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        else:
            self._listener = socket.create_server(("", 0), backlog=BACKLOG)
        self.port: int = self._listener.getsockname()[1]
        self._rank = rank
        self._seconds_max = seconds_max
        self._changed = threading.Condition()
        self._token = b""
        self._published: dict[RunName, _Waiting] = {}
        self._left: Counter[int] = Counter()
        """Of each other node, how many runs it has not fetched."""
        self._blamed: int | None = None
        self._lost: CommitTimeout | None = None
        self._connections: set[socket.socket] = set()
        self._closed = False

    def start(self, token: bytes, expected: Iterable[Iterable[int]]) -> None:
        """Lets in who shows the token. ``expected``: for each run that will be published, the nodes that fetch it."""
        self._token = token
        for nodes in expected:
            self._left.update(nodes)
        threading.Thread(target=self._accept, name="fastckpt-fanout", daemon=True).start()

    def publish(self, name: RunName, views: Sequence[memoryview], nodes: Iterable[int]) -> None:
        """Gives the bytes to each of these nodes, once; they must not change until ``is_out`` says so."""
        with self._changed:
            self._published[name] = _Waiting(views, set(nodes))
            self._changed.notify_all()

    def is_out(self, name: RunName) -> bool:
        """Whether all nodes have fetched this published run."""
        with self._changed:
            return name not in self._published

    @property
    def finished(self) -> bool:
        with self._changed:
            return not any(self._left.values())

    @property
    def late_nodes(self) -> list[int]:
        """Those that have not fetched what is there for them."""
        with self._changed:
            return sorted({node for waiting in self._published.values() for node in waiting.nodes})

    def check(self) -> None:
        """``CommitTimeout`` if a rank that has yet to fetch something was lost, or has given up."""
        with self._changed:
            if self._lost is not None:
                raise self._lost

    def give_up(self, blamed: int) -> None:
        """Tells all who ask that nothing more will come, since rank ``blamed`` does not go on."""
        with self._changed:
            self._blamed = blamed
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all connections; the buffers are used no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            connections = list(self._connections)
        _close(self._listener)
        for connection in connections:
            _close(connection)
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, self._seconds_max)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._changed:
                if not self._closed:
                    self._connections.add(connection)
            if connection not in self._connections:
                _close(connection)
                return
            threading.Thread(target=self._serve, args=(connection,), name="fastckpt-fanout", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        rank = node = -1
        try:
            connection.settimeout(CONNECT_SECONDS)
            token, rank, node = _HELLO.unpack(_received(connection, _HELLO.size))
            if not hmac.compare_digest(token, self._token):
                rank = node = -1
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                connection.settimeout(None)  # between two runs it may have to wait for ranks of its own node
                position, portion = _ASK.unpack(_received(connection, _ASK.size))
                connection.settimeout(self._seconds_max)
                if position == _GAVE_UP:
                    self._lose(node, gave_up(rank, portion, self._rank))
                    return
                if not self._answer(connection, RunName(position, portion), node):
                    return
        except (OSError, EOFError) as error:
            self._lose(node, _last_words(connection, rank, self._rank, error))
        finally:
            connection.close()
            with self._changed:
                self._connections.discard(connection)
                self._changed.notify_all()

    def _answer(self, connection: socket.socket, name: RunName, node: int) -> bool:
        """Whether there may be another question."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: name in self._published or self._blamed is not None or self._closed, BEAT_SECONDS
                )
                waiting, blamed, closed = self._published.get(name), self._blamed, self._closed
            if blamed is not None:
                connection.sendall(_ANSWER.pack(_BLAMED, blamed))
                return False
            if closed or (waiting is not None and node not in waiting.nodes):
                return False
            if waiting is not None:
                break
            connection.sendall(_ANSWER.pack(_BEAT, 0))
        connection.sendall(_ANSWER.pack(_BYTES, sum(map(len, waiting.views))))
        for view in waiting.views:
            connection.sendall(view)
        with self._changed:
            waiting.nodes.discard(node)
            self._left[node] -= 1
            if not waiting.nodes:
                self._published.pop(name, None)
            self._changed.notify_all()
        return True

    def _lose(self, node: int, error: CommitTimeout) -> None:
        with self._changed:
            if self._left.get(node) and self._lost is None and not self._closed:
                self._lost = error
                self._changed.notify_all()


class Client:
    """Fetches runs from ranks of other nodes. Any thread may call ``fetch``."""

    def __init__(
        self, addresses: Mapping[int, tuple[str, int]], token: bytes, rank: int, node: int, seconds_max: float
    ) -> None:
        """``addresses``: host and port by rank. ``seconds_max``: the longest that one of them may be silent."""
        self._addresses = addresses
        self._hello = _HELLO.pack(token, rank, node)
        self._rank = rank
        self._seconds_max = seconds_max
        self._lock = threading.Lock()
        self._idle: dict[int, list[socket.socket]] = {}
        self._open: set[socket.socket] = set()
        self._closed = False

    def fetch(self, reader: int, name: RunName, views: Sequence[memoryview]) -> None:
        """Fills the buffers with the bytes of a run. ``CommitTimeout`` naming the rank that is lost, or that keeps the
        others from going on."""
        try:
            connection = self._connection(reader)
            connection.sendall(_ASK.pack(*name))
            while True:
                kind, number = _ANSWER.unpack(_received(connection, _ANSWER.size))
                if kind != _BEAT:
                    break
            if kind == _BLAMED:
                raise gave_up(reader, number, self._rank)
            if kind != _BYTES or number != sum(map(len, views)):
                raise OSError("it does not speak as it should")
            for view in views:
                _receive_into(connection, view)
        except (OSError, EOFError) as error:
            host, port = self._addresses[reader]
            raise CommitTimeout(
                f"rank {self._rank} cannot fetch from rank {reader}, at {host} port {port}: {error or 'no answer'}. "
                f"If rank {reader} is not lost, ranks of these nodes may not connect to each other; then use "
                "Options(read_fanout='node')",
                [reader],
            ) from error
        with self._lock:
            if not self._closed:
                self._idle.setdefault(reader, []).append(connection)

    def _connection(self, reader: int) -> socket.socket:
        with self._lock:
            self._check_open()
            if idle := self._idle.get(reader):
                return idle.pop()
        connection = socket.create_connection(self._addresses[reader], min(CONNECT_SECONDS, self._seconds_max))
        try:
            with self._lock:
                self._check_open()
                self._open.add(connection)
        except OSError:
            connection.close()
            raise
        connection.settimeout(self._seconds_max)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(self._hello)
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise OSError("nothing is fetched any more")

    def close(self, blamed: int | None = None) -> None:
        """Ends all connections; ``fetch`` fails where it is under way. ``blamed``: the rank because of which nothing
        more will be fetched, for the others to hear."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
        for connection in connections:
            if blamed is not None:
                with contextlib.suppress(OSError):
                    connection.sendall(_ASK.pack(_GAVE_UP, blamed))  # also where an answer is being waited for
            _close(connection)


def _last_words(connection: socket.socket, rank: int, own: int, error: Exception) -> CommitTimeout:
    """What a rank said before its connection broke, while it was being answered."""
    with contextlib.suppress(OSError, struct.error):
        position, blamed = _ASK.unpack(connection.recv(_ASK.size, socket.MSG_DONTWAIT))
        if position == _GAVE_UP:
            return gave_up(rank, blamed, own)
    return CommitTimeout(f"rank {rank} was lost while it fetched what this rank read: {error}", [rank])


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes who waits for it
    connection.close()


def _received(connection: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    _receive_into(connection, memoryview(data))
    return bytes(data)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the connection was closed")
        view = view[count:]
