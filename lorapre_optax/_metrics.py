"""Metrics of how much of a run's gradients the factors hold, computed on request."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from layout_optax.axes import compute_dtype, sharding_without
from layout_optax.layout import LayoutLike, ParamLayout, PyTree
from lorapre_optax import _factors
from lorapre_optax._factors import Prepared, core_axes, einsum_axes
from lorapre_optax._solves import damped_inverse_roots
from lorapre_optax._states import Moment, first_moments, moments, owner_of, owners
from lorapre_optax._subspace import columns_from, normalised, rows_from


def lorapre_metrics(
    state: PyTree,
    gradients: PyTree,
    updates: PyTree | None = None,
    *,
    damping: float = 1e-4,
    layout: LayoutLike = None,
) -> dict[str, dict[str, jax.Array]]:
    """Measures the share of a gradient that the factors can absorb, per matrix; pure, for use under `jax.jit`.

    ::

        energy_share = (||P_B G||^2 + ||G P_A||^2) / (2 ||G||^2)

    The projections P_B and P_A act on the spans of the OLD factors. The share is the weight with which the
    Newton step of `low_rank_ema` absorbs G (the product gains g(1-g) (P_B G + G P_A)). Near 1 the rank is large
    enough. Near r/p or r/q the factors hold no more of G than of noise. The rest enters the direction once and
    is then forgotten, unless there is a ``residual``.

    Args:
      state: the state of any optax chain BEFORE the update. The function reads its low-rank first moments, and
        only the first if a parameter has several.
      gradients: the input of the update, a tree like the parameters.
      updates: the output of the update; adds its size to the metrics.
      damping: relative damping of the optimizer, which the projections share.
      layout: the ``layout`` of the optimizer; None infers it.

    Returns:
      For every parameter whose first moment has factors, by path, arrays in float32 or wider with the shape of
      its batch axes, one number per matrix: ``energy_share`` in [0, 1] (0 for a zero gradient); with
      ``updates`` also ``update_rms`` and ``update_max``, the largest magnitude. Empty if no moment has factors.

    Raises:
      ValueError: if a gradient or an update is missing or does not fit its factors; it names the path.

    Example:
      >>> from lorapre_optax import low_rank_ema
      >>> grads = {"mlp": {"kernel": jnp.ones((24, 40))}}
      >>> tx = low_rank_ema(0.9, rank=4)
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> share = lorapre_metrics(state, grads)["mlp/kernel"]["energy_share"]
      >>> bool(share > 0.5)  # the left factor spans G's columns after one step
      True
    """
    gradient_of = owners(gradients, layout)
    found: dict[str, tuple[Moment, ParamLayout, jax.Array]] = {}
    for low_rank in first_moments(state):
        for moment in moments(low_rank):
            if moment.factored and moment.path not in found:
                own, gradient = owner_of(moment, gradient_of, "gradients")
                found[moment.path] = moment, own, _unit(gradient, own)
    prepared = [_prepare(*row) for row in found.values()]
    grams = [gram for each in prepared for gram in (each.left_gram, each.right_gram)]
    roots = damped_inverse_roots(grams, damping)
    metrics = {}
    for (path, (_, own, gradient)), each, left_root, right_root in zip(
        found.items(), prepared, roots[::2], roots[1::2], strict=True
    ):
        share = _energy_share(gradient, each, left_root, right_root, own)
        metrics[path] = {"energy_share": share}
    if updates is not None:
        update_of = owners(updates, layout)
        for path, (moment, _, _) in found.items():
            own, update = owner_of(moment, update_of, "updates")
            metrics[path] |= _size(update, own)
    return metrics


def _unit(gradient: Any, layout: ParamLayout) -> jax.Array:
    """A gradient in float32 or wider with largest entry one per batch index, so that squares stay in range."""
    return normalised(jnp.asarray(gradient).astype(compute_dtype(gradient.dtype)), layout)


def _prepare(moment: Moment, layout: ParamLayout, gradient: jax.Array) -> Prepared:
    left, right = (factor.astype(gradient.dtype) for factor in (moment.left, moment.right))
    return _factors.prepare(left, right, layout, gradient.ndim, "relative")


def _energy_share(
    gradient: jax.Array,
    prepared: Prepared,
    left_root: jax.Array,
    right_root: jax.Array,
    layout: ParamLayout,
) -> jax.Array:
    """See `lorapre_metrics`; the roots are L^-1 of the damped Gram matrices L L^T."""
    names = einsum_axes(layout, gradient.ndim)

    def inside(root, numerator, side):
        # ||L^-1 B^T G||^2 is <G, P_B G>: thin, and never negative.
        whitened = jnp.einsum(
            f"{names.batch}zZ,{side.replace('z', 'Z')}->{side}",
            root,
            numerator,
            precision="highest",
            out_sharding=sharding_without(numerator, ()),
        )
        return jnp.sum(jnp.square(whitened), axis=core_axes(side, names.batch))

    rows = rows_from(gradient, prepared.left_unit, layout)
    columns = columns_from(gradient, prepared.right_unit, layout)
    held = inside(left_root, rows, names.right)
    held = held + inside(right_root, columns, names.left)
    energy = jnp.sum(jnp.square(gradient), axis=layout.row_axes + layout.column_axes)
    return jnp.minimum(held / (2 * jnp.where(energy > 0, energy, 1)), 1)


def _size(update: Any, layout: ParamLayout) -> dict[str, jax.Array]:
    """RMS and largest magnitude of each matrix of an update."""
    axes = layout.row_axes + layout.column_axes
    magnitude = jnp.abs(jnp.asarray(update).astype(compute_dtype(update.dtype)))
    largest = jnp.max(magnitude, axis=axes)
    mean_square = jnp.mean(jnp.square(normalised(magnitude, layout)), axis=axes)
    return {"update_rms": largest * jnp.sqrt(mean_square), "update_max": largest}
