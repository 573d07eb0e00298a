"""``fastckpt plan``: who would write what on a topology, how long that takes, and what others' ways would take."""

from __future__ import annotations

import importlib
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastckpt.cli.arguments import open_repository, step_option
from fastckpt.cli.terminal import Command, Terminal, count_text, pass_terminal, size_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastckpt.plan.holdings import Holdings
    from fastckpt.plan.placement import Placement
    from fastckpt.topology.topology import Topology, Tree

FILE_BYTES_MAX = 16 * 1024 * 1024
RANKS_PER_WRITER = 64
"""Of the placement with too few writers."""
ROWS_MAX = 40
NAMES_MAX = 1000
"""Of edges in the JSON document; their number is there, too."""
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
LINES = ("-", "--", "-.", ":")
"""Placements may lie on each other."""
NAMED_MAX = 16
"""Supernodes in a picture that still have room for their names."""
PLANNED = "planned"
SNAPSHOT_TELLS = "a snapshot says who wrote what, and who else held it only of tensors on a mesh"


@dataclass(frozen=True)
class _Outcome:
    """One way to place the bytes, and what becomes of it."""

    name: str
    loads: npt.NDArray[np.int64]
    """Bytes by rank."""
    makespan_seconds: float
    """Of the edge that is slowest for its load; nan where no capacity is known."""
    simulated_seconds: float
    ratio: float
    """Times as long as what is planned."""
    writers: int
    groups: int
    """Edges of the level shown that have writers behind them."""


@dataclass(frozen=True)
class _Group:
    """An edge of the level shown: a supernode where there are some."""

    name: str
    ranks: int
    writers: int
    bytes: int
    seconds: float
    """Until the edge has carried its bytes, at its own capacity."""


@dataclass(frozen=True)
class _Result:
    tree: Tree
    holdings: Holdings
    placement: Placement
    level: int
    groups: list[_Group]
    outcomes: list[_Outcome]


@click.command(cls=Command, name="plan")
@click.option(
    "--topology",
    "topology_file",
    required=True,
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False),
    help="TOML or JSON: which rank is on which node, supernode and gateway, and what they can carry.",
)
@click.option(
    "--layout",
    "source",
    required=True,
    metavar="FILE|REPO",
    help="What the ranks hold: a TOML file of a model's dimensions and parallelism, or a repository.",
)
@step_option
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True),
    help="Also draw bytes per supernode, as PNG, SVG or PDF; needs matplotlib.",
)
@pass_terminal
def command(terminal: Terminal, topology_file: str, source: str, step: int | None, plot: str | None) -> None:
    """Plan who writes what of a job's state on a topology.

    Shows bytes and writers per supernode, the time until all is written (makespan), the time that no placement beats
    (bound), how far the two are apart (gap), the edges that give the bound (binding), and how long other ways to place
    the same bytes take: by the slowest edge, and simulated with flows that share the network fairly.
    """
    figure = _figure(plot) if plot else None
    topology = _topology(topology_file)
    holdings = _holdings(source, step)
    if topology.ranks != holdings.ranks:
        raise click.UsageError(
            f"{topology_file} has {topology.ranks} ranks and {source} has {holdings.ranks}; "
            "describe the same job in both: `ranks` and `count` of the topology say how many there are"
        )
    result = _plan(topology.tree(), holdings)
    if figure is not None and plot:
        _draw(figure, result, plot)
    if terminal.json:
        terminal.document(_json(topology_file, source, result))
    else:
        _show(terminal, topology_file, source, result)
        if plot:
            terminal.note(f"drawn to {plot}")


# --- what is asked about -------------------------------------------------------------------------------------------


def _topology(path: str) -> Topology:
    from fastckpt.errors import TopologyError
    from fastckpt.topology.topology import Topology

    try:
        return Topology.load(path)
    except TopologyError as error:
        raise click.BadParameter(str(error), param_hint="--topology") from None


def _holdings(source: str, step: int | None) -> Holdings:
    from fastckpt.plan.holdings import holdings_of_layout
    from fastckpt.plan.layout_file import read_layout

    if not os.path.isfile(source):
        return holdings_of_layout(open_repository(source).snapshot(step).chunks)
    if step is not None:
        raise click.UsageError(f"--step is for a repository, and {source} is a file")
    try:
        with open(source, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ValueError(f"{source}: more than {size_text(FILE_BYTES_MAX)} is no layout file")
        return read_layout(data.decode(), source)
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{source}: byte {error.start} is not UTF-8", param_hint="--layout") from None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--layout") from None


# --- the plan and its rivals ---------------------------------------------------------------------------------------


def _plan(tree: Tree, holdings: Holdings) -> _Result:
    import numpy as np

    from fastckpt.plan import rivals
    from fastckpt.plan.placement import place

    classes = holdings.classes
    level = tree.levels.index("supernode") if "supernode" in tree.levels else len(tree.levels) - 2
    *_, group_of = itertools.islice(tree.edges_of_ranks(), level + 1)
    placement = place(tree, classes, holdings.fixed)
    ways = {
        PLANNED: placement.shares,
        "even per replica": rivals.even(classes),
        "whole shards, greedily": rivals.whole_shards(holdings),
        "first replica": rivals.first_replica(classes),
        f"crowded {tree.levels[level]}s": rivals.crowded(tree, classes, level),
        f"a writer every {RANKS_PER_WRITER} ranks": rivals.few_writers(classes, RANKS_PER_WRITER),
    }
    planned = holdings.loads(placement.shares)
    own = _comparable_seconds(tree, planned)
    outcomes = [_outcome(tree, name, holdings.loads(shares), group_of, own) for name, shares in ways.items()]
    count = len(tree.capacities[level])
    ranks = np.bincount(group_of, minlength=count)
    writers = np.bincount(group_of[planned > 0], minlength=count)
    sums = np.zeros(count, np.int64)
    np.add.at(sums, group_of, planned)
    seconds = sums / tree.capacities[level]
    groups = [
        _Group(tree.names[level][edge], int(ranks[edge]), int(writers[edge]), int(sums[edge]), float(seconds[edge]))
        for edge in range(count)
    ]
    return _Result(tree, holdings, placement, level, groups, outcomes)


def _outcome(
    tree: Tree, name: str, loads: npt.NDArray[np.int64], group_of: npt.NDArray[np.intp], own: float
) -> _Outcome:
    import numpy as np

    from fastckpt.plan.placement import makespan
    from fastckpt.plan.simulate import simulate

    return _Outcome(
        name=name,
        loads=loads,
        makespan_seconds=makespan(tree, loads),
        simulated_seconds=simulate(tree, loads).makespan_seconds,
        ratio=_comparable_seconds(tree, loads) / own if own else 1.0,
        writers=int(np.count_nonzero(loads)),
        groups=len(np.unique(group_of[loads > 0])),
    )


def _comparable_seconds(tree: Tree, loads: npt.NDArray[np.int64]) -> float:
    """The makespan; where no capacity is known, in units of a rank's time for a byte."""
    from fastckpt.plan.placement import makespan

    seconds = makespan(tree, loads)
    return float(loads.max()) if math.isnan(seconds) else seconds


# --- what is shown -------------------------------------------------------------------------------------------------


def _show(terminal: Terminal, topology_file: str, source: str, result: _Result) -> None:
    from fastckpt.plan.deal import by_level, name_edges

    tree, holdings, placement = result.tree, result.holdings, result.placement
    own = result.outcomes[0]
    levels = [
        count_text(len(capacities), level)
        for level, capacities in zip(tree.levels[:-1], tree.capacities[:-1], strict=True)
    ]
    terminal.line(f"topology     {topology_file}: {', '.join(levels)}")
    terminal.line(
        f"layout       {source}: {size_text(holdings.bytes)}, of which several ranks hold "
        f"{size_text(holdings.shared_bytes)} ({count_text(len(holdings.classes.bytes), 'set')} of ranks)"
    )
    if math.isnan(placement.makespan_seconds):
        terminal.line("makespan     ?, no capacity is known; all ranks count as equally fast")
    else:
        simulated = _seconds_text(own.simulated_seconds)
        terminal.line(f"makespan     {_seconds_text(placement.makespan_seconds)} ({simulated} simulated)")
        terminal.line(f"bound        {_seconds_text(placement.bound_seconds)}: no placement is faster")
    terminal.line(f"gap          {placement.gap:.2%}")
    if not math.isnan(placement.bound_seconds):
        binding = "; ".join(
            f"{name_edges(tree, *cut)} ({_rate_text(_together(tree, *cut))})" for cut in by_level(placement)
        )
        terminal.line(f"binding      {binding or 'nothing'}")
    terminal.line()
    _show_groups(terminal, result)
    terminal.line()
    terminal.table(
        ["placement", "makespan>", "times planned>", "simulated>", "writers>", f"{tree.levels[result.level]}s>"],
        [
            [
                outcome.name,
                _seconds_text(outcome.makespan_seconds),
                f"{outcome.ratio:.2f}",
                _seconds_text(outcome.simulated_seconds),
                str(outcome.writers),
                str(outcome.groups),
            ]
            for outcome in result.outcomes
        ],
    )
    if not holdings.shared_bytes and holdings.bytes:
        limits = "" if os.path.isfile(source) else f"; {SNAPSHOT_TELLS}"
        terminal.note(f"every byte has one holder that is known, so there is nothing to choose{limits}")


def _show_groups(terminal: Terminal, result: _Result) -> None:
    """A row for each run of edges that look the same."""
    kind = result.tree.levels[result.level]
    rows = []
    for cells, run in itertools.groupby(result.groups, key=_group_cells):
        names = [group.name.removeprefix(f"{kind} ") for group in run]
        rows.append([names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, each", *cells])
    shown = rows if terminal.verbosity > 0 else rows[:ROWS_MAX]
    terminal.table([kind, "ranks>", "writers>", "bytes>", "busy>"], shown)
    if len(shown) < len(rows):
        terminal.note(f"and {len(rows) - len(shown)} rows more; -v and --json show them")


def _group_cells(group: _Group) -> tuple[str, ...]:
    busy = _seconds_text(group.seconds) if group.seconds else ""
    return str(group.ranks), str(group.writers), size_text(group.bytes), busy


def _together(tree: Tree, level: int, edges: list[int]) -> float:
    """What edges of a level can carry, in bytes/s."""
    return float(tree.capacities[level][edges].sum())


def _seconds_text(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    for limit, unit, one in ((1, "ms", 1e-3), (600, "s", 1), (36_000, "min", 60)):
        if seconds < limit:
            return f"{seconds / one:.4g} {unit}"
    return f"{seconds / 3600:.4g} h"


def _rate_text(capacity: float) -> str:
    for unit, one in (("TB/s", 1e12), ("GB/s", 1e9), ("MB/s", 1e6)):
        if capacity >= one:
            return f"{capacity / one:.4g} {unit}"
    return f"{capacity:.4g} B/s"


def _finite(number: float) -> float | None:
    """JSON has no nan and no inf."""
    return number if math.isfinite(number) else None


def _json(topology_file: str, source: str, result: _Result) -> dict[str, Any]:
    from fastckpt.plan.deal import by_level

    tree, placement, holdings = result.tree, result.placement, result.holdings
    levels = zip(tree.levels, tree.capacities, strict=True)
    return {
        "topology": {"file": topology_file, "edges": {level: len(edges) for level, edges in levels}},
        "layout": {
            "source": source,
            "bytes": holdings.bytes,
            "shared_bytes": holdings.shared_bytes,
            "sets": len(holdings.classes.bytes),
        },
        "makespan_seconds": _finite(placement.makespan_seconds),
        "bound_seconds": _finite(placement.bound_seconds),
        "gap": _finite(placement.gap),
        "binding": [
            {
                "level": tree.levels[level],
                "edges": len(edges),
                "names": [tree.names[level][edge] for edge in edges[:NAMES_MAX]],
                "capacity": _finite(_together(tree, level, edges)),
            }
            for level, edges in by_level(placement)
        ],
        "level": tree.levels[result.level],
        "groups": [
            {
                "name": group.name,
                "ranks": group.ranks,
                "writers": group.writers,
                "bytes": group.bytes,
                "busy_seconds": _finite(group.seconds) if group.seconds else None,
            }
            for group in result.groups
        ],
        "placements": [
            {
                "name": outcome.name,
                "makespan_seconds": _finite(outcome.makespan_seconds),
                "simulated_seconds": _finite(outcome.simulated_seconds),
                "times_planned": outcome.ratio,
                "writers": outcome.writers,
                "groups": outcome.groups,
            }
            for outcome in result.outcomes
        ],
    }


# --- the picture ---------------------------------------------------------------------------------------------------


def _figure(path: str) -> Any:
    """An empty figure, before anything that takes long."""
    if Path(path).suffix not in PLOT_SUFFIXES:
        raise click.BadParameter(f"{path} does not end in {', '.join(PLOT_SUFFIXES)}", param_hint="--plot")
    try:
        return importlib.import_module("matplotlib.figure").Figure(figsize=(10, 5), layout="constrained")
    except ImportError:
        raise click.UsageError("--plot draws with matplotlib, which is not here: pip install matplotlib") from None


def _draw(figure: Any, result: _Result, path: str) -> None:
    """Bytes by supernode: what is planned filled, the others as lines."""
    import numpy as np

    *_, group_of = itertools.islice(result.tree.edges_of_ranks(), result.level + 1)
    kind, count = result.tree.levels[result.level], len(result.groups)
    axes = figure.add_subplot()
    borders = np.arange(count + 1) - 0.5
    for number, outcome in enumerate(result.outcomes):
        gigabytes = np.bincount(group_of, outcome.loads, count) / 1e9
        label = f"{outcome.name}: {_seconds_text(outcome.makespan_seconds)} ({outcome.ratio:.2f}x)"
        planned = outcome.name == PLANNED
        style = {"fill": True, "color": "lightblue"} if planned else {"linestyle": LINES[number % len(LINES)]}
        axes.stairs(gigabytes, borders, label=label, linewidth=2, **style)
    if count <= NAMED_MAX:
        axes.set_xticks(range(count), [group.name.removeprefix(f"{kind} ") for group in result.groups])
    axes.set_xlabel(kind)
    axes.set_ylabel("GB written")
    axes.set_ylim(bottom=0)
    axes.legend(title="placement: makespan (times planned)")
    figure.savefig(path, dpi=150)
