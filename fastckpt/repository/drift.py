"""What differs between the environment a snapshot was saved in and another, and how much that matters.

    differences(saved, now) -> list[Difference]           the facts that differ, the gravest first
    describe(found) -> list[tuple[Severity, str]]         for a log: a line for each, and one for all that is "info"

Pure functions on two records as ``job/environment`` makes them. ``now`` is made with the mesh and the nodes of the job,
since a record without a mesh says that there is none. Records may come from another version, or from anybody: whatever
their shape, nothing raises, and the work is bounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Severity = Literal["training", "numerics", "info"]

SEVERITIES: Final[dict[Severity, str]] = {
    "training": "may be another computation, or no longer one that can be repeated exactly",
    "numerics": "the same computation, whose results may differ in the last bits",
    "info": "cannot change what training computes",
}
"""What each severity means, the gravest first."""

Fact = str | int | float | list[object]
"""A value of a record that is not a map; a list holds no maps or lists."""

FACTS_MAX: Final = 1000
"""Facts of a record that are compared; those we make have a tenth of it."""
LINES_MAX: Final = 20
"""Lines for differences that are more than "info", and facts in the line for those that are not."""

_DEPTH_MAX = 16
_NAME_CHARACTERS_MAX = 80
_TEXT_CHARACTERS_MAX = 160
_ITEMS_MAX = 16
_INT_BITS_MAX = 256
"""Python refuses to print the longest ints."""


@dataclass(frozen=True)
class Difference:
    """A fact that differs. None where the record has none of that name."""

    name: str
    """Dotted: ``torch.version``."""
    saved: Fact | None
    present: Fact | None
    severity: Severity
    note: str = ""
    """What the two values alone do not say."""

    def __str__(self) -> str:
        text = f"{self.name} was {fact_text(self.saved)}, is {fact_text(self.present)}"
        return f"{text} ({self.note})" if self.note else text


@dataclass(frozen=True)
class _Rule:
    severity: Severity
    none: bool = False
    """Whether a record without this fact says that there is none of it; otherwise it only was not found out."""
    follows: str = ""
    """A fact that, where it differs, brings a difference of this one with it."""


_RULES: Final = {
    "world_size": _Rule("training"),
    "ranks_per_node": _Rule("numerics", follows="world_size"),
    "mesh.shape": _Rule("numerics", none=True),
    "mesh.dim_names": _Rule("numerics"),
    "code.commit": _Rule("training", none=True),
    "code.dirty": _Rule("training", follows="code.commit"),
    "determinism": _Rule("numerics"),
    "determinism.deterministic_warn_only": _Rule("numerics", follows="determinism.deterministic_algorithms"),
    "determinism.default_dtype": _Rule("training"),
    "determinism.float32_matmul_precision": _Rule("training"),
    "determinism.cuda_matmul_fp32_precision": _Rule("training", follows="determinism.float32_matmul_precision"),
    "determinism.cudnn_conv_fp32_precision": _Rule("training"),
    "determinism.cudnn_rnn_fp32_precision": _Rule("training"),
    "determinism.fp16_accumulation": _Rule("training"),
    "determinism.fp16_reduced_precision_reduction": _Rule("training"),
    "determinism.bf16_reduced_precision_reduction": _Rule("training"),
    "accelerator.type": _Rule("numerics", none=True),
    "accelerator.name": _Rule("numerics", follows="accelerator.type"),
    "accelerator.driver": _Rule("numerics", follows="accelerator.type"),
    "accelerator.count": _Rule("info", follows="accelerator.type"),
    "python": _Rule("numerics"),
    "torch": _Rule("numerics"),
    "torch.git_version": _Rule("numerics", follows="torch.version"),
    "torch.cuda": _Rule("numerics", none=True),
    "torch.hip": _Rule("numerics", none=True),
    "torch.xpu": _Rule("numerics", none=True),
    "torch.mtia": _Rule("numerics", none=True),
    "distributions": _Rule("numerics", none=True),
    "distributions.fastckpt-torch": _Rule("info"),
    "distributions.safetensors": _Rule("info"),
    "platform": _Rule("info"),
    "platform.system": _Rule("numerics"),
    "platform.machine": _Rule("numerics"),
    "platform.cpu_capability": _Rule("numerics"),
    "platform.libc": _Rule("numerics"),
    "host": _Rule("info"),
    "placement": _Rule("info"),
}
"""By name, or by the name of what a fact is part of."""

_UNKNOWN: Final = _Rule("numerics")
"""Of facts that another version records: worth a line, and no alarm."""

_EXACT: Final = {
    "determinism.deterministic_algorithms": True,
    "determinism.deterministic_warn_only": False,
    "determinism.cudnn_deterministic": True,
}
"""Flags, and what they are where runs can be repeated exactly. Giving that up is graver than taking it on."""

_COMPLETE: Final = "torch.version"
"""A record without it was not made by a training job, and what else it lacks means nothing."""


def differences(saved: object, now: object) -> list[Difference]:
    """The facts that differ between two records, the gravest first, else in the order of the records."""
    before = dict(itertools.islice(facts(saved), FACTS_MAX))
    after = dict(itertools.islice(facts(now), FACTS_MAX))
    found: dict[str, Difference] = {}
    for name in {**before, **after}:
        a, b, rule = before.get(name), after.get(name), _rule(name)
        if a is None or b is None:
            if rule.none and _COMPLETE in (before if a is None else after):
                found[name] = Difference(name, a, b, rule.severity)
        elif not _same(a, b):
            lost = name in _EXACT and _same(a, _EXACT[name])
            found[name] = Difference(name, a, b, "training" if lost else rule.severity)
    found = {name: one for name, one in found.items() if not (_rule(name).follows and _rule(name).follows in found)}
    if "code.commit" not in found and before.get("code.dirty") is True is after.get("code.dirty"):
        note = "the same commit, changed both times; whether by the same changes is not recorded"
        found["code.dirty"] = Difference("code.dirty", True, True, "training", note)
    gravity = list(SEVERITIES)
    return sorted(found.values(), key=lambda one: gravity.index(one.severity))


def describe(found: Sequence[Difference]) -> list[tuple[Severity, str]]:
    """Lines for a log, with their severity: one for each difference that matters, then one for all the others. At most
    ``LINES_MAX`` + 2, each of a few hundred characters or, the last, a few thousand."""
    grave = [one for one in found if one.severity != "info"]
    slight = [one for one in found if one.severity == "info"]
    lines: list[tuple[Severity, str]] = [(one.severity, str(one)) for one in grave[:LINES_MAX]]
    if left := grave[LINES_MAX:]:
        lines.append((left[0].severity, f"{len(left)} more differences"))
    if slight:
        more = f"; {len(slight) - LINES_MAX} more differences" if len(slight) > LINES_MAX else ""
        lines.append(("info", "; ".join(str(one) for one in slight[:LINES_MAX]) + more))
    return lines


def facts(record: object) -> Iterator[tuple[str, Fact]]:
    """The facts of a record by dotted name, in its order. A list is one fact, unless it holds maps or lists: then its
    items have their position for a name. A null is no fact; nor is anything that is more than 16 deep."""
    if isinstance(record, dict):
        yield from _facts("", record, _DEPTH_MAX)


def fact_text(value: Fact | None) -> str:
    """A fact as people read it, in at most some hundred printable characters."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        items = [fact_text(item) if isinstance(item, str | int | float) else "null" for item in value[:_ITEMS_MAX]]
        more = f", ... {len(value)} in all" if len(value) > _ITEMS_MAX else ""
        return _shown(f"[{', '.join(items)}{more}]", _TEXT_CHARACTERS_MAX)
    if isinstance(value, int) and value.bit_length() > _INT_BITS_MAX:
        return f"an int of {value.bit_length()} bits"
    return _shown(str(value), _TEXT_CHARACTERS_MAX)


def _facts(name: str, value: object, depth: int) -> Iterator[tuple[str, Fact]]:
    inner: Iterator[tuple[str, object]]
    if isinstance(value, dict):
        inner = ((_shown(key, _NAME_CHARACTERS_MAX), item) for key, item in value.items() if isinstance(key, str))
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        inner = ((str(position), item) for position, item in enumerate(value))
    else:
        if isinstance(value, str | int | float | list):
            yield name, value
        return
    if depth:
        for key, item in inner:
            yield from _facts(f"{name}.{key}" if name else key, item, depth - 1)


def _rule(name: str) -> _Rule:
    while name:
        if name in _RULES:
            return _RULES[name]
        name = name.rpartition(".")[0]
    return _UNKNOWN


def _same(a: object, b: object) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) is isinstance(b, bool) and a == b


def _shown(text: str, characters_max: int) -> str:
    shown = text[: characters_max + 1]
    if not shown.isprintable():
        shown = shown.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= characters_max else shown[: characters_max - 3] + "..."
