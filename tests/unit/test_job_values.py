"""Plain values that hold torch things: what is inlined, what is referred to, what is refused."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from fastckpt.errors import FormatError, UnsupportedVersion
from fastckpt.format.dtype import ITEM_BYTES
from fastckpt.format.value import TensorReference, TensorValue, TorchDevice, TorchDtype, decode, encode
from fastckpt.job import values
from fastckpt.job.values import INLINE_BYTES_MAX, from_plain, to_plain


def round_trip(value: object) -> Any:
    tree, tensors = to_plain(value, "value")
    return from_plain(decode(encode(tree)), dict(tensors))


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize("name", sorted(ITEM_BYTES))
def test_a_small_tensor_of_any_dtype_comes_back_bit_for_bit(name: str) -> None:
    dtype = getattr(torch, name)
    count = 12 * ITEM_BYTES[name]
    raw = torch.arange(count, dtype=torch.uint8) % (2 if name == "bool" else 251)
    whole = raw.view(dtype)
    for tensor in (whole, whole.reshape(3, 4), whole[:0].reshape(0, 3), whole[5]):
        back = round_trip({"t": tensor})["t"]
        assert (back.dtype, back.shape) == (dtype, tensor.shape)
        assert raw_bytes(back) == raw_bytes(tensor)
    turned = whole.reshape(3, 4).t()
    back = round_trip(turned)
    assert back.shape == (4, 3)
    items = raw.reshape(3, 4, -1).transpose(0, 1)
    assert raw_bytes(back) == raw_bytes(items)


def test_values_count_not_memory() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(round_trip(tensor.conj()), torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(round_trip(tensor.conj().imag), torch.tensor([-2.0, 4.0]))
    assert torch.equal(round_trip(torch.zeros(1).expand(5)), torch.zeros(5))


def test_torch_things_come_back_wherever_they_are() -> None:
    value = {
        "size": torch.Size([2, 3]),
        torch.bfloat16: [torch.float8_e5m2, (torch.device("cuda:1"), torch.device("meta"))],
        (torch.Size([1]), 2): deque([torch.device("cpu")], maxlen=2),
        "set": {torch.int8, (torch.float16,)},
        "ordered": OrderedDict(a=torch.Size([])),
        "counter": Counter({torch.int8: 2, "x": 5}),
        "numpy": np.float32(2),
    }
    back = round_trip(value)
    assert back == value
    assert back[(torch.Size([1]), 2)].maxlen == 2
    assert [type(item) for item in back.values()] == [type(item) for item in value.values()]


def test_a_generator_state_resumes_the_same_stream() -> None:
    generator = torch.Generator().manual_seed(3)
    state = round_trip({"torch": generator.get_state()})["torch"]
    again = torch.Generator()
    again.set_state(state)
    assert torch.equal(torch.rand(9, generator=again), torch.rand(9, generator=generator))


def test_an_inlined_tensor_is_a_copy() -> None:
    tensor = torch.zeros(4)
    tree, _ = to_plain([tensor], "value")
    tensor.fill_(1)
    assert torch.equal(from_plain(tree, {})[0], torch.zeros(4))
    from_plain(tree, {})[0].fill_(7)
    assert torch.equal(from_plain(tree, {})[0], torch.zeros(4))


def test_tensors_beyond_the_limit_are_referred_to_by_key() -> None:
    small = torch.zeros(INLINE_BYTES_MAX, dtype=torch.uint8)
    large = torch.zeros(INLINE_BYTES_MAX + 1, dtype=torch.uint8)
    tree, tensors = to_plain({"a": [small, large], 3: {"b": large}}, "data")
    assert isinstance(tree["a"][0], TensorValue)
    assert tree["a"][1] == TensorReference("data.a.1")
    assert [key for key, _ in tensors] == ["data.a.1", "data.3.b"]
    assert tensors[0][1] is large
    assert to_plain(large, "data")[1][0][0] == "data"


def test_keys_are_unique_and_the_same_every_time() -> None:
    large = torch.zeros(INLINE_BYTES_MAX + 1, dtype=torch.uint8)
    value = {"a.b": large, "a": {"b": large}, "a.b#2": large, 0: large, "0": large, (1, 2): large}
    _, tensors = to_plain(value, "x")
    assert [key for key, _ in tensors] == ["x.a.b", "x.a.b#2", "x.a.b#2#2", "x.0", "x.0#2", "x.5"]


def test_a_parameter_is_saved_as_its_values() -> None:
    back = round_trip(torch.nn.Parameter(torch.ones(2)))
    assert type(back) is torch.Tensor
    assert torch.equal(back, torch.ones(2))


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(2, device="meta"), "meta tensor"),
        (lambda: torch.eye(2).to_sparse(), "sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), "quantized tensor"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), "nested tensor"),
        (lambda: torch.zeros(2).as_subclass(Tagged), "Tagged"),
        (lambda: torch.nn.UninitializedParameter(), "UninitializedParameter"),
        (lambda: torch.qint8, "torch.qint8"),
        (lambda: {torch.zeros(1)}, "as a key or in a set"),
        (lambda: {(1, torch.zeros(1)): 1}, "as a key or in a set"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_saved_are_refused_by_path(make: Any, message: str) -> None:
    with pytest.raises(TypeError) as raised:
        to_plain({"a": [1, make()]}, "data")
    assert str(raised.value).startswith("data['a'][1]: ")
    assert message in str(raised.value)


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match=r"data\[0\].*more than 32"):
        to_plain(loop, "data")


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_a_dtensor_is_always_referred_to_and_stays_one() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    tensor = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)))
    tree, tensors = to_plain([tensor], "data")
    assert tree == [TensorReference("data.0")]
    assert isinstance(tensors[0][1], DTensor)


def test_a_tensor_from_a_device_that_is_not_here_comes_back_on_the_cpu() -> None:
    back = from_plain(TensorValue("int8", (2,), b"\1\2", "npu:3"), {})
    assert back.device.type == "cpu"
    assert back.tolist() == [1, 2]


def test_a_tensor_returns_to_its_device_if_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_devices", lambda: ["meta"])
    back = from_plain(TensorValue("int16", (1,), b"\1\2", "meta"), {})
    assert (back.device.type, back.dtype) == ("meta", torch.int16)


def test_what_this_torch_or_snapshot_lacks_has_an_error() -> None:
    with pytest.raises(FormatError, match=r"'data\.x'"):
        from_plain([TensorReference("data.x")], {})
    with pytest.raises(UnsupportedVersion, match="warpdrive"):
        from_plain(TorchDevice("warpdrive"), {})


def test_a_dtype_unknown_to_this_torch_has_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    with pytest.raises(UnsupportedVersion, match="float8_e8m0fnu"):
        from_plain(TorchDtype("float8_e8m0fnu"), {})
