"""The restore flow, the mirror image of save.

choose   the coordinator alone lists; every rank gets the same snapshot and the digest of its index
plan     what fits and what does not, found on every rank before anything changes on any
read     pack -> buffer -> verify -> decode -> tensor, in place; what several ranks of a node want, one of them for all,
         and if so asked, what several nodes want, one node for all
agree    one rank failed: all raise, naming it
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import msgspec

from fastckpt.buffers import Sink
from fastckpt.errors import CommitTimeout, RankFailed, RestoreError, SnapshotDamaged, StateMismatch
from fastckpt.format.decision import Live
from fastckpt.group import Assembly, Group, PeerGaveUp, Reply
from fastckpt.plan.restore_plan import Fit, Selection, Want, misfits
from fastckpt.repository import repository
from fastckpt.repository.fanout import JobFanout
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.relay import relayed
from fastckpt.storage.store import Store
from fastckpt.topology.offer import Given, Offer, agree
from fastckpt.topology.topology import Tree
from fastckpt.trace import Trace

log = logging.getLogger("fastckpt")

T = TypeVar("T")


class _Asked(msgspec.Struct, array_like=True, frozen=True):
    """What a rank wants to restore."""

    what: str
    topology: Offer
    """Where nodes read for each other: of their ways to the storage."""


_ALL = Selection()
REPORT_SHARE = 0.1
"""Of the deadline: how long a rank that has waited for another already waits until all know."""


class Restores:
    """The restores of one rank from one repository. On the main thread, by all ranks in the same order."""

    def __init__(
        self,
        store: Store,
        group: Group,
        seconds_max: float,
        *,
        read_fanout: Literal["node", "job"] = "node",
        topology: Given | None = None,
    ) -> None:
        """``seconds_max`` and ``read_fanout`` as in ``Options``."""
        self._store = store
        self._assembly = Assembly(group)
        self._group = group
        self._seconds_max = seconds_max
        self._read_fanout = read_fanout
        self._topology = topology or Given(None)
        self._job: JobFanout | None = None
        """Of the restore under way."""
        self._ending = contextlib.ExitStack()
        """What is left until all ranks have ended a restore."""
        self._count = 0

    def choose(
        self,
        step: int | None,
        names: Sequence[str],
        selection: Selection = _ALL,
        *,
        before: int | None = None,
        or_earlier: bool = False,
        problem: Exception | None = None,
        trace: Trace | None = None,
    ) -> Snapshot | None:
        """The snapshot all ranks restore, or None if there is none. ``names``: the keys and values asked for, after
        ``selection``, which on the coordinator alone decide which snapshots have too little; the rest as in
        ``Repository.choose``. ``problem``: what keeps this rank from restoring, for all to raise. ``trace``: where
        reading the snapshot is recorded."""

        found: Snapshot | None = None
        tree: Tree | None = None

        def decide(replies: Mapping[int, bytes]) -> bytes:
            nonlocal found, tree
            said = {rank: msgspec.msgpack.decode(replies[rank], type=_Asked) for rank in sorted(replies)}
            if len({one.what for one in said.values()}) > 1:
                each = [f"rank {rank}: {one.what}" for rank, one in [*said.items()][:8]]
                raise ValueError(
                    f"ranks ask for different steps: {'; '.join(each)}. Every rank asks for the same step, or for "
                    "none, by the same policy, and with the same Options.read_fanout"
                )
            if self._is_fanned_out:
                tree = agree([one.topology for one in said.values()], self._topology.known, self._group.nodes).tree()
            if not repository.exists(self._store):
                return msgspec.msgpack.encode(None)
            found = repository.Repository(self._store).choose(
                step, lambda snapshot: _lacks(snapshot, names, selection), before=before, or_earlier=or_earlier
            )
            return msgspec.msgpack.encode(None if found is None else found.live)

        self._count += 1
        asked = f"{step}, or an earlier one" if or_earlier else str(step)
        topology = Offer("")
        if self._read_fanout == "job":
            asked += ", read once by the job"
        if self._is_fanned_out:
            topology = self._topology.offer(socket.gethostname())
        try:
            with self._topology.agreeing():
                line = problem or msgspec.msgpack.encode(_Asked(asked, topology))
                answer = self._ask("choose", line, decide, self._seconds_max)
        except (RankFailed, CommitTimeout) as error:
            raise (problem or _as_restore_error(error)) from error
        self._job = JobFanout(self._assembly, tree, self._ending) if self._is_fanned_out else None
        live = msgspec.msgpack.decode(answer, type=Live | None)
        if live is None:
            return None
        snapshot = found or Snapshot(self._store, live)  # the coordinator has read some of it already
        snapshot.trace = trace or snapshot.trace
        return snapshot

    @property
    def _is_fanned_out(self) -> bool:
        """Whether nodes read for each other."""
        return self._read_fanout == "job" and len(self._assembly.leaders) > 1

    def all_fit(self, snapshot: Snapshot, selection: Selection, find: Callable[[], tuple[T, Fit]]) -> T:
        """What ``find`` finds to do on each rank, and how the snapshot fits there; ``StateMismatch`` on every rank if,
        all together, it does not."""

        def judge(replies: Mapping[int, bytes]) -> bytes:
            fits = {rank: msgspec.msgpack.decode(reply, type=Fit) for rank, reply in replies.items()}
            if lines := misfits(fits, snapshot.layout, selection):
                raise StateMismatch(
                    f"{self._store.url}: step {snapshot.step} does not fit the state; nothing was changed:\n  "
                    + "\n  ".join(lines)
                )
            return b""

        found, _ = self._all_do("plan", find, lambda both: msgspec.msgpack.encode(both[1]), judge)
        return found

    @contextlib.contextmanager
    def reading(self, snapshot: Snapshot, wants: Sequence[Want]) -> Iterator[Callable[[Sequence[Sink]], None]]:
        """Gives what reads the chunks that this rank wants into sinks, in the block: on every rank within what it gives
        to ``all_read``. What several ranks of a node want, one of them reads for all."""
        name, members = f"restore-{self._count}", self._assembly.node_ranks
        with relayed(self._group, members, name, snapshot, wants, self._seconds_max, self._job) as (chunks, relay):
            yield lambda sinks: snapshot.read_chunks(chunks, sinks, relay)

    def all_read(self, read: Callable[[], None]) -> None:
        """Runs ``read`` on every rank; if it raises on any, all raise."""
        with self._ending:
            self._all_do("read", read, lambda _: b"", lambda _: b"")

    def _all_do(
        self,
        name: str,
        run: Callable[[], T],
        reply: Callable[[T], bytes],
        judge: Callable[[Mapping[int, bytes]], bytes],
    ) -> T:
        """Runs ``run`` on every rank; if it raises on any, or ``judge`` does on the coordinator, all raise."""
        start = time.monotonic()
        result: T | None = None
        failure: Exception | None = None
        line: Reply
        try:
            result = run()
            line = reply(result)
        except Exception as error:
            line = failure = error
            if isinstance(error, PeerGaveUp):  # what there is to say of it, the other says
                line = CommitTimeout("")
        # What this rank waited for in vain, it need not wait for as long again; and what went wrong, if it is not just
        # lost, the other rank says: once all have come to the end, also those of other nodes that know of nothing.
        late = isinstance(failure, CommitTimeout) and not isinstance(failure, PeerGaveUp)
        left = self._seconds_max - (time.monotonic() - start)
        own = None if isinstance(failure, CommitTimeout) else failure
        try:
            self._ask(name, line, judge, max(self._seconds_max * REPORT_SHARE, left) if late else self._seconds_max)
        except (RankFailed, CommitTimeout) as error:
            # Ranks must draw the same conclusion: that the snapshot is damaged, only if that is all that happened.
            failures = error.failures.values() if isinstance(error, RankFailed) else ()
            damaged = bool(failures) and all(isinstance(each, SnapshotDamaged) for each in failures)
            if own is not None and (damaged or not isinstance(own, SnapshotDamaged)):
                raise own from None
            raise (_as_restore_error(error) if damaged or own is None else RestoreError(str(error))) from error
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def _ask(self, name: str, reply: Reply, decide: Callable[[dict[int, bytes]], bytes], seconds: float) -> bytes:
        # By restore, not by exchange: ranks that gave one up at different places meet again in the next.
        return self._assembly.ask(
            f"restore-{self._count}/{name}", reply, decide, seconds=seconds, what="all ranks to restore"
        )


@dataclass(frozen=True)
class SavedValue:
    """A plain value of a snapshot, for one rank of the job that restores."""

    snapshot: Snapshot
    name: str
    """It was saved under."""
    blob: bytes
    """As the first of ``ranks`` saved it, encoded."""
    ranks: tuple[int, ...]
    """In a world of the size that saved, this rank; in another, all that saved it, ascending."""
    world_size: int
    """Ranks of the job that restores."""


def values_of(
    snapshot: Snapshot, rank: int, world_size: int, selection: Selection
) -> dict[str, tuple[SavedValue, bool, str]]:
    """The plain values that a rank may restore, by their names in the state: the value, whether it is exact, and the
    name it was saved under.

    In a world of the same size each rank gets its own. In another, a value that all ranks that saved it had equal; of
    others the lowest rank's, marked as not exact.
    """
    held: dict[str, tuple[tuple[int, ...], bool]] = {}
    kinds = None if snapshot.world_size == world_size else snapshot.value_kinds()
    if kinds is not None and not any(
        kinds[name] == "some" and selection.has(selection.renamed(name)) for name in kinds
    ):
        everyone = tuple(range(snapshot.world_size))
        held = {name: (everyone, kind == "same") for name, kind in kinds.items()}
    else:
        digests: dict[str, dict[int, str]] = {}
        for number in [rank] if snapshot.world_size == world_size else range(snapshot.world_size):
            for name, digest in snapshot.value_digests(number).items():
                digests.setdefault(name, {})[number] = digest
        held = {name: (tuple(by_rank), len(set(by_rank.values())) == 1) for name, by_rank in digests.items()}
    found: dict[str, tuple[SavedValue, bool, str]] = {}
    for name, (ranks, exact) in held.items():
        renamed = selection.renamed(name)
        if selection.has(renamed):
            if renamed in found:
                raise ValueError(f"rename makes {renamed} of two names of the snapshot")
            saved = SavedValue(snapshot, name, snapshot.value_blob(name, ranks[0]), ranks, world_size)
            found[renamed] = (saved, exact, name)
    return found


def values_elsewhere(
    snapshot: Snapshot, names: Collection[str], world_size: int, selection: Selection
) -> dict[str, tuple[SavedValue, bool, str]]:
    """Those of these values that any rank saved, as ``values_of`` gives them to a job of another size: a layer that has
    gone to another stage of a pipeline has its extra state there."""
    found: dict[str, dict[int, str]] = {}
    kinds = snapshot.value_kinds() if names else {}
    if kinds is not None and not any(selection.renamed(name) in names for name in kinds):
        return {}
    for rank in range(snapshot.world_size):
        for saved in snapshot.value_digests(rank):
            if selection.renamed(saved) in names:
                found.setdefault(saved, {})[rank] = snapshot.value_digests(rank)[saved]
    return {
        selection.renamed(saved): (
            SavedValue(snapshot, saved, snapshot.value_blob(saved, min(ranks)), tuple(ranks), world_size),
            len(set(ranks.values())) == 1,
            saved,
        )
        for saved, ranks in found.items()
    }


def _lacks(snapshot: Snapshot, names: Sequence[str], selection: Selection) -> list[str]:
    """Those of these keys and names of values that a snapshot has not."""
    keys = {selection.renamed(key) for key in snapshot.layout.keys}
    missing = [name for name in names if name not in keys]
    for rank in range(snapshot.world_size):  # in most jobs the first has them all
        if not missing:
            break
        values = {selection.renamed(name) for name in snapshot.value_digests(rank)}
        missing = [name for name in missing if name not in values]
    return missing


def _as_restore_error(error: RankFailed | CommitTimeout) -> RestoreError:
    """What other ranks raise: the failed rank's own kind of error, naming it."""
    failures = error.failures if isinstance(error, RankFailed) else {}
    for rank, failure in sorted(failures.items()):
        message = f"rank {rank}: {failure}"
        if isinstance(failure, SnapshotDamaged):
            return SnapshotDamaged(
                message, key=failure.key, shard=failure.shard, object=failure.object, offset=failure.offset
            )
        if isinstance(failure, RestoreError):
            return type(failure)(message)
    return RestoreError(str(error) or "another rank has given up the restore")
