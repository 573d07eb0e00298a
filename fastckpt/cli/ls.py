"""``fastckpt ls``: the snapshots of a repository. Without ``--long`` it reads the history and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from fastckpt.cli.arguments import open_repository, repository_argument
from fastckpt.cli.terminal import Command, Terminal, pass_terminal, size_text

if TYPE_CHECKING:
    from fastckpt.repository.reader import Snapshot


METRICS_SHOWN_MAX = 4
NOTE_CHARACTERS_MAX = 80
"""A row stays a row; ``fastckpt show`` has the rest."""


@dataclass
class _Row:
    snapshot: Snapshot
    state: str
    new_bytes: int | None = None
    ranks: int | None = None
    damage: str = ""


@click.command(cls=Command, name="ls")
@repository_argument
@click.option("-l", "--long", is_flag=True, help="Also new bytes and ranks, which takes reading each snapshot's index.")
@pass_terminal
def command(terminal: Terminal, repo: str, long: bool) -> int:
    """List the snapshots, oldest first.

    The state is "latest" for the one that a restore takes, and "superseded" where the same step was saved again later.
    Metrics and long notes are cut; show and --json have all of them.
    """
    repository = open_repository(repo)
    rows = _rows(repository.snapshots())
    if long:
        _read_details(rows)
    if terminal.json:
        terminal.document({"repository": repository.url, "snapshots": [_json(row, long) for row in rows]})
    elif not rows:
        terminal.note(f"{repository.url}: no snapshot yet")
    else:
        columns = ["step>", "created", "size>", *(["new>", "ranks>"] if long else []), "state", "note"]
        terminal.table(columns, [_cells(row, long) for row in rows])
    for row in rows:
        if row.damage:
            terminal.note(f"step {row.snapshot.step}: {row.damage}")
    return 14 if any(row.damage for row in rows) else 0


def _rows(snapshots: list[Snapshot]) -> list[_Row]:
    last = {snapshot.step: snapshot for snapshot in snapshots}
    rows = [_Row(snapshot, "" if last[snapshot.step] is snapshot else "superseded") for snapshot in snapshots]
    if rows:
        rows[-1].state = "latest"
    return rows


def _read_details(rows: list[_Row]) -> None:
    from fastckpt.errors import FormatError, SnapshotDamaged

    ranks: dict[str, int] = {}  # by layout: most snapshots share one
    for row in rows:
        try:
            index = row.snapshot.index
            row.new_bytes = index.stored_bytes
            if index.layout not in ranks:
                ranks[index.layout] = row.snapshot.world_size
            row.ranks = ranks[index.layout]
        except (SnapshotDamaged, FormatError) as error:  # it must not hide the other snapshots
            row.state, row.damage = "damaged", str(error)


def _cells(row: _Row, long: bool) -> list[str]:
    snapshot = row.snapshot
    details = ["" if row.new_bytes is None else size_text(row.new_bytes), "" if row.ranks is None else str(row.ranks)]
    size = size_text(snapshot.bytes)
    return [str(snapshot.step), snapshot.created, size, *(details if long else []), row.state, _labels(snapshot)]


def _labels(snapshot: Snapshot) -> str:
    """Metrics and note, cut to what fits into a row."""
    metrics, note = list(snapshot.metrics.items()), snapshot.note
    words = [f"{_cut(name)}={value:g}" for name, value in metrics[:METRICS_SHOWN_MAX]]
    if left := metrics[METRICS_SHOWN_MAX:]:
        words.append(f"(and {len(left)} more)")
    return " ".join([*words, *([_cut(note)] if note else [])])


def _cut(text: str) -> str:
    return text if len(text) <= NOTE_CHARACTERS_MAX else text[: NOTE_CHARACTERS_MAX - 3] + "..."


def _json(row: _Row, long: bool) -> dict[str, object]:
    snapshot = row.snapshot
    document: dict[str, object] = {
        "step": snapshot.step,
        "created": snapshot.created,
        "bytes": snapshot.bytes,
        "state": row.state,
        "attempt": snapshot.attempt,
        "metrics": snapshot.metrics,
        "note": snapshot.note,
    }
    if long:
        document |= {"new_bytes": row.new_bytes, "ranks": row.ranks, "damage": row.damage}
    return document
