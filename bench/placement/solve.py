"""One layout in a process of its own, so that its peak memory is its own: ``python -m bench.placement.solve NAME NODES
SHARDS RUNS EXACT`` prints what was found as JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import numpy as np

from bench.placement.layouts import Layout, layout
from fastckpt.plan.classes import ChunkedClasses
from fastckpt.plan.deal import Dealer
from fastckpt.plan.placement import Classes, makespan, place


def solve(name: str, nodes: int, shards: int, runs: int, exact: bool) -> dict[str, Any]:
    """From the sizes of all shards to the runs of all writers, timed; a shard is one chunk."""
    given = layout(name, nodes, shards)
    made_bytes = _peak_bytes()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        # Sums of floats, which are exact below 2**53.
        totals = np.bincount(given.class_of, given.sizes).astype(np.int64)
        counted = time.perf_counter()
        dealer = Dealer(given.tree)
        dealt = dealer.deal(_chunked(given, totals))
        seconds.append({"totals": counted - start, "deal": time.perf_counter() - counted})
    solved_bytes = _peak_bytes()
    classes = Classes(totals, given.classes.starts, given.classes.holders)
    every = place(given.tree, classes, given.fixed)
    even = np.repeat(totals / np.diff(classes.starts), np.diff(classes.starts))
    found = {
        "layout": name,
        "ranks": len(given.fixed),
        "nodes": nodes,
        "supernodes": len(given.tree.capacities[2]),
        "classes": len(totals),
        "shards": len(given.sizes),
        "replicated_bytes": int(totals.sum()),
        "fixed_bytes": int(given.fixed.sum()),
        "seconds": seconds,
        "layout_peak_bytes": made_bytes,
        "peak_bytes": solved_bytes,
        "makespan_seconds": every.makespan_seconds,
        "bound_seconds": every.bound_seconds,
        "gap": every.gap,
        "binding_edges": np.bincount([level for level, _ in every.binding], minlength=4).tolist(),
        "even_seconds": makespan(given.tree, given.fixed + np.bincount(classes.holders, even, len(given.fixed))),
        "dealt": {
            "writers": int(np.count_nonzero(dealt.written)),
            "makespan_seconds": dealt.makespan_seconds,
            "object_seconds": dealt.objects / dealer.profile.objects_per_second,
        },
    }
    if exact:
        from bench.placement.exact import least_seconds

        found["least_seconds"] = least_seconds(given.tree, classes, given.fixed)
    return found


def _chunked(given: Layout, totals: np.ndarray[Any, np.dtype[np.int64]]) -> ChunkedClasses:
    """The classes of several ranks, then what one rank holds, in one chunk each."""
    alone, starts = np.flatnonzero(given.fixed), given.classes.starts
    firsts = np.searchsorted(given.class_of, np.arange(len(totals) + 1))
    return ChunkedClasses(
        Classes(
            np.concatenate([totals, given.fixed[alone]]),
            np.concatenate([starts, starts[-1] + 1 + np.arange(len(alone))]),
            np.concatenate([given.classes.holders, alone]),
        ),
        np.concatenate([np.diff(firsts), np.ones(len(alone), np.int64)]),
        [(np.array([number]), given.sizes[firsts[number] : firsts[number + 1]]) for number in range(len(totals))],
    )


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    name, nodes, shards, runs, exact = sys.argv[1:]
    print(json.dumps(solve(name, int(nodes), int(shards), int(runs), exact == "exact")))
