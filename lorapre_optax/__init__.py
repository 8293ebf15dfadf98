"""LoRA-Pre: optimizer momentum stored as two thin factors, as optax transformations."""

from layout_optax import ParamLayout as ParamLayout
from layout_optax import __version__ as __version__
from layout_optax import describe as describe
from layout_optax import state_shardings as state_shardings
from layout_optax import unboxed as unboxed
from lorapre_optax._adam import LorapreAdamState as LorapreAdamState
from lorapre_optax._adam import lorapre_adamw as lorapre_adamw
from lorapre_optax._adam import scale_by_lorapre_adam as scale_by_lorapre_adam
from lorapre_optax._hybrid import lorapre_sinkgd as lorapre_sinkgd
from lorapre_optax._lion import lorapre_lion as lorapre_lion
from lorapre_optax._lion import scale_by_lorapre_lion as scale_by_lorapre_lion
from lorapre_optax._metrics import lorapre_metrics as lorapre_metrics
from lorapre_optax._moment import LowRankState as LowRankState
from lorapre_optax._momentum import low_rank_ema as low_rank_ema
from lorapre_optax._momentum import low_rank_trace as low_rank_trace
from lorapre_optax._muon import lorapre_muon as lorapre_muon
from lorapre_optax._muon import scale_by_lorapre_muon as scale_by_lorapre_muon
from lorapre_optax._recommended import RECOMMENDED as RECOMMENDED
from lorapre_optax._recommended import RECOMMENDED_MUON as RECOMMENDED_MUON
from lorapre_optax._resize import resize_ranks as resize_ranks
from lorapre_optax._sgd import lorapre_sgd as lorapre_sgd
from lorapre_optax._suggest import suggest_ranks as suggest_ranks

STATIC_ARGS: tuple[str, ...] = ("rank", "layout", "factor_dtype", "weight_decay_mask")
"""Arguments that `optax.inject_hyperparams` must not turn into numbers or schedules. optax accepts only names
that the factory has: leave out ``"weight_decay_mask"`` for the ``scale_by_`` and ``low_rank_`` functions, and
add ``"target"`` for a `low_rank_ema` and ``"table_rank"`` for a `lorapre_muon` that has one. Inside
`optax.MultiSteps` also add ``"ns_steps"``, or give it as a float: an injected int is weakly typed at init and
no longer after a step, and JAX compiles the step twice."""

__all__ = [
    "RECOMMENDED",
    "RECOMMENDED_MUON",
    "STATIC_ARGS",
    "LorapreAdamState",
    "LowRankState",
    "ParamLayout",
    "describe",
    "lorapre_adamw",
    "lorapre_lion",
    "lorapre_metrics",
    "lorapre_muon",
    "lorapre_sgd",
    "lorapre_sinkgd",
    "low_rank_ema",
    "low_rank_trace",
    "resize_ranks",
    "scale_by_lorapre_adam",
    "scale_by_lorapre_lion",
    "scale_by_lorapre_muon",
    "state_shardings",
    "suggest_ranks",
    "unboxed",
]
