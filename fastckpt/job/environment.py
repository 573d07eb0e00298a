"""The record of software and hardware that is stored with each snapshot.

An allow-list: versions, counts, device names, determinism flags and the commit of the training code. Never environment
variables, arguments, paths, URLs, users or branch names; host names only when asked for. Whoever reads the repository
reads this.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

GIT_SECONDS_MAX: Final = 2.0

DISTRIBUTIONS: Final = (
    *("fastckpt-torch", "numpy", "ml_dtypes", "safetensors", "triton", "torchvision", "torchao", "torchdata"),
    *("deepspeed", "transformers", "accelerate", "datasets", "peft", "trl", "lightning", "pytorch-lightning", "ray"),
    *("torchtitan", "megatron-core", "transformer-engine", "flash-attn", "xformers", "apex"),
)
"""Distributions whose versions are recorded if they are installed."""

SDPA_BACKENDS: Final = ("flash", "mem_efficient", "math", "cudnn")
"""The kernels that ``scaled_dot_product_attention`` may choose from, each with a switch in ``torch.backends.cuda``."""

Plain = dict[str, Any]
"""Data that JSON can hold; what is in it depends on the machine."""


def environment(*, mesh: Any = None, hosts: bool = False, nodes: Sequence[int] = (0,)) -> dict[str, Any]:
    """The record, as data that JSON can hold. ``nodes[rank]`` is the node of each rank; ``mesh`` a ``DeviceMesh``.

    Never raises: what cannot be found is absent. What cannot change in a process is found once, at the first call,
    which may take tens of milliseconds; a git that does not answer is given up after ``GIT_SECONDS_MAX``.
    """
    facts: dict[str, Callable[[], Any]] = {
        "world_size": lambda: len(nodes),
        "ranks_per_node": lambda: [count for _, count in sorted(Counter(nodes).items())],
        "mesh": lambda: _mesh(mesh),
        "accelerator": _accelerator,
        "determinism": _determinism,
        "host": lambda: socket.gethostname() if hosts else None,
    }
    return {**copy.deepcopy(_constant()), **_known(facts)}


def _known(facts: dict[str, Callable[[], Any]]) -> Plain:
    """The facts that could be found. A record beside the state must never fail a save, whatever a driver does."""
    known: Plain = {}
    for name, find in facts.items():
        with contextlib.suppress(Exception):
            value = find()
            if value not in (None, {}):
                known[name] = value
    return known


@functools.cache
def _constant() -> Plain:
    return _known(
        {
            "python": platform.python_version,
            "torch": _torch,
            "distributions": _distributions,
            "platform": _platform,
            "code": _code,
        }
    )


def _torch() -> Plain:
    builds = ("cuda", "hip", "xpu", "mtia")
    return _known(
        {
            "version": lambda: str(torch.__version__),
            "git_version": lambda: torch.version.git_version,
            **{name: functools.partial(getattr, torch.version, name) for name in builds},
            "cudnn": torch.backends.cudnn.version,
            "nccl": lambda: ".".join(str(part) for part in torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
        }
    )


def _distributions() -> Plain:
    return _known({name: functools.partial(importlib.metadata.version, name) for name in DISTRIBUTIONS})


def _platform() -> Plain:
    return _known(
        {
            "system": platform.system,
            "release": platform.release,
            "machine": platform.machine,
            "cpu_capability": torch.backends.cpu.get_cpu_capability,
            "libc": lambda: " ".join(platform.libc_ver()).strip() or None,
            "cpus": os.cpu_count,
            "memory_bytes": lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        }
    )


def _code() -> Plain | None:
    """The commit of the repository that holds the program, and whether tracked files differ from it."""
    main = getattr(sys.modules["__main__"], "__file__", None)
    if main is None:
        return None
    folder, name = os.path.split(os.path.abspath(main))
    # GIT_DIR and its like, set in a git hook, would point elsewhere.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    deadline = time.monotonic() + GIT_SECONDS_MAX

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - fixed arguments, and a file name behind "--"
            # A status would otherwise start the repository's file watcher, and take the lock of its index.
            ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments],  # noqa: S607
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=max(0.0, deadline - time.monotonic()),
        )

    # A launcher in a virtual environment inside a checkout is ignored there: the checkout need not be its code.
    if git("check-ignore", "--quiet", "--", name).returncode != 1:
        return None
    commit = git("rev-parse", "--verify", "HEAD").stdout.strip()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit):
        return None
    code: Plain = {"commit": commit}
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = git("status", "--porcelain", "--untracked-files=no")
        if status.returncode == 0:
            code["dirty"] = status.stdout != ""
    return code


def _mesh(mesh: Any) -> Plain | None:
    if mesh is None:
        return None
    return _known(
        {
            "shape": lambda: [int(size) for size in mesh.shape],
            "dim_names": lambda: [str(name) for name in mesh.mesh_dim_names],
        }
    )


def _accelerator() -> Plain | None:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator)
    # Asking a device that the job does not use would set up a context on it, and break a later fork.
    if not getattr(module, "is_initialized", lambda: True)():
        return None
    return _known(
        {
            "type": lambda: accelerator.type,
            "count": torch.accelerator.device_count,
            "name": lambda: str(module.get_device_name()),
            "driver": lambda: str(module.get_device_properties().driver_version),
        }
    )


def _determinism() -> Plain:
    """What a program sets that decides whether, and with which bits, a computation is repeated.

    Not autocast: it is entered and left within a step, and says nothing at a save.
    """
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return _known(
        {
            "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
            "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled,
            "fill_uninitialized_memory": lambda: bool(torch.utils.deterministic.fill_uninitialized_memory),  # type: ignore[attr-defined]
            "cudnn_benchmark": lambda: bool(cudnn.benchmark),
            "cudnn_deterministic": lambda: bool(cudnn.deterministic),
            "cublas_workspace": _cublas_workspace,
            # Each is refused by torch where the program has set the other.
            "float32_matmul_precision": torch.get_float32_matmul_precision,
            "cuda_matmul_fp32_precision": lambda: str(cuda.matmul.fp32_precision),
            "cudnn_conv_fp32_precision": lambda: str(cudnn.conv.fp32_precision),  # type: ignore[attr-defined]
            "cudnn_rnn_fp32_precision": lambda: str(cudnn.rnn.fp32_precision),  # type: ignore[attr-defined]
            "fp16_accumulation": lambda: bool(cuda.matmul.allow_fp16_accumulation),
            "fp16_reduced_precision_reduction": lambda: bool(cuda.matmul.allow_fp16_reduced_precision_reduction),
            "bf16_reduced_precision_reduction": lambda: bool(cuda.matmul.allow_bf16_reduced_precision_reduction),
            "sdpa_backends": lambda: [name for name in SDPA_BACKENDS if getattr(cuda, f"{name}_sdp_enabled")()],
            "default_dtype": lambda: str(torch.get_default_dtype()).removeprefix("torch."),
            "threads": torch.get_num_threads,
        }
    )


def _cublas_workspace() -> str:
    """cuBLAS repeats itself exactly only with a workspace of fixed size, and takes it from nowhere else."""
    setting = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "default")
    return setting if re.fullmatch(r"default|(:[0-9]{1,8}){2,16}", setting) else "other"
