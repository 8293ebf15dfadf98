"""The trainer's command line with the tiny model and corpus, for tests that start processes of their own."""

from __future__ import annotations

import sys

from examples.llama import train
from examples.llama.model.config import PRESETS
from examples.llama.training import run
from tests.llama import tiny


def main() -> int:
    """Takes the trainer's options."""
    PRESETS["tiny"] = tiny.MODEL
    run.prepare_data = lambda config: tiny.dataset()
    defaults = {
        "preset": "tiny",
        "optimizer": "adamw",
        "learning-rate": "1e-2",
        "steps": "8",
        "batch-size": "8",
        "seq-len": "16",
        "eval-every": "8",
        "eval-batches": "2",
        "log-every": "1",
        "statistics-every": "0",
    }
    arguments = [f"--{name}={value}" for name, value in defaults.items()]
    return train.main([*arguments, "--no-tensorboard", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
