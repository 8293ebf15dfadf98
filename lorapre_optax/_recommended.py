"""The options that we recommend for LoRA-Pre Adam; the defaults are the paper's."""

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
