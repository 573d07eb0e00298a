"""How fast each rank has written lately: what the next plan takes its own capacity for."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

SAMPLE_BYTES_MIN = 64 * 1024 * 1024
"""Of what took less time to write than storage varies by, a rate says nothing."""
WEIGHT = 0.3
"""Of a new sample. The rest is what was known before: an exponentially weighted moving average."""
FORGET_SAVES = 16
"""A rate that so many saves have not confirmed is unknown again: a rank that was slow, and therefore writes nothing any
more, is given something to write."""
CHANGE_MIN = 0.02
"""A rate that moves by less is as it was."""

_OCTAVE = 256
_UNIT = 1024.0


def encode_rate(size: int, seconds: float) -> int:
    """A sample in 16 bits, for a message that has one for each rank: the logarithm of bytes/s; 0 if it says nothing."""
    if size < SAMPLE_BYTES_MIN or seconds <= 0:
        return 0
    return max(1, min(65_535, round(_OCTAVE * math.log2(max(1.0, size / seconds / _UNIT)))))


class Rates:
    """Of every rank of a job, at its coordinator. One thread at a time."""

    def __init__(self, ranks: int) -> None:
        self._rates = np.full(ranks, math.nan)
        """Bytes/s; nan where nothing is known."""
        self._told = self._rates.copy()
        """As of ``version``."""
        self._ages = np.zeros(ranks, np.int64)
        """Saves since the last sample."""
        self.version = 0
        """Grows with every change that counts."""

    def add(self, samples: npt.NDArray[np.uint16]) -> None:
        """What ``encode_rate`` made of each rank's share of one save."""
        found = samples > 0
        sample = np.where(found, _UNIT * np.exp2(samples / _OCTAVE), math.nan)
        mixed = np.where(np.isfinite(self._rates), WEIGHT * sample + (1 - WEIGHT) * self._rates, sample)
        self._rates = np.where(found, mixed, self._rates)
        self._ages = np.where(found, 0, self._ages + 1)
        self._rates[self._ages >= FORGET_SAVES] = math.nan
        known, told = np.isfinite(self._rates), np.isfinite(self._told)
        if (known != told).any() or (np.abs(self._rates - self._told)[known] > CHANGE_MIN * self._told[known]).any():
            self._told = self._rates.copy()
            self.version += 1

    def limit(self, capacities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Capacities of ranks, in bytes/s, and no more than their rates. Where rates are all that is known, a rank that
        has none counts as the typical one."""
        known = self._rates[np.isfinite(self._rates)]
        if not len(known):
            return capacities
        rates = np.where(np.isfinite(self._rates), self._rates, np.median(known))
        limited: npt.NDArray[np.float64] = np.minimum(capacities, rates)
        return limited
