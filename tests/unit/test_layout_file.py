"""Layout files: what they make of a model, and what they say of wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fastckpt.plan import layout_file
from fastckpt.plan.holdings import Holdings
from fastckpt.plan.layout_file import read_layout
from fastckpt.topology.topology import Topology

EXAMPLES = Path(__file__).parents[2] / "examples"

DENSE = """
[model]
layers = 4
hidden = 8
vocabulary = 10

[parallel]
tp = 2
pp = 2
dp = 3
order = "{order}"

[state]
replicated_bytes_per_parameter = 2
"""

SPARSE = """
[model]
layers = 2
hidden = 4
experts = 6
expert_intermediate = 5

[parallel]
dp = 6
ep = 3

[state]
replicated_bytes_per_parameter = [2]
sharded_bytes_per_parameter = [4, 8]
"""


def sets(holdings: Holdings) -> dict[tuple[int, ...], int]:
    """Bytes by the ranks that hold them."""
    classes = holdings.classes
    return {
        tuple(classes.holders[classes.starts[number] : classes.starts[number + 1]].tolist()): int(size)
        for number, size in enumerate(classes.bytes)
    }


# --- what a model is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("cluster_8_nodes", 8.03e9), ("skewed", 405.9e9), ("nvl72_row", 775.9e9), ("new_sunway", 173.95e12)],
)
def test_an_example_has_the_parameters_and_the_ranks_of_its_topology(name: str, parameters: float) -> None:
    holdings = read_layout((EXAMPLES / f"layouts/{name}.toml").read_text(), name)
    each = {"cluster_8_nodes": 14, "skewed": 2, "nvl72_row": 14, "new_sunway": 16}[name]
    assert holdings.bytes / each == pytest.approx(parameters, rel=0.002)
    assert Topology.load(EXAMPLES / f"topologies/{name}.toml").ranks == holdings.ranks


def test_what_is_split_by_tp_is_on_the_replicas_and_norms_are_on_the_whole_stage() -> None:
    # Ranks by (pp, dp, tp): neighbours are tp.
    holdings = read_layout(DENSE.format(order="tp-dp-pp"), "x")
    assert holdings.ranks == 12
    half = 2 * (8 * 24 + 8 * 8 + 2 * 8 * 32) // 2 * 2  # two layers' matrices, in bytes
    embedding = 10 * 8 // 2 * 2
    assert sets(holdings) == {
        (0, 2, 4): half + embedding,
        (1, 3, 5): half + embedding,
        (0, 1, 2, 3, 4, 5): 2 * 2 * 8 * 2,
        (6, 8, 10): half + embedding,
        (7, 9, 11): half + embedding,
        (6, 7, 8, 9, 10, 11): (2 * 2 * 8 + 8) * 2,
    }
    assert not holdings.fixed.any()


def test_the_order_says_which_ranks_are_neighbours() -> None:
    pipeline_inside = read_layout(DENSE.format(order="pp-tp-dp"), "x")
    assert [ranks for ranks in sets(pipeline_inside) if len(ranks) == 3] == [
        (0, 4, 8),
        (2, 6, 10),
        (1, 5, 9),
        (3, 7, 11),
    ]
    assert sorted(sets(pipeline_inside).values()) == sorted(
        sets(read_layout(DENSE.format(order="tp-dp-pp"), "x")).values()
    )


def test_experts_are_held_by_few_and_what_is_sharded_by_one() -> None:
    holdings = read_layout(SPARSE, "x")
    experts = 2 * 2 * (2 * 4 * 5)  # layers, experts a rank, matrices
    dense = 2 * (4 * 12 + 4 * 4)
    routers = 2 * (2 * 4 + 4 * 6) + 4
    shared = [2 * dense, 2 * routers, *[2 * experts] * 3]
    assert holdings.classes.bytes.tolist() == shared
    everywhere = (0, 1, 2, 3, 4, 5)
    assert list(sets(holdings)) == [everywhere, (0, 3), (1, 4), (2, 5)]
    each = -(-12 * dense // 6) + -(-12 * routers // 6) + -(-12 * experts // 2)
    assert holdings.fixed.tolist() == [each] * 6


def test_an_expert_on_one_rank_leaves_nothing_to_choose() -> None:
    holdings = read_layout(SPARSE.replace("ep = 3", "ep = 6"), "x")
    assert all(len(ranks) == 6 for ranks in sets(holdings))
    assert (holdings.fixed > 2 * 2 * 2 * 4 * 5).all()


def test_a_model_by_totals_is_as_large_as_they_say() -> None:
    text = """
    [model]
    layers = 10
    parameters = 70e9
    experts = 4
    expert_parameters = 100e9
    [parallel]
    tp = 2
    dp = 4
    ep = 2
    [state]
    replicated_bytes_per_parameter = [2, 4]
    """
    holdings = read_layout(text, "x")
    assert holdings.bytes == 170 * 10**9 * 6
    assert holdings.shards.counts.sum() == 2 * 10 * 2 + 2 * 2 * (10 * 2) * 2


def test_shards_by_themselves_are_as_they_are_listed() -> None:
    text = """
    ranks = 6
    [[shards]]
    bytes = "1.5 kB"
    count = 3
    holders = "0-2,5"
    [[shards]]
    bytes = 7
    holders = "all"
    [[shards]]
    bytes = "1 KiB"
    holders = "4"
    [[shards]]
    bytes = 100
    holders = "0-2,5"
    """
    holdings = read_layout(text, "x")
    assert sets(holdings) == {(0, 1, 2, 5): 4600, (0, 1, 2, 3, 4, 5): 7}
    assert holdings.fixed.tolist() == [0, 0, 0, 0, 1024, 0]
    assert holdings.shards.bytes.tolist() == [1500, 100, 7]
    assert holdings.shards.counts.tolist() == [3, 1, 1]


def test_shards_may_stand_beside_a_model() -> None:
    holdings = read_layout(SPARSE + '[[shards]]\nbytes = 11\nholders = "1,2"\n', "x")
    assert sets(holdings)[1, 2] == 11


def test_the_form_that_the_module_shows_is_read() -> None:
    shown = re.findall(r"^ {4}(.*)$", layout_file.__doc__ or "", re.MULTILINE)
    dimensions, totals = ("\n".join(shown).replace("...", "")).split("[model]")[1:]
    totals, rest = totals.split("[parallel]")
    for model in (dimensions, totals):
        holdings = read_layout(f"[model]{model}[parallel]{rest}", "x")
        assert holdings.ranks == 8 * 16 * 128
        assert (holdings.fixed > 0).all()


# --- what is wrong with one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("layers = 2", "layer = 2"), r"x:3: model.layer is unknown: did you mean 'layers'\?"),
        (("layers = 2", ""), "x:2: model.layers is missing: give a whole number from 1"),
        (("layers = 2", "layers = 0"), "x:3: model.layers is 0: give a whole number from 1"),
        (("layers = 2", "layers = true"), "x:3: model.layers is True: give a whole number"),
        (("hidden = 4", "hidden = 4.5"), "x:4: model.hidden is 4.5: give a whole number"),
        (("hidden = 4", "hidden = 10_000_000_000"), "x:4: model.hidden is 10000000000: .* to 1000000000"),
        (("hidden = 4", "hidden = 4\ngated = 1"), "x:5: model.gated is 1: give true or false"),
        (("experts = 6", "experts = 7"), "x:5: model.experts is 7, which parallel.ep = 3 does not divide"),
        (("hidden = 4", "hidden = 4\nkey_value_heads = 2"), "model.key_value_heads is 2, more than heads = 1"),
        (("hidden = 4", "hidden = 4\nparameters = 9"), "x:4: model.hidden stands beside totals"),
        (("hidden = 4", "expert_parameters = 9"), "model.expert_intermediate stands beside totals"),
        (
            ("hidden = 4\nexperts = 6\nexpert_intermediate = 5", "parameters = 0.5"),
            "x:4: model.parameters is 0.5: give",
        ),
        (("dp = 6", "dp = 7"), "x:10: parallel.ep is 3, which does not divide dp = 7"),
        (("dp = 6", "dp = 6\npp = 3"), "x:3: model.layers is 2, fewer than the 3 stages of parallel.pp"),
        (("dp = 6", "dp = 6\ntp = 9_000_000"), "x:8: parallel is 54000000 ranks; at most 10000000"),
        (("ep = 3", 'ep = 3\norder = "tp-pp"'), "x:11: parallel.order is 'tp-pp': name tp, dp, pp"),
        (("ep = 3", 'ep = 3\norder = "dp-dp"'), "x:11: parallel.order is 'dp-dp'"),
        (("[2]", "[0]"), r"x:13: state.replicated_bytes_per_parameter is \[0\]: give bytes for each"),
        (("[2]", "['2']"), r"x:13: state.replicated_bytes_per_parameter is \['2'\]"),
        (("[2]", "[nan]"), r"x:13: state.replicated_bytes_per_parameter is \[nan\]"),
        (("[state]", "[estate]"), r"x:12: estate is unknown: did you mean 'state'\?"),
        (("[model]", "ranks = 6\n[model]"), r"x:2: ranks stands beside \[parallel\]"),
        (("[model]", "shards = 3\n[model]"), "x:2: shards must be tables"),
        (("ep = 3", "ep == 3"), "x: is not TOML: .*line 10"),
    ],
)
def test_a_wrong_model_is_told_with_line_and_field(change: tuple[str, str], message: str) -> None:
    assert change[0] in SPARSE
    with pytest.raises(ValueError, match=message):
        read_layout(SPARSE.replace(*change), "x")


@pytest.mark.parametrize("name", ["model", "parallel", "state"])
def test_a_table_that_is_missing_is_told(name: str) -> None:
    text = re.sub(rf"\[{name}\]\n(.+\n)+", "", SPARSE)
    with pytest.raises(ValueError, match=rf"x: lacks \[{name}\]: a layout by \[model\] has"):
        read_layout(text, "x")
    with pytest.raises(ValueError, match=f"x:1: {name} must be a table"):
        read_layout(f"{name} = 3\n{text}", "x")


def test_an_empty_state_is_told() -> None:
    with pytest.raises(ValueError, match="x:12: state says no bytes"):
        read_layout(SPARSE.split("replicated")[0], "x")
    with pytest.raises(ValueError, match=r"x: has neither \[model\] nor \[\[shards\]\]"):
        read_layout("", "x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('holders = "0-9"', "x:4: shards.holders names rank 9, but ranks are 0 to 5"),
        ('holders = "3-1"', "x:4: shards.holders .*runs backwards"),
        ('holders = "1,0-2"', "x:4: shards.holders names rank 1 twice"),
        ('holders = "0-99999999999"', "x:4: shards.holders .* at most 10000000 are possible"),
        ("holders = [1, 2]", "x:4: shards.holders must say which ranks hold it"),
        ("", "x:2: shards.holders must say which ranks hold it"),
        ('holders = "0"\ncount = -1', "x:5: shards.count is -1: give a whole number from 1"),
        ('holders = "0"\ncounts = 1', r"x:5: shards.counts is unknown: did you mean 'count'\?"),
    ],
)
def test_wrong_holders_are_told(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_layout(f"ranks = 6\n[[shards]]\nbytes = 1\n{line}\n", "x")


@pytest.mark.parametrize("size", ["-1", '"8 XB"', '"MB"', "1.5", '"9999999 PiB"', "true", '"8"'])
def test_wrong_sizes_are_told(size: str) -> None:
    with pytest.raises(ValueError, match=r"x:3: shards.bytes is .*: give bytes up to 2\^62, or a text like"):
        read_layout(f'ranks = 6\n[[shards]]\nbytes = {size}\nholders = "all"\n', "x")


def test_more_bytes_than_can_be_counted_are_refused() -> None:
    listed = '[[shards]]\nbytes = "4 PiB"\ncount = 2000\nholders = "0"\n'
    with pytest.raises(ValueError, match="bytes in all are more than"):
        read_layout(f"ranks = 2\n{listed}", "x")
    with pytest.raises(ValueError, match="x:12: state is more than"):
        read_layout(SPARSE.replace("hidden = 4", "hidden = 1_000_000_000"), "x")


def test_a_file_that_would_take_all_memory_is_refused_before_it_does() -> None:
    listed = "".join(f'[[shards]]\nbytes = 1\nholders = "{number}-9999999"\n' for number in range(8))
    with pytest.raises(ValueError, match="and those before it are more than 40000000 ranks in all"):
        read_layout(f"ranks = 10_000_000\n{listed}", "x")
    with pytest.raises(ValueError, match="characters are more than a layout file may have"):
        read_layout(" " * (2**24 + 1), "x")
    text = SPARSE.replace("dp = 6", "dp = 9_000_000").replace("ep = 3", "ep = 9_000_000")
    with pytest.raises(ValueError, match="makes 9000002 sets of ranks; at most"):
        read_layout(text.replace("experts = 6", "experts = 9_000_000"), "x")


def test_sizes_that_do_not_divide_are_rounded_up() -> None:
    holdings = read_layout(DENSE.format(order="tp-dp-pp").replace("vocabulary = 10", "vocabulary = 11"), "x")
    assert holdings.bytes > read_layout(DENSE.format(order="tp-dp-pp"), "x").bytes
    assert np.all(holdings.shards.bytes % 2 == 0)


def test_a_wrong_field_is_found_in_the_table_that_has_it() -> None:
    good, bad = (f'[[shards]]\nbytes = 1\nholders = "{held}"\n' for held in ("0", "9"))
    with pytest.raises(ValueError, match=r"x:7: shards\.holders names rank 9"):
        read_layout("ranks = 6\n" + good + bad, "x")
