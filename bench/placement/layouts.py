"""Seven jobs as the planner sees them: a tree of capacities, classes of bytes with their holders, and what only one
rank holds.

All are tensor, pipeline and data parallel, 8 by 16 by the rest, on nodes of 8 ranks: a dense class for each tensor and
pipeline position, held by all data parallel ranks, and for each pipeline stage a small class that its tensor parallel
ranks hold too (norms). Capacities are assumptions, so ratios matter and seconds do not: 2 GB/s a rank, 12.5 GB/s a
node, 100 to 400 GB/s a supernode. The storage takes what all supernodes bring together: if it took less, it would bind,
and nearly every placement would be as good as any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastckpt.plan.placement import Classes
from fastckpt.topology.topology import Tree

TENSOR, PIPELINE = 8, 16
RANKS_PER_NODE = 8
RANK, NODE, SUPERNODE = 2e9, 12.5e9, 200e9
BYTES_PER_RANK = 300e6
"""Replicated bytes / ranks."""
NORM_SHARE = 0.001
SUPERNODE_NODES = 256
NVL72_NODES = 18


@dataclass(frozen=True, eq=False)
class Layout:
    """What is to be placed."""

    tree: Tree
    classes: Classes
    fixed: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    """Bytes of each shard."""
    class_of: npt.NDArray[np.intp]
    """The class of each shard; ascending."""


def _tree(supernode_of: npt.NDArray[np.intp], uplinks: npt.NDArray[np.float64]) -> Tree:
    nodes, supernodes = len(supernode_of), len(uplinks)
    ranks = nodes * RANKS_PER_NODE
    return Tree(
        ("rank", "node", "supernode", "storage"),
        (np.arange(ranks) // RANKS_PER_NODE, supernode_of, np.zeros(supernodes, np.intp)),
        (np.full(ranks, RANK), np.full(nodes, NODE), uplinks, np.array([uplinks.sum()])),
        (range(ranks), range(nodes), range(supernodes), ["storage"]),  # type: ignore[arg-type]
    )


def _equal(nodes: int) -> npt.NDArray[np.intp]:
    return np.arange(nodes) // SUPERNODE_NODES


def _skewed(nodes: int, random: np.random.Generator) -> npt.NDArray[np.intp]:
    """As many supernodes, of sizes that differ by an order of magnitude and more."""
    supernodes = -(-nodes // SUPERNODE_NODES)
    sizes = random.multinomial(nodes - supernodes, random.dirichlet(np.ones(supernodes))) + 1
    return np.repeat(np.arange(supernodes), sizes)


def _fragmented(nodes: int, random: np.random.Generator) -> npt.NDArray[np.intp]:
    """What a busy cluster has free: runs of 1 to 64 nodes in any of 1.6 times as many supernodes."""
    supernodes = -(-nodes * 8 // (5 * SUPERNODE_NODES))
    runs = random.integers(1, 65, nodes)
    found = np.repeat(random.integers(0, supernodes, nodes), runs)[:nodes]
    return np.unique(found, return_inverse=True)[1].astype(np.intp)


def _split(total: int, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    ends = np.rint(np.cumsum(weights) * (total / weights.sum())).astype(np.int64)
    return np.diff(ends, prepend=0)


def _layout(
    supernode_of: npt.NDArray[np.intp],
    random: np.random.Generator,
    shards: int,
    *,
    slow: bool = False,
    data_inner: bool = False,
    sharded: bool = False,
) -> Layout:
    supernodes = int(supernode_of.max()) + 1
    uplinks = random.uniform(100e9, 400e9, supernodes) if slow else np.full(supernodes, SUPERNODE)
    tree = _tree(supernode_of, uplinks)
    ranks = np.arange(len(tree.capacities[0]))
    data = len(ranks) // (TENSOR * PIPELINE)
    stage = ranks // (TENSOR * data) if data_inner else ranks // TENSOR % PIPELINE
    dense = stage * TENSOR + ranks % TENSOR
    holders = np.concatenate([np.argsort(dense, kind="stable"), np.argsort(stage, kind="stable")])
    counts = np.concatenate([np.bincount(dense), np.bincount(stage)])
    # The first and the last stage hold an embedding, too.
    weight = np.ones(PIPELINE)
    weight[[0, -1]] = 1.6
    weights = np.concatenate([np.repeat(weight, TENSOR), np.full(PIPELINE, NORM_SHARE * TENSOR)])
    totals = _split(int(len(ranks) * BYTES_PER_RANK), weights)
    shard_counts = _split(shards, weights)
    sizes = np.concatenate(
        [_split(total, random.lognormal(0, 1, count)) for total, count in zip(totals, shard_counts, strict=True)]
    )
    # Sharded optimizer state is 12 of 14 bytes a parameter; buckets are not equal.
    fixed = random.uniform(0.8, 1.2, len(ranks)) * BYTES_PER_RANK * 6 if sharded else np.zeros(len(ranks))
    return Layout(
        tree,
        Classes(np.zeros(len(counts), np.int64), np.append(0, np.cumsum(counts)), holders),
        fixed.astype(np.int64),
        sizes,
        np.repeat(np.arange(len(shard_counts)), shard_counts),
    )


NAMES = ("equal", "skewed", "slow uplinks", "NVL72-like", "PP-inner", "DP-inner", "fragmented ZeRO")


def layout(name: str, nodes: int, shards: int) -> Layout:
    """The layout of that name; ``classes.bytes`` is still to be counted from the shards."""
    random = np.random.default_rng(NAMES.index(name))
    match name:
        case "equal":
            return _layout(_equal(nodes), random, shards)
        case "skewed":
            return _layout(_skewed(nodes, random), random, shards)
        case "slow uplinks":
            return _layout(_equal(nodes), random, shards, slow=True)
        case "NVL72-like":
            return _layout(np.arange(nodes) // NVL72_NODES, random, shards)
        case "PP-inner":
            return _layout(_skewed(nodes, random), random, shards, slow=True)
        case "DP-inner":
            return _layout(_skewed(nodes, random), random, shards, slow=True, data_inner=True)
        case "fragmented ZeRO":
            return _layout(_fragmented(nodes, random), random, shards, slow=True, data_inner=True, sharded=True)
    raise ValueError(f"no layout is called {name!r}; there are {', '.join(NAMES)}")
