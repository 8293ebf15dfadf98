"""The order of optimizers in docs/choosing.md, and the row of a plan that it selects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples.llama.comparing.memory import PlanRow

QUALITY: dict[str, float] = {
    "muon": 28.5,
    "lorapre_muon": 29.8,
    "adafactor": 39.2,
    "lorapre_adamw:options=recommended": 39.2,
    "galore": 39.8,
    "lorapre_muon:table_rank": 41.4,
    "sage_hybrid": 47.3,
    "sage_hybrid_int8": 47.8,
    "lion_hybrid": 48.2,
    "adamw": 56.2,
    "lorapre_sinkgd": 62.9,
    "sinkgd_hybrid": 67.2,
    "lorapre_adamw": 92.3,
    "sage": 94.1,
    "lion": 106.8,
    "sinkgd": 108.6,
}
"""Held-out perplexity of the demo, 3.3 million parameters after 400 steps of 2048 tokens, each at its own
searched learning rate, ranks 16, the mean over the seeds that were run: docs/results/quality.md. `table_rank`
means factors on the embedding too. A short run of a small model gives an order, not a prediction."""


@dataclass(frozen=True)
class LongRun:
    """A row of the longer experiment.

    Attributes:
        perplexity: Held-out perplexity at its best learning rate.
        rate: That learning rate.
        options: The row's options besides its key and rank.
    """

    perplexity: float
    rate: float
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)


LONG: dict[str, LongRun] = {
    "muon": LongRun(9.68, 0.006),
    "lorapre_muon": LongRun(10.55, 0.006),
    "lorapre_adamw:options=recommended": LongRun(12.57, 0.005, {"scale": 0.25}),
    "adamw": LongRun(14.46, 0.003, {"b2": 0.95}),
    "adafactor": LongRun(18.48, 0.06),
    "lion_hybrid": LongRun(29.70, 0.0005),
    "sage_hybrid": LongRun(30.20, 0.0005),
}
"""6.8 million parameters after 1000 steps of 32 x 512 tokens, one seed: docs/results/accelerator.md."""

RECIPE = "lorapre_muon:options=recommended"
"""The recipe of least state. After 4.2 million tokens of 361,280 parameters it was ahead of AdamW and level
with Adafactor, each at its own learning rates: the long table of docs/results/quality.md."""

LEAST = "sinkgd_hybrid:options=recommended"
"""SinkGD with a factored embedding, which keeps less. In the same runs it was level with Adafactor."""


def _order() -> tuple[str, ...]:
    """`ORDER`: the recipe has AdamW's place, behind it, and the least state Adafactor's."""
    found = [*LONG, *(key for key in QUALITY if key not in LONG)]
    for known, own in (("adamw", RECIPE), ("adafactor", LEAST)):
        found.insert(found.index(known) + 1, own)
    return tuple(found)


ORDER = _order()
"""Optimizers in the order of docs/choosing.md: by the longer experiment, then those that it lacks by the early
one; and `RECIPE` and `LEAST`."""


def recommend(
    rows: Sequence[PlanRow], limit: float, preference: Sequence[str] | None = None
) -> PlanRow | None:
    """The row to use: among those that fit, the one whose optimizer comes first in an order.

    Rows of formulas are never recommended, since nothing here implements them. A row's place is that of
    its key without ranks (`table_rank` without its number), else that of its optimizer; among rows of one
    place the one with the largest state wins. Optimizers that the order does not name come last.

    Args:
        rows: What was planned.
        limit: Bytes that there are on a device.
        preference: Keys or names of optimizers; by default `ORDER`.

    Returns:
        The row, or None if none fits.
    """
    order = ORDER if preference is None else list(preference)
    fitting = [row for row in rows if row.source == "abstract evaluation" and row.bytes <= limit]

    def place(row: PlanRow) -> tuple[int, int]:
        names = names_in_order(row.key)
        return next((order.index(n) for n in names if n in order), len(order)), -row.state_bytes

    return min(fitting, key=place, default=None)


def names_in_order(key: str) -> tuple[str, str]:
    """The names under which an order may have a row: its key without ranks, then its optimizer.

    >>> names_in_order("lorapre_muon:rank=4:table_rank=8")
    ('lorapre_muon:table_rank', 'lorapre_muon')
    """
    name, *options = key.split(":")
    plain = [
        "table_rank" if option.startswith("table_rank=") else option
        for option in options
        if not option.startswith("rank=")
    ]
    return ":".join([name, *plain]), name
