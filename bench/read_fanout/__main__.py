"""When it pays to read each byte once in the job: ``Options(read_fanout="node")`` beside ``"job"``, on storage of
several speeds.

    python -m bench.read_fanout [--gib SIZE] [--nodes N] [--runs N] [--directory DIR]

From the repository's root, as root. Every rank restores the same replicated tensor; each is on a node of its own, as
far as fastckpt can tell: it has a host name of its own, by a namespace. The page cache is dropped before each restore.
Storage that all nodes share is simulated: reads of all ranks together are delayed to so many bytes/s, the local disk
permitting. Between these nodes there is only the loopback interface, and all run on the cores of one machine: what is
read once is worth more where each node brings its own. A line of JSON goes to ``results/read_fanout.jsonl``, the table
to ``results/table.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.compare.harness import ROOT, Runs, job, record
from bench.compare.report import table
from bench.read_fanout.restores import FANOUTS, MEMORY, STORAGES, name_case, restores


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.read_fanout", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--gib", type=float, default=0.5, metavar="SIZE", help="of the replicated state")
    parser.add_argument("--nodes", type=int, default=4, metavar="N")
    parser.add_argument("--runs", type=int, default=5, metavar="N")
    parser.add_argument(
        "--directory", type=Path, default=ROOT / "build", metavar="DIR", help="on the disk to read from"
    )
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    size = int(arguments.gib * 2**30)
    load = os.getloadavg()
    with (
        tempfile.TemporaryDirectory(dir=arguments.directory) as directory,
        tempfile.TemporaryDirectory(dir=MEMORY) as memory,
    ):
        rows = job(arguments.nodes, restores, directory, memory, size, arguments.runs)
        found = record(
            "read_fanout",
            Path(directory),
            command=shlex.join(["python", "-m", "bench.read_fanout", *sys.argv[1:]]),
            bytes=size,
            nodes=arguments.nodes,
            load_average=load,
            runs=rows,
        )
    results = ROOT / "bench" / "read_fanout" / "results"
    results.mkdir(parents=True, exist_ok=True)
    (results / "read_fanout.jsonl").write_text(json.dumps(found) + "\n")
    (results / "table.md").write_text(report(found))
    print(report(found))


def report(found: dict[str, Any]) -> str:
    runs = Runs(found["runs"])
    rows = []
    for storage in STORAGES:
        each = [name_case(fanout, storage) for fanout in FANOUTS]
        read = [runs.spread(case, "read_bytes").median / found["bytes"] for case in each]
        rows.append(
            [
                storage,
                *(f"{runs.spread(case, 'seconds'):.2f}" for case in each),
                f"{runs.ratio(each[1], each[0], 'seconds'):.2f}",
                " / ".join(f"{most:.2f}" for most in read),
            ]
        )
    head = ["all nodes share", "node, s", "job, s", "job / node", "the most that one rank read, as parts of the state"]
    machine = found["machine"]
    about = (
        f"`{found['command']}` at commit {found['commit'][:12]}: {found['bytes'] / 2**30:g} GiB, replicated on "
        f"{found['nodes']} ranks on nodes of their own; {machine['cpus']} cores ({machine['cpu']}); "
        f"load average {found['load_average'][0]:.1f} at the start. Medians, with the least and the most in brackets."
    )
    return "\n".join([about, "", *table(head, rows), ""])


if __name__ == "__main__":
    main()
