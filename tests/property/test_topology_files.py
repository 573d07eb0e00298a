"""Host lists and topology files: what is written is read back as the same, whatever the topology."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastckpt import Topology
from fastckpt.topology.capacity import read_capacity, write_capacity
from fastckpt.topology.host_list import (
    expand,
    expand_counts,
    expand_numbers,
    fold,
    fold_counts,
    fold_numbers,
)
from fastckpt.topology.plane import RANKS_MAX

# Few letters, so that names share prefixes; zeros, so that widths differ; and what TOML must quote.
names = st.one_of(
    st.from_regex(r"[ab]{0,2}[0-9]{1,3}[x.-]?", fullmatch=True),
    st.sampled_from(['a "quoted" name', "back\\slash", "ümlaut", "a=b", "a.b", "#", "'", "7" * 30]),
)


@given(st.lists(names))
@example(["a8", "a09"])
@example(["a09", "a10", "a100"])
@example(["a1x", "a2y"])
def test_a_host_list_gives_its_names_back_in_their_order(hosts: list[str]) -> None:
    assert not hosts or expand(fold(hosts), len(hosts)) == hosts


@given(st.lists(st.integers(0, 30), min_size=1))
def test_numbers_and_counts_are_given_back_in_their_order(numbers: list[int]) -> None:
    runs = expand_numbers(fold_numbers(np.array(numbers, np.intp)), len(numbers))
    assert [number for run in runs for number in run] == numbers
    assert expand_counts(fold_counts(numbers), len(numbers)) == numbers


@given(st.text("[]-,0189a x()", max_size=20))
def test_any_text_is_a_host_list_or_a_value_error(text: str) -> None:
    try:
        found = expand(text, 1000)
    except ValueError:
        return
    assert 0 < len(found) <= 1000
    assert expand(fold(found), len(found)) == found


@given(st.one_of(st.floats(1, 1e18), st.integers(1, 10**18), st.just(math.inf)))
def test_a_capacity_is_given_back_to_the_last_bit(capacity: float) -> None:
    assert read_capacity(write_capacity(float(capacity))) == float(capacity)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Paths with one to three levels above the node, capacities of whole levels; perhaps a compute plane of its own,
    exceptions, and ranks that are counted."""
    depth = draw(st.integers(1, 3))
    levels = ("node", *draw(st.permutations(["supernode", "gateway", "rack"]))[: depth - 1])
    nodes = draw(st.lists(names, min_size=1, max_size=8, unique=True))
    paths = {node: (node,) for node in nodes}
    below = nodes
    for _ in levels[1:]:
        above = draw(st.lists(names, min_size=1, max_size=len(below), unique=True))
        parent = {edge: draw(st.sampled_from(above)) for edge in below}
        paths = {node: (*path, parent[path[-1]]) for node, path in paths.items()}
        below = sorted(set(parent.values()))
    ranks = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=20))
    carried = st.floats(1, 1e12)
    capacities = draw(st.dictionaries(st.sampled_from(["rank", *levels, "storage"]), carried))
    document = Topology.from_paths([paths[node] for node in ranks], levels=levels, capacities=capacities).to_dict()
    used = sorted(set(ranks))
    if draw(st.booleans()):
        document["node"]["capacities"] = {node: draw(carried) for node in used[: draw(st.integers(0, len(used)))]}
    if draw(st.booleans()):
        document["node"]["ranks"] = dict.fromkeys(used, draw(st.integers(1, 3)))
    if draw(st.booleans()):
        document["planes"] = {
            "compute": {
                "levels": ["rank", "node", "rail", "core"],
                "rail": {"nodes": {node: [node] for node in reversed(used)}, "capacity": draw(carried)},
            }
        }
    return Topology.parse(document)


@given(topologies())
def test_a_topology_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, topology: Topology) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert Topology.parse(topology.to_dict()) == topology
    for name in ("written.toml", "written.json"):
        topology.dump(folder / name)
        again = Topology.load(Path(folder / name))
        assert again == topology
        assert again.digest() == topology.digest()
        for plane in ("storage", "compute"):
            one, other = again.tree(plane), topology.tree(plane)
            assert one.levels == other.levels
            assert [list(labels) for labels in one.names] == [list(labels) for labels in other.names]
            assert all(map(np.array_equal, one.parents, other.parents))
            assert all(map(np.array_equal, one.capacities, other.capacities))


@given(topologies(), st.data())
def test_a_job_has_the_paths_that_the_cluster_has(topology: Topology, data: st.DataObject) -> None:
    nodes = topology.planes["storage"].names[1]
    hosts = data.draw(st.lists(st.sampled_from(list(nodes)), min_size=1, max_size=6))
    if topology.ranks_are_known or all(name.isdigit() for name in nodes):
        return
    job = topology.for_hosts(hosts)
    assert job.ranks == len(hosts)
    first_rank = {name: int(np.argmax(topology.node_of == node)) for node, name in enumerate(nodes)}
    for plane in ("storage", "compute"):
        cluster, mine = topology.tree(plane), job.tree(plane)
        ways = zip(cluster.edges_of_ranks(), mine.edges_of_ranks(), strict=True)
        for level, (there, here) in enumerate(ways):
            for rank, host in enumerate(hosts):
                edge, found = there[first_rank[host]], here[rank]
                assert mine.capacities[level][found] == cluster.capacities[level][edge]
                assert not level or mine.names[level][found] == cluster.names[level][edge]
    assert Topology.parse(job.to_dict()) == job


def test_as_many_ranks_are_possible_as_promised() -> None:
    assert Topology.parse({"node": {"count": RANKS_MAX // 8, "ranks": 8}}).ranks == RANKS_MAX
