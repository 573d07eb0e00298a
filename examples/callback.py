"""`Callback` decides when to save, for loops that should not have to.

python examples/callback.py [URL]
"""

import signal
import sys
import tempfile

import torch

import fastckpt

STEPS = 12
url = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

model = torch.nn.Linear(16, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
state = {"model": model, "optimizer": optimizer, "rng": fastckpt.RNGState(), "examples_seen": 0}

with fastckpt.Checkpointer(url) as ckpt:
    callback = fastckpt.Callback(
        ckpt,
        state,
        every_steps=4,  # and every_seconds=900, or "auto": by what a save costs and how often the job fails
        signals=(signal.SIGUSR1, signal.SIGTERM),  # the first asks for a save, the second also for the end
        failures_max=3,  # so many failed saves in a row are only logged
        on_committed=lambda snapshot: print(f"committed step {snapshot.step}: {snapshot.metrics}"),
    )
    for step in range(callback.on_train_begin(), STEPS + 1):  # restores; the first step to run
        inputs = torch.randn(8, 16)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state["examples_seen"] += len(inputs)  # a plain value; a restore puts it back into the dict
        if callback.on_step_end(step, {"loss": loss.item()}):  # SIGTERM: this step is being saved, on all ranks
            break
    callback.on_train_end()  # waits for the last save, and raises if it failed
print(f"{state['examples_seen']} examples seen; snapshots in {url}")
