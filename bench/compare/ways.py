"""The ways to save and load that are compared, each at the best settings that its documentation or its source offers on
a CPU, and each with an fsync of its files. What was chosen, and why, is in each class's docstring.

Every way lives as long as a training job would have it: buffers, threads and processes are made once and used again.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

import fastckpt
from bench.compare.harness import together, world
from bench.compare.state import State, local

DCP_THREADS = 4
ITEM_FILES = 4
WAIT_SECONDS = 300.0


class Way:
    """``save``, ``wait_staged``, optimizer step, ``wait``: in that order. All ranks call all of them."""

    name: ClassVar[str]
    load_name: ClassVar[str]
    asynchronous: ClassVar[bool] = False

    def __init__(self, state: State, directory: Path) -> None:
        """``directory`` is this way's own, and exists."""
        self.state = state
        self.directory = directory

    def save(self, step: int) -> None:
        """Returns when the caller may go on with forward and backward."""
        raise NotImplementedError

    def wait_staged(self) -> None:
        """Returns when an optimizer may step."""

    def wait(self) -> None:
        """Returns when what was saved is durable and complete."""

    def load(self, step: int) -> None:
        """Loads into the state."""
        raise NotImplementedError

    def discard(self, step: int) -> None:
        """Removes what was saved, so that the disk need not hold every round."""
        together()
        if world()[1] == 0:
            shutil.rmtree(self.directory / str(step))
        together()

    def close(self) -> None:
        pass

    def _made(self, step: int) -> Path:
        directory = self.directory / str(step)
        directory.mkdir(exist_ok=True)
        return directory

    def _mine(self, step: int, suffix: str) -> Path:
        return self._made(step) / f"rank-{world()[1]}.{suffix}"


class Fastckpt(Way):
    """Default options. Snapshots are not discarded: there is no way yet."""

    name = load_name = "fastckpt"
    asynchronous = True
    options = fastckpt.Options()

    def __init__(self, state: State, directory: Path) -> None:
        super().__init__(state, directory)
        self.checkpointer = fastckpt.Checkpointer(str(directory), options=self.options)
        self._done: fastckpt.Pending | fastckpt.Snapshot | None = None

    def save(self, step: int) -> None:
        self.checkpointer.save(step, self.state.parts)

    def wait_staged(self) -> None:
        self.checkpointer.wait_staged(WAIT_SECONDS)

    def wait(self) -> None:
        if self.checkpointer.pending is not None:
            self.checkpointer.pending.wait(WAIT_SECONDS)
        self._done = self.checkpointer.pending

    def load(self, step: int) -> None:
        self.checkpointer.restore(self.state.parts, step)
        self._done = self.checkpointer.restored

    def stages(self) -> dict[str, list[float]]:
        """Where the time of what was done last, a save or a load, went on this rank: for each stage when the first
        began, when the last ended, and how long all took together, in seconds."""
        events = self._done.timeline()["traceEvents"] if self._done else []
        spans = [event for event in events if event["ph"] == "X"]
        start = min((event["ts"] for event in spans), default=0)
        found: dict[str, list[float]] = {}
        for event in spans:
            begin, end = (event["ts"] - start) / 1e6, (event["ts"] + event["dur"] - start) / 1e6
            first, last, together = found.get(event["name"], (begin, end, 0.0))
            found[event["name"]] = [min(first, begin), max(last, end), together + end - begin]
        return found

    def discard(self, step: int) -> None:
        pass

    def close(self) -> None:
        self.checkpointer.close()


class FastckptSmall(Fastckpt):
    """With 64 MiB of staging memory."""

    name = "fastckpt, staging_bytes_max=64 MiB"
    options = fastckpt.Options(staging_bytes_max=64 << 20)


class TorchSave(Way):
    """``torch.save`` and fsync; on several ranks each writes a file of its own shards, which no other number of ranks
    could load."""

    name = "torch.save + fsync"
    load_name = "torch.load"

    def save(self, step: int) -> None:
        with self._mine(step, "pt").open("wb") as file:
            torch.save(local(self.state.state_dicts()), file)
            file.flush()
            os.fsync(file.fileno())

    def load(self, step: int) -> None:
        """Read into memory; the model copies, and the optimizers adopt what was read where it is not sharded."""
        loaded = torch.load(self._mine(step, "pt"), weights_only=True)
        if world()[0] == 1:
            self.state.load_state_dicts(loaded)
        else:
            _copy(loaded, local(self.state.state_dicts()))


class TorchLoadMapped(TorchSave):
    """``torch.load(mmap=True)``, and every tensor copied from the mapped file to where it belongs: adopted, it would
    be read in the first steps of training instead."""

    load_name = "torch.load, mmap"

    def load(self, step: int) -> None:
        _copy(torch.load(self._mine(step, "pt"), weights_only=True, mmap=True), local(self.state.state_dicts()))


class Safetensors(Way):
    """``save_file`` and fsync, ``load_file``; tensors only, on several ranks as ``torch.save``."""

    name = "safetensors + fsync"
    load_name = "safetensors"

    def save(self, step: int) -> None:
        path = self._mine(step, "safetensors")
        save_file(self.state.tensors(), path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def load(self, step: int) -> None:
        _copy(load_file(self._mine(step, "safetensors")), self.state.tensors())


class Dcp(Way):
    """``dcp.save`` as it comes: one thread, one file a rank, synced."""

    name = "DCP, default"
    load_name = "DCP, one file"

    def writer(self, step: int) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(self.directory / str(step))

    def planner(self) -> dcp.SavePlanner:
        return dcp.DefaultSavePlanner()

    def save(self, step: int) -> None:
        dcp.save(
            self.state.state_dicts(),
            storage_writer=self.writer(step),
            planner=self.planner(),
            no_dist=world()[0] == 1,
        )

    def load(self, step: int) -> None:
        saved = self.state.state_dicts()
        dcp.load(saved, storage_reader=dcp.FileSystemReader(self.directory / str(step)), no_dist=world()[0] == 1)


class DcpThreads(Dcp):
    """Four threads with a file each, synced, and a plan that is kept. A file for each tensor
    (``single_file_per_rank=False``) is slower by far where there are hundreds of tensors."""

    name = f"DCP, {DCP_THREADS} threads"
    load_name = f"DCP, {DCP_THREADS} files"

    def writer(self, step: int) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(self.directory / str(step), thread_count=DCP_THREADS, sync_files=True)

    def planner(self) -> dcp.SavePlanner:
        return dcp.DefaultSavePlanner(enable_plan_caching=True)


class DcpAsyncThread(DcpThreads):
    """``dcp.async_save`` with threads and files as above, and a stager that copies on a thread into memory that it
    keeps. The settings that need CUDA (pinned memory, non-blocking copies) are off."""

    name = "DCP async, thread"
    asynchronous = True
    kind = AsyncCheckpointerType.THREAD

    def __init__(self, state: State, directory: Path) -> None:
        super().__init__(state, directory)
        shared = self.kind is AsyncCheckpointerType.PROCESS
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=shared, use_async_staging=True, use_non_blocking_copy=False
        )
        self.stager = DefaultStager(options)
        self.response: AsyncSaveResponse | None = None

    def save(self, step: int) -> None:
        response = dcp.async_save(
            self.state.state_dicts(),
            storage_writer=self.writer(step),
            planner=self.planner(),
            async_checkpointer_type=self.kind,
            async_stager=self.stager,
            no_dist=world()[0] == 1,
        )
        assert isinstance(response, AsyncSaveResponse)
        self.response = response

    def wait_staged(self) -> None:
        if self.response is not None:
            self.response.staging_completion.result(WAIT_SECONDS)

    def wait(self) -> None:
        if self.response is not None:
            self.response.upload_completion.result(WAIT_SECONDS)

    def close(self) -> None:
        self.stager.close()


class DcpAsyncProcess(DcpAsyncThread):
    """The same in a process of its own, to which tensors go in shared memory."""

    name = "DCP async, process"
    kind = AsyncCheckpointerType.PROCESS


class TorchCheckpointing(Way):
    """``CheckpointManager`` with a file for each part of the state, written by up to four threads. Its own direct I/O
    is off: on ext4 it fails with EINVAL. It has no fsync; a callback before the commit syncs its files."""

    name = load_name = "torch_checkpointing"

    def __init__(self, state: State, directory: Path) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        super().__init__(state, directory)
        self.manager = CheckpointManager(
            CheckpointManager.Config(
                save=self.saver(),
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
                pre_finalize_callback=sync_files,
            )
        )
        self.future: Future[Any] | None = None

    def saver(self) -> Any:
        from torch_checkpointing import CheckpointWriterConfig, SyncCheckpointSaverConfig

        return SyncCheckpointSaverConfig(writer_config=CheckpointWriterConfig(file_write_max_threads=ITEM_FILES))

    def save(self, step: int) -> None:
        self.future = self.manager.save(str(self.directory / str(step)), local(self.state.state_dicts()))

    def wait_staged(self) -> None:
        with self.manager.lock():  # what its documentation puts around ``optimizer.step()``
            pass

    def wait(self) -> None:
        if self.future is not None:
            self.future.result(WAIT_SECONDS)

    def load(self, step: int) -> None:
        self.manager.load(str(self.directory / str(step)), into=local(self.state.state_dicts()))

    def close(self) -> None:
        self.manager.close()


class TorchCheckpointingAsync(TorchCheckpointing):
    """The same from a process of its own; staged on a thread, into shared memory that it keeps."""

    name = "torch_checkpointing async"
    asynchronous = True

    def saver(self) -> Any:
        from torch_checkpointing import AsyncCheckpointSaverConfig, CheckpointStagerConfig, CheckpointWriterConfig

        return AsyncCheckpointSaverConfig(
            writer_config=CheckpointWriterConfig(file_write_max_threads=ITEM_FILES),
            staging_config=CheckpointStagerConfig(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
            ),
        )


def sync_files(arguments: Any) -> None:
    """torch_checkpointing calls it in the process that wrote the files, before it renames their directory."""
    for path in Path(arguments.path).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _copy(loaded: Any, target: Any) -> None:
    """Every tensor of ``loaded`` into the one of that name in ``target``."""
    for key, value in loaded.items():
        if isinstance(value, torch.Tensor):
            target[key].copy_(value)
        elif isinstance(value, dict):
            _copy(value, target[key])


SAVES: tuple[type[Way], ...] = (
    Fastckpt,
    TorchSave,
    Safetensors,
    Dcp,
    DcpThreads,
    DcpAsyncThread,
    DcpAsyncProcess,
    TorchCheckpointing,
    TorchCheckpointingAsync,
)
LOADS: tuple[type[Way], ...] = (Fastckpt, TorchSave, TorchLoadMapped, Safetensors, Dcp, DcpThreads, TorchCheckpointing)
