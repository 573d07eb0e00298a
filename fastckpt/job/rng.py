"""The state of this rank's random number generators."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class RNGState:
    """The random number generators of this rank: Python's, NumPy's, and torch's on the CPU and on every device of the
    accelerator. A ``torch.Generator`` that a program made is not among them.

    Saved as they are when ``save`` is called, whatever the ``state_dict`` of others in the state draws, and restored
    after all others. At the same world size every stream goes on to the bit. At another, streams that all ranks had in
    common (equal seeds, or a single rank) go on on every rank; otherwise each rank gets new ones, derived from what
    rank 0 saved and its own rank, and rank 0 logs a warning. They are the same every time the snapshot is restored, no
    two ranks' are alike, and they do not depend on the new world size: a rank's stream is its own affair.
    """

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
        }
        if (accelerator := _accelerator()) is not None:
            # Without device numbers: ranks on different devices whose streams are equal have equal states.
            devices = torch.get_device_module(accelerator)
            state["accelerator"] = devices.get_rng_state()
            state["accelerator_type"] = accelerator.type
            state["other_devices"] = [devices.get_rng_state(number) for number in _other_devices(accelerator)]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes ``state`` over, but for what ``unlike`` names."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        accelerator = _accelerator()
        if accelerator is None or _saved_type(state) != accelerator.type:
            return
        devices = torch.get_device_module(accelerator)
        devices.set_rng_state(state["accelerator"].cpu())
        others, saved = _other_devices(accelerator), state.get("other_devices", ())
        if len(others) == len(saved):
            for number, stream in zip(others, saved, strict=True):
                devices.set_rng_state(stream.cpu(), number)

    def unlike(self, state: Mapping[str, Any]) -> str:
        """What of a saved state has no place here, or the other way round, as a sentence; empty if there is nothing."""
        accelerator, saved = _accelerator(), _saved_type(state)
        here = None if accelerator is None else accelerator.type
        if here != saved:
            gone = f"those of {saved} devices were saved and end here" if saved else "none of a device were saved"
            left = f"those of {here} devices stay as they are" if here else "this process has no accelerator"
            return f"{gone}; {left}"
        if accelerator is not None and "other_devices" in state:
            count, had = len(_other_devices(accelerator)) + 1, len(state["other_devices"]) + 1
            if count != had:
                return f"{had} {saved} devices were saved and this process has {count}; only the current one's goes on"
        return ""

    def derive(self, saved: bytes, rank: int) -> None:
        """Seeds every generator, all devices included, from an encoded state and the rank."""

        def seed(use: bytes, by: bytes) -> bytes:
            return hashlib.blake2b(saved, digest_size=32, salt=by, person=use).digest()

        own = rank.to_bytes(8, "little")
        random.seed(int.from_bytes(seed(b"python", own), "little"))
        np.random.seed(np.frombuffer(seed(b"numpy", own), "<u4"))
        # On the CPU torch takes the lower 32 bits alone. Drawn by lot they would meet among tens of thousands of ranks;
        # counted from a common start they cannot.
        low = (int.from_bytes(seed(b"torch", b"")[:4], "little") + rank) % 2**32
        high = int.from_bytes(seed(b"torch", own)[:4], "little")
        torch.manual_seed(high << 32 | low)


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _other_devices(accelerator: torch.device) -> list[int]:
    """The numbers of the devices of its type but the current one."""
    count = torch.get_device_module(accelerator).device_count()
    return [number for number in range(count) if number != torch.accelerator.current_device_index()]


def _saved_type(state: Mapping[str, Any]) -> str | None:
    """The type of the devices in a saved state, if there are any."""
    if "accelerator" not in state:
        return None
    # Early snapshots do not say.
    here = _accelerator()
    default = "accelerator" if here is None else here.type
    return str(state.get("accelerator_type", default))
