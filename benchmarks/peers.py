"""Peers for benchmarks only, as entries of the example's registry."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

import sage_optax
from benchmarks import baselines
from examples.llama.optimizers.options import OptimizerOptions
from examples.llama.optimizers.registry import OptimizerEntry, register_optimizer
from layout_optax import by_role


def factored_tables(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """Optax's factored second moment on embedding and head, SinkGD on matrices, AdamW on vectors, at one rate.

    The embedding's direction is Adafactor's without its step relative to the parameter: the gradient over the
    root of the factored second moment, clipped to rms 1.

    >>> import jax.numpy as jnp
    >>> tx = factored_tables(1e-2, OptimizerOptions())
    >>> state = tx.init({"embed_tokens": {"embedding": jnp.ones((256, 128))}})
    >>> sum(leaf.size for leaf in jax.tree.leaves(state)) < 256 * 128 / 50
    True
    """
    directions = {
        "embedding": optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
        "matrix": optax.chain(
            sage_optax.scale_by_sinkhorn(),
            optax.scale(10.0 if options.scale is None else options.scale),
        ),
        "vector": optax.scale_by_adam(),
    }
    return by_role(
        directions,
        learning_rate,
        weight_decay=options.weight_decay,
        weight_decay_mask=options.decay_mask(),
    )


def apollo(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """APOLLO on matrices, AdamW on the rest."""
    return baselines.apollo(learning_rate, **_low_rank(options))


def apollo_mini(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """APOLLO-Mini, of rank 1, on matrices, AdamW on the rest."""
    return baselines.apollo_mini(learning_rate, **_low_rank(options))


def fira(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """Fira on matrices, AdamW on the rest; `scale` is its alpha (0.25)."""
    given = _low_rank(options)
    if "scale" in given:
        given["alpha"] = given.pop("scale")
    return baselines.fira(learning_rate, **given)


def products(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    """The unavoidable products of LoRA-Pre Adam alone: not an optimizer, but a lower bound to time.

    For every matrix and both moments these are the gradient times one factor, the other factor times the
    gradient, and the product of the factors: 12 r operations per entry at rank r. AdamW on the rest.

    >>> import jax.numpy as jnp
    >>> tx = products(1e-2, OptimizerOptions(rank=2))
    >>> params = {"up": {"kernel": jnp.ones((8, 6))}}
    >>> jax.tree.map(jnp.shape, tx.update(params, tx.init(params), params)[0])
    {'up': {'kernel': (8, 6)}}
    """
    rank = 1 if options.rank is None else options.rank

    def init(params: Any) -> Any:
        def factors(leaf: jax.Array) -> Any:
            *batch, rows, columns = leaf.shape
            pair = jnp.ones((*batch, rows, rank)), jnp.ones((*batch, rank, columns))
            return (pair, pair)

        return jax.tree.map(factors, params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def step(g: jax.Array, pairs: Any) -> Any:
            pairs = [(g @ right.mT, left.mT @ g) for left, right in pairs]
            first, second = (left @ right for left, right in pairs)
            return first / (1 + jnp.abs(second)), tuple(pairs)

        leaves, tree = jax.tree.flatten(updates)
        steps = [step(*both) for both in zip(leaves, tree.flatten_up_to(state), strict=True)]
        return tuple(tree.unflatten(part) for part in zip(*steps, strict=True))

    adam = optax.scale_by_adam()
    directions = {
        "embedding": adam,
        "vector": adam,
        "matrix": optax.GradientTransformation(init, update),
    }
    return by_role(directions, learning_rate, weight_decay=options.weight_decay)


PEERS = {
    "products": OptimizerEntry(
        "LoRA-Pre Adam's products alone",
        products,
        state="two pairs of factors a matrix, two moments for the rest",
        description="No optimizer: the matrix products that LoRA-Pre Adam takes, to time.",
        options=("rank",),
        has_rank=True,
    ),
    "apollo": OptimizerEntry(
        "APOLLO",
        apollo,
        state="two moments of a random projection, 2 max r numbers a matrix; two moments for the rest",
        description="A gradient scaled channel by channel as Adam scales its random projection.",
        options=("b1", "b2", "eps", "scale", "rank", "update_gap"),
        has_rank=True,
    ),
    "apollo_mini": OptimizerEntry(
        "APOLLO-Mini",
        apollo_mini,
        state="two moments of one random projection, 2 max numbers a matrix; two moments for the rest",
        description="APOLLO at rank 1 with one scale a matrix.",
        options=("b1", "b2", "eps", "scale", "update_gap"),
    ),
    "fira": OptimizerEntry(
        "Fira",
        fira,
        state="a projection of the smaller side and two moments on the larger; two moments for the rest",
        description="GaLore with what lies outside the projection, scaled as Adam scales what lies inside.",
        options=("b1", "b2", "eps", "scale", "rank", "update_gap"),
        has_rank=True,
    ),
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


def _low_rank(options: OptimizerOptions) -> dict[str, Any]:
    return {
        **options.only("b1", "b2", "eps", "scale", "rank", "update_gap"),
        "weight_decay": options.weight_decay,
        "weight_decay_mask": options.decay_mask(),
    }
