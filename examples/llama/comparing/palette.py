"""The palette of all pictures: a fixed colour for each optimizer, and the choice of rows with a colour.

Okabe and Ito's colours, which people with the common forms of colour blindness can distinguish, without their
yellow (too pale for lines), and others far from them. Rows of one optimizer share its colour and differ in
marker and line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from examples.llama.comparing.rows import Row, family

BLACK, BLUE, RED, GREEN, PINK, SKY, ORANGE = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
)
GREY, VIOLET, BROWN, OLIVE, WINE = "#7F7F7F", "#5B3A8C", "#8C5A2B", "#7A8B1F", "#882255"
INDIGO, MAGENTA, LIME, CORAL, CRIMSON = "#2A2AE0", "#D63AD6", "#34C234", "#FF8778", "#F0145A"
LAVENDER, FOREST, TEAL, MAROON = "#A47BFF", "#2D4B1E", "#00C4C0", "#6E0F0F"
PALE = "#C4C4C4"
"""Style of rows without a colour."""

OPTIMIZERS = {
    "adamw": BLACK,
    "lion": GREY,
    "adafactor": BROWN,
    "muon": ORANGE,
    "galore": VIOLET,
    "sage_hybrid": BLUE,
    "sage_hybrid_int8": SKY,
    "sage": INDIGO,
    "lion_hybrid": RED,
    "sinkgd_hybrid": OLIVE,
    "sinkgd": LIME,
    "lorapre_adamw": PINK,
    "lorapre_muon": GREEN,
    "lorapre_sinkgd": WINE,
    "lorapre_lion": LAVENDER,
    "lorapre_sgd": FOREST,
    "fira": MAGENTA,
    "apollo": CORAL,
    "apollo_mini": CRIMSON,
    "factored_tables": TEAL,
    "products": MAROON,
}
"""The colour of each optimizer in every picture, the benchmarks' peers among them; no two share one."""

MOST_COLOURED = 10
"""Colours cannot distinguish more rows than this; the rest is pale."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "*", "h")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))


def colour(optimizer: str) -> str:
    """The colour of an optimizer, or grey.

    >>> colour("sage_hybrid"), colour("another")
    ('#0072B2', '#7F7F7F')
    """
    return OPTIMIZERS.get(optimizer, GREY)


def coloured(rows: Sequence[Row], most: int = MOST_COLOURED) -> list[Row]:
    """The rows with a colour: all, or among too many the best of each optimizer, best ones first."""
    if len(rows) <= most:
        return list(rows)
    best: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row.heldout_perplexity):
        best.setdefault(row.optimizer, row)
    return list(best.values())[:most]


def row_styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Colour of each row by its optimizer, marker by its family, line by its place among the family's ranks."""
    families: dict[str, list[str]] = {}
    ranks: dict[str, list[int]] = {}
    for row in rows:
        key = family(row).key
        families.setdefault(row.optimizer, []).append(key)
        ranks.setdefault(key, []).append(row.rank or 0)
    optimizers = list(families)
    styles = []
    for row in rows:
        key = family(row).key
        among = list(dict.fromkeys(families[row.optimizer])).index(key)
        place = sorted(set(ranks[key])).index(row.rank or 0)
        marker = optimizers.index(row.optimizer) + 3 * among
        styles.append(
            {
                "color": colour(row.optimizer),
                "marker": MARKERS[marker % len(MARKERS)],
                "linestyle": LINES[(place + among) % len(LINES)],
            }
        )
    return styles
