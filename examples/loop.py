"""The loop of the README: save every few steps, go on where the newest snapshot is.

    python examples/loop.py [URL]

Each run trains 20 steps. Run it again with the same URL, or kill it and run it again: it goes on.
"""

import logging
import sys
import tempfile

import torch

import fastckpt

logging.basicConfig(level=logging.INFO, format="%(message)s")  # fastckpt logs one line for every commit
url = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)


def train_step() -> float:
    inputs = torch.randn(32, 64)  # drawn from torch's generator, which is part of the state
    loss = (model(inputs).squeeze() - inputs.sum(1)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    return loss.item()


state = {"model": model, "optimizer": optimizer, "schedule": scheduler, "rng": fastckpt.RNGState()}

with fastckpt.Checkpointer(url) as ckpt:
    first = (ckpt.restore(state) or 0) + 1  # None if there is no snapshot yet
    for step in range(first, first + 20):
        loss = train_step()
        if step % 5 == 0:
            ckpt.save(step, state)  # returns at once; the next optimizer.step waits if it has to
# Leaving the block has waited for the last commit.
print(f"trained steps {first} to {step}, loss {loss:.3f}; snapshots in {url}")
