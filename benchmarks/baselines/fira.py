"""Fira (Chen et al., arXiv:2410.01623): GaLore's low-rank Adam, and the residual at its scale."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.baselines.common import (
    adam,
    channel_scale,
    from_matrices,
    limit_growth,
    project,
    projected_shape,
    projects_columns,
    to_matrices,
    with_adamw,
)
from layout_optax.leaves import flatten_with_layout


class ScaleByFiraState(NamedTuple):
    """State of `scale_by_fira`: step count, projector, two moments, norm of the last scaled residual."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    projector: Any
    mu: Any
    nu: Any
    norm: Any


def scale_by_fira(
    rank: int,
    *,
    alpha: float = 0.25,
    update_gap: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    layout: Any = None,
) -> optax.GradientTransformation:
    """Fira's direction of matrices, each matrix of a stack separately.

    With P the leading singular vectors of G's smaller side, computed every ``update_gap`` steps,
    R = P' G and N Adam's direction of R::

        S = phi (G - P P' G),  phi = ||N|| / (||R|| + 1e-8) for each column (row, if R has more rows)
        S's norm grows by at most 1 % a step;  direction = alpha P N + S

    Args:
      rank: rank of the projection, at most the smaller side.
      alpha: factor on the low-rank part.
      update_gap: steps between two projections.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to Adam's denominator.
      layout: see `layout_optax.LayoutLike`.

    Example:
      >>> tx = scale_by_fira(2)
      >>> state = tx.init({"up": {"kernel": jnp.ones((8, 12))}})
      >>> state.projector["up"]["kernel"].shape, state.mu["up"]["kernel"].shape
      ((8, 2), (12, 2))
    """
    if rank < 1 or update_gap < 1:
        raise ValueError(f"rank and update_gap must be at least 1, got {rank}, {update_gap}")

    def init(params: Any) -> ScaleByFiraState:
        leaves = flatten_with_layout(layout, params)

        def zeros(path: str, layout: Any, leaf: Any) -> _Leaf:
            g = to_matrices(jnp.zeros(leaf.shape, leaf.dtype), layout, path)
            *batch, rows, columns = g.shape
            moment = jnp.zeros(projected_shape(g.shape, rank), g.dtype)
            side = min(rows, columns)
            projector = jnp.zeros((*batch, side, min(rank, side)), g.dtype)
            return _Leaf(leaf, projector, moment, jnp.zeros_like(moment), jnp.zeros(batch, g.dtype))

        found = leaves.map(zeros)
        return ScaleByFiraState(jnp.zeros((), jnp.int32), *_split(found)[1:])

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args
        leaves = flatten_with_layout(layout, updates)
        count = jnp.asarray(optax.safe_increment(state.count))

        def one(path: str, layout: Any, leaf: Any, p: Any, mu: Any, nu: Any, norm: Any) -> _Leaf:
            g = to_matrices(leaf, layout, path)
            anew = state.count % update_gap == 0
            p = jax.lax.cond(anew, lambda: _singular_vectors(g, p.shape[-1]), lambda: p)
            r = project(g, p)
            direction, mu, nu = adam(r, mu, nu, count, b1, b2, eps)
            residual = channel_scale(direction, r) * (g - _up(r, p, g.shape))
            residual, norm = limit_growth(residual, norm, state.count == 0)
            found = alpha * _up(direction, p, g.shape) + residual
            return _Leaf(from_matrices(found, layout, leaf.dtype), p, mu, nu, norm)

        found = leaves.map(one, state.projector, state.mu, state.nu, state.norm, other="leaf")
        new_updates, *new_state = _split(found)
        return new_updates, ScaleByFiraState(count, *new_state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Leaf(NamedTuple):
    update: Any
    projector: jax.Array
    mu: jax.Array
    nu: jax.Array
    norm: jax.Array


def _split(found: Any) -> list[Any]:
    """A tree of `_Leaf` as one tree per field."""
    return [
        jax.tree.map(
            lambda x, i=i: x[i] if isinstance(x, _Leaf) else x,
            found,
            is_leaf=lambda x: isinstance(x, _Leaf),
        )
        for i in range(5)
    ]


def _singular_vectors(g: jax.Array, rank: int) -> jax.Array:
    """The leading singular vectors (batch..., side, rank) of the smaller side, one matrix after the other."""
    *batch, rows, columns = g.shape
    tall = jnp.swapaxes(g, -2, -1) if projects_columns(rows, columns) else g

    def vectors(x: jax.Array) -> jax.Array:
        return jnp.linalg.svd(x, full_matrices=False)[0][:, :rank]

    found = jax.lax.map(vectors, tall.reshape(-1, *tall.shape[-2:]))
    return found.reshape(*batch, *found.shape[-2:])


def _up(r: jax.Array, p: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Maps from the low-rank space back to matrices of a shape."""
    if projects_columns(*shape[-2:]):
        return jnp.einsum("...pr,...qr->...pq", r, p)
    return jnp.einsum("...rq,...pr->...pq", r, p)


def fira(
    learning_rate: optax.ScalarOrSchedule,
    rank: int,
    *,
    alpha: float = 0.25,
    update_gap: int = 200,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformation:
    """Fira on matrices, AdamW on everything else, at one learning rate; see `scale_by_fira`.

    Example:
      >>> state = fira(1e-2, rank=4).init({"up": {"kernel": jnp.ones((8, 12))}})
    """
    return with_adamw(
        scale_by_fira(rank, alpha=alpha, update_gap=update_gap, b1=b1, b2=b2, eps=eps),
        learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
    )
