"""The save flow. Read this first.

    agree    the ranks agree on the attempt, the layout, and that what they take to be equal is equal (``agreement``)
    write    tensor -> pool buffer -> hash -> codec -> pack, chunk by chunk, in a bounded pool
    commit   each node's part, then the index, then the decision; or, on every rank, the error that prevented it

``Saves`` is what a rank remembers from one save to the next. All of it runs on whatever thread the caller chose: on
the caller's own the first time and when the layout changes, behind the training loop otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from fastckpt.agreement import Agreed, Agreements, Attempt, Offered
from fastckpt.buffers import Pool, Source
from fastckpt.errors import (
    AnotherWriter,
    CommitTimeout,
    FastckptError,
    OutOfSpace,
    RankFailed,
    RepositoryNotFound,
    SaveError,
    StorageError,
)
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.decision import Live
from fastckpt.format.tables import Layout, PartInfo, Piece, RankTable, ValueKind
from fastckpt.group import ANSWER_SECONDS, Assembly, Group, Reply, as_told, checked, combined
from fastckpt.options import Options
from fastckpt.plan.rates import encode_rate
from fastckpt.plan.value_kinds import Differences, find_differences, value_kinds
from fastckpt.plan.writers import Profile
from fastckpt.repository import pull, repository
from fastckpt.repository.pull import Pull
from fastckpt.repository.writer import ChunkWriter, Contents, outcome, write_part
from fastckpt.storage.deadline import Callers, NoAnswer
from fastckpt.storage.store import Store
from fastckpt.topology.offer import Given
from fastckpt.trace import Trace

log = logging.getLogger("fastckpt")

STREAMS = Profile.streams
"""Threads a rank that hash and write, each into packs of its own, unless options say otherwise."""
OUTCOME_SECONDS_MIN = 2.0
"""For reading the history after a failure, even if the time for the save is over."""


@dataclass(kw_only=True)
class Labels:
    """What is stored beside the tensors."""

    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class _Written(msgspec.Struct, array_like=True, frozen=True):
    attempt: str
    layout: str
    table: RankTable
    blobs: list[bytes]
    tensor_bytes: int
    stored_bytes: int
    rate: int
    """How fast, as ``encode_rate`` has it."""


class _NodeLine(msgspec.Struct, array_like=True, frozen=True):
    node: int
    digest: bytes
    """Of its part."""
    part_bytes: int
    raw_bytes: int
    stored_bytes: int
    layout: bytes
    """The first half of its digest: enough to tell layouts of one job apart."""
    values: Differences
    rates: bytes
    """Of the node's ranks, ascending: uint16, little-endian."""


class Saves:
    """The saves of one rank to one repository. Calls come one after another, from any thread."""

    def __init__(self, store: Store, group: Group, options: Options, topology: Given | None = None) -> None:
        self._store = store
        self._assembly = Assembly(group)
        self._rank = group.rank
        self._nodes = group.nodes
        self._options = options
        self._agreements = Agreements(
            store, self._assembly, options, topology or Given(None), options.streams or STREAMS
        )
        self._callers = Callers("fastckpt-outcome")
        self._writer: ChunkWriter | None = None
        self._rate = 0
        """How fast this rank wrote last, as ``encode_rate`` has it."""
        # Of attempts that failed, whose packs could not be deleted yet: the store failed, or the history did not tell.
        # What is still there at the end goes with the next job's cleaning.
        self._discarded: list[ChunkWriter] = []

    def expects(self, offered: Offered) -> bool:
        """Whether this rank offers what it offered last time, so that the layout agreed on may still hold."""
        return self._agreements.expects(offered)

    def agree(self, step: int, offered: Offered | BaseException, trace: Trace) -> Attempt:
        """As ``Agreements.agree``."""
        self._writer = None
        return self._agreements.agree(step, offered, trace)

    def prepare(self, offered: Offered | BaseException) -> Agreed:
        """As ``Agreements.prepare``."""
        return self._agreements.prepare(offered)

    def clean(self) -> None:
        """Coordinator: removes what dead attempts of earlier jobs left behind. Elsewhere, nothing."""
        committer = self._agreements.committer
        if committer is not None:
            deleted = committer.clean()
            if deleted:
                log.info("%s: removed %d things that earlier jobs left unfinished", self._store.url, deleted)

    def write(
        self, attempt: Attempt, offered: Offered, pool: Pool, trace: Trace, on_staged: Callable[[], None]
    ) -> ChunkWriter:
        """Stages and writes this rank's chunks; its packs are durable on return. ``on_staged`` is called once, when no
        live tensor is going to be read any more, be it for a failure. Raises what failed, with nothing left staged or
        open."""
        agreed = attempt.agreed
        layout = agreed.layout
        shards = {piece.shard for _, pieces in agreed.mine for piece in pieces}
        try:
            sources = {
                shard: offered.source(layout.keys[layout.shard_key(shard)], layout.box(shard))
                for shard in sorted(shards)
            }
            streams = pull.streams_of(agreed.sizes, agreed.streams_max, pool)
            self._writer = ChunkWriter(
                self._store,
                attempt.id,
                self._rank,
                agreed.sizes,
                self._options.codec,
                trace,
                streams,
                pull.batch_bytes_of(streams, pool),
            )
            flow = Pull(
                self._writer,
                pool,
                trace,
                fill=lambda row, view: _fill(view, agreed.mine[row][1], sources, layout),
                begin=lambda: self._begin(attempt),
                on_copied=offered.check_unchanged,
                on_let_go=on_staged,
            )
        except BaseException:
            on_staged()
            raise
        self._began = time.monotonic()
        flow.run(self._store)
        self._rate = encode_rate(sum(agreed.sizes), time.monotonic() - self._began)
        return self._writer

    def _begin(self, attempt: Attempt) -> None:
        """Before the first byte is written. Not before staging, which must not wait for storage."""
        self._check_same_repository(attempt)
        self._delete_discarded()  # it may need the room

    def _check_same_repository(self, attempt: Attempt) -> None:
        """Every rank must write to the place that the coordinator commits in: a path may mean another one here."""
        try:
            seen = repository.Repository(self._store).format_digest
        except RepositoryNotFound:
            seen = ""
        if seen != attempt.format_digest and self._rank == 0:
            raise AnotherWriter(
                f"{self._store.url}: the repository was deleted or replaced while the job was running; it can save "
                "here no more. Make a new Checkpointer"
            )
        if seen != attempt.format_digest:
            raise SaveError(
                f"{self._store.url}: rank {self._rank} does not see the repository that rank 0 made there; every rank "
                "needs the same directory, on storage that all nodes share"
            )

    def commit(
        self,
        attempt: Attempt,
        written: ChunkWriter | BaseException,
        values: Mapping[str, bytes],
        labels: Labels,
        trace: Trace,
    ) -> Live:
        """Commits the attempt if every rank has written its share; every rank returns the same or raises."""
        reply: Reply
        try:
            if isinstance(written, BaseException):
                reply = written
            else:
                reply = msgspec.msgpack.encode(self._written(attempt, written, values))
        except Exception as error:
            reply = written = error
        if isinstance(written, BaseException):
            reply = written = _typed(written, attempt.step)
        end = time.monotonic() + self._options.commit_seconds_max + ANSWER_SECONDS
        try:
            with trace.span("commit"):
                answer = self._assembly.ask_in_two(
                    f"save-{attempt.number}/commit",
                    reply,
                    lambda replies: self._on_written(attempt, replies, trace),
                    lambda lines: self._on_lines(attempt, lines, labels, trace),
                    self._options.commit_seconds_max,
                    f"all ranks to write step {attempt.step}",
                )
            return msgspec.msgpack.decode(answer, type=Live)
        except Exception as error:
            live = self._learn_outcome(attempt, error, end, isinstance(written, BaseException))
            if live is not None:
                return live
            # On the rank that failed its own error is the cause; alone, it is the error.
            if isinstance(written, BaseException) and isinstance(error, RankFailed | CommitTimeout):
                if len(self._nodes) == 1:
                    raise written from written.__cause__
                # Others may have stopped waiting for this rank before it could say what is wrong.
                raise (error if isinstance(error, RankFailed) else combined({self._rank: written})) from written
            if len(self._nodes) == 1 and isinstance(error, RankFailed) and error.failures:
                raise error.failures[0] from None
            typed = _typed(error, attempt.step)
            raise typed from typed.__cause__

    def _written(self, attempt: Attempt, written: ChunkWriter, values: Mapping[str, bytes]) -> _Written:
        digests = {name: chunk_hash(blob) for name, blob in values.items()}
        blobs = {digests[name]: blob for name, blob in values.items()}
        if self._rank != 0:
            common = {digest for _, digest in attempt.values}
            blobs = {digest: blob for digest, blob in blobs.items() if digest not in common}
        mine_bytes = sum(attempt.agreed.sizes)
        return _Written(
            attempt.id,
            attempt.agreed.digest,
            written.table(digests),
            list(blobs.values()),
            mine_bytes,
            written.stored_bytes,
            self._rate,
        )

    def _on_written(self, attempt: Attempt, replies: dict[int, Reply], trace: Trace) -> bytes:
        """Node leader: one part and one line for all ranks of the node."""
        ranks = [msgspec.msgpack.decode(data, type=_Written) for _, data in sorted(checked(replies).items())]
        if any((written.attempt, written.layout) != (attempt.id, attempt.agreed.digest) for written in ranks):
            raise SaveError(
                f"step {attempt.step}: ranks of this node wrote different attempts, or by different layouts"
            )
        blobs = {chunk_hash(blob): blob for written in ranks for blob in written.blobs}
        with trace.span("part"):
            part = write_part(
                self._store,
                attempt.id,
                self._nodes[self._rank],
                attempt.agreed.digest,
                [written.table for written in ranks],
                blobs.values(),
            )
        raw = sum(written.tensor_bytes for written in ranks) + sum(len(blob) for blob in blobs.values())
        stored = sum(written.stored_bytes for written in ranks)
        differences = find_differences(attempt.values, [written.table.values for written in ranks])
        digest, layout = bytes.fromhex(part.digest), bytes.fromhex(attempt.agreed.digest[:32])
        rates = np.array([written.rate for written in ranks], "<u2").tobytes()
        return msgspec.msgpack.encode(_NodeLine(part.node, digest, part.size, raw, stored, layout, differences, rates))

    def _on_lines(self, attempt: Attempt, lines: dict[int, Reply], labels: Labels, trace: Trace) -> bytes:
        """Coordinator: the commit. Whatever prevents it aborts the attempt."""
        committer = self._agreements.committer
        assert committer is not None
        try:
            parts = [msgspec.msgpack.decode(data, type=_NodeLine) for _, data in sorted(checked(lines).items())]
            if any(line.layout.hex() != attempt.agreed.digest[:32] for line in parts):
                raise SaveError(f"step {attempt.step}: nodes wrote by different layouts")
            placement = self._learn_rates(parts)
            trace.note("placement", placement)
            live = committer.commit(
                Contents(
                    attempt=attempt.id,
                    step=attempt.step,
                    layout=attempt.agreed.data,
                    parts=[PartInfo(line.node, line.digest.hex(), line.part_bytes) for line in parts],
                    bytes=sum(line.raw_bytes for line in parts),
                    stored_bytes=sum(line.stored_bytes for line in parts),
                    values=self._value_kinds(attempt, parts),
                    environment={**labels.environment, "placement": placement},
                    metrics=labels.metrics,
                    note=labels.note,
                ),
                trace,
            )
        except Exception as error:
            try:
                committer.abort(attempt.id)
            except FastckptError as second:
                error.add_note(f"aborting the attempt failed too: {second}")
            raise
        return msgspec.msgpack.encode(live)

    def _value_kinds(self, attempt: Attempt, parts: Sequence[_NodeLine]) -> dict[str, ValueKind] | None:
        if not self._agreements.is_compact:
            return None
        return value_kinds([name for name, _ in attempt.values], [line.values for line in parts])

    def _learn_rates(self, parts: Sequence[_NodeLine]) -> dict[str, Any]:
        """Takes in how fast the ranks wrote; returns how this save was planned."""
        dealer = self._agreements.dealer
        assert dealer is not None
        rates = np.zeros(len(self._nodes), np.uint16)
        # Lines are in the order of the nodes' numbers.
        rates[np.argsort(self._nodes, kind="stable")] = np.frombuffer(b"".join(line.rates for line in parts), "<u2")
        placement = dealer.outlook()
        dealer.learn(rates)
        return placement

    def _learn_outcome(self, attempt: Attempt, error: Exception, end: float, failed_here: bool) -> Live | None:
        """After a failure: what the history says counts. An aborted attempt's packs are deleted by who wrote them; to a
        job that was fenced that is the reason, whatever it stumbled over first. Where the history does not tell, the
        error says so."""
        try:
            reading = self._callers.start(
                lambda: outcome(self._store, attempt.id, repository.Repository(self._store).format_digest)
            )
            result = reading.result(max(OUTCOME_SECONDS_MIN, end - time.monotonic()))
        except (FastckptError, NoAnswer, RuntimeError, MemoryError):  # not even a thread may be had
            result = None
        if result is None or not (result.committed or result.aborted or result.fenced):
            # What a rank has not written, or found no room for, cannot be committed.
            unknown = isinstance(error, CommitTimeout | StorageError) and not isinstance(error, OutOfSpace)
            if unknown and not failed_here:
                read = "holds no decision on it so far" if result else "could not be read"
                error.args = (
                    f"{error}. Whether step {attempt.step} is or will be committed is not known: the history {read}. "
                    "Once the storage answers, `fastckpt ls` shows it if it is, and the next save works either way",
                )
            self._discard(attempt)
            return None
        if result.fenced and result.committed is None and not isinstance(error, AnotherWriter):
            raise AnotherWriter(
                f"{self._store.url}: a later job has opened this repository and removed what this one was writing; "
                f"attempt {attempt.id} can never be committed. Stop one of the two jobs"
            ) from error
        if result.aborted:
            self._discard(attempt)
            self._delete_discarded()
        return result.committed

    def _discard(self, attempt: Attempt) -> None:
        if self._writer is not None and self._writer.attempt == attempt.id:
            self._discarded.append(self._writer)

    def _delete_discarded(self) -> None:
        """Deletes what attempts wrote that the history says are aborted; keeps in mind those it does not tell of."""
        for writer in list(self._discarded):
            try:
                result = outcome(self._store, writer.attempt, repository.Repository(self._store).format_digest)
            except FastckptError:
                return  # another time
            if result.committed or (result.aborted and writer.delete()):
                self._discarded.remove(writer)


def _typed(error: BaseException, step: int) -> BaseException:
    """What this rank raises for an error of its own: the kind of error that the others hear of."""
    told = as_told(error)
    if type(told) is not FastckptError:
        return told
    typed = SaveError(f"step {step}: {told}")
    typed.__cause__ = told.__cause__ or told
    return typed


def _fill(view: memoryview, pieces: Sequence[Piece], sources: Mapping[int, Source], layout: Layout) -> None:
    for piece in pieces:
        size = layout.item_bytes(piece.shard)
        start = piece.start * size
        with view[piece.byte : piece.byte + (piece.stop - piece.start) * size] as part:
            sources[piece.shard].fill(start, part)
