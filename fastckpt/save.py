"""The save flow. Read this first.

    agree    the ranks agree on the attempt, the layout, and that what they take to be equal is equal
    write    tensor -> pool buffer -> hash -> codec -> pack, chunk by chunk, in a bounded pool
    commit   each node's part, then the index, then the decision; or, on every rank, the error that prevented it

``Saves`` is what a rank remembers from one save to the next. All of it runs on whatever thread the caller chose: on
the caller's own the first time and when the layout changes, behind the training loop otherwise.
"""

from __future__ import annotations

import functools
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np

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
from fastckpt.format import document
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.decision import Live
from fastckpt.format.shard import Box
from fastckpt.format.tables import Chunks, Layout, PartInfo, Piece, RankTable, decode_layout
from fastckpt.group import ANSWER_SECONDS, Assembly, Group, Reply, as_told, checked, combined
from fastckpt.options import Options
from fastckpt.plan.deal import Dealer
from fastckpt.plan.rates import encode_rate
from fastckpt.plan.save_plan import (
    Agreement,
    Comparison,
    RankOffer,
    auto_chunk_bytes,
    offered_bytes,
    plan_save,
)
from fastckpt.repository import pull, repository
from fastckpt.repository.pull import Pull
from fastckpt.repository.writer import ChunkWriter, Committer, Contents, outcome, write_part
from fastckpt.storage.deadline import Callers, NoAnswer
from fastckpt.storage.store import Store
from fastckpt.topology import offer as topology_offer
from fastckpt.topology.offer import RankPath
from fastckpt.topology.topology import Topology
from fastckpt.trace import Trace

log = logging.getLogger("fastckpt")

STREAMS = 4
"""Threads a rank that hash and write, each into packs of its own, unless options say otherwise."""
OUTCOME_SECONDS_MIN = 2.0
"""For reading the history after a failure, even if the time for the save is over."""


class Offered(Protocol):
    """What a rank has to save, as the job describes it."""

    offer: RankOffer
    digest: bytes
    """Of ``offer``: tells whether the layout may have changed."""
    values: Mapping[str, bytes]
    """Encoded per-rank values by name."""

    def sampled(self, keys: Sequence[str] | None) -> dict[str, bytes]:
        """For each of these keys held here, a digest of sampled content; for None, a digest of the whole content of
        every tensor that is not known to be equal wherever it is held."""

    def source(self, key: str, box: Box) -> Source:
        """The bytes of a box this rank offered."""

    def check_unchanged(self) -> None:
        """Called once everything has been read; raises if what was read may not be what the state was."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """A layout the ranks have agreed on."""

    digest: str
    data: bytes
    """The layout object."""
    chunks: Chunks
    comparisons: tuple[Comparison, ...]
    mine: tuple[tuple[int, tuple[Piece, ...]], ...]
    """What this rank writes: for each row of its table the pieces of the chunk."""
    streams_max: int
    """Threads that write it."""

    @property
    def layout(self) -> Layout:
        return self.chunks.layout

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Raw bytes of this rank's chunks, by row."""
        return [self.chunks.raw_bytes(pieces) for _, pieces in self.mine]

    def pool_bytes(self, budget_bytes: int | None = None) -> int:
        """The staging memory that this rank makes use of, within a budget, which must do for one chunk."""
        least, most = pull.slot_bytes(max(self.sizes, default=1)), pull.pool_bytes(self.sizes, self.streams_max)
        return most if budget_bytes is None else max(least, min(budget_bytes, most))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at saving one step, from agreement on."""

    id: str
    step: int
    agreed: Agreed
    common: frozenset[bytes]
    """Digests of the values the coordinator holds: equal ones are stored once, by its node."""
    format_digest: str
    """Of the FORMAT object as the coordinator sees it."""


@dataclass(kw_only=True)
class Labels:
    """What is stored beside the tensors."""

    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class _Hello(msgspec.Struct, array_like=True, frozen=True):
    step: int
    offered: bytes
    compared: dict[int, bytes]
    """For each comparison this rank takes part in, a digest over its keys."""
    layout: str
    """Digest of the layout this rank would go on with; it may have missed the answer that brought a newer one."""


class _Full(msgspec.Struct, array_like=True, frozen=True):
    offer: RankOffer
    digests: dict[str, bytes]


class _Go(msgspec.Struct, array_like=True, frozen=True):
    attempt: str
    agreement: Agreement | None
    common: list[bytes]
    format_digest: str


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
    part: PartInfo
    raw_bytes: int
    stored_bytes: int
    layout: str
    rates: bytes
    """Of the node's ranks, ascending: uint16, little-endian."""


class Saves:
    """The saves of one rank to one repository. Calls come one after another, from any thread."""

    def __init__(
        self, store: Store, group: Group, options: Options, topology: Topology | RankPath | None = None
    ) -> None:
        """``topology``: what this rank was given of it, or knows of its own way to the storage."""
        self._store = store
        self._topology = topology
        self._has_topology = False
        """Whether the ranks have agreed on it."""
        self._assembly = Assembly(group)
        self._rank = group.rank
        self._nodes = group.nodes
        self._options = options
        self._count = 0
        self._callers = Callers("fastckpt-outcome")
        self._offered = b""
        self._agreed: Agreed | None = None
        self._writer: ChunkWriter | None = None
        self._rate = 0
        """How fast this rank wrote last, as ``encode_rate`` has it."""
        # Of attempts that failed, whose packs could not be deleted yet: the store failed, or the history did not tell.
        # What is still there at the end goes with the next job's cleaning.
        self._discarded: list[ChunkWriter] = []
        # The coordinator's side.
        self._dealer: Dealer | None = None
        self._committer: Committer | None = None
        self._chunk_bytes = 0
        self._offers: dict[int, bytes] = {}

    def expects(self, offered: Offered) -> bool:
        """Whether this rank offers what it offered last time, so that the layout agreed on may still hold."""
        return self._agreed is not None and offered.digest == self._offered

    def agree(self, step: int, offered: Offered | BaseException, trace: Trace) -> Attempt:
        """Agrees with all ranks on the attempt. An error in place of the offer makes every rank raise.

        ``ValueError`` if ranks hold different things under one key or save different steps.
        """
        with trace.span("agree"):
            return self._agree(step, offered, trace)

    def _agree(self, step: int, offered: Offered | BaseException, trace: Trace) -> Attempt:
        self._count += 1
        self._writer = None
        common = [] if isinstance(offered, BaseException) else sorted(map(chunk_hash, offered.values.values()))
        answer = self._ask("hello", offered, self._hello(step), lambda replies: self._on_hello(replies, common))
        assert not isinstance(offered, BaseException), "an error in place of the offer is raised by asking"
        if not answer:
            self._agree_on_topology("topology", offered)
            answer = self._ask("offers", offered, _full, lambda replies: self._on_offers(replies, common, trace))
        go = msgspec.msgpack.decode(answer, type=_Go)
        if go.agreement is not None:
            self._agreed = self._take(go.agreement)
            self._offered = offered.digest
        assert self._agreed is not None
        return Attempt(
            id=go.attempt, step=step, agreed=self._agreed, common=frozenset(go.common), format_digest=go.format_digest
        )

    def prepare(self, offered: Offered | BaseException) -> Agreed:
        """Agrees with all ranks on the layout alone, for the saves to come. Writes nothing. An error in place of the
        offer makes every rank raise."""
        self._count += 1
        self._agree_on_topology("prepare-topology", offered)
        answer = self._ask("prepare", offered, _full, self._on_prepare)
        assert not isinstance(offered, BaseException), "an error in place of the offer is raised by asking"
        self._agreed = self._take(msgspec.msgpack.decode(answer, type=Agreement))
        self._offered = offered.digest
        return self._agreed

    def _agree_on_topology(self, name: str, offered: Offered | BaseException) -> None:
        """Once a job, under ``name``. ``TopologyError`` on every rank, naming those that disagree."""
        if self._has_topology:
            return
        own = msgspec.msgpack.encode(topology_offer.offer(self._topology, socket.gethostname()))
        self._ask(name, offered, lambda _: own, self._on_topology)
        self._has_topology = True

    def _on_topology(self, replies: dict[int, bytes]) -> bytes:
        offers = [msgspec.msgpack.decode(data, type=topology_offer.Offer) for _, data in sorted(replies.items())]
        topology = topology_offer.agree(offers, self._topology)
        if self._topology is None:  # host names of containers repeat; which ranks share a machine is known better
            topology = Topology.from_hosts([str(node) for node in self._nodes])
        options = self._options
        self._dealer = Dealer(topology.tree(), writers=options.writers, streams=options.streams or STREAMS)
        return b""

    def _ask(
        self,
        name: str,
        offered: Offered | BaseException,
        reply: Callable[[Offered], bytes],
        decide: Callable[[dict[int, bytes]], bytes],
    ) -> bytes:
        """One exchange of all ranks. What keeps this rank from replying is told to the others and raised here."""
        posted: Reply
        try:
            posted = offered if isinstance(offered, BaseException) else reply(offered)
        except Exception as error:
            posted = error
        try:
            return self._assembly.ask(
                f"save-{self._count}/{name}",
                posted,
                decide,
                seconds=self._options.commit_seconds_max,
                what=f"all ranks to call {'prepare' if name.startswith('prepare') else 'save'}",
            )
        except FastckptError:
            if isinstance(posted, BaseException):
                raise posted from None
            raise

    def _hello(self, step: int) -> Callable[[Offered], bytes]:
        layout = self._agreed.digest if self._agreed is not None else ""
        return lambda offered: msgspec.msgpack.encode(_Hello(step, offered.digest, self._compared(offered), layout))

    def _compared(self, offered: Offered) -> dict[int, bytes]:
        if not self.expects(offered) or self._agreed is None:
            return {}
        digests: dict[int, bytes] = {}
        for number, comparison in enumerate(self._agreed.comparisons):
            if self._rank in comparison.ranks:
                sampled = offered.sampled(comparison.keys)
                digests[number] = chunk_hash(b"".join(sampled[key] for key in comparison.keys))
        return digests

    def _on_hello(self, replies: dict[int, bytes], common: list[bytes]) -> bytes:
        """Coordinator: goes ahead if everything is as it was; an empty answer asks everyone for the whole offer."""
        hellos = {rank: msgspec.msgpack.decode(data, type=_Hello) for rank, data in replies.items()}
        steps = {hello.step for hello in hellos.values()}
        if len(steps) > 1:
            by_rank = ", ".join(f"rank {rank}: {hello.step}" for rank, hello in sorted(hellos.items())[:8])
            raise ValueError(f"ranks save different steps at the same time: {by_rank}; every rank saves the same step")
        unchanged = self._agreed is not None and {h.layout for h in hellos.values()} == {self._agreed.digest}
        unchanged = unchanged and self._offers == {rank: hello.offered for rank, hello in hellos.items()}
        for number in range(len(self._agreed.comparisons) if self._agreed else 0):
            unchanged = unchanged and len({h.compared[number] for h in hellos.values() if number in h.compared}) <= 1
        if not unchanged or self._agreed is None or (self._dealer is not None and self._dealer.would_gain()):
            return b""
        if self._committer is None and self._open(self._agreed.layout.chunk_bytes) != self._agreed.layout.chunk_bytes:
            return b""  # the repository was made meanwhile, with a grid of its own
        return self._go(None, common)

    def _on_offers(self, replies: dict[int, bytes], common: list[bytes], trace: Trace) -> bytes:
        """Coordinator: plans, and opens the repository for writing if this is the first save."""
        with trace.span("plan"):
            chunk_bytes, agreement = self._plan(replies)  # refuses before anything is made
        if self._committer is None and self._open(chunk_bytes) != chunk_bytes:
            with trace.span("plan"):
                _, agreement = self._plan(replies)
        return self._go(agreement, common)

    def _on_prepare(self, replies: dict[int, bytes]) -> bytes:
        if not self._chunk_bytes and repository.exists(self._store):
            self._chunk_bytes = repository.Repository(self._store).format.chunk_bytes
        return msgspec.msgpack.encode(self._plan(replies)[1])

    def _plan(self, replies: dict[int, bytes]) -> tuple[int, Agreement]:
        """Coordinator: the layout of what ranks offer, on the repository's grid, or one that suits it."""
        fulls = {rank: msgspec.msgpack.decode(data, type=_Full) for rank, data in replies.items()}
        offers = {rank: full.offer for rank, full in fulls.items()}
        digests = {rank: full.digests for rank, full in fulls.items()}
        chunk_bytes = self._chunk_bytes or self._options.chunk_bytes or auto_chunk_bytes(offered_bytes(offers))
        assert self._dealer is not None
        layout, comparisons = plan_save(offers, digests, self._nodes, chunk_bytes, self._dealer)
        self._offers = {rank: offer_digest(offer) for rank, offer in offers.items()}
        return chunk_bytes, Agreement(document.pack_table(layout), comparisons)

    def _open(self, chunk_bytes: int) -> int:
        """Coordinator: opens the repository for writing, made with this grid if there is none. Returns its grid."""
        made = repository.create(self._store, chunk_bytes)
        committer = Committer(self._store, made.format_digest)
        committer.open()
        self._committer, self._chunk_bytes = committer, made.format.chunk_bytes
        return self._chunk_bytes

    def _go(self, agreement: Agreement | None, common: list[bytes]) -> bytes:
        assert self._committer is not None
        return msgspec.msgpack.encode(
            _Go(self._committer.next_attempt(), agreement, common, self._committer.format_digest)
        )

    def _take(self, agreement: Agreement) -> Agreed:
        digest = document.digest(agreement.layout)
        chunks = Chunks(decode_layout(agreement.layout, digest))
        return Agreed(
            digest=digest,
            data=agreement.layout,
            chunks=chunks,
            comparisons=tuple(agreement.comparisons),
            mine=tuple((chunk, tuple(pieces)) for chunk, pieces in chunks.of_rank(self._rank)),
            streams_max=self._options.streams or STREAMS,
        )

    def clean(self) -> None:
        """Coordinator: removes what dead attempts of earlier jobs left behind. Elsewhere, nothing."""
        if self._committer is not None:
            deleted = self._committer.clean()
            if deleted:
                log.info("%s: removed %d things that earlier jobs left unfinished", self._store.url, deleted)

    def write(
        self, attempt: Attempt, offered: Offered, pool: Pool, trace: Trace, on_staged: Callable[[], None]
    ) -> ChunkWriter:
        """Stages and writes this rank's chunks; its packs are durable on return. ``on_staged`` is called once, when no
        live tensor is going to be read any more, be it for a failure. Raises what failed, with nothing left staged or
        open."""
        agreed = attempt.agreed
        layout, chunks = agreed.layout, agreed.chunks
        shards = {piece.shard for _, pieces in agreed.mine for piece in pieces}
        try:
            sources = {
                shard: offered.source(layout.keys[layout.shard_keys[shard]], layout.box(shard))
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
                fill=lambda row, view: _fill(view, agreed.mine[row][1], sources, chunks),
                begin=lambda: self._begin(attempt),
                on_copied=offered.check_unchanged,
                on_let_go=on_staged,
            )
        except BaseException:
            on_staged()
            raise
        self._began = time.monotonic()
        flow.run(self._store)
        self._rate = encode_rate(self._writer.stored_bytes, time.monotonic() - self._began)
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
                    f"save-{self._count}/commit",
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
            blobs = {digest: blob for digest, blob in blobs.items() if digest not in attempt.common}
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
        rates = np.array([written.rate for written in ranks], "<u2").tobytes()
        return msgspec.msgpack.encode(_NodeLine(part, raw, stored, attempt.agreed.digest, rates))

    def _on_lines(self, attempt: Attempt, lines: dict[int, Reply], labels: Labels, trace: Trace) -> bytes:
        """Coordinator: the commit. Whatever prevents it aborts the attempt."""
        assert self._committer is not None
        try:
            parts = [msgspec.msgpack.decode(data, type=_NodeLine) for _, data in sorted(checked(lines).items())]
            if any(line.layout != attempt.agreed.digest for line in parts):
                raise SaveError(f"step {attempt.step}: nodes wrote by different layouts")
            placement = self._learn_rates(parts)
            trace.note("placement", placement)
            live = self._committer.commit(
                Contents(
                    attempt=attempt.id,
                    step=attempt.step,
                    layout=attempt.agreed.data,
                    parts=[line.part for line in parts],
                    bytes=sum(line.raw_bytes for line in parts),
                    stored_bytes=sum(line.stored_bytes for line in parts),
                    environment={**labels.environment, "placement": placement},
                    metrics=labels.metrics,
                    note=labels.note,
                ),
                trace,
            )
        except Exception as error:
            try:
                self._committer.abort(attempt.id)
            except FastckptError as second:
                error.add_note(f"aborting the attempt failed too: {second}")
            raise
        return msgspec.msgpack.encode(live)

    def _learn_rates(self, parts: Sequence[_NodeLine]) -> dict[str, Any]:
        """Takes in how fast the ranks wrote; returns how this save was planned."""
        assert self._dealer is not None
        rates = np.zeros(len(self._nodes), np.uint16)
        for node, line in enumerate(parts):
            rates[np.array(self._nodes) == node] = np.frombuffer(line.rates, "<u2")
        placement = self._dealer.outlook()
        self._dealer.rates.add(rates)
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


def _full(offered: Offered) -> bytes:
    return msgspec.msgpack.encode(_Full(offered.offer, offered.sampled(None)))


def offer_digest(offer: RankOffer) -> bytes:
    """What ``Offered.digest`` must be."""
    return chunk_hash(msgspec.msgpack.encode(offer))


def _fill(view: memoryview, pieces: Sequence[Piece], sources: Mapping[int, Source], chunks: Chunks) -> None:
    for piece in pieces:
        size = chunks.item_bytes(piece.shard)
        start = piece.start * size
        with view[piece.byte : piece.byte + (piece.stop - piece.start) * size] as part:
            sources[piece.shard].fill(start, part)
