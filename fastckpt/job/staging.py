"""Staging: the copy from live tensors to host buffers, and the fence that keeps them still until it is done.

Parameters and optimizer state only change in ``Optimizer.step``; a process-wide hook makes every step wait until what
is being staged has been read. Everything else is copied before ``save`` returns. That nothing changed in any other way
is checked by sampling: pieces of what was read are compared with the live tensors at the end.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastckpt.buffers import address
from fastckpt.errors import AttemptAborted, SaveError
from fastckpt.format import value
from fastckpt.format.chunk import chunk_hash
from fastckpt.format.shard import Box, boxes_of_flat_range
from fastckpt.format.tables import VALUE_BYTES_MAX
from fastckpt.job.state import Description
from fastckpt.job.tensors import storage_bytes
from fastckpt.job.values import torch_dtype
from fastckpt.plan.save_plan import Offer

SAMPLES = 64
"""Pieces compared with the live tensors after staging."""
SAMPLE_BYTES = 256
COMPARED_WHOLE_BYTES = 4096
"""Tensors up to this size are compared between ranks whole, larger ones in ``COMPARED_PIECES`` places."""
COMPARED_PIECES = 16
PIECE_BYTES = 8 * 1024 * 1024

# Copies go through integers of the same width: exact for every bit pattern, and defined for every dtype.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


_Sample = tuple["TensorSource", int, bytes]
"""Source, byte offset, and the bytes that were there."""


class TensorSource:
    """A live tensor, or a copy of one, as bytes. Any thread may fill."""

    def __init__(self, key: str, tensor: torch.Tensor, staging: Staging) -> None:
        self.key = key
        self._tensor = bits(tensor)
        self._staging = staging
        self.bytes = tensor.numel() * tensor.element_size()
        is_in_memory = tensor.device.type == "cpu" and not tensor._is_zerotensor()
        self._is_plain = is_in_memory and self._tensor.is_contiguous()
        self._storage_bytes = storage_bytes(self._tensor)

    def fill(self, offset: int, buffer: memoryview) -> None:
        """``AttemptAborted`` if the attempt was given up before or meanwhile; ``SaveError`` if the tensor's storage was
        made smaller before this call. In the middle of it nothing can hold the memory of a storage that is resized."""
        self._staging.check_not_given_up()
        if self._tensor.untyped_storage().nbytes() < self._storage_bytes:
            raise self.error("lost memory of its storage")
        if self._is_plain and self.bytes:
            # One thread's copy without the interpreter's lock: torch's own would take all cores from the training.
            ctypes.memmove(address(buffer), self._tensor.data_ptr() + offset, len(buffer))
        else:
            with self._staging.on_stream(self._tensor.device):
                self._copy(offset, buffer)
        self._staging.check_not_given_up()

    def error(self, what: str) -> SaveError:
        """For what must not happen before staging is over."""
        return SaveError(
            f"{self.key} {what} while it was being staged, by something other than Optimizer.step; the snapshot is "
            f"given up. Have it copied before save returns with Options(copy=({self.key!r},)), or call wait_staged() "
            "before changing it"
        )

    def _copy(self, offset: int, buffer: memoryview) -> None:
        tensor, item = self._tensor, self._tensor.element_size()
        start, stop = offset // item, (offset + len(buffer)) // item
        if tensor.is_contiguous():
            _to_buffer(tensor.view(-1)[start:stop], buffer)
            return
        at = 0
        for box in boxes_of_flat_range(tensor.shape, start, stop):
            size = box.elements * item
            _to_buffer(tensor[box.slices()], buffer[at : at + size])
            at += size


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers; lazily conjugated or negated tensors are made real first."""
    return tensor.detach().resolve_conj().resolve_neg().view(BITS[tensor.element_size()])


def _to_buffer(source: torch.Tensor, buffer: memoryview) -> None:
    target = torch.frombuffer(buffer, dtype=torch.uint8)
    if target.data_ptr() % source.element_size() == 0:
        target.view(source.dtype).view(source.shape).copy_(source)
    else:  # a tiny shard inside a bundle, behind one of another width
        raw = source.cpu().contiguous()
        # One element counts as contiguous whatever its strides are, and then cannot be seen as bytes.
        target.copy_(raw.as_strided((raw.numel(),), (1,)).view(torch.uint8))


class Staging:
    """What one rank saves at one step: the offer it makes to the planner, and sources of the bytes it is to write.

    Made on the training thread; afterwards read by the threads that copy, any of them.
    """

    def __init__(self, description: Description) -> None:
        """Copies what may change before the fence: buffers, plain tensors, and what else is to be copied."""
        self._outline = description.outline
        self.offer, self.digest = self._outline.offer, self._outline.digest
        self.mesh = description.mesh
        self._given_up = False
        self._events: dict[torch.device, torch.Event] = {}
        self._streams: dict[torch.device, torch.Stream] = {}
        self._views = description.views
        for number, dtype in self._outline.copied.items():
            # Perhaps into another dtype: FSDP1 keeps buffers in a lower one than theirs.
            self._views[number] = bits(self._views[number].to(torch_dtype(dtype))).clone()
        self._mark_streams()
        self.values: Mapping[str, bytes] = {name: _encode(name, tree) for name, tree in description.values.items()}
        self._samples = _Samples()
        self._early = self._early_samples()

    def source(self, key: str, box: Box) -> TensorSource:
        """The bytes of a box this rank offered; what is read of live tensors is sampled for ``check_unchanged``."""
        number = self._outline.numbers[key, box]
        source = TensorSource(key, self._views[number], self)
        return source if number in self._outline.copied else _SampledSource(source, self._samples)

    def sampled(self, keys: Sequence[str], *, whole: bool = False) -> dict[str, bytes]:
        """For each of ``keys`` held here, a digest of sampled content, or of all of it."""
        own = self._outline.own
        return {key: self._digest(*own[key], whole) for key in keys if key in own}

    def _digest(self, offer: Offer, boxes: Sequence[Box], whole: bool) -> bytes:
        content: list[bytes] = [offer.dtype.encode(), str(offer.shape).encode()]
        for box in boxes:
            view = self._views[self._outline.numbers[offer.key, box]]
            source = TensorSource(offer.key, view, self)
            content.append(str(box).encode())
            pieces = _all_pieces(source.bytes) if whole else _compared_pieces(source.bytes, view.element_size())
            for offset, size in pieces:
                piece = bytearray(size)
                source.fill(offset, memoryview(piece))
                content.append(chunk_hash(piece) if whole else bytes(piece))
        return chunk_hash(b"\0".join(content))

    def check_unchanged(self) -> None:
        """``SaveError`` naming the tensor if one that was staged from live memory has changed since it was read."""
        for source, offset, seen in (*self._early, *self._samples):
            now = bytearray(len(seen))
            source.fill(offset, memoryview(now))
            if bytes(now) != seen:
                raise source.error("changed")

    def check_not_given_up(self) -> None:
        """``AttemptAborted`` if the attempt was given up."""
        if self._given_up:
            raise AttemptAborted("the attempt was given up: the fence had to let training go on")

    def give_up(self) -> None:
        """From now on no tensor is read any more; a reading under way fails when it is over. Any thread, no waiting."""
        self._given_up = True

    def release(self) -> None:
        """Lets go of the tensors, once all that is to be read has been."""
        self._views.clear()
        self._samples = _Samples()
        self._early = []

    def _early_samples(self) -> list[_Sample]:
        """Pieces of live tensors as they are now, spread over their bytes: what changes before staging comes to it is
        found by these. Not on accelerators, where reading now would wait for all that is queued."""
        live, ends = self._outline.sampled, self._outline.sampled_ends
        chosen: list[_Sample] = []
        choose = random.Random()  # noqa: S311 - spread, not secrecy; and never the generators of the training
        for _ in range(SAMPLES if live else 0):
            key, number = live[bisect.bisect_right(ends, choose.randrange(ends[-1]))]
            source = TensorSource(key, self._views[number], self)
            offset = choose.randrange(max(1, (source.bytes - SAMPLE_BYTES) // 16 + 1)) * 16
            seen = bytearray(min(SAMPLE_BYTES, source.bytes - offset))
            source.fill(offset, memoryview(seen))
            chosen.append((source, offset, bytes(seen)))
        return chosen

    @property
    def devices(self) -> Iterable[torch.device]:
        """Where the tensors are."""
        return self._outline.devices

    def _mark_streams(self) -> None:
        """Remembers where each accelerator's stream is now: staging reads what is there then, not before."""
        for device in self._outline.devices:
            if device.type != "cpu":
                event = torch.Event(device)
                event.record(torch.accelerator.current_stream(device))
                self._events[device] = event

    def on_stream(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Copies from ``device`` go on a stream of their own, behind what was queued when ``save`` was called."""
        if device not in self._events:
            return contextlib.nullcontext()
        if device not in self._streams:
            stream = torch.Stream(device)
            stream.wait_event(self._events[device])
            self._streams[device] = stream
        stream = self._streams[device]
        # An object of its own for each thread that enters the stream: the object keeps what to go back to.
        return torch.Stream(
            stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
        )


def _encode(name: str, tree: object) -> bytes:
    try:
        blob = value.encode(tree)
    except TypeError as error:
        raise TypeError(f"{name}{error}" if str(error).startswith("[") else f"{name}: {error}") from error
    if len(blob) > VALUE_BYTES_MAX:
        raise ValueError(
            f"{name}: a plain value of {len(blob)} bytes, at most {VALUE_BYTES_MAX} are allowed; keep large arrays as "
            "torch tensors, which are stored beside it"
        )
    return blob


def _all_pieces(size: int) -> Iterator[tuple[int, int]]:
    return ((at, min(PIECE_BYTES, size - at)) for at in range(0, size, PIECE_BYTES))


def _compared_pieces(size: int, item: int) -> Iterator[tuple[int, int]]:
    """Where a tensor of ``size`` bytes is compared between ranks: places that depend on the size alone."""
    if size <= COMPARED_WHOLE_BYTES:
        yield 0, size
        return
    places = random.Random(size)  # noqa: S311 - spread, not secrecy
    for _ in range(COMPARED_PIECES):
        yield places.randrange((size - SAMPLE_BYTES) // item + 1) * item, SAMPLE_BYTES


class _Samples:
    """A random choice of pieces of everything read, each piece equally likely to be kept."""

    def __init__(self) -> None:
        self._kept: list[_Sample] = []
        self._seen = 0
        self._random = random.Random()  # noqa: S311 - spread, not secrecy

    def __iter__(self) -> Iterator[_Sample]:
        return iter(self._kept)

    def offer(self, source: TensorSource, offset: int, buffer: memoryview) -> None:
        self._seen += 1
        if len(self._kept) < SAMPLES:
            position = len(self._kept)
        elif (position := self._random.randrange(self._seen)) >= SAMPLES:
            return
        # Whole elements of any width: pieces start at multiples of the largest.
        at = self._random.randrange(max(1, (len(buffer) - SAMPLE_BYTES) // 16 + 1)) * 16
        sample = (source, offset + at, bytes(buffer[at : at + SAMPLE_BYTES]))
        self._kept[position : position + 1] = [sample]


class _SampledSource(TensorSource):
    def __init__(self, source: TensorSource, samples: _Samples) -> None:
        self._source = source
        self._samples = samples
        self.bytes = source.bytes

    def fill(self, offset: int, buffer: memoryview) -> None:
        self._source.fill(offset, buffer)
        self._samples.offer(self._source, offset, buffer)


class Fence:
    """Makes every ``Optimizer.step`` of the process wait while something is being staged.

    ``wait`` is called on the thread that steps. The hook holds the fence weakly: it goes with it, or with ``close``.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        waiting = weakref.WeakMethod(wait) if hasattr(wait, "__self__") else lambda: wait

        def hook(*_: object) -> None:
            if (live := waiting()) is not None:
                live()

        self._handle = register_optimizer_step_pre_hook(hook)
        self._finalizer = weakref.finalize(self, self._handle.remove)

    def close(self) -> None:
        self._finalizer()
