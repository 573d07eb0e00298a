"""What tests of fastckpt, of stores and of code that uses fastckpt are written with.

``StoreContract`` needs pytest; nothing else here does, so each name is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastckpt.testing.faulty_store import FaultyStore, Killed
    from fastckpt.testing.store_contract import StoreContract

__all__ = ["StoreContract", "FaultyStore", "Killed", "ThreadGroup"]

_MODULES = {
    "StoreContract": "store_contract",
    "FaultyStore": "faulty_store",
    "Killed": "faulty_store",
    "ThreadGroup": "thread_group",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
