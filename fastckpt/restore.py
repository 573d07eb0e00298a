"""The restore flow, the mirror image of save.

choose   the coordinator alone lists; every rank gets the same snapshot and the digest of its index
plan     what fits and what does not, found on every rank before anything changes on any
read     pack -> buffer -> verify -> decode -> tensor, in place
agree    one rank failed: all raise, naming it
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec

from fastckpt.errors import CommitTimeout, RankFailed, RestoreError, SnapshotDamaged
from fastckpt.format.decision import Live
from fastckpt.group import Assembly, Group, Reply
from fastckpt.plan.restore_plan import Selection
from fastckpt.repository import repository
from fastckpt.repository.reader import Snapshot
from fastckpt.storage.store import Store

log = logging.getLogger("fastckpt")

T = TypeVar("T")


class Restores:
    """The restores of one rank from one repository. On the main thread, by all ranks in the same order."""

    def __init__(self, store: Store, group: Group, seconds_max: float) -> None:
        self._store = store
        self._assembly = Assembly(group)
        self._group = group
        self._seconds_max = seconds_max
        self._count = 0

    def choose(
        self,
        step: int | None,
        names: Sequence[str],
        *,
        before: int | None = None,
        or_earlier: bool = False,
        problem: Exception | None = None,
    ) -> Snapshot | None:
        """The snapshot all ranks restore, or None if there is none. ``names``: the top-level names asked for; the rest
        as in ``Repository.choose``. ``problem``: what keeps this rank from restoring, for all to raise."""

        def decide(replies: Mapping[int, bytes]) -> bytes:
            if len(set(replies.values())) > 1:
                asked = [f"rank {rank}: {msgspec.msgpack.decode(reply)}" for rank, reply in sorted(replies.items())[:8]]
                raise ValueError(
                    f"ranks ask for different steps: {', '.join(asked)}; every rank asks for the same step, or for none"
                )
            if not repository.exists(self._store):
                return msgspec.msgpack.encode(None)
            found = repository.Repository(self._store).choose(
                step, lambda snapshot: _lacks(snapshot, names), before=before, or_earlier=or_earlier
            )
            return msgspec.msgpack.encode(None if found is None else found.live)

        self._count += 1
        try:
            answer = self._ask("choose", problem or msgspec.msgpack.encode(step), decide)
        except (RankFailed, CommitTimeout) as error:
            raise (problem or _as_restore_error(error)) from error
        live = msgspec.msgpack.decode(answer, type=Live | None)
        return None if live is None else Snapshot(self._store, live)

    def all_succeeded(self, name: str, run: Callable[[], T]) -> T:
        """Runs ``run`` on every rank; if it raises on any, all raise."""
        result: T | None = None
        failure: Exception | None = None
        try:
            result = run()
        except Exception as error:
            failure = error
        try:
            self._ask(name, b"" if failure is None else failure, lambda _: b"")
        except (RankFailed, CommitTimeout) as error:
            # Ranks must draw the same conclusion: that the snapshot is damaged, only if that is all that happened.
            failures = error.failures.values() if isinstance(error, RankFailed) else ()
            damaged = bool(failures) and all(isinstance(each, SnapshotDamaged) for each in failures)
            if failure is not None and (damaged or not isinstance(failure, SnapshotDamaged)):
                raise failure from None
            raise (_as_restore_error(error) if damaged or failure is None else RestoreError(str(error))) from error
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def _ask(self, name: str, reply: Reply, decide: Callable[[dict[int, bytes]], bytes]) -> bytes:
        # By restore, not by exchange: ranks that gave one up at different places meet again in the next.
        return self._assembly.ask(
            f"restore-{self._count}/{name}", reply, decide, seconds=self._seconds_max, what="all ranks to restore"
        )


def values_of(
    snapshot: Snapshot, rank: int, world_size: int, selection: Selection
) -> dict[str, tuple[bytes, bool, str]]:
    """The plain values that a rank may restore: encoded, whether they are exact, and the name they were saved under.

    In a world of the same size each rank gets its own. In another, a value that all ranks had equal; of others, rank
    0's, marked as not exact.
    """
    same_world = snapshot.world_size == world_size
    source = rank if same_world else 0
    digests = [snapshot.value_digests(number) for number in ([rank] if same_world else range(snapshot.world_size))]
    found: dict[str, tuple[bytes, bool, str]] = {}
    for name in {name: None for own in digests for name in own}:
        renamed = selection.renamed(name)
        if selection.has(renamed) and name in snapshot.value_digests(source):
            if renamed in found:
                raise ValueError(f"rename makes {renamed} of two names of the snapshot")
            exact = same_world or len({own.get(name) for own in digests}) == 1
            found[renamed] = (snapshot.value_blob(name, source), exact, name)
    return found


def _lacks(snapshot: Snapshot, names: Sequence[str]) -> list[str]:
    """Those of these top-level names that a snapshot has nothing under."""
    tops = {key.split(".", 1)[0] for key in snapshot.layout.keys}
    tops |= {name.split(".", 1)[0] for name in snapshot.value_digests(0)}
    return [name for name in names if name.split(".", 1)[0] not in tops]


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
    return RestoreError(str(error))
