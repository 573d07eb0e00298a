"""``fastckpt restore``: the tensors of a snapshot into a file that other tools read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from fastckpt.cli.arguments import open_repository, repository_argument, step_option
from fastckpt.cli.terminal import Command, Terminal, count_text, pass_terminal, size_text

if TYPE_CHECKING:
    from fastckpt.repository.export import FilePlan
    from fastckpt.repository.reader import Snapshot


@click.command(cls=Command, name="restore")
@repository_argument
@step_option
@click.option("--to", "path", required=True, metavar="PATH", type=click.Path(), help="The file to write.")
@click.option(
    "--format", "_kind", type=click.Choice(["safetensors"]), default="safetensors", help="The only one so far."
)
@click.option("--only", multiple=True, metavar="GLOB", help="Only keys that match; may be repeated.")
@click.option("--strip", default="", metavar="PREFIX", help="Leave this prefix out of names, such as 'model.'.")
@click.option("--force", is_flag=True, help="Overwrite PATH.")
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be written and write nothing.")
@pass_terminal
def command(
    terminal: Terminal,
    repo: str,
    step: int | None,
    path: str,
    _kind: str,
    only: tuple[str, ...],
    strip: str,
    force: bool,
    dry_run: bool,
) -> None:
    """Write the tensors of a snapshot to a .safetensors file, without torch and in little memory.

    Every byte is verified. Each key is written in full, also those that share memory in the model, so that any loader
    finds every key. A tensor that is one rank's own is called key@rank. Plain values (step counts, data loader
    positions) do not fit into such a file and are left out.
    """
    from fastckpt.repository.export import plan_file, write_file

    repository = open_repository(repo)
    snapshot = repository.snapshot(step)
    plan = plan_file(snapshot, only, strip)
    if only and not plan.tensors:
        raise click.BadParameter(
            f"no key of step {snapshot.step} matches; `fastckpt show` lists them", param_hint="--only"
        )
    if not dry_run:
        with terminal.progress(f"restoring step {snapshot.step}") as advance:
            write_file(plan, snapshot, path, force=force, on_progress=advance)
    _report(terminal, snapshot, plan, path, dry_run)


def _report(terminal: Terminal, snapshot: Snapshot, plan: FilePlan, path: str, dry_run: bool) -> None:
    values = len({name for rank in range(snapshot.world_size) for name in snapshot.value_digests(rank)})
    if terminal.json:
        summary = {
            "step": snapshot.step,
            "path": os.path.abspath(path),
            "keys": [tensor.name for tensor in plan.tensors],
            "bytes": plan.file_bytes,
            "values_left_out": values,
            "dry_run": dry_run,
        }
        terminal.message("summary", summary)
        return
    if dry_run:
        rows = [[t.name, t.dtype, str(list(t.shape)), size_text(t.bytes)] for t in plan.tensors]
        terminal.table(["name", "dtype", "shape", "size>"], rows)
    verb = "would write" if dry_run else "wrote"
    what = f"{count_text(len(plan.tensors), 'tensor')} of step {snapshot.step}"
    terminal.line(f"{verb} {what}, {size_text(plan.file_bytes)}, to {path}")
    if values:
        terminal.note(f"{count_text(values, 'plain value')} left out: a safetensors file holds tensors only")
