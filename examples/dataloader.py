"""In the middle of an epoch, on another number of processes: the samples that are left follow, each once.

torchrun --nproc-per-node=2 examples/dataloader.py URL
torchrun --nproc-per-node=1 examples/dataloader.py URL    # the rest of the epoch

torchdata's loader says where it is in its own process's part of the epoch. A job of another size divides what is left
anew: `merge` says where that begins.
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchdata.stateful_dataloader import StatefulDataLoader

import fastckpt

SAMPLES, BATCH, STEPS = 96, 4, 8


class Epoch:
    """This rank's part of the epoch behind `start`, the samples that jobs of other sizes took. Ranks go in step."""

    def __init__(self):
        self.load_state_dict({"start": 0})

    def __iter__(self):
        for samples in self.loader:
            self.taken += len(samples)
            yield samples

    def state_dict(self):
        return {"start": self.start, "taken": self.taken, "loader": self.loader.state_dict()}

    def load_state_dict(self, state):
        self.start, self.taken = state["start"], state.get("taken", 0)
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))[self.start :]
        part = order[dist.get_rank() :: dist.get_world_size()].tolist()
        own = torch.Generator().manual_seed(1)  # an epoch's start draws: not from the stream of the training
        self.loader = StatefulDataLoader(range(SAMPLES), BATCH, sampler=part, num_workers=2, generator=own)
        self.loader.load_state_dict(state.get("loader", {}))


def merge(states, rank, world_size):
    return {"start": states[0]["start"] + sum(state["taken"] for state in states)}


dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(1, 1))
optimizer = torch.optim.AdamW(model.parameters())
epoch = Epoch()
state = {"model": model, "optimizer": optimizer, "epoch": fastckpt.PerRank(epoch, merge), "rng": fastckpt.RNGState()}

with fastckpt.Checkpointer(sys.argv[1]) as ckpt:
    first = (ckpt.restore(state) or 0) + 1
    for step, samples in zip(range(first, first + STEPS), epoch):
        model(samples[:, None].float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(*(f"sample {number}" for number in samples.tolist()), sep="\n")
    ckpt.save(step, state)
dist.destroy_process_group()
