"""Runs that a rank of one node gives to ranks of others, over TCP: one reads them from storage, the others fetch.

A rank that reads for other nodes listens; whoever wants a run of it connects, shows the token of this restore, and asks
for one run after the other. An answer comes when the run has been read; until then a sign of life comes every
``BEAT_SECONDS``, so that a process that waits is told from one that is lost. Who gives up says so to all with whom it
exchanges anything, and whom it blames; who has all that it wants says that too. A connection that ends otherwise is a
rank that is lost.

Nothing that comes over the network is believed: whoever fetches a run verifies it like one that it has read.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fastckpt.errors import CommitTimeout, RestoreError
from fastckpt.group import gave_up

BEAT_SECONDS = 1.0
CONNECT_SECONDS = 20.0
"""A refusal comes at once; silence is a firewall, or a node that is gone."""
BACKLOG = 1024
"""Ranks that may connect before they are let in; all of a large job come at once."""
STRANGERS_MAX = 4096
"""Connections that have not shown the token; beyond that, new ones are refused."""
PAUSE_SECONDS = 0.05
TOKEN_BYTES = 16

_HELLO = struct.Struct(f"<{TOKEN_BYTES}sII")  # token, rank, node
_ASK = struct.Struct("<II")
"""A ``RunName``; or ``_GAVE_UP`` and a rank; or ``_DONE``."""
_ANSWER = struct.Struct("<BI")
_BEAT, _BYTES, _BLAMED = range(3)
_GAVE_UP, _DONE = 2**32 - 1, 2**32 - 2
_OWN_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


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
        self._strangers = 0
        self._asked: dict[int, int] = {}
        """The rank of each node that asked last."""
        self.answers = 0
        """Runs that were given away."""
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
    def late(self) -> dict[int, int | None]:
        """The nodes that have not fetched what is there for them, with the rank that asked for runs there, if any."""
        with self._changed:
            nodes = {node for waiting in self._published.values() for node in waiting.nodes}
            return {node: self._asked.get(node) for node in sorted(nodes)}

    def check(self) -> None:
        """``CommitTimeout`` if a rank that has yet to fetch something was lost, or has given up."""
        with self._changed:
            if self._lost is not None:
                raise self._lost

    def give_up(self, blamed: int) -> None:
        """Tells all who ask that nothing more will come, since rank ``blamed`` does not go on."""
        with self._changed:
            self._blamed = blamed if self._blamed is None else self._blamed
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all connections; the buffers are used no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            connections = list(self._connections)
        _shut(self._listener)
        self._listener.close()
        for connection in connections:
            _shut(connection)
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, CONNECT_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed; or there are no descriptors at the moment, or who connected is gone already
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, PAUSE_SECONDS):
                        return
                continue
            with self._changed:
                is_welcome = not self._closed and self._strangers < STRANGERS_MAX
                if is_welcome:
                    self._connections.add(connection)
                    self._strangers += 1
                    self._changed.notify_all()
            try:
                if is_welcome:
                    serving = threading.Thread(
                        target=self._serve, args=(connection,), name="fastckpt-fanout", daemon=True
                    )
                    serving.start()
                    continue
            except RuntimeError:  # no thread is to be had
                with self._changed:
                    self._connections.discard(connection)
                    self._strangers -= 1
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        rank = node = -1
        try:
            try:
                connection.settimeout(CONNECT_SECONDS)
                token, rank, node = _HELLO.unpack(_received(connection, _HELLO.size))
                if not hmac.compare_digest(token, self._token):
                    rank = node = -1
                    return
            finally:
                with self._changed:
                    self._strangers -= 1
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                connection.settimeout(None)  # between two runs it may have to wait for ranks of its own node
                position, portion = _ASK.unpack(_received(connection, _ASK.size))
                connection.settimeout(self._seconds_max)
                if position == _GAVE_UP:
                    self._lose(node, gave_up(rank, portion, self._rank))
                    return
                if position == _DONE:
                    return
                with self._changed:
                    self._asked[node] = rank
                if not self._answer(connection, RunName(position, portion), node):
                    return
        except (OSError, EOFError) as error:
            self._lose(node, _last_words(connection, rank, self._rank, error))
        finally:
            with self._changed:
                connection.close()
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
            self.answers += 1
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
        self._known: set[int] = set()
        """Readers that have heard of this rank."""
        self._closed = False

    def fetch(self, reader: int, name: RunName, views: Sequence[memoryview]) -> None:
        """Fills the buffers with the bytes of a run. ``CommitTimeout`` naming the rank that is lost, or that keeps the
        others from going on; ``RestoreError`` if this process may open no more connections."""
        connection: socket.socket | None = None
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
        except BaseException as error:
            if connection is not None:
                with self._lock:
                    self._open.discard(connection)
                    connection.close()
            if not isinstance(error, OSError | EOFError):
                raise
            host, port = self._addresses[reader]
            what = f"rank {self._rank} cannot fetch from rank {reader}, at {host} port {port}: {error or 'no answer'}"
            if isinstance(error, OSError) and error.errno in _OWN_FAULTS:
                raise RestoreError(f"{what}. Raise the limits that the job runs under") from error
            raise CommitTimeout(
                f"{what}. If rank {reader} is not lost, ranks of these nodes may not connect to each other; then use "
                "Options(read_fanout='node')",
                [reader],
            ) from error
        with self._lock:
            self._idle.setdefault(reader, []).append(connection)

    def _connection(self, reader: int) -> socket.socket:
        with self._lock:
            self._check_open()
            if idle := self._idle.get(reader):
                return idle.pop()
        connection = self._connected(reader, min(CONNECT_SECONDS, self._seconds_max))
        connection.settimeout(self._seconds_max)
        try:
            with self._lock:
                self._check_open()
                self._open.add(connection)
        except OSError:
            connection.close()
            raise
        return connection

    def _connected(self, reader: int, seconds_max: float) -> socket.socket:
        connection = socket.create_connection(self._addresses[reader], seconds_max)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(self._hello)
        except OSError:
            connection.close()
            raise
        with self._lock:
            self._known.add(reader)
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise OSError("nothing is fetched any more")

    def close(self) -> None:
        """All is fetched: ends all connections. ``fetch`` fails where it is under way."""
        self._end(_ASK.pack(_DONE, 0))

    def give_up(self, blamed: int) -> None:
        """Tells all ranks that this one fetches from that it fetches nothing more, because of rank ``blamed``, and ends
        all connections."""
        last = _ASK.pack(_GAVE_UP, blamed)
        self._end(last)
        with self._lock:
            others = [reader for reader in self._addresses if reader not in self._known]
            self._known.update(others)

        def tell() -> None:
            for reader in others:
                with contextlib.suppress(OSError), self._connected(reader, BEAT_SECONDS) as connection:
                    connection.sendall(last)

        with contextlib.suppress(RuntimeError):  # no thread is to be had: they hear of it when all ranks do
            threading.Thread(target=tell, name="fastckpt-fanout", daemon=True).start()

    def _end(self, last: bytes) -> None:
        with self._lock:
            self._closed = True
            idle = {connection for connections in self._idle.values() for connection in connections}
            self._idle.clear()
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.sendall(last)  # also where an answer is being waited for
                _shut(connection)
            for connection in idle:  # of the others, who fetches is the owner
                connection.close()
            self._open -= idle


def _last_words(connection: socket.socket, rank: int, own: int, error: Exception) -> CommitTimeout:
    """What a rank said before its connection broke, while it was being answered."""
    with contextlib.suppress(OSError, struct.error):
        connection.settimeout(0)
        position, blamed = _ASK.unpack(connection.recv(_ASK.size))
        if position == _GAVE_UP:
            return gave_up(rank, blamed, own)
    return CommitTimeout(f"rank {rank} was lost while it fetched what this rank read: {error}", [rank])


def _shut(connection: socket.socket) -> None:
    """Wakes who waits for it. Whose it is closes it: its number may be another file's as soon as that is done."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


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
