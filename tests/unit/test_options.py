"""Options: what cannot be is refused at once, by the name of the option and the value."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fastckpt.format import chunk
from fastckpt.format.codec import CODECS
from fastckpt.options import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, Options


def test_the_defaults_are_allowed_and_frozen() -> None:
    options = Options()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.codec = "zstd"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Options(4096)  # type: ignore[misc]


def test_the_limits_are_those_of_the_format() -> None:
    assert (CHUNK_BYTES_MIN, CHUNK_BYTES_MAX) == (chunk.CHUNK_BYTES_MIN, chunk.CHUNK_BYTES_MAX)
    for codec in CODECS:
        Options(codec=codec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"chunk_bytes": CHUNK_BYTES_MIN},
        {"chunk_bytes": CHUNK_BYTES_MAX},
        {"fence": "explicit"},
        {"fence": "copy"},
        {"fence_seconds_max": 0.001},
        {"staging_bytes_max": 1},
        {"copy": ("target_net.*",)},
        {"commit_seconds_max": float("inf")},
    ],
    ids=str,
)
def test_values_at_the_limits_are_allowed(fields: dict[str, Any]) -> None:
    options = Options(**fields)
    assert {name: getattr(options, name) for name in fields} == fields


@pytest.mark.parametrize(
    "fields",
    [
        {"chunk_bytes": 0},
        {"chunk_bytes": -4096},
        {"chunk_bytes": CHUNK_BYTES_MIN // 2},
        {"chunk_bytes": CHUNK_BYTES_MAX * 2},
        {"chunk_bytes": 5000},
        {"codec": "lz4"},
        {"codec": 1},
        {"fence": "none"},
        {"fence_seconds_max": 0},
        {"fence_seconds_max": float("nan")},
        {"staging_bytes_max": 0},
        {"staging_bytes_max": -1},
        {"copy": "target_net.*"},
        {"copy": (1,)},
        {"commit_seconds_max": -1},
        {"chunk_bytes": 4096.0},
        {"chunk_bytes": "4096"},
        {"writers": 1.5},
        {"writers": True},
        {"writers": "2"},
        {"streams": 4.0},
        {"staging_bytes_max": float("inf")},
        {"fence_seconds_max": "60"},
        {"commit_seconds_max": None},
        {"commit_seconds_max": True},
        {"record_hosts": "no"},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_is_refused_by_name_and_value(fields: dict[str, Any]) -> None:
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match="Options") as caught:
        Options(**fields)
    assert str(caught.value).startswith(f"Options.{name}={value!r} ")
