"""Fine-tunes a Llama on instructions: all attention and MLP matrices with any optimizer, or adapters.

    python -m examples.llama.finetune --model Llama-2-7b-hf --data hf:meta-math/MetaMathQA --limit 100000 \
        --method lorapre_adamw --rank 8 --learning-rate 2e-5 --mesh 'fsdp=*' --compute-dtype bfloat16 --remat

It uses the trainer of `examples.llama.train` with another program and other batches, so checkpoints,
`--resume`, meshes, logs and signals work the same. A checkpoint holds the trained parameters, not the base
model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from examples.llama.finetuning.run import FinetuneConfig, prepare_finetuning
from examples.llama.reporting.command import parse
from examples.llama.training.run import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = parse(FinetuneConfig, arguments, prog="python -m examples.llama.finetune")
    return run_command(
        config,
        lambda config, console: prepare_finetuning(config, console=console),
        # A base model's files are read when the training begins.
        usage_errors=(ValueError, FileExistsError, FileNotFoundError),
    )


if __name__ == "__main__":
    sys.exit(main())
