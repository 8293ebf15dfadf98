"""SAGE, SinkGD and their hybrids, made from the example's options."""

from __future__ import annotations

import dataclasses
from typing import Any

import optax

import sage_optax
from examples.llama.optimizers.options import OptimizerOptions


def damper_arguments(options: OptimizerOptions) -> dict[str, Any]:
    """The settings for `sage_optax.sage_damper`, as keyword arguments.

    >>> damper_arguments(OptimizerOptions(b1=0.8, b2=0.95))
    {'b2': 0.95}
    """
    return options.only("b2", "eps", "damper", "eps_mode")


def sage(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """SAGE on everything."""
    return sage_optax.sage(learning_rate, **_sage_options(options), **_decay(options))


def sinkgd(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """SinkGD on everything."""
    return sage_optax.sinkgd(
        learning_rate, **options.only("scale"), **_sinkhorn(options), **_decay(options)
    )


def sage_hybrid(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """SAGE on embedding, head and vectors, SinkGD on matrices."""
    return sage_optax.sage_hybrid(
        learning_rate,
        **_sage_options(options),
        **options.only("vector_rule"),
        **_hybrid_options(options),
    )


def sage_hybrid_int8(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """SAGE-Hybrid with its momentum in int8."""
    return sage_hybrid(learning_rate, dataclasses.replace(options, mu_dtype="int8"))


def sinkgd_hybrid(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """AdamW on embedding, head and vectors, SinkGD on matrices.

    The recommended options have another rule and rate for embedding and head.

    Raises:
        ValueError: The rule for embedding and head is SAGE's, which is another optimizer.
    """
    base = dict(sage_optax.RECOMMENDED_SINKGD) if options.option_set == "recommended" else {}
    given = {
        **options.only("b1", "b2", "eps", prefix="adam_"),
        **options.only("mu_dtype"),
        **_hybrid_options(options),
    }
    if options.table_rule in ("sage", "sage_int8"):
        raise ValueError(
            f"sinkgd_hybrid has no table_rule {options.table_rule}; use others (AdamW) or factored_rms, "
            "or take sage_hybrid."
        )
    if options.table_rule is not None:
        given["table_rule"] = "adamw" if options.table_rule == "others" else options.table_rule
    return sage_optax.sinkgd_hybrid(learning_rate, **{**base, **given})


def lion_hybrid(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """Lion on embedding, head and vectors, SinkGD on matrices."""
    return sage_optax.lion_hybrid(
        learning_rate, **options.only("b1", "b2", "mu_dtype"), **_hybrid_options(options)
    )


def _sage_options(options: OptimizerOptions) -> dict[str, Any]:
    given = options.only("b1", "b2", "eps", "damper", "eps_mode", "mu_dtype")
    if given.get("damper") == "none":
        given["damper"] = None
    return given


def _hybrid_options(options: OptimizerOptions) -> dict[str, Any]:
    multipliers = options.role_multipliers
    given = {} if multipliers is None else {"learning_rate_multipliers": dict(multipliers)}
    return {
        **options.only("scale", "head_rule"),
        **_sinkhorn(options),
        **given,
        **_decay(options),
    }


def _sinkhorn(options: OptimizerOptions) -> dict[str, Any]:
    """SinkGD's own settings, which have its name in the example's options.

    >>> _sinkhorn(OptimizerOptions(sinkhorn_iterations=3))
    {'iterations': 3}
    """
    given = options.only("sinkhorn_iterations", "sinkhorn_variant")
    return {name.removeprefix("sinkhorn_"): value for name, value in given.items()}


def _decay(options: OptimizerOptions) -> dict[str, Any]:
    return {"weight_decay": options.weight_decay, "weight_decay_mask": options.decay_mask()}
