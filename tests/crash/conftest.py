"""The seed of what is random here."""

from __future__ import annotations

import os
import secrets

import pytest


@pytest.fixture
def seed() -> int:
    """Printed when the test fails; ``TEST_SEED`` replays it."""
    chosen = int(os.environ.get("TEST_SEED") or secrets.randbelow(2**32))
    print(f"TEST_SEED={chosen}")
    return chosen
