"""The options that we recommend for SinkGD and SAGE, each beside another rule; the defaults are the papers'."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

RECOMMENDED_SINKGD: Mapping[str, Any] = MappingProxyType(
    {
        "table_rule": "factored_rms",
        "learning_rate_multipliers": MappingProxyType({"embedding": 12.0, "head": 12.0}),
        "adam_b2": 0.95,
    }
)
"""Options for ``sinkgd_hybrid(learning_rate, **RECOMMENDED_SINKGD)``: SinkGD with next to no state.

Matrices have SinkGD, embedding and head Adafactor's rule at twelve times the learning rate, vectors AdamW. It
was ahead of AdamW or level with it in three settings of two small models, in two of them far behind
``lorapre_optax.RECOMMENDED_MUON`` (361,280 and 1,840,256 parameters, 4.2 million tokens: ``docs/choosing.md``).
"""

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
