"""How long the planner takes at 131,072 ranks, how near its plans are proven to be to the least time, and how near they
are to the exact optimum at 4,096 ranks.

    python -m bench.placement [--runs N] [--results DIR] [--note TEXT]

From the repository's root. Each of the seven layouts is solved in a process of its own. A line of JSON goes to
``results/placement.jsonl``, the table to ``results/table.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.compare.harness import ROOT, record
from bench.compare.report import table
from bench.placement.layouts import NAMES

NODES = 16_384
SHARDS = 10_000_000
EXACT_NODES = 512
EXACT_SHARDS = 312_500

SECONDS_MAX = 5.0
BYTES_MAX = 2 * 2**30
GAP_MOST = 0.01
GAP_MAX = 0.05
LAYOUTS_MOST = 6
EXACT_MAX = 0.01

LEVELS = ("ranks", "nodes", "supernodes", "storage")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.placement", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="times that each layout is solved")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "placement" / "results", metavar="DIR")
    parser.add_argument("--note", default="", metavar="TEXT", help="what else is to be known of this run")
    arguments = parser.parse_args()
    load = os.getloadavg()
    large = [_solve(name, NODES, SHARDS, arguments.runs, "") for name in NAMES]
    small = [_solve(name, EXACT_NODES, EXACT_SHARDS, 1, "exact") for name in NAMES]
    arguments.results.mkdir(parents=True, exist_ok=True)
    found = record(
        "placement",
        arguments.results,
        command=shlex.join(["python", "-m", "bench.placement", *sys.argv[1:]]),
        scipy=metadata.version("scipy"),
        load_average=load,
        note=arguments.note,
        large=large,
        small=small,
    )
    with (arguments.results / "placement.jsonl").open("a") as results:
        results.write(json.dumps(found) + "\n")
    text = markdown(found)
    (arguments.results / "table.md").write_text(text)
    print(text, end="")


def _solve(name: str, nodes: int, shards: int, runs: int, exact: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.placement.solve", name, str(nodes), str(shards), str(runs), exact]
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    solved: dict[str, Any] = json.loads(printed)
    return solved


def _seconds(row: dict[str, Any]) -> list[float]:
    return [run["totals"] + run["deal"] for run in row["seconds"]]


def markdown(found: dict[str, Any]) -> str:
    machine, large, small = found["machine"], found["large"], found["small"]
    lines = [
        f"`{found['command']}` at commit {found['commit'][:12]}{' with changes' if found['changed_files'] else ''}: "
        f"{machine['cpus']} cores ({machine['cpu']}), {machine['memory_gib']:.0f} GiB, Linux {machine['kernel']}, "
        f"python {found['versions']['python']}, numpy {found['versions']['numpy']}, scipy {found['scipy']}; load "
        f"average {found['load_average'][0]:.1f} at the start. {found['note']}".rstrip(),
        "",
        *table(("target", "measured", "asked for"), _targets(large, small)),
        "",
        f"{large[0]['ranks']:,} ranks on {large[0]['nodes']:,} nodes, {large[0]['shards']:,} shards in "
        f"{large[0]['classes']} classes. Seconds: median (most) of {len(large[0]['seconds'])}, from the sizes of all "
        "shards to the runs of all writers. Memory: of the process, and what of it the layout itself takes. The "
        "proven gap is that of the plan in which all holders write. Dealt is what a save would, with the topology and "
        "nothing else given: fewer write, since making objects takes time, which stands beside that of writing.",
        "",
        *table(
            (
                *("layout", "supernodes", "seconds", "peak, MiB", "proven gap", "what binds"),
                *("even per replica / planned", "dealt / bound - 1", "writers", "seconds to write", "to make objects"),
            ),
            [_large_row(row) for row in large],
        ),
        "",
        f"{small[0]['ranks']:,} ranks: the exact optimum by HiGHS.",
        "",
        *table(
            ("layout", "planned / optimum - 1", "bound / optimum - 1", "even per replica / optimum"),
            [_small_row(row) for row in small],
        ),
    ]
    return "\n".join(lines) + "\n"


def _targets(large: Sequence[dict[str, Any]], small: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    gaps = sorted(row["gap"] for row in large)
    near = sum(gap <= GAP_MOST for gap in gaps)
    slowest = max(statistics.median(_seconds(row)) for row in large)
    largest = max(row["peak_bytes"] for row in large)
    farthest = max(row["makespan_seconds"] / row["least_seconds"] - 1 for row in small)
    return [
        ("slowest layout, median", f"{slowest:.2f} s", f"<= {SECONDS_MAX:.0f} s"),
        ("peak memory", f"{largest / 2**30:.2f} GiB", f"<= {BYTES_MAX / 2**30:.0f} GiB"),
        (
            f"layouts with a proven gap <= {GAP_MOST:.0%}",
            f"{near} of {len(gaps)}",
            f">= {LAYOUTS_MOST} of {len(NAMES)}",
        ),
        ("largest proven gap", f"{gaps[-1]:.2%}", f"<= {GAP_MAX:.0%}"),
        ("farthest from the exact optimum", f"{farthest:.2%}", f"<= {EXACT_MAX:.0%}"),
    ]


def _above(seconds: float, least: float) -> str:
    return f"{round(seconds / least - 1, 4) + 0:.2%}"


def _large_row(row: dict[str, Any]) -> tuple[str, ...]:
    seconds, dealt = _seconds(row), row["dealt"]
    binding = [f"{count} {level}" for level, count in zip(LEVELS, row["binding_edges"], strict=True) if count]
    return (
        row["layout"],
        str(row["supernodes"]),
        f"{statistics.median(seconds):.2f} ({max(seconds):.2f})",
        f"{row['peak_bytes'] / 2**20:.0f} ({row['layout_peak_bytes'] / 2**20:.0f})",
        _above(row["makespan_seconds"], row["bound_seconds"]),
        " and ".join(binding),
        f"{row['even_seconds'] / row['makespan_seconds']:.2f}",
        _above(dealt["makespan_seconds"], row["bound_seconds"]),
        f"{dealt['writers']:,}",
        f"{dealt['makespan_seconds']:.2f}",
        f"{dealt['object_seconds']:.1f}",
    )


def _small_row(row: dict[str, Any]) -> tuple[str, ...]:
    least = row["least_seconds"]
    return (
        row["layout"],
        _above(row["makespan_seconds"], least),
        _above(row["bound_seconds"], least),
        f"{row['even_seconds'] / least:.2f}",
    )


if __name__ == "__main__":
    main()
