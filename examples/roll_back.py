"""Go back to an earlier step and train on from there, for instance after the loss has exploded.

python examples/roll_back.py [URL]
"""

import sys
import tempfile

import torch

import fastckpt

url = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

torch.manual_seed(0)
model = torch.nn.Linear(16, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
state = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState()}


def train(first: int, last: int) -> None:
    for step in range(first, last + 1):
        inputs = torch.randn(8, 16)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            ckpt.save(step, state, metrics={"loss": loss.item()}, note=f"lr {optimizer.param_groups[0]['lr']}")


with fastckpt.Checkpointer(url) as ckpt:
    train(1, 10)
    optimizer.param_groups[0]["lr"] = 2.0  # too much: from here on the loss grows
    train(11, 30)

    ckpt.restore(state, step=10)  # the model, the optimizer with its learning rate, the random numbers
    optimizer.param_groups[0]["lr"] = 0.05
    train(11, 20)

with fastckpt.Checkpointer(url) as ckpt:
    # The newest snapshot is the one committed last, not the one with the highest step.
    print(f"a restart goes on after step {ckpt.restore(state)}")
    for snapshot in ckpt.snapshots():
        print(f"step {snapshot.step}: loss {snapshot.metrics['loss']:.3g}, {snapshot.note}")
