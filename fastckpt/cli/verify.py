"""``fastckpt verify``: reads everything back and names everything that is damaged."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from fastckpt.cli.arguments import open_repository, repository_argument, step_option
from fastckpt.cli.terminal import Command, Terminal, count_text, pass_terminal

if TYPE_CHECKING:
    from fastckpt.repository.reader import Snapshot
    from fastckpt.repository.repository import Repository
    from fastckpt.repository.verify import Damage, Progress


@click.command(cls=Command, name="verify")
@repository_argument
@step_option
@click.option("--all", "every", is_flag=True, help="Every snapshot, not only one.")
@pass_terminal
def command(terminal: Terminal, repo: str, step: int | None, every: bool) -> int:
    """Check the history, and every chunk of a snapshot against its hash.

    Names all damage by key, shard, object and offset, and exits with 14 if there is any.
    """
    if every and step is not None:
        raise click.UsageError("--all and --step exclude each other")
    from fastckpt.errors import SnapshotDamaged
    from fastckpt.repository.verify import Damage

    try:
        repository = open_repository(repo)
    except SnapshotDamaged as error:
        if error.object != "FORMAT":
            raise
        # Without it nothing can be opened, and nothing else is checked.
        return _report(terminal, [Damage(object="FORMAT", what=str(error))], [], {})
    return _verify(terminal, repository, step, every)


def _verify(terminal: Terminal, repository: Repository, step: int | None, every: bool) -> int:
    from fastckpt.repository.verify import check_history, readable_snapshots, strays, verify

    snapshots = readable_snapshots(repository)
    if every or (step is None and not snapshots):
        chosen = snapshots
    else:
        chosen = [s for s in snapshots if step is None or s.step == step][-1:]
        if not chosen and not (damage := check_history(repository)):
            chosen = [repository.snapshot(step)]  # raises, naming the steps there are
        elif not chosen:
            return _report(terminal, damage, chosen, {})
    what = f"step {chosen[0].step}" if len(chosen) == 1 else count_text(len(chosen), "snapshot")
    with terminal.progress(f"verifying {what}") as advance:

        def on_progress(progress: Progress) -> None:
            advance(progress.bytes_done, progress.bytes_total)

        damage = verify(repository, chosen, on_progress)
    # Only a history that can be read tells what it does not name.
    left = {} if any(one.object.startswith("decisions") for one in damage) else strays(repository)
    return _report(terminal, damage, chosen, dict(left))


def _report(terminal: Terminal, damage: list[Damage], chosen: list[Snapshot], strays: dict[str, str]) -> int:
    size = sum(snapshot.bytes for snapshot in chosen)
    if terminal.json:
        for one in damage:
            terminal.message("damage", dataclasses.asdict(one))
        summary = {
            "steps": [snapshot.step for snapshot in chosen],
            "bytes": size,
            "damage": len(damage),
            "strays": sorted(strays),
        }
        terminal.message("summary", summary)
        return 14 if damage else 0
    for one in damage:
        terminal.line(f"damaged: {one}")
    for name, why in sorted(strays.items()):
        terminal.note(f"note: {name}: {why}")
    checked = f"{count_text(len(chosen), 'snapshot')} checked"
    terminal.line(f"{checked}: {count_text(len(damage), 'place')} damaged" if damage else f"{checked}: no damage")
    return 14 if damage else 0
