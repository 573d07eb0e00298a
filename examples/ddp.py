"""DDP: parameters that all ranks hold are written once, the work split between the ranks.

    torchrun --nproc-per-node=2 examples/ddp.py [URL]

Batch-norm statistics are the exception: ranks see other data, so theirs differ. Those of rank 0 are saved, which is
also what DDP itself sends to the others before the next step.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastckpt

dist.init_process_group("gloo")
rank = dist.get_rank()
where = [sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()]
dist.broadcast_object_list(where)  # every rank must name the same repository
url = where[0]

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 256), torch.nn.BatchNorm1d(256), torch.nn.ReLU(), torch.nn.Linear(256, 1)
)
model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(rank)

# Keys are those of the module inside: without DDP, or with FSDP2, the snapshot can be restored just as well.
state = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState()}

with fastckpt.Checkpointer(url) as ckpt:
    first = (ckpt.restore(state) or 0) + 1
    for step in range(first, first + 10):
        inputs = torch.randn(32, 64)
        loss = (model(inputs).squeeze() - inputs.sum(1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            ckpt.save(step, state)
if rank == 0:
    snapshot = ckpt.snapshots()[-1]
    print(
        f"step {snapshot.step}: {snapshot.bytes} bytes with {', '.join(snapshot.keys()[:3])}, ...; snapshots in {url}"
    )
dist.destroy_process_group()
