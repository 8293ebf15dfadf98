"""Peak learning rates by preset and optimizer, and where each is from.

Those of the demo were found by `python -m examples.llama.compare --tune`; those of the larger presets are
the rates that the papers' scripts and tables use, not searched here.
"""

from __future__ import annotations

SKETCH = "sketch, 400 steps of a like model"
SCRIPTS = "SAGE authors' scripts"

TUNED_RATES: dict[str, dict[str, tuple[float, str]]] = {
    "demo": {
        "adamw": (3e-3, SKETCH),
        "lion": (1e-3, SKETCH),
        "adafactor": (3e-2, SKETCH),
        "muon": (3e-3, SKETCH),
        "galore": (1e-2, SKETCH),
        "sage_hybrid": (2e-3, SKETCH),
        "sage_hybrid_int8": (2e-3, SKETCH),
        "sinkgd_hybrid": (2e-3, SKETCH),
        "lion_hybrid": (2e-3, SKETCH),
        "sage": (1e-3, SKETCH),
        "sinkgd": (2e-2, SKETCH),
    },
}


def tuned_rate(preset: str, optimizer: str) -> tuple[float, str]:
    """The peak learning rate of an optimizer on a preset, and where it is from.

    Raises:
        ValueError: The table has none; the message says how to give or find one.

    >>> tuned_rate("llama2_7b", "adamw")
    Traceback (most recent call last):
        ...
    ValueError: no tuned rate of 'adamw' for preset 'llama2_7b'; give one or search with compare --tune
    """
    rates = TUNED_RATES.get(preset, {})
    if optimizer not in rates:
        raise ValueError(
            f"no tuned rate of {optimizer!r} for preset {preset!r}; give one or search with compare --tune"
        )
    return rates[optimizer]
