"""How long a placement takes if all writers write at once: fluid flows that share the edges of a tree max-min fairly.

Every flow runs from its rank up to the storage, so the fair rates need no search for bottlenecks: from the ranks
upwards each edge lowers the flows that come to it to one common level at which they just fit. A flow's rate is the
lowest level on its way. That is what Bertsekas and Gallager (Data Networks, 6.5.2) find by progressive filling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastckpt.plan.placement import makespan
from fastckpt.topology.topology import Tree

TOLERANCE = 0.001
"""How far finishing times may be off, as a part of the makespan."""

Floats = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Simulation:
    """When each writer is done."""

    finish_seconds: Floats
    """By rank; 0 where it writes nothing. All nan where the tree has no capacity that is known."""
    makespan_seconds: float
    """When the last one is done."""


@dataclass(frozen=True, eq=False)
class _Flows:
    """Flows that nothing tells apart, merged. Sorted by ``entry``."""

    entry: Numbers
    """The first level whose edge is shared with another flow; below it, ``cap`` holds."""
    cap: Floats
    """Bytes/s."""
    count: Floats
    edges: tuple[Numbers, ...]
    """By level; of levels below the entry without meaning."""

    def select(self, which: npt.NDArray[np.bool_]) -> _Flows:
        edges = tuple(edges[which] for edges in self.edges)
        return _Flows(self.entry[which], self.cap[which], self.count[which], edges)


def simulate(
    tree: Tree,
    loads: npt.NDArray[np.int64],
    *,
    writer_bytes_per_second: float | None = None,
    tolerance: float = TOLERANCE,
) -> Simulation:
    """One flow for each rank with ``loads[rank]`` > 0 bytes; all start at once and share max-min fairly until done.

    With ``writer_bytes_per_second`` c, what a writer alone gets from the storage, the storage's capacity W has a soft
    knee: M writers together get W (1 - exp(-M c / W)). Flows whose bytes differ by less than ``tolerance`` / 2 are one,
    and what a flow that is done leaves is given to the others after at most ``tolerance`` / 2 of the makespan; with 0
    all is exact. ``ValueError`` for loads that are negative or not one a rank, and for a ``writer_bytes_per_second`` or
    a ``tolerance`` that is none.
    """
    _check(tree, loads)
    if writer_bytes_per_second is not None and not 0 < writer_bytes_per_second < math.inf:
        raise ValueError(f"writer_bytes_per_second={writer_bytes_per_second} is no rate")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance} is no part of the makespan: give 0 to 1")
    finish = np.zeros(len(loads))
    writers = np.flatnonzero(loads)
    if not any(np.isfinite(capacity).any() for capacity in tree.capacities):
        return Simulation(np.full(len(loads), math.nan), math.nan)
    if not len(writers):
        return Simulation(finish, 0.0)
    flows, flow_of, size = _merge(tree, writers, loads[writers].astype(np.float64), tolerance / 2)
    done = np.zeros(len(size))
    active = np.arange(len(size))
    left = size.copy()
    now = 0.0
    least = makespan(tree, loads)
    while len(active):
        rates = _rates(tree, flows, writer_bytes_per_second)
        need = left / rates
        step = max(float(need.min()), max(now, least) * tolerance / 2)
        ending = need <= step * (1 + 1e-12)
        done[active[ending]] = now + need[ending]
        going = ~ending
        left = left[going] - rates[going] * step
        flows, active = flows.select(going), active[going]
        now += step
    finish[writers] = done[flow_of]
    return Simulation(finish, float(finish.max()))


def _check(tree: Tree, loads: npt.NDArray[np.int64]) -> None:
    """``ValueError`` unless there is a load for each rank, and none is negative."""
    ranks = len(tree.capacities[0])
    if loads.shape != (ranks,):
        raise ValueError(f"loads have shape {list(loads.shape)}; give one for each of the tree's {ranks} ranks")
    if len(loads) and loads.min() < 0:
        raise ValueError(f"the load of rank {int(loads.argmin())} is {int(loads.min())} bytes; none may be negative")


def _merge(tree: Tree, writers: Numbers, size: Floats, tolerance: float) -> tuple[_Flows, Numbers, Floats]:
    """The flows, which of them each writer is one of, and the bytes of each."""
    levels = len(tree.levels)
    edges = [of_ranks[writers] for of_ranks in tree.edges_of_ranks()]
    cap = np.full(len(writers), math.inf)
    entry = np.full(len(writers), levels)
    for level in range(levels):
        shared = np.bincount(edges[level], minlength=len(tree.capacities[level]))[edges[level]] > 1
        entry[shared & (entry == levels)] = level
        alone = entry == levels
        cap[alone] = np.minimum(cap[alone], tree.capacities[level][edges[level][alone]])
    # Sizes within a part of ``tolerance`` of each other become the largest among them: never too early.
    bucket = np.round(np.log(size) / tolerance) if tolerance else size
    entry_edge = np.zeros(len(writers))
    for level in range(levels):
        np.copyto(entry_edge, edges[level], where=entry == level)
    kinds = np.stack([entry, entry_edge, cap, bucket])
    order = np.lexsort(kinds[::-1])
    kinds = kinds[:, order]
    first = np.append(True, (kinds[:, 1:] != kinds[:, :-1]).any(axis=0))
    flow_of = np.empty(len(writers), np.intp)
    flow_of[order] = np.cumsum(first) - 1
    starts = np.flatnonzero(first)
    member = order[starts]
    count = np.diff(np.append(starts, len(writers))).astype(np.float64)
    flows = _Flows(entry[member], cap[member], count, tuple(level[member] for level in edges))
    return flows, flow_of, np.maximum.reduceat(size[order], starts)


def _rates(tree: Tree, flows: _Flows, writer_bytes_per_second: float | None) -> Floats:
    rates = flows.cap.copy()
    for level, capacity in enumerate(tree.capacities):
        if level == len(tree.levels) - 1 and writer_bytes_per_second is not None and math.isfinite(capacity[0]):
            writers = float(flows.count.sum())
            capacity = capacity * -math.expm1(-writers * writer_bytes_per_second / float(capacity[0]))
        elif not np.isfinite(capacity).any():
            continue
        here = int(np.searchsorted(flows.entry, level, side="right"))
        if level == len(tree.levels) - 1 and writer_bytes_per_second is not None:
            here = len(rates)  # a single writer shares no edge, but has the knee's capacity only
        edge = flows.edges[level][:here]
        limit = _fit(rates[:here], flows.count[:here], edge, capacity)
        np.minimum(rates[:here], limit[edge], out=rates[:here])
    return rates


def _fit(rates: Floats, count: Floats, edge: Numbers, capacity: Floats) -> Floats:
    """For each edge the level to which its flows must be lowered to fit into it; ``inf`` where they do as they are."""
    edges = len(capacity)
    limit = np.full(edges, math.inf)
    over = np.bincount(edge, rates * count, edges) > capacity
    if not over.any():
        return limit
    mine = np.flatnonzero(over[edge])
    rates, count, edge = rates[mine], count[mine], edge[mine]
    level = np.zeros(edges)
    level[over] = capacity[over] / np.bincount(edge, count, edges)[over]
    while True:
        # Flows that cannot use the level leave what they do not use to the others, whose level so rises. It never
        # falls, whatever is lost in rounding, and each round but the last has more flows that cannot: so it ends.
        low = rates <= level[edge]
        used = np.bincount(edge[low], (rates * count)[low], edges)[over]
        sharing = np.bincount(edge[~low], count[~low], edges)[over]
        before = level[over]
        level[over] = np.maximum(before, np.where(sharing > 0, (capacity[over] - used) / np.maximum(sharing, 1), 0.0))
        if (level[over] <= before * (1 + 1e-13)).all():
            break
    limit[over] = level[over]
    return limit
