"""The pool: aligned slots that are reused, that a cancel wakes everyone from, and that no fork and no dump sees."""

from __future__ import annotations

import itertools
import mmap
import os
import re
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.buffers import Pool, Slot, address, in_pages
from fastckpt.errors import AttemptAborted
from fastckpt.testing import ThreadGroup

linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd and madvise are Linux's")


def test_slots_are_page_aligned_writable_and_apart() -> None:
    pool = Pool(5000, 3)
    assert pool.slot_bytes == -(-5000 // mmap.PAGESIZE) * mmap.PAGESIZE
    slots = [pool.take() for _ in range(3)]
    for slot in slots:
        assert len(slot.view) == pool.slot_bytes
        assert address(slot.view) % mmap.PAGESIZE == 0
        slot.view[:] = bytes([slot.start // pool.slot_bytes]) * pool.slot_bytes
    assert sorted(slot.start // pool.slot_bytes for slot in slots) == [0, 1, 2]
    for slot in slots:
        assert bytes(slot.view) == bytes([slot.start // pool.slot_bytes]) * pool.slot_bytes


def test_a_slot_that_was_given_back_is_used_again_and_its_view_is_dead() -> None:
    pool = Pool(100, 1)
    slot = pool.take()
    place, view = address(slot.view), slot.view
    pool.give(slot)
    with pytest.raises(ValueError, match="released"):
        view[0] = 1
    assert address(pool.take().view) == place


@pytest.mark.parametrize(("slot_bytes", "count"), [(0, 1), (-1, 1), (1, 0), (1, -1)])
def test_a_pool_of_nothing_is_refused(slot_bytes: int, count: int) -> None:
    with pytest.raises(ValueError, match=f"a pool of {count} slots of {slot_bytes} bytes"):
        Pool(slot_bytes, count)


def test_whoever_waits_gets_the_slot_that_is_given_back() -> None:
    pool = Pool(100, 1)
    first = pool.take()
    taken: list[int] = []
    waiter = threading.Thread(target=lambda: taken.append(pool.take().start), daemon=True)
    waiter.start()
    assert taken == []
    pool.give(first)
    waiter.join(20)
    assert taken == [0]


def test_a_cancel_wakes_all_who_wait_and_refuses_all_who_come() -> None:
    pool = Pool(100, 1)
    slot = pool.take()

    def wait(group: object) -> None:
        with pytest.raises(AttemptAborted, match="staging buffer"):
            pool.take()

    threading.Timer(0.05, pool.cancel).start()
    ThreadGroup(3).run(wait)
    pool.give(slot)
    with pytest.raises(AttemptAborted):
        pool.take()


def test_a_cancelled_pool_can_be_used_again_once_all_slots_are_back() -> None:
    pool = Pool(100, 2)
    slots = [pool.take(), pool.take()]
    pool.cancel()
    pool.give(slots[0])
    with pytest.raises(AssertionError, match="in use"):
        pool.reset()
    pool.give(slots[1])
    pool.reset()
    assert {pool.take().start, pool.take().start} == {0, pool.slot_bytes}


def test_threads_never_hold_the_same_slot() -> None:
    pool = Pool(64, 2)

    def work(group: object) -> None:
        for number in range(200):
            slot = pool.take()
            slot.view[:8] = number.to_bytes(8, "little")
            mark = threading.get_ident().to_bytes(8, "little")
            slot.view[8:16] = mark
            assert bytes(slot.view[:16]) == number.to_bytes(8, "little") + mark
            pool.give(slot)

    ThreadGroup(4).run(work)


def test_a_closed_pool_gives_its_memory_back() -> None:
    pool = Pool(mmap.PAGESIZE * 16, 4)
    pool.give(pool.take())
    pool.close()
    with pytest.raises(ValueError, match="released"):
        pool.take()


def flags_at(place: int) -> set[str]:
    for area in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(edge, 16) for edge in area.split(" ", 1)[0].split("-"))
        if start <= place < end:
            return set(re.search(r"VmFlags: (.*)", area)[1].split())  # type: ignore[index]
    return set()


@linux
def test_the_pool_is_shared_memory_that_is_neither_forked_nor_dumped() -> None:
    pool = Pool(100, 1)
    flags = flags_at(address(pool.take().view))
    assert {"sh", "dc", "dd"} <= flags, "shared, do not copy on fork, do not dump"


@linux
def test_a_forked_child_does_not_have_the_pool() -> None:
    # In a process of its own: forking this one, with its threads, is what python warns of.
    code = (
        "import ctypes, os\n"
        "from fastckpt.buffers import Pool\n"
        "view = Pool(100, 1).take().view\n"
        "start = ctypes.addressof(ctypes.c_char.from_buffer(view))\n"
        "def mapped():\n"
        "    edges = [line.split(' ', 1)[0].split('-') for line in open('/proc/self/maps')]\n"
        "    return any(int(low, 16) <= start < int(high, 16) for low, high in edges)\n"
        "assert mapped()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(7 if mapped() else 0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert (result.returncode, result.stdout) == (0, "0\n"), result.stderr


@linux
def test_the_descriptor_is_closed_at_once() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pool = Pool(100, 1)
    # mmap keeps a duplicate of its own, which is inherited by nobody.
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * mmap.PAGESIZE)), max_size=60))
def test_buffers_of_any_size_are_apart_and_what_is_given_back_becomes_one_again(steps: list[tuple[bool, int]]) -> None:
    pool = Pool(16 * mmap.PAGESIZE)
    taken: list[Slot] = []
    for give, size in steps:
        if give and taken:
            pool.give(taken.pop(size % len(taken)))
        elif (slot := pool.try_take(size)) is not None:
            assert len(slot.view) == size
            assert address(slot.view) % mmap.PAGESIZE == 0
            taken.append(slot)
        runs = sorted((slot.start, slot.start + in_pages(len(slot.view))) for slot in taken)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise([(0, 0), *runs, (pool.bytes, 0)]))
    free = pool.bytes - sum(in_pages(len(slot.view)) for slot in taken)
    for slot in taken:
        pool.give(slot)
    assert free >= 0
    pool.reset()  # asserts that it is one free run
    pool.close()


def faults_of_writing(pool: Pool) -> int:
    slot = pool.take()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for at in range(0, len(slot.view), mmap.PAGESIZE):
        slot.view[at] = 1
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    pool.give(slot)
    return faults


@linux
def test_faulting_has_all_memory_backed_and_changes_nothing_in_it() -> None:
    assert faults_of_writing(Pool(64 * mmap.PAGESIZE)) >= 60
    pool = Pool(64 * mmap.PAGESIZE)
    slot = pool.take(3)
    slot.view[:] = b"abc"
    pool.fault(lambda: False)
    assert bytes(slot.view) == b"abc"
    pool.give(slot)
    assert faults_of_writing(pool) <= 8


def test_faulting_stops_when_it_is_enough() -> None:
    pool = Pool(mmap.PAGESIZE)
    asked: list[None] = []
    pool.fault(lambda: asked.append(None) or True)  # type: ignore[func-returns-value]
    assert len(asked) == 1
