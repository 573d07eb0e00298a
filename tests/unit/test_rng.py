"""The state of the random number generators: every library's, every device's, and streams derived for other worlds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastckpt import RNGState


class Devices:
    """What ``torch.get_device_module`` gives for a type of devices, with as many of them as asked for."""

    def __init__(self, count: int, current: int) -> None:
        self.current = current
        self.generators = [torch.Generator() for _ in range(count)]
        for number, generator in enumerate(self.generators):
            generator.manual_seed(1000 + number)

    def device_count(self) -> int:
        return len(self.generators)

    def get_rng_state(self, device: int | None = None) -> torch.Tensor:
        return self.generators[self.current if device is None else device].get_state()

    def set_rng_state(self, state: torch.Tensor, device: int | None = None) -> None:
        self.generators[self.current if device is None else device].set_state(state)

    def draw(self) -> list[float]:
        return [float(torch.rand((), generator=generator)) for generator in self.generators]


Machine = Callable[..., Devices]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Turns this machine into one with accelerators of a type, or without."""

    def turn(count: int, current: int = 0, kind: str = "cuda") -> Devices:
        devices = Devices(count, current)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current)
        monkeypatch.setattr(torch, "get_device_module", lambda _: devices)
        return devices

    return turn


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def derived(saved: bytes, rank: int) -> list[float]:
    RNGState().derive(saved, rank)
    return draw()


def test_derived_streams_are_the_same_every_time_and_differ_between_ranks_libraries_and_snapshots() -> None:
    every = [derived(saved, rank) for saved in (b"one", b"two") for rank in range(5)]
    assert every == [derived(saved, rank) for saved in (b"one", b"two") for rank in range(5)]
    assert len({number for drawn in every for number in drawn}) == 2 * 5 * 3


def test_derived_seeds_cannot_meet_in_the_32_bits_that_torch_takes_of_them_on_the_cpu() -> None:
    def seed(rank: int) -> int:
        RNGState().derive(b"saved", rank)
        return torch.initial_seed() % 2**32

    assert [(seed(rank) - seed(0)) % 2**32 for rank in (1, 2, 70_000)] == [1, 2, 70_000]


def test_derived_streams_do_not_depend_on_what_was_drawn_before() -> None:
    expected = derived(b"saved", 3)
    torch.rand(100)
    assert derived(b"saved", 3) == expected


def test_the_stream_of_every_device_goes_on(machine: Machine) -> None:
    devices = machine(3, current=1)
    state = RNGState().state_dict()
    expected = devices.draw()
    devices.draw()
    RNGState().load_state_dict(state)
    assert devices.draw() == expected
    assert RNGState().unlike(state) == ""


def test_the_stream_of_the_current_device_goes_on_on_the_current_device(machine: Machine) -> None:
    devices = machine(3, current=2)
    state = RNGState().state_dict()
    first, second, current = devices.draw()
    moved = machine(3, current=0)
    RNGState().load_state_dict(state)
    assert moved.draw() == [current, first, second]
    fewer = machine(2, current=1)
    untouched, _ = Devices(2, 1).draw()
    RNGState().load_state_dict(state)
    assert fewer.draw() == [untouched, current]
    alone = machine(1)
    RNGState().load_state_dict(state)
    assert alone.draw() == [current]
    assert RNGState().unlike(state) == (
        "3 cuda devices were saved and this process has 1; only the current one's goes on"
    )


def test_ranks_on_different_devices_with_equal_streams_have_equal_states(machine: Machine) -> None:
    states = []
    for current in range(2):
        devices = machine(2, current)
        for generator in devices.generators:
            generator.manual_seed(5)
        states.append(RNGState().state_dict())
    first, second = (
        [state["accelerator"].tolist(), [other.tolist() for other in state["other_devices"]]] for state in states
    )
    assert first == second


def test_streams_without_a_device_to_go_on_on_are_named_and_the_others_go_on(machine: Machine) -> None:
    machine(1).draw()
    with_device = RNGState().state_dict()
    machine(0)
    without = RNGState().state_dict()
    expected = draw()

    def restored(state: dict[str, Any]) -> str:
        RNGState().load_state_dict(state)
        assert draw() == expected
        return RNGState().unlike(state)

    assert restored(with_device) == "those of cuda devices were saved and end here; this process has no accelerator"
    devices = machine(1)
    untouched = Devices(1, 0).draw()
    assert restored(without) == "none of a device were saved; those of cuda devices stay as they are"
    assert devices.draw() == untouched
    devices = machine(1, kind="xpu")
    assert restored(with_device) == (
        "those of cuda devices were saved and end here; those of xpu devices stay as they are"
    )
    assert devices.draw() == untouched


def test_a_state_that_does_not_say_what_its_device_was_is_taken_for_one_of_this_machine(machine: Machine) -> None:
    devices = machine(1)
    state = RNGState().state_dict()
    for later in ("accelerator_type", "other_devices"):
        del state[later]
    expected = devices.draw()
    RNGState().load_state_dict(state)
    assert devices.draw() == expected
    assert RNGState().unlike(state) == ""
