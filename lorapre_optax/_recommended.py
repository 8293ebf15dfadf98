"""The options that we recommend for LoRA-Pre Adam and Muon; the defaults are the papers'."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

RECOMMENDED: Mapping[str, Any] = MappingProxyType(
    {
        "bias_correction": "exact",
        "residual": 0.9,
        "bound": 1.0,
        "initial_subspace": "gradient",
    }
)
"""Options for ``lorapre_adamw(learning_rate, rank, **RECOMMENDED)`` that bring factored Adam closer to Adam.

They are the exact bias correction; a residual of b1 (0.9), which gives the gradient outside the tracked
subspace the same weight as inside; Adam's own bound of 1 on the direction; and factors that start in the row
space of the first gradient. The defaults of `lorapre_adamw` are the paper's.
``docs/results/lorapre_quality.md`` measures the effect of each option.
"""

RECOMMENDED_MUON: Mapping[str, Any] = MappingProxyType(
    {
        "rank": 4,
        "consistent_rms": 0.2,
        "table_rule": "factored_rms",
        "learning_rate_multipliers": MappingProxyType({"embedding": 4.0, "head": 4.0}),
        "adam_b2": 0.95,
    }
)
"""Options for ``lorapre_muon(learning_rate, **RECOMMENDED_MUON)``, the least state that we recommend.

Matrices have a momentum of rank 4 and orthogonalised updates with about AdamW's rms, embedding and head
Adafactor's rule at four times the learning rate, vectors AdamW. For more state give a higher ``rank``:
``{**RECOMMENDED_MUON, "rank": 32}``. It was ahead of AdamW in runs of one small model (361,280 parameters, 4.2
million tokens: ``docs/results/recipes.md``).
"""
