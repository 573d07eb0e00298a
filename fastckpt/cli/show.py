"""``fastckpt show``: what one snapshot holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from fastckpt.cli.arguments import open_repository, repository_argument, step_option
from fastckpt.cli.terminal import Command, Terminal, count_text, pass_terminal, printable, size_text

if TYPE_CHECKING:
    from fastckpt.repository.reader import Snapshot

SHOWN_BYTES_MAX = 16 * 1024
"""Larger values are not decoded for ``--values``."""
SHOWN_CHARACTERS_MAX = 500
LEVELS_SHOWN_MAX = 8
EDGES_CHARACTERS_MAX = 200
NAME_COLUMNS_MAX = 48
"""Of a fact; a longer name pushes its value to the right."""


@dataclass(frozen=True)
class _Key:
    key: str
    dtype: str
    shape: list[int]
    bytes: int
    shards: int
    tied_to: str | None


@dataclass(frozen=True)
class _Value:
    name: str
    bytes: int | None
    """None where it cannot be found."""
    ranks: list[int]
    text: str | None


@click.command(cls=Command, name="show")
@repository_argument
@step_option
@click.option("--values", is_flag=True, help="Decode small plain values.")
@click.option(
    "--environment", is_flag=True, help="The record of software and hardware at the save, in place of what was saved."
)
@pass_terminal
def command(terminal: Terminal, repo: str, step: int | None, values: bool, environment: bool) -> None:
    """Show the keys, shapes, dtypes and plain values of a snapshot, or the environment it was saved in."""
    if values and environment:
        raise click.UsageError("--values and --environment exclude each other")
    repository = open_repository(repo)
    snapshot = repository.snapshot(step)
    if environment:
        _show_environment(terminal, repository.url, snapshot)
        return
    keys, plain = _keys(snapshot), _values(snapshot, values)
    if terminal.json:
        terminal.document(_json(repository.url, snapshot, keys, plain))
        return
    layout, index = snapshot.layout, snapshot.index
    nodes = len(set(layout.rank_nodes))
    terminal.line(f"repository   {repository.url}")
    terminal.line(f"step         {snapshot.step}")
    terminal.line(f"created      {snapshot.created}")
    terminal.line(f"size         {size_text(snapshot.bytes)} ({size_text(index.stored_bytes)} new)")
    terminal.line(f"saved by     {count_text(snapshot.world_size, 'rank')} on {count_text(nodes, 'node')}")
    if planned := _placement_text(snapshot.environment):
        terminal.line(f"placement    {planned}")
    terminal.line(
        f"holds        {count_text(len(keys), 'key')} in {count_text(len(snapshot.chunks), 'chunk')} of up to "
        f"{size_text(layout.chunk_bytes)}"
    )
    if snapshot.note:
        terminal.line(f"note         {snapshot.note}")
    if snapshot.metrics:
        terminal.line("metrics      " + " ".join(f"{name}={value:g}" for name, value in snapshot.metrics.items()))
    if summary := _environment_text(snapshot.environment):
        terminal.line(f"environment  {summary} (--environment shows all)")
    if keys:
        terminal.line()
        rows = [[k.key, k.dtype, str(k.shape), *_size_cells(k)] for k in keys]
        terminal.table(["key", "dtype", "shape", "size>", "shards>"], rows)
    if plain:
        terminal.line()
        shown = [
            [v.name, "?" if v.bytes is None else size_text(v.bytes), ranks_text(v.ranks), *([v.text or ""] * values)]
            for v in plain
        ]
        terminal.table(["value", "size>", "ranks", *(["content"] * values)], shown)


def _show_environment(terminal: Terminal, url: str, snapshot: Snapshot) -> None:
    from fastckpt.repository.drift import FACTS_MAX, fact_text, facts

    found = list(itertools.islice(facts(snapshot.environment), FACTS_MAX + 1))
    whole = len(found) <= FACTS_MAX
    # Facts that stand alone come first; those of one thing stay together.
    shown = sorted(found[:FACTS_MAX], key=lambda fact: "." in fact[0])
    head = {"repository": url, "step": snapshot.step, "created": snapshot.created}
    if terminal.json:
        terminal.document({**head, "attempt": snapshot.attempt, "facts": dict(shown), "complete": whole})
        return
    for label, value in head.items():
        terminal.line(f"{label:<12} {value}")
    width = min(NAME_COLUMNS_MAX, max((len(name) for name, _ in shown), default=0))
    for _, group in itertools.groupby(shown, key=lambda fact: "." in fact[0] and fact[0].partition(".")[0]):
        terminal.line()
        for name, fact in group:
            terminal.line(f"{name:<{width}}  {fact_text(fact)}")
    if not whole:
        terminal.note(f"only the first {FACTS_MAX} facts of the record are shown")
    if not shown:
        terminal.note(f"step {snapshot.step}: no environment was recorded")


def _environment_text(record: object) -> str:
    """What is asked for first, in a line; empty where none of it is recorded."""
    from fastckpt.repository.drift import FACTS_MAX, fact_text, facts

    known = {name: fact_text(fact) for name, fact in itertools.islice(facts(record), FACTS_MAX)}
    labels = {"torch": "torch.version", "CUDA": "torch.cuda", "ROCm": "torch.hip", "Python": "python"}
    words = [f"{label} {known[name]}" for label, name in labels.items() if name in known]
    if "torch.version" in known:
        words.append(known.get("accelerator.name", "no accelerator"))
    if "code.commit" in known:
        words.append(f"commit {known['code.commit'][:12]}{' changed' * (known.get('code.dirty') == 'true')}")
    return ", ".join(words)


def _placement_text(record: dict[str, Any]) -> str:
    """How the save was planned, in a line; empty where that is not recorded, or not as we record it."""
    planned = record.get("placement")
    if not isinstance(planned, dict) or not isinstance(writers := planned.get("writers"), int):
        return ""
    text = count_text(writers, "writer")
    makespan, bound, gap, binding = (planned.get(n) for n in ("makespan_seconds", "bound_seconds", "gap", "binding"))
    if all(isinstance(number, float) for number in (makespan, bound, gap)) and isinstance(binding, list):
        edges = "; ".join(printable(str(name)[:EDGES_CHARACTERS_MAX]) for name in binding[:LEVELS_SHOWN_MAX])
        text += f", planned to take {makespan:.3g} s; none takes less than {bound:.3g} s, for {edges} (gap {gap:.2%})"
    objects, seconds = planned.get("objects"), planned.get("object_seconds")
    if isinstance(objects, int) and isinstance(seconds, float):
        text += f"; {count_text(objects, 'object')}, {seconds:.3g} s to make"
    return text


def _size_cells(key: _Key) -> list[str]:
    return [f"= {key.tied_to}", ""] if key.tied_to else [size_text(key.bytes), str(key.shards)]


def _keys(snapshot: Snapshot) -> list[_Key]:
    from fastckpt.format.dtype import item_bytes

    layout = snapshot.layout
    tied = dict(layout.aliases)
    return [
        _Key(
            layout.label(number),
            dtype,
            list(shape),
            math.prod(shape) * item_bytes(dtype),
            snapshot.chunks.shard_count(number),
            layout.label(tied[number]) if number in tied else None,
        )
        for number, (dtype, shape) in enumerate(zip(layout.dtypes, layout.shapes, strict=True))
    ]


def _values(snapshot: Snapshot, decode: bool) -> list[_Value]:
    """One for each name and content; where all ranks have the same, that is one a name."""
    from fastckpt.format.chunk import chunk_hash

    sizes: dict[str, int] = {}
    holders: dict[tuple[str, str], list[int]] = {}
    for node in range(snapshot.node_count):
        for blob in snapshot.part(node).blobs:
            sizes[chunk_hash(blob).hex()] = len(blob)
    for rank in range(snapshot.world_size):
        for name, digest in snapshot.value_digests(rank).items():
            holders.setdefault((name, digest), []).append(rank)
    return [
        _Value(name, sizes.get(digest), ranks, _content(snapshot, name, ranks[0], sizes.get(digest), decode))
        for (name, digest), ranks in sorted(holders.items(), key=lambda item: (item[0][0], item[1]))
    ]


def _content(snapshot: Snapshot, name: str, rank: int, size: int | None, decode: bool) -> str | None:
    if not decode or size is None:
        return None
    if size > SHOWN_BYTES_MAX:
        return "(large)"
    text = value_text(snapshot.value(name, rank))
    return text if len(text) <= SHOWN_CHARACTERS_MAX else text[: SHOWN_CHARACTERS_MAX - 3] + "..."


def value_text(value: object) -> str:
    """A plain value as people want to see it: tensors and arrays by dtype and shape."""
    import numpy as np

    from fastckpt.format.value import TensorReference, TensorValue, TorchDevice, TorchDtype, TorchSize

    if isinstance(value, dict):
        return "{" + ", ".join(f"{value_text(key)}: {value_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        inner = ", ".join(value_text(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, TensorValue):
        return f"tensor {value.dtype} {list(value.shape)}"
    if isinstance(value, TensorReference):
        return f"tensor {value.key}"
    if isinstance(value, np.ndarray):
        return f"array {value.dtype.name} {list(value.shape)}"
    if isinstance(value, TorchSize):
        return f"size {list(value.sizes)}"
    if isinstance(value, TorchDtype | TorchDevice):
        return value.name
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"int of {value.bit_length()} bits"  # Python refuses to print the longest
    return repr(value)


def ranks_text(ranks: Sequence[int]) -> str:
    """``0-3, 6``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ", ".join("-".join(str(end) for end in run) for run in runs)


def _json(url: str, snapshot: Snapshot, keys: list[_Key], values: list[_Value]) -> dict[str, object]:
    return {
        "repository": url,
        "step": snapshot.step,
        "created": snapshot.created,
        "attempt": snapshot.attempt,
        "bytes": snapshot.bytes,
        "new_bytes": snapshot.index.stored_bytes,
        "ranks": snapshot.world_size,
        "nodes": len(set(snapshot.layout.rank_nodes)),
        "chunks": len(snapshot.chunks),
        "chunk_bytes": snapshot.layout.chunk_bytes,
        "note": snapshot.note,
        "metrics": snapshot.metrics,
        "keys": [
            {
                "key": k.key,
                "dtype": k.dtype,
                "shape": k.shape,
                "bytes": k.bytes,
                "shards": k.shards,
                "tied_to": k.tied_to,
            }
            for k in keys
        ],
        "values": [
            {
                "name": v.name,
                "bytes": v.bytes,
                "ranks": v.ranks,
                **({} if v.text is None else {"content": printable(v.text)}),
            }
            for v in values
        ],
        "environment": snapshot.environment,
    }
