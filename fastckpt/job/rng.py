"""The state of this rank's random number generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class RNGState:
    """The random number generators of this rank: Python's, NumPy's, torch's on the CPU and on the accelerator.

    Restored at another world size, each rank derives new streams from the saved state of rank 0 and its own rank.
    """

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        if (device := _accelerator()) is not None:
            state["accelerator"] = torch.get_device_module(device).get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        # A snapshot of a machine without an accelerator leaves that generator as it is, and the other way round.
        if (device := _accelerator()) is not None and "accelerator" in state:
            torch.get_device_module(device).set_rng_state(state["accelerator"].cpu())

    def derive(self, saved: bytes, rank: int) -> None:
        """Seeds everything from a saved state and the rank: new streams, the same ones every time."""
        seed = int.from_bytes(hashlib.blake2b(saved + rank.to_bytes(8, "little"), digest_size=8).digest(), "little")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
