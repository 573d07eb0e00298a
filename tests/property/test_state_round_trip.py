"""Any state of tensors and plain values goes through a repository and comes back bit for bit."""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict, deque
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastckpt
from fastckpt import Checkpointer, Options
from fastckpt.format.dtype import ITEM_BYTES

SMALL = Options(chunk_bytes=4096)
SPECIAL = {
    "float32": [b"\x00\x00\x00\x80", b"\x01\x00\x80\x7f", b"\xff\xff\xff\xff", b"\x01\x00\x00\x00"],
    "float64": [b"\0" * 7 + b"\x80", b"\x01\0\0\0\0\0\xf0\x7f", b"\xff" * 8],
    "bfloat16": [b"\x00\x80", b"\x81\x7f", b"\xff\xff"],
    "float16": [b"\x00\x80", b"\x01\x7c", b"\xff\xff"],
}
"""-0.0, signalling and quiet NaNs with payloads, a subnormal."""


class Case:
    """A tensor that can be printed: torch itself cannot print some of its dtypes."""

    def __init__(self, tensor: torch.Tensor, how: str) -> None:
        self.tensor = tensor
        self._how = how

    def __repr__(self) -> str:
        return f"<{self.tensor.dtype} {tuple(self.tensor.shape)} {self._how} {logical(self.tensor)[:64].hex()}>"


def logical(tensor: torch.Tensor) -> bytes:
    """The elements in C order, computed without the library."""
    if tensor.element_size() == 1:
        tensor = tensor.view(torch.uint8)
    tensor = tensor.resolve_conj().resolve_neg()
    elements = tensor.contiguous().as_strided((tensor.numel(),), (1,))
    return bytes(elements.view(torch.uint8).numpy()) if tensor.numel() else b""


@st.composite
def tensors(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(sorted(ITEM_BYTES)) | st.sampled_from(["complex64", "complex128", *SPECIAL]))
    item = ITEM_BYTES[name]
    shape = draw(st.lists(st.integers(0, 5), max_size=3) | st.tuples(st.integers(1, 40), st.integers(60, 300)))
    count = int(np.prod(shape))
    data = np.random.default_rng(draw(st.integers(0, 2**32))).integers(
        0, 2 if name == "bool" else 256, count * item, dtype=np.uint8
    )
    special = draw(st.sampled_from([b"", *SPECIAL.get(name, [])]))
    if special and count:
        at = draw(st.integers(0, count - 1)) * item
        data[at : at + item] = np.frombuffer(special, np.uint8)
    dtype = getattr(torch, name)
    if not count:
        return Case(torch.empty(shape, dtype=dtype), "empty")
    tensor = torch.from_numpy(data).view(dtype).reshape(tuple(shape))
    lazy = ["conjugated", "imaginary"] if name in ("complex64", "complex128") else []
    turn = draw(st.sampled_from(["as it is", "transposed", "every other", "expanded", *lazy]))
    if turn == "transposed" and len(shape) > 1:
        tensor = tensor.transpose(0, -1)
    if turn == "every other" and len(shape):
        tensor = tensor[1::2]
    if turn == "conjugated":
        tensor = tensor.conj()
    if turn == "imaginary":
        tensor = tensor.conj().imag
    if turn == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return Case(tensor, turn)


floats = st.floats() | st.integers(0, 2**64 - 1).map(lambda bits: np.uint64(bits).view(np.float64).item())
plain = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | floats
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.sampled_from([torch.bfloat16, torch.Size([2, 0]), torch.device("cpu"), np.float32(-0.0)])
)
keys = st.text(max_size=4) | st.integers() | st.booleans()
values = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(lambda items: deque(items, 5))
        | st.dictionaries(keys, inner, max_size=3)
        | st.lists(st.tuples(keys, inner), max_size=3).map(OrderedDict)
        | st.lists(st.tuples(st.text(max_size=2), st.integers()), max_size=3).map(lambda items: Counter(dict(items)))
    ),
    max_leaves=8,
)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6).filter(
    lambda name: not name.isspace()
)


def real(value: Any) -> Any:
    """A drawn value with the tensors themselves in it."""
    if isinstance(value, Case):
        return value.tensor
    if isinstance(value, Counter):
        return value
    if isinstance(value, dict):
        return type(value)((key, real(item)) for key, item in value.items())
    if isinstance(value, deque):
        return deque((real(item) for item in value), value.maxlen)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(real(item) for item in value)
    return value


def blank(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of the same dtype and shape; torch cannot make them itself for every dtype."""
    count = tensor.numel() * tensor.element_size()
    if not count:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    return torch.zeros(count, dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


def shown(value: Any) -> Any:
    """Something that compares equal only for values of the same types and bits."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape), logical(value))
    if isinstance(value, float | np.floating):
        return (type(value), np.asarray(value).tobytes())
    if isinstance(value, dict):
        return (type(value), [(shown(key), shown(item)) for key, item in value.items()])
    if isinstance(value, list | tuple | deque) and not isinstance(value, torch.Size):
        return (type(value), getattr(value, "maxlen", None), [shown(item) for item in value])
    return (type(value), value)


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


@settings(max_examples=150)
@given(st.dictionaries(names, values, max_size=3))
def test_any_state_of_plain_values_and_tensors_comes_back_bit_for_bit(drawn: dict[str, Any]) -> None:
    state = real(drawn)
    expected = {name: shown(value) for name, value in state.items()}
    held = {name: value if isinstance(value, torch.Tensor) else Holder(value) for name, value in state.items()}
    target: dict[str, Any] = {
        name: blank(value) if isinstance(value, torch.Tensor) else Holder(None) for name, value in state.items()
    }
    with Checkpointer(f"memory://{secrets.token_hex(8)}", options=SMALL) as ckpt:
        ckpt.save(1, held).wait()
        assert ckpt.restore(target) == 1
    got = {name: value.value if isinstance(value, Holder) else value for name, value in target.items()}
    assert {name: shown(value) for name, value in got.items()} == expected


@settings(max_examples=100)
@given(tensors(), st.sampled_from(["raw", "zstd"]))
def test_any_tensor_reads_the_same_with_and_without_torch(case: Case, codec: Any) -> None:
    tensor = case.tensor
    url = f"memory://{secrets.token_hex(8)}"
    with Checkpointer(url, options=Options(chunk_bytes=4096, codec=codec)) as ckpt:
        ckpt.save(1, {"t": tensor})
    array = fastckpt.open(url).snapshot().read("t")
    assert array.shape == tuple(tensor.shape)
    assert array.tobytes() == logical(tensor)
