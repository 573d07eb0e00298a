"""The table of the README's headline: what it simulates is what it says."""

from __future__ import annotations

import pytest

from bench.headline import table as headline
from fastckpt.plan.placement import makespan
from fastckpt.topology.topology import Topology


def test_every_row_places_everything_and_none_is_faster_than_the_plan() -> None:
    tree = Topology.load(headline.EXAMPLES / "topologies/new_sunway.toml").tree()
    held = headline.layout([2, 4, 4, 4])
    assert held.bytes == pytest.approx(174e12 * 14, rel=0.001)
    rows = headline.placements(tree, held)
    seconds = [makespan(tree, loads) for loads in rows.values()]
    assert all(loads.sum() == held.bytes for loads in rows.values())
    assert min(seconds) == seconds[-1] == pytest.approx(held.bytes / 4.5e12, rel=0.005)
    assert [int((loads > 0).sum()) for loads in rows.values()] == [48_000, 375, 12_032, 96_000]


def test_the_table_has_the_times_and_the_assumptions() -> None:
    lines = headline.table().splitlines()
    assert lines[0].startswith("| 174 x 10^12 parameters, simulated |")
    planned = lines[5].split(" | ")
    assert planned[1:3] == ["96,000", "375"]
    assert planned[-2:] == ["10.3 min", "4.50 |"]
    assert "A simulation (fluid flows, max-min fair" in lines[-1]
    assert "15 a supernode, 25 a gateway (188, each for two supernodes, as on TaihuLight), 4.5 TB/s" in lines[-1]
