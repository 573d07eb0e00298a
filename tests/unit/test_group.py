"""Exchanges between ranks: answers, errors and missing members, over one, two and three nodes."""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from fastckpt.errors import (
    CommitTimeout,
    FastckptError,
    ObjectNotFound,
    OutOfSpace,
    RankFailed,
    SaveError,
    SnapshotDamaged,
    StorageError,
)
from fastckpt.group import (
    Assembly,
    Deadline,
    Decide,
    Group,
    KeyValueGroup,
    Reply,
    SoloGroup,
    as_told,
    checked,
    combined,
    decode_many,
    decode_reply,
    encode_many,
    encode_reply,
)
from fastckpt.testing import Killed, ThreadGroup
from fastckpt.testing.thread_group import MemoryKeyValue, RanksRaised

NODES = [["a"] * 4, ["a", "a", "b", "b"], ["a", "b", "c", "a", "b"], ["a", "b", "c"]]
each_shape = pytest.mark.parametrize("nodes", NODES, ids=lambda nodes: "".join(nodes))


def soon(seconds: float = 20.0) -> Deadline:
    return Deadline(time.monotonic() + seconds, time.monotonic() + seconds + 1)


def exchange(group: Group, reply: Reply, decide: Decide, *, name: str = "x", until: Deadline | None = None) -> bytes:
    return group.exchange(
        name, reply, decide, members=range(group.size), until=until or soon(), what="the others' plans"
    )


def posted(ranks: ThreadGroup, *members: int) -> None:
    """Waits until these members of the first run have replied to rank 0, so that no deadline has to be long enough."""
    for member in members:
        assert ranks.key_value.get(f"run-0/x/0/reply/{member}", 20) is not None


def joined(replies: dict[int, bytes]) -> bytes:
    return b"|".join(reply for _, reply in sorted(replies.items()))


def ask(group: Group, reply: Reply, decide: Callable[[dict[int, bytes]], bytes] = joined, seconds: float = 20) -> bytes:
    return Assembly(group).ask("x", reply, decide, seconds=seconds, what="the others' plans")


# --- one exchange --------------------------------------------------------------------------------------------------


def test_every_member_gets_what_the_leader_decided_from_all_replies() -> None:
    ranks = ThreadGroup(3)
    answers = ranks.run(lambda group: exchange(group, bytes([group.rank]), lambda replies: joined(checked(replies))))
    assert answers == [b"\0|\1|\2"] * 3
    assert ranks.key_value.keys() == []


def test_only_the_leader_decides() -> None:
    deciders: list[int] = []

    def work(group: Group) -> bytes:
        def decide(replies: dict[int, Reply]) -> bytes:
            deciders.append(group.rank)
            return bytes([len(replies)])

        return exchange(group, b"", decide)

    assert ThreadGroup(3).run(work) == [b"\3"] * 3
    assert deciders == [0]


def test_some_ranks_may_exchange_while_others_do_too() -> None:
    def work(group: Group) -> bytes:
        members = [rank for rank in range(4) if rank % 2 == group.rank % 2]
        return group.exchange(
            "x", bytes([group.rank]), lambda r: joined(checked(r)), members=members, until=soon(), what="x"
        )

    assert ThreadGroup(4).run(work) == [b"\0|\2", b"\1|\3", b"\0|\2", b"\1|\3"]


def test_exchanges_of_different_names_may_run_at_once() -> None:
    def work(group: Group) -> list[bytes]:
        # Each rank begins with another one, so no two agree on an order.
        order = [str((group.rank + number) % 3) for number in range(3)]
        with concurrent.futures.ThreadPoolExecutor(3) as executor:
            return sorted(
                executor.map(
                    lambda name: exchange(group, name.encode(), lambda r: joined(checked(r)), name=name), order
                )
            )

    assert ThreadGroup(3).run(work) == [[b"0|0|0", b"1|1|1", b"2|2|2"]] * 3


def test_nodes_are_numbered_by_their_lowest_rank() -> None:
    assert ThreadGroup(5, ["z", "a", "z", "m", "a"]).run(lambda group: group.nodes) == [(0, 1, 0, 2, 1)] * 5


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("layer.0: differs"), ValueError("layer.0: differs")),
        (MemoryError("full"), FastckptError("MemoryError: full")),
    ],
    ids=str,
)
def test_what_the_leader_raises_is_raised_on_all_members(error: Exception, told: Exception) -> None:
    def work(group: Group) -> bytes:
        def decide(replies: dict[int, Reply]) -> bytes:
            raise error

        return exchange(group, b"", decide)

    outcomes = ThreadGroup(3).outcomes(work)
    assert [(type(outcome), str(outcome)) for outcome in outcomes] == [(type(told), str(told))] * 3


@pytest.mark.parametrize("missing", [[2], [1, 3]], ids=str)
def test_missing_members_are_named_on_every_other_rank(missing: list[int]) -> None:
    ranks = ThreadGroup(4, seconds_max=20.0)
    present = [rank for rank in range(4) if rank not in missing]

    def work(group: Group) -> bytes:
        if group.rank in missing:
            raise Killed("before the exchange")
        if group.rank == 0:
            posted(ranks, *present[1:])
            return exchange(group, b"", lambda replies: joined(checked(replies)), until=soon(0.05))
        return exchange(group, b"", lambda replies: b"")

    outcomes = ranks.outcomes(work)
    assert all(isinstance(outcomes[rank], Killed) for rank in missing)
    for rank in present:
        outcome = outcomes[rank]
        assert isinstance(outcome, CommitTimeout)
        assert outcome.missing_ranks == tuple(missing)
        assert f"rank {missing[0]} was not heard of while waiting for the others' plans" in str(outcome)


def test_a_member_whose_leader_is_missing_names_it() -> None:
    now = time.monotonic()

    def work(group: Group) -> bytes:
        if group.rank == 0:
            return b""
        return exchange(group, b"", lambda r: b"", until=Deadline(now, now + 0.2))

    for outcome in ThreadGroup(3).outcomes(work)[1:]:
        assert isinstance(outcome, CommitTimeout)
        assert outcome.missing_ranks == (0,)
        assert "had no answer from rank 0 while waiting for the others' plans" in str(outcome)


def test_a_late_member_gets_the_answer_and_cleans_up() -> None:
    ranks = ThreadGroup(2)
    answered = threading.Event()

    def work(group: Group) -> bytes:
        if group.rank == 1:
            assert answered.wait(20)
            return exchange(group, b"late", lambda r: b"")
        try:
            return exchange(group, b"", lambda replies: joined(checked(replies)), until=soon(0.05))
        finally:
            answered.set()

    outcomes = ranks.outcomes(work)
    assert [type(outcome) for outcome in outcomes] == [CommitTimeout] * 2
    assert [outcome.missing_ranks for outcome in outcomes if isinstance(outcome, CommitTimeout)] == [(1,)] * 2
    assert ranks.key_value.keys() == []


def test_ranks_that_do_not_make_their_group_are_named_by_those_that_do() -> None:
    with pytest.raises(
        CommitTimeout, match=r"all ranks to create their Checkpointer \(missing: ranks 1, 2\)"
    ) as caught:
        KeyValueGroup(MemoryKeyValue(), 0, 3, "p", "node", 0.05)
    assert caught.value.missing_ranks == (1, 2)


def test_a_group_of_one_decides_alone() -> None:
    assert exchange(SoloGroup(), b"x", lambda replies: joined(checked(replies))) == b"x"
    assert ask(SoloGroup(), b"x") == b"x"
    with pytest.raises(RankFailed, match="rank 0 failed: rank 0: ValueError: full"):
        ask(SoloGroup(), ValueError("full"))


def test_what_one_rank_posts_every_rank_sees_until_it_is_replaced_or_withdrawn() -> None:
    ranks = ThreadGroup(3)

    def work(group: Group) -> list[bytes | None]:
        def all_are_here(name: str) -> None:
            exchange(group, b"", lambda replies: joined(checked(replies)), name=name)

        seen = [group.posted("bell")]
        all_are_here("1")
        for number, rank in enumerate((2, 0)):
            if group.rank == rank:
                group.post("bell", bytes([rank]))
            all_are_here(f"posted-{number}")
            seen.append(group.posted("bell"))
            all_are_here(f"seen-{number}")
        if group.rank == 1:
            group.withdraw("bell")
        all_are_here("withdrawn")
        return [*seen, group.posted("bell"), group.posted("another")]

    assert ranks.run(work) == [[None, b"\2", b"\0", None, None]] * 3
    assert work(SoloGroup())[0] is None
    assert ranks.key_value.keys() == []


# --- through node leaders ------------------------------------------------------------------------------------------


@each_shape
def test_the_coordinator_sees_every_rank_and_every_rank_its_answer(nodes: list[str]) -> None:
    ranks = ThreadGroup(len(nodes), nodes)
    seen: list[list[int]] = []

    def decide(replies: dict[int, bytes]) -> bytes:
        seen.append(sorted(replies))
        return joined(replies)

    answers = ranks.run(lambda group: ask(group, str(group.rank).encode(), decide))
    assert answers == ["|".join(str(rank) for rank in range(len(nodes))).encode()] * len(nodes)
    assert seen == [list(range(len(nodes)))], "decided once"
    assert ranks.key_value.keys() == [], "every key is deleted afterwards"


def test_leaders_and_node_ranks_are_those_of_the_node() -> None:
    assemblies = [Assembly(group) for group in ThreadGroup(5, ["a", "b", "c", "a", "b"]).run(lambda group: group)]
    assert [assembly.node_ranks for assembly in assemblies] == [[0, 3], [1, 4], [2], [0, 3], [1, 4]]
    assert {tuple(assembly.leaders) for assembly in assemblies} == {(0, 1, 2)}


@each_shape
@pytest.mark.parametrize("failing", [[0], [2], [1, 2]], ids=str)
def test_errors_of_members_and_leaders_alike_are_raised_on_all_ranks(nodes: list[str], failing: list[int]) -> None:
    def work(group: Group) -> bytes:
        return ask(group, ValueError(f"disk {group.rank}") if group.rank in failing else b"")

    for outcome in ThreadGroup(len(nodes), nodes).outcomes(work):
        assert isinstance(outcome, RankFailed)
        found = [(rank, type(error), str(error)) for rank, error in sorted(outcome.failures.items())]
        assert found == [(rank, ValueError, f"disk {rank}") for rank in failing]
        for rank in failing:
            assert f"rank {rank}: ValueError: disk {rank}" in str(outcome)


@each_shape
def test_what_the_coordinator_raises_keeps_its_type_on_all_ranks(nodes: list[str]) -> None:
    def work(group: Group) -> bytes:
        def decide(replies: dict[int, bytes]) -> bytes:
            raise SnapshotDamaged("step 5: layouts/ab is missing", object="layouts/ab")

        return ask(group, b"", decide)

    for outcome in ThreadGroup(len(nodes), nodes).outcomes(work):
        assert isinstance(outcome, SnapshotDamaged)
        assert str(outcome) == "step 5: layouts/ab is missing"


def test_a_missing_rank_is_named_on_all_others_be_it_member_leader_or_coordinator() -> None:
    nodes = ["a", "a", "b", "b", "c"]

    def without(missing: int) -> list[bytes | BaseException]:
        return ThreadGroup(5, nodes).outcomes(
            lambda group: b"" if group.rank == missing else ask(group, b"", seconds=1.0)
        )

    with concurrent.futures.ThreadPoolExecutor(4) as executor:  # a missing leader takes the members 4 s more to give up
        for missing, outcomes in zip((3, 2, 0, 4), executor.map(without, (3, 2, 0, 4)), strict=True):
            assert outcomes.pop(missing) == b""
            for outcome in outcomes:
                assert isinstance(outcome, CommitTimeout), missing
                assert outcome.missing_ranks == (missing,)
                assert "the others' plans" in str(outcome)


def test_a_leader_may_turn_its_nodes_replies_into_one_line() -> None:
    lines: list[dict[int, Reply]] = []

    def at_coordinator(replies: dict[int, Reply]) -> bytes:
        lines.append(replies)
        return b"committed"

    def work(group: Group) -> bytes:
        def at_leader(replies: dict[int, Reply]) -> bytes:
            return b"".join(reply for _, reply in sorted(checked(replies).items()))

        return Assembly(group).ask_in_two("x", bytes([group.rank]), at_leader, at_coordinator, 20, "x")

    assert ThreadGroup(4, ["a", "b", "a", "b"]).run(work) == [b"committed"] * 4
    assert lines == [{0: b"\0\2", 1: b"\1\3"}]


def test_an_error_of_a_leader_in_its_own_work_reaches_the_coordinator_as_that() -> None:
    def work(group: Group) -> bytes:
        def at_leader(replies: dict[int, Reply]) -> bytes:
            if group.rank == 1:
                raise StorageError("disk full")
            return b""

        return Assembly(group).ask_in_two("x", b"", at_leader, lambda lines: joined(checked(lines)), 20, "x")

    for outcome in ThreadGroup(4, ["a", "b", "a", "b"]).outcomes(work):
        assert isinstance(outcome, RankFailed)
        assert {rank: str(error) for rank, error in outcome.failures.items()} == {1: "disk full"}
        assert isinstance(outcome.failures[1], StorageError)


# --- replies on the wire -------------------------------------------------------------------------------------------


def over_the_wire(reply: Reply) -> Reply:
    return decode_reply(encode_reply(reply))


@pytest.mark.parametrize("reply", [b"", b"\0\xff", bytes(10**6)], ids=len)
def test_bytes_stay_bytes(reply: bytes) -> None:
    assert over_the_wire(reply) == reply


@pytest.mark.parametrize("kind", [ValueError, TypeError, SnapshotDamaged, SaveError, StorageError, FastckptError])
def test_errors_of_known_types_keep_type_and_message(kind: type[Exception]) -> None:
    back = over_the_wire(kind("what, where"))
    assert type(back) is kind
    assert str(back) == "what, where"


def test_what_is_missing_and_what_failed_survives() -> None:
    timeout = over_the_wire(CommitTimeout("late", [3, 5]))
    assert isinstance(timeout, CommitTimeout)
    assert timeout.missing_ranks == (3, 5)
    failed = over_the_wire(RankFailed("rank 3 failed", {3: ValueError("full"), 4: OSError("gone")}))
    assert isinstance(failed, RankFailed)
    assert str(failed) == "rank 3 failed"
    assert type(failed.failures[3]) is ValueError
    assert str(failed.failures[4]) == "OSError: gone"


@pytest.mark.parametrize("transient", [True, False])
@pytest.mark.parametrize("kind", [StorageError, ObjectNotFound, OutOfSpace])
def test_whether_trying_again_may_help_survives(kind: type[StorageError], transient: bool) -> None:
    alone = over_the_wire(kind("busy", transient=transient))
    among = over_the_wire(RankFailed("rank 3 failed", {3: kind("busy", transient=transient)}))
    assert isinstance(among, RankFailed)
    for back in (alone, among.failures[3]):
        assert isinstance(back, kind)
        assert back.transient == transient


@pytest.mark.parametrize(
    "error", [OSError("gone"), KeyError("a"), Killed("now"), KeyboardInterrupt(), ZeroDivisionError("x")]
)
def test_errors_of_other_types_become_errors_of_ours_that_name_the_type(error: BaseException) -> None:
    back = over_the_wire(error)
    assert type(back) is FastckptError
    assert str(back) == str(as_told(error)) == f"{type(error).__name__}: {error}"
    assert str(combined({3: back})) == f"rank 3 failed: rank 3: {back}"


@pytest.mark.parametrize("name", ["Any", "Mapping", "annotations", "_rebuild", "__builtins__"])
def test_a_name_that_is_no_error_is_not_called(name: str) -> None:
    impostor = type(name, (Exception,), {})
    assert str(over_the_wire(impostor("x"))) == f"{name}: x"


def test_an_error_whose_message_is_not_unicode_still_crosses() -> None:
    """As an OSError's is, when it names a file whose name is not UTF-8."""
    assert isinstance(over_the_wire(OSError("no such file: \udcff")), FastckptError)


def test_replies_of_many_ranks_are_one_message() -> None:
    replies = {0: b"a", 7: b"", 300: b"\xff"}
    assert decode_many(encode_many(replies)) == replies


# --- many errors into one ------------------------------------------------------------------------------------------


def test_replies_without_errors_are_checked_through() -> None:
    assert checked({1: b"b", 0: b"a"}) == {0: b"a", 1: b"b"}


def test_a_rank_that_failed_counts_more_than_one_that_is_missing() -> None:
    error = combined({1: CommitTimeout("rank 1 was not heard of", [1]), 2: ValueError("full")})
    assert isinstance(error, RankFailed)
    assert list(error.failures) == [2]


def test_missing_ranks_of_several_nodes_are_counted_together() -> None:
    error = combined({0: CommitTimeout("late", [3, 1]), 4: CommitTimeout("later", [5])})
    assert isinstance(error, CommitTimeout)
    assert error.missing_ranks == (1, 3, 5)
    assert "missing: ranks 1, 3, 5" in str(error)


def test_a_leader_that_reports_failures_is_not_one_of_them() -> None:
    error = combined({4: RankFailed("ranks 5, 6 failed", {5: ValueError("a"), 6: ValueError("b")})})
    assert isinstance(error, RankFailed)
    assert sorted(error.failures) == [5, 6]
    assert str(error).startswith("ranks 5, 6 failed: rank 5: ValueError: a; rank 6")


def test_a_thousand_failures_make_a_message_one_can_read() -> None:
    error = combined({rank: ValueError("full") for rank in range(1000)})
    assert isinstance(error, RankFailed)
    assert len(error.failures) == 1000
    assert len(str(error)) < 500
    assert "and 992 more" in str(error)


# --- ThreadGroup ---------------------------------------------------------------------------------------------------


def test_a_thread_group_raises_one_error_that_carries_all() -> None:
    def work(group: Group) -> int:
        if group.rank == 1:
            raise Killed("dead")
        if group.rank == 2:
            raise ValueError("wrong")
        return group.rank

    with pytest.raises(RanksRaised, match="rank 1: Killed: dead\nrank 2: ValueError: wrong") as caught:
        ThreadGroup(4).run(work)
    assert {rank: type(error) for rank, error in caught.value.errors.items()} == {1: Killed, 2: ValueError}
    assert caught.value.__cause__ is caught.value.errors[1]
    assert any("ValueError: wrong" in note for note in caught.value.__notes__)


def test_a_thread_group_gives_results_and_errors_by_rank() -> None:
    def work(group: Group) -> int:
        if group.rank == 1:
            raise Killed
        return group.rank * 10

    first, second, third = ThreadGroup(3).outcomes(work)
    assert (first, type(second), third) == (0, Killed, 20)


def test_a_thread_group_does_not_wait_for_a_rank_that_hangs_and_says_where_it_is() -> None:
    release = threading.Event()

    def hang_here(group: Group) -> int:
        if group.rank == 1:
            release.wait(30)
        return 1

    first, second = ThreadGroup(2, seconds_max=1.0).outcomes(hang_here)
    release.set()
    assert first == 1
    assert isinstance(second, TimeoutError)
    assert "rank 1 has not returned after 1 s" in str(second)
    assert "in hang_here" in str(second)


def test_a_thread_group_runs_again_and_again() -> None:
    ranks = ThreadGroup(2)
    for _ in range(3):
        assert ranks.run(lambda group: ask(group, b"x")) == [b"x|x"] * 2
    assert ranks.key_value.keys() == []


@pytest.mark.parametrize(("size", "nodes"), [(0, None), (-1, None), (2, ["a"]), (1, ["a", "b"])])
def test_a_thread_group_that_cannot_be_is_refused(size: int, nodes: Sequence[str] | None) -> None:
    with pytest.raises(ValueError, match=str(size)):
        ThreadGroup(size, nodes)
