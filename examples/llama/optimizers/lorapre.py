"""The LoRA-Pre optimizers, made from the example's settings."""

from __future__ import annotations

import inspect
import math
from typing import Any

import optax

import lorapre_optax
from examples.llama.optimizers.options import OptimizerOptions
from layout_optax import by_role
from lorapre_optax import RECOMMENDED, RECOMMENDED_MUON, scale_by_lorapre_adam
from sage_optax import RECOMMENDED_WITH_MUON, scale_by_sage, scale_by_sinkhorn

_FACTORS = ("rank", "residual", "initial_subspace", "factor_dtype", "damping")
_ADAM = ("b1", "b2", "eps", "bias_correction", "bound", "second_moment", *_FACTORS)
SAGE_BESIDE_FACTORS = {
    "nesterov": False,
    "learning_rate_multipliers": {"embedding": 1 / 3, "head": 1 / 3},
}
"""What `RECOMMENDED_WITH_MUON`, made for full momentum, has for SAGE beside factors: as rank 8 was searched."""


def adamw(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """LoRA-Pre Adam on matrices, AdamW on the rest; the paper's rule unless told otherwise."""
    return lorapre_optax.lorapre_adamw(
        learning_rate, **adam_options(options), **options.only("scale"), **_common(options)
    )


def muon(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """LoRA-Pre Muon on matrices, AdamW on the rest, at one rate as in the Muon baseline.

    The recommended options have another rule and rate for embedding and head; those of SAGE if it is the rule.
    """
    base = {}
    if options.option_set == "recommended":
        sage = options.table_rule in ("sage", "sage_int8")
        base = {**RECOMMENDED_WITH_MUON, **SAGE_BESIDE_FACTORS} if sage else dict(RECOMMENDED_MUON)
    if options.table_rank is not None:
        base.pop("table_rule", None)
    given = {
        "consistent_rms": 0.2 if options.scale is None else options.scale,
        **_switched_off(options.only(*_FACTORS, "table_rank", "table_rule")),
        **options.only("b1", "b2", prefix="adam_"),
        **_common(options),
    }
    return lorapre_optax.lorapre_muon(learning_rate, **{**base, **given})


def sgd(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """SGD with low-rank momentum on matrices and full momentum on the rest; `b1` is its decay."""
    momentum = {} if options.b1 is None else {"momentum": options.b1}
    return lorapre_optax.lorapre_sgd(
        learning_rate,
        **momentum,
        **_switched_off(options.only(*_FACTORS)),
        **options.only("scale"),
        **_common(options),
    )


def lion(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """Lion with a low-rank momentum on matrices, Lion on the rest."""
    return lorapre_optax.lorapre_lion(
        learning_rate,
        **_switched_off(options.only(*_FACTORS)),
        **options.only("b1", "b2", "scale"),
        **_common(options),
    )


def sinkgd(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """LoRA-Pre Adam on embedding and head, SinkGD on matrices, AdamW on vectors; the recommended options.

    Without `head_rule` and `vector_rule` this is `lorapre_optax.lorapre_sinkgd`.
    """
    table = scale_by_lorapre_adam(**{**RECOMMENDED, **adam_options(options)})
    matrix = optax.chain(
        scale_by_sinkhorn(), optax.scale(10.0 if options.scale is None else options.scale)
    )
    full = scale_by_lorapre_adam(None, **options.only("b1", "b2", "eps"))
    heads = {"table": table, "matrix": matrix, "adamw": full}
    vectors = {"adamw": full, "sage": scale_by_sage()}
    directions = {
        "embedding": table,
        "head": heads[options.head_rule or "table"],
        "vector": vectors[options.vector_rule or "adamw"],
        "matrix": matrix,
        "other": full,
    }
    return by_role(directions, learning_rate, **_common(options))


def adam_options(options: OptimizerOptions) -> dict[str, Any]:
    """The arguments of LoRA-Pre Adam: the given ones, then those of a named set of options.

    >>> adam_options(OptimizerOptions(rank=4, option_set="recommended", bound=math.inf))["bound"]
    >>> adam_options(OptimizerOptions(rank=4))
    {'rank': 4}
    """
    base = {}
    if options.option_set is not None:
        base = dict(RECOMMENDED) if options.option_set == "recommended" else _paper_options()
    return _switched_off({**base, **options.only(*_ADAM)})


def _paper_options() -> dict[str, Any]:
    """The paper's values of the recommended options, which are the defaults of the direction."""
    defaults = inspect.signature(scale_by_lorapre_adam).parameters
    return {name: defaults[name].default for name in RECOMMENDED}


def _switched_off(arguments: dict[str, Any]) -> dict[str, Any]:
    """None for the values that mean "none" where None already means "not given"."""
    none = {"residual": 0, "bound": math.inf}
    return {
        name: None if name in none and value == none[name] else value
        for name, value in arguments.items()
    }


def _common(options: OptimizerOptions) -> dict[str, Any]:
    """Decay and learning rates by role."""
    found = {
        "weight_decay": options.weight_decay,
        "weight_decay_mask": options.decay_mask(),
    }
    if options.role_multipliers is not None:
        found["learning_rate_multipliers"] = dict(options.role_multipliers)
    return found
