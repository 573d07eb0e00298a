"""The arguments that several commands take: a repository, a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fastckpt.repository.repository import Repository
    from fastckpt.storage.store import Store


repository_argument = click.argument("repo", metavar="REPO", envvar="FASTCKPT_REPOSITORY")


def parse_step(context: click.Context, parameter: click.Parameter, text: str) -> int | None:
    """A step, or None for ``latest``."""
    if text == "latest":
        return None
    if not (text.isascii() and text.isdigit()):
        raise click.BadParameter(f"{text!r} is neither a step number nor 'latest'")
    return int(text)


step_option = click.option(
    "--step", default="latest", callback=parse_step, metavar="N", help="A step, or latest (the default)."
)


def open_store(url: str) -> Store:
    """The store at a URL; a URL that no store serves is a usage error."""
    from fastckpt.storage import open as stores

    try:
        return stores.open_store(url)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="REPO") from None


def open_repository(url: str) -> Repository:
    """The repository at a URL."""
    from fastckpt.repository.repository import Repository

    return Repository(open_store(url))
