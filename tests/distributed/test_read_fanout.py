"""The nodes of a job read for each other: what several of them want comes from storage once, whoever is lost."""

from __future__ import annotations

import dataclasses
import signal
import socket
from pathlib import Path
from typing import Any, Literal

import pytest
import ranks
import torch
import torch.distributed as dist
from caught import PATIENT, Ending, before, ending, say, strike
from jobs import rank
from test_shared_reading import CHUNK_BYTES, SAVED_BY, CountingStore, local, saves, sharded, state_bytes, value
from torch.distributed.tensor import DTensor, Replicate

import fastckpt
from fastckpt import Checkpointer, Options, RestoreError, SnapshotDamaged, StorageError, Topology
from fastckpt.job import group as job_groups
from fastckpt.repository import chunk_reader, peers, slots

pytestmark = pytest.mark.distributed

DEADLINE = 3.0
NODES = ["a", "b", "b", "c", "c"]
"""Of one, two and two ranks."""


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a repository by codec, each with steps 1 and 2, sharded over four ranks."""
    directory = tmp_path_factory.mktemp("read-fanout")
    found = {codec: str(directory / codec) for codec in ("raw", "zstd")}
    ranks.run(SAVED_BY, saves, found)
    return found


def options(fanout: Literal["node", "job"] = "job", seconds_max: float = PATIENT) -> Options:
    return Options(read_fanout=fanout, commit_seconds_max=seconds_max)


def zeros(expected: dict[str, Any]) -> dict[str, Any]:
    return {key: torch.zeros_like(tensor) for key, tensor in expected.items()}


def restored(url: str, expected: dict[str, Any], topology: Topology | None = None) -> dict[str, float]:
    """Restores what is to be as expected; what the counters say."""
    state = zeros(expected)
    with Checkpointer(url, options=options(), topology=topology) as ckpt:
        assert ckpt.restore(state) == 2
        for key, tensor in expected.items():
            assert local(state[key]) == local(tensor), key
        assert ckpt.restored is not None
        return ckpt.restored.counters


# --- how much is read -----------------------------------------------------------------------------------------------


def reads_in_many_ways(urls: dict[str, str]) -> dict[str, tuple[float, float, float, int]]:
    """By way: bytes read, fetched from other nodes, and shared on this one, as the counters have them; and bytes read,
    as the store has them."""
    job_groups._node = lambda: NODES[rank()]
    store = CountingStore()
    found = {}

    def note(name: str, url: str, expected: dict[str, Any]) -> None:
        before = store.bytes
        counters = restored(url, expected)
        of = [counters.get(f"{what}_bytes", 0) for what in ("read", "fetch", "shared")]
        found[name] = of[0], of[1], of[2], store.bytes - before

    everywhere = sharded(2, Replicate())
    note("resharded", urls["raw"], sharded(2))
    note("replicated", urls["raw"], everywhere)
    note("compressed", urls["zstd"], everywhere)
    mine = [key for number, key in enumerate(everywhere) if number % len(NODES) != rank()]
    note("some", urls["raw"], {key: everywhere[key] for key in mine})
    # One slot for each way, and runs of a chunk: every rank has to wait for the others again and again.
    chunk_reader.READ_BYTES_MAX = slots.READ_BYTES_MAX = CHUNK_BYTES
    slots.MEMORY_BYTES_MAX, slots.SLOTS_MIN = 0, 1
    note("through one slot", urls["raw"], everywhere)
    note("resharded through one slot", urls["raw"], sharded(2))
    return found


def test_what_several_nodes_want_is_read_from_storage_once(urls: dict[str, str]) -> None:
    each = ranks.run(len(NODES), reads_in_many_ways, urls)
    for one in each:
        assert all(counted == seen for counted, _, _, seen in one.values()), one
    read, fetched, shared = ({name: sum(one[name][at] for one in each) for name in each[0]} for at in range(3))
    for name in ("resharded", "replicated", "some", "through one slot", "resharded through one slot"):
        assert state_bytes() <= read[name] <= 1.05 * state_bytes(), name
    for name in ("replicated", "compressed", "through one slot"):
        assert fetched[name] == 2 * state_bytes(), f"{name}: to each node but the one that read it, once"
        assert shared[name] == 2 * state_bytes(), f"{name}: to the second rank of a node"
    stored = sum(file.stat().st_size for file in Path(urls["zstd"]).rglob("*.pack")) / 2
    assert 0 < read["compressed"] <= 1.05 * stored
    shares = [one["replicated"][0] for one in each]
    assert max(shares) <= 1.3 * min(shares), f"{shares} is not as much to each"


def reads_behind_uplinks(url: str) -> float:
    job_groups._node = lambda: ["a", "b", "c"][rank()]
    document = {
        "node": {"names": "n[0-2]", "ranks": 1},
        "supernode": {"nodes": {"x": "n0", "y": "n[1-2]"}, "capacities": {"x": 4e9, "y": 1e9}},
    }
    topology = Topology.parse(document)
    socket.gethostname = lambda: f"n{rank()}"
    return restored(url, sharded(2, Replicate()), topology)["read_bytes"]


def test_nodes_behind_faster_uplinks_read_more(urls: dict[str, str]) -> None:
    read = ranks.run(3, reads_behind_uplinks, urls["raw"])
    assert 0.75 * state_bytes() <= read[0] <= 0.85 * state_bytes(), read
    assert sum(read) <= 1.05 * state_bytes()


WANTED_BY = {"all": range(5), "b and c": (1, 3, 4), "odd": (0, 2, 4), "c": (3, 4), "one": (2,)}
"""Of the ranks of ``NODES``, by key: sets of nodes that overlap, and ranks of a node that want different keys."""


def reads_for_several_sets(url: str) -> int:
    job_groups._node = lambda: NODES[rank()]
    store = CountingStore()
    with Checkpointer(url, options=dataclasses.replace(options(), chunk_bytes=CHUNK_BYTES)) as ckpt:
        full = {key: value(key, "float32", (400, 37), 1) for key in WANTED_BY}
        ckpt.save(1, full).wait(PATIENT)
        mine = {key: tensor for key, tensor in full.items() if rank() in WANTED_BY[key]}
        state = zeros(mine)
        dist.barrier()
        store.bytes = 0
        for _ in range(3):
            assert ckpt.restore(state, only=list(mine)) == 1
            assert all(torch.equal(state[key], mine[key]) for key in mine)
        return store.bytes


def test_sets_of_nodes_that_overlap_are_each_served_and_nobody_who_is_done_is_taken_for_lost(tmp_path: Path) -> None:
    read = ranks.run(len(NODES), reads_for_several_sets, str(tmp_path / "sets"))
    assert sum(read) <= 1.05 * 3 * len(WANTED_BY) * 400 * 37 * 4


def reads_after_other_nodes_have_all(url: str) -> float:
    job_groups._node = lambda: "ab"[rank()]
    state: dict[str, Any] = {"one": torch.zeros(())} if rank() else zeros(sharded(2, Replicate()))
    with Checkpointer(url, options=options()) as ckpt:
        for _ in range(3):
            assert ckpt.restore(state, only=["one"]) == 2
        assert ckpt.restored is not None
        return ckpt.restored.counters.get("read_bytes", 0)


def test_restores_follow_each_other(urls: dict[str, str]) -> None:
    read = ranks.run(2, reads_after_other_nodes_have_all, urls["raw"])
    assert sorted(size > 0 for size in read) == [False, True]


# --- what goes wrong ------------------------------------------------------------------------------------------------


def asks_for_another_fanout(url: str) -> str:
    job_groups._node = lambda: "ab"[rank()]
    with Checkpointer(url, options=options("job" if rank() else "node")) as ckpt:
        with pytest.raises(ValueError, match="ranks ask for different steps") as caught:
            ckpt.restore(zeros(sharded(2, Replicate())))
        return str(caught.value)


def test_ranks_that_ask_for_different_fanouts_are_told(urls: dict[str, str]) -> None:
    for message in ranks.run(2, asks_for_another_fanout, urls["raw"]):
        assert "rank 1: None, read once by the job" in message
        assert "read_fanout" in message


def meets_damage(url: str) -> list[Any]:
    job_groups._node = lambda: NODES[rank()]
    everywhere, damaged = sharded(1, Replicate()), sharded(2, Replicate())
    with Checkpointer(url, options=options()) as ckpt:
        state = zeros(everywhere)
        strict = ending(lambda: ckpt.restore(state))
        assert all(isinstance(tensor, DTensor) for tensor in state.values())
        placed = [(state[key].to_local(), damaged[key].to_local()) for key in state]
        assert all(bool(((now == 0) | (now == saved)).all()) for now, saved in placed), "a damaged byte was placed"
        step = ckpt.restore(state, policy="previous")
        return [strict, step, all(local(state[key]) == local(tensor) for key, tensor in everywhere.items())]


def test_a_damaged_chunk_that_one_node_reads_for_all_is_named_on_all_ranks_at_once(tmp_path: Path) -> None:
    url = str(tmp_path / "damaged")
    ranks.run(SAVED_BY, saves, {"raw": url})
    snapshot = fastckpt.open(url).snapshot(2)
    place = snapshot.place(len(snapshot.chunks) // 2)
    with open(f"{url}/{place.pack}", "r+b") as file:
        file.seek(place.offset)
        byte = file.read(1)
        file.seek(place.offset)
        file.write(bytes([byte[0] ^ 1]))
    each = ranks.run(len(NODES), meets_damage, url)
    (finder,) = (number for number, (strict, _, _) in enumerate(each) if not str(strict.error).startswith("rank "))
    for number, (strict, step, is_right) in enumerate(each):
        assert isinstance(strict.error, SnapshotDamaged)
        assert (strict.error.object, strict.error.offset) == (place.pack, place.offset)
        assert strict.error.key
        assert strict.seconds < PATIENT / 2
        assert number == finder or str(strict.error).startswith(f"rank {finder}: ")
        assert (step, is_right) == (1, True)


def gets_other_bytes(url: str) -> Ending:
    job_groups._node = lambda: "ab"[rank()]
    receive, spoilt = peers._receive_into, []

    def spoil(connection: socket.socket, view: memoryview) -> None:
        receive(connection, view)
        if len(view) > 1000 and rank() and not spoilt:
            view[500] ^= 1
            spoilt.append(True)

    peers._receive_into = spoil
    with Checkpointer(url, options=options()) as ckpt:
        return ending(lambda: ckpt.restore(zeros(sharded(2, Replicate()))))


def test_bytes_that_change_on_the_way_are_not_placed(urls: dict[str, str]) -> None:
    for end in ranks.run(2, gets_other_bytes, urls["raw"]):
        assert type(end.error) is RestoreError
        assert "what rank 0 read" in str(end.error)
        assert end.seconds < PATIENT / 2


def cannot_connect(url: str) -> Ending:
    job_groups._node = lambda: "ab"[rank()]
    with socket.create_server(("localhost", 0)) as closed:
        port = closed.getsockname()[1]
    if rank():
        create = socket.create_connection
        socket.create_connection = lambda address, *more: create((address[0], port), *more)  # type: ignore[assignment]
    with Checkpointer(url, options=options()) as ckpt:
        return ending(lambda: ckpt.restore(zeros(sharded(2, Replicate()))))


def test_nodes_that_may_not_connect_to_each_other_are_told_what_to_do(urls: dict[str, str]) -> None:
    for end in ranks.run(2, cannot_connect, urls["raw"]):
        assert isinstance(end.error, RestoreError)
        assert "cannot fetch from rank" in str(end.error)  # the other may then not reach this one, which is gone
        assert "Options(read_fanout='node')" in str(end.error)
        assert end.seconds < PATIENT / 2


def loses_a_rank(url: str, lost: int, fate: int, where: tuple[str, str]) -> Any:
    job_groups._node = lambda: NODES[rank()]
    state = zeros(sharded(2, Replicate()))
    with Checkpointer(url, options=options(seconds_max=DEADLINE)) as ckpt:
        if rank() == lost:
            before(getattr(peers, where[0]), where[1], strike(signal.Signals(fate)))
        dist.barrier()
        end = ending(lambda: ckpt.restore(state))
        say("ended")
        return ranks.Last(end)


@pytest.mark.parametrize(
    ("lost", "fate", "where"),
    [
        (0, signal.SIGKILL, ("Server", "publish")),
        (3, signal.SIGKILL, ("Client", "fetch")),
        (3, signal.SIGSTOP, ("Server", "publish")),
        (0, signal.SIGSTOP, ("Client", "fetch")),
    ],
)
def test_a_rank_that_is_lost_while_other_nodes_wait_for_it_is_named_in_time(
    urls: dict[str, str], lost: int, fate: signal.Signals, where: tuple[str, str]
) -> None:
    with ranks.started(len(NODES), loses_a_rank, urls["raw"], lost, int(fate), where) as job:
        if fate == signal.SIGSTOP:
            assert job.wait_stopped(lost, PATIENT)
            keys = [f"said/ended/{number}" for number in range(len(NODES)) if number != lost]
            assert job.wait_keys(keys, PATIENT)
            job.resume(lost)
        outcomes = job.outcomes()
    if fate == signal.SIGSTOP:
        assert isinstance(outcomes[lost].error, RestoreError | StorageError)  # a read may have been under way
    for number, end in enumerate(outcomes):
        if number != lost:
            assert isinstance(end, Ending)
            assert isinstance(end.error, RestoreError)
            assert lost in end.names, end.error
            assert end.seconds <= DEADLINE + 5 + end.lag
