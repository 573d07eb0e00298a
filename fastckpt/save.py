"""The save flow. Read this first.

    agree    the ranks agree on the attempt, the layout, and that what they take to be equal is equal; what ranks have
             alike is said once a node, by its digest, and once in the job in full
    write    tensor -> pool buffer -> hash -> codec -> pack, chunk by chunk, in a bounded pool
    commit   each node's part, then the index, then the decision; or, on every rank, the error that prevented it

``Saves`` is what a rank remembers from one save to the next. All of it runs on whatever thread the caller chose: on
the caller's own the first time and when the layout changes, behind the training loop otherwise.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import msgspec

from fastckpt.buffers import Pool, Source
from fastckpt.errors import (
    AnotherWriter,
    CommitTimeout,
    FastckptError,
    LimitExceeded,
    OutOfSpace,
    RankFailed,
    RepositoryNotFound,
    SaveError,
    StorageError,
)
from fastckpt.format import document
from fastckpt.format.chunk import CHUNK_BYTES_MAX, chunk_hash
from fastckpt.format.decision import COMPACT, Format, Live
from fastckpt.format.shard import Box
from fastckpt.format.tables import Chunks, Layout, PartInfo, Piece, RankTable, ValueKind, decode_layout
from fastckpt.group import ANSWER_SECONDS, Assembly, Group, Reply, checked, combined
from fastckpt.options import Options
from fastckpt.plan.alike import by_rank, each, merged
from fastckpt.plan.save_plan import (
    AUTO_CHUNKS_MAX,
    Agreement,
    Comparison,
    RankOffer,
    auto_chunk_bytes,
    keys_to_digest,
    offered_bytes,
    plan_save,
    planned_chunks,
)
from fastckpt.plan.value_kinds import Differences, find_differences, value_kinds
from fastckpt.repository import pull, repository
from fastckpt.repository.pull import Pull
from fastckpt.repository.writer import ChunkWriter, Committer, Contents, outcome, write_part
from fastckpt.storage.deadline import Callers, NoAnswer
from fastckpt.storage.store import Store
from fastckpt.trace import Trace

log = logging.getLogger("fastckpt")

STREAMS = 4
"""Threads a rank that hash and write, each into packs of its own."""
OUTCOME_SECONDS_MIN = 2.0
"""For reading the history after a failure, even if the time for the save is over."""


class Offered(Protocol):
    """What a rank has to save, as the job describes it."""

    offer: RankOffer
    digest: bytes
    """Of ``offer``: tells whether the layout may have changed."""
    values: Mapping[str, bytes]
    """Encoded per-rank values by name."""

    def sampled(self, keys: Sequence[str], *, whole: bool = False) -> dict[str, bytes]:
        """For each of these keys held here, a digest of sampled content, or of all of it."""

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

    @property
    def layout(self) -> Layout:
        return self.chunks.layout

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Raw bytes of this rank's chunks, by row."""
        return [self.chunks.raw_bytes(pieces) for _, pieces in self.mine]

    def pool_bytes(self, budget_bytes: int | None = None) -> int:
        """The staging memory that this rank makes use of, within a budget, which must do for one chunk."""
        least, most = pull.slot_bytes(max(self.sizes, default=1)), pull.pool_bytes(self.sizes, STREAMS)
        return most if budget_bytes is None else max(least, min(budget_bytes, most))


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at saving one step, from agreement on."""

    id: str
    step: int
    agreed: Agreed
    values: tuple[tuple[str, bytes], ...]
    """Names and digests of the coordinator's values: equal ones are stored once, by its node."""
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
    terms: bytes
    """Digest of what this rank offers, and of the layout it would go on with; it may have missed the answer that
    brought a newer one."""
    compared: dict[int, bytes]
    """For each comparison this rank takes part in, a digest over its keys."""


class _Asked(msgspec.Struct, array_like=True, frozen=True):
    """What the coordinator answers to offers."""

    keys: list[str]
    """Digests of the content of these are needed first; none if there is an answer."""
    answer: bytes


class _Go(msgspec.Struct, array_like=True, frozen=True):
    attempt: str
    agreement: Agreement | None
    values: list[tuple[str, bytes]]
    """The coordinator's, by name, with their digests."""
    format_digest: str


class _Written(msgspec.Struct, array_like=True, frozen=True):
    attempt: str
    layout: str
    table: RankTable
    blobs: list[bytes]
    tensor_bytes: int
    stored_bytes: int


class _Grid(NamedTuple):
    """What of a repository a layout depends on."""

    chunk_bytes: int
    compact: bool
    """Whether its readers know families and kinds of values."""


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


class Saves:
    """The saves of one rank to one repository. Calls come one after another, from any thread."""

    def __init__(self, store: Store, group: Group, options: Options) -> None:
        self._store = store
        self._assembly = Assembly(group)
        self._rank = group.rank
        self._nodes = group.nodes
        self._options = options
        self._count = 0
        self._callers = Callers("fastckpt-outcome")
        self._offered = b""
        self._agreed: Agreed | None = None
        self._writer: ChunkWriter | None = None
        # Of attempts that failed, whose packs could not be deleted yet: the store failed, or the history did not tell.
        # What is still there at the end goes with the next job's cleaning.
        self._discarded: list[ChunkWriter] = []
        # The coordinator's side.
        self._committer: Committer | None = None
        self._grid: _Grid | None = None
        self._planned = _Grid(0, True)
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
        mine = {} if isinstance(offered, BaseException) else offered.values
        values = [(name, chunk_hash(mine[name])) for name in sorted(mine)]
        answer = self._ask("hello", offered, self._hello(step), lambda replies: self._on_hello(replies, values))
        assert not isinstance(offered, BaseException), "an error in place of the offer is raised by asking"
        if not answer:
            answer = self._settle(offered, lambda offers, digests: self._on_offers(offers, digests, values, trace))
        go = msgspec.msgpack.decode(answer, type=_Go)
        if go.agreement is not None:
            self._agreed = _agreed(go.agreement, self._rank)
            self._offered = offered.digest
        assert self._agreed is not None
        return Attempt(
            id=go.attempt, step=step, agreed=self._agreed, values=tuple(go.values), format_digest=go.format_digest
        )

    def prepare(self, offered: Offered | BaseException) -> Agreed:
        """Agrees with all ranks on the layout alone, for the saves to come. Writes nothing. An error in place of the
        offer makes every rank raise."""
        self._count += 1
        answer = self._settle(offered, self._on_prepare)
        assert not isinstance(offered, BaseException), "an error in place of the offer is raised by asking"
        self._agreed = _agreed(msgspec.msgpack.decode(answer, type=Agreement), self._rank)
        self._offered = offered.digest
        return self._agreed

    def _ask(
        self,
        name: str,
        offered: Offered | BaseException,
        reply: Callable[[Offered], bytes],
        decide: Callable[[dict[int, bytes]], bytes],
    ) -> bytes:
        """One exchange of all ranks: ``decide`` sees the replies by rank, equal ones as one object. What keeps this
        rank from replying is told to the others and raised here."""
        posted: Reply
        try:
            posted = offered if isinstance(offered, BaseException) else reply(offered)
        except Exception as error:
            posted = error
        try:
            return self._assembly.ask_in_two(
                f"save-{self._count}/{name}",
                posted,
                lambda replies: merged(checked(replies)),
                lambda lines: decide(by_rank(checked(lines).values())),
                self._options.commit_seconds_max,
                "all ranks to call save",
            )
        except FastckptError:
            if isinstance(posted, BaseException):
                raise posted from None
            raise

    def _collect(
        self,
        name: str,
        offered: Offered | BaseException,
        content: Callable[[Offered], bytes],
        decide: Callable[[dict[int, bytes]], bytes],
    ) -> bytes:
        """What every rank has to say, at the coordinator: each says a digest of it, and one of those with equal ones
        says it in full. ``decide`` sees the contents by rank, equal ones as one object."""
        said: dict[int, bytes] = {}
        mine = b""

        def digest(offered: Offered) -> bytes:
            nonlocal mine
            mine = content(offered)
            return chunk_hash(mine)

        def on_digests(replies: dict[int, bytes]) -> bytes:
            said.update(replies)
            speakers = {digest: rank for rank, digest in sorted(replies.items(), reverse=True)}
            return msgspec.msgpack.encode(sorted(speakers.values()))

        def on_contents(replies: dict[int, bytes]) -> bytes:
            in_full = {said[rank]: data for rank, data in replies.items() if data}
            return decide({rank: in_full[digest] for rank, digest in said.items()})

        answer = self._ask(f"{name}-digests", offered, digest, on_digests)
        speaks = self._rank in msgspec.msgpack.decode(answer, type=list[int])
        return self._ask(name, offered, lambda _: mine if speaks else b"", on_contents)

    def _settle(
        self,
        offered: Offered | BaseException,
        decide: Callable[[dict[int, RankOffer], dict[int, dict[str, bytes]]], bytes],
    ) -> bytes:
        """Gathers what all ranks offer, and then the digests of what must be compared: ``decide`` sees both by rank,
        equal ones as one object."""
        offers: dict[int, RankOffer] = {}

        def on_offers(replies: dict[int, bytes]) -> bytes:
            self._offers = each(replies, chunk_hash)
            offers.update(each(replies, msgspec.msgpack.Decoder(RankOffer).decode))
            keys = keys_to_digest(offers, len(self._nodes))
            return msgspec.msgpack.encode(_Asked(keys, b"" if keys else decide(offers, {})))

        def on_digests(replies: dict[int, bytes]) -> bytes:
            return decide(offers, each(replies, msgspec.msgpack.Decoder(dict[str, bytes]).decode))

        data = self._collect("offers", offered, lambda offered: msgspec.msgpack.encode(offered.offer), on_offers)
        asked = msgspec.msgpack.decode(data, type=_Asked)
        if not asked.keys:
            return asked.answer
        return self._collect(
            "content",
            offered,
            lambda offered: msgspec.msgpack.encode(offered.sampled(asked.keys, whole=True)),
            on_digests,
        )

    def _hello(self, step: int) -> Callable[[Offered], bytes]:
        layout = self._agreed.digest if self._agreed is not None else ""
        return lambda offered: msgspec.msgpack.encode(
            _Hello(step, _terms(offered.digest, layout), self._compared(offered))
        )

    def _compared(self, offered: Offered) -> dict[int, bytes]:
        if not self.expects(offered) or self._agreed is None:
            return {}
        digests: dict[int, bytes] = {}
        for number, comparison in enumerate(self._agreed.comparisons):
            if comparison.has(self._rank):
                sampled = offered.sampled(comparison.keys)
                digests[number] = chunk_hash(b"".join(sampled[key] for key in comparison.keys))
        return digests

    def _on_hello(self, replies: dict[int, bytes], values: list[tuple[str, bytes]]) -> bytes:
        """Coordinator: goes ahead if everything is as it was; an empty answer asks everyone for the whole offer."""
        hellos = each(replies, msgspec.msgpack.Decoder(_Hello).decode)
        different = {id(hello): hello for hello in hellos.values()}.values()
        if len({hello.step for hello in different}) > 1:
            steps = ", ".join(f"rank {rank}: {hello.step}" for rank, hello in sorted(hellos.items())[:8])
            raise ValueError(f"ranks save different steps at the same time: {steps}; every rank saves the same step")
        unchanged = self._agreed is not None and hellos.keys() == self._offers.keys()
        if self._agreed is not None and unchanged:
            layout = self._agreed.digest
            terms = {digest: _terms(digest, layout) for digest in set(self._offers.values())}
            unchanged = all(hello.terms == terms[self._offers[rank]] for rank, hello in hellos.items())
        for number in range(len(self._agreed.comparisons) if self._agreed else 0):
            unchanged = unchanged and len({h.compared[number] for h in different if number in h.compared}) <= 1
        if not unchanged or self._agreed is None:
            return b""
        if self._committer is None and self._open(self._planned) != self._planned:
            return b""  # the repository was made meanwhile, with a grid of its own
        return self._go(None, values)

    def _on_offers(
        self,
        offers: dict[int, RankOffer],
        digests: dict[int, dict[str, bytes]],
        values: list[tuple[str, bytes]],
        trace: Trace,
    ) -> bytes:
        """Coordinator: plans, and opens the repository for writing if this is the first save."""
        with trace.span("plan"):
            agreement = self._plan(offers, digests)  # refuses before anything is made
        if self._committer is None and self._open(self._planned) != self._planned:
            with trace.span("plan"):
                agreement = self._plan(offers, digests)
        return self._go(agreement, values)

    def _on_prepare(self, offers: dict[int, RankOffer], digests: dict[int, dict[str, bytes]]) -> bytes:
        if self._grid is None and repository.exists(self._store):
            self._grid = _grid_of(repository.Repository(self._store).format)
        return msgspec.msgpack.encode(self._plan(offers, digests))

    def _plan(self, offers: dict[int, RankOffer], digests: dict[int, dict[str, bytes]]) -> Agreement:
        """Coordinator: the layout of what ranks offer, on the repository's grid, or one that suits it."""
        grid, is_free = self._grid, self._grid is None and not self._options.chunk_bytes
        if grid is None:
            grid = _Grid(self._options.chunk_bytes or auto_chunk_bytes(offered_bytes(offers)), True)
        while True:
            is_free = is_free and grid.chunk_bytes < CHUNK_BYTES_MAX
            try:
                layout, comparisons = plan_save(offers, digests, self._nodes, grid.chunk_bytes, families=grid.compact)
            except LimitExceeded:
                if not is_free:
                    raise
            else:
                if not is_free or planned_chunks(layout) <= AUTO_CHUNKS_MAX:
                    self._planned = grid
                    return Agreement(document.pack_table(layout), comparisons)
            # Shards are too small for so many: in larger chunks more of them are bundled.
            grid = grid._replace(chunk_bytes=2 * grid.chunk_bytes)

    def _open(self, planned: _Grid) -> _Grid:
        """Coordinator: opens the repository for writing, made with this grid if there is none. Returns its grid."""
        made = repository.create(self._store, planned.chunk_bytes)
        committer = Committer(self._store, made.format_digest)
        committer.open()
        self._committer, self._grid = committer, _grid_of(made.format)
        return self._grid

    def _go(self, agreement: Agreement | None, values: list[tuple[str, bytes]]) -> bytes:
        assert self._committer is not None
        return msgspec.msgpack.encode(
            _Go(self._committer.next_attempt(), agreement, values, self._committer.format_digest)
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
        layout = agreed.layout
        shards = {piece.shard for _, pieces in agreed.mine for piece in pieces}
        try:
            sources = {
                shard: offered.source(layout.keys[layout.shard_key(shard)], layout.box(shard))
                for shard in sorted(shards)
            }
            streams = pull.streams_of(agreed.sizes, STREAMS, pool)
            codec = self._options.codec
            self._writer = ChunkWriter(self._store, attempt.id, self._rank, agreed.sizes, codec, trace, streams)
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
        flow.run(self._store)
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
            raise

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
        return msgspec.msgpack.encode(_NodeLine(part.node, digest, part.size, raw, stored, layout, differences))

    def _on_lines(self, attempt: Attempt, lines: dict[int, Reply], labels: Labels, trace: Trace) -> bytes:
        """Coordinator: the commit. Whatever prevents it aborts the attempt."""
        assert self._committer is not None
        try:
            parts = [msgspec.msgpack.decode(data, type=_NodeLine) for _, data in sorted(checked(lines).items())]
            if any(line.layout.hex() != attempt.agreed.digest[:32] for line in parts):
                raise SaveError(f"step {attempt.step}: nodes wrote by different layouts")
            live = self._committer.commit(
                Contents(
                    attempt=attempt.id,
                    step=attempt.step,
                    layout=attempt.agreed.data,
                    parts=[PartInfo(line.node, line.digest.hex(), line.part_bytes) for line in parts],
                    bytes=sum(line.raw_bytes for line in parts),
                    stored_bytes=sum(line.stored_bytes for line in parts),
                    values=self._value_kinds(attempt, parts),
                    environment=labels.environment,
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

    def _value_kinds(self, attempt: Attempt, parts: Sequence[_NodeLine]) -> dict[str, ValueKind] | None:
        if self._grid is None or not self._grid.compact:
            return None
        return value_kinds([name for name, _ in attempt.values], [line.values for line in parts])

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
    if isinstance(error, FastckptError | ValueError | TypeError):
        return error
    typed = SaveError(f"step {step}: {type(error).__name__}: {error}")
    typed.__cause__ = error
    return typed


def _terms(offered: bytes, layout: str) -> bytes:
    return chunk_hash(offered + layout.encode())


def _grid_of(made: Format) -> _Grid:
    return _Grid(made.chunk_bytes, COMPACT in made.features)


def offer_digest(offer: RankOffer) -> bytes:
    """What ``Offered.digest`` must be."""
    return chunk_hash(msgspec.msgpack.encode(offer))


def _agreed(agreement: Agreement, rank: int) -> Agreed:
    digest = document.digest(agreement.layout)
    chunks = decode_layout(agreement.layout, digest)
    return Agreed(
        digest=digest,
        data=agreement.layout,
        chunks=chunks,
        comparisons=tuple(agreement.comparisons),
        mine=tuple((chunk, tuple(pieces)) for chunk, pieces in chunks.of_rank(rank)),
    )


def _fill(view: memoryview, pieces: Sequence[Piece], sources: Mapping[int, Source], layout: Layout) -> None:
    for piece in pieces:
        size = layout.item_bytes(piece.shard)
        start = piece.start * size
        with view[piece.byte : piece.byte + (piece.stop - piece.start) * size] as part:
            sources[piece.shard].fill(start, part)
