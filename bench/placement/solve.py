"""One layout in a process of its own, so that its peak memory is its own: ``python -m bench.placement.solve NAME NODES
SHARDS RUNS EXACT`` prints what was found as JSON."""

from __future__ import annotations

import itertools
import json
import resource
import sys
import time
from typing import Any

import numpy as np

from bench.placement.layouts import Layout, layout
from fastckpt.plan.placement import Classes, Placement, cut_runs, makespan, phases, place


def solve(name: str, nodes: int, shards: int, runs: int, exact: bool) -> dict[str, Any]:
    """From the sizes of all shards to the shares of all writers, timed; then, not timed, to chunks: a shard is one."""
    given = layout(name, nodes, shards)
    made_bytes = _peak_bytes()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        # Sums of floats, which are exact below 2**53.
        totals = np.bincount(given.class_of, given.sizes).astype(np.int64)
        counted = time.perf_counter()
        classes = Classes(totals, given.classes.starts, given.classes.holders)
        placement = place(given.tree, classes, given.fixed)
        seconds.append({"totals": counted - start, "solve": time.perf_counter() - counted})
    solved_bytes = _peak_bytes()
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
        "makespan_seconds": placement.makespan_seconds,
        "bound_seconds": placement.bound_seconds,
        "gap": placement.gap,
        "binding_edges": np.bincount([level for level, _ in placement.binding], minlength=4).tolist(),
        "even_seconds": makespan(given.tree, given.fixed + np.bincount(classes.holders, even, len(given.fixed))),
        "chunked_seconds": _chunked_seconds(given, classes, placement),
    }
    if exact:
        from bench.placement.exact import least_seconds

        found["least_seconds"] = least_seconds(given.tree, classes, given.fixed)
    return found


def _chunked_seconds(given: Layout, classes: Classes, placement: Placement) -> float:
    written = given.fixed.copy()
    spans = zip(itertools.pairwise(classes.starts), phases(len(classes.bytes)), strict=True)
    for number, ((first, end), phase) in enumerate(spans):
        holding = slice(first, end)
        sizes = given.sizes[slice(*np.searchsorted(given.class_of, [number, number + 1]))]
        runs = cut_runs(sizes, placement.shares[holding], phase)
        ends = np.append(0, np.cumsum(sizes))[np.cumsum(runs)]
        written[classes.holders[holding]] += np.diff(ends, prepend=0)
    return makespan(given.tree, written)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    name, nodes, shards, runs, exact = sys.argv[1:]
    print(json.dumps(solve(name, int(nodes), int(shards), int(runs), exact == "exact")))
