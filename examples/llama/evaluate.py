"""Measures exact match of generated answers: completes problems in batches, finds answers, reports accuracy.

    python -m examples.llama.evaluate --model runs/metamath --task gsm8k --out runs/metamath/gsm8k

MODEL is a Hugging Face folder or a run. The folder `out` gets items.jsonl, with a line per problem, and
summary.json. `examples.llama.finetuning.answers` finds the answers; accuracy has Wilson's 95 % interval.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from examples.llama.finetuning.evaluation import EvaluateConfig, run
from examples.llama.reporting.command import command
from examples.llama.reporting.progress import say
from examples.llama.training.orbax_noise import quiet_orbax


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command(EvaluateConfig, _evaluate, arguments, prog="python -m examples.llama.evaluate")


def _evaluate(config: EvaluateConfig) -> int:
    quiet_orbax()
    console = Console()
    summary = run(config, console)
    low, high = summary["interval_95"]
    for line in (
        f"{summary['correct']} of {summary['problems']} right: {100 * summary['accuracy']:.2f} % "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f})",
        f"{summary['without_answer']} responses without an answer, {summary['not_stopped']} ended by "
        "the limit (--new-tokens)",
        f"Written to {config.out}",
    ):
        say(console, line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
