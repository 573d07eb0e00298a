"""Crash states: what a crash at any point of any scenario may leave of a repository, and what must hold then.

A scenario runs once on a store that logs what is done to it. A crash state is a prefix of that log, a subset of what
was not durable by then (names that may be there or not, each on its own), and what those hold. Each state is judged by
``violations``: what was reported committed restores bit for bit, nothing else is visible unless it is whole, the next
job saves without help and takes away what the dead one left. Some states are gone on from, by a job that may die at any
point too. The same enumeration finds planted mistakes in the order of the commit.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import blake3
import pytest

from fastckpt.format import document, names
from fastckpt.format.decision import Live
from fastckpt.format.tables import Part, PartInfo
from fastckpt.repository.history import now
from fastckpt.repository.writer import Committer, Contents
from fastckpt.storage.memory import MemoryStore
from fastckpt.storage.store import Bytes, ObjectInfo, ObjectWriter, Store
from fastckpt.trace import Trace
from tests.crash.numpy_job import GENERATION
from tests.crash.scenarios import SCENARIOS, Run, Scenario, given_up, nothing, one_saved, prepared, violations
from tests.crash.volatile_store import Fate, Log, VolatileStore, moments

ALL = [
    *SCENARIOS,
    Scenario("given up", one_saved, given_up, frozenset({2, 3, 4})),
    Scenario("four ranks", nothing, lambda run: run.save_together(4, 1, 2), frozenset({1, 2})),
]
"""Each makes its part of the states."""
AFTER_A_CRASH = GENERATION + 8
"""What a job saves that finds a crash state and dies too."""
STATES_MIN = 100_000
SOAK_STATES_MIN = 1_000_000
PROCESSES = 2
IN_STEP_SECONDS = 0.02
"""For ``VolatileStore``."""
MOMENTS_A_TASK = 6
"""Neighbours, so that what is learned about one helps with the next."""


class Limits(NamedTuple):
    """How much is enumerated. What exceeds a limit is drawn instead, by seed."""

    subsets: int
    """Subsets of the pending names at one moment: 4096 is all of them for 12 names."""
    states: int
    """States of one scenario, shared evenly by the moments at which something is pending, and there by its subsets."""
    recoveries: int
    """States of each task that are gone on from."""
    audited: float
    """Of the states that are recognised, how many are judged all the same, to see that nothing else comes out."""


TEST = Limits(subsets=4096, states=75_000, recoveries=3, audited=0.02)
SOAK = Limits(subsets=4096, states=1_000_000, recoveries=20, audited=0.002)
SECOND_CRASH = Limits(subsets=8, states=500, recoveries=0, audited=0.0)
FIRST_FOUND = Limits(subsets=64, states=5000, recoveries=0, audited=0.0)
SUBSETS_OF_FOUR_RANKS = 16
"""In the shorter test. Eight packs are open at once there, and nearly every subset has to be judged in full."""


# --- judging a state ------------------------------------------------------------------------------------------------


class Watched(MemoryStore):
    """A crash state that remembers of which of its objects anybody has seen more than the name."""

    def __init__(self, tree: Mapping[str, bytes]) -> None:
        super().__init__("job")
        for name, content in tree.items():
            super().create(name, content)
        self._tree = tree
        self.seen: set[str] = set()

    def read(self, name: str, *, size_max: int) -> bytes:
        self.seen.add(name)
        return super().read(name, size_max=size_max)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.seen.add(name)
        super().read_into(name, offset, buffer)

    def size(self, name: str) -> int:
        self.seen.add(name)
        return super().size(name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (_Listed(self, info) for info in super().list(prefix))  # type: ignore[misc]

    def seen_of_the_state(self) -> dict[str, bytes]:
        return {name: self._tree[name] for name in self.seen if name in self._tree}


class _Listed:
    """An ``ObjectInfo`` whose size counts as seen only if it is looked at."""

    def __init__(self, store: Watched, info: ObjectInfo) -> None:
        self._store, self._info = store, info
        self.name = info.name

    @property
    def size(self) -> int:
        self._store.seen.add(self.name)
        return self._info.size


@dataclass
class Verdict:
    seen: dict[str, bytes]
    """What was looked at to reach it."""
    found: list[str]


class Judge:
    """Judges crash states by ``violations``, and recognises those that must be judged as one before was.

    What ``violations`` does is determined by what the store answers (and by clock, random ids and the order of threads,
    on which no verdict may depend). The answers to
    ``create``, ``write``, ``delete``, ``children`` and ``list`` are determined by the names that are there; those to
    ``read``, ``read_into`` and ``size`` by the object asked for. So if a state has the same names as one that has been
    judged, the same bytes in every object that was looked at then, and the same numbers were reported, the judge would
    ask the same and be answered the same, from the first question to the last: the verdict is the same. That a torn
    pack of an attempt without a decision makes no difference is not assumed: it is seen that nobody looks at it. A
    share of the recognised states is judged all the same (``audited``).
    """

    def __init__(self, possible: frozenset[int], audited: float) -> None:
        self._possible = set(possible)
        self._audited = audited
        self._verdicts: dict[tuple[frozenset[int], frozenset[str]], list[Verdict]] = {}
        self.judged = self.recognised = self.audits = 0

    def judge(self, state: State, random: Random) -> list[str]:
        verdicts = self._verdicts.setdefault((state.told, state.names), [])
        for verdict in verdicts:
            if all(state.tree[name] == content for name, content in verdict.seen.items()):
                self.recognised += 1
                if random.random() < self._audited:
                    self.audits += 1
                    found = self._judge(state).found
                    assert bool(found) == bool(verdict.found), ("not to be recognised", found, verdict.found)
                return verdict.found
        self.judged += 1
        verdicts.append(self._judge(state))
        return verdicts[-1].found

    def _judge(self, state: State) -> Verdict:
        store = Watched(state.tree)
        found = violations(store, set(state.told), self._possible)
        return Verdict(store.seen_of_the_state(), found)


# --- enumerating states ---------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Some neighbouring moments of one log."""

    what: str
    log: Log
    start: Mapping[str, bytes]
    first: int
    end: int
    told: frozenset[int]
    """What was reported before the log begins."""
    possible: frozenset[int]
    """All that may have been saved."""
    seed: int
    limits: Limits
    states_a_moment: int


def whole_task(
    what: str,
    log: Log,
    start: Mapping[str, bytes],
    first: int,
    told: frozenset[int],
    possible: frozenset[int],
    seed: int,
    limits: Limits,
) -> Task:
    """All moments of a log from ``first`` on."""
    busy = sum(bool(moment.pending) for moment in itertools.islice(moments(start, log), first, None))
    return Task(what, log, start, first, len(log) + 1, told, possible, seed, limits, limits.states // max(1, busy))


@dataclass
class Tally:
    """What was looked at, and what was wrong."""

    moments: int = 0
    enumerated: int = 0
    distinct: set[int] = field(default_factory=set)
    """States by what is there and what was reported: see ``_fingerprint``."""
    judged: int = 0
    recognised: int = 0
    audits: int = 0
    recoveries: int = 0
    pending_max: int = 0
    """At one moment."""
    fates: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Of distinct states: kind of the pending object, and what became of it."""
    found: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.distinct |= other.distinct
        self.fates += other.fates
        self.found += other.found
        self.pending_max = max(self.pending_max, other.pending_max)
        for name in ("moments", "enumerated", "judged", "recognised", "audits", "recoveries"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        objects = sorted({kind for kind, _ in self.fates})
        lines = [
            f"{self.moments} moments, {self.enumerated} states enumerated, {len(self.distinct)} of them distinct: "
            f"{self.judged} judged in full, {self.recognised} recognised (of them {self.audits} judged all the same); "
            f"{self.recoveries} gone on from; at most {self.pending_max} objects pending at once"
        ]
        for kind in objects:
            fates = ", ".join(f"{fate} {count}" for (of, fate), count in sorted(self.fates.items()) if of == kind)
            lines.append(f"  pending {kind}: {fates}")
        return "\n".join(lines)


FOUND_MAX = 3
"""One mistake shows in many states."""


class State(NamedTuple):
    """What a crash left."""

    number: int
    """Entries of the log that were done."""
    told: frozenset[int]
    pending: list[str]
    fates: Mapping[str, Fate]
    """Of the pending names that are there."""
    names: frozenset[str]
    tree: dict[str, bytes]


def states(task: Task, random: Random) -> Iterator[State]:
    for number, moment in enumerate(itertools.islice(moments(task.start, task.log), task.end)):
        if number < task.first:
            continue
        pending = moment.pending
        share = max(1, task.states_a_moment // min(task.limits.subsets, 2 ** len(pending)))
        for there in moment.subsets(task.limits.subsets, random):
            present = frozenset(moment.durable) | frozenset(there)
            for fates in moment.fates(there, share, random):
                tree = moment.durable | {name: fate.content or b"" for name, fate in fates.items()}
                yield State(number, task.told | moment.told, pending, fates, present, tree)


def examine(task: Task) -> Tally:
    """Judges the crash states of the task's moments, and goes on from some."""
    tally, judge = Tally(moments=task.end - task.first), Judge(task.possible, task.limits.audited)
    chosen: list[State] = []
    random = Random(f"{task.seed} {task.what} {task.first}")
    for state in states(task, random):
        tally.enumerated += 1
        fingerprint = _fingerprint(state)
        if fingerprint in tally.distinct:
            continue
        tally.distinct.add(fingerprint)
        tally.pending_max = max(tally.pending_max, len(state.pending))
        tally.fates.update((kind_of(name), _fate_kind(state, name)) for name in state.pending)
        found = judge.judge(state, random)
        if found:
            tally.found.append(_shown(task, state, found))
        if len(tally.found) == FOUND_MAX:
            break
        # Each state has the same chance of being among the chosen.
        if len(chosen) < task.limits.recoveries:
            chosen.append(state)
        elif (at := random.randrange(len(tally.distinct))) < len(chosen):
            chosen[at] = state
    tally.judged, tally.recognised, tally.audits = judge.judged, judge.recognised, judge.audits
    if not tally.found:
        for state in chosen:
            tally.recoveries += 1
            tally.add(examine(recovery(task, state)))
    return tally


def recovery(task: Task, state: State) -> Task:
    """A job finds this state, restores, saves and cleans up; and may die at any moment of that."""
    store = VolatileStore(state.tree)
    run = Run(lambda: store, store.tell)
    run.restore()
    run.save(run.job(), AFTER_A_CRASH)
    wrong = [*map(str, run.failures), *run.wrong]
    assert not wrong, _shown(task, state, wrong)
    what, possible = f"{task.what}, then a second crash", task.possible | {AFTER_A_CRASH}
    return whole_task(what, store.log, state.tree, 0, state.told, possible, task.seed, SECOND_CRASH)


def _fingerprint(state: State) -> int:
    """Of all names, contents and reports: 128 bits, the sum of those of each, in whatever order they come."""
    parts = [_object_fingerprint(name, content) for name, content in state.tree.items()]
    return (sum(parts) + _object_fingerprint("told", repr(sorted(state.told)).encode())) % 2**128


@functools.lru_cache(maxsize=4096)  # most objects are in thousands of states
def _object_fingerprint(name: str, content: bytes) -> int:
    return int.from_bytes(blake3.blake3(name.encode() + b" " + content).digest(length=16), "little")


def _fate_kind(state: State, name: str) -> str:
    return state.fates[name].kind if name in state.fates else "gone"


def kind_of(name: str) -> str:
    """The kind of object that has a name."""
    folder, _, rest = name.partition("/")
    kinds = {"decisions": "decision", "layouts": "layout", "packs": "pack", "attempts": rest.rpartition("/")[2][:5]}
    return kinds.get(folder, folder).partition("-")[0]


def _shown(task: Task, state: State, found: list[str]) -> str:
    """All that is needed to understand a state in which a promise is broken."""
    log = [f"{at} {_entry(entry)}" for at, entry in enumerate(task.log[: state.number], 1)]
    rows = [
        f"broken in a crash state of {task.what!r}, TEST_SEED={task.seed}:",
        *(f"  {text}" for text in found),
        f"died after {state.number} of {len(task.log)} entries of the log, which ends:",
        *(f"  {text}" for text in log[-8:]),
        f"reported committed: {sorted(state.told)}",
        "what was not durable:",
        *(f"  {name}: {_fate_kind(state, name)}" for name in state.pending),
        "what is there:",
        *(f"  {name}: {len(content)} bytes" for name, content in sorted(state.tree.items())),
    ]
    return "\n".join(rows)


def _entry(entry: Any) -> str:
    *what, last = entry
    return " ".join([*what, f"({len(last)} bytes)" if isinstance(last, bytes) else f"told {last}"])


# --- of all scenarios -----------------------------------------------------------------------------------------------

Wrap = Callable[[Store], Store]
Mistake = Callable[[pytest.MonkeyPatch], Wrap]
"""Breaks the code under test, and returns what to put around the stores of the job that shall make the mistake."""


def as_it_is(store: Store) -> Store:
    return store


def no_mistake(patch: pytest.MonkeyPatch) -> Wrap:
    return as_it_is


def logged(scenario: Scenario, seed: int, limits: Limits, mistake: Mistake = no_mistake) -> Task:
    """Runs the scenario, and returns all moments of its log from where ``acts`` begins."""
    store = VolatileStore(in_step_seconds=IN_STEP_SECONDS)
    told = prepared(scenario, lambda: store)
    first = len(store.log)
    with pytest.MonkeyPatch.context() as patch:
        wrap = mistake(patch)
        run = Run(lambda: wrap(store), store.tell)
        scenario.acts(run)
    if mistake is no_mistake:
        assert not run.wrong, run.wrong
        assert len(scenario.numbers - run.told) == len(run.failures), run.failures
    possible = frozenset(told) | scenario.numbers
    return whole_task(scenario.name, store.log, {}, first, frozenset(told), possible, seed, limits)


def split(task: Task) -> list[Task]:
    starts = range(task.first, task.end, MOMENTS_A_TASK)
    return [task._replace(first=start, end=min(start + MOMENTS_A_TASK, task.end)) for start in starts]


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    # Not forked: other tests leave threads behind.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, context) as executor:
        yield executor


def enumerate_all(
    scenario: Scenario, processes: ProcessPoolExecutor, seed: int, limits: Limits, seconds: float
) -> Tally:
    futures = [processes.submit(examine, task) for task in split(logged(scenario, seed, limits))]
    tally = Tally()
    try:
        for future in concurrent.futures.as_completed(futures, seconds):
            tally.add(future.result())
    finally:
        for future in futures:
            future.cancel()
    print(f"{scenario.name}: {tally}")
    assert not tally.found, "\n\n".join(tally.found)
    kinds = {"gone", "empty", "torn", "zeros", "stale", "whole"}
    assert {fate for kind, fate in tally.fates if kind == "pack"} >= kinds
    assert tally.recoveries > 0
    return tally


def ids(thing: object) -> str:
    return str(getattr(thing, "name", None) or getattr(thing, "__name__", thing)).replace(" ", "-")


@pytest.mark.parametrize("scenario", ALL, ids=ids)
def test_whatever_a_crash_leaves_nothing_reported_is_lost_nothing_partial_shows_and_the_next_job_saves(
    scenario: Scenario, processes: ProcessPoolExecutor, seed: int
) -> None:
    limits = TEST._replace(subsets=SUBSETS_OF_FOUR_RANKS) if scenario.name == "four ranks" else TEST
    tally = enumerate_all(scenario, processes, seed, limits, 240)
    assert len(tally.distinct) >= STATES_MIN // len(ALL)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scenario", ALL, ids=ids)
def test_a_million_crash_states_keep_what_was_reported(
    scenario: Scenario, processes: ProcessPoolExecutor, seed: int
) -> None:
    """Each round with other orders of threads."""
    for number in range(int(os.environ.get("SOAK_ROUNDS", "1"))):
        tally = enumerate_all(scenario, processes, seed + number, SOAK, 3500)
        assert len(tally.distinct) >= SOAK_STATES_MIN // len(ALL)


def test_the_judge_recognises_only_what_differs_in_objects_that_it_has_not_looked_at() -> None:
    task = logged(by_name("take over"), 0, TEST)
    *_, state = states(task._replace(first=task.end - 1), Random(0))  # all deletions have been undone
    (committed, *_) = [name for name in state.tree if kind_of(name) == "pack" and name not in state.pending]
    (abandoned, *_) = [name for name in state.pending if kind_of(name) == "pack"]

    def changed(**changes: bytes) -> State:
        return state._replace(tree=state.tree | changes)

    judge, random = Judge(task.possible, audited=0.0), Random(0)
    assert not judge.judge(state, random)
    assert not judge.judge(changed(**{abandoned: b"other bytes"}), random)
    assert (judge.judged, judge.recognised) == (1, 1)
    assert judge.judge(changed(**{committed: bytes(len(state.tree[committed]))}), random)
    assert judge.judge(state._replace(told=state.told | {9}), random)
    fewer = {name: content for name, content in state.tree.items() if name != committed}
    assert judge.judge(state._replace(tree=fewer, names=frozenset(fewer)), random)
    assert (judge.judged, judge.recognised) == (4, 1)


def by_name(name: str) -> Scenario:
    return next(scenario for scenario in ALL if scenario.name == name)


# --- the same enumeration finds mistakes ----------------------------------------------------------------------------


def decision_before_index(patch: pytest.MonkeyPatch) -> Wrap:
    original = Committer.commit

    def commit(self: Committer, contents: Contents, trace: Trace) -> Live:
        late: list[Callable[[], None]] = []
        store = self._store

        class Postponing:
            """The real ``commit``, whose index is created once the decision is."""

            def __getattr__(self, name: str) -> Any:
                return getattr(store, name)

            def create(self, name: str, data: Bytes) -> None:
                late.append(lambda: store.create(name, data))

        self._store = Postponing()  # type: ignore[assignment]
        try:
            live = original(self, contents, trace)
        finally:
            self._store = store
        for create in late:
            create()
        return live

    patch.setattr(Committer, "commit", commit)
    return as_it_is


def decision_before_parts(patch: pytest.MonkeyPatch) -> Wrap:
    late: list[Callable[[], None]] = []
    commit = Committer.commit

    def write_part(store: Store, attempt: str, node: int, layout: str, tables: Any, blobs: Any) -> PartInfo:
        part = Part(attempt=attempt, node=node, layout=layout, tables=sorted(tables, key=_rank), blobs=list(blobs))
        data = document.pack_table(part)
        late.append(lambda: store.create(names.part(attempt, node), data))
        return PartInfo(node, document.digest(data), len(data))

    def commit_then_parts(self: Committer, contents: Contents, trace: Trace) -> Live:
        mine = [late.pop() for _ in contents.parts]
        live = commit(self, contents, trace)
        for create in mine:
            create()
        return live

    patch.setattr("fastckpt.save.write_part", write_part)
    patch.setattr(Committer, "commit", commit_then_parts)
    return as_it_is


def _rank(table: Any) -> int:
    return int(table.rank)


def packs_never_finished(patch: pytest.MonkeyPatch) -> Wrap:
    class Unfinished:
        def __init__(self, inner: ObjectWriter) -> None:
            self._inner, self._size = inner, 0

        def append(self, data: Bytes) -> int:
            self._size += memoryview(data).nbytes
            return self._inner.append(data)

        def finish(self) -> int:
            return self._size

        def abandon(self) -> None:
            self._inner.abandon()

    class Careless:
        def __init__(self, store: Store) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        def write(self, name: str, *, bytes_expected: int = 0) -> ObjectWriter:
            return Unfinished(self._store.write(name, bytes_expected=bytes_expected))

    return lambda store: Careless(store)  # type: ignore[return-value]


def reported_before_the_decision(patch: pytest.MonkeyPatch) -> Wrap:
    late: list[Callable[[], object]] = []
    decide, next_attempt = Committer._decide, Committer.next_attempt

    def decide_later(self: Committer, contents: Contents, index_digest: str) -> Live:
        late.append(lambda: decide(self, contents, index_digest))
        return Live(
            step=contents.step,
            attempt=contents.attempt,
            decision=self._history.number + 1,
            created=now(),
            bytes=contents.bytes,
            index=index_digest,
            metrics={},
            note=contents.note,
        )

    def decide_first(self: Committer) -> str:
        while late:
            late.pop()()
        return next_attempt(self)

    patch.setattr(Committer, "_decide", decide_later)
    patch.setattr(Committer, "next_attempt", decide_first)
    return as_it_is


def cleaning_what_is_committed(patch: pytest.MonkeyPatch) -> Wrap:
    clean = Committer.clean

    def clean_all(self: Committer) -> int:
        self._history.refresh()
        live, self._history._live = self._history._live, []
        try:
            return clean(self)
        finally:
            self._history._live = live

    patch.setattr(Committer, "clean", clean_all)
    return as_it_is


MISTAKES = [
    (decision_before_index, "second save"),
    (decision_before_parts, "second save"),
    (packs_never_finished, "second save"),
    (reported_before_the_decision, "second save"),
    (cleaning_what_is_committed, "take over"),
]


@pytest.mark.parametrize(("mistake", "scenario"), MISTAKES, ids=ids)
def test_the_same_states_show_a_planted_mistake(mistake: Mistake, scenario: str, seed: int) -> None:
    tally = examine(logged(by_name(scenario), seed, FIRST_FOUND, mistake))
    assert tally.found
    print(tally.found[0])


def test_the_same_states_show_a_job_that_does_not_clean(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(Committer, "clean", lambda self: 0)  # of the next job too
    tally = examine(logged(by_name("first save"), seed, FIRST_FOUND))
    assert tally.found
    print(tally.found[0])
