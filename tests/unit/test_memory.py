"""Staging memory: kept from save to save, made anew where that is needed, pinned where an accelerator copies to it."""

from __future__ import annotations

import logging

import pytest
import torch

from fastckpt.job.memory import StagingMemory

CPU = [torch.device("cpu")]
GPU = [torch.device("cpu"), torch.device("cuda", 0)]


class Runtime:
    """What is asked of the CUDA runtime, which this machine may not have."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple[object, ...]] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("pin", address, size, flags))
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unpin", address))
        return 0


def test_memory_is_kept_from_save_to_save_and_made_anew_only_where_more_is_needed() -> None:
    memory = StagingMemory(None, 1)
    first = memory.pool(lambda budget: min(budget, 1 << 20), CPU, in_use=False)
    assert memory.pool(lambda _: 1 << 16, CPU, in_use=False) is first
    second = memory.pool(lambda _: 1 << 21, CPU, in_use=False)
    assert (first.bytes, second.bytes) == (1 << 20, 1 << 21)
    memory.close()


def test_the_budget_is_the_users_or_a_quarter_of_the_available_memory_by_ranks() -> None:
    asked: list[int] = []

    def within(budget: int) -> int:
        asked.append(budget)
        return 4096

    for memory in (StagingMemory(12_345, 4), StagingMemory(None, 1), StagingMemory(None, 1000)):
        memory.pool(within, CPU, in_use=False)
        memory.close()
    assert asked[0] == 12_345
    assert asked[1] // 1500 < asked[2] < asked[1] // 700


def test_memory_that_somebody_may_still_use_is_not_given_to_the_next_save() -> None:
    memory = StagingMemory(None, 1)
    first = memory.pool(lambda _: 4096, CPU, in_use=False)
    slot = first.take()
    second = memory.pool(lambda _: 4096, CPU, in_use=True)
    assert second is not first
    slot.view[:] = bytes(4096)  # still there
    first.give(slot)
    memory.close()


def test_memory_of_which_a_failed_save_has_not_given_all_back_is_not_given_to_the_next() -> None:
    memory = StagingMemory(None, 1)
    first = memory.pool(lambda _: 4096, CPU, in_use=False)
    slot = first.take()
    memory.cancel()
    second = memory.pool(lambda _: 4096, CPU, in_use=False)
    assert second is not first
    second.give(second.take())
    slot.view[:] = bytes(4096)  # still there
    first.give(slot)
    memory.close()


def test_memory_that_was_still_in_use_goes_at_the_first_save_after_it_is_not() -> None:
    memory = StagingMemory(None, 1)
    first = memory.pool(lambda _: 4096, CPU, in_use=False)
    slot = first.take()
    second = memory.pool(lambda _: 4096, CPU, in_use=True)
    assert memory.pool(lambda _: 4096, CPU, in_use=False) is second
    assert not first._map.closed
    first.give(slot)
    assert memory.pool(lambda _: 4096, CPU, in_use=False) is second
    assert first._map.closed
    memory.close()


def test_memory_is_pinned_once_and_unpinned_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = StagingMemory(None, 1)
    pool = memory.pool(lambda _: 8192, GPU, in_use=False)
    memory.pool(lambda _: 8192, GPU, in_use=False)
    assert runtime.calls == [("pin", pool.address, 8192, 0)]
    memory.close()
    assert runtime.calls[1:] == [("unpin", pool.address)]
    memory.close()
    assert len(runtime.calls) == 2


def test_memory_that_cannot_be_pinned_is_used_all_the_same_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(error=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = StagingMemory(None, 1)
    with caplog.at_level(logging.INFO, "fastckpt"):
        memory.pool(lambda _: 8192, GPU, in_use=False).take()
    assert "8192 bytes of staging memory cannot be pinned (error 2" in caplog.text
    memory.close()
    assert [call[0] for call in runtime.calls] == ["pin"]


def test_on_the_cpu_no_runtime_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("there is no accelerator"))
    memory = StagingMemory(None, 1)
    memory.pool(lambda _: 8192, CPU, in_use=False)
    memory.close()
