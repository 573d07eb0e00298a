"""``fastckpt completion``: the script that teaches a shell to complete commands and options."""

from __future__ import annotations

import click

from fastckpt.cli.terminal import Command


@click.command(cls=Command, name="completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash: eval "$(fastckpt completion bash)"            in ~/.bashrc
    zsh:  eval "$(fastckpt completion zsh)"             in ~/.zshrc
    fish: fastckpt completion fish > ~/.config/fish/completions/fastckpt.fish
    """
    from click.shell_completion import get_completion_class

    from fastckpt.cli.main import commands

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(commands, {}, "fastckpt", "_FASTCKPT_COMPLETE").source())
