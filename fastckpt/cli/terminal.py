"""What the commands say and how: tables on a terminal, plain lines elsewhere, JSON when asked for.

Names and notes come from the repository and are untrusted: everything printed goes through ``printable`` or JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

STATUS_SECONDS = 1.0
"""A JSON status line comes at most this often."""

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}

Advance = Callable[[int, int], None]
"""Told bytes done and bytes in all, from any thread."""


@dataclass
class Terminal:
    """How this invocation speaks. Results go to stdout; progress, notes and errors to stderr."""

    json: bool = False
    verbosity: int = 0

    def line(self, text: str = "") -> None:
        click.echo(printable(text))

    def verdict(self, state: str, text: str) -> None:
        """A line that begins with its verdict, in colour on a terminal."""
        click.echo(click.style(f"{state:<4}", fg=_COLOURS[state]) + f"  {printable(text)}")

    def note(self, text: str) -> None:
        """Something worth knowing that is not the result."""
        if self.verbosity >= 0 and not self.json:
            click.echo(printable(text), err=True)

    def document(self, content: Any) -> None:
        """The JSON document of a short command."""
        click.echo(json.dumps(content, indent=2))

    def message(self, kind: str, fields: Mapping[str, Any], *, err: bool = False) -> None:
        """One JSON line of a long command."""
        click.echo(json.dumps({"message_type": kind, **fields}), err=err)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns whose name ends in ``>`` are aligned to the right."""
        rows = [[printable(cell) for cell in row] for row in rows]
        titles = [column.rstrip(">") for column in columns]
        right = [column.endswith(">") for column in columns]
        if sys.stdout.isatty():
            _rich_table(titles, right, rows)
            return
        widths = [max(len(cell) for cell in cells) for cells in zip(titles, *rows, strict=True)]
        for row in [titles, *rows]:
            cells = (
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(row, widths, right, strict=True)
            )
            click.echo("  ".join(cells).rstrip())

    @contextlib.contextmanager
    def progress(self, what: str) -> Iterator[Advance]:
        """Shows how far something is: a bar on a terminal, JSON status lines with ``--json``, else nothing."""
        if self.json and self.verbosity >= 0:
            yield self._status_lines()
        elif self.verbosity >= 0 and not self.json and sys.stderr.isatty():
            with _rich_progress(printable(what)) as advance:
                yield advance
        else:
            yield lambda done, total: None

    def _status_lines(self) -> Advance:
        last = -STATUS_SECONDS

        def advance(done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= STATUS_SECONDS:
                last = now
                self.message("status", {"bytes_done": done, "bytes_total": total})

        return advance


def _rich_table(titles: Sequence[str], right: Sequence[bool], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title, to_right in zip(titles, right, strict=True):
        table.add_column(title, justify="right" if to_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in names are no markup
    Console().print(table)


@contextlib.contextmanager
def _rich_progress(what: str) -> Iterator[Advance]:
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(Text(what).markup, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def printable(text: str) -> str:
    """``text`` with everything escaped that could move the cursor, hide or reorder what a terminal shows."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def size_text(count: int) -> str:
    """``1.5 GiB``."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1023.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} PiB"


def count_text(count: int, noun: str) -> str:
    """``1 key``, ``2 keys``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _common_options() -> list[click.Parameter]:
    def set_json(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.ensure_object(Terminal).json |= value

    def add_verbosity(context: click.Context, _: click.Parameter, value: int) -> None:
        context.ensure_object(Terminal).verbosity += value

    def set_quiet(context: click.Context, _: click.Parameter, value: bool) -> None:
        context.ensure_object(Terminal).verbosity -= int(value)

    return [
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=set_json,
            help="JSON: one document, or JSON lines with message_type for long commands.",
        ),
        click.Option(
            ["-v", "--verbose"],
            count=True,
            expose_value=False,
            is_eager=True,
            callback=add_verbosity,
            help="Say more; twice: with tracebacks.",
        ),
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=set_quiet,
            help="No progress and no notes.",
        ),
    ]


class Command(click.Command):
    """A command with the options all of them have, so that they may stand before or after its name."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params += _common_options()


class Group(click.Group):
    """A group with the same options."""

    command_class = Command

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params += _common_options()


pass_terminal = click.make_pass_decorator(Terminal, ensure=True)
