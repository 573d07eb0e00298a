"""The form of a layout in TOML, for planning without a job: what a model's ranks hold, in a few lines.

    [model]                              # a decoder-only transformer by its dimensions
    layers = 126
    hidden = 16_384
    intermediate = 53_248                # of the feed-forward; 4 x hidden where it is left out
    gated = true                         # the feed-forward has three matrices, not two
    heads = 128                          # with key_value_heads: 8 of 128 heads have keys and values of their own
    key_value_heads = 8
    vocabulary = 128_256
    tied_embeddings = false              # the output layer is the embedding
    experts = 0                          # feed-forwards in each layer, instead of one
    expert_intermediate = 2048           # of each; as intermediate where it is left out
    dense_layers = 0                     # the first layers have one feed-forward all the same

    [model]                              # or by totals, of which each layer gets an equal part
    layers = 80
    parameters = 70e9                    # those of experts not among them
    experts = 64                         # in each layer
    expert_parameters = 600e9            # of all experts of all layers

    [parallel]
    tp = 8                               # tensor, pipeline, data and expert parallelism; 1 where left out
    pp = 16
    dp = 128                             # a multiple of ep: each expert is held by tp x dp / ep ranks
    ep = 1
    order = "tp-ep-dp-pp"                # neighbours first; ep splits dp

    [state]                              # bytes for each parameter; a list has one number for each tensor of state
    replicated_bytes_per_parameter = [2] # held by all data-parallel ranks
    sharded_bytes_per_parameter = [4, 4, 4]  # split between them, as ZeRO and FSDP do: each byte on one rank

    [[shards]]                           # and, or instead, shards by themselves
    bytes = "8 MB"
    count = 4                            # 1 where it is left out
    holders = "0-3,8"                    # ranks; or "all"

Tensors are split by tp as Megatron-LM does; norms and routers are on all ranks of a stage. Sizes that do not divide are
rounded up, as padding does. Where there is no [parallel], ``ranks = 16`` says how many there are.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from fastckpt.plan.holdings import BYTES_MAX, Alike, Holdings, gather
from fastckpt.topology.host_list import expand_numbers
from fastckpt.topology.lines import Path, line_of
from fastckpt.topology.nearest import nearest
from fastckpt.topology.plane import RANKS_MAX
from fastckpt.topology.shown import shown

TEXT_CHARACTERS_MAX: Final = 2**24
CLASSES_MAX: Final = 2**22
STAGES_MAX: Final = 2**14
HOLDERS_MAX: Final = 4 * RANKS_MAX
"""Ranks of all sets that [[shards]] name."""
COUNT_MAX: Final = 10**9
"""Of layers, dimensions, experts and shards of a kind."""
PARAMETERS_MAX: Final = 10**17
TENSORS_MAX: Final = 16
"""Tensors of state for each parameter."""

_UNITS: Final = {
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate(["", "k", "M", "G", "T", "P"])},
    **{f"{prefix}iB": 2 ** (10 * power) for power, prefix in enumerate(["K", "M", "G", "T", "P"], 1)},
}
_BYTES: Final = re.compile(r"\s*([0-9]{1,19})(?:\.([0-9]{1,9}))?\s*([A-Za-z]{1,3})\s*")
_TOTALS: Final = ("layers", "parameters", "experts", "expert_parameters")
_DIMENSIONS: Final = (
    *("layers", "hidden", "intermediate", "gated", "heads", "key_value_heads", "vocabulary", "tied_embeddings"),
    *("experts", "expert_intermediate", "dense_layers"),
)
_AXES: Final = ("tp", "ep", "dp", "pp")


def read_layout(text: str, source: str) -> Holdings:
    """What the layout file ``source`` says, whose text this is.

    Raises ``ValueError`` with file, line and field, and what to write instead.
    """
    if len(text) > TEXT_CHARACTERS_MAX:
        raise ValueError(f"{source}: {len(text)} characters are more than a layout file may have")
    try:
        root = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{source}: is not TOML: {error}") from None
    return _Reader(root, text, source).holdings()


@dataclass(frozen=True)
class _Tensors:
    """What a rank of a stage holds of the tensors of one kind: elements -> how many tensors."""

    split: Counter[int]
    """By tp; the same on all data-parallel ranks."""
    whole: Counter[int]
    """On all ranks of the stage: norms, routers."""
    expert: Counter[int]
    """By tp and ep."""


class _Reader:
    def __init__(self, root: Mapping[str, Any], text: str, source: str) -> None:
        self._root, self._text, self._source = root, text, source

    def holdings(self) -> Holdings:
        self._known(("model", "parallel", "state", "shards", "ranks"), self._root, ())
        parts: list[Alike] = []
        fixed: npt.NDArray[np.int64] | None = None
        if "model" in self._root or "parallel" in self._root or "state" in self._root:
            if "ranks" in self._root:
                self._fail(("ranks",), "stands beside [parallel], which says how many ranks there are; leave one out")
            parallel = self._parallel()
            ranks = math.prod(parallel.values())
            parts, fixed = self._transformer(parallel, ranks)
        elif "shards" in self._root:
            ranks = self._count(self._root, (), "ranks", most=RANKS_MAX)
        else:
            self._fail((), "has neither [model] nor [[shards]]: say what the ranks hold")
        parts += self._shards(ranks)
        try:
            return gather(ranks, parts, fixed)
        except ValueError as error:
            self._fail((), str(error))

    # A transformer.

    def _parallel(self) -> dict[str, int]:
        """Size of each axis; that of dp without ep."""
        table = self._table("parallel")
        self._known((*_AXES, "order"), table, ("parallel",))
        sizes = {
            axis: self._count(table, ("parallel",), axis, 1, STAGES_MAX if axis == "pp" else RANKS_MAX)
            for axis in _AXES
        }
        if sizes["dp"] % sizes["ep"]:
            self._fail(("parallel", "ep"), f"is {sizes['ep']}, which does not divide dp = {sizes['dp']}")
        sizes["dp"] //= sizes["ep"]
        if math.prod(sizes.values()) > RANKS_MAX:
            self._fail(("parallel",), f"is {math.prod(sizes.values())} ranks; at most {RANKS_MAX} are possible")
        order = table.get("order", "tp-ep-dp-pp")
        axes = order.split("-") if isinstance(order, str) else []
        if "ep" not in axes and "dp" in axes:
            axes.insert(axes.index("dp"), "ep")
        axes += [axis for axis in _AXES if axis not in axes and sizes[axis] == 1]
        if sorted(axes) != sorted(_AXES):
            self._fail(
                ("parallel", "order"), f'is {shown(order)}: name tp, dp, pp and perhaps ep once each, "tp-ep-dp-pp"'
            )
        return {axis: sizes[axis] for axis in axes}

    def _transformer(self, parallel: Mapping[str, int], ranks: int) -> tuple[list[Alike], npt.NDArray[np.int64]]:
        # Ranks by stage, tp, ep and replica.
        axes = list(parallel)[::-1]
        grid = np.arange(ranks).reshape([parallel[axis] for axis in axes])
        grid = grid.transpose([axes.index(axis) for axis in ("pp", "tp", "ep", "dp")])
        state = self._table("state")
        self._known(("replicated_bytes_per_parameter", "sharded_bytes_per_parameter"), state, ("state",))
        replicated = self._bytes_per_parameter(state, "replicated_bytes_per_parameter")
        sharded = self._bytes_per_parameter(state, "sharded_bytes_per_parameter")
        if not replicated and not sharded:
            self._fail(("state",), "says no bytes: give replicated_bytes_per_parameter, sharded_..., or both")
        classes = parallel["pp"] * (1 + parallel["tp"] * (1 + parallel["ep"]))
        if classes > CLASSES_MAX:
            self._fail(("parallel",), f"makes {classes} sets of ranks; at most {CLASSES_MAX} can be planned")
        parts: list[Alike] = []
        fixed = np.zeros(ranks, np.int64)
        for stage, tensors in enumerate(self._stages(parallel)):
            pp = grid[stage]
            tp = len(pp)
            for tensors_of_kind, holders in (
                (tensors.split, pp.reshape(tp, -1)),
                (tensors.whole, pp.reshape(1, -1)),
                (tensors.expert, pp.reshape(tp * parallel["ep"], -1)),
            ):
                shards: Counter[int] = Counter()
                for elements, count in tensors_of_kind.items():
                    for size in replicated:
                        shards[math.ceil(elements * size)] += count
                if shards.total():
                    parts.append(Alike(np.sort(holders, axis=1), shards))
                elements = sum(elements * count for elements, count in tensors_of_kind.items())
                each = math.ceil(elements * sum(sharded) / holders.shape[1])
                if each * ranks > BYTES_MAX:
                    self._fail(("state",), "is more than 2^62 bytes")
                fixed[holders.ravel()] += each
        return parts, fixed

    def _stages(self, parallel: Mapping[str, int]) -> Sequence[_Tensors]:
        path = ("model",)
        model = self._table("model")
        self._known(_DIMENSIONS + _TOTALS, model, path)
        by_totals = "parameters" in model or "expert_parameters" in model
        for name in model:
            if by_totals and name not in _TOTALS:
                self._fail((*path, name), "stands beside totals: give a model's dimensions, or parameters in all")
        layers = self._count(model, path, "layers")
        stages, tp, ep = parallel["pp"], parallel["tp"], parallel["ep"]
        if layers < stages:
            self._fail((*path, "layers"), f"is {layers}, fewer than the {stages} stages of parallel.pp")
        experts = self._count(model, path, "experts", 0, least=0)
        if experts % ep:
            self._fail((*path, "experts"), f"is {experts}, which parallel.ep = {ep} does not divide")
        make = self._by_totals if by_totals else self._by_dimensions
        first, layer, last = make(model, tp, experts // ep, layers)
        result = []
        begin = 0
        for stage in range(stages):
            end = layers * (stage + 1) // stages
            tensors = _Tensors(Counter(), Counter(), Counter())
            _add(tensors, first, int(stage == 0))
            for moe, count in layer(begin, end):
                _add(tensors, moe, count)
            _add(tensors, last, int(stage == stages - 1))
            result.append(tensors)
            begin = end
        return result

    def _by_totals(self, model: Mapping[str, Any], tp: int, experts: int, layers: int) -> _Kinds:
        path = ("model",)
        dense = self._number(model, path, "parameters", PARAMETERS_MAX)
        split = Counter({_ceil(dense, layers * tp): 1})
        expert: Counter[int] = Counter()
        if experts:
            total = self._number(model, path, "expert_parameters", PARAMETERS_MAX)
            all_experts = self._count(model, path, "experts")
            expert[_ceil(total, layers * all_experts * tp)] = experts
        elif "expert_parameters" in model:
            self._fail((*path, "expert_parameters"), "needs experts, the number of them in each layer")
        one = _Tensors(split, Counter(), expert)
        nothing = _Tensors(Counter(), Counter(), Counter())
        return nothing, lambda begin, end: [(one, end - begin)], nothing

    def _by_dimensions(self, model: Mapping[str, Any], tp: int, experts: int, layers: int) -> _Kinds:
        path = ("model",)
        hidden = self._count(model, path, "hidden")
        intermediate = self._count(model, path, "intermediate", 4 * hidden)
        vocabulary = self._count(model, path, "vocabulary", 0, least=0)
        heads = self._count(model, path, "heads", 1)
        groups = self._count(model, path, "key_value_heads", heads)
        if groups > heads:
            self._fail((*path, "key_value_heads"), f"is {groups}, more than heads = {heads}")
        matrices = 3 if self._flag(model, path, "gated") else 2
        all_experts = self._count(model, path, "experts", 0, least=0)
        expert_intermediate = self._count(model, path, "expert_intermediate", intermediate)
        dense_layers = self._count(model, path, "dense_layers", 0 if all_experts else layers, least=0)

        attention = Counter([_ceil(hidden * (hidden + 2 * (hidden * groups // heads)), tp), _ceil(hidden * hidden, tp)])
        norms = Counter({hidden: 2})
        feed_forward = Counter({_ceil(hidden * intermediate, tp): matrices})
        dense = _Tensors(attention + feed_forward, norms, Counter())
        expert = Counter({_ceil(hidden * expert_intermediate, tp): matrices * experts})
        sparse = _Tensors(attention, norms + Counter({hidden * all_experts: 1}), expert)

        def layer(begin: int, end: int) -> list[tuple[_Tensors, int]]:
            kept = min(max(dense_layers - begin, 0), end - begin)
            return [(dense, kept), (sparse, end - begin - kept)]

        embedding = Counter({_ceil(vocabulary * hidden, tp): 1}) if vocabulary else Counter()
        output = Counter() if self._flag(model, path, "tied_embeddings") else embedding
        return (
            _Tensors(embedding, Counter(), Counter()),
            layer,
            _Tensors(output, Counter({hidden: 1}), Counter()),
        )

    # Shards by themselves.

    def _shards(self, ranks: int) -> list[Alike]:
        listed = self._root.get("shards", [])
        if not isinstance(listed, list) or not all(isinstance(table, Mapping) for table in listed):
            self._fail(("shards",), "must be tables: write [[shards]] above each")
        by_holders: dict[str, tuple[npt.NDArray[np.intp], Counter[int]]] = {}
        room = HOLDERS_MAX
        for number, table in enumerate(listed):
            path: Path = ("shards", number)
            self._known(("bytes", "count", "holders"), table, path)
            size = self._bytes(table, (*path, "bytes"))
            count = self._count(table, path, "count", 1)
            text = table.get("holders")
            if not isinstance(text, str):
                self._fail((*path, "holders"), 'must say which ranks hold it: "0-3,8", or "all"')
            if text not in by_holders:
                runs = self._runs(text, (*path, "holders"), ranks)
                room -= sum(map(len, runs))
                if room < 0:
                    self._fail((*path, "holders"), f"and those before it are more than {HOLDERS_MAX} ranks in all")
                by_holders[text] = np.concatenate([np.arange(run.start, run.stop) for run in runs]), Counter()
            by_holders[text][1][size] += count
        return [Alike(holders[np.newaxis], shards) for holders, shards in by_holders.values()]

    def _runs(self, text: str, path: Path, ranks: int) -> list[range]:
        """Ranks in ascending order."""
        if text == "all":
            return [range(ranks)]
        try:
            runs = sorted(expand_numbers(text, RANKS_MAX), key=lambda run: run.start)
        except ValueError as error:
            self._fail(path, str(error))
        for run, after in itertools.pairwise([*runs, range(ranks, ranks)]):
            if run.stop > ranks:
                self._fail(path, f"names rank {run.stop - 1}, but ranks are 0 to {ranks - 1}")
            if run.stop > after.start:
                self._fail(path, f"names rank {after.start} twice")
        return runs

    # Fields.

    def _table(self, name: str) -> Mapping[str, Any]:
        if name not in self._root:
            self._fail((), f"lacks [{name}]: a layout by [model] has [parallel] and [state], too")
        table = self._root[name]
        if not isinstance(table, Mapping):
            self._fail((name,), f"must be a table: write [{name}]")
        return table

    def _known(self, names: Sequence[str], table: Mapping[str, Any], path: Path) -> None:
        for name in table:
            if name not in names:
                self._fail((*path, name), f"is unknown: {nearest(name, names)}")

    def _count(
        self,
        table: Mapping[str, Any],
        path: Path,
        name: str,
        default: int | None = None,
        most: int = COUNT_MAX,
        least: int = 1,
    ) -> int:
        if name not in table and default is not None:
            return default
        value = table.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            given = "is missing" if value is None else f"is {shown(value)}"
            self._fail((*path, name), f"{given}: give a whole number from {least} to {most}")
        return value

    def _number(self, table: Mapping[str, Any], path: Path, name: str, most: int) -> int:
        """A whole number that may be written as 174e12."""
        value = table.get(name)
        right = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or not right or not 1 <= value <= most or value != int(value):
            given = "is missing" if value is None else f"is {shown(value)}"
            self._fail((*path, name), f"{given}: give a number from 1 to {most:.0e}, like 70e9")
        return int(value)

    def _flag(self, table: Mapping[str, Any], path: Path, name: str) -> bool:
        value = table.get(name, False)
        if not isinstance(value, bool):
            self._fail((*path, name), f"is {shown(value)}: give true or false")
        return value

    def _bytes_per_parameter(self, table: Mapping[str, Any], name: str) -> list[float]:
        value = table.get(name, [])
        sizes = value if isinstance(value, list) else [value]
        right = all(isinstance(size, int | float) and not isinstance(size, bool) and 0 < size <= 1024 for size in sizes)
        if not right or len(sizes) > TENSORS_MAX:
            what = f"give bytes for each parameter, or a list of up to {TENSORS_MAX} such numbers, like [2, 4, 4, 4]"
            self._fail(("state", name), f"is {shown(value)}: {what}")
        return sizes

    def _bytes(self, table: Mapping[str, Any], path: Path) -> int:
        value = table.get("bytes")
        size = -1
        if isinstance(value, int) and not isinstance(value, bool):
            size = value
        elif isinstance(value, str) and (match := _BYTES.fullmatch(value)) and match[3] in _UNITS:
            whole, part, unit = match.groups()
            size = int(f"{whole}{part or ''}") * _UNITS[unit] // 10 ** len(part or "")
        if not 0 <= size <= BYTES_MAX:
            given = "is missing" if value is None else f"is {shown(value)}"
            self._fail(path, f'{given}: give bytes up to 2^62, or a text like "8 MB" or "1.5 GiB"')
        return size

    def _fail(self, path: Path, what: str) -> NoReturn:
        if not path:
            raise ValueError(f"{self._source}: {what}")
        field = ".".join(part for part in path if isinstance(part, str))
        raise ValueError(f"{self._source}:{line_of(self._text, path)}: {field} {what}")


_Kinds = tuple[_Tensors, Callable[[int, int], list[tuple[_Tensors, int]]], _Tensors]
"""What the first stage has beside layers; the layers of a range by what they hold; what the last stage has."""


def _add(tensors: _Tensors, more: _Tensors, times: int) -> None:
    for total, counts in ((tensors.split, more.split), (tensors.whole, more.whole), (tensors.expert, more.expert)):
        for elements, count in counts.items():
            if count and times:
                total[elements] += count * times


def _ceil(number: int, parts: int) -> int:
    return -(-number // parts)
