"""Peers that only benchmarks know, as entries of the example's registry."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import optax

import sage_optax
from examples.llama.optimizer_options import OptimizerOptions
from examples.llama.optimizers import OptimizerEntry, register_optimizer
from layout_optax import resolve_layout


def factored_tables(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """Optax's factored second moment on tables, SinkGD on matrices, AdamW on vectors, at one rate.

    The table's direction is Adafactor's without its step relative to the parameter: the gradient over the
    root of the factored second moment, clipped to rms 1.

    >>> import jax.numpy as jnp
    >>> tx = factored_tables(1e-2, OptimizerOptions())
    >>> state = tx.init({"embed_tokens": {"embedding": jnp.ones((256, 128))}})
    >>> sum(leaf.size for leaf in jax.tree.leaves(state)) < 256 * 128 / 50
    True
    """
    rules: dict[Hashable, optax.GradientTransformation] = {
        "table": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "matrix": optax.chain(
            sage_optax.scale_by_sinkhorn(),
            optax.scale(10.0 if options.scale is None else options.scale),
        ),
        "vector": optax.scale_by_adam(),
    }
    return optax.chain(
        optax.partition(rules, _table_matrix_or_vector),
        optax.add_decayed_weights(options.weight_decay, options.decay_mask()),
        optax.scale_by_learning_rate(learning_rate),
    )


PEERS = {
    "factored_tables": OptimizerEntry(
        "Factored tables",
        factored_tables,
        state="row and column sums of squares of tables, two moments of vectors, nothing for matrices",
        description="optax's factored RMS on tables, SinkGD on matrices, AdamW on vectors.",
        options=("scale",),
    ),
}
"""The peers by name."""


def register_peers() -> None:
    """Adds the peers to the example's registry; calling it again does nothing."""
    for name, entry in PEERS.items():
        register_optimizer(name, entry)


def _table_matrix_or_vector(params: Any) -> Any:
    names = {"embedding": "table", "head": "table"}
    return jax.tree.map(
        lambda layout: names.get(layout.role, layout.role), resolve_layout(None, params)
    )
