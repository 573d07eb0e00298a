"""Topologies: what files and other sources mean, and that every wrong one is refused with its line, field or rank."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fastckpt import Topology, TopologyError
from fastckpt.topology.lines import line_of
from fastckpt.topology.offer import Given, Offer, RankPath, TopologySource, agree

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "topologies"


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., Topology]:
    def load(text: str, suffix: str = ".toml") -> Topology:
        path = tmp_path / f"cluster{suffix}"
        path.write_text(text)
        return Topology.load(path)

    return load


def ways(topology: Topology, plane: str = "storage") -> list[list[str]]:
    """The names that each rank passes, from the node upwards, without the storage."""
    tree = topology.tree(plane)
    edges = list(tree.edges_of_ranks())[1:-1]
    named = list(zip(tree.names[1:-1], edges, strict=True))
    return [[names[edge[rank]] for names, edge in named] for rank in range(topology.ranks)]


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("cluster_8_nodes", {"rank": 64, "node": 8, "storage": 1}),
        ("nvl72_row", {"rank": 576, "node": 144, "supernode": 8, "storage": 1}),
        ("skewed", {"rank": 4096, "node": 512, "supernode": 4, "gateway": 3, "storage": 1}),
        ("new_sunway", {"rank": 96_000, "node": 96_000, "supernode": 375, "gateway": 188, "storage": 1}),
    ],
)
def test_an_example_has_the_size_that_it_says(name: str, counts: dict[str, int]) -> None:
    topology = Topology.load(EXAMPLES / f"{name}.toml")
    tree = topology.tree()
    assert dict(zip(tree.levels, map(len, tree.capacities), strict=True)) == counts
    assert topology.ranks == counts["rank"]
    assert Topology.parse(topology.to_dict()) == topology
    text = (EXAMPLES / f"{name}.toml").read_text()
    assert len(text.splitlines()) < 50


def test_no_example_is_left_untested() -> None:
    tested = {"cluster_8_nodes", "nvl72_row", "skewed", "new_sunway"}
    assert {path.stem for path in EXAMPLES.iterdir()} == tested


def test_capacities_are_of_a_level_except_where_an_edge_has_its_own() -> None:
    tree = Topology.load(EXAMPLES / "skewed.toml").tree()
    carried = [dict(zip(names, values, strict=True)) for names, values in zip(tree.names, tree.capacities, strict=True)]
    assert set(carried[0].values()) == {2e9}
    assert carried[1]["node a001"] == 25e9
    assert carried[1]["node c08"] == 100e9 / 8
    assert carried[2] == {
        "supernode row-a": 4e11,
        "supernode row-b": 4e11,
        "supernode row-c": 1e11,
        "supernode row-d": 1e11,
    }
    assert carried[3] == {"gateway old": 6e11, "gateway a": 6e11, "gateway b": 6e11}
    assert carried[4] == {"storage": 1e12}


def test_a_level_that_says_nothing_of_its_capacity_has_no_known_limit() -> None:
    tree = Topology.parse({"node": {"count": 2, "ranks": 1}}).tree()
    assert all((capacities == math.inf).all() for capacities in tree.capacities)


NODES_OF_RANKS: list[tuple[dict[str, Any], list[str]]] = [
    ({"names": "a,b", "ranks": 2}, ["a", "a", "b", "b"]),
    ({"names": ["a", "b"], "ranks": "1,3"}, ["a", "b", "b", "b"]),
    ({"names": "a,b,c", "ranks": "1(x2),2"}, ["a", "b", "c", "c"]),
    ({"count": 2, "ranks": [3, 1]}, ["0", "0", "0", "1"]),
    ({"ranks": {"b": 3, "a": 1}}, ["b", "b", "b", "a"]),
    ({"names": "a,b", "ranks": {"b": 3, "a": 1}}, ["b", "b", "b", "a"]),
    ({"ranks": {"b": "0,2-3", "a": [1]}}, ["b", "a", "b", "b"]),
]


@pytest.mark.parametrize(("node", "nodes"), NODES_OF_RANKS)
def test_ranks_are_on_the_nodes_that_a_file_says(node: dict[str, Any], nodes: list[str]) -> None:
    assert ways(Topology.parse({"node": node})) == [[f"node {name}"] for name in nodes]


def test_what_a_level_holds_may_stand_for_the_names_of_the_level_below() -> None:
    document = {"node": {"ranks": 1}, "supernode": {"nodes": {"s": "a[1-2]", "t": "b1"}}}
    found = ways(Topology.parse(document))
    assert found == [["node a1", "supernode s"], ["node a2", "supernode s"], ["node b1", "supernode t"]]


def test_counted_edges_are_listed_by_their_numbers() -> None:
    document = {
        "node": {"ranks": 1},
        "supernode": {"count": 3, "nodes": 1, "capacities": {"0,2": 5}},
        "gateway": {"supernodes": {"g": "0,2", "h": "1"}},
    }
    topology = Topology.parse(document)
    assert [way[-1] for way in ways(topology)] == ["gateway g", "gateway h", "gateway g"]
    assert topology.tree().capacities[2].tolist() == [5, math.inf, 5]


def test_a_plane_of_its_own_has_other_levels_above_the_same_nodes() -> None:
    document = {
        "node": {"names": "a,b", "ranks": 1, "capacity": 5},
        "planes": {"compute": {"levels": ["rank", "node", "rail", "core"], "rail": {"nodes": {"x": "b", "y": "a"}}}},
    }
    topology = Topology.parse(document)
    assert ways(topology) == [["node a"], ["node b"]]
    assert ways(topology, "compute") == [["node a", "rail y"], ["node b", "rail x"]]
    assert topology.tree("compute").capacities[1].tolist() == [math.inf, math.inf]


def test_a_plane_that_says_only_capacities_has_the_edges_of_the_storage() -> None:
    document = {
        "node": {"ranks": 1},
        "supernode": {"nodes": {"s": "a", "t": "b"}},
        "planes": {"compute": {"supernode": {"capacities": {"t": 7}}}},
    }
    topology = Topology.parse(document)
    assert ways(topology, "compute") == ways(topology)
    assert topology.tree("compute").capacities[2].tolist() == [math.inf, 7]
    assert topology.tree().capacities[2].tolist() == [math.inf, math.inf]


def test_a_plane_may_have_other_nodes_below_edges_of_the_same_names() -> None:
    document = {
        "node": {"ranks": 1},
        "supernode": {"nodes": {"s": "a", "t": "b"}},
        "planes": {"compute": {"supernode": {"nodes": {"s": "b", "t": "a"}}}},
    }
    topology = Topology.parse(document)
    assert ways(topology, "compute") == [["node a", "supernode t"], ["node b", "supernode s"]]
    assert Topology.parse(topology.to_dict()) == topology


def test_a_plane_that_is_not_described_is_that_of_the_storage() -> None:
    topology = Topology.from_hosts(["a", "b"])
    assert ways(topology, "compute") == ways(topology)
    with pytest.raises(ValueError, match="no plane is called 'comptue'"):
        topology.tree("comptue")


def test_a_topology_does_not_change() -> None:
    tree = Topology.from_hosts(["a", "b"]).tree()
    for array in (*tree.parents, *tree.capacities):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_topologies_are_equal_if_and_only_if_their_digests_are() -> None:
    document: dict[str, Any] = {"node": {"names": "a[1-4]", "ranks": 2}, "supernode": {"nodes": 2}}
    one = Topology.parse(document)
    assert one == Topology.parse(document)
    assert one.digest() == Topology.parse(document).digest()
    for section, field, value in [
        ("node", "names", "a[1-3],b"),
        ("node", "ranks", 1),
        ("node", "ranks", {"a1": "0-1", "a2": "2-3", "a3": "4-5", "a4": "6-7"}),
        ("node", "capacity", 5),
        ("supernode", "nodes", 4),
        ("supernode", "capacity", 5),
        ("rank", "capacity", 5),
    ]:
        other = Topology.parse({**document, section: {**document.get(section, {}), field: value}})
        assert other != one
        assert other.digest() != one.digest()


# --- wrong files ---------------------------------------------------------------------------------------------------

NODE = "[node]\nnames = 'a[0-3]'\nranks = 1\n"
WRONG: list[tuple[str, str]] = [
    ("", "the topology is empty"),
    ("[node]\nranks = 8", "1: node: says neither which nodes there are nor how many"),
    ("node = 3", "1: node: is a number; it must be a table"),
    ("[node]\ncount = 4\nrank = 8", "3: node.rank: no field is called so: did you mean 'ranks'?"),
    ("[nodes]\ncount = 2", "1: nodes: no level is called so: did you mean 'node'?"),
    ("\nlevels = ['rank', 'node',\n 'node', 'storage']", "3: levels.2: 'node' is listed twice"),
    ("levels = ['node', 'storage']", "1: levels: must begin with rank and node"),
    ("levels = ['rank', 'node', 'Rack!', 'storage']", "1: levels.2: 'Rack!' cannot be a level's name"),
    ("levels = ['rank', 'node', 'rack', 'storage']\n" + NODE + "[rock]\nnodes = 2", "5: rock: .* did you mean 'rack'?"),
    (NODE + "capacity = 0", "4: node.capacity: 0 is not a capacity"),
    (NODE + "capacity = -3.5", "4: node.capacity: -3.5 is not a capacity"),
    (NODE + "capacity = nan", "4: node.capacity: nan is not a capacity"),
    (NODE + "capacity = true", "4: node.capacity: True is not a capacity: write bytes per second"),
    (NODE + "capacity = 1e300", "4: node.capacity: 1e[+]300 is not a capacity"),
    (NODE + "capacity = 1" + "0" * 400, "4: node.capacity: a number beyond"),
    (NODE + "capacity = 'fast'", "4: node.capacity: 'fast' is not a capacity"),
    (NODE + "capacity = '0 GB/s'", "4: node.capacity: '0 GB/s' is not a capacity"),
    (NODE + "capacity = '25 gb/s'", "4: node.capacity: the unit 'gb/s' is unknown: did you mean 'GB/s' or 'Gb/s'?"),
    (NODE + "[node.capacities]\n'a[3-4]' = 5", "5: .*: node 'a4' is unknown: known are a0, a1, a2, a3"),
    (NODE + "[node.capacities]\n'a[2-3]' = 5\n'a3' = 5", "6: node.capacities.a3: node a3 has two capacities"),
    (NODE + "[rank.capacities]\n0 = 5", "4: rank.capacities: ranks are only counted here"),
    ("[node]\ncount = 99999999999\nranks = 1", "2: node.count: more than 10000000"),
    ("[node]\ncount = 5000000\nranks = 5", "3: node.ranks: more than 10000000"),
    ("[node]\nnames = 'a[0-99999999]'\nranks = 1", "2: node.names: .* is 100000000 names"),
    ("[node]\nnames = 'a'\nranks = '1(x99999999)'", "3: node.ranks: .* more than the 10000000 numbers"),
    ("[node.ranks]\na = '0-99999999'", "2: node.ranks.a: .* is 100000000 numbers"),
    ("[node]\nnames = 'a[0-3],a2'\nranks = 1", "2: node.names: node 'a2' is named twice"),
    ("[node]\nnames = 'a['\nranks = 1", r"2: node.names: '\[' in 'a\[' has no counterpart"),
    ("[node]\nnames = 'a[3-1]'\nranks = 1", "2: node.names: '3-1' in .* runs backwards"),
    ("[node]\nnames = ''\nranks = 1", "2: node.names: a name is empty"),
    ("[node]\nnames = []\nranks = 1", "2: node.names: is empty"),
    ("[node]\nnames = 3\nranks = 1", "2: node.names: is a number; it must be a host list"),
    ("[node]\nnames = 'a'\nranks = 0", "3: node.ranks: is 0"),
    ("[node]\nnames = 'a'\nranks = -2", "3: node.ranks: is -2"),
    ("[node]\nnames = 'a'\nranks = 2.5", "3: node.ranks: is a fraction"),
    ("[node]\nnames = 'a'\nranks = true", "3: node.ranks: is true or false"),
    ("[node]\nnames = 'a'\nranks = [1,\n'x']", "4: node.ranks.1: is a text"),
    ("[node]\nnames = 'a,b'\nranks = [1, 1, 1]", "3: node.ranks: says that there are 3 nodes, but node.names has 2"),
    ("[node]\nnames = 'a,b'\ncount = 3\nranks = 1", "3: node.count: says that there are 3 nodes, but node.names has 2"),
    ("[node.ranks]", "1: node.ranks: is empty"),
    ("[node.ranks]\na = '0-3'\nb = '3-5'", "3: node.ranks.b: rank 3 is listed twice: a has it already"),
    ("[node.ranks]\na = '0-3'\nb = '5-6'", "3: node.ranks.b: rank 6 is unknown, since rank 4 is missing"),
    ("[node.ranks]\na = [0, 1]\nb = 4", "3: node.ranks.b: is a number, where others say which ranks"),
    ("[node.ranks]\na = [-1, 0]", "2: node.ranks.a.0: is -1; it must be a list of numbers from 0"),
    ("[node.ranks]\na = ''", "2: node.ranks.a: '' in '' is neither a number nor a range"),
    (
        NODE + "[supernode.nodes]\ns = 'a[0-1]'\nt = 'a[2-4]'",
        "6: supernode.nodes.t: node 'a4' is unknown to node.names",
    ),
    (NODE + "[supernode.nodes]\ns = 'a[0-1]'\nt = 'a2'", "4: supernode.nodes: node 'a3' of node.names is missing"),
    (NODE + "[supernode.nodes]\ns = 'a[0-1]'\nt = 'a[1-3]'", "6: supernode.nodes.t: node 'a1' is named twice"),
    (
        "[node]\ncount = 3\nranks = 1\n[supernode.nodes]\na = '0-1'\nb = '1'",
        "6: supernode.nodes.b: node 1 is listed twice: a has it already",
    ),
    ("[node]\ncount = 3\nranks = 1\n[supernode.nodes]\na = '0-1'\nb = '3'", "6: .*: node 3 is unknown"),
    (
        "[node]\ncount = 4\nranks = 1\n[supernode.nodes]\na = '0-1'\nb = '1-3'",
        "6: supernode.nodes.b: node 1 is listed twice",
    ),
    (
        "[node]\ncount = 4\nranks = 1\n[supernode.nodes]\na = '1-3'\nb = '0-1'",
        "6: .*: node 1 is listed twice: a has it",
    ),
    (
        "[node]\ncount = 4\nranks = 1\n[supernode.nodes]\na = '0-3'\nb = '9'\nc = '2'",
        "7: .*: node 2 is listed twice: a",
    ),
    ("[node]\ncount = 2\ncount = 3\nranks = 1", "3: node.count: is a second time in the same table"),
    ("[node]\ncount = 2\nranks = 1\nranks = 2", "4: node.ranks: is a second time in the same table"),
    ("node = {count = 2, ranks = 1, count = 2}", "1: node.count: is a second time in the same table"),
    ("node.count = 2\nnode.ranks = 1\nnode.count = 2]", "3: node.count: is a second time in the same table"),
    (NODE + "[node] # again\ncount = 2", "4: node: is a second time in the same table"),
    (NODE + "[node.ranks]\na = 1", "4: node.ranks: is a second time in the same table"),
    (NODE + "names.x = 1", "is not TOML: Cannot overwrite a value"),
    (NODE + "[supernode.nodes]\ns = 'a[0-3]'\nt = []", "6: supernode.nodes.t: holds no node"),
    (NODE + "[supernode]\nnodes = 3", "5: supernode.nodes: 2 supernodes hold 6 nodes in all, but there are 4"),
    (NODE + "[supernode]\ncapacity = 3", "4: supernode.nodes: is missing: say how many nodes each holds"),
    (NODE + "[planes.storage]", "4: planes.storage: the plane of the storage is what the top"),
    (NODE + "[planes.computer]", "4: planes.computer: no plane is called so: did you mean 'compute'?"),
    (NODE + "[planes.compute.node]\nnames = 'a'", "5: planes.compute.node.names: no field is called so"),
    (NODE + "[planes.compute.planes]\nx = 1", "4: planes.compute.planes: no level is called so"),
    ("x = \n", ".*is not TOML: .*line 1"),
    ("a = " + "[" * 3000 + "]" * 3000, ".*nested too deeply"),
    ("[node]\nranks = " + "9" * 5000, ".*is not TOML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_file_is_refused_with_its_line_and_field(
    loaded: Callable[..., Topology], text: str, message: str
) -> None:
    with pytest.raises(TopologyError, match=message) as caught:
        loaded(text)
    assert "cluster.toml" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"node": {"count": 1,\n "ranks": 1,\n "count": 2}}', "3: node.count: is a second time"),
        ('{"node": {"ranks": {"a": "0",\n "b": "1",\n "b": "2"}}}', "3: node.ranks.b: is a second time"),
        ('{"node":\n{"count": 2, \n"ranks": null}}', "3: node.ranks: is nothing"),
        ('{"node": {"count": 2, "ranks": 1,\n"capacity": NaN}}', "2: node.capacity: nan is not a capacity"),
        ("[]", "1: is a list; it must be a table"),
        ("{", "is not JSON: .*line 1"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_json_is_refused_with_its_line_and_field(
    loaded: Callable[..., Topology], text: str, message: str
) -> None:
    with pytest.raises(TopologyError, match=message):
        loaded(text, ".json")


def test_a_dict_is_refused_with_its_field() -> None:
    with pytest.raises(TopologyError, match=r"^node\.capacity: -1 is not a capacity"):
        Topology.parse({"node": {"count": 1, "ranks": 1, "capacity": -1}})


def test_what_cannot_be_read_is_refused_with_its_path(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"# a comment\n\xff")
    fifo = tmp_path / "fifo.toml"
    os.mkfifo(fifo)
    folder = tmp_path / "folder.json"
    folder.mkdir()
    for path, message in [
        (binary, "binary.toml:2: is not UTF-8"),
        (fifo, "fifo.toml: is not a file"),
        (folder, "folder.json: cannot be read: Is a directory"),
        (tmp_path / "none.toml", "none.toml: cannot be read: No such file"),
        (tmp_path / "cluster.yaml", "cluster.yaml: a topology is a .toml or a .json file"),
    ]:
        with pytest.raises(TopologyError, match=message):
            Topology.load(path)


LINES = '''# names = 1
levels = ["rank",   # ]
  "node"]
[node]
names = "cn[1-8] # = no"
"ranks" = {a = 1, b = [1,
 2.5, {c = """
names = 3
"""}]}
when = 1979-05-27T07:32:00
[planes . compute]
node.capacity = -1
text = \'\'\'[x]
\'\'\'
last = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("levels", 1), 3),
        (("node",), 4),
        (("node", "names"), 5),
        (("node", "ranks", "b", 0), 6),
        (("node", "ranks", "b", 1), 7),
        (("node", "ranks", "b", 2, "c"), 7),
        (("node", "when"), 10),
        (("planes", "compute", "node", "capacity"), 12),
        (("planes", "compute", "text"), 13),
        (("planes", "compute", "last"), 15),
        (("planes", "compute", "no such"), 11),
        (("x",), 1),
    ],
)
def test_the_line_of_a_value_is_found_whatever_stands_before_it(path: tuple[str | int, ...], line: int) -> None:
    assert line_of(LINES, path) == line


# --- the hosts of a job --------------------------------------------------------------------------------------------


def test_a_job_gets_the_nodes_that_its_ranks_run_on_in_whatever_order() -> None:
    cluster = Topology.load(EXAMPLES / "skewed.toml")
    job = cluster.for_hosts(["c02", "a001", "c02", "b003"])
    assert ways(job) == [
        ["node c02", "supernode row-c", "gateway old"],
        ["node a001", "supernode row-a", "gateway a"],
        ["node c02", "supernode row-c", "gateway old"],
        ["node b003", "supernode row-b", "gateway b"],
    ]
    tree = job.tree()
    assert [len(names) for names in tree.names] == [4, 3, 3, 3, 1]
    assert dict(zip(tree.names[1], tree.capacities[1], strict=True))["node c02"] == 12.5e9
    assert job.node_of.tolist() == [2, 0, 2, 1]


def test_a_host_is_found_with_and_without_its_domain() -> None:
    cluster = Topology.parse({"node": {"names": "a.x,b,10.0.0.1,10.0.0.2", "ranks": 1}})
    job = cluster.for_hosts(["a", "b.y", "10.0.0.2"])
    assert ways(job) == [["node a.x"], ["node b"], ["node 10.0.0.2"]]
    for host in ("a.y", "10", "10.0.0.3"):
        with pytest.raises(TopologyError, match="has no node"):
            cluster.for_hosts([host])
    with pytest.raises(TopologyError, match="has no node '10'"):
        Topology.parse({"node": {"names": "10.0.0.1", "ranks": 1}}).for_hosts(["10"])
    with pytest.raises(TopologyError, match=r"one node for the hosts .* give both their domains"):
        cluster.for_hosts(["b.x", "b.y"])


def test_a_host_that_is_in_no_file_is_named_with_its_rank_and_what_is_like_it() -> None:
    cluster = Topology.load(EXAMPLES / "cluster_8_nodes.toml")
    message = r"cluster_8_nodes.toml has no node 'gpu1', on which rank 1 runs \(and 1 more .*\): did you mean 'gpu01'\?"
    with pytest.raises(TopologyError, match=message):
        cluster.for_hosts(["gpu01", "gpu1", "gpu1", "login"])


def test_a_file_that_only_counts_its_nodes_has_no_hosts() -> None:
    with pytest.raises(TopologyError, match="only counts its nodes"):
        Topology.parse({"node": {"count": 2, "ranks": 1}}).for_hosts(["a"])


def test_ranks_that_a_file_places_are_believed_and_must_be_those_of_the_job() -> None:
    topology = Topology.parse({"node": {"ranks": {"x": "0,2", "y": "1"}}})
    assert topology.for_hosts(["a", "b", "c"]) is topology
    with pytest.raises(TopologyError, match="misses ranks 3 to 4: of ranks, the job has 5 and the topology 3"):
        topology.for_hosts(["a"] * 5)
    with pytest.raises(TopologyError, match="has rank 2, which the job has not"):
        topology.for_hosts(["a"] * 2)


# --- other sources -------------------------------------------------------------------------------------------------


def test_of_hosts_alone_there_is_one_supernode() -> None:
    topology = Topology.from_hosts(["b", "a", "b"])
    assert ways(topology) == [[f"node {host}", "supernode all"] for host in ("b", "a", "b")]


def test_paths_make_the_tree_and_a_level_has_the_capacity_given_for_it() -> None:
    paths = [("n0", "r0", "z0"), ("n1", "r1", "z0"), ("n0", "r0", "z0"), ("n2", "r2", "z1")]
    levels = ("node", "rack", "zone")
    topology = Topology.from_paths(paths, levels=levels, capacities={"rack": "8 Gb/s", "storage": 5})
    labels = [[f"{level} {name}" for level, name in zip(levels, path, strict=True)] for path in paths]
    assert ways(topology) == labels
    assert [set(values.tolist()) for values in topology.tree().capacities] == [
        {math.inf},
        {math.inf},
        {1e9},
        {math.inf},
        {5.0},
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Topology.from_hosts([]), "0 ranks cannot be"),
        (lambda: Topology.from_hosts(["a", ""]), "the path of rank 1: node: a name is empty"),
        (lambda: Topology.from_paths([("a", "r"), "ab"]), "the path of rank 1 is 'ab'; it must be a list of names"),
        (lambda: Topology.from_paths([("a", "r"), ("b",)]), "the path of rank 1 is .* one for each of node, supernode"),
        (lambda: Topology.from_paths([("a", "r"), None]), "the path of rank 1 is None; it must be a list"),  # type: ignore[list-item]
        (lambda: Topology.from_paths([("a", 3)]), r"the path of rank 0 is \['a', 3\]"),  # type: ignore[list-item]
        (lambda: Topology.from_paths([("a", "r\n")]), "the path of rank 0: supernode: the name .* contains"),
        (lambda: Topology.from_paths("ab"), "paths are 'ab'; they must be a list with one for each rank"),
        (lambda: Topology.from_paths(None), "paths are None"),  # type: ignore[arg-type]
        (lambda: Topology.from_hosts("ab"), "hosts are 'ab'; they must be a list with one for each rank"),
        (lambda: Topology.from_paths([("a", "r")], capacities=[1]), r"capacities are \[1\]: give a dict"),  # type: ignore[arg-type]
        (lambda: Topology.from_paths([("a", "r")], capacities={3: 1}), "no level 3: known are rank, node"),  # type: ignore[dict-item]
        (lambda: Topology.from_paths([("a",)], levels="node"), "levels are 'node': they must be a list"),
        (lambda: Topology.from_paths([("a", "b")], levels=("node", 3)), r"levels are \['node', 3\]"),  # type: ignore[arg-type]
        (lambda: Topology.from_paths([()], levels=()), "must begin with node"),
        (lambda: Topology.from_paths([("a", "b")], levels=("node", "rank")), "nor rank or storage"),
        (lambda: Topology.from_paths([("a", "b")], levels=("node", "Super Node!\n")), "levels: .* cannot be a level's"),
        (lambda: Topology.from_paths([], levels=["node", *map("s{}".format, range(14))]), "17, more than 16"),
        (
            lambda: Topology.from_paths([("a", "r"), ("a", "s")]),
            "node 'a' lies below supernode 'r' .* rank 0, .* rank 1",
        ),
        (lambda: Topology.from_paths([("a",)], levels=("rack",)), "must begin with node"),
        (lambda: Topology.from_paths([("a", "b")], levels=("node", "node")), "have no name twice"),
        (lambda: Topology.from_paths([("a", "r")], capacities={"nod": 3}), "no level 'nod': did you mean 'node'"),
        (lambda: Topology.from_paths([("a", "r")], capacities={"node": 0}), "capacities: node: 0 is not a capacity"),
    ],
)
def test_wrong_paths_are_refused_with_their_rank(make: Callable[[], Topology], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        make()


CONF = """
# a comment
SwitchName=s0 Nodes=n[0-3] LinkSpeed=3   # more
SwitchName=s1 \\
   Nodes=n[4-5]
switchname=s2 switches=s[0-1]
SwitchName=s3 Nodes=m[0-1]
"""


def test_switches_of_slurm_are_levels_of_one_height() -> None:
    topology = Topology.from_slurm(CONF, ranks_per_node=2, capacities={"supernode": 7})
    assert topology.ranks == 16
    assert topology.tree().levels == ("rank", "node", "supernode", "switch2", "storage")
    assert set(topology.tree().capacities[2].tolist()) == {7.0}
    job = topology.for_hosts(["n5", "m1", "n0"])
    assert ways(job) == [
        ["node n5", "supernode s1", "switch2 s2"],
        ["node m1", "supernode s3", "switch2 s3"],
        ["node n0", "supernode s0", "switch2 s2"],
    ]


def test_what_scontrol_prints_is_read_as_well() -> None:
    printed = (
        "SwitchName=s0 Level=0 LinkSpeed=1 Nodes=a[0-1]\n"
        "SwitchName=s4 Level=1 LinkSpeed=1 Nodes=a[0-3] Switches=s[0,5]\n"
        "SwitchName=s5 Level=0 LinkSpeed=1 Nodes=a[2-3]\n"
    )
    assert [way[1:] for way in ways(Topology.from_slurm(printed))] == [["supernode s0", "switch2 s4"]] * 2 + [
        ["supernode s5", "switch2 s4"]
    ] * 2
    blocks = "BlockName=b0 Nodes=a[0-1]\nBlockName=b1 Nodes=a[2-3]\nBlockSizes=2,4\n"
    assert [way[1] for way in ways(Topology.from_slurm(blocks))] == ["supernode b0"] * 2 + ["supernode b1"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "topology.conf: no switch and no block is described"),
        ("hello", "topology.conf:1: 'hello' is not of the form key=value"),
        ("\nRingName=r Nodes=x", "topology.conf:2: neither SwitchName= nor BlockName="),
        ("SwitchName=a Nodes=x1, x2", "topology.conf:1: 'x2' is not of the form key=value, without spaces in lists"),
        ("SwitchName=a Nodes=x1,\\\n x2", "topology.conf:1: 'x2' is not of the form key=value"),
        (
            "SwitchName=a Nodes=x\nInclude other.conf",
            "topology.conf:2: another file is included, .* put its lines here",
        ),
        ("SwitchName=a Nodes=(null)\nSwitchName=DEFAULT LinkSpeed=3", "no switch and no block has nodes"),
        ("SwitchName=a Nods=x", "topology.conf:1: 'a' has neither Nodes= nor Switches="),
        ("SwitchName=a Nodes=x[", "topology.conf:1: .* has no counterpart"),
        ("SwitchName=a Nodes=x[0-99999999999]", "topology.conf:1: .* names; at most"),
        ("SwitchName=a Nodes=x\n\nSwitchName=a Nodes=y", "topology.conf:3: 'a' is described a second time"),
        (
            "SwitchName=a Nodes=x[0-3]\nSwitchName=b Nodes=x[3-4]",
            "topology.conf:2: node 'x3' is below 'b' and below 'a'",
        ),
        ("SwitchName=a Switches=q", "topology.conf:1: switch 'a' is above a switch 'q', which no line describes"),
        ("SwitchName=a Switches=b\nSwitchName=b Switches=a\nSwitchName=c Nodes=x", "in a circle: a -> b -> a"),
        ("SwitchName=a Switches=a", "topology.conf:1: .* in a circle: a -> a"),
        (
            "SwitchName=a Nodes=x\nSwitchName=b Switches=a\nSwitchName=c Switches=a",
            "topology.conf:3: switch 'a' is below 'c' and below 'b'",
        ),
    ],
)
def test_a_wrong_topology_conf_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        Topology.from_slurm(text)


@pytest.mark.parametrize(
    "text",
    [
        "SwitchName=s Nodes=n[1-2],\\\nn3",
        "SwitchName=s Nodes=n[1-2],\\  \nn3\n",
        "SwitchName=s Nodes=n[1-2] # n9\\\nSwitchName=t Nodes=n3",
        'SwitchName = s Nodes = "n[1-3]"',
        "SwitchName=s Level=0 LinkSpeed=1 Nodes=n[1-3] Switches=",
        "SwitchName=s Nodes=n[1-3] Switches=(null)\nSwitchName=e Level=0 Nodes= LinkSpeed=1\nSwitchName=f Nodes=(null)",
        "SwitchName=DEFAULT LinkSpeed=2\nSwitchName=s Nodes=n[1-3]\nSwitchName=up Switches=DEFAULT",
    ],
)
def test_a_topology_conf_is_read_as_slurm_reads_it(text: str) -> None:
    topology = Topology.from_slurm(text)
    assert topology.tree().levels == ("rank", "node", "supernode", "storage")
    assert [way[0] for way in ways(topology)] == ["node n1", "node n2", "node n3"]


def test_a_topology_conf_has_no_more_ranks_than_a_topology() -> None:
    text = "SwitchName=s Nodes=n[1-2]"
    assert Topology.from_slurm(text, ranks_per_node=5 * 10**6).ranks == 10**7
    with pytest.raises(TopologyError, match="2 nodes of 5000001 ranks each are more than 10000000 ranks"):
        Topology.from_slurm(text, ranks_per_node=5 * 10**6 + 1)
    for wrong in (0, -1, 10**9, 1.5, True, "8"):
        with pytest.raises(ValueError, match="ranks_per_node is"):
            Topology.from_slurm(text, ranks_per_node=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="read the file first"):
        Topology.from_slurm(EXAMPLES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("address", "pattern", "path"),
    [
        ("s9.s1.n1", "switch.switch.node", ("n1", "s1", "s9")),
        ("s9.s1.n1.site.org", "switch.switch.node", ("n1.site.org", "s1", "s9")),
        ("s9..n1", "switch.switch.node", ("n1", "s9", "s9")),
        ("s[1-2].s1.n1", "switch.switch.node", ("n1", "s1", "s(1-2)")),
        ("s[0-3,7],t.n1", "switch.node", ("n1", "s(0-3+7)+t")),
        ("b3.n1", "block.node", ("n1", "b3")),
        ("t:0:1:2.n1", "torus:x:y:z.node", ("n1",)),
        ("n1", "node", ("n1",)),
    ],
)
def test_the_address_that_slurm_sets_is_a_path(address: str, pattern: str, path: tuple[str, ...]) -> None:
    environment = {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}
    assert RankPath.from_slurm(environment).path == path


def test_without_an_address_of_slurm_there_is_a_reason_and_a_remedy() -> None:
    with pytest.raises(TopologyError, match=r"SLURM_TOPOLOGY_ADDR is not set: .* srun"):
        RankPath.from_slurm({})
    with pytest.raises(TopologyError, match=r"'x', which is not of the form 'switch\.node'"):
        RankPath.from_slurm({"SLURM_TOPOLOGY_ADDR": "x", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node"})


# --- agreement -----------------------------------------------------------------------------------------------------


def sent(given: TopologySource, host: str) -> Offer:
    """An offer as it arrives."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(Given(given).offer(host)), type=Offer)


def test_ranks_that_were_given_one_topology_get_that_of_their_hosts() -> None:
    cluster = Topology.load(EXAMPLES / "skewed.toml")
    hosts = ["d01", "a001", "d01"]
    assert agree([sent(cluster, host) for host in hosts], cluster, range(len(hosts))) == cluster.for_hosts(hosts)


def test_ranks_that_know_their_own_paths_get_the_tree_of_all() -> None:
    capacities = {"supernode": "3 GB/s"}
    paths = [RankPath.of(node, rack, capacities=capacities) for node, rack in [("a", "x"), ("b", "x"), ("c", "y")]]
    expected = Topology.from_paths([path.path for path in paths], capacities=capacities)
    assert agree([sent(path, path.path[0]) for path in paths], paths[0], range(len(paths))) == expected


def test_ranks_that_know_nothing_get_the_tree_of_their_hosts() -> None:
    assert agree([sent(None, host) for host in "aab"], None, [0, 0, 1]) == Topology.from_hosts(["0", "0", "1"])


def test_an_offer_is_small_whatever_the_topology() -> None:
    assert len(msgspec.msgpack.encode(Given(Topology.load(EXAMPLES / "new_sunway.toml")).offer("a"))) < 200


def test_ranks_that_disagree_are_named_with_the_field() -> None:
    document = Topology.load(EXAMPLES / "cluster_8_nodes.toml").to_dict()
    one = Topology.parse(document)
    other = Topology.parse({**document, "storage": {"capacity": 5}})
    supernodes = Topology.load(EXAMPLES / "skewed.toml")
    path = RankPath.of("a", "r")
    for given, message in [
        (
            [one, other, one, other],
            "from that of ranks 0, 2, that of ranks 1, 3 differs in storage: capacities of level storage",
        ),
        ([one, one, supernodes], "from that of ranks 0-1, that of rank 2 differs in levels or planes"),
        ([one, None, path], "rank 0: a topology, rank 1: nothing, rank 2: a path of their own"),
        ([path, RankPath.of("b", levels=("node",))], "levels .* differ: rank 0: node, supernode, rank 1: node"),
        ([path, RankPath.of("b", "r", capacities={"node": 5})], "capacities .* differ: rank 0: none, rank 1: node 5"),
        ([path, RankPath.of("b")], r"rank 1: the path is \['b'\]; .* one for each of node, supernode"),
        ([path, RankPath.of("a", "s")], "node 'a' lies below supernode 'r' by the path of rank 0, .* of rank 1"),
    ]:
        with pytest.raises(TopologyError, match=message):
            agree([sent(each, "gpu01") for each in given], given[0], range(len(given)))


def test_switches_side_by_side_are_one_edge_that_a_file_can_name() -> None:
    pattern = {"SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}
    addresses = ["s[0-3,7].s9.n1", "s[0-3,7].s9.n2", "s5.s8.n3"]
    paths = [RankPath.from_slurm({"SLURM_TOPOLOGY_ADDR": address, **pattern}) for address in addresses]
    topology = agree([sent(path, "host") for path in paths], paths[0], range(3))
    assert [way[2] for way in ways(topology)] == ["switch2 s(0-3+7)", "switch2 s(0-3+7)", "switch2 s5"]
    assert Topology.parse(topology.to_dict()) == topology


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def raising(error: BaseException) -> TopologySource:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("cluster.toml", r"topology='cluster.toml' is not a fastckpt.Topology, .*; Topology.load reads a file"),
        ("x" * 10**6, "topology='x{56}[.][.][.] is not a"),
        (3, "topology=3 is not a fastckpt.Topology, a fastckpt.RankPath or None"),
        (object(), "topology=an object is not"),
        (lambda: ["a", "b"], r"the function given as topology returned \['a', 'b'\], which is not"),
        (lambda one: None, "the function given as topology raised TypeError: .* missing 1 required"),
        (
            raising(ValueError("no rack of \ud800")),
            r"the function given as topology raised ValueError: no rack of \\ud800",
        ),
        (
            raising(TopologyError("cn1 is unknown")),
            "the function given as topology raised TopologyError: cn1 is unknown",
        ),
        (raising(Odd()), "the function given as topology raised Odd"),
        (raising(SystemExit(3)), "the function given as topology raised SystemExit: 3"),
        (raising(ValueError("x" * 10**6)), "the function given as topology raised ValueError: x{400,500}[.][.][.]"),
        (RankPath.of(), r"the path is \[\]; it must be a list of names, one for each of node, supernode"),
        (RankPath.of(3, 4), r"the path is \[3, 4\]; it must be"),  # type: ignore[arg-type]
        (RankPath.of(None, "a"), r"the path is \[None, 'a'\]; it must be"),  # type: ignore[arg-type]
        (RankPath.of(["a", "b"]), r"the path is \[a list\]; it must be"),  # type: ignore[arg-type]
        (RankPath.of("a\ud800", "b"), r"the path: node: the name 'a\\ud800' contains '\\ud800'"),
        (lambda: RankPath.of("a", "[b"), r"the path: supernode: the name '\[b' contains '\['"),
        (lambda: RankPath.of("a", "b", levels="node"), "the function .* raised TopologyError: levels are 'node'"),
        (RankPath("ab"), "the path is 'ab'; it must be"),  # type: ignore[arg-type]
        (RankPath(("a", "b"), ("node", "B!")), "levels: 'B!' cannot be"),
        (RankPath(("a", "b"), capacities=(("node", -5.0),)), "capacities: node: -5.0 is not a capacity"),
        (RankPath(("a", "b"), capacities=(("nodes", 5.0),)), "capacities: there is no level 'nodes'"),
        (RankPath(("a", "b"), capacities=(3,)), "the topology cannot be used: TypeError: "),  # type: ignore[arg-type]
        (Topology(None, True), "the topology cannot be used: AttributeError: "),
    ],
)
def test_what_is_wrong_on_one_rank_is_said_with_the_rank(given: Any, problem: str) -> None:
    path = RankPath.of("a", "b")
    with pytest.raises(TopologyError, match=f"^rank 1: {problem}") as caught:
        agree([sent(path, "h"), sent(given, "h"), sent(path, "h")], path, [0, 1, 2])
    assert len(str(caught.value)) < 600


def test_ranks_with_one_problem_are_told_together_and_of_many_problems_some() -> None:
    offers = [sent(raising(ValueError(str(rank // 2))), "h") for rank in range(40)]
    with pytest.raises(TopologyError) as caught:
        agree(offers, None, range(40))
    lines = str(caught.value).split("; ")
    assert lines[1] == "ranks 2-3: the function given as topology raised ValueError: 1"
    assert lines[8:] == ["and 12 more"]


def test_a_function_is_called_once_and_what_it_gives_is_as_if_it_were_given() -> None:
    calls = []
    path = RankPath.of("a", "b", capacities={"node": 5})

    def find() -> RankPath:
        calls.append(None)
        return path

    given = Given(find)
    assert not calls
    assert given.offer("h") == given.offer("h") == Given(path).offer("h")
    assert given.known is path
    assert len(calls) == 1
    assert sent(lambda: None, "h") == sent(None, "h")


def test_what_a_function_raised_is_the_cause_of_the_error_and_an_interrupt_goes_on() -> None:
    for error, expected in [(ValueError("no"), TopologyError), (KeyboardInterrupt(), KeyboardInterrupt)]:
        given = Given(raising(error))
        with pytest.raises(expected) as caught, given.agreeing():
            agree([given.offer("h")], given.known, [0])
        assert error in (caught.value, caught.value.__cause__)
        with pytest.raises(TopologyError, match=f"^rank 0: .* raised {type(error).__name__}"), given.agreeing():
            agree([given.offer("h")], given.known, [0])


def test_a_topology_is_shown_with_how_many_edges_each_level_has() -> None:
    assert repr(Topology.from_slurm(CONF)) == "<Topology rank=8 node=8 supernode=3 switch2=2>"


def test_a_host_without_a_name_is_an_error_of_its_rank() -> None:
    with pytest.raises(TopologyError, match="rank 1: the name of the host: a name is empty"):
        agree([sent(None, "a"), sent(None, "")], None, [0, 1])


def test_nodes_are_numbered_as_the_tree_has_them() -> None:
    topology = Topology.from_hosts(["a", "b", "a"])
    assert np.array_equal(topology.node_of, topology.tree().parents[0])
