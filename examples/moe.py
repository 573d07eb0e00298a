"""Mixture of experts: eight on four ranks, then on two, then on one; each rank saves and restores its own.

torchrun --nproc-per-node=4 examples/moe.py URL 20    # 20 steps; then again with 2, and with 1: it goes on
"""

import sys

import torch
import torch.distributed as dist

import fastckpt

EXPERTS, WIDTH, HIDDEN = 8, 16, 32
dist.init_process_group("gloo")
world = dist.get_world_size()
first = dist.get_rank() * EXPERTS // world
mine = slice(first, first + EXPERTS // world)


class Gather(torch.autograd.Function):
    # What all experts make of the batch, on every rank. A rank's gradient is that of its own experts.
    @staticmethod
    def forward(ctx, own):
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[mine]


class Mixture(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.router = torch.nn.Linear(WIDTH, EXPERTS)  # the same on every rank
        self.up = torch.nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN)[mine])
        self.down = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH)[mine] / HIDDEN)

    def loss(self, batch):
        x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(batch))  # all ranks see the same
        made = Gather.apply(torch.stack([torch.relu(x @ up) @ down for up, down in zip(self.up, self.down)]))
        weight, chosen = self.router(x).softmax(-1).topk(2)
        y = sum(weight[:, [k]] * made[chosen[:, k], torch.arange(len(x))] for k in range(2))
        return (y - x.flip(1)).square().mean()


torch.manual_seed(0)
model = Mixture()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
state = {"model": model, "optimizer": optimizer}
for name, weight in (("up", model.up), ("down", model.down)):
    # The box of all experts' weights that this rank has. What the optimizer keeps for them follows.
    state[name] = fastckpt.Shard(weight, offsets=(first, 0, 0), shape=(EXPERTS, *weight.shape[1:]))
with fastckpt.Checkpointer(sys.argv[1]) as ckpt:
    done = ckpt.restore(state) or 0
    losses = [model.loss(batch=0).item()]
    for step in range(done + 1, done + int(sys.argv[2]) + 1):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    losses.append(model.loss(batch=0).item())
    ckpt.save(step, state, metrics={"loss": losses[1]})
if dist.get_rank() == 0:
    print(f"{world} ranks: loss {losses[0]} after step {done}, {losses[1]} after step {step}")
dist.destroy_process_group()
