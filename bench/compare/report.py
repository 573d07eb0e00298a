"""The records of a run as Markdown tables for the README, and as plots with the limit drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.compare.harness import Runs, Spread
from bench.compare.loop import WITHOUT
from bench.compare.ways import Fastckpt, FastckptSmall, Way

OWN = Fastckpt.name
RAW_WRITE, RAW_READ, COPY = "raw direct write", "raw direct read", "one copy of the state in memory"
Records = Mapping[str, Mapping[str, Any]]
"""By question; of a question for two ranks ``<question> 2 ranks``."""


# --- what follows from the runs ------------------------------------------------------------------------------------


def raw(runs: Runs, measure: str) -> str:
    """The raw way that is the limit: the best on the whole, not the luckiest in each round."""
    return runs.best([case for case in runs.cases() if case.startswith("raw")], measure)


def peers(runs: Runs) -> list[str]:
    return [case for case in runs.cases() if case not in (OWN, WITHOUT) and not case.startswith("raw")]


def added(runs: Runs, case: str, measure: str) -> Spread:
    """What one save added to the loop: with it minus without, in the same round."""
    values, without = runs.values(case, measure), runs.values(WITHOUT, measure)
    median = runs.spread(WITHOUT, measure).median
    return Spread.of([value - without.get(number, median) for number, value in values.items()])


def targets(records: Records, asynchronous: Sequence[type[Way]]) -> list[tuple[str, str, str]]:
    """Name, what was measured and what is asked for."""
    rows = []
    for name in ("save", "save 2 ranks"):
        if name not in records:
            continue
        runs, where = Runs(records[name]["runs"]), f"{records[name]['ranks']} rank(s)"
        limit = raw(runs, "committed_seconds")
        best = runs.best(peers(runs), "committed_seconds")
        rows += [
            (
                f"P-dense, {where}: of the raw direct write",
                f"{runs.ratio(limit, OWN, 'committed_seconds'):.2f}",
                ">= 0.90",
            ),
            (
                f"P-peers, {where}: times as fast as {best}",
                f"{runs.ratio(best, OWN, 'committed_seconds'):.2f}",
                ">= 1",
            ),
        ]
    if "save" in records:
        seconds = Runs(records["save"]["runs"]).spread(OWN, "return_seconds")
        shown = f"{scaled(seconds, 1e3):.1f} ms for {records['save']['tensors']:,} tensors"
        rows.append(("P-return: `save()` returns", shown, "<= 5 ms"))
    if "many_tensors" in records:
        record = records["many_tensors"]
        seconds = Runs(record["runs"]).spread(OWN, "return_seconds")
        shown = f"{scaled(seconds, 1e6 / record['tensors']):.2f} us for {record['tensors']:,} tensors"
        rows.append(("P-return, per tensor", shown, "<= 3 us"))
    if "loop" in records:
        runs = Runs(records["loop"]["runs"])
        others = [way.name for way in asynchronous if way.name in runs.cases() and way is not Fastckpt]
        best = min(others, key=lambda case: added(runs, case, "seconds").median)
        own, other = added(runs, OWN, "seconds"), added(runs, best, "seconds")
        ratio = f"{own.median / other.median:.2f}x" if other.median > 0 else "no ratio: within the noise"
        shown = f"{ratio}: {scaled(own, 1e3):.0f} ms against {scaled(other, 1e3):.0f} ms"
        rows.append((f"P-loop: wall time a save adds, against {best}", shown, "<= 1.0x"))
    for record in records.get("memory", {}).get("ways", []):
        if record["way"] == FastckptSmall.name:
            rows.append(
                ("P-memory, above the state, with 64 MiB", f"{record['above_bytes'] / 2**20:.0f} MiB", "<= 256 MiB")
            )
    for name in ("restore", "restore 2 ranks"):
        if name not in records:
            continue
        runs, where = Runs(records[name]["runs"]), f"{records[name]['ranks']} rank(s)"
        best = runs.best(peers(runs), "seconds")
        rows += [
            (
                f"P-restore, {where}: of the raw direct read",
                f"{runs.ratio(raw(runs, 'seconds'), OWN, 'seconds'):.2f}",
                ">= 0.85",
            ),
            (f"P-restore, {where}: times as fast as {best}", f"{runs.ratio(best, OWN, 'seconds'):.2f}", ">= 1"),
        ]
    if "reshard" in records:
        record = records["reshard"]
        spread = Spread.of([number / record["bytes"] for number in record["read_bytes"]])
        rows.append(("P-reshard, 4 ranks to 3: bytes read / bytes of the state", f"{spread:.3f}", "<= 1.05"))
    if "listing" in records:
        record = records["listing"]
        spread = Spread.of(record["seconds"])
        rows.append((f"P-ls, {record['snapshots']:,} snapshots", f"{spread:.2f} s", "<= 0.5 s"))
    return rows


def scaled(spread: Spread, factor: float) -> Spread:
    return Spread(spread.median * factor, spread.least * factor, spread.most * factor)


def gb_per_second(runs: Runs, case: str, measure: str, size: int, backed: bool | None = None) -> Spread:
    return Spread.of([size / seconds / 1e9 for seconds in runs.values(case, measure, backed).values()])


# --- tables --------------------------------------------------------------------------------------------------------


def markdown(records: Records, asynchronous: Sequence[type[Way]]) -> str:
    first = next(iter(records.values()))
    machine, versions = first["machine"], first["versions"]
    lines = [
        f"`{first['command']}` at commit {first['commit'][:12]}"
        f"{' with changes' if first['changed_files'] else ''}: {machine['cpus']} cores ({machine['cpu']}), "
        f"{machine['memory_gib']:.0f} GiB, {machine['file_system']} on {machine['device']}, Linux {machine['kernel']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ". Median (least-most).",
        "",
        memory_state(records),
        "",
        *table(("target", "measured", "asked for"), targets(records, asynchronous)),
    ]
    for name in ("save", "save 2 ranks"):
        if name in records:
            lines += ["", *saves(records[name])]
    for name in ("restore", "restore 2 ranks"):
        if name in records:
            lines += ["", *restores(records[name])]
    if "loop" in records:
        lines += ["", *loops(records["loop"])]
    if "memory" in records:
        lines += ["", *memories(records["memory"])]
    for name in ("save", "save 2 ranks", "restore", "restore 2 ranks"):
        if name in records and records[name]["stages"]:
            lines += ["", *stages(name, records[name])]
    return "\n".join(lines) + "\n"


def memory_state(records: Records) -> str:
    """How many runs there are on memory in either state."""
    runs = [run for record in records.values() for run in Runs(record.get("runs", ())).all]
    unbacked = sum(not run.backed for run in runs)
    slowest = min((run.touch_gb_per_second for run in runs), default=0.0)
    if not unbacked:
        return f"All {len(runs)} runs were on backed memory, touched at {slowest:.1f} GB/s or more directly before."
    return (
        f"{unbacked} of {len(runs)} runs were on unbacked memory, touched at less than 1 GB/s directly before; they "
        "count only in rows of their own, and in ratios that have no others."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def _labelled(runs: Runs) -> list[tuple[str, bool, str]]:
    """Each case and state of memory that there are runs of, and how the row is called."""
    there = {(run.case, run.backed) for run in runs.all}
    found = [(case, backed) for backed in (True, False) for case in runs.cases() if (case, backed) in there]
    return [(case, backed, case if backed else f"{case} (unbacked memory)") for case, backed in found]


def saves(record: Mapping[str, Any]) -> list[str]:
    runs, size = Runs(record["runs"]), record["bytes"]
    rows = []
    for case, backed, label in _labelled(runs):
        returned = stall = ""
        if not case.startswith("raw"):
            returned = f"{scaled(Spread.of(list(runs.values(case, 'return_seconds', backed).values())), 1e3):.1f}"
            stall = f"{scaled(Spread.of(list(runs.values(case, 'stall_seconds', backed).values())), 1e3):.0f}"
        durable = gb_per_second(runs, case, "committed_seconds", size, backed)
        cpu = Spread.of(list(runs.values(case, "cpu_seconds", backed).values()))
        rows.append((label, f"{durable:.2f}", returned, stall, f"{cpu:.2f}"))
    head = (
        f"save, {record['ranks']} rank(s), {size / 2**30:.2f} GiB",
        *("durable, GB/s", "returns, ms", "optimizer may step, ms", "CPU, s"),
    )
    return table(head, rows)


def restores(record: Mapping[str, Any]) -> list[str]:
    runs, size = Runs(record["runs"]), record["bytes"]
    rows = []
    for case, backed, label in _labelled(runs):
        cpu = Spread.of(list(runs.values(case, "cpu_seconds", backed).values()))
        rows.append((label, f"{gb_per_second(runs, case, 'seconds', size, backed):.2f}", f"{cpu:.2f}"))
    return table((f"cold restore, {record['ranks']} rank(s), {size / 2**30:.2f} GiB", "GB/s", "CPU, s"), rows)


def loops(record: Mapping[str, Any]) -> list[str]:
    runs = Runs(record["runs"])
    rows = []
    for case in runs.cases():
        if case == WITHOUT:
            continue
        still = scaled(runs.spread(case, "stood_still_seconds"), 1e3)
        wall, cpu = scaled(added(runs, case, "seconds"), 1e3), added(runs, case, "cpu_seconds")
        label = case if runs.backed(case) else f"{case} (unbacked memory)"
        rows.append((label, f"{wall:.0f}", f"{still:.0f}", f"{cpu:.2f}"))
    step = runs.spread(WITHOUT, "seconds").median / record["steps"]
    head = (
        f"one save in {record['steps']} training steps of {step * 1e3:.0f} ms, {record['bytes'] / 1e6:.0f} MB",
        *("wall time added, ms", "loop stood still, ms", "CPU added, s"),
    )
    return table(head, rows)


def memories(record: Mapping[str, Any]) -> list[str]:
    rows = [(row["way"], f"{row['above_bytes'] / 2**20:.0f}") for row in record["ways"]]
    size = record["ways"][0]["bytes"]
    return table((f"memory above a state of {size / 2**30:.2f} GiB, all processes", "MiB"), rows)


def stages(name: str, record: Mapping[str, Any]) -> list[str]:
    """What binds: the stages of the last run, on rank 0; those of threads side by side take longer together than from
    begin to end."""
    rows = [
        (stage, f"{begin * 1e3:.1f}", f"{end * 1e3:.1f}", f"{together * 1e3:.1f}")
        for stage, (begin, end, together) in sorted(record["stages"].items(), key=lambda item: item[1])
    ]
    head = (f"{name.split()[0]}, rank 0 of {record['ranks']}: stage", "begins, ms", "ends, ms", "threads together, ms")
    return table(head, rows)


# --- plots ---------------------------------------------------------------------------------------------------------


def plots(records: Records, directory: Path) -> list[Path]:
    """Time to committed, stall and restore, each way a bar from the least to the most, and the limit a line."""
    drawn = []
    if "save" in records:
        record = records["save"]
        runs = Runs(record["runs"])
        limit = runs.spread(raw(runs, "committed_seconds"), "committed_seconds").median
        drawn += [
            bars(directory / "committed.svg", record, "committed_seconds", "time to committed", limit, RAW_WRITE),
            bars(directory / "stall.svg", record, "stall_seconds", "stall", record["copy_seconds"], COPY),
        ]
    if "restore" in records:
        record = records["restore"]
        runs = Runs(record["runs"])
        limit = runs.spread(raw(runs, "seconds"), "seconds").median
        drawn.append(bars(directory / "restore.svg", record, "seconds", "cold restore", limit, RAW_READ))
    return drawn


def bars(
    path: Path, record: Mapping[str, Any], measure: str, title: str, limit_seconds: float, limit_name: str
) -> Path:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    runs = Runs(record["runs"])
    cases = [OWN, *peers(runs)]
    spreads = [runs.spread(case, measure) for case in cases]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(cases) + 1.4), layout="constrained")
    medians = [spread.median for spread in spreads]
    errors = [[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]]
    colors = ["tab:green" if case == OWN else "tab:gray" for case in cases]
    labels = [case if runs.backed(case) else f"{case} (unbacked)" for case in cases]
    axes.barh(labels, medians, xerr=errors, color=colors, ecolor="black", capsize=3)
    axes.invert_yaxis()
    axes.axvline(limit_seconds, color="tab:red", linestyle="--", label=limit_name)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    axes.set_title(f"{title}, {record['ranks']} rank, {record['bytes'] / 2**30:.2f} GiB")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
