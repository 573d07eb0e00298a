"""A small language model, byte by byte, on the sources of Python's standard library: FSDP2, saved with fastckpt.

    torchrun --nproc-per-node=2 examples/train_lm.py --repository file:///tmp/run --output /tmp/run-output

Run it again and it goes on where the newest snapshot is. `examples/demo.py` runs it, kills it and compares.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - as everybody does
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastckpt

TEXT_BYTES = 4_000_000


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    context: int
    batch: int


SIZES = {
    "small": Size(width=256, layers=5, context=96, batch=4),  # 4 million parameters: a snapshot of 48 MB
    "tiny": Size(width=192, layers=3, context=48, batch=2),
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.attention(self.attention_norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.join(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class LanguageModel(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size.width) for _ in range(size.layers))
        self.head = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, 256))

    def forward(self, text: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        x = self.bytes(text) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), following.flatten())


class Text:
    """This rank's share of the text, window after window. It remembers where it is: that is its whole state."""

    def __init__(self, size: Size, rank: int, world_size: int) -> None:
        library = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))[:TEXT_BYTES]
        share = len(text) // world_size
        self.first, self.last = rank * share, (rank + 1) * share
        self.position = self.first
        self.size = size
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batch, context = self.size.batch, self.size.context
        while True:
            if self.position + batch * context >= self.last:
                self.position = self.first
            window = self.text[self.position : self.position + batch * context + 1].long()
            self.position += batch * context
            yield window[:-1].view(batch, context), window[1:].view(batch, context)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def optimizer_and_schedule(model: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Warmed up, then a half cosine: the learning rate of a step depends on all the steps before it.
    rate = lambda step: min(1.0, (step + 1) / 8) * (0.55 + 0.45 * math.cos(math.pi * step / steps))  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """A hash of every parameter and of its optimizer state, put together from all ranks, by its name in a snapshot."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for entry, tensor in optimizer.state[parameter].items():
            tensors[f"optimizer.state.{name}.{entry}"] = tensor
    whole = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in tensors.items()}
    return {key: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for key, tensor in whole.items()}


class Journal:
    """What a rank did, a JSON line each. A line is one write, so that a killed process leaves whole lines only."""

    def __init__(self, output: Path, rank: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._file = os.open(output / f"rank-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, **entry: object) -> None:
        os.write(self._file, json.dumps(entry).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", help="without one, nothing is saved")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--forget", default="", help="part of the state that is not restored, to see what comes of it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Bit-for-bit repetition is asked of the training too, not only of the snapshot.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    journal = Journal(arguments.output, rank)
    size = SIZES[arguments.size]

    torch.manual_seed(0)  # the same model on every rank
    model = LanguageModel(size)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer, schedule = optimizer_and_schedule(model, arguments.steps)
    text = Text(size, rank, dist.get_world_size())
    torch.manual_seed(1 + rank)  # dropout of its own on every rank
    state = {"model": model, "optimizer": optimizer, "schedule": schedule, "data": text, "rng": fastckpt.RNGState()}

    def train_step(text: torch.Tensor, following: torch.Tensor) -> float:
        loss = model(text, following)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return loss.item()

    with contextlib.ExitStack() as stack:
        ckpt, restored, restore_seconds = None, None, 0.0
        if arguments.repository:
            ckpt = stack.enter_context(fastckpt.Checkpointer(arguments.repository))
            started = time.perf_counter()
            restored = ckpt.restore({name: part for name, part in state.items() if name != arguments.forget})
            restore_seconds = time.perf_counter() - started
        journal.write(pid=os.getpid(), restored=restored, restore_seconds=restore_seconds)
        logging.info("training from step %d", (restored or 0) + 1)
        batches = iter(text)  # after restore: it goes on where it was
        saves: list[fastckpt.Pending] = []
        for step in range((restored or 0) + 1, arguments.steps + 1):
            loss = train_step(*next(batches))
            journal.write(step=step, loss=loss.hex())
            if ckpt and step % arguments.save_every == 0:
                saves.append(ckpt.save(step, state, metrics={"loss": loss}))
            while saves and saves[0].done:
                pending = saves.pop(0)
                journal.write(saved=pending.step, **pending.counters)
    for pending in saves:
        journal.write(saved=pending.step, **pending.counters)

    last = digests(model, optimizer)
    if rank == 0:
        (arguments.output / "digests.json").write_text(json.dumps(last, sort_keys=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
