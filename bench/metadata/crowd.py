"""All ranks of a job in one process: the coordinator is real, and so is what leaders do, one after another.

What the other ranks say follows from their kind: ranks that offer the same say the same. Lines go through the encoding
they travel in. Time is that of the coordinator alone: decoding all lines, and deciding.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from fastckpt import agreement, save
from fastckpt.agreement import Attempt, offer_digest
from fastckpt.buffers import Source
from fastckpt.format import names
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.decision import Live
from fastckpt.format.shard import Box
from fastckpt.format.tables import PackInfo, RankTable
from fastckpt.group import Assembly, Deadline, Decide, Reply, decode_reply, encode_reply
from fastckpt.plan.rates import encode_rate
from fastckpt.plan.save_plan import RankOffer
from fastckpt.save import Labels, Saves
from fastckpt.topology.offer import offer
from fastckpt.trace import Trace

VALUE_BYTES = 200
"""Of a rank's own value."""
RATES = [encode_rate(int(1e9 * (0.98 + 0.001 * step)), 1.0) for step in range(41)]
"""That ranks write at: a little different, too little for another plan."""


class Kind:
    """What ranks that offer the same have to save: what ``Offered`` asks for, without tensors."""

    def __init__(self, offer: RankOffer) -> None:
        self.offer = offer
        self.digest = offer_digest(offer)
        self.values: Mapping[str, bytes] = {"epoch": b"\0" * 16, "scheduler": b"\1" * 500, "rng": b"0" * VALUE_BYTES}
        self._own = {tensor.key for tensor in offer.tensors}

    def sampled(self, keys: Sequence[str], *, whole: bool = False) -> dict[str, bytes]:
        return {key: chunk_hash(key.encode()) for key in keys if key in self._own}

    def source(self, key: str, box: Box) -> Source:
        raise NotImplementedError

    def check_unchanged(self) -> None:
        pass


@dataclass
class Exchanged:
    """One exchange, as the coordinator saw it."""

    name: str
    seconds: float = 0.0
    line_bytes: list[int] = field(default_factory=list)
    answer_bytes: int = 0


class Everyone(Assembly):
    """Looks for the leaders once, and not once for each of them."""

    @functools.cached_property
    def leaders(self) -> list[int]:  # type: ignore[override]
        return super().leaders


class Crowd:
    """The ``Group`` of rank 0."""

    rank: int = 0

    def __init__(self, offers: Mapping[int, RankOffer], nodes: Sequence[int]) -> None:
        self.size = len(nodes)
        self.nodes = tuple(nodes)
        kinds = {id(offer): Kind(offer) for offer in {id(offer): offer for offer in offers.values()}.values()}
        self.kinds = {rank: kinds[id(offer)] for rank, offer in offers.items()}
        self.exchanged: list[Exchanged] = []
        self._members: dict[int, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            self._members.setdefault(node, []).append(rank)
        self._line: Reply | None = None
        self._is_recording = False
        self._lines: dict[int, bytes] = {}
        self._speakers: frozenset[int] = frozenset()
        self._keys: Sequence[str] = ()
        self.values: Mapping[int, Mapping[str, bytes]] | None = None
        """Plain values by rank, if not those of its kind and one of its own."""

    def exchange(
        self, name: str, reply: Reply, decide: Decide, *, members: Sequence[int], until: Deadline, what: str
    ) -> bytes:
        stage = name.split("/")[1]
        if name.endswith("/top"):
            if self._is_recording:
                self._line = reply
                return b""
            return self._decide(stage, reply, decide)
        self._lines, self._is_recording = {}, True
        for node, ranks in self._members.items():
            if node:
                # Its leader acts: parts are named by the node of the rank that writes them.
                self.saves._rank = ranks[0]
                decide({rank: self._reply(stage, rank) for rank in ranks})
                assert self._line is not None
                self._lines[ranks[0]] = encode_reply(self._line)
        self._is_recording, self.saves._rank = False, 0
        mine = self._members[0]
        return decide({rank: reply if rank == 0 else self._reply(stage, rank) for rank in mine})

    def _decide(self, stage: str, reply: Reply, decide: Decide) -> bytes:
        exchanged = Exchanged(stage, line_bytes=[len(line) for line in self._lines.values()])
        self.exchanged.append(exchanged)
        begin = time.perf_counter()
        replies = {0: reply, **{rank: decode_reply(line) for rank, line in self._lines.items()}}
        answer = decide(replies)
        exchanged.seconds = time.perf_counter() - begin
        exchanged.answer_bytes = len(encode_reply(answer))
        if stage.endswith("-digests"):
            self._speakers = frozenset(msgspec.msgpack.decode(answer, type=list[int]))
        elif stage == "offers":
            self._keys = msgspec.msgpack.decode(answer, type=agreement._Asked).keys
        return answer

    # What the other ranks say.

    def _reply(self, stage: str, rank: int) -> bytes:
        kind = self.kinds[rank]
        match stage:
            case "hello":
                return self._hello(kind, rank)
            case "topology":
                return msgspec.msgpack.encode(offer(None, f"cn{self.nodes[rank]:05}"))
            case "offers-digests":
                return kind.digest
            case "offers":
                return msgspec.msgpack.encode(kind.offer) if rank in self._speakers else b""
            case "content-digests":
                return self._contents(kind)[1]
            case "content":
                return self._contents(kind)[0] if rank in self._speakers else b""
            case "commit":
                return self._written(rank)
        raise AssertionError(stage)

    def _contents(self, kind: Kind) -> tuple[bytes, bytes]:
        if kind not in self._content_of:
            content = msgspec.msgpack.encode(kind.sampled(self._keys, whole=True))
            self._content_of[kind] = content, chunk_hash(content)
        return self._content_of[kind]

    def _hello(self, kind: Kind, rank: int) -> bytes:
        agreed = self.saves._agreements._agreed
        takes_part = frozenset(
            number for number, one in enumerate(agreed.comparisons if agreed else ()) if one.has(rank)
        )
        if (kind, takes_part) not in self._hellos:
            compared = {}
            for number in sorted(takes_part):
                assert agreed is not None
                sampled = kind.sampled(agreed.comparisons[number].keys)
                compared[number] = chunk_hash(b"".join(sampled.values()))
            terms = agreement._terms(kind.digest, "" if agreed is None else agreed.digest)
            self._hellos[kind, takes_part] = msgspec.msgpack.encode(agreement._Hello(self.step, terms, compared))
        return self._hellos[kind, takes_part]

    def begin(self, step: int, saves: Saves) -> None:
        """Before each save."""
        if self.values is not None:
            self.kinds[0].values = self.values[0]
        self.step, self.saves = step, saves
        saves._assembly = saves._agreements._assembly = Everyone(self)
        self._hellos: dict[tuple[Kind, frozenset[int]], bytes] = {}
        self._content_of: dict[Kind, tuple[bytes, bytes]] = {}

    def commit(self, attempt: Attempt) -> Live:
        """The commit of a save whose packs are written: tables of the right length, with hashes at random."""
        self._attempt = attempt
        written: Any = _Table(self._table(0))
        return self.saves.commit(attempt, written, self._values(0), Labels(), Trace())

    def _written(self, rank: int) -> bytes:
        table = self._table(rank)
        values = self._values(rank)
        digests = {name: chunk_hash(blob) for name, blob in values.items()}
        table = msgspec.structs.replace(table, values=digests)
        attempt = self._attempt
        common = {digest for _, digest in attempt.values}
        blobs = [blob for name, blob in values.items() if digests[name] not in common]
        size, rate = sum(info.size for info in table.packs), RATES[rank * 7919 % len(RATES)]
        written = save._Written(attempt.id, attempt.agreed.digest, table, blobs, size, size, rate)
        return msgspec.msgpack.encode(written)

    def _values(self, rank: int) -> Mapping[str, bytes]:
        if self.values is not None:
            return self.values[rank]
        same = self.kinds[rank].values
        return {**same, "rng": same["rng"] + rank.to_bytes(4, "little")} if rank else same

    def _table(self, rank: int) -> RankTable:
        chunks = self._attempt.agreed.chunks
        count, length = chunks.row_count(rank), chunks.layout.chunk_bytes // 4
        return RankTable(
            rank=rank,
            packs=[PackInfo(names.pack(self._attempt.id, rank, 0), count * length)] if count else [],
            pack=bytes(4 * count),
            offset=(np.arange(count, dtype="<u8") * length).tobytes(),
            length=np.full(count, length, "<u4").tobytes(),
            codec=bytes(count),
            hashes=np.random.default_rng(rank).bytes(32 * count),
            stored_hashes=b"",
            values={},
        )


@dataclass(frozen=True)
class _Table:
    """Rank 0's packs, as ``Saves.commit`` asks for them."""

    made: RankTable

    @property
    def stored_bytes(self) -> int:
        return sum(info.size for info in self.made.packs)

    def table(self, values: Mapping[str, bytes]) -> RankTable:
        return msgspec.structs.replace(self.made, values=dict(values))
