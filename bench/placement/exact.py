"""The least time any placement can take, from a linear program: what ``place`` comes near to, and is not made of."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, hstack, vstack

from fastckpt.plan.placement import Classes
from fastckpt.topology.topology import Tree

GB = 1e9
"""The solver's tolerances are absolute: in bytes it gives wrong answers."""


def least_seconds(tree: Tree, classes: Classes, fixed: npt.NDArray[np.int64]) -> float:
    """Seconds of the best placement of shares that need not be whole bytes, by HiGHS."""
    counts = np.diff(classes.starts)
    holders, variables = classes.holders, np.arange(len(classes.holders))
    passes, capacities, fixed_loads = [], [], []
    for edges, capacity in zip(tree.edges_of_ranks(), tree.capacities, strict=True):
        shape = (len(capacity), len(variables))
        limited = np.flatnonzero(np.isfinite(capacity))
        passes.append(_ones(edges[holders], variables, shape)[limited])
        capacities.append(capacity[limited] / GB)
        fixed_loads.append(np.bincount(edges, fixed, len(capacity))[limited] / GB)
    capacity = np.concatenate(capacities)
    if not len(capacity):
        return 0.0
    of_class = _ones(np.repeat(np.arange(len(counts)), counts), variables, (len(counts), len(variables)))
    found = linprog(
        np.append(np.zeros(len(variables)), 1.0),
        A_ub=hstack([vstack(passes), csr_array(-capacity[:, np.newaxis])]),
        b_ub=-np.concatenate(fixed_loads),
        A_eq=hstack([of_class, csr_array((len(counts), 1))]) if len(counts) else None,
        b_eq=classes.bytes / GB if len(counts) else None,
        method="highs",
    )
    if found.status != 0:
        raise RuntimeError(f"HiGHS did not find the optimum: {found.message}")
    return float(found.fun)


def _ones(rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp], shape: tuple[int, int]) -> csr_array:
    return coo_array((np.ones(len(rows)), (rows, columns)), shape).tocsr()
