"""``fastckpt import``: others' files into a repository, one command a kind of file."""

from __future__ import annotations

import click

from fastckpt.cli.import_torch import command as torch
from fastckpt.cli.terminal import Group


@click.group(cls=Group, name="import")
def command() -> None:
    """Read others' files into a repository."""


command.add_command(torch)
