"""The ranks that save together, and the one thing they do: exchange.

An exchange has a leader. Every member posts some bytes or an error; the leader looks at all of them and answers; every
member gets the answer or the error. Exchanges nest, so that ranks speak to their node's leader and leaders to the
coordinator. No collectives: exchanges run on any thread, over a key-value store that is the group's own.
"""

from __future__ import annotations

import builtins
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec

from fastckpt import errors
from fastckpt.errors import CommitTimeout, FastckptError, RankFailed, SnapshotDamaged, StorageError

log = logging.getLogger("fastckpt")

Reply: TypeAlias = bytes | BaseException
"""What a member posts: bytes, or the error that kept it from having some."""
Decide: TypeAlias = Callable[[dict[int, Reply]], bytes]


ANSWER_SECONDS = 3.0
"""How much longer than for the others' replies a rank waits for the coordinator's answer, at most."""


@dataclass(frozen=True)
class Deadline:
    """Until when an exchange waits, on ``time.monotonic()``."""

    replies: float
    answer: float
    """Later than ``replies``, so that the leader's answer, which names the missing, still arrives."""


class Group(Protocol):
    """The ranks of a job as one of them sees it. Any thread may call ``exchange``."""

    rank: int
    size: int
    nodes: tuple[int, ...]
    """For each rank its node; nodes are numbered 0, 1, ... by their lowest rank."""
    host: str
    """A name or address by which ranks of other nodes reach this rank's."""

    def exchange(
        self, name: str, reply: Reply, decide: Decide, *, members: Sequence[int], until: Deadline, what: str
    ) -> bytes:
        """Posts ``reply`` under ``name``, which the members use once; returns what the leader's ``decide`` returned.

        ``members`` is sorted and holds this rank; the first is the leader, on which ``decide`` gets every member's
        reply by rank. What ``decide`` raises is raised on all members, as ``as_told`` has it. The leader waits until
        ``until.replies`` and then hands ``decide`` a ``CommitTimeout`` in place of each missing reply; a member that
        has no answer by ``until.answer`` raises ``CommitTimeout``. ``what`` says in errors what was being waited for.
        """

    def post(self, name: str, data: bytes) -> None:
        """Leaves ``data`` under ``name`` for any rank to see, in place of what was there. Any thread may call."""

    def posted(self, name: str) -> bytes | None:
        """What was posted last under ``name``, by any rank; None, without waiting, if nothing was."""

    def withdraw(self, name: str) -> None:
        """Removes what was posted under ``name``. Only for names that no rank but this one may be looking at."""


class SoloGroup:
    """A group of one."""

    rank: int = 0
    size: int = 1
    nodes: tuple[int, ...] = (0,)
    host: str = "localhost"

    def __init__(self) -> None:
        self._posted: dict[str, bytes] = {}

    def exchange(
        self, name: str, reply: Reply, decide: Decide, *, members: Sequence[int], until: Deadline, what: str
    ) -> bytes:
        return decide({0: reply})

    def post(self, name: str, data: bytes) -> None:
        self._posted[name] = data

    def posted(self, name: str) -> bytes | None:
        return self._posted.get(name)

    def withdraw(self, name: str) -> None:
        self._posted.pop(name, None)


class KeyValue(Protocol):
    """The key-value store of a job. Any thread may call; no call may block much longer than it is told to."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, seconds: float) -> bytes | None:
        """The value, waiting for it up to ``seconds``; None if it did not come."""

    def delete(self, keys: Sequence[str]) -> None: ...


class KeyValueGroup:
    """A group over a key-value store."""

    def __init__(
        self, kv: KeyValue, rank: int, size: int, prefix: str, node: str, seconds_max: float, host: str = "localhost"
    ) -> None:
        """All ranks construct theirs with the same ``prefix``; ``node`` is equal on ranks of the same node and only
        there; ``host`` is a name or address of it. Waits for all of them, up to ``seconds_max``; ``CommitTimeout``
        names those that did not come."""
        self._kv = kv
        self._prefix = prefix
        self._unread: dict[int, list[str]] = {}
        """For each member of an exchange that was late, what may be left of it: it may have stopped waiting."""
        self.rank = rank
        self.size = size
        self.host = host
        everyone = range(size)
        answer = self.exchange(
            "nodes",
            node.encode(),
            lambda replies: msgspec.msgpack.encode(_number_nodes(checked(replies))),
            members=everyone,
            until=Deadline(time.monotonic() + seconds_max, time.monotonic() + seconds_max + 2),
            what="all ranks to create their Checkpointer",
        )
        self.nodes: tuple[int, ...] = tuple(msgspec.msgpack.decode(answer, type=list[int]))

    def exchange(
        self, name: str, reply: Reply, decide: Decide, *, members: Sequence[int], until: Deadline, what: str
    ) -> bytes:
        leader = members[0]
        base = f"{self._prefix}/{name}/{leader}"
        if self.rank != leader:
            # The answer is the last use of this member's keys: it deletes its own reply and, being asked to, nothing
            # else; the leader's answer is counted down by whoever reads it.
            self._kv.set(f"{base}/reply/{self.rank}", encode_reply(reply))
            answer = self._get(f"{base}/answer/{self.rank}", until.answer)
            self._kv.delete([f"{base}/reply/{self.rank}", f"{base}/answer/{self.rank}"])
            if answer is None:
                raise CommitTimeout(
                    f"rank {self.rank} had no answer from rank {leader} while waiting for {what}; look at the log of "
                    f"rank {leader}: it may have died, stopped, or be stuck in its storage",
                    [leader],
                )
            return _raise_or_return(decode_reply(answer))
        replies: dict[int, Reply] = {leader: reply}
        for member in members[1:]:
            data = self._get(f"{base}/reply/{member}", until.replies)
            if data is None:
                replies[member] = CommitTimeout(f"rank {member} was not heard of while waiting for {what}", [member])
            else:
                replies[member] = decode_reply(data)
                if member in self._unread:  # it has gone on to this exchange, and reads of earlier ones no more
                    self._kv.delete(self._unread.pop(member))
        outcome: Reply
        try:
            outcome = decide(replies)
        except Exception as error:
            outcome = as_told(error)
        data = encode_reply(outcome)
        for member in members[1:]:
            if time.monotonic() >= until.replies:
                self._unread.setdefault(member, []).extend([f"{base}/reply/{member}", f"{base}/answer/{member}"])
            self._kv.set(f"{base}/answer/{member}", data)
        return _raise_or_return(outcome)

    def post(self, name: str, data: bytes) -> None:
        self._kv.set(f"{self._prefix}/posted/{name}", data)

    def posted(self, name: str) -> bytes | None:
        return self._kv.get(f"{self._prefix}/posted/{name}", 0.0)

    def withdraw(self, name: str) -> None:
        self._kv.delete([f"{self._prefix}/posted/{name}"])

    def _get(self, key: str, deadline: float) -> bytes | None:
        return self._kv.get(key, max(0.0, deadline - time.monotonic()))


def _raise_or_return(reply: Reply) -> bytes:
    if isinstance(reply, BaseException):
        raise reply
    return reply


def _number_nodes(identities: Mapping[int, bytes]) -> list[int]:
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(identities[rank], len(numbers)) for rank in sorted(identities)]


class PeerGaveUp(CommitTimeout):
    """Another rank has failed, and tells all ranks itself why."""


def gave_up(teller: int, blamed: int, own: int) -> CommitTimeout:
    """For what rank ``teller`` said to rank ``own``: that it does not go on, because of rank ``blamed``."""
    if blamed in (teller, own):
        return PeerGaveUp(f"rank {teller} does not go on with the restore", [teller])
    return CommitTimeout(f"rank {blamed} does not go on with the restore, says rank {teller}", [blamed])


def missing_ranks_error(ranks: Sequence[int], what: str) -> CommitTimeout:
    """For ranks that were not heard of in time."""
    return CommitTimeout(f"{_ranks(ranks)} not heard of while waiting for {what} (missing: {_ranks(ranks)})", ranks)


def checked(replies: Mapping[int, Reply]) -> dict[int, bytes]:
    """The replies if all are bytes; otherwise the error that tells what went wrong, naming the ranks."""
    failures = {rank: reply for rank, reply in sorted(replies.items()) if isinstance(reply, BaseException)}
    if failures:
        raise combined(failures)
    return {rank: reply for rank, reply in replies.items() if isinstance(reply, bytes)}


def combined(failures: Mapping[int, BaseException]) -> FastckptError:
    """One error for many ranks: ``CommitTimeout`` if the only thing wrong is that some are missing."""
    missing = [error for error in failures.values() if isinstance(error, CommitTimeout)]
    if len(missing) == len(failures):
        ranks = sorted({rank for error in missing for rank in error.missing_ranks})
        text = next(filter(None, map(str, missing)), "")  # none where a rank has nothing to say but what others do
        is_complete = not (ranks and text) or "(missing: " in text
        return CommitTimeout(text if is_complete else f"{text} (missing: {_ranks(ranks)})", ranks)
    real = {rank: error for rank, error in failures.items() if not isinstance(error, CommitTimeout)} or dict(failures)
    # A RankFailed from a node's leader names the ranks that truly failed; it is not a failure of the leader.
    failed: dict[int, BaseException] = {}
    for rank, error in real.items():
        failed.update(error.failures if isinstance(error, RankFailed) and error.failures else {rank: error})
    text = "; ".join(f"rank {rank}: {_named(error)}" for rank, error in sorted(failed.items())[:8])
    more = f"; and {len(failed) - 8} more" if len(failed) > 8 else ""
    return RankFailed(f"{_ranks(sorted(failed))} failed: {text}{more}", failed)


def _named(error: BaseException) -> str:
    return str(error) if type(error) is FastckptError else f"{type(error).__name__}: {error}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:16]) + (", ..." if len(ranks) > 16 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


@dataclass(frozen=True)
class Assembly:
    """How ranks speak to the coordinator: each to the leader of its node, leaders to rank 0."""

    group: Group

    @property
    def node_ranks(self) -> list[int]:
        """The ranks of this rank's node."""
        group = self.group
        return [rank for rank, node in enumerate(group.nodes) if node == group.nodes[group.rank]]

    @property
    def leaders(self) -> list[int]:
        """The lowest rank of each node, in order of node."""
        firsts: dict[int, int] = {}
        for rank, node in enumerate(self.group.nodes):
            firsts.setdefault(node, rank)
        return [firsts[node] for node in sorted(firsts)]

    def ask(
        self,
        name: str,
        reply: Reply,
        decide: Callable[[dict[int, bytes]], bytes],
        *,
        seconds: float,
        what: str,
    ) -> bytes:
        """Gathers every rank's reply at the coordinator, through the node leaders; ``decide`` sees all of them by rank.
        Returns its answer on every rank. If any rank posted an error or stayed away, every rank raises that."""
        return self.ask_in_two(
            name, reply, lambda replies: encode_many(checked(replies)), _joined(decide), seconds, what
        )

    def ask_in_two(
        self,
        name: str,
        reply: Reply,
        at_leader: Decide,
        at_coordinator: Decide,
        seconds: float,
        what: str,
    ) -> bytes:
        """Like ``ask``, but each node's leader turns its node's replies into one line of its own, and the coordinator
        sees one line a node, by leader. Both get errors in place of replies, and raise (``checked``) to report them."""
        end = time.monotonic() + seconds

        def up(replies: dict[int, Reply]) -> bytes:
            line: Reply
            try:
                line = at_leader(replies)
            except Exception as error:
                line = error
            return self.group.exchange(
                f"{name}/top",
                line,
                at_coordinator,
                members=self.leaders,
                until=Deadline(end + 0.75, end + 2.0),
                what=what,
            )

        # Each level waits a little longer than the one below, whose error, naming the missing ranks, it is to see.
        until = Deadline(end, end + ANSWER_SECONDS)
        return self.group.exchange(f"{name}/node", reply, up, members=self.node_ranks, until=until, what=what)


def _joined(decide: Callable[[dict[int, bytes]], bytes]) -> Decide:
    def at_coordinator(lines: dict[int, Reply]) -> bytes:
        return decide({rank: reply for line in checked(lines).values() for rank, reply in decode_many(line).items()})

    return at_coordinator


def encode_many(replies: Mapping[int, bytes]) -> bytes:
    return msgspec.msgpack.encode(dict(replies))


def decode_many(data: bytes) -> dict[int, bytes]:
    return msgspec.msgpack.decode(data, type=dict[int, bytes])


class _Wire(msgspec.Struct, array_like=True):
    data: bytes | None
    error: str = ""
    message: str = ""
    ranks: list[int] = []
    failures: list[tuple[int, bytes]] = []
    where: tuple[str | None, str | None, str | None, int | None] = (None, None, None, None)
    transient: bool = False


def encode_reply(reply: Reply) -> bytes:
    """A reply as bytes. Errors travel as name and message, rebuilt from a closed table: no pickle."""
    if isinstance(reply, bytes):
        return msgspec.msgpack.encode(_Wire(reply))
    text = str(reply).encode("utf-8", "backslashreplace").decode()  # a file name need not be UTF-8
    wire = _Wire(None, type(reply).__name__, text)
    if isinstance(reply, CommitTimeout):
        wire.ranks = list(reply.missing_ranks)
    if isinstance(reply, RankFailed):
        wire.failures = [(rank, encode_reply(error)) for rank, error in reply.failures.items()]
    if isinstance(reply, SnapshotDamaged):
        wire.where = (reply.key, reply.shard, reply.object, reply.offset)
    if isinstance(reply, StorageError):
        wire.transient = reply.transient
    return msgspec.msgpack.encode(wire)


def decode_reply(data: bytes) -> Reply:
    wire = msgspec.msgpack.decode(data, type=_Wire)
    if wire.data is not None:
        return wire.data
    if wire.error == "CommitTimeout":
        return CommitTimeout(wire.message, wire.ranks)
    if wire.error == "RankFailed":
        failures = {rank: decode_reply(error) for rank, error in wire.failures}
        return RankFailed(wire.message, {r: error for r, error in failures.items() if isinstance(error, BaseException)})
    if wire.error == "SnapshotDamaged":
        key, shard, name, offset = wire.where
        return SnapshotDamaged(wire.message, key=key, shard=shard, object=name, offset=offset)
    error = _rebuilt(wire.error, wire.message)
    if isinstance(error, StorageError):
        error.transient = wire.transient
    return error


def _rebuilt(name: str, message: str) -> BaseException:
    kind = getattr(errors, name, None) or (
        getattr(builtins, name, None) if name in ("ValueError", "TypeError") else None
    )
    if isinstance(kind, type) and issubclass(kind, FastckptError | ValueError | TypeError):
        return kind(message)
    return FastckptError(f"{name}: {message}")


def as_told(error: BaseException) -> BaseException:
    """An error as other ranks are told it. Of what is neither ours nor an argument's they get the name, in a
    ``FastckptError``: which kind that is for the user, whoever asked them something knows."""
    if isinstance(error, FastckptError | ValueError | TypeError):
        return error
    told = FastckptError(f"{type(error).__name__}: {error}")
    told.__cause__ = error
    return told
