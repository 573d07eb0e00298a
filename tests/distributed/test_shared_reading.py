"""The ranks of a node read for each other: what several of them want comes from storage once, whoever is lost."""

from __future__ import annotations

import errno
import logging
import os
import random
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from caught import PATIENT, Ending, before, ending, say, strike
from jobs import rank, raw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fastckpt
from fastckpt import Checkpointer, Options, RestoreError, SnapshotDamaged
from fastckpt.job import group as job_groups
from fastckpt.repository import chunk_reader, relay, slots
from fastckpt.storage.local import LocalStore

pytestmark = pytest.mark.distributed

DEADLINE = 2.0
SLOW_DEADLINE = 8.0
"""A tenth of it, and the moment until an answer is there, is less than the slow rank reads."""
CHUNK_BYTES = 8192
DTYPES = ["float32", "bfloat16", "float64", "int32", "bool"]
SAVED_BY = 4


def shapes() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of many sizes, none a multiple of a chunk; enough bytes that what is read along with them counts for little."""
    choose = random.Random(5)
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        f"t{number}": (choose.choice(DTYPES), (choose.randrange(1, 300), choose.randrange(1, 60)))
        for number in range(30)
    }
    return found | {"one": ("float32", ()), "none": ("float32", (0, 3)), "tall": ("float32", (5003, 37))}


def value(key: str, dtype: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {step}".encode()))
    return torch.randint(0, 2 if dtype == "bool" else 100, shape, generator=generator).to(getattr(torch, dtype))


def sharded(step: int, placement: Shard | Replicate = Shard(0)) -> dict[str, Any]:  # noqa: B008 - a constant
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = {}
    for key, (dtype, shape) in shapes().items():
        full = value(key, dtype, shape, step)
        made[key] = distribute_tensor(full, mesh, [placement if shape else Replicate()], src_data_rank=None)
    return made


def state_bytes(keys: list[str] | None = None) -> int:
    return sum(
        value(key, dtype, shape, 1).nbytes for key, (dtype, shape) in shapes().items() if keys is None or key in keys
    )


def local(tensor: torch.Tensor) -> bytes:
    return raw(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def saves(urls: dict[str, str]) -> None:
    for codec, url in urls.items():
        with Checkpointer(url, options=Options(chunk_bytes=CHUNK_BYTES, codec=codec)) as ckpt:  # type: ignore[arg-type]
            for step in (1, 2):
                ckpt.save(step, sharded(step)).wait(PATIENT)


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a repository by codec, each with steps 1 and 2, sharded over four ranks."""
    directory = tmp_path_factory.mktemp("shared-reading")
    found = {codec: str(directory / codec) for codec in ("raw", "zstd")}
    ranks.run(SAVED_BY, saves, found)
    return found


class CountingStore:
    """Counts the bytes of packs that this process reads from a local store, whoever asks for them."""

    def __init__(self) -> None:
        self.bytes = 0
        read_into = LocalStore.read_into

        def counted(store: LocalStore, name: str, offset: int, buffer: memoryview) -> None:
            read_into(store, name, offset, buffer)
            self.bytes += len(buffer)

        LocalStore.read_into = counted  # type: ignore[method-assign]


def restored(url: str, expected: dict[str, Any]) -> dict[str, float]:
    """Restores what is to be as expected; what the counters say."""
    state: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
    with Checkpointer(url, options=Options(commit_seconds_max=PATIENT)) as ckpt:
        assert ckpt.restore(state) == 2
        for key, tensor in expected.items():
            assert local(state[key]) == local(tensor), key
        assert ckpt.restored is not None
        return ckpt.restored.counters


# --- how much is read -----------------------------------------------------------------------------------------------


def reads_in_many_ways(urls: dict[str, str]) -> dict[str, tuple[float, float, int]]:
    """By way: bytes read and received, as the counters have them, and bytes read, as the store has them."""
    store = CountingStore()
    found = {}

    def note(name: str, url: str, expected: dict[str, Any]) -> None:
        before = store.bytes
        counters = restored(url, expected)
        found[name] = counters.get("read_bytes", 0), counters.get("shared_bytes", 0), store.bytes - before

    everywhere = sharded(2, Replicate())
    note("resharded", urls["raw"], sharded(2))
    note("replicated", urls["raw"], everywhere)
    note("compressed", urls["zstd"], everywhere)
    mine = [key for number, key in enumerate(everywhere) if number % 3 != rank()]
    note("some", urls["raw"], {key: everywhere[key] for key in mine})
    # One slot, and runs of a chunk: every rank has to wait for the others again and again.
    chunk_reader.READ_BYTES_MAX = slots.READ_BYTES_MAX = CHUNK_BYTES
    slots.MEMORY_BYTES_MAX, slots.SLOTS_MIN = 0, 1
    note("through one slot", urls["raw"], everywhere)
    return found


def test_what_several_ranks_of_a_node_want_is_read_from_storage_once(urls: dict[str, str]) -> None:
    each = ranks.run(3, reads_in_many_ways, urls)
    for one in each:
        assert all(counted == seen for counted, _, seen in one.values()), one
    read = {name: sum(one[name][0] for one in each) for name in each[0]}
    received = {name: sum(one[name][1] for one in each) for name in each[0]}
    for name in ("resharded", "replicated", "some", "through one slot"):
        assert state_bytes() <= read[name] <= 1.05 * state_bytes(), name
    for name in ("replicated", "compressed", "through one slot"):
        assert received[name] == 2 * state_bytes(), name
    stored = sum(file.stat().st_size for file in Path(urls["zstd"]).rglob("*.pack")) / 2
    assert 0 < read["compressed"] <= 1.05 * stored
    for name in ("replicated", "resharded"):
        shares = [one[name][0] for one in each]
        assert max(shares) <= 1.2 * min(shares), f"{name}: {shares} is not as much to each"


def reads_on_nodes(url: str, nodes: list[str], cannot: dict[int, str]) -> tuple[float, list[str]]:
    job_groups._node = lambda: nodes[rank()]

    if rank() in cannot:
        original = getattr(os, cannot[rank()])

        def refuse(what: str, *arguments: Any) -> Any:
            if what == "fastckpt-relay" or what.startswith("/proc/"):
                raise PermissionError(errno.EPERM, "no way")
            return original(what, *arguments)

        setattr(os, cannot[rank()], refuse)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastckpt").addHandler(handler)
    logging.getLogger("fastckpt").setLevel(logging.INFO)
    read = restored(url, sharded(2, Replicate()))["read_bytes"]
    return read, [message for message in messages if "cannot share memory" in message]


def test_each_node_reads_for_itself(urls: dict[str, str]) -> None:
    nodes = ["a", "a", "b", "a"]
    read = [one for one, _ in ranks.run(4, reads_on_nodes, urls["raw"], nodes, {})]
    assert state_bytes() <= read[0] + read[1] + read[3] <= 1.05 * state_bytes()
    assert state_bytes() <= read[2] <= 1.05 * state_bytes()


@pytest.mark.parametrize(("cannot", "what"), [("readlink", "map the memory of rank 0"), ("memfd_create", "rank 1:")])
def test_where_one_rank_cannot_share_memory_all_of_its_node_read_for_themselves_and_say_so(
    urls: dict[str, str], cannot: str, what: str
) -> None:
    each = ranks.run(2, reads_on_nodes, urls["raw"], ["a", "a"], {1: cannot})
    assert [read >= state_bytes() for read, _ in each] == [True, True]
    (message,) = each[0][1]
    assert what in message
    assert "no way" in message
    assert not each[1][1]


# --- what goes wrong ------------------------------------------------------------------------------------------------


def meets_damage(url: str) -> list[Any]:
    everywhere, damaged = sharded(1, Replicate()), sharded(2, Replicate())
    with Checkpointer(url, options=Options(commit_seconds_max=PATIENT)) as ckpt:
        state: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in everywhere.items()}
        strict = ending(lambda: ckpt.restore(state))
        placed = [(state[key].to_local(), damaged[key].to_local()) for key in state]
        assert all(bool(((now == 0) | (now == saved)).all()) for now, saved in placed), "a damaged byte was placed"
        step = ckpt.restore(state, policy="previous")
        return [strict, step, all(local(state[key]) == local(tensor) for key, tensor in everywhere.items())]


def test_a_damaged_chunk_that_one_rank_reads_for_all_is_named_on_all_of_them_at_once(
    urls: dict[str, str], tmp_path: Path
) -> None:
    url = str(tmp_path / "damaged")
    ranks.run(SAVED_BY, saves, {"raw": url})
    snapshot = fastckpt.open(url).snapshot(2)
    chunk = len(snapshot.chunks) // 2
    place = snapshot.place(chunk)
    with open(f"{url}/{place.pack}", "r+b") as file:
        file.seek(place.offset)
        byte = file.read(1)
        file.seek(place.offset)
        file.write(bytes([byte[0] ^ 1]))
    each = ranks.run(3, meets_damage, url)
    (finder,) = (number for number, (strict, _, _) in enumerate(each) if not str(strict.error).startswith("rank "))
    for strict, step, is_right in each:
        assert isinstance(strict.error, SnapshotDamaged)
        assert (strict.error.object, strict.error.offset) == (place.pack, place.offset)
        assert strict.seconds < PATIENT / 2
        assert (step, is_right) == (1, True)
    for number, (strict, _, _) in enumerate(each):
        assert number == finder or str(strict.error).startswith(f"rank {finder}: ")


def waits_for_a_slow_node(url: str) -> Any:
    """Rank 0 meets damage that rank 1 hears of at once; rank 2, on another node, has long to read still."""
    job_groups._node = lambda: ["a", "a", "b"][rank()]
    chunk_reader.READ_BYTES_MAX = slots.READ_BYTES_MAX = CHUNK_BYTES
    with Checkpointer(url, options=Options(chunk_bytes=CHUNK_BYTES, commit_seconds_max=SLOW_DEADLINE)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"one": torch.arange(100_000.0), "other": torch.arange(100_000.0) + 1}).wait()
        damaged = ckpt.snapshots()[-1].place(4)
        read_into = LocalStore.read_into

        def slow(store: LocalStore, name: str, offset: int, buffer: memoryview) -> None:
            if name.startswith(damaged.pack.rpartition("/")[0].rpartition("/")[0]):
                time.sleep(0.5 if rank() == 2 else 0.02)
            read_into(store, name, offset, buffer)
            if (name, offset) == (damaged.pack, damaged.offset):
                buffer[0] ^= 1

        LocalStore.read_into = slow  # type: ignore[method-assign]
        state = {"other" if rank() == 2 else "one": torch.zeros(100_000)}
        end = ending(lambda: ckpt.restore(state))
        LocalStore.read_into = read_into  # type: ignore[method-assign]
        return ranks.Last(end)


def test_who_is_told_that_another_has_failed_waits_for_nodes_that_are_still_reading(tmp_path: Path) -> None:
    for end in ranks.run(3, waits_for_a_slow_node, str(tmp_path / "slow")):
        assert isinstance(end.error, SnapshotDamaged), end.error


def loses_a_rank(url: str, lost: int, fate: int, nodes: list[str]) -> Any:
    job_groups._node = lambda: nodes[rank()]
    state = sharded(0, Replicate())
    with Checkpointer(url, options=Options(commit_seconds_max=DEADLINE)) as ckpt:
        if rank() == lost:
            before(relay.NodeRelay, "publish", strike(signal.Signals(fate)))
        dist.barrier()
        end = ending(lambda: ckpt.restore(state))
        say("ended")
        return ranks.Last(end)


@pytest.mark.parametrize(("lost", "fate"), [(0, signal.SIGKILL), (2, signal.SIGSTOP)])
def test_a_rank_that_is_lost_while_others_wait_for_what_it_reads_is_named_in_time(
    urls: dict[str, str], lost: int, fate: signal.Signals
) -> None:
    nodes = ["a", "a", "a", "b"] if lost else ["a", "a", "b", "a"]
    with ranks.started(4, loses_a_rank, urls["raw"], lost, int(fate), nodes) as job:
        if fate == signal.SIGSTOP:
            assert job.wait_stopped(lost, PATIENT)
            assert job.wait_keys([f"said/ended/{number}" for number in range(4) if number != lost], PATIENT)
            job.resume(lost)
        outcomes = job.outcomes()
    if fate == signal.SIGSTOP:
        assert isinstance(outcomes[lost].error, RestoreError)
    others = [end for number, end in enumerate(outcomes) if number != lost]
    for end in others:
        assert isinstance(end, Ending)
        assert isinstance(end.error, RestoreError)
        assert lost in end.names, end.error
        assert end.seconds <= DEADLINE + 5 + end.lag
