"""Parts common to APOLLO and Fira: gradients as matrices, Adam in a low-rank space, the norm-growth limiter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.llama.optimizers.baselines import matrix_or_other
from layout_optax import ParamLayout

GROWTH = 1.01
"""Factor by which the norm of an update may grow in one step."""
NORM_EPS = 1e-8


def to_matrices(x: jax.Array, layout: ParamLayout, path: str) -> jax.Array:
    """A leaf as matrices (batch..., rows, columns), float32 at least.

    Raises:
      ValueError: for rows or columns of more than one axis.
    """
    if len(layout.row_axes) != 1 or len(layout.column_axes) != 1:
        raise ValueError(f"'{path}': one row axis and one column axis are needed, got {layout}.")
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.moveaxis(x, (*layout.row_axes, *layout.column_axes), (-2, -1))


def from_matrices(x: jax.Array, layout: ParamLayout, dtype: Any) -> jax.Array:
    """The leaf of these matrices, in its own dtype."""
    return jnp.moveaxis(x, (-2, -1), (*layout.row_axes, *layout.column_axes)).astype(dtype)


def projects_columns(rows: int, columns: int) -> bool:
    """Whether the columns are projected: the smaller side is, and the columns of a square matrix."""
    return rows >= columns


def projected_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """The shape of the projection of matrices of a shape; the rank is at most the smaller side."""
    *batch, rows, columns = shape
    rank = min(rank, rows, columns)
    return (*batch, rows, rank) if projects_columns(rows, columns) else (*batch, rank, columns)


def adam(
    r: jax.Array, mu: jax.Array, nu: jax.Array, t: jax.Array, b1: float, b2: float, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's direction of ``r`` at step ``t`` (from 1), and its next moments."""
    mu = b1 * mu + (1 - b1) * r
    nu = b2 * nu + (1 - b2) * r * r
    t = t.astype(r.dtype)
    direction = (mu / (1 - b1**t)) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
    return direction, mu, nu


def channel_scale(direction: jax.Array, r: jax.Array) -> jax.Array:
    """``||N|| / (||R|| + 1e-8)`` for each column, or each row where R has more rows than columns."""
    axis = -1 if r.shape[-2] > r.shape[-1] else -2
    top, bottom = (jnp.linalg.norm(x, axis=axis, keepdims=True) for x in (direction, r))
    return top / (bottom + NORM_EPS)


def limit_growth(
    x: jax.Array, previous: jax.Array, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Divides each matrix so that its norm grows by at most one per cent; also returns that norm.

    Args:
      x: (batch..., rows, columns).
      previous: (batch...), the norms of the step before.
      first: whether this is the first step, which limits nothing.
    """
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1)))
    limiter = jnp.maximum(norm / (previous + NORM_EPS), GROWTH) / GROWTH
    limiter = jnp.where(first, 1.0, limiter)
    return x / limiter[..., None, None], norm / limiter


def project(g: jax.Array, matrix: jax.Array) -> jax.Array:
    """R: the smaller side of matrices (batch..., rows, columns) by matrices (batch..., side, rank)."""
    if projects_columns(*g.shape[-2:]):
        return jnp.einsum("...pq,...qr->...pr", g, matrix)
    return jnp.einsum("...pq,...pr->...rq", g, matrix)


def with_adamw(
    matrices: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformation:
    """A direction on matrices, Adam's on all else, then decoupled weight decay and the learning rate."""
    rules = {"matrix": matrices, "other": optax.scale_by_adam(b1=b1, b2=b2, eps=eps)}
    return optax.chain(
        optax.partition({**rules}, matrix_or_other),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(learning_rate),
    )
