"""What Slurm says of the network: a node's address in its environment, and the text of a topology.conf."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fastckpt.errors import TopologyError
from fastckpt.topology.host_list import check_name, expand
from fastckpt.topology.nearest import nearest
from fastckpt.topology.shown import shown

ADDRESS: Final = "SLURM_TOPOLOGY_ADDR"
PATTERN: Final = "SLURM_TOPOLOGY_ADDR_PATTERN"

# A value is quoted, or has no spaces. Slurm itself writes empty ones.
_PAIR: Final = re.compile(r'\s*([\w.]+)\s*=\s*(?:"([^"]*)"|([^\s="]*))(?=\s|$)')
_KEYS: Final = ("switchname", "switches", "nodes", "linkspeed", "level", "blockname", "blockindex", "blocksize")
_NONE: Final = "(null)"
"""What Slurm's commands print for what is not set."""
_SIDE_BY_SIDE: Final = str.maketrans("[],", "()+")


def levels_of(height: int) -> tuple[str, ...]:
    """The levels of a tree that is ``height`` switches high: a leaf switch, or a block, is a supernode."""
    return ("node", *("supernode", *(f"switch{number}" for number in range(2, height + 1)))[:height])


def path_of_address(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The node's name and those of the switches above it, upwards, from the environment of a task.

    Where a level has no switch above a node, the next higher one stands for it. Where it has several, which Slurm
    writes as a host list, they are one edge named after all of them, ``s(0-3)`` for ``s[0-3]``.
    """
    for name in (ADDRESS, PATTERN):
        if not environment.get(name):
            raise TopologyError(
                f"{name} is not set: Slurm sets it in each task of a step, if a topology plugin is configured. "
                f"Start the ranks by srun, or describe the topology in a file"
            )
    kinds = environment[PATTERN].split(".")
    names = environment[ADDRESS].split(".", len(kinds) - 1)
    if len(names) != len(kinds) or kinds[-1] != "node" or not names[-1]:
        raise TopologyError(
            f"{ADDRESS} is {environment[ADDRESS]!r}, which is not of the form {environment[PATTERN]!r} that {PATTERN} "
            f"says. Describe the topology in a file"
        )
    above: list[str] = []
    for kind, name in zip(kinds[:-1], names[:-1], strict=True):
        if kind in ("switch", "block"):  # a torus has coordinates instead, in which there is no path
            # Each of several switches leads to the node, and nothing says how its traffic is spread over them: only
            # what they carry together can be known. Brackets would be four names to whoever reads the topology's file.
            above.append(name.translate(_SIDE_BY_SIDE) or (above[-1] if above else "top"))
    return (names[-1], *reversed(above))


@dataclass
class _Switch:
    line: int
    nodes: list[str] = field(default_factory=list)
    switches: list[str] = field(default_factory=list)
    parent: str | None = None


def paths_of_conf(text: str, source: str, count_max: int) -> list[tuple[str, ...]]:
    """By node, its name and those of the switches above it, upwards, all equally long.

    ``text`` is a topology.conf of switches or blocks, or what ``scontrol show topology`` prints. Where a branch is
    less high than others, its uppermost switch stands for those that it lacks. Switches with no nodes below them,
    which Slurm allows, are left out.
    """
    switches = _switches(text, source, count_max)
    for name, switch in switches.items():
        for child in switch.switches:
            if child not in switches:
                raise TopologyError(
                    f"{source}:{switch.line}: switch {name!r} is above a switch {child!r}, which no line describes"
                )
            other = switches[child].parent
            if other is not None:
                raise TopologyError(
                    f"{source}:{switch.line}: switch {child!r} is below {name!r} and below {other!r} "
                    f"(line {switches[other].line}). Each has one path to the storage: describe the topology in a file"
                )
            switches[child].parent = name
    order = [name for name, switch in switches.items() if switch.parent is None]
    for name in order:
        order += switches[name].switches
    if len(order) != len(switches):  # what no root reaches goes round
        reached = set(order)
        name = next(name for name in switches if name not in reached)
        seen: list[str] = []
        while name not in seen:
            seen.append(name)
            name = switches[name].parent or ""
        cycle = [*seen[seen.index(name) :], name]
        raise TopologyError(
            f"{source}:{switches[name].line}: switches lie above each other in a circle: {' -> '.join(reversed(cycle))}"
        )
    return _paths(switches, order, source)


def _paths(switches: Mapping[str, _Switch], order: Sequence[str], source: str) -> list[tuple[str, ...]]:
    """``order`` has every switch after the one above it."""
    heights: dict[str, int] = {}  # 0 without nodes
    for name in reversed(order):
        below = max((heights[child] for child in switches[name].switches), default=0)
        heights[name] = below + 1 if below or switches[name].nodes else 0
    height = max(heights.values())
    if not height:
        raise TopologyError(f"{source}: no switch and no block has nodes")
    above: dict[str, tuple[str, ...]] = {}  # from the switch upwards to the highest level
    for name in (name for name in order if heights[name]):
        parent = switches[name].parent
        upper = above[parent] if parent is not None else ()
        above[name] = (name,) * (height - heights[name] + 1 - len(upper)) + upper
    paths = []
    found: dict[str, str] = {}
    for name in order:
        for node in switches[name].nodes:
            if node in found:
                raise TopologyError(
                    f"{source}:{switches[name].line}: node {node!r} is below {name!r} and below {found[node]!r} "
                    f"(line {switches[found[node]].line}). Each has one path to the storage: describe the topology "
                    f"in a file"
                )
            found[node] = name
            paths.append((node, *above[name]))
    return paths


def _switches(text: str, source: str, count_max: int) -> dict[str, _Switch]:
    switches: dict[str, _Switch] = {}
    nodes = 0
    for number, line in _lines(text):
        fields = _fields(line, f"{source}:{number}")
        name = fields.get("switchname") or fields.get("blockname")
        if name is None:
            if line.strip() and not fields.keys() & {"blocksize", "blocksizes"}:
                raise TopologyError(
                    f"{source}:{number}: neither SwitchName= nor BlockName= is in {shown(line.strip())}"
                )
            continue
        if name in switches:
            raise TopologyError(
                f"{source}:{number}: {name!r} is described a second time (first on line {switches[name].line})"
            )
        switch = _Switch(number)
        try:
            check_name(name)
            if "switches" in fields:  # scontrol lists the nodes below them as well
                switch.switches = expand(fields["switches"], count_max)
            elif "nodes" in fields:
                switch.nodes = expand(fields["nodes"], count_max - nodes)
        except ValueError as error:
            raise TopologyError(f"{source}:{number}: {error}") from None
        unknown = next((key for key in fields if key not in _KEYS), None)
        if not switch.switches and not switch.nodes and unknown:  # it may be what they are meant to be called
            raise TopologyError(
                f"{source}:{number}: {name!r} has neither Nodes= nor Switches=, but {shown(unknown)}: "
                f"{nearest(unknown, _KEYS)}"
            )
        nodes += len(switch.nodes)
        switches[name] = switch
    if not switches:
        raise TopologyError(f"{source}: no switch and no block is described")
    return switches


def _fields(line: str, where: str) -> dict[str, str]:
    """What is set in a line, by key in small letters, as Slurm reads its configuration files; without what is empty.

    No key has a value for those that follow: SwitchName=DEFAULT, unlike NodeName=DEFAULT in slurm.conf, is a switch.
    """
    if line.split(None, 1)[:1] and line.split(None, 1)[0].lower() == "include":
        raise TopologyError(
            f"{where}: another file is included, of which only Slurm knows where it is: put its lines here, or give "
            f"what `scontrol show topology` prints"
        )
    fields: dict[str, str] = {}
    end = 0
    while match := _PAIR.match(line, end):
        key, quoted, plain = match.groups()
        value = plain if quoted is None else quoted
        if value and value != _NONE:
            fields[key.lower()] = value
        end = match.end()
    if rest := line[end:].strip():
        raise TopologyError(f"{where}: {shown(rest)} is not of the form key=value, without spaces in lists")
    return fields


def _lines(text: str) -> list[tuple[int, str]]:
    """The logical lines, without comments, each with the number of its first.

    As Slurm reads them, a line goes on in the next where it ends in a backslash: without a space between the two.
    """
    lines: list[tuple[int, str]] = []
    start, collected = 1, ""
    for number, line in enumerate(text.splitlines(), 1):
        collected += line.partition("#")[0]
        if collected.rstrip().endswith("\\"):
            collected = collected.rstrip()[:-1]
            continue
        lines.append((start, collected))
        start, collected = number + 1, ""
    return [*lines, (start, collected)]
