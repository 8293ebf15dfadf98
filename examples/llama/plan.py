"""Plans which optimizer fits: the memory of a step on each device, and the command that trains it.

    python -m examples.llama.plan --preset sage_1.3b --optimizers adamw,lion,sinkgd_hybrid,sage_hybrid
    python -m examples.llama.plan --hf-config config.json --mesh fsdp=8 --batch-size 64 --seq-len 4096 --remat
    python -m examples.llama.plan --preset llama3.1_8b --finetune --rank 8 --device-gb 80 --remat

Parameters, gradients and state come from abstract evaluation of the optimizers, and activations from a trace
of the model. Nothing is allocated, and the devices of the mesh need not exist. The optimizer's temporaries and
the runtime's memory are NOT counted; `--margin` leaves room for them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.llama.comparing.plan import PlanConfig, make_plan
from examples.llama.comparing.plan_text import answer, plan_tables, title
from examples.llama.reporting.command import command
from examples.llama.reporting.files import write_json
from examples.llama.reporting.progress import say
from examples.llama.training.notes import quiet_rank_warning


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command(PlanConfig, _plan, arguments, prog="python -m examples.llama.plan")


def _plan(config: PlanConfig) -> int:
    quiet_rank_warning()  # the marked rows show it
    plan = make_plan(config)
    if config.json == "-":
        print(json.dumps(plan.to_dict(), indent=2))
        return 0
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=200)

    for line in title(plan):
        say(console, line)
    for table in plan_tables(plan, console.width):
        say(console, "")
        console.print(table)
    say(console, "")
    for line in answer(plan):
        say(console, line)
    if config.json is not None:
        write_json(Path(config.json), plan.to_dict())
        say(console, f"Written to {config.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
