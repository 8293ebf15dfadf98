"""optax's optimizers as baselines, routed by layout, with weight decay times the learning rate."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax import contrib

from examples.llama.optimizers.options import OptimizerOptions
from layout_optax import ParamLayout, by_role, resolve_layout
from layout_optax.layout import ROLES


def adamw(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """AdamW on every parameter, at one learning rate or at one per role."""
    given = options.only("b1", "b2", "eps", "mu_dtype")
    if options.role_multipliers:
        return by_role(
            dict.fromkeys(ROLES, optax.scale_by_adam(**given)),
            learning_rate,
            learning_rate_multipliers=options.role_multipliers,
            weight_decay=options.weight_decay,
            weight_decay_mask=options.decay_mask(),
        )
    return optax.adamw(
        learning_rate, **given, weight_decay=options.weight_decay, mask=options.decay_mask()
    )


def lion(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """Lion on every parameter."""
    return optax.lion(
        learning_rate,
        **options.only("b1", "b2", "mu_dtype"),
        weight_decay=options.weight_decay,
        mask=options.decay_mask(),
    )


def adafactor(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """Adafactor, with its steps relative to each parameter's rms."""
    # optax.adafactor does not multiply decay by the learning rate, so this function combines its parts in
    # another order; without decay the two are the same.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(options.weight_decay, options.decay_mask()),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """Muon on matrices, each layer by itself, and Muon's own AdamW on embedding, head and vectors."""
    direction = contrib.muon(
        1.0,
        # Every matrix then has an update rms of 0.2, near AdamW's, so that one learning rate suits both parts.
        consistent_rms=0.2 if options.scale is None else options.scale,
        muon_weight_dimension_numbers=muon_dimension_numbers,
        **options.only("b1", "b2", prefix="adam_"),
    )
    # Muon's own decay takes no mask in the AdamW part.
    return optax.chain(
        direction,
        optax.scale(-1.0),
        optax.add_decayed_weights(options.weight_decay, options.decay_mask()),
        optax.scale_by_learning_rate(learning_rate),
    )


def muon_dimension_numbers(params: Any) -> Any:
    """Muon's dimension numbers for each matrix (batch axes implied), None for other parameters.

    >>> import jax.numpy as jnp
    >>> numbers = muon_dimension_numbers({"layers": {"up": {"kernel": jnp.ones((2, 4, 8))}}})
    >>> numbers["layers"]["up"]["kernel"]
    MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    """

    def numbers(layout: ParamLayout) -> contrib.MuonDimensionNumbers | None:
        if layout.role != "matrix":
            return None
        return contrib.MuonDimensionNumbers(layout.column_axes, layout.row_axes)

    return jax.tree.map(numbers, resolve_layout(None, params))


def galore(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """GaLore on unstacked matrices, AdamW on embedding, head and vectors."""
    # Inside a partition: otherwise optax's GaLore would project embeddings too, and give unprojected
    # parameters placeholders of size zero, which no checkpoint can hold.
    matrices = contrib.galore(
        learning_rate,
        rank=options.rank or 0,
        update_proj_gap=200 if options.update_gap is None else options.update_gap,
        scale=0.25 if options.scale is None else options.scale,
        base_optimizer=optax.scale_by_adam(**options.only("b1", "b2", "eps")),
        weight_decay=options.weight_decay,
    )
    others = adamw(learning_rate, options)
    return optax.partition({"matrix": matrices, "other": others}, matrix_or_other)


def matrix_or_other(params: Any) -> Any:
    """Labels for `optax.partition`: matrices, and all else."""
    return jax.tree.map(
        lambda layout: "matrix" if layout.role == "matrix" else "other",
        resolve_layout(None, params),
    )
