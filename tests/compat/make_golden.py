"""Writes the golden repositories below ``golden/`` and, from the states themselves, what a reader must find in them.

    python tests/compat/make_golden.py FOLDER

The ones in git are never made anew: they stand for what is on people's disks. A new version of the format gets new
ones beside them.
"""

from __future__ import annotations

import collections
import itertools
import json
import os
import random
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from blake3 import blake3
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import fastckpt
from fastckpt.format import names
from fastckpt.format.value import TensorReference, TensorValue, TorchDevice, TorchDtype, TorchSize

CHUNK_BYTES = 4096
# Nothing of the machine that made them belongs into files that stay.
ENVIRONMENT = {
    "for": "people",
    "nested": {"numbers": [0, -1, 0.5, 1e-7, 1e16], "others": [None, True, "\N{SNOWMAN}\n"]},
}
HASHED_FROM = 400
"""Texts of this length and more are in ``expected.json`` by their hash."""


class Block(nn.Module):
    """An extra state, tied weights, buffers, a row longer than a chunk and many tiny tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, 12)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 19, bias=False)
        self.head.weight = self.embed.weight
        self.long = nn.Linear(1100, 3)
        self.tiny = nn.ParameterList(torch.randn(1 + i % 7) for i in range(30))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = torch.stack([tiny.sum() for tiny in self.tiny]).mean()
        return self.head(self.norm(self.embed(x))).sum() * scale + self.long(torch.ones(1100)).sum()

    def get_extra_state(self) -> dict[str, object]:
        return {"calls": 7}

    def set_extra_state(self, state: object) -> None:
        pass


class Values:
    """A Stateful that holds whatever it is given."""

    def __init__(self, state: object) -> None:
        self.state = state

    def state_dict(self) -> object:
        return self.state

    def load_state_dict(self, state: object) -> None:
        self.state = state


def every_value() -> dict[str, object]:
    """All kinds of plain values, and the edges of each."""
    return {
        "constants": [None, True, False, 0, -1, 127, 128, -(2**63), 2**63, 2**64 - 1],
        "long": [2**64, -(2**63) - 1, 2**100, -(2**100), 2**127 - 1, -(2**127), 2**127],
        "floats": [0.0, -0.0, 1e-5, 1e300, float("inf"), float("-inf"), float("nan")],
        "complex": complex(-0.0, 2.5),
        "text": ["", "dict", "Zürich \N{SNOWMAN} \x00\n", "x" * 300],
        "bytes": [b"", bytes(range(256))],
        "tuple": (1, (2, ()), [3, []]),
        "sets": [set(), {3, 1, "b", "a", (2, b"z")}, frozenset({frozenset({1}), 2.5, None, 2**70})],
        "deques": [collections.deque([1, "a"], 5), collections.deque()],
        "ordered": collections.OrderedDict([("z", 1), ("a", {"nested": []})]),
        "counter": collections.Counter({"x": 3, "y": -1}),
        "keys": {(1, "a"): 1, None: 2, b"k": 3, 2.5: 4, np.int64(9): 5, frozenset({1}): 6, torch.float16: 7},
        "scalars": [np.float32(0.5), np.bool_(True), np.uint64(2**64 - 1), np.complex64(1j), ml_dtypes.bfloat16(1.5)],
        "arrays": [
            np.arange(6, dtype=np.int16).reshape(2, 3).T,
            np.zeros((0, 4), np.float64),
            np.array(7, np.uint8),
            np.array([1.5, -2], ml_dtypes.float8_e4m3fn),
        ],
        "tensors": [
            torch.arange(5.0),
            torch.tensor(3),
            torch.zeros(2, 0),
            torch.ones(2, dtype=torch.bfloat16),
            torch.arange(4, dtype=torch.uint8).view(torch.int4),
        ],
        "torch": [torch.Size((2, 0, 3)), torch.Size(()), torch.bfloat16, torch.device("cpu"), torch.device("cuda", 3)],
    }


def of_every_dtype() -> dict[str, torch.Tensor]:
    """One tensor of each dtype of the format that this torch has, with arbitrary bytes, and odd shapes."""
    generator = np.random.default_rng(5)
    found: dict[str, torch.Tensor] = {}
    for name in sorted(_DTYPES):
        if (dtype := getattr(torch, name, None)) is None:
            continue
        raw = torch.from_numpy(generator.integers(0, 256, 3 * 16, np.uint8))
        found[f"dtypes.{name}"] = (raw % 2 if name == "bool" else raw).view(dtype).reshape(3, -1)
    found["shapes.none"] = torch.tensor(2.5)
    found["shapes.empty"] = torch.zeros(0, 3)
    found["shapes.flat"] = torch.zeros(3, 0, 2)
    found["shapes.deep"] = torch.arange(64, dtype=torch.int16).reshape((2, 1) * 6)
    found["shapes.strided"] = torch.arange(120.0).reshape(10, 12)[:, 1::2].T
    return found


_DTYPES = {
    *("bool", "float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32, 64)),
}


# What was saved, told from the live objects -----------------------------------------------------------------------


def tensor_text(dtype: str, shape: Any, data: bytes) -> str:
    return f"{dtype} {list(shape)} {blake3(data).hexdigest()}"


def of_tensor(tensor: torch.Tensor) -> str:
    tensor = tensor.detach().resolve_conj().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor_text(str(tensor.dtype).removeprefix("torch."), tensor.shape, data)


def value_text(value: Any) -> str:
    """One text for a live value, for the leaves of ``fastckpt.format.value``, and for those of the other reader."""
    kind = type(value)
    if kind is tuple and value and type(value[0]) is str:
        match value:
            case ("tensor", str() as device, str() as dtype, np.ndarray() as array):
                return f"tensor {device} {tensor_text(dtype, array.shape, array.tobytes())}"
            case ("reference", str()):
                return "reference"
            case ("torch_size", tuple() as sizes):
                return f"torch_size {list(sizes)}"
            case ("torch_dtype" | "torch_device", str() as name):
                return f"{value[0]} {name}"
    match value:
        case torch.Tensor() if value.numel() * value.element_size() > 64 * 1024:
            return "reference"
        case torch.Tensor():
            return f"tensor {value.device} {of_tensor(value)}"
        case TensorValue():
            return f"tensor {value.device} {tensor_text(value.dtype, value.shape, value.data)}"
        case TensorReference():
            return "reference"
        case torch.Size() | TorchSize():
            return f"torch_size {list(value if kind is torch.Size else value.sizes)}"
        case torch.dtype() | TorchDtype():
            return f"torch_dtype {str(getattr(value, 'name', value)).removeprefix('torch.')}"
        case torch.device() | TorchDevice():
            return f"torch_device {getattr(value, 'name', value)}"
        case np.generic():
            return f"scalar {value.dtype} {value.tobytes().hex()}"
        case np.ndarray():
            return f"array {tensor_text(str(value.dtype), value.shape, value.tobytes())}"
        case dict():
            return f"{kind.__name__}{{{', '.join(f'{value_text(k)}: {value_text(v)}' for k, v in value.items())}}}"
        case set() | frozenset():
            return f"{kind.__name__}{{{', '.join(sorted(map(value_text, value)))}}}"
        case list() | tuple():
            return f"{kind.__name__}[{', '.join(map(value_text, value))}]"
        case collections.deque():
            return f"deque[{', '.join(map(value_text, value))}; {value.maxlen}]"
    return repr(value)


def shortened(text: str) -> str:
    return text if len(text) < HASHED_FROM else blake3(text.encode()).hexdigest()


def expected(state: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Tensors and values of one rank's state by the names that FORMAT.md gives them."""
    tensors: dict[str, str] = {}
    values: dict[str, str] = {}
    parameters = {}
    for name, item in state.items():
        if isinstance(item, nn.Module):
            parameters |= {parameter: own for own, parameter in item.named_parameters()}
            for key, value in item.state_dict().items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}.{key}"] = of_tensor(value)
                else:
                    values[f"{name}.{key}"] = value_text(value)
        elif isinstance(item, torch.optim.Optimizer):
            for parameter, entries in item.state.items():
                tensors |= {f"{name}.state.{parameters[parameter]}.{e}": of_tensor(t) for e, t in entries.items()}
            lists: list[list[str]] = []
            groups = []
            for group in item.param_groups:
                kept = [list(item.state.get(parameter, {})) for parameter in group["params"]]
                lists += [each for at, each in enumerate(kept) if each not in (*lists, *kept[:at])]
                groups.append(
                    {
                        "params": [parameters[parameter] for parameter in group["params"]],
                        "options": {key: value for key, value in group.items() if key != "params"},
                        "entries": [lists.index(each) for each in kept],
                    }
                )
            values[name] = value_text({"param_groups": groups, "entries": lists, "state": {}})
        elif isinstance(item, torch.Tensor):
            tensors[name] = of_tensor(item)
        elif not isinstance(item, fastckpt.Shard):
            value = item.state_dict() if hasattr(item, "state_dict") else item
            values[name] = value_text(value)
            if isinstance(value, dict):  # our Statefuls hold their large tensors at the top
                large = {key: entry for key, entry in value.items() if value_text(entry) == "reference"}
                tensors |= {f"{name}.{key}": of_tensor(entry) for key, entry in large.items()}
    return tensors, {name: shortened(text) for name, text in values.items()}


# The repositories ---------------------------------------------------------------------------------------------------


@mock.patch("fastckpt.checkpointer.environment", mock.Mock(return_value=ENVIRONMENT))
def one_rank(folder: Path, codec: str) -> list[dict[str, Any]]:
    """Four snapshots by two jobs, one step twice, an attempt aborted between the jobs."""
    torch.manual_seed(11)
    np.random.seed(12)
    random.seed(13)
    model = Block()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState(), "epoch": 1}
    found = []

    def save(ckpt: fastckpt.Checkpointer, step: int, content: dict[str, Any], **labels: Any) -> None:
        tensors, values = expected(content)
        ckpt.save(step, content, **labels).wait()
        found.append({"step": step, "tensors": tensors, "values": [values]})

    options = fastckpt.Options(chunk_bytes=CHUNK_BYTES, codec=codec, fence="explicit")
    with fastckpt.Checkpointer(str(folder), options=options) as ckpt:
        save(ckpt, 0, {**state, "values": Values(every_value())}, note="before the first step \N{SNOWMAN}")
        model(torch.arange(8)).backward()
        optimizer.step()
        save(ckpt, 1, state, metrics={"lr": 1e-5, "loss": 3.0, "tokens": 1e16, "tiny": -2.5e-7})
    history = fastckpt.open(str(folder)).history
    history.load()
    writer = history.append_open()
    history.append_abort(writer, names.attempt(writer, 1))
    with fastckpt.Checkpointer(str(folder), options=options) as ckpt:
        large = Values({"large": torch.arange(17_000, dtype=torch.int32) % 251, "at": 1})
        save(ckpt, 1, {**of_every_dtype(), "data": large})
        save(ckpt, 2, {"epoch": 2})
    return found


def two_ranks(folder: Path) -> list[dict[str, Any]]:
    """Two ranks on two nodes: shards, tensors that are equal, tensors and values that differ."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        results = pool.starmap(_rank, [(rank, server.port, str(folder)) for rank in range(2)], chunksize=1)
    steps = []
    for ranks in zip(*results, strict=True):
        tensors = {key: text for one in ranks for key, text in one["tensors"].items()}
        steps.append({"step": ranks[0]["step"], "tensors": tensors, "values": [one["values"] for one in ranks]})
    return steps


@mock.patch("fastckpt.checkpointer.environment", mock.Mock(return_value=ENVIRONMENT))
@mock.patch("fastckpt.job.group._node", mock.Mock(side_effect=lambda: f"node {dist.get_rank()}"))
def _rank(rank: int, port: int, folder: str) -> list[dict[str, Any]]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(13)
    rows = torch.randn(37, 100)  # ten rows a chunk; the shards meet at row 13
    wide = torch.arange(4 * 2200.0).reshape(4, 2200)  # a row is longer than a chunk; the shards are columns
    cut = [slice(0, 13), slice(13, 37)][rank]
    side = slice(1100 * rank, 1100 * (rank + 1))
    found = []
    options = fastckpt.Options(chunk_bytes=CHUNK_BYTES, codec="zstd", fence="explicit")
    with fastckpt.Checkpointer(folder, options=options) as ckpt:
        for step in (10, 20):
            equal = torch.arange(17_000, dtype=torch.int32) // 100 + step
            state: dict[str, Any] = {
                "rows": fastckpt.Shard(rows[cut] + step, (cut.start, 0), (37, 100)),
                "wide": fastckpt.Shard(wide[:, side] + step, (0, side.start), (4, 2200)),
                "common": torch.arange(3000.0) // 7 + step,
                "scalar": torch.tensor(step),
                "data": Values({"rank": rank, "step": step, "own": equal + 1000 * rank}),
                "same": Values({"step": step, "large": equal}),
                "rng": fastckpt.RNGState(),
            }
            torch.manual_seed(rank)
            np.random.seed(rank)
            random.seed(rank)
            tensors, values = expected(state)
            tensors |= {"rows": of_tensor(rows + step), "wide": of_tensor(wide + step)}
            tensors[f"data.own@{rank}"] = tensors.pop("data.own")
            ckpt.save(step, state).wait()
            found.append({"step": step, "tensors": tensors, "values": values})
    dist.destroy_process_group()
    return found


def four_ranks(folder: Path) -> list[dict[str, Any]]:
    """Four ranks on two nodes, in meshes: copies, shards, both, uneven, empty, long rows, a dimension cut twice."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with torch.multiprocessing.get_context("spawn").Pool(4) as pool:
        results = pool.starmap(_mesh_rank, [(rank, server.port, str(folder)) for rank in range(4)], chunksize=1)
    return [
        {**step, "values": [one["values"] for one in ranks]} for step, *ranks in zip(results[0], *results, strict=True)
    ]


@mock.patch("fastckpt.checkpointer.environment", mock.Mock(return_value=ENVIRONMENT))
@mock.patch("fastckpt.job.group._node", mock.Mock(side_effect=lambda: f"node {dist.get_rank() // 2}"))
def _mesh_rank(rank: int, port: int, folder: str) -> list[dict[str, Any]]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=4)
    one = init_device_mesh("cpu", (4,))
    two = init_device_mesh("cpu", (2, 2))
    other = DeviceMesh("cpu", torch.tensor([[3, 0], [2, 1]]))
    placed = {
        "rows": (one, [Shard(0)], (37, 100)),  # ten rows a chunk, and parts of ten, ten, ten and seven
        "few": (one, [Shard(0)], (2, 600)),  # two ranks hold nothing
        "copies": (one, [Replicate()], (3, 1500)),
        "number": (one, [Replicate()], ()),
        "none": (one, [Shard(0)], (0, 4)),
        "hybrid": (two, [Replicate(), Shard(0)], (50, 90)),
        "wide": (two, [Shard(0), Shard(1)], (3, 2201)),  # a row is longer than a chunk
        "twice": (two, [Shard(0), Shard(0)], (7, 30)),
        "strided": (two, [_StridedShard(0, split_factor=2), Shard(0)], (16, 90)),
        "other": (other, [Shard(1), Replicate()], (5, 41)),
        **{f"tiny.{number}": (one, [Shard(0)], (number % 9, 2)) for number in range(40)},
    }
    found = []
    options = fastckpt.Options(chunk_bytes=CHUNK_BYTES, codec="zstd", fence="explicit")
    with fastckpt.Checkpointer(folder, options=options) as ckpt:
        for step in (1, 2):
            generator = torch.Generator().manual_seed(step)
            whole = {
                key: torch.randint(0, 9, shape, generator=generator).float() for key, (_, _, shape) in placed.items()
            }
            state: dict[str, Any] = {
                key: distribute_tensor(whole[key], mesh, placements) for key, (mesh, placements, _) in placed.items()
            }
            tied = {"tied": state["rows"], "plain": torch.arange(5.0) + step}
            values = {"epoch": step, "own": {"rank": rank}, **({"late": [rank]} if rank > 1 else {})}
            ckpt.save(step, {**state, **tied, **values}).wait()
            tensors = {key: of_tensor(tensor) for key, tensor in {**whole, **tied, "tied": whole["rows"]}.items()}
            found.append({"step": step, "tensors": tensors, "values": {n: value_text(v) for n, v in values.items()}})
    dist.destroy_process_group()
    return found


def main(folder: Path) -> None:
    if folder.exists():
        sys.exit(f"{folder} is there already")
    found = {
        "v1-raw": one_rank(folder / "v1-raw", "raw"),
        "v1-zstd": one_rank(folder / "v1-zstd", "zstd"),
        "v1-two-ranks": two_ranks(folder / "v1-two-ranks"),
        "v1-meshes": four_ranks(folder / "v1-meshes"),
    }
    for step in itertools.chain.from_iterable(found.values()):
        step["tensors"] = dict(sorted(step["tensors"].items()))
    (folder / "expected.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
