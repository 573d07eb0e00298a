"""The closed codec for plain values: what a state holds besides tensors. No torch, no I/O, no code in the bytes.

A type is either in the table below and comes back exactly as it was, or it is refused by name; nothing is flattened
to something similar. One value has one encoding, so digests of encodings may be compared.

## Plain values

A plain value is three parts back to back:

    length    8 bytes, unsigned, little-endian: the size of the tokens in bytes
    tokens    one msgpack array of nil, bool, int, float 64 and str, flat, in prefix order; nothing follows it
    data      raw bytes that tokens speak of, back to back, in the order of those tokens, without padding

nil, a bool, an int from -2^63 to 2^64 - 1 and a float stand for themselves. **A str token is always a tag**; it says
what follows. `n`, `rank` and `sizes` are ints that are not negative, `data[x]` the next x bytes of data:

    "str"            text                         one more str token, valid UTF-8
    "bytes"          n                            data[n]
    "int"            n                            data[n]: an int beyond the range above, two's complement,
                                                  little-endian, in the fewest bytes that hold its sign
    "complex"        real imaginary               two float tokens
    "list"           n item...                    n values; so are "tuple", "set", "frozenset"
    "deque"          maxlen n item...             maxlen is nil or an int not below n
    "dict"           n key value...               2 n values, in insertion order; so are "ordered_dict", "counter"
    "scalar"         dtype                        data[item bytes]: a numpy scalar
    "array"          dtype rank sizes...          data[product of sizes x item bytes]: a numpy array
    "tensor"         dtype device rank sizes...   the same: a small torch tensor
    "torch_size"     n size...                    n int tokens from -2^63 to 2^63 - 1
    "torch_dtype"    name                         str token
    "torch_device"   name                         str token: [a-z][a-z0-9_]{0,31}(:[0-9]{1,5})?
    "reference"      key                          str token: the key of a tensor stored among the snapshot's tensors

`dtype` is a str token from the table of tensor dtypes, in "scalar" and "array" without sub-byte integers, the bits
types, complex32 and float4; elements lie in C order, little-endian. Keys of dicts and
members of sets have no list, dict, ordered_dict, counter, deque, set, array, tensor or reference in them. Members of a
set are ordered by their encodings (each as if it were a whole value), compared as byte strings.

A reader refuses: anything msgpack does not write in its shortest form (and float 32); a token array with a missing or
left-over token; left-over data; an unknown tag, dtype or device; equal keys or members (as Python compares: 1, 1.0 and
true are equal, NaN is equal to nothing); members whose encodings fall; a bool scalar that is neither 0 nor 1; an array
header that claims more tokens than there are bytes; a rank above 64 (32 for numpy's); sizes whose product, zeros
counted as ones, times the item bytes is above 2^63 - 1.
Limits: 10,000,000 tokens; 32 containers inside each other; 100 keys, or members, of one container with the same hash
(as Python hashes numbers).

Example: `{"epoch": 3, "seen": {7}, "lr": float32(0.5)}` has the tokens
`"dict" 3 "str" "epoch" 3 "str" "seen" "set" 1 7 "str" "lr" "scalar" "float32"` and four bytes of data:

    3700000000000000
    9ea46469637403a3737472a565706f636803a3737472a47365656ea37365740107a3737472a26c72a67363616c6172a7666c6f61743332
    0000003f
"""

from __future__ import annotations

import enum
import math
import re
import reprlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import msgspec
import numpy as np

from fastckpt.errors import FormatError, LimitExceeded
from fastckpt.format.dtype import ITEM_BYTES

TOKENS_MAX: Final = 10_000_000
DEPTH_MAX: Final = 32
SAME_HASH_MAX: Final = 100
RANK_MAX: Final = 64
BYTES_MAX: Final = 2**63 - 1

_NUMPY_RANK_MAX = 32  # what numpy 1 can hold
_LENGTH_BYTES = 8
_DEVICE = re.compile(r"[a-z][a-z0-9_]{0,31}(:[0-9]{1,5})?")

Token = bool | int | float | str | None

_token_decoder = msgspec.msgpack.Decoder(list[bool | int | float | str | None])


@dataclass(frozen=True)
class TensorValue:
    """A small tensor by value: ``data`` is its elements in C order, little-endian. ``ValueError`` if it cannot be."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    device: str
    """Where it was: a device type such as ``cpu``, perhaps with an index."""

    def __post_init__(self) -> None:
        _check_device(self.device)
        if len(self.data) != _data_bytes(self.dtype, self.shape, RANK_MAX):
            raise ValueError(f"{len(self.data)} bytes are not a {self.dtype} tensor of shape {list(self.shape)}")


@dataclass(frozen=True)
class TorchSize:
    """A ``torch.Size``."""

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(type(size) is int and -(2**63) <= size < 2**63 for size in self.sizes):
            raise ValueError("a torch.Size holds 64-bit ints")


@dataclass(frozen=True)
class TorchDtype:
    """A ``torch.dtype``, by its name in the table of tensor dtypes."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {self.name!r}")


@dataclass(frozen=True)
class TorchDevice:
    """A ``torch.device``, as it prints: ``cpu``, ``cuda:1``."""

    name: str

    def __post_init__(self) -> None:
        _check_device(self.name)


@dataclass(frozen=True)
class TensorReference:
    """Stands where a larger tensor was, which is stored under ``key`` with the other tensors of the snapshot."""

    key: str


def encode(value: object) -> bytes:
    """The bytes of ``value``. Objects that appear twice are stored twice.

    ``TypeError`` names the path to the first leaf of a type that is not in the table; ``ValueError`` the path to a
    value beyond the limits, or to text that is not valid Unicode.
    """
    return _Writer([]).whole(value)


def decode(data: bytes | memoryview) -> object:
    """The value of bytes that nobody vouches for. ``FormatError`` for anything ``encode`` would not have written."""
    view = memoryview(data).cast("B")
    if len(view) < _LENGTH_BYTES:
        raise FormatError(f"plain value: {len(view)} bytes are too few")
    tokens_end = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")
    if tokens_end > len(view):
        raise FormatError("plain value: the tokens are cut short")
    tokens = _decode_tokens(view[_LENGTH_BYTES:tokens_end])
    reader = _Reader(tokens, view[tokens_end:])
    value = reader.value()
    if reader.token_position != len(tokens) or reader.data_position != len(reader.data):
        raise FormatError("plain value: tokens or data are left over")
    return value


# --- writing -----------------------------------------------------------------------------------------------------


class _Key:
    """An entry of a path that names a key or a set member rather than what lies behind it."""

    def __init__(self, key: object) -> None:
        self.key = key


class _Writer:
    def __init__(self, path: list[object]) -> None:
        self.path = path
        self.tokens: list[Token] = []
        self.data: list[bytes] = []

    def whole(self, value: object, depth: int = 0, *, hashable: bool = False) -> bytes:
        self.value(value, depth, hashable=hashable)
        return _assemble(self.tokens, self.data)

    def value(self, value: object, depth: int = 0, *, hashable: bool = False) -> None:
        if len(self.tokens) > TOKENS_MAX:
            raise ValueError(f"{show_path(self.path)}: a plain value holds at most {TOKENS_MAX} items")
        write = _WRITE.get(type(value))
        if hashable and type(value) in _UNHASHABLE:
            raise self.refusal(value)
        if write is not None:
            write(self, value)
        elif isinstance(value, np.generic) and type(value) is value.dtype.type:
            self.scalar(value)
        elif type(value) is np.ndarray:
            self.array(value)
        elif type(value) in _CONTAINERS:
            if depth == DEPTH_MAX:
                raise ValueError(
                    f"{show_path(self.path)}: more than {DEPTH_MAX} containers inside each other; does it hold itself?"
                )
            self.container(value, depth + 1, hashable)
        else:
            raise self.refusal(value)

    def container(self, value: Any, depth: int, hashable: bool) -> None:
        kind = type(value)
        self.tokens.append(_CONTAINERS[kind])
        if kind is deque:
            self.tokens.append(value.maxlen)
        self.tokens.append(len(value))
        if not isinstance(value, list | tuple | deque) and _is_crowded(Counter(), *value):
            raise ValueError(f"{show_path(self.path)}: more than {SAME_HASH_MAX} keys or members with the same hash")
        if kind in (set, frozenset):
            self.members(value, depth)
        elif kind in (list, tuple, deque):
            for index, item in enumerate(value):
                self.path.append(index)
                self.value(item, depth, hashable=hashable)
                self.path.pop()
        else:
            for key, item in value.items():
                self.path.append(_Key(key))
                self.value(key, depth, hashable=True)
                self.path[-1] = key
                self.value(item, depth)
                self.path.pop()

    def members(self, value: Iterable[object], depth: int) -> None:
        encoded: list[tuple[bytes, _Writer]] = []
        for member in value:
            self.path.append(_Key(member))
            writer = _Writer(self.path)
            encoded.append((writer.whole(member, depth, hashable=True), writer))
            self.path.pop()
        for _, writer in sorted(encoded, key=lambda pair: pair[0]):
            self.tokens += writer.tokens
            self.data += writer.data

    def text(self, value: str) -> str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{show_path(self.path)}: text with a lone surrogate is not valid Unicode") from None
        return value

    def integer(self, value: int) -> None:
        if -(2**63) <= value < 2**64:
            self.tokens.append(value)
        else:
            self.blob("int", value.to_bytes(_integer_bytes(value), "little", signed=True))

    def blob(self, tag: str, data: bytes) -> None:
        self.tokens += (tag, len(data))
        self.data.append(data)

    def scalar(self, value: np.generic) -> None:
        dtype = self.numpy_dtype(value)
        self.tokens += ("scalar", dtype.name)
        self.data.append(value.astype(dtype).tobytes())

    def array(self, value: np.ndarray[Any, Any]) -> None:
        dtype = self.numpy_dtype(value)
        if value.ndim > _NUMPY_RANK_MAX:
            raise ValueError(f"{show_path(self.path)}: an array has at most {_NUMPY_RANK_MAX} dimensions")
        self.tokens += ("array", dtype.name, value.ndim, *value.shape)
        self.data.append(value.astype(dtype, copy=False).tobytes())

    def tensor(self, value: TensorValue) -> None:
        self.tokens += ("tensor", value.dtype, value.device, len(value.shape), *value.shape)
        self.data.append(value.data)

    def numpy_dtype(self, value: Any) -> np.dtype[Any]:
        dtype = _NUMPY.get(value.dtype.name)
        if dtype is None:
            raise self.refusal(value)
        return dtype

    def refusal(self, value: object) -> TypeError:
        return TypeError(
            f"{show_path(self.path)}: {_describe(value)} cannot be stored as a plain value; "
            "leave it out, or convert it in state_dict()"
        )


def show_path(path: Sequence[object]) -> str:
    """``['sampler']['rng'][3]``, for messages; ``value`` if the path is empty."""
    return "".join(f"<key {_show(at.key)}>" if isinstance(at, _Key) else f"[{_show(at)}]" for at in path) or "value"


def _show(key: object) -> str:
    try:
        return reprlib.repr(key)
    except Exception:  # the repr of a caller's object, or of an int beyond Python's digit limit
        return type(key).__name__


def _describe(value: object) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, np.ndarray) and kind is np.ndarray:
        return f"numpy {value.dtype.name} array"
    if isinstance(value, np.generic):
        return f"numpy {value.dtype.name} scalar ({name})"
    if isinstance(value, enum.Enum):
        return f"enum member {name}.{value.name}"
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return f"NamedTuple {name}"
    for base in (bool, int, float, complex, str, bytes, list, tuple, OrderedDict, Counter, dict, deque, set, frozenset):
        if isinstance(value, base):
            return base.__name__ if kind is base else f"{name}, a subclass of {base.__name__},"
    return f"an object of type {name}"


_CONTAINERS: dict[type, str] = {
    list: "list",
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    deque: "deque",
    dict: "dict",
    OrderedDict: "ordered_dict",
    Counter: "counter",
}

# What may not be a key or a member. The last two are hashable in Python, but compare by what they stand for.
_UNHASHABLE = {list, set, deque, dict, OrderedDict, Counter, np.ndarray, TensorValue, TensorReference}
_UNHASHABLE_TAGS = {
    *(tag for kind, tag in _CONTAINERS.items() if kind in _UNHASHABLE),
    *("array", "tensor", "reference"),
}

_WRITE: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): lambda writer, value: writer.tokens.append(value),
    bool: lambda writer, value: writer.tokens.append(value),
    int: _Writer.integer,
    float: lambda writer, value: writer.tokens.append(value),
    complex: lambda writer, value: writer.tokens.extend(("complex", value.real, value.imag)),
    str: lambda writer, value: writer.tokens.extend(("str", writer.text(value))),
    bytes: lambda writer, value: writer.blob("bytes", value),
    TorchSize: lambda writer, value: writer.tokens.extend(("torch_size", len(value.sizes), *value.sizes)),
    TorchDtype: lambda writer, value: writer.tokens.extend(("torch_dtype", value.name)),
    TorchDevice: lambda writer, value: writer.tokens.extend(("torch_device", value.name)),
    TensorValue: _Writer.tensor,
    TensorReference: lambda writer, value: writer.tokens.extend(("reference", writer.text(value.key))),
}


# --- reading -----------------------------------------------------------------------------------------------------


def _decode_tokens(packed: memoryview) -> list[Token]:
    # msgspec allocates a list as long as the array's header claims, so the claim is checked first: a token is at
    # least one byte. Arrays inside the array are refused by type, before anything is allocated for them.
    head = packed[0] if len(packed) else 0
    if head & 0xF0 == 0x90:
        count = head & 0x0F
    elif head in (0xDC, 0xDD):
        count = int.from_bytes(packed[1 : 3 if head == 0xDC else 5], "big")
    else:
        raise FormatError("plain value: the tokens are no msgpack array")
    if count >= len(packed):
        raise FormatError("plain value: the tokens are cut short")
    if count > TOKENS_MAX:
        raise LimitExceeded(f"plain value: {count} items, more than {TOKENS_MAX}")
    try:
        tokens = _token_decoder.decode(packed)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"plain value: {error}") from None
    if msgspec.msgpack.encode(tokens) != packed:
        raise FormatError("plain value: a token is not in its shortest form")
    return tokens


class _Reader:
    def __init__(self, tokens: list[Token], data: memoryview) -> None:
        self.tokens = tokens
        self.data = data
        self.token_position = 0
        self.data_position = 0

    def value(self, depth: int = 0, *, hashable: bool = False) -> Any:
        token = self.token()
        if not isinstance(token, str):
            return token
        if hashable and token in _UNHASHABLE_TAGS:
            raise FormatError(f"plain value: {token} as a key or a member")
        leaf = _READ.get(token)
        if leaf is not None:
            try:
                return leaf(self)
            except ValueError as error:  # from the checks that the leaves make of themselves
                raise FormatError(f"plain value: {error}") from None
        if token not in _CONTAINERS.values():
            raise FormatError(f"plain value: unknown tag {token!r}")
        if depth == DEPTH_MAX:
            raise LimitExceeded(f"plain value: more than {DEPTH_MAX} containers inside each other")
        return self.container(token, depth + 1, hashable)

    def container(self, tag: str, depth: int, hashable: bool) -> object:
        if tag in ("dict", "ordered_dict", "counter"):
            return self.mapping(tag, depth)
        if tag in ("set", "frozenset"):
            members = self.members(depth)
            return members if tag == "set" else frozenset(members)
        length_max = self.token() if tag == "deque" else None
        if length_max is not None and (type(length_max) is not int or not 0 <= length_max <= BYTES_MAX):
            raise FormatError("plain value: the maxlen of a deque is nil or an int")
        items = [self.value(depth, hashable=hashable) for _ in range(self.count())]
        if tag == "list":
            return items
        if tag == "tuple":
            return tuple(items)
        if length_max is not None and len(items) > length_max:
            raise FormatError("plain value: a deque longer than its maxlen")
        return deque(items, length_max)

    def mapping(self, tag: str, depth: int) -> object:
        count = self.count()
        mapping: dict[object, object] = {"dict": dict, "ordered_dict": OrderedDict, "counter": Counter}[tag]()
        hashes: Counter[int] = Counter()
        for _ in range(count):
            key = self.unlike(hashes, self.value(depth, hashable=True))
            mapping[key] = self.value(depth)
        if len(mapping) != count:
            raise FormatError(f"plain value: equal keys in a {tag}")
        return mapping

    def members(self, depth: int) -> set[object]:
        count = self.count()
        members: set[object] = set()
        hashes: Counter[int] = Counter()
        before = b""
        for _ in range(count):
            token_start, data_start = self.token_position, self.data_position
            members.add(self.unlike(hashes, self.value(depth, hashable=True)))
            encoded = _assemble(
                self.tokens[token_start : self.token_position], [self.data[data_start : self.data_position]]
            )
            if encoded < before:
                raise FormatError("plain value: members of a set out of order")
            before = encoded
        if len(members) != count:
            raise FormatError("plain value: equal members in a set")
        return members

    def unlike(self, hashes: Counter[int], key: object) -> object:
        if _is_crowded(hashes, key):
            raise LimitExceeded(f"plain value: more than {SAME_HASH_MAX} keys or members with the same hash")
        return key

    def token(self) -> Token:
        if self.token_position == len(self.tokens):
            raise FormatError("plain value: a token is missing")
        self.token_position += 1
        return self.tokens[self.token_position - 1]

    def text(self) -> str:
        token = self.token()
        if not isinstance(token, str):
            raise FormatError("plain value: a str token is missing")
        return token

    def float(self) -> float:
        token = self.token()
        if not isinstance(token, float):
            raise FormatError("plain value: a float token is missing")
        return token

    def count(self, limit: int | None = None) -> int:
        """A number of things of which each takes at least one more token, unless ``limit`` says otherwise."""
        token = self.token()
        if type(token) is not int or token < 0:
            raise FormatError("plain value: a count is missing")
        if token > (len(self.tokens) - self.token_position if limit is None else limit):
            raise FormatError(f"plain value: a count of {token} is beyond the end")
        return token

    def take(self, count: int) -> memoryview:
        start = self.data_position
        if count > len(self.data) - start:
            raise FormatError("plain value: the data are cut short")
        self.data_position += count
        return self.data[start : self.data_position]

    def blob(self) -> bytes:
        return bytes(self.take(self.count(limit=len(self.data))))

    def integer(self) -> int:
        data = self.blob()
        value = int.from_bytes(data, "little", signed=True)
        if -(2**63) <= value < 2**64 or len(data) != _integer_bytes(value):
            raise FormatError("plain value: an int is not in its shortest form")
        return value

    def shape(self) -> tuple[int, ...]:
        return tuple(self.count(limit=BYTES_MAX) for _ in range(self.count()))

    def scalar(self) -> object:
        dtype = _numpy_dtype(self.text())
        data = self.take(dtype.itemsize)
        scalar = np.frombuffer(data, dtype)[0]
        if scalar.tobytes() != data:
            raise FormatError("plain value: a bool that is neither 0 nor 1")
        return scalar

    def array(self) -> np.ndarray[Any, Any]:
        dtype = _numpy_dtype(self.text())
        shape = self.shape()
        data = self.take(_data_bytes(dtype.name, shape, _NUMPY_RANK_MAX))
        return np.ndarray(shape, dtype, buffer=data).copy()

    def tensor(self) -> TensorValue:
        dtype, device, shape = self.text(), self.text(), self.shape()
        return TensorValue(dtype, shape, bytes(self.take(_data_bytes(dtype, shape, RANK_MAX))), device)

    def torch_size(self) -> TorchSize:
        return TorchSize(tuple(self.token() for _ in range(self.count())))  # type: ignore[misc] # it checks itself


_READ: dict[str, Callable[[_Reader], object]] = {
    "str": _Reader.text,
    "bytes": _Reader.blob,
    "int": _Reader.integer,
    "complex": lambda reader: complex(reader.float(), reader.float()),
    "scalar": _Reader.scalar,
    "array": _Reader.array,
    "tensor": _Reader.tensor,
    "torch_size": _Reader.torch_size,
    "torch_dtype": lambda reader: TorchDtype(reader.text()),
    "torch_device": lambda reader: TorchDevice(reader.text()),
    "reference": lambda reader: TensorReference(reader.text()),
}


# --- both --------------------------------------------------------------------------------------------------------

_STANDARD_NAMES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_EXTENSION_NAMES = (
    "bfloat16",
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
_NUMPY: dict[str, np.dtype[Any]] = {
    **{name: np.dtype(name).newbyteorder("<") for name in _STANDARD_NAMES},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENSION_NAMES},
}
"""The dtypes of numpy scalars and arrays: those of the tensor table that numpy can hold as they are."""


def _assemble(tokens: list[Token], data: Iterable[bytes | memoryview]) -> bytes:
    if len(tokens) > TOKENS_MAX:
        raise ValueError(f"a plain value holds at most {TOKENS_MAX} items")
    packed = msgspec.msgpack.encode(tokens)
    return b"".join((len(packed).to_bytes(_LENGTH_BYTES, "little"), packed, *data))


def _is_crowded(hashes: Counter[int], *keys: object) -> bool:
    """Counts the hashes of keys. Numbers that all have the same one are easily found, and as keys take time that grows
    with the square of how many they are."""
    for key in keys:
        number = hash(key)
        hashes[number] += 1
        if hashes[number] > SAME_HASH_MAX:
            return True
    return False


def _integer_bytes(value: int) -> int:
    return (value if value >= 0 else ~value).bit_length() // 8 + 1


def _numpy_dtype(name: str) -> np.dtype[Any]:
    if name not in _NUMPY:
        raise ValueError(f"unknown numpy dtype {name!r}")
    return _NUMPY[name]


def _data_bytes(dtype: str, shape: tuple[int, ...], rank_max: int) -> int:
    if dtype not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}")
    if len(shape) > rank_max:
        raise ValueError(f"{len(shape)} dimensions, more than {rank_max}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    # numpy and torch refuse an empty array whose other sizes are beyond an address space, so zeros count as ones.
    if math.prod(size or 1 for size in shape) * ITEM_BYTES[dtype] > BYTES_MAX:
        raise ValueError(f"a shape of {list(shape)} is too large")
    return math.prod(shape) * ITEM_BYTES[dtype]


def _check_device(name: str) -> None:
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"{name!r} is no device")
