"""``fastckpt import torch``: a file written by ``torch.save`` becomes a snapshot.

The file is read by a child process that is confined (``job/torch_file.py``); this process has no torch, and checks all
that the child says before it uses any of it. The bytes go from the child's pipe to the packs, never all in memory.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import click

from fastckpt.cli.arguments import parse_step, repository_argument
from fastckpt.cli.terminal import Command, Terminal, count_text, pass_terminal, size_text

if TYPE_CHECKING:
    from fastckpt.agreement import Attempt
    from fastckpt.format.decision import Live
    from fastckpt.format.shard import Box
    from fastckpt.plan.save_plan import RankOffer
    from fastckpt.repository.writer import ChunkWriter
    from fastckpt.save import Saves
    from fastckpt.storage.store import Store
    from fastckpt.trace import Trace

READER = "fastckpt.job.torch_file"
HEADER_BYTES_MAX = 256 * 1024 * 1024
SILENT_SECONDS_MAX = 600
"""A child that sends nothing for so long, and a second for every ``SILENT_BYTES_SECOND`` of the file, is given up."""
SILENT_BYTES_SECOND = 10 * 1024 * 1024
EXPANSION_MAX = 4
EXPANSION_BYTES = 64 * 1024 * 1024
"""Tensors may be views, and overlap; but a file may not claim more than so many times its size, and these bytes."""

KINDS = {"code": 15, "unsupported": 15, "damaged": 14, "torch": 1, "memory": 1}
"""Exit codes by the kind of error that the child reports."""


class ImportFailed(click.ClickException):
    """The file cannot be imported."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code: int = code  # type: ignore[misc] # click means it as a default


@dataclass(frozen=True)
class Tensor:
    key: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    tied_to: int | None
    """Number of the tensor that is the same memory."""


@dataclass(frozen=True)
class Content:
    """What a file holds, checked."""

    torch: str
    tensors: tuple[Tensor, ...]
    values: Mapping[str, bytes]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors if tensor.tied_to is None)


@click.command(cls=Command, name="torch")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@repository_argument
@click.option(
    "--step", default="0", callback=parse_step, metavar="N", help="The step of the new snapshot; 0 by default."
)
@click.option("--name", default="", help="Put everything below this name, such as 'model'.")
@click.option("--note", default="", help="A note to keep with the snapshot.")
@click.option("-n", "--dry-run", is_flag=True, help="Read the file, say what would be saved, and save nothing.")
@pass_terminal
def command(terminal: Terminal, file: str, repo: str, step: int | None, name: str, note: str, dry_run: bool) -> None:
    """Save the state dict in FILE (.pt, .pth, .bin) as a snapshot.

    A bare state dict goes below a name of its own: with --name model it is restored by
    ckpt.restore({"model": model}). Nothing in the file is run: one that cannot be read without is refused.

    The new snapshot becomes the latest one, and a job that is saving to the same repository can commit no more: use a
    repository that no job writes to.
    """
    if step is None:
        raise click.BadParameter("name the step of the new snapshot", param_hint="--step")
    store = _store(repo)
    _check_target(store, step)
    with _opened(file) as descriptor, _Child(file, descriptor) as child:
        content = child.content(name)
        live = None if dry_run else _save(terminal, store, step, note, content, child)
    _report(terminal, store, file, step, content, live)


def _store(url: str) -> Store:
    from fastckpt.storage.open import open_store

    try:
        return open_store(url)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="REPO") from None


def _check_target(store: Store, step: int) -> None:
    """Before anything is read: is there a repository, or room for one, and is the step free?"""
    from fastckpt.repository.repository import Repository, exists

    if exists(store) and any(snapshot.step == step for snapshot in Repository(store).snapshots()):
        raise ImportFailed(f"{store.url}: holds a snapshot of step {step} already; choose another --step", 1)


def _report(terminal: Terminal, store: Store, file: str, step: int, content: Content, live: Live | None) -> None:
    if terminal.json:
        summary = {
            "step": step,
            "repository": store.url,
            "keys": [tensor.key for tensor in content.tensors],
            "values": sorted(content.values),
            "bytes": content.bytes if live is None else live.bytes,
            "dry_run": live is None,
        }
        terminal.message("summary", summary)
        return
    if live is None:
        rows = [[t.key, t.dtype, str(list(t.shape)), _size(t, content.tensors)] for t in content.tensors]
        terminal.table(["key", "dtype", "shape", "size>"], rows)
    what = f"{count_text(len(content.tensors), 'tensor')} and {count_text(len(content.values), 'plain value')}"
    verb = "would import" if live is None else "imported"
    terminal.line(f"{verb} {what}, {size_text(content.bytes)}, from {file} as step {step} of {store.url}")


def _size(tensor: Tensor, tensors: Sequence[Tensor]) -> str:
    return size_text(tensor.bytes) if tensor.tied_to is None else f"= {tensors[tensor.tied_to].key}"


# --- the child -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ImportFailed(f"{path}: not a regular file", 1)
        yield descriptor
    finally:
        os.close(descriptor)


class _Child:
    """The process that reads the file. It dies with this context, and what it says is checked here."""

    def __init__(self, path: str, descriptor: int) -> None:
        self._path = path
        self._file_bytes = os.fstat(descriptor).st_size
        self._received = 0
        self.on_bytes: Callable[[int], None] = lambda done: None
        self._silent_seconds = SILENT_SECONDS_MAX + self._file_bytes // SILENT_BYTES_SECOND
        control, self._control = os.pipe()
        try:
            self._process = subprocess.Popen(  # noqa: S603 - a fixed command
                [sys.executable, "-I", "-m", READER, str(control)],
                stdin=descriptor,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # it is untrusted, and says in its header what is wrong
                env={},
                cwd="/",
                pass_fds=(control,),
                start_new_session=True,
            )
        except BaseException:
            os.close(self._control)
            raise
        finally:
            os.close(control)
        assert self._process.stdout is not None
        self._answer = self._process.stdout.fileno()
        os.set_blocking(self._answer, False)
        self._poll = select.poll()
        self._poll.register(self._answer, select.POLLIN)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_control()
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def content(self, name: str) -> Content:
        """What the file holds, with all keys below ``name``."""
        length = int.from_bytes(self._read(8), "little")
        if length > HEADER_BYTES_MAX:
            raise self._nonsense(f"a header of {length} bytes")
        return self._check(_decode(self._read(length), self._nonsense), name)

    def ask_for(self, numbers: Sequence[int]) -> None:
        """Tells which tensors to send, in which order. Once."""
        import msgspec

        data = memoryview(msgspec.msgpack.encode(list(numbers)))
        with contextlib.suppress(BrokenPipeError):  # it is gone; reading will tell why
            while data:
                data = data[os.write(self._control, data) :]
        self._end_control()

    def read_into(self, buffer: memoryview) -> None:
        """The next bytes; waits for them, but not for ever."""
        while buffer:
            try:
                count = os.readv(self._answer, [buffer])
            except BlockingIOError:
                if not self._poll.poll(self._silent_seconds * 1000):
                    raise ImportFailed(
                        f"{self._path}: the process that reads it said nothing for {self._silent_seconds} s", 1
                    ) from None
                continue
            if not count:
                raise self._died()
            buffer = buffer[count:]

    def advance(self, count: int) -> None:
        """Counts bytes of tensors."""
        self._received += count
        self.on_bytes(self._received)

    def _read(self, length: int) -> bytes:
        # In steps, so that no more is allocated than was sent.
        data = bytearray()
        while len(data) < length:
            step = bytearray(min(length - len(data), 1024 * 1024))
            self.read_into(memoryview(step))
            data += step
        return bytes(data)

    def _end_control(self) -> None:
        if self._control >= 0:
            os.close(self._control)
            self._control = -1

    def _died(self) -> ImportFailed:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return ImportFailed(f"{self._path}: the process that reads it stopped answering", 1)
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            why = "it took more CPU time or memory than its size allows for"
        elif code < 0:
            why = f"the process that reads it died of signal {-code}; the file may be damaged or hostile"
        else:
            why = (
                f"the process that reads it ended with {code}; check that `{sys.executable} -I -m {READER}` "
                "finds fastckpt"
            )
        return ImportFailed(f"{self._path}: {why}", 1)

    def _nonsense(self, what: str) -> ImportFailed:
        return ImportFailed(f"{self._path}: the process that reads it sent {what}; the file may be hostile", 1)

    def _check(self, header: _Header | _Error, name: str) -> Content:
        from fastckpt.errors import FormatError
        from fastckpt.format.dtype import item_bytes
        from fastckpt.format.shard import check_shape
        from fastckpt.format.tables import KEY_BYTES_MAX, VALUE_BYTES_MAX

        if isinstance(header, _Error):
            raise self._reported(header)
        prefix = f"{name}." if name else ""
        tensors: list[Tensor] = []
        seen: set[str] = set()
        try:
            for number, (key, dtype, shape, same) in enumerate(header.tensors):
                key = prefix + key
                if key in seen or not key or len(key.encode()) > KEY_BYTES_MAX or not -1 <= same < number:
                    raise FormatError(f"key {key[:100]!r} twice, too long, or tied to nothing")
                seen.add(key)
                check_shape(shape, key)
                size = math.prod(shape) * item_bytes(dtype)
                tied_to = None if same < 0 else same
                if tied_to is not None:
                    first = tensors[tied_to]
                    if first.tied_to is not None or (first.dtype, first.shape) != (dtype, tuple(shape)):
                        raise FormatError(f"{key}: tied to another kind of tensor")
                tensors.append(Tensor(key, dtype, tuple(shape), size, tied_to))
            values = {prefix + label: _renamed(blob, prefix) for label, blob in header.values.items()}
            if any(len(blob) > VALUE_BYTES_MAX for blob in values.values()):
                raise FormatError("a plain value is too large")
        except (FormatError, UnicodeEncodeError) as error:
            raise self._nonsense(f"what cannot be ({error})") from None
        content = Content(header.torch, tuple(tensors), values)
        most = EXPANSION_MAX * self._file_bytes + EXPANSION_BYTES
        if content.bytes > most:
            raise ImportFailed(
                f"{self._path}: has {self._file_bytes} bytes but claims tensors of {content.bytes}, more than the "
                f"{most} that are believed; clone expanded tensors before saving them",
                15,
            )
        return content

    def _reported(self, error: _Error) -> ImportFailed:
        if error.kind == "code":
            return ImportFailed(
                f"{self._path}: refused: {error.text[:500]}, and fastckpt runs nothing that a file brings along. Where "
                "you trust it, load it yourself and save module.state_dict() with torch.save",
                KINDS["code"],
            )
        return ImportFailed(f"{self._path}: {error.text[:500]}", KINDS.get(error.kind, 1))


@dataclass(frozen=True)
class _Header:
    torch: str
    tensors: list[tuple[str, str, list[int], int]]
    values: dict[str, bytes]


@dataclass(frozen=True)
class _Error:
    kind: str
    text: str


def _decode(data: bytes, nonsense: Any) -> _Header | _Error:
    import msgspec

    # Types without a tag field: msgspec holds every field to exactly this.
    ok = tuple[Literal["ok"], str, list[tuple[str, str, list[int], int]], dict[str, bytes]]
    error = tuple[Literal["error"], str, str]
    for kind, make in ((ok, _Header), (error, _Error)):
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            _, *fields = msgspec.msgpack.decode(data, type=kind)
            return make(*fields)
    raise nonsense("a header that is none")


def _renamed(blob: bytes, prefix: str) -> bytes:
    """The value with its references below ``prefix``; decoded in any case, so that nothing unreadable is stored."""
    from fastckpt.format import value

    return value.encode(_with_prefix(value.decode(blob), prefix))


def _with_prefix(tree: Any, prefix: str) -> Any:
    from fastckpt.format.value import TensorReference

    if isinstance(tree, TensorReference):
        return TensorReference(prefix + tree.key)
    if isinstance(tree, dict):
        mapping = type(tree)()
        for name, item in tree.items():
            mapping[name] = _with_prefix(item, prefix)
        return mapping
    if type(tree) in (list, tuple):
        return type(tree)(_with_prefix(item, prefix) for item in tree)
    return tree


# --- the save ------------------------------------------------------------------------------------------------------


class _Offered:
    """What the file holds, as the save flow wants it."""

    def __init__(self, content: Content, child: _Child) -> None:
        from fastckpt.agreement import offer_digest
        from fastckpt.plan.save_plan import KNOWN, Offer, RankOffer

        self._child = child
        self._numbers = {tensor.key: number for number, tensor in enumerate(content.tensors)}
        self._tensors = content.tensors
        offers = [
            Offer(
                tensor.key,
                tensor.dtype,
                list(tensor.shape),
                [([0] * len(tensor.shape), list(tensor.shape))] if tensor.bytes else [],
                KNOWN,
                0,
                "" if tensor.tied_to is None else content.tensors[tensor.tied_to].key,
            )
            for tensor in content.tensors
        ]
        self.offer: RankOffer = RankOffer(offers, [[0]])
        self.digest = offer_digest(self.offer)
        self.values: Mapping[str, bytes] = content.values

    def sampled(self, keys: Sequence[str], *, whole: bool = False) -> dict[str, bytes]:
        return {}  # one rank: nothing to compare

    def check_unchanged(self) -> None:
        """The child holds the tensors, and nobody changes them."""

    def source(self, key: str, box: Box) -> _PipeSource:
        return _PipeSource(self._child, self._tensors[self._numbers[key]].bytes)

    def order(self, attempt: Attempt) -> list[int]:
        """The numbers of the tensors in the order in which the save will ask for their bytes."""
        layout = attempt.agreed.layout
        shards = (piece.shard for _, pieces in attempt.agreed.mine for piece in pieces)
        return list(dict.fromkeys(self._numbers[layout.keys[layout.shard_key(shard)]] for shard in shards))


class _PipeSource:
    """A tensor whose bytes come next."""

    def __init__(self, child: _Child, size: int) -> None:
        self._child = child
        self._at = 0
        self.bytes = size

    def fill(self, offset: int, buffer: memoryview) -> None:
        assert offset == self._at, "the save flow fills a shard from front to back"
        self._child.read_into(buffer)
        self._at += len(buffer)
        self._child.advance(len(buffer))


def _save(terminal: Terminal, store: Store, step: int, note: str, content: Content, child: _Child) -> Live:
    from fastckpt.group import SoloGroup
    from fastckpt.options import Options
    from fastckpt.save import Labels, Saves
    from fastckpt.trace import Trace

    saves = Saves(store, SoloGroup(), Options())
    offered = _Offered(content, child)
    trace = Trace()
    attempt = saves.agree(step, offered, trace)
    child.ask_for(offered.order(attempt))
    with terminal.progress(f"importing step {step}") as advance:
        child.on_bytes = lambda done: advance(done, content.bytes)
        written = _write(saves, attempt, offered, trace)
    labels = Labels(environment={"imported_from": "torch", "torch": content.torch}, note=note)
    return saves.commit(attempt, written, offered.values, labels, trace)


def _write(saves: Saves, attempt: Attempt, offered: _Offered, trace: Trace) -> ChunkWriter | BaseException:
    """What was written, or what prevented it: the commit then aborts the attempt, cleans up and raises it."""
    from fastckpt.buffers import Pool

    pool = Pool(attempt.agreed.pool_bytes(1))  # one buffer: the child sends the bytes in the order of the rows
    try:
        return saves.write(attempt, offered, pool, trace, lambda: None)
    except BaseException as error:
        # The frames of its traceback hold views of the pool, which then could not be unmapped.
        traceback.clear_frames(error.__traceback__)
        return error
    finally:
        pool.close()
