"""FSDP2: the same calls on every rank; each rank writes what it holds, and any number of ranks restores it.

torchrun --nproc-per-node=2 examples/fsdp2.py URL
torchrun --nproc-per-node=3 examples/fsdp2.py URL    # goes on with what two ranks have saved
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fastckpt

dist.init_process_group("gloo")
where = [sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()]
dist.broadcast_object_list(where)  # every rank must name the same repository
url = where[0]

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(dist.get_rank())  # each rank draws data of its own

state = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState()}

with fastckpt.Checkpointer(url) as ckpt:  # after init_process_group
    restored = ckpt.restore(state)
    first = (restored or 0) + 1
    for step in range(first, first + 10):
        inputs = torch.randn(32, 64)
        loss = (model(inputs).squeeze() - inputs.sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            ckpt.save(step, state)
if dist.get_rank() == 0:
    snapshot = ckpt.snapshots()[-1]
    print(f"restored {restored}; step {snapshot.step} was saved by {snapshot.world_size} ranks; snapshots in {url}")
dist.destroy_process_group()
