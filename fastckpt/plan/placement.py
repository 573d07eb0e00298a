"""Which holder of replicated bytes writes which of them: here, evenly by bytes.

Even is optimal where every holder's path to storage is equal; the solver for unequal paths takes this function's place.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


def even_runs(sizes: Sequence[int], writers: int) -> list[int]:
    """Cuts consecutive chunks of the given sizes into ``writers`` consecutive runs of nearly equal bytes.

    Returns the number of chunks of each run. No run is further from an equal share than one chunk.
    """
    ends = list(itertools.accumulate(sizes))
    total = ends[-1] if ends else 0
    cuts = [0]
    for writer in range(1, writers):
        target = total * writer / writers
        cut = bisect.bisect_left(ends, target)
        # The boundary before or after the target, whichever is nearer.
        if cut < len(ends) and ends[cut] - target < target - (ends[cut - 1] if cut else 0):
            cut += 1
        cuts.append(max(cut, cuts[-1]))
    cuts.append(len(sizes))
    return [after - before for before, after in itertools.pairwise(cuts)]
