"""The options that we recommend for SAGE: on embedding and head, beside Muon; the defaults are the paper's."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

RECOMMENDED_WITH_MUON: Mapping[str, Any] = MappingProxyType(
    {
        "rank": None,
        "nesterov": True,
        "consistent_rms": 0.2,
        "table_rule": "sage_int8",
        "learning_rate_multipliers": MappingProxyType({"embedding": 2 / 3, "head": 2 / 3}),
        "adam_b2": 0.95,
    }
)
"""Options for ``lorapre_optax.lorapre_muon(learning_rate, **RECOMMENDED_WITH_MUON)``: SAGE beside Muon.

Matrices have a full momentum and orthogonalised updates with about AdamW's rms, embedding and head SAGE with an
int8 momentum at two thirds of the learning rate, vectors AdamW. Of the rules for matrices that were run beside
SAGE, Muon did best (361,280 parameters, 4.2 million tokens: ``docs/results/recipes.md``). For matrices without
momentum: ``{**RECOMMENDED_WITH_MUON, "rank": 1, "mu": 0.0}`` with multipliers of a sixth.
"""
