"""LoRA-Pre: optimizer momentum kept as two thin factors, as optax transformations."""

from layout_optax import ParamLayout as ParamLayout
from lorapre_optax._momentum import LowRankState as LowRankState
from lorapre_optax._momentum import low_rank_ema as low_rank_ema
from lorapre_optax._momentum import low_rank_trace as low_rank_trace

STATIC_ARGS = (
    "rank",
    "target",
    "nesterov",
    "debias",
    "damping_kind",
    "initial_subspace",
    "factor_dtype",
    "full_rank_fallback",
    "layout",
)
"""Arguments of every optimizer here that are not numbers, for ``optax.inject_hyperparams``."""

__all__ = [
    "STATIC_ARGS",
    "LowRankState",
    "ParamLayout",
    "low_rank_ema",
    "low_rank_trace",
]
