"""How the ranks agree before each save: on the attempt, the layout, and that what they take to be equal is equal.

What ranks have alike is said once a node, and offers and digests of content once in the job in full. The coordinator
plans; where nothing has changed, one exchange is all there is.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import msgspec

from fastckpt.buffers import Source
from fastckpt.errors import FastckptError, LimitExceeded
from fastckpt.format import document
from fastckpt.format.chunk import CHUNK_BYTES_MAX, CHUNKS_MAX, chunk_hash
from fastckpt.format.decision import COMPACT, Format
from fastckpt.format.shard import Box
from fastckpt.format.tables import Chunks, Layout, Piece, decode_layout
from fastckpt.group import Assembly, Reply, checked
from fastckpt.options import Options
from fastckpt.plan.alike import by_rank, each, merged
from fastckpt.plan.deal import Dealer
from fastckpt.plan.save_plan import (
    AUTO_CHUNKS_MAX,
    Agreement,
    Comparison,
    RankOffer,
    auto_chunk_bytes,
    keys_to_digest,
    offered_bytes,
    plan_save,
)
from fastckpt.repository import pull, repository
from fastckpt.repository.writer import Committer
from fastckpt.storage.store import Store
from fastckpt.topology import offer as topology_offer
from fastckpt.trace import Trace


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
    number: int
    """Which call of the job's this is, in its exchanges."""
    agreed: Agreed
    values: tuple[tuple[str, bytes], ...]
    """Names and digests of the coordinator's values: equal ones are stored once, by its node."""
    format_digest: str
    """Of the FORMAT object as the coordinator sees it."""


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


class _Grid(NamedTuple):
    """What of a repository a layout depends on."""

    chunk_bytes: int
    compact: bool
    """Whether its readers know families and kinds of values."""


class Agreements:
    """The agreements of one rank with the others of its job. Calls come one after another, from any thread."""

    def __init__(
        self,
        store: Store,
        assembly: Assembly,
        options: Options,
        topology: topology_offer.Given,
        streams_max: int,
    ) -> None:
        """``streams_max``: as of ``Agreed``."""
        self._store = store
        self._assembly = assembly
        self._rank = assembly.group.rank
        self._nodes = assembly.group.nodes
        self._options = options
        self._topology = topology
        self._has_topology = False
        """Whether the ranks have agreed on it."""
        self._streams_max = streams_max
        self._call: Literal["save", "prepare"] = "save"
        self._count = 0
        self._offered = b""
        self._agreed: Agreed | None = None
        # The coordinator's side.
        self.dealer: Dealer | None = None
        """None until the ranks have agreed on the topology."""
        self.committer: Committer | None = None
        """None until the repository is open for writing."""
        self._grid: _Grid | None = None
        self._planned = _Grid(0, True)
        self._offers: dict[int, bytes] = {}

    @property
    def is_compact(self) -> bool:
        """At the coordinator: whether readers of the open repository know families and kinds of values."""
        return self._grid is not None and self._grid.compact

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
        self._call = "save"
        self._count += 1
        mine = {} if isinstance(offered, BaseException) else offered.values
        values = [(name, chunk_hash(mine[name])) for name in sorted(mine)]
        answer = self._ask("hello", offered, self._hello(step), lambda replies: self._on_hello(replies, values))
        assert not isinstance(offered, BaseException), "an error in place of the offer is raised by asking"
        if not answer:
            self._agree_on_topology(offered)
            answer = self._settle(offered, lambda offers, digests: self._on_offers(offers, digests, values, trace))
        go = msgspec.msgpack.decode(answer, type=_Go)
        if go.agreement is not None:
            self._agreed = agreed(go.agreement, self._rank, self._streams_max)
            self._offered = offered.digest
        assert self._agreed is not None
        return Attempt(
            id=go.attempt,
            step=step,
            number=self._count,
            agreed=self._agreed,
            values=tuple(go.values),
            format_digest=go.format_digest,
        )

    def prepare(self, offered: Offered | BaseException) -> Agreed:
        """Agrees with all ranks on the layout alone, for the saves to come. Writes nothing. An error in place of the
        offer makes every rank raise."""
        self._call = "prepare"
        self._count += 1
        self._agree_on_topology(offered)
        answer = self._settle(offered, self._on_prepare)
        assert not isinstance(offered, BaseException), "an error in place of the offer is raised by asking"
        self._agreed = agreed(msgspec.msgpack.decode(answer, type=Agreement), self._rank, self._streams_max)
        self._offered = offered.digest
        return self._agreed

    def _agree_on_topology(self, offered: Offered | BaseException) -> None:
        """Once a job. ``TopologyError`` on every rank, naming those that disagree or have none to give."""
        if self._has_topology:
            return
        with self._topology.agreeing():
            self._ask("topology", offered, self._own_topology, self._on_topology)
        self._has_topology = True

    def _own_topology(self, _: Offered) -> bytes:
        return msgspec.msgpack.encode(self._topology.offer(socket.gethostname()))

    def _on_topology(self, replies: dict[int, bytes]) -> bytes:
        offers = each(replies, msgspec.msgpack.Decoder(topology_offer.Offer).decode)
        topology = topology_offer.agree([offers[rank] for rank in sorted(offers)], self._topology.known, self._nodes)
        self.dealer = Dealer(topology.tree(), writers=self._options.writers, streams=self._streams_max)
        return b""

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
                f"{self._call}-{self._count}/{name}",
                posted,
                lambda replies: merged(checked(replies)),
                lambda lines: decide(by_rank(checked(lines).values())),
                self._options.commit_seconds_max,
                f"all ranks to call {self._call}",
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
        if not unchanged or self._agreed is None or (self.dealer is not None and self.dealer.would_gain()):
            return b""
        if self.committer is None and self._open(self._planned) != self._planned:
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
        if self.committer is None and self._open(self._planned) != self._planned:
            with trace.span("plan"):
                agreement = self._plan(offers, digests)
        return self._go(agreement, values)

    def _on_prepare(self, offers: dict[int, RankOffer], digests: dict[int, dict[str, bytes]]) -> bytes:
        if self._grid is None and repository.exists(self._store):
            self._grid = _grid_of(repository.Repository(self._store).format)
        return msgspec.msgpack.encode(self._plan(offers, digests))

    def _plan(self, offers: dict[int, RankOffer], digests: dict[int, dict[str, bytes]]) -> Agreement:
        """Coordinator: the layout of what ranks offer, on the repository's grid, or one that suits it."""
        assert self.dealer is not None
        grid, is_free = self._grid, self._grid is None and not self._options.chunk_bytes
        if grid is None:
            grid = _Grid(self._options.chunk_bytes or auto_chunk_bytes(offered_bytes(offers)), True)
        while True:
            is_free = is_free and grid.chunk_bytes < CHUNK_BYTES_MAX
            try:
                layout, comparisons = plan_save(
                    offers,
                    digests,
                    self._nodes,
                    grid.chunk_bytes,
                    families=grid.compact,
                    chunks_max=AUTO_CHUNKS_MAX if is_free else CHUNKS_MAX,
                    dealer=self.dealer,
                )
            except LimitExceeded:
                if not is_free:
                    raise
            else:
                self._planned = grid
                return Agreement(document.pack_table(layout), comparisons)
            # Shards are too small for so many: in larger chunks more of them are bundled.
            grid = grid._replace(chunk_bytes=2 * grid.chunk_bytes)

    def _open(self, planned: _Grid) -> _Grid:
        """Coordinator: opens the repository for writing, made with this grid if there is none. Returns its grid."""
        made = repository.create(self._store, planned.chunk_bytes)
        committer = Committer(self._store, made.format_digest)
        committer.open()
        self.committer, self._grid = committer, _grid_of(made.format)
        return self._grid

    def _go(self, agreement: Agreement | None, values: list[tuple[str, bytes]]) -> bytes:
        assert self.committer is not None
        return msgspec.msgpack.encode(
            _Go(self.committer.next_attempt(), agreement, values, self.committer.format_digest)
        )


def _terms(offered: bytes, layout: str) -> bytes:
    return chunk_hash(offered + layout.encode())


def _grid_of(made: Format) -> _Grid:
    return _Grid(made.chunk_bytes, COMPACT in made.features)


def offer_digest(offer: RankOffer) -> bytes:
    """What ``Offered.digest`` must be."""
    return chunk_hash(msgspec.msgpack.encode(offer))


def agreed(agreement: Agreement, rank: int, streams_max: int) -> Agreed:
    """What an agreement is to one rank."""
    digest = document.digest(agreement.layout)
    chunks = decode_layout(agreement.layout, digest)
    return Agreed(
        digest=digest,
        data=agreement.layout,
        chunks=chunks,
        comparisons=tuple(agreement.comparisons),
        mine=tuple((chunk, tuple(pieces)) for chunk, pieces in chunks.of_rank(rank)),
        streams_max=streams_max,
    )
