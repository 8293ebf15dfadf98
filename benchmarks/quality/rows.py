"""The rows and controls of the quality benchmark: variants, where their searches start, lengths, seeds."""

from __future__ import annotations

from dataclasses import dataclass

TRIAL, FULL = 150, 400
SEEDS = (0, 1, 2)
MOST_TRIALS = 6
ROBUSTNESS = (0.25, 0.5, 2.0, 4.0)
"""Rates at which a core row is run besides its best, as multiples of that."""


@dataclass(frozen=True)
class QualityRow:
    """A row of the table.

    Attributes:
        key: The variant.
        start: The rate where the search begins.
        core: Whether it is trained with all seeds and away from its best rate.
    """

    key: str
    start: float
    core: bool = False


_ADAM = "lorapre_adamw:rank=16:scale=0.25"
_RECOMMENDED = ":bias_correction=exact:bound=1:residual=0.9:initial_subspace=gradient"
_TABLE = "lorapre_sinkgd:rank={}:options=paper:scale=5" + _RECOMMENDED

ROWS = (
    QualityRow("adamw", 3e-3, core=True),
    QualityRow("adamw:b2=0.95:matrix_rate=0.25", 1e-2, core=True),
    QualityRow("lion", 2e-3, core=True),
    QualityRow("galore:rank=16", 4e-2, core=True),
    QualityRow("sinkgd_hybrid", 4e-3, core=True),
    QualityRow("lion_hybrid", 1e-3, core=True),
    QualityRow("sage_hybrid", 1e-3, core=True),
    QualityRow("sage_hybrid_int8", 1e-3, core=True),
    QualityRow(_ADAM, 1e-2, core=True),
    QualityRow(_ADAM + _RECOMMENDED, 5e-3, core=True),
    QualityRow(_TABLE.format(16), 3e-3, core=True),
    QualityRow("muon", 1.2e-2),
    QualityRow("lorapre_muon:rank=16", 1.2e-2),
    QualityRow("lorapre_muon:rank=1:table_rank=2:b2=0.95", 1.2e-2),
    QualityRow("lorapre_muon:rank=16:table_rank=16:b2=0.95", 1.2e-2),
    QualityRow(_TABLE.format(3), 6e-3),
    QualityRow("factored_tables", 6e-3),
    QualityRow("adafactor", 3e-2),
    QualityRow("apollo:rank=16", 1e-2),
    QualityRow("apollo_mini", 1e-2),
    QualityRow("fira:rank=16", 1e-2),
    QualityRow("sage", 1e-3),
    QualityRow("sinkgd", 2e-2),
    QualityRow("sage_hybrid:matrix_rate=0.25", 4e-3),
    QualityRow("lion_hybrid:matrix_rate=0.25", 4e-3),
    QualityRow("sage_hybrid:scale=0.6:sinkhorn_variant=sqrt", 1e-3),
)

DAMPERS = ("both", "ema", "none")
DAMPER_RATES = (5e-4, 1e-3, 2e-3)
SINKHORN = {
    "unit, 5 iterations (default)": "sage_hybrid",
    "unit, 3 iterations": "sage_hybrid:sinkhorn_iterations=3",
    "unit, 1 iteration": "sage_hybrid:sinkhorn_iterations=1",
    # The square-root form is sqrt(rows) times the unit one, 14 to 23 for the demo's matrices.
    "sqrt, 5 iterations, scale 0.6": "sage_hybrid:scale=0.6:sinkhorn_variant=sqrt",
}
SINKHORN_RATE = 1e-3


def damper_key(damper: str) -> str:
    """The variant of SAGE-Hybrid with a damper; the default has no option.

    >>> damper_key("both"), damper_key("ema")
    ('sage_hybrid', 'sage_hybrid:damper=ema')
    """
    return "sage_hybrid" if damper == "both" else f"sage_hybrid:damper={damper}"


def controls() -> list[tuple[str, float]]:
    """The ablations of SAGE-Hybrid: variant and rate."""
    dampers = [(damper_key(damper), rate) for damper in DAMPERS for rate in DAMPER_RATES]
    return [*dampers, *((key, SINKHORN_RATE) for key in SINKHORN.values())]
