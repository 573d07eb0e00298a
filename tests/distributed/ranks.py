"""Ranks: real processes with a gloo process group, forked for one job from a server that has torch imported already.

A job is a module-level function that every rank runs. Each job has processes, a key-value store and a process group of
its own, so worlds of any size follow each other cheaply (about 0.1 s) and nothing leaks from one to the next.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

JOB_SECONDS = 90.0
GRACE_SECONDS = 20.0
"""How long the others may go on once a rank has failed: they may be waiting for it in a collective."""

# torch's TCPStore looks up the name of 127.0.0.1 for every connection; an unsteady name server costs 5 s each time.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("pytest", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "torch._dynamo"),
        *("fastckpt.checkpointer", "fastckpt.callback", "fastckpt.repository.repository", "fastckpt.testing"),
    ]
)


class RankRaised(Exception):
    """A rank's error that does not pickle, as text."""


class JobFailed(AssertionError):
    """What each rank of a job raised, with its traceback."""


def run(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(*arguments)`` on every rank of a new job; the results by rank. ``JobFailed`` if any rank raised."""
    results = outcomes(world_size, function, *arguments)
    failures = {rank: result for rank, result in enumerate(results) if isinstance(result, BaseException)}
    if failures:
        texts: dict[str, list[str]] = {}
        for rank, error in failures.items():
            texts.setdefault("".join(traceback.format_exception_only(error)), []).append(str(rank))
        shown = "\n".join(f"--- rank {', '.join(where)}: {text}" for text, where in texts.items())
        raise JobFailed(f"{len(failures)} of {world_size} ranks failed\n{shown}")
    return results


def outcomes(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Like ``run``, but what a rank raised, or ``None`` if it died, stands in place of its result."""
    with started(world_size, function, *arguments) as job:
        return job.outcomes()


@dataclass
class Last:
    """What a rank returns whose job has lost others: no process group can be shut down without them."""

    result: Any


def store() -> dist.TCPStore:
    """On a rank: the job's key-value store, as ``Job.store`` is to the test."""
    return _stores[0]


_stores: list[dist.TCPStore] = []


class Job:
    """Ranks under way, and what a test may do to them."""

    def __init__(self, server: dist.TCPStore, processes: Sequence[Any], pipes: Sequence[Any]) -> None:
        self.store = server
        """The job's key-value store."""
        self._processes = processes
        self._pipes = pipes

    def wait_stopped(self, rank: int, seconds: float) -> bool:
        """Whether the rank is stopped by then, by ``SIGSTOP``."""
        end = time.monotonic() + seconds
        while (state := self._state(rank)) not in "TZX" and time.monotonic() < end:
            time.sleep(0.005)
        return state == "T"

    def _state(self, rank: int) -> str:
        try:
            with open(f"/proc/{self._processes[rank].pid}/stat") as stat:
                return stat.read().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return "X"

    def stop(self, rank: int) -> None:
        os.kill(self._processes[rank].pid, signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        os.kill(self._processes[rank].pid, signal.SIGCONT)

    def wait_keys(self, keys: Sequence[str], seconds: float) -> bool:
        """Whether ranks have set all of these keys by then."""
        end = time.monotonic() + seconds
        while not (there := self.store.check(list(keys))) and time.monotonic() < end:
            time.sleep(0.01)
        return bool(there)

    def outcomes(self) -> list[Any]:
        """What each rank returned or raised, or ``None`` if it died."""
        return _collect(self._pipes, self._processes)


@contextlib.contextmanager
def started(world_size: int, function: Callable[..., Any], *arguments: Any) -> Iterator[Job]:
    """``function(*arguments)`` under way on every rank of a new job. Leaving kills what has not ended."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # By file: the test modules are in no package that the processes could import.
    where = (function.__module__, function.__code__.co_filename, function.__qualname__)
    work = pickle.dumps(arguments)
    pipes: list[multiprocessing.connection.Connection] = []
    processes = []
    try:
        for rank in range(world_size):
            receiving, sending = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank, args=(sending, rank, world_size, server.port, where, work), daemon=True
            )
            process.start()
            sending.close()
            pipes.append(receiving)
            processes.append(process)
        yield Job(server, processes, pipes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(JOB_SECONDS)
        for pipe in pipes:
            pipe.close()


@contextlib.contextmanager
def key_value_server() -> Iterator[tuple[int, int]]:
    """A ``TCPStore`` server in a process of its own: its port, and the process id to kill it by."""
    receiving, sending = _context.Pipe(duplex=False)
    process = _context.Process(target=_serve, args=(sending,), daemon=True)
    process.start()
    try:
        yield receiving.recv(), process.pid or 0
    finally:
        process.kill()
        process.join()


def _serve(pipe: Any) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(server.port)
    threading.Event().wait()


def _collect(pipes: Sequence[multiprocessing.connection.Connection], processes: Sequence[Any]) -> list[Any]:
    results: dict[int, Any] = {}
    end = time.monotonic() + JOB_SECONDS
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = multiprocessing.connection.wait(list(waiting), max(0.0, end - time.monotonic()))
        if not ready:
            for rank in waiting.values():
                os.kill(processes[rank].pid, signal.SIGUSR1)  # prints where it is
                results[rank] = TimeoutError(f"rank {rank} did not finish; its stacks are in the captured stderr")
            time.sleep(0.5)  # for the reader of the failure, not for the test
        for pipe in ready:
            try:
                result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                result = None
            results[waiting[pipe]] = result
            if isinstance(result, BaseException):
                end = min(end, time.monotonic() + GRACE_SECONDS)
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Any, rank: int, world_size: int, port: int, where: tuple[str, str, str], work: bytes) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        function = _find(*where)
        arguments = pickle.loads(work)
        seconds = timedelta(seconds=JOB_SECONDS)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=seconds)
        _stores.append(store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=seconds)
        result = function(*arguments)
        if isinstance(result, Last):
            result = result.result
        else:
            dist.destroy_process_group()
    except BaseException as error:
        error.add_note(traceback.format_exc())
        result = error
    try:
        data = pickle.dumps(result)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps(RankRaised(f"{type(result).__name__}: {result}"))
    pipe.send_bytes(data)
    pipe.close()


def _find(module_name: str, path: str, name: str) -> Callable[..., Any]:
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    found: Callable[..., Any] = getattr(sys.modules[module_name], name)
    return found
