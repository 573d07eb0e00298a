"""The seed of what is random here."""

from __future__ import annotations

from tests.crash.conftest import seed as seed  # a fixture
