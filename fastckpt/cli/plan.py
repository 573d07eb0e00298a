"""``fastckpt plan``: who would write what on a topology, how long that takes, and what others' ways would take."""

from __future__ import annotations

import importlib
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastckpt.cli.arguments import open_repository, step_option
from fastckpt.cli.terminal import Command, Terminal, count_text, pass_terminal, size_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fastckpt.plan.deal import Dealer, Dealt
    from fastckpt.plan.holdings import Holdings
    from fastckpt.topology.topology import Topology, Tree

FILE_BYTES_MAX = 16 * 1024 * 1024
ROWS_MAX = 40
NAMES_MAX = 1000
"""Of edges in the JSON document; their number is there, too."""
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
LINES = ("-", "--", "-.", ":")
"""Placements may lie on each other."""
NAMED_MAX = 16
"""Supernodes in a picture that still have room for their names."""
PLANNED = "planned"
GATHERED = "too few and crowded writers get what they do not hold from others, at no cost"
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
class _Job:
    """What is to be saved."""

    holdings: Holdings
    chunk_bytes: int
    rank_nodes: Sequence[int] | None
    """The number of the node of each rank; None where that is not known."""


@dataclass(frozen=True)
class _Result:
    tree: Tree
    holdings: Holdings
    dealer: Dealer
    dealt: Dealt
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
    envvar="FASTCKPT_REPOSITORY",
    help="What the ranks hold: a TOML file of a model's dimensions and parallelism, or a repository.",
)
@step_option
@click.option("--writers", type=click.IntRange(min=1), metavar="N", help="As Options(writers=N); else as many as gain.")
@click.option("--streams", type=click.IntRange(min=1), metavar="N", help="As Options(streams=N); else four.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(dir_okay=False, writable=True),
    help="Also draw bytes per supernode, as PNG, SVG or PDF; needs matplotlib.",
)
@pass_terminal
def command(
    terminal: Terminal,
    topology_file: str,
    source: str,
    step: int | None,
    writers: int | None,
    streams: int | None,
    plot: str | None,
) -> None:
    """Plan who writes what of a job's state on a topology, as its saves would.

    Shows bytes and writers per supernode, the time until all is written (makespan), the time that no placement beats
    (bound), how far the two are apart (gap), the edges that give the bound (binding), how long making the objects
    takes, and how long other ways to place the same bytes take: by the slowest edge, and simulated with flows that
    share the network fairly.
    """
    figure = _figure(plot) if plot else None
    topology = _topology(topology_file)
    job = _job(source, step)
    if topology.ranks != job.holdings.ranks:
        used = _part(topology, job)
        if used is None:
            raise click.UsageError(
                f"{topology_file} has {topology.ranks} ranks and {source} has {job.holdings.ranks}; "
                "describe the same job in both: `ranks` and `count` of the topology say how many there are"
            )
        terminal.note(
            f"{topology_file} has {topology.ranks} ranks and {source} has {job.holdings.ranks}: planned as if the job "
            f"ran on the first {count_text(len(set(used.node_of.tolist())), 'node')}"
        )
        topology = used
    result = _plan(topology.tree(), job, writers, streams)
    if terminal.json:
        terminal.document(_json(topology_file, source, result))
    else:
        _show(terminal, topology_file, source, result)
    if figure is not None and plot:
        try:
            _draw(figure, result, plot)
        except OSError as error:
            raise click.ClickException(f"{plot}: cannot be written: {error.strerror}") from None
        terminal.note(f"drawn to {plot}")


# --- what is asked about -------------------------------------------------------------------------------------------


def _topology(path: str) -> Topology:
    from fastckpt.errors import TopologyError
    from fastckpt.topology.topology import Topology

    try:
        return Topology.load(path)
    except TopologyError as error:
        raise click.BadParameter(str(error), param_hint="--topology") from None


def _job(source: str, step: int | None) -> _Job:
    from fastckpt.plan.holdings import holdings_of_layout
    from fastckpt.plan.layout_file import read_layout
    from fastckpt.plan.save_plan import auto_chunk_bytes

    if not os.path.isfile(source):
        chunks = open_repository(source).snapshot(step).chunks
        return _Job(holdings_of_layout(chunks), chunks.layout.chunk_bytes, chunks.layout.rank_nodes)
    if step is not None:
        raise click.UsageError(f"--step is for a repository, and {source} is a file")
    try:
        with open(source, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ValueError(f"{source}: more than {size_text(FILE_BYTES_MAX)} is no layout file")
        holdings = read_layout(data.decode(), source)
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{source}: byte {error.start} is not UTF-8", param_hint="--layout") from None
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--layout") from None
    return _Job(holdings, auto_chunk_bytes(holdings.bytes), None)


def _part(topology: Topology, job: _Job) -> Topology | None:
    """The topology of a job that runs on the first nodes of a cluster; None if there are not enough, or it describes
    another job."""
    import numpy as np

    from fastckpt.topology.topology import Topology

    node_of = topology.node_of[: job.holdings.ranks] if job.rank_nodes is None else np.array(job.rank_nodes, np.intp)
    nodes = len(topology.planes["storage"].names[1])
    if topology.ranks_are_known or len(node_of) < job.holdings.ranks or node_of.max(initial=0) >= nodes:
        return None
    planes = {name: plane.of_job(node_of) for name, plane in topology.planes.items()}
    return Topology(planes, True, topology.source)


# --- the plan and its rivals ---------------------------------------------------------------------------------------


def _plan(tree: Tree, job: _Job, writers: int | None, streams: int | None) -> _Result:
    import numpy as np

    from fastckpt.plan import rivals
    from fastckpt.plan.classes import of_holdings
    from fastckpt.plan.deal import Dealer
    from fastckpt.plan.placement import place

    holdings = job.holdings
    classes = holdings.classes
    level = tree.levels.index("supernode") if "supernode" in tree.levels else len(tree.levels) - 2
    *_, group_of = itertools.islice(tree.edges_of_ranks(), level + 1)
    kind, count = tree.levels[level], len(tree.capacities[level])
    dealer = Dealer(tree, writers=writers, streams=streams)
    dealt = dealer.deal(of_holdings(holdings, job.chunk_bytes))
    planned = dealt.written
    few, crowded = rivals.too_few(tree, holdings, level), rivals.crowded(tree, holdings, level)
    used = len(np.unique(group_of[crowded > 0]))
    ways = {
        PLANNED: planned,
        "planned, every holder": holdings.loads(place(tree, classes, holdings.fixed).shares),
        "even per replica": holdings.loads(rivals.even(classes)),
        "whole shards, greedily": holdings.loads(rivals.whole_shards(holdings)),
        "first replica": holdings.loads(rivals.first_replica(classes)),
        f"too few: {count_text(int(np.count_nonzero(few)), 'writer')}, one a {kind}": few,
        f"crowded: {count_text(int(np.count_nonzero(crowded)), 'writer')} in {used} of {count} {kind}s": crowded,
    }
    own = _comparable_seconds(tree, planned)
    outcomes = [_outcome(tree, name, loads, group_of, own) for name, loads in ways.items()]
    ranks = np.bincount(group_of, minlength=count)
    writing = np.bincount(group_of[planned > 0], minlength=count)
    sums = np.zeros(count, np.int64)
    np.add.at(sums, group_of, planned)
    seconds = sums / tree.capacities[level]
    groups = [
        _Group(tree.names[level][edge], int(ranks[edge]), int(writing[edge]), int(sums[edge]), float(seconds[edge]))
        for edge in range(count)
    ]
    return _Result(tree, holdings, dealer, dealt, level, groups, outcomes)


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

    tree, holdings, dealt = result.tree, result.holdings, result.dealt
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
    profile = result.dealer.profile
    terminal.line(
        f"writers      {own.writers} of {count_text(holdings.ranks, 'rank')}, who make "
        f"{count_text(dealt.objects, 'object')}: {_seconds_text(dealt.objects / profile.objects_per_second)} more, at "
        f"{profile.objects_per_second:g} a second"
    )
    if math.isnan(dealt.makespan_seconds):
        terminal.line("makespan     ?, no capacity is known; all ranks count as equally fast")
    else:
        simulated = _seconds_text(own.simulated_seconds)
        terminal.line(f"makespan     {_seconds_text(dealt.makespan_seconds)} ({simulated} simulated)")
        terminal.line(f"bound        {_seconds_text(dealt.bound_seconds)}: no placement is faster")
    terminal.line(f"gap          {dealt.gap:.2%}")
    if not math.isnan(dealt.bound_seconds):
        binding = "; ".join(
            f"{name_edges(tree, *cut)} ({_rate_text(_together(tree, *cut))})" for cut in by_level(dealt.binding)
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
    terminal.note(GATHERED)
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

    tree, dealt, holdings = result.tree, result.dealt, result.holdings
    levels = zip(tree.levels, tree.capacities, strict=True)
    return {
        "topology": {"file": topology_file, "edges": {level: len(edges) for level, edges in levels}},
        "layout": {
            "source": source,
            "bytes": holdings.bytes,
            "shared_bytes": holdings.shared_bytes,
            "sets": len(holdings.classes.bytes),
        },
        "writers": result.outcomes[0].writers,
        "streams": result.dealer.profile.streams,
        "objects": dealt.objects,
        "object_seconds": dealt.objects / result.dealer.profile.objects_per_second,
        "makespan_seconds": _finite(dealt.makespan_seconds),
        "bound_seconds": _finite(dealt.bound_seconds),
        "gap": _finite(dealt.gap),
        "binding": [
            {
                "level": tree.levels[level],
                "edges": len(edges),
                "names": [tree.names[level][edge] for edge in edges[:NAMES_MAX]],
                "capacity": _finite(_together(tree, level, edges)),
            }
            for level, edges in by_level(dealt.binding)
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
    if Path(path).suffix.lower() not in PLOT_SUFFIXES:
        raise click.BadParameter(f"{path} does not end in {', '.join(PLOT_SUFFIXES)}", param_hint="--plot")
    if not os.access(Path(path).parent, os.W_OK | os.X_OK):
        raise click.BadParameter(f"{path}: nothing can be written in {Path(path).parent}", param_hint="--plot")
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
