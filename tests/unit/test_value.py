"""The codec for plain values: what comes back, what is refused, and the bytes themselves."""

from __future__ import annotations

import enum
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format import value as codec
from fastckpt.format.value import TensorReference, TensorValue, TorchDevice, TorchDtype, TorchSize, decode, encode


def packed(tokens: list[Any], data: bytes = b"") -> bytes:
    body = msgspec.msgpack.encode(tokens)
    return len(body).to_bytes(8, "little") + body + data


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


class Number(np.float64):
    pass


class Mapping(dict):
    pass


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 127, 128, 2**63 - 1, -(2**63), 2**64 - 1),
        *(2**64, -(2**63) - 1, -(2**71), 2**71, 2**71 - 1, 10**5000, -(10**5000)),
        *(0.5, math.inf, -math.inf, 5e-324, 1j, complex(-0.0, math.inf)),
        *("", "ä\0\U0001f600", b"", b"\0\xff", [], (), {}, set(), frozenset()),
        [1, [2, (3,)], {"a": {4: 5}}],
        {True: 1, 2: 2, 2.5: 3, None: 4, "s": 5, b"b": 6, (1, ("x",)): 7, 1j: 8, frozenset({1, 2}): 9},
        {TorchDtype("int8"): 1, TorchSize((1,)): 2, TorchDevice("cpu"): 3, np.float32(1.5): 4},
        {"b": 1, "a": 2},
        *(OrderedDict(b=1, a=2), Counter("mississippi"), deque([1, 2]), deque([1], maxlen=3), deque(maxlen=0)),
        *({1, "1", 2.5, (1, 2)}, frozenset({frozenset({1}), frozenset()})),
        *(TorchSize((2, 3)), TorchSize(()), TorchDtype("bfloat16"), TorchDevice("cuda:1"), TensorReference("a.b")),
        *(TensorValue("int4", (2, 1), b"ab", "cpu"), TensorValue("float32", (), b"abcd", "cuda")),
        TensorValue("int8", (3, 0), b"", "cpu"),
        random.Random(0).getstate(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_of_the_table_comes_back_as_it_was(value: Any) -> None:
    back = decode(memoryview(encode(value)))
    assert back == value
    assert type(back) is type(value)
    if isinstance(value, dict):
        assert [(key, type(key)) for key in back] == [(key, type(key)) for key in value]
    if isinstance(value, deque):
        assert back.maxlen == value.maxlen


@pytest.mark.parametrize("bits", [1 << 63, 0x7FF8000000000123, 0x7FF0000000000001, 0xFFF8000000000000])
def test_a_float_keeps_its_bits(bits: int) -> None:
    value = struct.unpack("<d", bits.to_bytes(8, "little"))[0]
    back = decode(encode([value, complex(value, value)]))
    assert struct.pack("<d", back[0]) == bits.to_bytes(8, "little")
    assert struct.pack("<dd", back[1].real, back[1].imag) == bits.to_bytes(8, "little") * 2


@pytest.mark.parametrize("name", sorted(codec._NUMPY))
def test_numpy_values_keep_dtype_shape_and_bits(name: str) -> None:
    dtype = codec._NUMPY[name]
    raw = np.arange(24 * dtype.itemsize, dtype=np.uint8) % (2 if name == "bool" else 251)
    array = raw.view(dtype).reshape(2, 3, 4)
    views = [array, array.T, array[:, ::2], array[0, 0, 0:1].reshape(()), array[:0], np.asfortranarray(array)]
    for given in views:
        back = decode(encode(given))
        assert isinstance(back, np.ndarray)
        assert (back.dtype, back.shape, back.tobytes()) == (given.dtype, given.shape, given.tobytes())
        assert back.flags.writeable
        assert back.flags.c_contiguous
    scalar = array[1, 1, 1]
    back = decode(encode(scalar))
    assert type(back) is type(scalar)
    assert back.tobytes() == scalar.tobytes()


@pytest.mark.parametrize("value", [-(2**71), 2**71 - 1])
def test_a_large_int_takes_the_fewest_bytes(value: int) -> None:
    assert encode(value) == packed(["int", 9], value.to_bytes(9, "little", signed=True))


def test_big_endian_arrays_are_stored_little_endian() -> None:
    assert encode(np.array([1, 2], ">i4")) == encode(np.array([1, 2], "<i4"))


def test_generator_states_of_numpy_resume_the_same_stream() -> None:
    for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64):
        generator = np.random.Generator(kind(7))
        state = decode(encode(generator.bit_generator.state))
        again = np.random.Generator(kind(0))
        again.bit_generator.state = state
        assert again.random(8).tolist() == generator.random(8).tolist()


def test_equal_sets_have_equal_bytes_whatever_order_they_were_filled_in() -> None:
    words = [f"word{index}" for index in range(200)]
    backwards = words[::-1]
    assert encode(set(words)) == encode(set(backwards))
    assert encode({frozenset(words): 1}) == encode({frozenset(backwards): 1})
    assert encode({0, 8}) == encode({8, 0})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"sampler": {"rng": [0, 1, 2, np.array([object()])]}}, "['sampler']['rng'][3]: numpy object array"),
        ({"when": np.array(["2026"], "M8[s]")}, "['when']: numpy datetime64[s] array"),
        (np.array([(1, 2.0)], "i4,f4"), "value: numpy void64 array"),
        (np.ma.masked_array([1]), "value: an object of type numpy.ma.MaskedArray"),
        (np.str_("a"), "value: numpy str32 scalar"),
        (Number(1), "value: numpy float64 scalar"),
        (np.longdouble(1), "value: numpy"),
        ([Colour.RED], "[0]: enum member"),
        ({"p": Point(1, 2)}, "['p']: NamedTuple"),
        ([Text("a")], "Text, a subclass of str"),
        (Mapping(), "Mapping, a subclass of dict"),
        (defaultdict(list), "defaultdict, a subclass of dict"),
        (bytearray(b"a"), "an object of type builtins.bytearray"),
        (len, "an object of type builtins.builtin_function_or_method"),
        ({1: {(1, Colour.RED): 2}}, "[1]<key (1, <Colour.RED: 1>)>[1]: enum member"),
        ({TensorReference("a")}, "TensorReference"),
        ({(1, TensorValue("int8", (), b"a", "cpu")): 1}, "TensorValue"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_in_the_table_is_refused_by_path(value: Any, message: str) -> None:
    with pytest.raises(TypeError) as raised:
        encode(value)
    assert message in str(raised.value)
    assert "leave it out, or convert it in state_dict()" in str(raised.value)


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ValueError, match="more than 32 containers"):
        encode(loop)


def test_thirty_two_levels_are_allowed() -> None:
    value: Any = 1
    for _ in range(32):
        value = [value]
    assert decode(encode(value)) == value


def test_a_value_with_too_many_items_is_refused_before_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "TOKENS_MAX", 1000)
    value: Any = 0
    for _ in range(31):
        value = [value] * 10
    with pytest.raises(ValueError, match="at most 1000 items"):
        encode(value)


def test_a_lone_surrogate_is_refused_by_path() -> None:
    with pytest.raises(ValueError, match=r"\['a'\].*surrogate"):
        encode({"a": "\ud800"})


def test_the_example_of_the_specification_is_true() -> None:
    document = codec.__doc__
    assert document is not None
    hexadecimal = document.split("four bytes of data:")[1].split()
    value = {"epoch": 3, "seen": {7}, "lr": np.float32(0.5)}
    assert encode(value).hex() == "".join(hexadecimal)
    assert decode(bytes.fromhex("".join(hexadecimal))) == value


def test_every_tag_of_the_code_is_in_the_specification() -> None:
    for tag in [*codec._READ, *codec._CONTAINERS.values()]:
        assert f'"{tag}"' in (codec.__doc__ or ""), tag


NOT_SHORTEST = bytes.fromhex("030000000000000091cc05")
NESTED = bytes.fromhex("0300000000000000919101")


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", "too few"),
        (b"\x02\0\0\0\0\0\0\0\x91", "cut short"),
        (b"\xff" * 8 + b"\x90", "cut short"),
        (b"\0" * 8, "no msgpack array"),
        (packed([]), "missing"),
        (packed([1, 2]), "left over"),
        (packed([1], b"x"), "left over"),
        (NOT_SHORTEST, "shortest"),
        (NESTED, "array"),
        (bytes.fromhex("060000000000000091ca00000000"), "shortest"),
        (bytes.fromhex("0500000000000000dd00000001"), "truncated"),
        (bytes.fromhex("0600000000000000ddffffffff00"), "cut short"),
        (bytes.fromhex("02000000000000009181"), "object|truncated"),
        (bytes.fromhex("030000000000000091a1ff"), "utf-8"),
        (bytes.fromhex("030000000000000091c400"), "bytes"),
        (bytes.fromhex("0300000000000000910101"), "trailing"),
        (packed(["pickle", 1]), "unknown tag"),
        (packed(["str"]), "missing"),
        (packed(["str", 1]), "str token"),
        (packed(["complex", 1, 2]), "float token"),
        (packed(["complex", 1.0]), "missing"),
        (packed(["bytes", True], b"x"), "count"),
        (packed(["bytes", -1]), "count"),
        (packed(["bytes", 2], b"x"), "beyond the end"),
        (packed(["list", 2, 1]), "beyond the end"),
        (packed(["list", 1.0, 1]), "count"),
        (packed(["list", 2**64 - 1]), "beyond the end"),
        (packed(["dict", 1, 1]), "missing"),
        (packed(["dict", 2, 1, 0, 1, 0]), "equal keys"),
        (packed(["dict", 2, 1, 0, True, 0]), "equal keys"),
        (packed(["dict", 1, "list", 0, 1]), "as a key"),
        (packed(["dict", 1, "tuple", 1, "list", 0, 1]), "as a key"),
        (packed(["set", 1, "array", "int8", 0], b"x"), "as a key"),
        (packed(["set", 2, 1, 1]), "equal members"),
        (packed(["set", 2, 2, 1]), "out of order"),
        (packed(["deque", 1, 2, 0, 0]), "maxlen"),
        (packed(["deque", -1, 0]), "maxlen"),
        (packed(["deque", True, 0]), "maxlen"),
        (packed(["deque", 2**64 - 1, 0]), "maxlen"),
        (packed(["int", 1], b"\x05"), "shortest"),
        (packed(["int", 10], b"\0" * 9 + b"\x01"), None),
        (packed(["int", 11], b"\0" * 9 + b"\x01\0"), "shortest"),
        (packed(["int", 0]), "shortest"),
        (packed(["scalar", "object"], b"x" * 8), "unknown numpy dtype"),
        (packed(["scalar", "float32"], b"abc"), "cut short"),
        (packed(["scalar", "bool"], b"\xfe"), "neither 0 nor 1"),
        (packed(["array", "complex32", 0], b"abcd"), "unknown numpy dtype"),
        (packed(["array", "int8", 1, 3], b"ab"), "cut short"),
        (packed(["array", "int8", 1, 3], b"abcd"), "left over"),
        (packed(["array", "int8", 1, -3]), "count"),
        (packed(["array", "int8", 33, *[1] * 33], b"a"), "dimensions"),
        (packed(["array", "int64", 2, 2**30, 2**30]), "too large"),
        (packed(["array", "int64", 3, 0, 2**32, 2**31]), "too large"),
        (packed(["array", "int8", 1, 2**62]), "cut short"),
        (packed(["tensor", "float128", "cpu", 0], b"x" * 16), "unknown dtype"),
        (packed(["tensor", "int8", "/dev/sda", 0], b"x"), "no device"),
        (packed(["tensor", "int8", "cpu", 65, *[1] * 65], b"x"), "dimensions"),
        (packed(["torch_size", 1, "str"]), "64-bit"),
        (packed(["torch_size", 1, 2**63]), "64-bit"),
        (packed(["torch_dtype", "load"]), "unknown dtype"),
        (packed(["torch_device", "cpu:x"]), "no device"),
        (packed(["torch_device", "cpu\n"]), "no device"),
        (packed(["reference", None]), "str token"),
    ],
)
def test_bytes_that_no_writer_wrote_are_refused(data: bytes, error: str | None) -> None:
    if error is None:
        decode(data)
        return
    with pytest.raises(FormatError, match=error):
        decode(data)


def test_limits_have_an_error_of_their_own() -> None:
    with pytest.raises(LimitExceeded, match="containers"):
        decode(packed(["list", 1] * 33 + [1]))
    with pytest.raises(LimitExceeded, match="items"):
        decode(packed([None] * (codec.TOKENS_MAX + 1)))


def test_a_tensor_value_is_checked_when_made() -> None:
    with pytest.raises(ValueError, match="3 bytes are not a int16 tensor"):
        TensorValue("int16", (2,), b"abc", "cpu")
    with pytest.raises(ValueError, match="no shape"):
        TensorValue("int16", (-1,), b"", "cpu")


def test_extension_scalars_are_not_taken_for_their_bytes() -> None:
    assert decode(encode(ml_dtypes.bfloat16(1.5))) == ml_dtypes.bfloat16(1.5)


def test_many_keys_of_one_hash_are_refused_when_written_and_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    same = [2**80 + number * (2**61 - 1) for number in range(codec.SAME_HASH_MAX + 1)]
    assert len({hash(number) for number in same}) == 1
    for crowded in (dict.fromkeys(same), set(same), [OrderedDict.fromkeys(same)]):
        with pytest.raises(ValueError, match="the same hash"):
            encode(crowded)
    for fits in (dict.fromkeys(same[:-1]), frozenset(same[:-1]), same, dict.fromkeys(range(10000), 0)):
        assert decode(encode(fits)) == fits
    with monkeypatch.context() as lenient:
        lenient.setattr(codec, "SAME_HASH_MAX", 10**6)
        stored = [encode(dict.fromkeys(same)), encode(set(same))]
    for data in stored:
        with pytest.raises(LimitExceeded, match="the same hash"):
            decode(data)
