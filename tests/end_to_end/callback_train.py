"""A job under torchrun with the callback installed, in whose seventh step something goes wrong: see `test_signals.py`.

    torchrun --nproc-per-node=2 tests/end_to_end/callback_train.py OUTPUT AGREE_SECONDS (killed | stuck) [SIGNAL ...]

killed: rank 1 kills itself, and rank 0 waits for it in a call that never comes back, as in a collective over a network
that does not notice. stuck: rank 0 is in a collective that rank 1, which is alive, does not take part in.
"""

import json
import os
import sys
import time
from pathlib import Path

output, agree_seconds, event = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
journal = os.open(output / f"rank-{os.environ['RANK']}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def write(**entry: object) -> None:
    os.write(journal, json.dumps({**entry, "at": time.monotonic()}).encode() + b"\n")


write(started=os.getpid())  # before torch is imported: that takes its time

import signal  # noqa: E402
from datetime import timedelta  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import fastckpt  # noqa: E402

STEPS = 8
dist.init_process_group("gloo", timeout=timedelta(seconds=300))
rank = dist.get_rank()
state = {"sum": torch.zeros(1)}
with fastckpt.Checkpointer(output / "run") as ckpt:
    callback = fastckpt.Callback(
        ckpt,
        state,
        every_steps=5,
        agree_seconds=agree_seconds,
        signals=[signal.Signals[name] for name in sys.argv[4:]],
    )
    first = callback.on_train_begin()
    write(first=first)
    for step in range(first, STEPS + 1):
        if step == 7 and first == 1:
            assert ckpt.pending is not None
            ckpt.pending.wait()
            dist.barrier()  # neither goes on before both have seen the commit
            write(event=event)
            if event == "killed" and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "killed" or rank == 1:
                dist.distributed_c10d._get_default_store().wait(["never"], timedelta(seconds=300))
        dist.all_reduce(torch.ones(1))
        state["sum"] += 1
        if callback.on_step_end(step):
            break
    callback.on_train_end()
write(ended=int(state["sum"].item()))
dist.destroy_process_group()
