"""What all tests share: hypothesis profiles, and the rule for tests that need root."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# No deadline: a busy machine is not a bug. The blob printed with a failure replays it.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "default")


@pytest.fixture
def need_root(request: pytest.FixtureRequest) -> None:
    """For tests marked ``root``: skipped without root, but failed in CI, where a skip would go unnoticed."""
    assert request.node.get_closest_marker("root"), "a test that uses need_root is marked root"
    if os.geteuid() != 0:
        reason = "needs root, for file systems of its own"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
