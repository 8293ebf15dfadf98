"""Trains one model with several optimizers, each at its own tuned learning rate, and compares the results.

    python -m examples.llama.compare --optimizers adamw,lion_hybrid,sage_hybrid --preset demo --out runs/compare

A name may carry options; it is then a row with its own learning rate, runs and label: `galore:rank=16`,
`lorapre_adamw:rank=4:options=recommended`, `adamw:matrix_rate=0.25` (see `variants`).
All runs start from the same parameters and see the same batches in the same order. The folder then holds
comparison.json, table.md, comparison.png, ranks.png if rows differ in rank alone, a folder per run, and with
`--tune` the trials and tuned_rates.json.
Started again with the same settings, the command continues and repeats no finished run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from examples.llama.comparing.comparison import CompareConfig, Comparison
from examples.llama.devices.processes import start_devices
from examples.llama.reporting.command import fail, parse
from examples.llama.training.run import INTERRUPTED_EXIT


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = parse(CompareConfig, arguments, prog="python -m examples.llama.compare")
    console = Console()
    try:
        config = start_devices(config)
        comparison = Comparison(config, console=console)
    except (ValueError, OSError) as error:
        return fail(error, CompareConfig)
    try:
        comparison.run()
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. The same command continues from here.")
        return INTERRUPTED_EXIT
    except OSError as error:
        return fail(error, CompareConfig)
    return 0


if __name__ == "__main__":
    sys.exit(main())
