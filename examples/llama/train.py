"""Trains a Llama with one optimizer and records the run.

    python -m examples.llama.train --preset demo --optimizer sage_hybrid --steps 400 --out runs/sage

The folder then holds config.json (the options, all settings, versions, the corpus and its hash), metrics.jsonl
(one line per log interval and per evaluation, flushed at once), summary.json, checkpoints and TensorBoard
files. After SIGTERM, Ctrl-C or a crash, the same command with `--resume` continues.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from examples.llama.reporting.command import parse
from examples.llama.reporting.folders import FolderError
from examples.llama.training.checkpoints import SchemaError
from examples.llama.training.config import TrainConfig
from examples.llama.training.migrations import MigrationError
from examples.llama.training.resume import ResumeError
from examples.llama.training.run import prepare_run, run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = parse(TrainConfig, arguments, prog="python -m examples.llama.train")
    return run_command(
        config,
        lambda config, console: prepare_run(config, console=console),
        usage_errors=(ResumeError, SchemaError, MigrationError, FolderError),
    )


if __name__ == "__main__":
    sys.exit(main())
