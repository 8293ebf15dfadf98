"""The options we recommend for LoRA-Pre Adam, beside the paper's, which are the defaults."""

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
"""``lorapre_adamw(rate, rank, **RECOMMENDED)``: what a factored Adam lacks beside Adam, put back.

The exact bias correction; a residual of b1 (0.9), which gives gradient outside the tracked subspace the weight
that it has inside; Adam's natural bound of 1 on the direction; factors that start in the first gradient's row
space. The defaults of `lorapre_adamw` are the paper's. What each option is worth is measured in
``docs/results/lorapre_quality.md``.
"""
