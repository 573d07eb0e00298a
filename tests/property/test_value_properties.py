"""Any value of the table comes back; any bytes are either a value or a FormatError."""

from __future__ import annotations

import tracemalloc
from collections import Counter, OrderedDict, deque
from typing import Any

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastckpt.errors import FormatError
from fastckpt.format import value as codec
from fastckpt.format.value import TensorReference, TensorValue, TorchDevice, TorchDtype, TorchSize, decode, encode

floats = st.floats(width=64) | st.integers(0, 2**64 - 1).map(lambda bits: np.uint64(bits).view(np.float64).item())
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**100), 2**100)
    | floats
    | st.builds(complex, floats, floats)
    | st.text()
    | st.binary()
    | st.sampled_from([np.float32(1.5), np.int8(-3), np.bool_(True), TorchDtype("int8"), TorchDevice("cuda:3")])
    | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3).map(lambda sizes: TorchSize(tuple(sizes)))
)
hashables = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
arrays = st.binary(max_size=24).map(lambda data: np.frombuffer(data, np.uint8).copy())
leaves = (
    hashables
    | arrays
    | st.text().map(TensorReference)
    | st.binary(max_size=9).map(lambda data: TensorValue("int8", (len(data), 1), data, "cpu"))
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    items = st.lists(inner, max_size=4)
    pairs = st.lists(st.tuples(hashables, inner), max_size=4)
    return (
        items
        | items.map(tuple)
        | pairs.map(dict)
        | pairs.map(OrderedDict)
        | pairs.map(lambda given: Counter(dict(given)))
        | st.builds(deque, items, st.none() | st.integers(4, 9))
        | st.sets(hashables, max_size=4)
    )


values = st.recursive(leaves, containers, max_leaves=12)

tags = st.sampled_from([*codec._READ, *codec._CONTAINERS.values(), "float32", "int8", "cpu"])
tokens = st.lists(tags | st.integers(-1, 5) | st.integers(-(2**63), 2**64 - 1) | st.none() | st.booleans() | floats)


@given(values)
def test_a_value_comes_back_and_has_one_encoding(value: Any) -> None:
    encoded = encode(value)
    back = decode(encoded)
    # Compared by their bytes, since NaN is not equal to itself and 1 is equal to True.
    assert encode(back) == encoded
    assert same_shape(back, value)


@given(st.lists(hashables))
def test_a_set_has_the_same_bytes_in_any_order(members: list[Any]) -> None:
    backwards = list(set(members))[::-1]
    assert encode(set(members)) == encode(set(backwards))


@given(st.binary())
def test_garbage_is_a_format_error(data: bytes) -> None:
    value_or_format_error(data)


@given(tokens, st.binary(max_size=40))
def test_well_formed_tokens_in_any_order_are_a_value_or_a_format_error(given_tokens: list[Any], data: bytes) -> None:
    body = msgspec.msgpack.encode(given_tokens)
    value_or_format_error(len(body).to_bytes(8, "little") + body + data)


@given(values, st.data())
def test_a_damaged_value_is_a_value_or_a_format_error(value: Any, draw: st.DataObject) -> None:
    encoded = bytearray(encode(value))
    at = draw.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= draw.draw(st.integers(1, 255))
    value_or_format_error(bytes(encoded))
    value_or_format_error(bytes(encoded[:at]))


def value_or_format_error(data: bytes) -> None:
    tracemalloc.start()
    try:
        value = decode(data)
    except FormatError:
        pass
    else:
        assert encode(value) == data
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Numbers in the bytes never decide what is allocated; the allowance is for what Python itself does.
    assert peak < 1_000_000 + 1000 * len(data)


def same_shape(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same_shape(key, other) and same_shape(left[key], right[other])
            for key, other in zip(left, right, strict=True)
        )
    if isinstance(left, list | tuple | deque):
        return len(left) == len(right) and all(map(same_shape, left, right))
    return True
