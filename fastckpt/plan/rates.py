"""Which ranks have been slow lately: what the next plan gives them less for.

A rank is slow if it wrote slower than was to be expected of what it and all others wrote; not because others shared its
way to the storage, and not because the storage is slower than the topology says.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

SAMPLE_BYTES_MIN = 64 * 1024 * 1024
"""Of what took less time to write than storage varies by, a rate says nothing."""
WEIGHT = 0.3
"""Of a new sample. The rest is what was known before: an exponentially weighted moving average."""
NOISE = 0.1
"""Who is slower by no more than this part of what was to be expected counts as if it was not."""
FORGET_SAVES = 16
"""What so many saves have not confirmed is unknown again: a rank that was slow, and therefore writes nothing any more,
is given something to write."""
CHANGE_MIN = 0.02
"""What moves by less is as it was."""

_OCTAVE = 256
_UNIT = 1024.0

Floats = npt.NDArray[np.float64]


def encode_rate(size: int, seconds: float) -> int:
    """A sample in 16 bits, for a message that has one for each rank: the logarithm of bytes/s; 0 if it says nothing."""
    if size < SAMPLE_BYTES_MIN or seconds <= 0:
        return 0
    return max(1, min(65_535, round(_OCTAVE * math.log2(max(1.0, size / seconds / _UNIT)))))


class Rates:
    """Of every rank of a job, at its coordinator. One thread at a time."""

    def __init__(self, ranks: int) -> None:
        self._factors = np.full(ranks, math.nan)
        """Rate / what was to be expected, at most 1; nan where nothing is known."""
        self._told = np.ones(ranks)
        """As of ``version``."""
        self._ages = np.zeros(ranks, np.int64)
        """Saves since the last sample."""
        self.version = 0
        """Grows with every change that counts."""

    def add(self, samples: npt.NDArray[np.uint16], expected: Floats) -> None:
        """What ``encode_rate`` made of each rank's share of one save, and the bytes/s that were to be expected of it:
        ``inf`` where that is not known."""
        found = samples > 0
        rates = np.where(found, _UNIT * np.exp2(samples / _OCTAVE), math.nan)
        factors = _factors(rates, found, expected)
        mixed = np.where(np.isfinite(self._factors), WEIGHT * factors + (1 - WEIGHT) * self._factors, factors)
        self._factors = np.where(found, mixed, self._factors)
        self._ages = np.where(found, 0, self._ages + 1)
        self._factors[self._ages >= FORGET_SAVES] = math.nan
        slow = self.slow()
        if ((slow < 1) != (self._told < 1)).any() or (np.abs(slow - self._told) > CHANGE_MIN * self._told).any():
            self._told = slow
            self.version += 1

    def slow(self) -> Floats:
        """By rank: how fast it is for what is to be expected of it; 1 unless it is slow."""
        return np.where(self._factors < 1 - NOISE, self._factors, 1.0)


def _factors(rates: Floats, found: npt.NDArray[np.bool_], expected: Floats) -> Floats:
    """Rates / what was to be expected. Where that is known it is less if the typical rank is slower, since then so are
    the storage or the figures for it, and never more than the fastest rank wrote. Where it is not, it is what the
    typical rank wrote."""
    factors = np.ones(len(rates))
    is_known = np.isfinite(expected) & (expected > 0)
    for which, scale in ((found & is_known, expected), (found & ~is_known, np.ones(len(rates)))):
        if which.any():
            ratios = rates[which] / scale[which]
            typical = np.sort(ratios)[len(ratios) // 2]
            if scale is expected:
                typical = min(1.0, typical)
            usual = np.minimum(scale[which] * typical, np.nanmax(rates))
            factors[which] = np.minimum(1.0, rates[which] / usual)
    return factors
