"""``fastckpt``: the group of commands, and how errors become exit codes. Each command is a file of its own, imported
only when it is invoked: first output must not wait for what a command does not need."""

from __future__ import annotations

import contextlib
import errno
import importlib
import logging
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from fastckpt import errors
from fastckpt.cli.terminal import Group, Terminal, printable

COMMANDS = {
    "ls": "fastckpt.cli.ls",
    "show": "fastckpt.cli.show",
    "diff": "fastckpt.cli.diff",
    "restore": "fastckpt.cli.restore",
    "verify": "fastckpt.cli.verify",
    "plan": "fastckpt.cli.plan",
    "doctor": "fastckpt.cli.doctor",
    "import": "fastckpt.cli.import_",
    "completion": "fastckpt.cli.completion",
}
"""Name to the module whose ``command`` it is."""

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (errors.RepositoryNotFound, 10),
    (errors.AnotherWriter, 11),
    (errors.SnapshotNotFound, 13),
    (errors.UnsupportedVersion, 15),
    (errors.StateMismatch, 15),
    (errors.SnapshotDamaged, 14),
    (errors.FormatError, 14),
    (errors.OutOfSpace, 16),
)
"""The first that fits counts; any other error is 1."""


class Terminated(BaseException):
    """SIGTERM, as an exception so that temporary files are removed on the way out."""


class Commands(Group):
    """The commands by name; turns what they raise into one line and an exit code."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[name]).command
        return command

    def main(self, args: Sequence[str] | None = None, *positional: Any, **settings: Any) -> Any:
        arguments = list(sys.argv[1:] if args is None else args)
        terminal = Terminal()
        settings.update(standalone_mode=False, obj=terminal)
        settings["prog_name"] = "fastckpt"
        with _stderr_log(terminal):
            try:
                code = super().main(arguments, *positional, **settings) or 0
                sys.stdout.flush()  # here a closed pipe can still be answered quietly
            except BrokenPipeError:
                code = _closed_pipe()
            except SystemExit as exit_:
                raise exit_
            except BaseException as error:
                code = _report(error, terminal, as_json=terminal.json or "--json" in arguments)
        sys.exit(code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastckpt-torch", message="fastckpt %(version)s")
def commands() -> None:
    """Snapshots of training jobs: list, show, compare, verify, restore and import them; plan who writes what
    on a cluster; and ask what a directory and this machine are good for.

    REPO is a URL or a path. Where it is left out, FASTCKPT_REPOSITORY is used.

    \b
    Exit codes: 0 ok, 1 failure, 2 usage, 3 finished with warnings, 10 repository not found, 11 another writer,
    13 snapshot not found, 14 damage found, 15 incompatible, 16 out of space, 130 and 143 signals.
    """


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a name must not be the reason that nothing is shown.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    commands()


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def exit_code(error: BaseException) -> int:
    """The exit code that ARCHITECTURE.md promises for an error."""
    if isinstance(error, Terminated):
        return 143
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return 130
    if isinstance(error, click.ClickException):
        return error.exit_code
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 16
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


def _report(error: BaseException, terminal: Terminal, *, as_json: bool) -> int:
    code = exit_code(error)
    message = _message(error)
    with contextlib.suppress(BrokenPipeError):
        if terminal.verbosity >= 2:
            for line in "".join(traceback.format_exception(error)).splitlines():
                click.echo(printable(line), err=True)
        if as_json:
            terminal.message("exit_error", {"code": code, "message": message}, err=True)
        else:
            click.echo(printable(f"fastckpt: {message}"), err=True)
            if isinstance(error, click.UsageError) and error.ctx is not None:
                click.echo(f"Try '{error.ctx.command_path} --help'.", err=True)
    return code


def _message(error: BaseException) -> str:
    if isinstance(error, Terminated):
        return "terminated"
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, errors.SnapshotDamaged) and "fastckpt verify" not in str(error):
        return f"{error}. Restore an earlier step (--step), or run `fastckpt verify --all` to see what is whole"
    if isinstance(error, errors.FastckptError):
        return str(error)
    return f"internal error: {type(error).__name__}: {error} (-vv shows where; please report it)"


def _closed_pipe() -> int:
    # Whoever read the output has seen enough. What is still buffered must not be written at exit.
    sys.stdout = open("/dev/null", "w")  # noqa: SIM115
    return 1


@contextlib.contextmanager
def _stderr_log(terminal: Terminal) -> Iterator[None]:
    """The library's log goes to stderr for as long as a command runs: warnings always, the rest with ``-v``."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            level = logging.INFO if terminal.verbosity > 0 else logging.WARNING
            if record.levelno < level:
                return
            if terminal.json:
                terminal.message("log", {"level": record.levelname, "message": record.getMessage()}, err=True)
            else:
                click.echo(printable(f"fastckpt: {record.getMessage()}"), err=True)

    log = logging.getLogger("fastckpt")
    handler, level = Handler(), log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


if __name__ == "__main__":
    main()
