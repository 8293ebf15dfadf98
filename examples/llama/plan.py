"""Which optimizer fits: parameters, gradients and optimizer state of a Llama on each device, in seconds.

    python -m examples.llama.plan --preset sage_1.3b --optimizers adamw,lion,sinkgd_hybrid,sage_hybrid
    python -m examples.llama.plan --hf-config config.json --mesh fsdp=8 --dtype bfloat16
    python -m examples.llama.plan --preset llama3.1_8b --finetune --rank 8 --dtype bfloat16 --device-gb 80

Everything is found by abstract evaluation of the optimizers themselves: nothing is allocated, and the devices
of the mesh need not exist. Activations, the temporaries of a step and what the runtime takes are NOT counted:
give what is known as `--activation-gb`, and leave a margin for the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.llama.comparing.plan import PlanConfig, answer, make_plan, plan_table
from examples.llama.reporting.command import command
from examples.llama.reporting.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return command(PlanConfig, _plan, arguments, prog="python -m examples.llama.plan")


def _plan(config: PlanConfig) -> int:
    plan = make_plan(config)
    if config.json == "-":
        print(json.dumps(plan.to_dict(), indent=2))
        return 0
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=160)
    console.print(plan_table(plan))
    for line in answer(plan):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if config.json is not None:
        write_json(Path(config.json), plan.to_dict())
        console.print(f"Written to {config.json}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
