"""What the ranks of a node read for each other: a byte that several of them want comes from storage once.

agree  one exchange: each says which chunks it wants; the leader deals out those that several want. If the job reads
       each byte once, the leaders exchange too, before that, and the coordinator deals out what several nodes want
map    each maps the memory of the others; if one cannot, none does, and each reads all that it wants
pass   a reader verifies a run in a slot of its memory, and writes its number beside it; each other rank that wants the
       run copies it out and writes that number into its own memory; when all have, the slot is free. What other nodes
       want too they fetch from the slot (``peers``), one rank of each node into a slot of its own

A rank writes to its own memory alone, so that none can harm another by being slow, stopped or late: a slot that someone
is copying from is not filled again. Nothing can deadlock. Who finds a run copies it out without waiting for anything,
and workers look for such runs before all else. Between nodes all read and fetch in one order, into slots for the one
and slots for the other: of all runs that are not yet everywhere, the first has been read or is next, and so is its
fetching on every node. So every slot becomes free, and every reader can go on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from fastckpt.errors import CommitTimeout, RankFailed, RestoreError
from fastckpt.group import Deadline, Group, PeerGaveUp, Reply, checked, gave_up, missing_ranks_error
from fastckpt.plan.relay_plan import Portion, Wanted, plan_node, wanted
from fastckpt.plan.restore_plan import ChunkRead, Want
from fastckpt.repository.chunk_reader import Fetch, Passed, Passing, PlacedChunk, Run, runs_of
from fastckpt.repository.fanout import Address, FanoutAnswer, FanoutEnd, JobFanout, NodeFanout, for_node, node_line
from fastckpt.repository.peers import RunName, Server
from fastckpt.repository.reader import Snapshot
from fastckpt.repository.slots import BEAT, FINISHED, GAVE_UP, SLOTS, Memory, Shape, Where, mapped, own_memory

log = logging.getLogger("fastckpt")

WAIT_SHARE = 0.85
"""Of ``commit_seconds_max``: storage that is silent is given up earlier, and whoever waits for the end of the restore
waits longer, so that each can say what is wrong."""
LEADERS_SHARE, LEADERS_ANSWER_SHARE = 0.88, 0.91
ANSWER_SHARE = 0.95


class _Offer(msgspec.Struct, array_like=True, frozen=True):
    """What a rank wants, and how others come to what it reads."""

    wanted: Wanted
    memory: Where
    address: Address
    """Where ranks of other nodes fetch from it, if they do."""
    problem: str
    """Why they cannot."""


class _Answer(msgspec.Struct, array_like=True, frozen=True):
    portions: list[Portion]
    memories: dict[int, Where]
    problem: str
    """Why the ranks of the node cannot share, if so."""
    fanout: NodeFanout


class _Turn(NamedTuple):
    """A run that goes through the hands of this rank."""

    number: int
    """What the ranks of the node know it by."""
    portion: Portion
    run: Run
    name: RunName | None
    """What other nodes know it by, if they want it too."""

    def is_read_by(self, rank: int) -> bool:
        return self.portion.reader == rank and self.portion.source < 0

    def is_fetched_by(self, rank: int) -> bool:
        return self.portion.reader == rank and self.portion.source >= 0


class NodeRelay:
    """The ``Relay`` of one rank of a node."""

    def __init__(
        self,
        members: Sequence[int],
        rank: int,
        shape: Shape,
        memories: Mapping[int, Memory],
        turns: Sequence[_Turn],
        seconds_max: float,
        fanout: FanoutEnd | None = None,
    ) -> None:
        """``turns``: all that this rank is to pass on or is passed. ``fanout``: what other nodes give and take."""
        self.seconds_max = seconds_max
        self._rank = rank
        self._shape = shape
        self._own = memories[rank]
        self._peers = {peer: memory for peer, memory in memories.items() if peer != rank}
        self._member = {member: number for number, member in enumerate(members)}
        self._fanout = fanout
        # What other nodes wait for comes first, in the order in which they do.
        last = RunName(2**32, 0)
        in_order = sorted(turns, key=lambda turn: (turn.name or last, turn.number))
        self._to_read = deque(turn for turn in in_order if turn.is_read_by(rank))
        self._to_fetch = deque(turn for turn in in_order if turn.is_fetched_by(rank))
        self._takers = {
            turn.number: [taker for taker in turn.portion.ranks if taker != rank]
            for turn in (*self._to_read, *self._to_fetch)
        }
        """For each run of this rank, the others that want it."""
        self._expected: dict[int, dict[int, Run]] = {}
        """For each other rank, the runs that are to come from it."""
        for turn in turns:
            if turn.portion.reader != rank:
                self._expected.setdefault(turn.portion.reader, {})[turn.number] = turn.run
        self.passing_runs: Sequence[Run] = [turn.run for turn in self._to_read]
        self.passed_count = sum(map(len, self._expected.values()))
        self.fetched_count = len(self._to_fetch)
        self._in_slot: list[_Turn | None] = [None] * shape.slots
        """The run in each slot of this rank; None as long as there was none."""
        self._in_use = [False] * shape.slots
        """Whether this rank itself needs what is in the slot still."""
        self._beats: dict[int, int] = {}
        """Of each other rank, as seen when there was last something to do."""
        self._note_beats()

    def next(self) -> Passed | Passing | None:
        self._own.words[BEAT] += 1
        for rank, peer in self._peers.items():
            if blamed := peer.words[GAVE_UP]:
                raise gave_up(rank, blamed - 1, self._rank)
        if self._fanout is not None:
            self._fanout.check()
        task = self._published() or self._passing(self._to_read, range(self._shape.reading_slots))
        if task is not None:
            self._note_beats()
        return task

    def next_fetch(self) -> tuple[Passing, Fetch] | None:
        if self._fanout is None or not self._to_fetch:
            return None
        source, name = self._to_fetch[0].portion.source, self._to_fetch[0].name
        task = self._passing(self._to_fetch, range(self._shape.reading_slots, self._shape.slots))
        if task is None or name is None:
            return None
        return task, Fetch(source, self._fanout.fetching(source, name))

    def _published(self) -> Passed | None:
        for reader, expected in self._expected.items():
            words = self._peers[reader].words
            for slot in range(self._shape.slots if expected else 0):
                number = words[SLOTS + slot]
                if (run := expected.pop(number, None)) is not None:
                    return Passed(reader, slot, number, run, self._peers[reader].slot(slot))
        return None

    def _passing(self, turns: deque[_Turn], slots: range) -> Passing | None:
        free = next(filter(self._is_free, slots), None) if turns else None
        if free is None:
            return None
        turn = turns.popleft()
        self._in_slot[free], self._in_use[free] = turn, True
        return Passing(free, turn.number, turn.run, self._own.slot(free))

    def _is_free(self, slot: int) -> bool:
        return not self._in_use[slot] and not self._not_taken(slot) and self._is_out(slot)

    def _not_taken(self, slot: int) -> list[int]:
        """The ranks of the node that have not yet taken what is in a slot."""
        turn, word = self._in_slot[slot], self._shape.taken(self._member[self._rank], slot)
        takers = self._takers[turn.number] if turn is not None else ()
        return [taker for taker in takers if turn is not None and self._peers[taker].words[word] != turn.number]

    def _is_out(self, slot: int) -> bool:
        """Whether other nodes have all that they want of what is in a slot."""
        turn = self._in_slot[slot]
        if turn is None or turn.name is None or turn.portion.source >= 0 or self._fanout is None:
            return True
        return self._fanout.is_out(turn.name)

    @property
    def all_fetched(self) -> bool:
        return not self._to_fetch

    @property
    def finished(self) -> bool:
        # As long as a fetch is under way somebody has to hear of those that give up.
        if self._to_read or self._to_fetch or self._fetching or any(self._expected.values()):
            return False
        return self._fanout is None or self._fanout.finished

    @property
    def _fetching(self) -> list[_Turn]:
        """The runs that are being fetched."""
        slots = range(self._shape.reading_slots, self._shape.slots)
        return [turn for slot in slots if (turn := self._in_slot[slot]) is not None and self._in_use[slot]]

    @property
    def progress(self) -> int:
        return 0 if self._fanout is None else self._fanout.answers

    # Between the bytes of a slot and a word about them, each side gives and takes a lock, the interpreter's at least:
    # that orders them for other processors too.

    def publish(self, task: Passing) -> None:
        self._own.words[SLOTS + task.slot] = task.number
        turn = self._in_slot[task.slot]
        if self._fanout is not None and turn is not None and turn.name is not None and turn.portion.source < 0:
            self._fanout.publish(turn.name, task.run.raw_views(task.buffer))

    def done(self, task: Passed | Passing) -> None:
        if isinstance(task, Passing):
            self._in_use[task.slot] = False
        else:
            self._own.words[self._shape.taken(self._member[task.reader], task.slot)] = task.number

    def _note_beats(self) -> None:
        self._beats = {rank: peer.words[BEAT] for rank, peer in self._peers.items()}

    def raise_late(self) -> None:
        # Of those that are waited for some may themselves be waiting, for one of which there was no sign of life.
        silent = {rank for rank, beat in self._beats.items() if self._peers[rank].words[BEAT] == beat != FINISHED}
        awaited = {rank for rank, expected in self._expected.items() if expected}
        awaited |= {rank for slot in range(self._shape.slots) for rank in self._not_taken(slot)}
        if self._fanout is not None:
            awaited |= {turn.portion.source for turn in self._fetching} | set(self._fanout.late_ranks())
        raise missing_ranks_error(sorted(silent or awaited), "what the ranks of a node read for each other")

    def give_up(self, error: BaseException) -> None:
        _give_up(error, self._rank, self._own, self._fanout)

    def finish(self) -> None:
        """Nobody need wait for a sign of life of this rank any more."""
        self._own.words[BEAT] = FINISHED
        if self._fanout is not None:
            self._fanout.close()


def _give_up(error: BaseException, rank: int, own: Memory | None, fanout: FanoutEnd | None) -> None:
    """Tells the other ranks of the node, and other nodes; once."""
    blamed = error.missing_ranks[0] if isinstance(error, CommitTimeout) and error.missing_ranks else rank
    if own is not None and not own.words[GAVE_UP]:
        own.words[GAVE_UP] = 1 + blamed
        if fanout is not None:
            fanout.give_up(blamed)


@contextlib.contextmanager
def relayed(
    group: Group,
    members: Sequence[int],
    name: str,
    snapshot: Snapshot,
    wants: Sequence[Want],
    seconds_max: float,
    job: JobFanout | None = None,
) -> Iterator[tuple[list[PlacedChunk], NodeRelay | None]]:
    """What this rank is to read for itself alone, and its part in what the ranks of its node, ``members``, read for
    each other, if they do: for ``Snapshot.read_chunks``, within the block. All of them come here, with the same
    ``name``; they exchange once, and once more if there is anything to share. An error in the block is told to the
    others. ``job``: on every rank, where nodes are to read for each other too.

    What keeps this rank from planning is raised here; ``CommitTimeout`` if another is kept from it or does not come;
    ``RestoreError`` if nodes have begun to read for each other and the ranks of one turn out not to share memory.
    ``seconds_max`` is ``Options.commit_seconds_max``.
    """
    if len(members) == 1 and job is None:
        with snapshot.trace.span("plan"):
            chunks = snapshot.plan(wants)
        yield chunks, None
        return
    with contextlib.ExitStack() as stack:
        meeting = _Meeting(group, members, name, seconds_max)
        failure: Exception | None = None
        server: Server | None = None
        line: Reply
        try:
            with snapshot.trace.span("plan"):
                chunks = snapshot.plan(wants)
            said = wanted([chunk.read.chunk for chunk in chunks], sum(chunk.read.raw_bytes for chunk in chunks))
            shape = Shape(snapshot.layout.chunk_bytes, len(members), job is not None)
            own, where = own_memory(shape, stack)
            problem = ""
            if job is not None:
                server, problem = _listening(group.rank, job.ending, seconds_max * WAIT_SHARE)
            address = (group.host, server.port if server is not None else 0)
            line = msgspec.msgpack.encode(_Offer(said, where, address, problem))
        except Exception as error:
            line = failure = error
        start = time.monotonic()
        answer = msgspec.msgpack.decode(
            meeting.exchange("wanted", line, failure, lambda replies: _dealt(meeting, snapshot, replies, job, start)),
            type=_Answer,
        )
        relay: NodeRelay | None = None
        fanout: FanoutEnd | None = None
        try:
            if answer.portions:
                problem = answer.problem
                memories: dict[int, Memory] = {}
                try:
                    if not problem and own is not None:
                        mine, turns = _turns(snapshot, chunks, answer.portions, group.rank)
                        if job is not None and server is not None and answer.fanout.is_needed:
                            # From here on other nodes get an answer, if only that this rank gives up.
                            read = [
                                turn.name for turn in turns if turn.name is not None and turn.is_read_by(group.rank)
                            ]
                            fanout = FanoutEnd(job, answer.fanout, server, read, seconds_max * WAIT_SHARE)
                        sharing = {rank for portion in answer.portions for rank in portion.ranks}
                        problem, memories = mapped(answer.memories, sharing, group.rank, own, shape, stack)
                    line = problem.encode()
                except Exception as error:
                    line = failure = error
                problem = meeting.exchange("mapped", line, failure, _first_problem).decode()
                if problem and answer.fanout.is_needed:
                    raise RestoreError(
                        f"{problem}. Then nodes cannot read for each other: use Options(read_fanout='node')"
                    )
                if problem and group.rank == members[0]:
                    log.info(
                        "step %d: each rank of this node reads all that it wants, since they cannot share memory: %s",
                        snapshot.step,
                        problem,
                    )
                if not problem:
                    chunks = mine
                    relay = NodeRelay(members, group.rank, shape, memories, turns, seconds_max * WAIT_SHARE, fanout)
            yield chunks, relay
        except BaseException as error:
            _give_up(error, group.rank, own, fanout)
            raise
        if relay is not None:
            relay.finish()


@dataclass(frozen=True)
class _Meeting:
    """The exchanges of the ranks of a node in one restore."""

    group: Group
    members: Sequence[int]
    name: str
    seconds_max: float

    def until(self, start: float, replies: float, answer: float) -> Deadline:
        """These shares of the longest wait after ``start``."""
        return Deadline(start + self.seconds_max * replies, start + self.seconds_max * answer)

    def exchange(self, what: str, reply: Reply, failure: Exception | None, decide: Callable[..., bytes]) -> bytes:
        """The leader's answer. Raises what kept this rank from having a reply; ``PeerGaveUp`` if another has none."""
        try:
            return self.group.exchange(
                f"{self.name}/{what}",
                reply,
                decide,
                members=self.members,
                until=self.until(time.monotonic(), WAIT_SHARE, ANSWER_SHARE),
                what="the ranks of a node to restore",
            )
        except (RankFailed, CommitTimeout) as error:
            if failure is not None:
                raise failure from None
            if isinstance(error, RankFailed):
                raise PeerGaveUp(str(error), sorted(error.failures)) from error
            raise


def _first_problem(replies: dict[int, Reply]) -> bytes:
    return next(filter(None, checked(replies).values()), b"")


def _dealt(
    meeting: _Meeting, snapshot: Snapshot, replies: dict[int, Reply], job: JobFanout | None, start: float
) -> bytes:
    """Who of a node reads what, as its leader decides it; with the other leaders first, if there is a ``job``."""
    group, sizes = meeting.group, snapshot.chunks.sizes
    offers: dict[int, _Offer] = {}
    said: dict[int, Wanted] = {}
    line: Reply = b""
    try:
        offers = {rank: msgspec.msgpack.decode(data, type=_Offer) for rank, data in checked(replies).items()}
        said = {rank: offer.wanted for rank, offer in offers.items()}
        if job is not None:
            problems = (
                f"rank {rank}: {offer.memory.problem or offer.problem}"
                for rank, offer in offers.items()
                if offer.memory.problem or offer.problem
            )
            addresses = {rank: offer.address for rank, offer in offers.items()}
            line = node_line(said, addresses, next(problems, ""), sizes)
    except Exception as error:
        if job is None:
            raise
        line = error
    answer = FanoutAnswer()
    if job is not None:
        # The ranks of the node wait for the answer longer still.
        until = meeting.until(start, LEADERS_SHARE, LEADERS_ANSWER_SHARE)
        answer = job.agree(f"{meeting.name}/nodes", line, sizes, until)
        if answer.problem and group.rank == 0:
            log.info("step %d: each node reads for itself, since not all can share: %s", snapshot.step, answer.problem)
    portions = plan_node(said, group.nodes[group.rank], meeting.members, answer.fanout, sizes)
    memories = {rank: offer.memory for rank, offer in offers.items()} if portions else {}
    problem = next((f"rank {rank}: {one.problem}" for rank, one in memories.items() if one.problem), "")
    here = for_node(answer, group.nodes[group.rank], portions)
    return msgspec.msgpack.encode(_Answer(portions, memories, problem, here))


def _turns(
    snapshot: Snapshot, chunks: Sequence[PlacedChunk], portions: Sequence[Portion], rank: int
) -> tuple[list[PlacedChunk], list[_Turn]]:
    """What this rank alone wants, and the runs that go through its hands, as all ranks number and name them."""
    by_number = {chunk.read.chunk: chunk for chunk in chunks}
    turns = []
    for position, portion in enumerate(portions):
        if rank not in portion.ranks:
            continue
        numbers = [number for start, stop in portion.runs for number in range(start, stop)]
        # Of what goes between nodes this rank may not want all.
        others = [number for number in numbers if number not in by_number]
        sizes = dict(zip(others, snapshot.chunks.sizes(others), strict=True))
        mine = [
            by_number.pop(number)
            if number in by_number
            else PlacedChunk(ChunkRead(number, sizes[number], ()), snapshot.place(number))
            for number in numbers
        ]
        for at, run in enumerate(runs_of(mine), 1):
            name = RunName(at, portion.carried) if portion.carried >= 0 else None
            turns.append(_Turn((position << 32) + at, portion, run, name))
    return list(by_number.values()), turns


def _listening(rank: int, stack: contextlib.ExitStack, seconds_max: float) -> tuple[Server | None, str]:
    """Where other nodes fetch from this rank, until the stack is left; or why they cannot."""
    try:
        server = Server(rank, seconds_max)
    except OSError as error:
        return None, f"cannot listen for other nodes: {error}"
    stack.callback(server.close)
    return server, ""
