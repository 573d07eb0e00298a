"""``fastckpt diff``: what differs between two snapshots, or between the environments they were saved in."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from fastckpt.cli.arguments import open_repository, parse_step
from fastckpt.cli.show import ranks_text
from fastckpt.cli.terminal import Command, Terminal, count_text, pass_terminal, size_text

if TYPE_CHECKING:
    from fastckpt.repository.compare import Changed, Comparison, Form
    from fastckpt.repository.drift import Difference
    from fastckpt.repository.reader import Snapshot


def _repository_url(context: click.Context, _: click.Parameter, given: tuple[str, ...]) -> str:
    """REPO stands before two arguments that are always there, so click cannot tell by itself that it was left out."""
    url = "".join(given[:1]) or os.environ.get("FASTCKPT_REPOSITORY", "")
    if not url or len(given) > 1:
        raise click.UsageError("give one REPO, or set FASTCKPT_REPOSITORY; then STEP_A and STEP_B", context)
    return url


@dataclass(frozen=True)
class _Values:
    """Names of plain values. What is in none of these is the same in both."""

    added: list[str]
    removed: list[str]
    changed: dict[str, list[int]]
    """The ranks, of those that both jobs have, whose value differs."""


@click.command(cls=Command, name="diff")
@click.argument("repo", nargs=-1, metavar="REPO", callback=_repository_url)
@click.argument("a", metavar="STEP_A", callback=parse_step)
@click.argument("b", metavar="STEP_B", callback=parse_step)
@click.option("--environment", is_flag=True, help="What differs between the environments, in place of what was saved.")
@pass_terminal
def command(terminal: Terminal, repo: str, a: int | None, b: int | None, environment: bool) -> None:
    """Say what differs from snapshot STEP_A to STEP_B: keys, plain values, metrics and note. Either may be "latest".

    Where both are cut into the same chunks, their hashes decide and no tensor is read; "up to" then counts whole
    chunks. Otherwise (another world size, say) both are read, verified and compared byte by byte, in little memory.

    With --environment each difference has a severity: "training" may be another computation, or no longer one that can
    be repeated exactly; "numerics" is the same computation, whose results may differ in the last bits; "info" cannot
    change what training computes.

    Exits with 0 whether or not they differ: two snapshots of a run always do, and only what goes wrong is an error.
    """
    from fastckpt.repository.reader import find

    repository = open_repository(repo)
    snapshots = repository.snapshots()
    pair = find(snapshots, a, repository.url), find(snapshots, b, repository.url)
    if environment:
        _report_environment(terminal, repository.url, *pair)
    else:
        _report(terminal, repository.url, *pair)


def _report_environment(terminal: Terminal, url: str, a: Snapshot, b: Snapshot) -> None:
    from fastckpt.repository.drift import differences, fact_text

    found: list[Difference] = differences(a.environment, b.environment)
    if terminal.json:
        facts = [
            {"name": d.name, "a": d.saved, "b": d.present, "severity": d.severity, "note": d.note or None}
            for d in found
        ]
        terminal.document({"repository": url, "a": _head(a), "b": _head(b), "environment": facts})
    elif found:
        columns = ["severity", "fact", f"step {a.step}", f"step {b.step}", "note"]
        rows = [[d.severity, d.name, fact_text(d.saved), fact_text(d.present), d.note] for d in found]
        terminal.table(columns, rows)
    else:
        terminal.line(f"the environments of steps {a.step} and {b.step} do not differ")


def _report(terminal: Terminal, url: str, a: Snapshot, b: Snapshot) -> None:
    from fastckpt.repository.compare import compare

    if terminal.json:  # one document, without the status lines of commands that write many
        terminal.document(_json(url, a, b, compare(a, b), _values(a, b)))
        return
    with terminal.progress(f"comparing steps {a.step} and {b.step}") as advance:
        keys = compare(a, b, advance)
    values = _values(a, b)
    titles = [f"step {a.step}", f"step {b.step}"]
    rows = [
        *(["removed", key, str(form), "", ""] for key, form in keys.removed.items()),
        *(["added", key, "", str(form), ""] for key, form in keys.added.items()),
        *(["other form", key, str(one), str(other), ""] for key, (one, other) in keys.other_form.items()),
        *(["changed", one.key, str(one.form), str(one.form), _changed_text(one)] for one in keys.changed),
    ]
    if rows:
        terminal.table(["keys", "", *titles, "changed>"], rows)
        terminal.line()
    plain = [
        *(["removed", name, ""] for name in values.removed),
        *(["added", name, ""] for name in values.added),
        *(["changed", name, ranks_text(ranks)] for name, ranks in values.changed.items()),
    ]
    if plain:
        terminal.table(["values", "", "ranks"], plain)
        terminal.line()
    labels = [
        [name, *("" if number is None else f"{number:g}" for number in both)] for name, both in _metrics(a, b).items()
    ]
    if a.note != b.note:
        labels.append(["note", a.note, b.note])
    if labels:
        terminal.table(["labels", *titles], labels)
        terminal.line()
    terminal.line(f"from  {_head_text(a)}")
    terminal.line(f"to    {_head_text(b)}")
    counts = (
        (len(keys.changed), "changed"),
        (len(keys.added), "added"),
        (len(keys.removed), "removed"),
        (len(keys.other_form), "of another shape or dtype"),
        (keys.same, "the same"),
    )
    terminal.line("keys  " + (", ".join(f"{count} {what}" for count, what in counts if count) or "none"))


def _changed_text(changed: Changed) -> str:
    bound = "up to " if changed.by == "hashes" else ""
    return f"{bound}{size_text(changed.changed_bytes)} of {size_text(changed.form.bytes)}"


def _values(a: Snapshot, b: Snapshot) -> _Values:
    ours, theirs = ([side.value_digests(rank) for rank in range(side.world_size)] for side in (a, b))
    names = {name for rank in ours for name in rank}
    other_names = {name for rank in theirs for name in rank}
    changed = {
        name: [
            rank
            for rank, (one, other) in enumerate(zip(ours, theirs, strict=False))
            if one.get(name) != other.get(name)
        ]
        for name in sorted(names & other_names)
    }
    return _Values(
        added=sorted(other_names - names),
        removed=sorted(names - other_names),
        changed={name: ranks for name, ranks in changed.items() if ranks},
    )


def _metrics(a: Snapshot, b: Snapshot) -> dict[str, tuple[float | None, float | None]]:
    """Those that differ; None where a snapshot has none of that name."""
    both = {name: (a.metrics.get(name), b.metrics.get(name)) for name in {**a.metrics, **b.metrics}}
    return {name: pair for name, pair in both.items() if pair[0] != pair[1]}


def _head(snapshot: Snapshot) -> dict[str, object]:
    return {
        "step": snapshot.step,
        "created": snapshot.created,
        "attempt": snapshot.attempt,
        "bytes": snapshot.bytes,
        "note": snapshot.note,
    }


def _head_text(snapshot: Snapshot) -> str:
    ranks = count_text(snapshot.world_size, "rank")
    return f"step {snapshot.step}, {snapshot.created}, {size_text(snapshot.bytes)}, {ranks}"


def _json(url: str, a: Snapshot, b: Snapshot, keys: Comparison, values: _Values) -> dict[str, object]:
    return {
        "repository": url,
        "a": {**_head(a), "ranks": a.world_size},
        "b": {**_head(b), "ranks": b.world_size},
        "keys": {
            "removed": [{"key": key, **_form(form)} for key, form in keys.removed.items()],
            "added": [{"key": key, **_form(form)} for key, form in keys.added.items()],
            "other_form": [
                {"key": key, "a": _form(one), "b": _form(other)} for key, (one, other) in keys.other_form.items()
            ],
            "changed": [
                {"key": one.key, **_form(one.form), "changed_bytes": one.changed_bytes, "by": one.by}
                for one in keys.changed
            ],
            "same": keys.same,
        },
        "values": dataclasses.asdict(values),
        "metrics": {name: {"a": one, "b": other} for name, (one, other) in _metrics(a, b).items()},
    }


def _form(form: Form) -> dict[str, object]:
    return {"dtype": form.dtype, "shape": list(form.shape), "bytes": form.bytes}
