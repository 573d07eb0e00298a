"""The demo's training as ckpt-chaos runs it: one process a rank, or one alone; and the same made wrong on purpose.

    ckpt-chaos run ... -- python tests/end_to_end/chaos_train.py --output {out} [--mistake ...] [options of train_lm.py]

The judge counts file events by their paths, and takes a name that is relative to an open directory for one in the
current directory. All names below a repository are of that kind, so the training runs in the folder it writes to.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import fastckpt

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import train_lm


class StartsAfresh(fastckpt.Checkpointer):
    """A resume that finds nothing, and says nothing."""

    def restore(self, state: dict[str, Any], **options: Any) -> None:
        return None


class InPlace:
    """``torch.save`` under the final name, as most loops do it."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(exist_ok=True)

    def __enter__(self) -> InPlace:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def save(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> SimpleNamespace:
        torch.save({name: part.state_dict() for name, part in state.items()}, self._folder / f"step-{step}.pt")
        return SimpleNamespace(done=True, step=step, counters={})

    def restore(self, state: dict[str, Any]) -> int | None:
        steps = [int(path.stem.partition("-")[2]) for path in self._folder.iterdir()]
        if not steps:
            return None
        saved = torch.load(self._folder / f"step-{max(steps)}.pt", weights_only=False)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        return max(steps)


MISTAKES = {"starts-afresh": StartsAfresh, "in-place": InPlace}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--mistake", choices=MISTAKES)
    arguments, others = parser.parse_known_args()
    arguments.output.mkdir(exist_ok=True)
    os.chdir(arguments.output)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if arguments.mistake:
        train_lm.fastckpt.Checkpointer = MISTAKES[arguments.mistake]
    sys.argv = ["train_lm.py", "--output", ".", "--repository", str(arguments.output / "repository"), *others]
    train_lm.main()


if __name__ == "__main__":
    main()
