"""Peak learning rates by preset and optimizer, and where each is from.

Those of the demo were found by `python -m examples.llama.compare --tune`; those of the larger presets are
the rates that the papers' scripts and tables use, not searched here.
"""

from __future__ import annotations

SCRIPTS = "SAGE authors' scripts"
SPECS = "published table"

TUNED_RATES: dict[str, dict[str, tuple[float, str]]] = {
    "demo": {
        "adamw": (3e-3, "to be measured"),
    },
}


def tuned_rate(preset: str, optimizer: str) -> tuple[float, str]:
    """The peak learning rate of an optimizer on a preset, and where it is from.

    Raises:
        ValueError: The table has none; the message says how to give or find one.

    >>> tuned_rate("llama2_7b", "adamw")
    Traceback (most recent call last):
        ...
    ValueError: no tuned learning rate for optimizer 'adamw' on preset 'llama2_7b'; give one with
    --learning-rate or search with examples.llama.compare --tune
    """
    rates = TUNED_RATES.get(preset, {})
    if optimizer not in rates:
        raise ValueError(
            f"no tuned learning rate for optimizer {optimizer!r} on preset {preset!r}; give one with\n"
            "--learning-rate or search with examples.llama.compare --tune"
        )
    return rates[optimizer]
