"""The table of the README's headline: what it simulates is what it says."""

from __future__ import annotations

import numpy as np
import pytest

from bench.headline import table as headline
from fastckpt.plan.placement import makespan
from fastckpt.topology.topology import Topology


def test_every_row_places_everything_and_none_is_faster_than_the_plan() -> None:
    tree = Topology.load(headline.EXAMPLES / "topologies/new_sunway.toml").tree()
    held = headline.layout([2, 4, 4, 4])
    assert held.bytes == pytest.approx(174e12 * 14, rel=0.001)
    rows, dealt = headline.placements(tree, held)
    seconds = [makespan(tree, loads) for loads in rows.values()]
    assert all(loads.sum() == held.bytes for loads in rows.values())
    least = pytest.approx(held.bytes / 4.5e12, rel=0.005)
    assert seconds[-1] == dealt.makespan_seconds == least == min(seconds)
    assert [int((loads > 0).sum()) for loads in rows.values()] == [48_000, 375, 12_032, 96_000, 48_000]
    supernode_of = list(tree.edges_of_ranks())[2]
    assert set(np.bincount(supernode_of, rows["**planned by fastckpt**"] > 0)) == {128}


def test_the_readme_has_the_table_that_its_command_prints() -> None:
    readme = (headline.EXAMPLES.parent / "README.md").read_text()
    table, *_ = headline.table().split("\n\n")
    assert table in readme
