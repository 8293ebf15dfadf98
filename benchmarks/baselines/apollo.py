"""APOLLO and APOLLO-Mini (arXiv:2412.05270): the gradient, scaled by Adam in a random low-rank space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines.common import (
    NORM_EPS,
    adam,
    channel_scale,
    from_matrices,
    limit_growth,
    project,
    projected_shape,
    to_matrices,
    with_adamw,
)
from layout_optax.keys import fold, leaf_seeds
from layout_optax.layout import ParamLayout
from layout_optax.leaves import flatten_with_layout


class ScaleByApolloState(NamedTuple):
    """State of `scale_by_apollo`: step count, moments of the projected gradient, norm of the last update."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    nu: Any
    norm: Any


def scale_by_apollo(
    rank: int,
    *,
    scale: float = 1.0,
    tensorwise: bool = False,
    update_gap: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    seed: int = 0,
    layout: Any = None,
) -> optax.GradientTransformation:
    """APOLLO's direction of matrices, each matrix of a stack separately.

    R projects G's smaller side by a random matrix with entries N(0, 1/rank), drawn anew every
    ``update_gap`` steps. With N Adam's direction of R::

        s = ||N|| / (||R|| + 1e-8)       for each channel of the larger side, or for the matrix (tensorwise)
        direction = G s sqrt(scale), its norm growing by at most 1 % a step

    Args:
      rank: rank r of the projection, at most the smaller side.
      scale: see above; 1 for APOLLO, 128 for APOLLO-Mini.
      tensorwise: whether to use one scale per matrix, as APOLLO-Mini.
      update_gap: steps between two projections.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to Adam's denominator.
      seed: the seed of the projections.
      layout: see `layout_optax.LayoutLike`.

    Example:
      >>> tx = scale_by_apollo(2)
      >>> params = {"up": {"kernel": jnp.ones((8, 12))}}
      >>> tx.init(params).mu["up"]["kernel"].shape  # 12 rows are outputs, and the larger side
      (12, 2)
    """
    if rank < 1 or update_gap < 1:
        raise ValueError(f"rank and update_gap must be at least 1, got {rank}, {update_gap}")

    def init(params: Any) -> ScaleByApolloState:
        leaves = flatten_with_layout(layout, params)

        def moment(path: str, layout: Any, leaf: Any) -> jax.Array:
            g = to_matrices(jnp.zeros(leaf.shape, leaf.dtype), layout, path)
            return jnp.zeros(projected_shape(g.shape, rank), g.dtype)

        mu = leaves.map(moment)
        norm = jax.tree.map(lambda x: jnp.zeros(x.shape[:-2], x.dtype), mu)
        return ScaleByApolloState(jnp.zeros((), jnp.int32), mu, leaves.map(moment), norm)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        leaves = flatten_with_layout(layout, updates)
        count = jnp.asarray(optax.safe_increment(state.count))

        def one(path: str, layout: Any, leaf: Any, mu: Any, nu: Any, norm: Any) -> _Leaf:
            g = to_matrices(leaf, layout, path)
            matrix = projection(path, leaf.shape, layout, rank, state.count // update_gap, seed)
            r = project(g, matrix.astype(g.dtype))
            direction, mu, nu = adam(r, mu, nu, count, b1, b2, eps)
            if tensorwise:
                top, bottom = (
                    jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)) for x in (direction, r)
                )
                s = top / (bottom + NORM_EPS)
            else:
                s = channel_scale(direction, r)
            found, norm = limit_growth(g * s * scale**0.5, norm, state.count == 0)
            return _Leaf(from_matrices(found, layout, leaf.dtype), mu, nu, norm)

        found = leaves.map(one, state.mu, state.nu, state.norm, other="leaf")
        split = [
            jax.tree.map(
                lambda x, i=i: x[i] if isinstance(x, _Leaf) else x,
                found,
                is_leaf=lambda x: isinstance(x, _Leaf),
            )
            for i in range(4)
        ]
        return split[0], ScaleByApolloState(count, *split[1:])

    return optax.GradientTransformationExtraArgs(init, update)


class _Leaf(NamedTuple):
    update: jax.Array
    mu: jax.Array
    nu: jax.Array
    norm: jax.Array


def projection(
    path: str,
    shape: Sequence[int],
    layout: ParamLayout,
    rank: int,
    period: jax.Array | int,
    seed: int = 0,
) -> jax.Array:
    """The random matrices (batch..., side, rank) of a leaf in a period, entries N(0, 1/rank), float32."""
    side = min(shape[axis] for axis in (*layout.row_axes, *layout.column_axes))
    rank = min(rank, side)
    seeds = fold(leaf_seeds(path, shape, layout, seed), period)

    def draw(seed: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (side, rank), jnp.float32)

    found = jax.vmap(draw)(seeds.reshape(-1)) / rank**0.5
    return found.reshape(*seeds.shape, side, rank)


def apollo(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    scale: float = 1.0,
    tensorwise: bool = False,
    update_gap: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    """APOLLO on matrices, AdamW on everything else, at one learning rate; see `scale_by_apollo`.

    Example:
      >>> tx = apollo(1e-2, rank=4)
    """
    matrices = scale_by_apollo(
        rank,
        scale=scale,
        tensorwise=tensorwise,
        update_gap=update_gap,
        b1=b1,
        b2=b2,
        eps=eps,
        seed=seed,
    )
    return with_adamw(
        matrices,
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
    )


def apollo_mini(
    learning_rate: optax.ScalarOrSchedule, rank: int = 1, *, scale: float = 128.0, **options: Any
) -> optax.GradientTransformation:
    """APOLLO-Mini on matrices: rank 1, one scale per matrix, ``scale`` 128; see `apollo`.

    Example:
      >>> state = apollo_mini(1e-2).init({"up": {"kernel": jnp.ones((8, 12))}})
    """
    return apollo(learning_rate, rank, scale=scale, tensorwise=True, **options)
