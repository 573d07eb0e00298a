"""A complete reader of local fastckpt repositories, written from fastckpt/format/FORMAT.md alone.

It imports nothing from fastckpt, so it shows what the page says rather than what the library does. It reads everything
and checks everything, simply; it is not fast. Values of torch come back as tuples: ("tensor", device, dtype, array),
("torch_size", sizes), ("torch_dtype", name), ("torch_device", name), ("reference", key).
"""

import collections
import decimal
import itertools
import json
import math
import operator
import pathlib
import re
import struct

import ml_dtypes
import msgspec
import numpy as np
import zstandard
from blake3 import blake3

WRITER = r"\d{12}-[0-9a-f]{16}"
ATTEMPT = WRITER + r"-\d{6,}"
DIGEST = r"[0-9a-f]{64}"
PACK = rf"packs/({ATTEMPT})/(\d\d+)/(\d+)-(\d+)\.pack"
DEVICE = r"[a-z][a-z0-9_]{0,31}(:\d{1,5})?"

FORMAT_FIELDS = ["version", "features", "id", "chunk_bytes", "created"]
DECISION_FIELDS = ["kind", "number", "previous", "writer", "created", "live", "live_at"]
KIND_FIELDS = {"open": [], "commit": ["snapshot"], "abort": ["attempt"]}
SNAPSHOT_FIELDS = ["step", "attempt", "decision", "created", "bytes", "index", "metrics", "note"]
INDEX_FIELDS = ["attempt", "step", "layout", "layout_bytes", "parts", "bytes", "stored_bytes", "environment"]
LAYOUT_FIELDS = ["chunk_bytes", "keys", "owners", "dtypes", "shapes", "aliases", "shard_keys", "shard_offsets"]
LAYOUT_FIELDS += ["shard_sizes", "units", "writers", "rank_nodes"]
FAMILY_FIELDS = ["mesh", "sharded", "tensors", "splits", "counts"]
MESH_FIELDS = ["sizes", "start", "strides", "ranks"]
PART_FIELDS = ["attempt", "node", "layout", "tables", "blobs"]
TABLE_FIELDS = ["rank", "packs", "pack", "offset", "length", "codec", "hashes", "stored_hashes", "values"]
FOOTER_FIELDS = ["attempt", "writer", "number", "lengths", "codecs", "hashes"]

# numpy has no sub-byte integers, no bits and no complex32: they come back in what holds their bytes.
_STANDARD = ["bool", "float16", "float32", "float64", "complex64", "complex128"]
_STANDARD += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
_EXTENSION = ["bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
_BYTES = ["bits8", "bits1x8", "bits2x4", "bits4x2", "float4_e2m1fn_x2", *(f"uint{bits}" for bits in range(1, 8))]
NUMPY = {name: np.dtype(name) for name in _STANDARD} | {name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENSION}
DTYPES = NUMPY | {name: np.dtype("uint8") for name in _BYTES} | {f"int{bits}": np.dtype("int8") for bits in range(1, 8)}
DTYPES |= {"bits16": np.dtype("uint16"), "complex32": np.dtype([("real", "<f2"), ("imag", "<f2")])}

FOLDS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
MAPS = {"dict": dict, "ordered_dict": collections.OrderedDict, "counter": collections.Counter}
NOT_IN_KEYS = {"list", "dict", "ordered_dict", "counter", "deque", "set", "array", "tensor", "reference"}


class BadRepository(Exception):
    """What was read is not what FORMAT.md says."""


def need(condition, what):
    if not condition:
        raise BadRepository(what)


def whole(value, low=0, high=2**63 - 1):
    return type(value) is int and low <= value <= high


def same(a, b):
    """Equal in type as well: in Python True == 1 == 1.0, and the order of fields does not count."""
    return repr(a) == repr(b)


def like(pattern, value):
    return isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def fields(value, names, what):
    need(isinstance(value, dict) and list(value) == names, f"{what}: not the fields {names}")
    return value


def hashed(data):
    return blake3(data).digest()


def numpy_array(data, dtype, shape):
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)


def unpacked(data):
    try:
        return msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, ValueError) as error:
        raise BadRepository(f"msgpack: {error}") from error


def decompressed(frame, size):
    """The content of one zstd frame that must say itself that it holds `size` bytes."""
    try:
        need(zstandard.get_frame_parameters(frame).content_size == size, "zstd frame of another size")
        raw = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadRepository(f"zstd: {error}") from error
    need(len(raw) == size, "zstd frame shorter than it says")
    return raw


# Documents and tables ------------------------------------------------------------------------------------------------


def canonical(value):
    """JSON as a writer of the format writes it."""
    if type(value) is dict:
        return "{" + ",".join(f"{canonical(key)}:{canonical(item)}" for key, item in value.items()) + "}"
    if type(value) is list:
        return "[" + ",".join(map(canonical, value)) + "]"
    return number(value) if type(value) is float else json.dumps(value, ensure_ascii=False)


def number(value):
    """A float in the fewest digits that read back: 0.00001, 1e-6, 1000.0, 1e16."""
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    sign, digits, exponent = decimal.Decimal(repr(value)).normalize().as_tuple()
    text, point = "".join(map(str, digits)), len(digits) + exponent  # the number is 0.<text> times 10^point
    if text == "0":
        text = "0.0"
    elif 0 < point <= 16:
        text = f"{text[:point]:0<{point}}.{text[point:] or 0}"
    elif -5 < point <= 0:
        text = f"0.{'0' * -point}{text}"
    else:
        text = f"{text[0]}{'.' * (len(text) > 1)}{text[1:]}e{point - 1}"
    return "-" * sign + text


def sealed(data, what):
    """The JSON of a document, seal checked and canonical, whatever its fields."""
    need(len(data) <= 64 << 20, f"{what}: too long")
    lines = data.split(b"\n")
    need(len(lines) == 3 and lines[2] == b"", f"{what}: not two lines")
    need(blake3(lines[0]).hexdigest().encode() == lines[1], f"{what}: broken seal")
    try:
        value = json.loads(lines[0].decode())
        again = canonical(value).encode()
    except (ValueError, RecursionError) as error:
        raise BadRepository(f"{what}: {error}") from error
    need(again == lines[0], f"{what}: not canonical")  # this refuses repeated fields as well
    return value


def table(data, names, what, last=None):
    """The fields of a table, among them perhaps a ``last`` one."""
    need(len(data) >= 16 and data[:8] == b"FCKTAB01", f"{what}: not a table")
    (size,) = struct.unpack_from("<Q", data, 8)
    need(size <= 256 << 20, f"{what}: too long")
    value = unpacked(decompressed(data[16:], size))
    return fields(value, [*names, last] if isinstance(value, dict) and last in value else names, what)


# Layout --------------------------------------------------------------------------------------------------------------


class Layout:
    """What a layout says: `chunks` is a list of (rank, [(shard, first byte, bytes), ...])."""

    def __init__(self, data):
        t = table(data, LAYOUT_FIELDS, "layout", "families")
        need(all(isinstance(t[name], list) for name in t if name != "chunk_bytes"), "layout: a column is no list")
        need(t.get("families") != [], "layout: families, but none")
        self.chunk_bytes = t["chunk_bytes"]
        need(self.chunk_bytes in [2**n for n in range(12, 27)], "layout: chunk size")
        self.rank_nodes = t["rank_nodes"]
        self._check_nodes()
        self.keys, self.owners, self.dtypes, self.shapes = t["keys"], t["owners"], t["dtypes"], t["shapes"]
        self._check_tensors()
        self.aliases = {}
        for pair in t["aliases"]:
            need(isinstance(pair, list) and len(pair) == 2, "layout: alias is no pair")
            need(all(whole(i, 0, len(self.keys) - 1) for i in pair), "layout: alias of no tensor")
            need(pair[0] not in self.aliases, "layout: alias named twice")
            self.aliases[pair[0]] = pair[1]
        for i, j in self.aliases.items():
            need(j not in self.aliases and i != j, "layout: alias of an alias")
            need((self.dtypes[i], self.shapes[i]) == (self.dtypes[j], self.shapes[j]), "layout: alias of another type")
        self.shards = list(zip(t["shard_keys"], t["shard_offsets"], t["shard_sizes"], strict=False))
        need(len({len(t[n]) for n in ("shard_keys", "shard_offsets", "shard_sizes")}) == 1, "layout: shard columns")
        self.families = t.get("families", [])
        self._check_families()
        self._check_shards()
        self.chunks = []
        self._number_chunks(t["units"])
        self._deal(t["writers"])
        for family in self.families:
            self._add_family(family)

    def item_bytes(self, tensor):
        return DTYPES[self.dtypes[tensor]].itemsize

    def shard_bytes(self, shard):
        tensor, _, sizes = self.shards[shard]
        return math.prod(sizes) * self.item_bytes(tensor)

    def _check_nodes(self):
        need(self.rank_nodes, "layout: no ranks")
        seen = 0
        for node in self.rank_nodes:
            need(whole(node, 0, seen), "layout: nodes are not numbered by their lowest rank")
            seen = max(seen, node + 1)

    def _check_tensors(self):
        count = len(self.keys)
        need(count == len(self.owners) == len(self.dtypes) == len(self.shapes), "layout: tensor columns")
        need(all(isinstance(k, str) and 0 < len(k.encode()) <= 4096 for k in self.keys), "layout: bad key")
        need(all(whole(owner, -1, len(self.rank_nodes) - 1) for owner in self.owners), "layout: owner is no rank")
        names = list(zip(self.keys, self.owners, strict=True))
        need(all(a < b for a, b in itertools.pairwise(names)), "layout: tensors out of order")
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            need(isinstance(dtype, str) and dtype in DTYPES, f"layout: unknown dtype {dtype!r}")
            need(isinstance(shape, list) and len(shape) <= 64 and all(map(whole, shape)), "layout: bad shape")
            need(math.prod(shape) * DTYPES[dtype].itemsize <= 2**62, "layout: tensor too large")

    def _check_shards(self):
        boxes = collections.defaultdict(list)
        for tensor, offsets, sizes in self.shards:
            need(whole(tensor, 0, len(self.keys) - 1) and tensor not in self.aliases, "layout: shard of no tensor")
            shape = self.shapes[tensor]
            need(isinstance(offsets, list) and isinstance(sizes, list), "layout: bad box")
            need(len(offsets) == len(sizes) == len(shape), "layout: bad box")
            for offset, size, end in zip(offsets, sizes, shape, strict=True):
                need(whole(offset) and whole(size, 1) and offset + size <= end, "layout: box outside its tensor")
            boxes[tensor].append((offsets, sizes))
        for tensor, shape in enumerate(self.shapes):
            if tensor in self.aliases or tensor in self.in_family:
                need(not boxes[tensor], "layout: shards of a tensor that has none")
                continue
            mine = sorted(boxes[tensor])
            need(sum(math.prod(sizes) for _, sizes in mine) == math.prod(shape), "layout: tensor not covered once")
            for i, (offsets, sizes) in enumerate(mine):
                for other, other_sizes in mine[i + 1 :]:
                    if offsets and other[0] >= offsets[0] + sizes[0]:
                        break
                    apart = any(
                        a + n <= b or b + m <= a for a, n, b, m in zip(offsets, sizes, other, other_sizes, strict=True)
                    )
                    need(apart, "layout: shards overlap")

    def _cuts(self, shard):
        """First byte and bytes of each chunk of a shard that is a unit of its own."""
        tensor, offsets, sizes = self.shards[shard]
        shape, item = self.shapes[tensor], self.item_bytes(tensor)
        if not shape:
            yield 0, item
            return
        row_bytes = math.prod(shape[1:]) * item
        mine = math.prod(sizes[1:]) * item
        if row_bytes <= self.chunk_bytes:
            rows = self.chunk_bytes // row_bytes
            at, end = offsets[0], offsets[0] + sizes[0]
            while at < end:
                line = min((at // rows + 1) * rows, end)
                yield (at - offsets[0]) * mine, (line - at) * mine
                at = line
        else:
            step = self.chunk_bytes // item * item
            for row in range(sizes[0]):
                for start in range(0, mine, step):
                    yield row * mine + start, min(step, mine - start)

    def _number_chunks(self, units):
        seen = [False] * len(self.shards)
        for unit in units:
            need(isinstance(unit, list) and unit, "layout: empty unit")
            for shard in unit:
                need(whole(shard, 0, len(seen) - 1) and not seen[shard], "layout: shard in two units or in none")
                seen[shard] = True
            if len(unit) == 1:
                for start, size in self._cuts(unit[0]):
                    self.chunks.append([(unit[0], start, size)])
                    need(len(self.chunks) <= 10**7, "layout: too many chunks")
            else:
                bundle = [(shard, 0, self.shard_bytes(shard)) for shard in unit]
                need(all(size <= self.chunk_bytes // 64 for _, _, size in bundle), "layout: large shard in a bundle")
                need(sum(size for _, _, size in bundle) <= self.chunk_bytes // 4, "layout: large bundle")
                self.chunks.append(bundle)
        need(all(seen), "layout: shard in no unit")

    def _check_families(self):
        self.in_family = set()
        need(len(self.families) <= 4096, "layout: too many families")
        for family in self.families:
            fields(family, FAMILY_FIELDS, "family")
            mesh = fields(family["mesh"], MESH_FIELDS, "mesh")
            need(isinstance(family["counts"], bytes), "family: counts")
            columns = [mesh["sizes"], mesh["strides"], mesh["ranks"], family["sharded"], family["tensors"]]
            need(
                all(isinstance(c, list) and all(map(whole, c)) for c in columns), "family: a column is no list of ints"
            )
            sizes, axes, tensors = mesh["sizes"], family["sharded"], family["tensors"]
            need(len(sizes) <= 64 and 0 not in sizes and whole(mesh["start"]), "mesh: bad sizes")
            need(math.prod(sizes) <= len(self.rank_nodes), "mesh: more ranks than there are")
            if mesh["ranks"]:
                need(not mesh["strides"] and not mesh["start"], "mesh: listed, and not")
                ranks = mesh["ranks"]
            else:
                need(len(mesh["strides"]) == len(sizes), "mesh: strides")
                grid = itertools.product(*(range(size) for size in sizes))
                ranks = [mesh["start"] + sum(map(operator.mul, at, mesh["strides"])) for at in grid]
            need(len(set(ranks)) == len(ranks) == math.prod(sizes), "mesh: a rank twice, or missing")
            need(max(ranks) < len(self.rank_nodes), "mesh: no rank of the job")
            need(axes == sorted(set(axes)) and all(axis < len(sizes) for axis in axes), "family: sharded")
            need(tensors and tensors == sorted(set(tensors)) and tensors[-1] < len(self.keys), "family: tensors")
            need(not self.in_family & set(tensors), "family: a tensor of another")
            self.in_family |= set(tensors)
            need(isinstance(family["splits"], list) and len(family["splits"]) == len(tensors), "family: splits")
            for tensor, splits in zip(tensors, family["splits"], strict=True):
                need(self.owners[tensor] == -1 and tensor not in self.aliases, "family: one rank's own, or tied")
                need(isinstance(splits, list), "family: splits")
                for pair in splits:
                    need(
                        isinstance(pair, list) and len(pair) == 2 and all(map(whole, pair)), "family: split is no pair"
                    )
                    need(pair[0] < len(self.shapes[tensor]), "family: split of no dimension")
                need(sorted(axis for _, axis in splits) == axes, "family: split over other dimensions")
            need(len(family["counts"]) == 4 * len(ranks), "family: counts")
            family["array"] = np.array(ranks, object).reshape(sizes)

    def _add_family(self, family):
        """Numbers its shards and chunks behind those that are there."""
        sizes, axes = family["mesh"]["sizes"], family["sharded"]
        counts = iter(struct.unpack(f"<{len(family['counts']) // 4}I", family["counts"]))
        for at in itertools.product(*(range(sizes[axis]) for axis in axes)):
            coordinate = dict(zip(axes, at, strict=True))
            first, bundle, single = len(self.chunks), [], []
            for tensor, splits in zip(family["tensors"], family["splits"], strict=True):
                box = [[0, size] for size in self.shapes[tensor]]
                for dim, axis in splits:
                    start, stop = box[dim]
                    step = math.ceil((stop - start) / sizes[axis])
                    low = min(start + step * coordinate[axis], stop)
                    box[dim] = [low, min(low + step, stop)]
                if any(low == high for low, high in box):
                    continue
                shard = len(self.shards)
                self.shards.append((tensor, [low for low, _ in box], [high - low for low, high in box]))
                size = self.shard_bytes(shard)
                if size > self.chunk_bytes // 64:
                    single.append(shard)
                    continue
                if bundle and sum(piece[2] for piece in bundle) + size > self.chunk_bytes // 4:
                    self.chunks.append(bundle)
                    bundle = []
                bundle.append((shard, 0, size))
            if bundle:
                self.chunks.append(bundle)
            for shard in single:
                for start, size in self._cuts(shard):
                    self.chunks.append([(shard, start, size)])
                    need(len(self.chunks) <= 10**7, "layout: too many chunks")
            holders = family["array"][tuple(coordinate.get(axis, slice(None)) for axis in range(len(sizes)))]
            for rank in holders.reshape(-1) if isinstance(holders, np.ndarray) else [holders]:
                count = next(counts)
                self.by_rank[rank].extend(range(first, first + count))
                first += count
            need(first == len(self.chunks), "family: counts of other chunks")

    def _deal(self, writers):
        self.by_rank = [[] for _ in self.rank_nodes]
        at = 0
        for pair in writers:
            need(isinstance(pair, list) and len(pair) == 2, "layout: writer is no pair")
            need(whole(pair[0], 0, len(self.by_rank) - 1), "layout: writer is no rank")
            need(whole(pair[1], 0, len(self.chunks) - at), "layout: writers of no chunk")
            self.by_rank[pair[0]].extend(range(at, at + pair[1]))
            at += pair[1]
        need(at == len(self.chunks), "layout: chunks without a writer")


# Plain values --------------------------------------------------------------------------------------------------------


def plain_value(blob):
    """The Python object of an encoded plain value."""
    need(8 <= len(blob) <= 64 << 20, "value: bad length")
    (size,) = struct.unpack_from("<Q", blob)
    need(size <= len(blob) - 8, "value: cut short")
    tokens = unpacked(blob[8 : 8 + size])
    need(isinstance(tokens, list) and len(tokens) <= 10_000_000, "value: no array of tokens")
    need(all(t is None or type(t) in (bool, int, float, str) for t in tokens), "value: token of another type")
    need(msgspec.msgpack.encode(tokens) == blob[8 : 8 + size], "value: tokens not in their shortest form")
    decoder = _Values(tokens, blob[8 + size :])
    value = decoder.value(0, False)
    need(decoder.at == len(tokens) and decoder.data_at == len(decoder.data), "value: something is left over")
    return value


class _Values:
    def __init__(self, tokens, data):
        self.tokens, self.data, self.at, self.data_at = tokens, data, 0, 0

    def token(self, kind=object):
        need(self.at < len(self.tokens), "value: a token is missing")
        token = self.tokens[self.at]
        need(kind is object or type(token) is kind, "value: token of the wrong type")
        self.at += 1
        return token

    def number(self):
        n = self.token(int)
        need(n >= 0, "value: negative number")
        return n

    def count(self):
        n = self.number()
        need(n <= len(self.tokens) - self.at, "value: more members than tokens")
        return n

    def take(self, n):
        need(n <= len(self.data) - self.data_at, "value: data is missing")
        self.data_at += n
        return self.data[self.data_at - n : self.data_at]

    def name(self, pattern):
        name = self.token(str)
        need(like(pattern, name), f"value: unknown {name!r}")
        return name

    def dtype(self, known=DTYPES):
        name = self.token(str)
        need(name in known, f"value: unknown dtype {name!r}")
        return name

    def array(self, dtype, ranks):
        rank = self.number()
        need(rank <= ranks, "value: too many dimensions")
        sizes = [self.number() for _ in range(rank)]
        item = DTYPES[dtype].itemsize
        need(math.prod(max(n, 1) for n in sizes) * item <= 2**63 - 1, "value: array too large")
        return numpy_array(self.take(math.prod(sizes) * item), dtype, sizes)

    def members(self, n, depth):
        """n members of a set, and that they rise by their encodings."""
        last, values = b"", []
        for _ in range(n):
            at, data_at = self.at, self.data_at
            values.append(self.value(depth, True))
            tokens = msgspec.msgpack.encode(self.tokens[at : self.at])
            encoding = struct.pack("<Q", len(tokens)) + tokens + self.data[data_at : self.data_at]
            need(last <= encoding, "value: members out of order")
            last = encoding
        return values

    def value(self, depth, in_key):
        tag = self.token()
        if type(tag) is not str:
            return tag
        need(not (in_key and tag in NOT_IN_KEYS), f"value: {tag} inside a key")
        if tag in FOLDS or tag in MAPS or tag == "deque":
            need(depth < 32, "value: nested too deep")
            return self.container(tag, depth + 1, in_key)
        match tag:
            case "str":
                return self.token(str)
            case "bytes":
                return self.take(self.number())
            case "int":
                data = self.take(self.number())
                n = int.from_bytes(data, "little", signed=True)
                need(not -(2**63) <= n < 2**64, "value: small number as a long one")
                need(len(data) == ((n if n >= 0 else ~n).bit_length() // 8 + 1), "value: long number too long")
                return n
            case "complex":
                return complex(self.token(float), self.token(float))
            case "scalar":
                dtype = self.dtype(NUMPY)
                return numpy_array(self.take(DTYPES[dtype].itemsize), dtype, ())[()]
            case "array":
                return self.array(self.dtype(NUMPY), 32)
            case "tensor":
                dtype, device = self.dtype(), self.name(DEVICE)
                return tag, device, dtype, self.array(dtype, 64)
            case "torch_size":
                sizes = tuple(self.token(int) for _ in range(self.count()))
                need(all(whole(size, -(2**63)) for size in sizes), "value: torch_size beyond 64 bits")
                return tag, sizes
            case "torch_dtype":
                return tag, self.dtype()
            case "torch_device":
                return tag, self.name(DEVICE)
            case "reference":
                return tag, self.token(str)
        raise BadRepository(f"value: unknown tag {tag!r}")

    def container(self, tag, depth, in_key):
        if tag in MAPS:
            pairs = [(self.value(depth, True), self.value(depth, in_key)) for _ in range(self.count())]
            result = MAPS[tag](dict(pairs))
            need(len(result) == len(pairs), "value: equal keys")
            return result
        maxlen = self.token() if tag == "deque" else None
        n = self.count()
        if tag == "deque":
            need(maxlen is None or whole(maxlen, n), "value: bad maxlen")
            return collections.deque([self.value(depth, in_key) for _ in range(n)], maxlen)
        if tag in ("set", "frozenset"):
            result = FOLDS[tag](self.members(n, depth))
            need(len(result) == n, "value: equal members")
            return result
        return FOLDS[tag]([self.value(depth, in_key) for _ in range(n)])


# Repository ----------------------------------------------------------------------------------------------------------


class Repository:
    """A repository in a local directory; `snapshots` are the live ones, oldest COMMIT first."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        data = self.read("FORMAT", limit=64 << 20)
        head = sealed(data, "FORMAT")
        need(isinstance(head, dict) and whole(head.get("version"), 1, 1), "FORMAT: unknown version")
        need(head.get("features") in ([], ["compact"]), "FORMAT: unknown features")
        fields(head, FORMAT_FIELDS, "FORMAT")
        size = head["chunk_bytes"]
        need(whole(size, 4096, 64 << 20) and size & (size - 1) == 0, "FORMAT: bad chunk_bytes")
        need(like(r"[0-9a-f]{32}", head["id"]) and isinstance(head["created"], str), "FORMAT: bad field")
        self.chunk_bytes = size
        self.snapshots = self._history(blake3(data).hexdigest())

    def read(self, name, size=None, limit=None):
        """A whole object, if it has the size that it must have."""
        try:
            path = self.root / name
            found = path.stat().st_size
            need(size is None or found == size, f"{name}: {found} bytes, not {size}")
            need(limit is None or found <= limit, f"{name}: too long")
            data = path.read_bytes()
        except OSError as error:
            raise BadRepository(f"{name}: {error}") from error
        need(len(data) == found, f"{name}: changed while it was read")
        return data

    def _history(self, previous):
        """Reads all decisions from number 1: a suffix alone would not show every broken rule."""
        folder = self.root / "decisions"
        names = sorted(p.name for p in folder.iterdir() if like(r"\d{12}", p.name)) if folder.is_dir() else []
        writer, live, live_at, ended = None, [], 0, set()
        for number, name in enumerate(names, 1):
            need(name == f"{number:012d}", f"decision {number} is missing")
            data = self.read(f"decisions/{name}", limit=64 << 20)
            d = sealed(data, f"decision {number}")
            need(isinstance(d, dict) and d.get("kind") in KIND_FIELDS, f"decision {number}: unknown kind")
            fields(d, DECISION_FIELDS + KIND_FIELDS[d["kind"]], f"decision {number}")
            need(same((d["number"], d["previous"]), (number, previous)), f"decision {number} does not follow")
            need(like(WRITER, d["writer"]) and isinstance(d["created"], str), f"decision {number}: bad field")
            if d["kind"] == "open":
                need(int(d["writer"][:12]) == number, f"decision {number}: the number is not in the writer's id")
                writer = d["writer"]
            else:
                need(d["writer"] == writer, f"decision {number}: its writer is not the last that opened")
                attempt = d["attempt"] if d["kind"] == "abort" else self._snapshot(d["snapshot"], number)["attempt"]
                need(like(ATTEMPT, attempt) and attempt.startswith(writer + "-"), f"decision {number}: bad attempt")
                need(attempt not in ended, f"decision {number}: its attempt has ended before")
                ended.add(attempt)
            if d["kind"] == "commit":
                live = [*live, d["snapshot"]]
            live_at = number if d["live"] is not None else live_at
            need(d["live"] is None or same(d["live"], live), f"decision {number}: live does not follow")
            need(same(d["live_at"], live_at), f"decision {number}: live_at does not follow")
            need(live_at > 0, "decision 1: no list of live snapshots")
            previous = blake3(data).hexdigest()
        return live

    @staticmethod
    def _snapshot(s, number):
        fields(s, SNAPSHOT_FIELDS, "snapshot")
        need(whole(s["step"], 0, 2**53) and same(s["decision"], number), "snapshot: bad step or decision")
        need(like(ATTEMPT, s["attempt"]) and like(DIGEST, s["index"]) and whole(s["bytes"]), "snapshot: bad field")
        need(isinstance(s["metrics"], dict) and len(s["metrics"]) <= 64, "snapshot: bad metrics")
        need(all(type(v) is float and math.isfinite(v) for v in s["metrics"].values()), "snapshot: bad metrics")
        need(isinstance(s["note"], str) and len(s["note"].encode()) <= 4096, "snapshot: bad note")
        need(isinstance(s["created"], str), "snapshot: bad time")
        return s

    def open(self, snapshot):
        return Snapshot(self, snapshot)

    def pack_footer(self, name):
        """(attempt, rank, number, [(length, codec, hash), ...]) from the end of a pack."""
        match = re.fullmatch(PACK, name, re.ASCII)
        need(match, f"{name}: no name of a pack")
        data = self.read(name)
        need(len(data) >= 48 and data[-8:] == b"FCKPACK1", f"{name}: no footer")
        (size,) = struct.unpack_from("<I", data, len(data) - 44)
        need(4 <= size <= len(data) - 44, f"{name}: bad footer")
        body = data[-44 - size : -44]
        need(hashed(body) == data[-40:-8], f"{name}: broken footer")
        f = fields(unpacked(decompressed(body[4:], struct.unpack_from("<I", body)[0])), FOOTER_FIELDS, name)
        need(all(isinstance(f[n], bytes) for n in ("lengths", "codecs", "hashes")), f"{name}: bad columns")
        count = len(f["codecs"])
        need((len(f["lengths"]), len(f["hashes"])) == (4 * count, 32 * count), f"{name}: bad columns")
        named = (match[1], int(match[3]), int(match[4]))
        need(same((f["attempt"], f["writer"], f["number"]), named), f"{name}: footer of another pack")
        need(int(match[2]) == f["writer"] // 256, f"{name}: in the wrong folder")
        lengths = np.frombuffer(f["lengths"], "<u4").tolist()
        need(sum(lengths) == len(data) - 44 - size, f"{name}: lengths do not add up")
        need(max(f["codecs"], default=0) <= 1, f"{name}: unknown codec")
        hashes = [f["hashes"][i * 32 : i * 32 + 32] for i in range(count)]
        return *named, list(zip(lengths, f["codecs"], hashes, strict=True))


class Snapshot:
    """One snapshot: `tensors()` by (key, owner), `values()` a list, one dict of names a rank."""

    def __init__(self, repository, snapshot):
        self.repository = repository
        attempt = snapshot["attempt"]
        data = repository.read(f"attempts/{attempt}/index", limit=64 << 20)
        need(blake3(data).hexdigest() == snapshot["index"], "index: not the one that was committed")
        index = sealed(data, "index")
        last = [name for name in ("values", "rolls") if name in index]
        index = fields(index, INDEX_FIELDS + last, "index")
        need(same((index["attempt"], index["step"]), (attempt, snapshot["step"])), "index: of another snapshot")
        need(like(DIGEST, index["layout"]) and whole(index["layout_bytes"]), "index: bad layout")
        need(same(index["bytes"], snapshot["bytes"]) and whole(index["stored_bytes"]), "index: bad bytes")
        need(isinstance(index["environment"], dict) and isinstance(index["parts"], list), "index: bad field")
        data = repository.read(f"layouts/{index['layout']}", size=index["layout_bytes"])
        need(blake3(data).hexdigest() == index["layout"], "layout: broken digest")
        self.layout = Layout(data)
        nodes = len(set(self.layout.rank_nodes))
        if "rolls" in index:
            need(nodes > 256 and not index["parts"], "index: rolls of few nodes")
            index["parts"] = self._rolls(index["rolls"], attempt, nodes)
        need(len(index["parts"]) == nodes, "index: not one part a node")
        self.tables, self._blobs = {}, []
        for node, entry in enumerate(index["parts"]):
            fields(entry, ["node", "digest", "size"], "index")
            need(
                same(entry["node"], node) and like(DIGEST, entry["digest"]) and whole(entry["size"]), "index: bad part"
            )
            data = repository.read(f"attempts/{attempt}/part-{node:06d}", size=entry["size"])
            need(blake3(data).hexdigest() == entry["digest"], f"part {node}: broken digest")
            part = table(data, PART_FIELDS, f"part {node}")
            found = (part["attempt"], part["node"], part["layout"])
            need(same(found, (attempt, node, index["layout"])), f"part {node}: of another snapshot")
            self._part(part, node)

        if "values" in index:
            self._check_kinds(index["values"])

    def _part(self, part, node):
        need(isinstance(part["tables"], list) and isinstance(part["blobs"], list), "part: bad field")
        need(all(isinstance(blob, bytes) for blob in part["blobs"]), "part: bad blob")
        self._blobs.append({hashed(blob): blob for blob in part["blobs"]})
        ranks = [rank for rank, at in enumerate(self.layout.rank_nodes) if at == node]
        need(len(ranks) == len(part["tables"]), "part: not one table a rank")
        for rank, t in zip(ranks, part["tables"], strict=True):
            fields(t, TABLE_FIELDS, "part")
            need(same(t["rank"], rank), "part: tables out of order")
            count = len(self.layout.by_rank[rank])
            need(all(isinstance(t[n], bytes) for n in TABLE_FIELDS[2:8]), "part: a column is no byte string")
            widths = {"pack": 4, "offset": 8, "length": 4, "codec": 1, "hashes": 32}
            need(all(len(t[n]) == count * width for n, width in widths.items()), "part: columns of another length")
            need(max(t["codec"], default=0) <= 1, "part: unknown codec")
            need(len(t["stored_hashes"]) == 32 * sum(t["codec"]), "part: columns of another length")
            need(isinstance(t["packs"], list) and isinstance(t["values"], dict), "part: bad field")
            for pack in t["packs"]:
                fields(pack, ["name", "size"], "part")
                need(like(PACK, pack["name"]) and whole(pack["size"]), "part: bad pack")
            for name, digest in t["values"].items():
                need(isinstance(name, str) and isinstance(digest, bytes) and len(digest) == 32, "part: bad value")
            self.tables[rank] = t

    def _rolls(self, rolls, attempt, nodes):
        """The parts that they name."""
        need(isinstance(rolls, list) and len(rolls) == math.ceil(nodes / 256), "index: rolls")
        parts = []
        for number, entry in enumerate(rolls):
            fields(entry, ["digest", "size"], "index")
            data = self.repository.read(f"attempts/{attempt}/roll-{number:06d}", size=entry["size"])
            need(blake3(data).hexdigest() == entry["digest"], "roll: broken digest")
            roll = table(data, ["attempt", "number", "digests", "sizes"], "roll")
            need(same((roll["attempt"], roll["number"]), (attempt, number)), "roll: of another snapshot")
            count = min(256, nodes - 256 * number)
            need(isinstance(roll["digests"], bytes) and isinstance(roll["sizes"], bytes), "roll: bad field")
            need(len(roll["digests"]) == 32 * count and len(roll["sizes"]) == 4 * count, "roll: other nodes")
            for at, size in enumerate(struct.unpack(f"<{count}I", roll["sizes"])):
                digest = roll["digests"][32 * at : 32 * at + 32].hex()
                parts.append({"node": len(parts), "digest": digest, "size": size})
        return parts

    def _check_kinds(self, kinds):
        """That they are what the tables say of values."""
        need(isinstance(kinds, dict), "index: values")
        tables = [table["values"] for _, table in sorted(self.tables.items())]
        names = sorted({name for table in tables for name in table})
        need(list(kinds) == names, "index: other values")
        for name in names:
            digests = [table.get(name) for table in tables]
            kind = "some" if None in digests else "same" if len(set(digests)) == 1 else "own"
            need(same(kinds[name], kind), "index: a value of another kind")

    def values(self):
        result = []
        for rank, node in enumerate(self.layout.rank_nodes):
            blobs = self._blobs[0] | self._blobs[node]
            mine = self.tables[rank]["values"]
            need(all(digest in blobs for digest in mine.values()), "a value is missing")
            result.append({name: plain_value(blobs[digest]) for name, digest in mine.items()})
        return result

    def _chunks(self):
        """(pieces, raw bytes) of every chunk, checked."""
        for rank, numbers in enumerate(self.layout.by_rank):
            t = self.tables[rank]
            columns = [np.frombuffer(t[n], d).tolist() for n, d in (("pack", "<u4"), ("offset", "<u8"))]
            columns += [np.frombuffer(t["length"], "<u4").tolist(), list(t["codec"])]
            packs, stored_hashes = {}, 0
            for i, (number, pack, offset, length, codec) in enumerate(zip(numbers, *columns, strict=True)):
                pieces = self.layout.chunks[number]
                size = sum(piece[2] for piece in pieces)
                digest = t["hashes"][32 * i : 32 * i + 32]
                need(pack < len(t["packs"]), "chunk in no pack")
                if pack not in packs:
                    packs[pack] = self.repository.read(t["packs"][pack]["name"], size=t["packs"][pack]["size"])
                need(offset + length <= len(packs[pack]), "chunk beyond its pack")
                raw = packs[pack][offset : offset + length]
                if codec:
                    need(hashed(raw) == t["stored_hashes"][stored_hashes : stored_hashes + 32], "damaged chunk")
                    stored_hashes += 32
                    raw = decompressed(raw, size)
                need(len(raw) == size, "chunk of another size")
                need(hashed(raw) == digest, "damaged chunk")
                yield pieces, raw

    def tensors(self):
        layout = self.layout
        shards = [bytearray(layout.shard_bytes(shard)) for shard in range(len(layout.shards))]
        for pieces, raw in self._chunks():
            at = 0
            for shard, start, size in pieces:
                shards[shard][start : start + size] = raw[at : at + size]
                at += size
        arrays = [
            None if i in layout.aliases else np.empty(shape, DTYPES[dtype])
            for i, (dtype, shape) in enumerate(zip(layout.dtypes, layout.shapes, strict=True))
        ]
        for data, (tensor, offsets, sizes) in zip(shards, layout.shards, strict=True):
            box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            arrays[tensor][box] = numpy_array(data, layout.dtypes[tensor], sizes)
        arrays = [arrays[layout.aliases.get(i, i)] for i in range(len(arrays))]
        return dict(zip(zip(layout.keys, layout.owners, strict=True), arrays, strict=True))
