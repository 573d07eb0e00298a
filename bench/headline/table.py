"""174 x 10^12 parameters saved from 96,000 nodes, by five placements. A simulation.

Markdown for the README: topology and layout are those of ``examples``, and what is assumed in them stands beside
the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastckpt.plan import rivals
from fastckpt.plan.classes import of_holdings
from fastckpt.plan.deal import Dealer, Dealt
from fastckpt.plan.holdings import Holdings
from fastckpt.plan.layout_file import read_layout
from fastckpt.plan.placement import place
from fastckpt.plan.save_plan import auto_chunk_bytes
from fastckpt.plan.simulate import simulate
from fastckpt.plan.writers import Profile
from fastckpt.topology.topology import Topology, Tree

EXAMPLES = Path(__file__).parents[2] / "examples"
STATES = {"weights only": [2], "with optimizer": [2, 4, 4, 4], "and gradients": [2, 4, 4, 4, 2]}
"""Bytes of a parameter: nothing public says what was stored."""
SUPERNODE = 2
"""The level."""

Loads = npt.NDArray[np.int64]


def layout(sizes: list[int]) -> Holdings:
    """The example with these bytes for each parameter."""
    path = EXAMPLES / "layouts/new_sunway.toml"
    field = "replicated_bytes_per_parameter"
    text, found = re.subn(rf"^{field} = .*$", f"{field} = {sizes}", path.read_text(), flags=re.MULTILINE)
    assert found == 1
    return read_layout(text, str(path))


def placements(tree: Tree, held: Holdings) -> tuple[Mapping[str, Loads], Dealt]:
    """Bytes by rank, and what is planned as a save would plan it. The two in the middle let ranks write what others
    hold, and take its way to them for free."""
    dealt = Dealer(tree).deal(of_holdings(held, auto_chunk_bytes(held.bytes)))
    crowded = rivals.crowded(tree, held, SUPERNODE)
    used = len(np.unique(list(tree.edges_of_ranks())[SUPERNODE][crowded > 0]))
    loads = {
        "naive: each byte by the first rank that holds it": held.loads(rivals.first_replica(held.classes)),
        "too few writers: one a supernode": rivals.too_few(tree, held, SUPERNODE),
        f"crowded: every node of {used} supernodes": crowded,
        "every holder writes": held.loads(place(tree, held.classes, held.fixed).shares),
        "**planned by fastckpt**": dealt.written,
    }
    return loads, dealt


def table() -> str:
    tree = Topology.load(EXAMPLES / "topologies/new_sunway.toml").tree()
    states = {name: layout(sizes) for name, sizes in STATES.items()}
    heads = [f"{name}, {sum(STATES[name])} B each: {held.bytes / 1e15:.2f} PB" for name, held in states.items()]
    lines = [
        f"| 174 x 10^12 parameters, simulated | writers | supernodes | {' | '.join(heads)} | TB/s |",
        "|---|---|---|" + "---|" * (len(heads) + 1),
    ]
    supernodes = list(tree.edges_of_ranks())[SUPERNODE]
    found = [placements(tree, held) for held in states.values()]
    by_state, dealt = [loads for loads, _ in found], [each for _, each in found]
    for name in by_state[0]:
        seconds = [simulate(tree, ways[name]).makespan_seconds for ways in by_state]
        loads = by_state[-1][name]
        used = len(np.unique(supernodes[loads > 0]))
        rate = loads.sum() / seconds[-1] / 1e12
        times = " | ".join(f"{each / 60:.1f} min" for each in seconds)
        lines.append(f"| {name} | {np.count_nonzero(loads):,} | {used} | {times} | {rate:.2f} |")
    return "\n".join([*lines, "", objects(dealt), "", assumptions(tree)])


def objects(dealt: Sequence[Dealt]) -> str:
    profile = Profile()
    times = ", ".join(f"{each.objects / profile.objects_per_second / 60:.1f}" for each in dealt)
    return (
        f"Beside these minutes: {times} for making the objects of the plans, {profile.streams} a writer, at "
        f"{profile.objects_per_second:g} a second, which a storage is taken for until it is measured; twice that where "
        "every node writes."
    )


def assumptions(tree: Tree) -> str:
    rank, node, supernode, gateway, storage = (float(capacity.max()) / 1e9 for capacity in tree.capacities)
    ranks, nodes, supernodes, gateways, _ = map(len, tree.capacities)
    return (
        "A simulation (fluid flows, max-min fair; `python -m bench.headline`), not a measurement. Published: the "
        f"number of parameters; over 37 million cores, 390 a node; supernodes of {nodes // supernodes} nodes; a "
        f"network of its own for I/O. Inferred from the number of cores, not published: {nodes:,} nodes. Nothing "
        f"public says what was stored. Assumed: {rank:g} GB/s a writer, {ranks // nodes} a node; {node:g} GB/s a node, "
        f"{supernode:g} a supernode, {gateway:g} a gateway ({gateways}, each for two supernodes, as on TaihuLight), "
        f"{storage / 1000:g} TB/s of storage, which is what ten minutes for all of it take, so that only the ratios of "
        "rows say something; 24 layers with 96,000 experts each, every expert on two nodes that are far apart, what is "
        "dense on all nodes. *Too few* and *crowded* gather what other nodes hold at no cost. Were each expert on one "
        "node only, there would be next to nothing to choose, and the naive way a tenth slower than the planned."
    )
