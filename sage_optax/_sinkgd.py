"""SinkGD: stateless gradient descent along the Sinkhorn-normalised gradient."""

from __future__ import annotations

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from layout_optax.hyperparameters import (
    check_layout,
    check_mask,
    check_number,
    check_rate,
    float_dtype,
)
from layout_optax.layout import LayoutLike
from layout_optax.leaves import flatten_with_layout
from layout_optax.notes import note
from layout_optax.promotion import in_gradient_dtype, with_standard_promotion
from layout_optax.routing import decayed_weights, scale_by_rate
from sage_optax._sinkhorn import Variant, sinkhorn


def scale_by_sinkhorn(
    iterations: jax.Array | int = 5,
    eps: jax.Array | float = 1e-8,
    *,
    variant: Variant = "unit",
    vectors_dtype: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each gradient by its Sinkhorn iterate, without state.

    The normalisation of SinkGD (Scetbon et al., "Gradient Multi-Normalization for Stateless and
    Scalable LLM Training", arXiv:2502.06742). With :math:`X = G`, repeat ``iterations`` times

    .. math::
      X_{i\cdot} \leftarrow \frac{X_{i\cdot}}{\lVert X_{i\cdot}\rVert_2 + \epsilon} a, \qquad
      X_{\cdot j} \leftarrow \frac{X_{\cdot j}}{\lVert X_{\cdot j}\rVert_2 + \epsilon} b

    for every row :math:`i`, then for every column :math:`j`; columns come last. Rows are the output units of a
    matrix, so for a Flax kernel (in, out) the first norm runs over axis 0. The layout gives rows and columns;
    the other axes are batch axes. Nothing is transposed or reshaped.

    ``variant="unit"`` has :math:`a = b = 1` (the hybrid of SAGE's authors): columns end with norm 1,
    rows near :math:`\sqrt{n_\mathrm{columns}/n_\mathrm{rows}}`. ``variant="sqrt"`` has
    :math:`a = \sqrt{n_\mathrm{columns}}`, :math:`b = \sqrt{n_\mathrm{rows}}` (the SinkGD paper): entries
    end with root mean square 1. As eps vanishes the second is :math:`\sqrt{n_\mathrm{rows}}` times the
    first.

    A vector is a single row whose entries are its columns, so both variants give ``sign(g)`` where ``|g|`` is
    large against ``eps`` times its norm. Rows, columns and gradients of zeros stay zero. A NaN or infinite
    entry makes its whole matrix NaN from the second iteration on; after a single iteration it makes NaN at
    least where the plain loop does. Wrap the optimizer in `optax.apply_if_finite` to skip such steps.

    Norms are computed in float32 (float64 for float64 gradients). They agree with a float64 loop however far
    apart the norms of rows and columns are. A plain float32 loop is wrong above 1e+19, whose square is
    infinite. Subnormal numbers count as zero. Only the direction is written, and no temporary of the gradient's
    size (on a CPU the squares are, in float32).

    Args:
      iterations: number of normalisations of rows and columns, at least 1. It may be an array, since it bounds
        a `jax.lax.fori_loop`; a float is rounded to the nearest integer.
      eps: added to every norm, absolute. It may be an array.
      variant: ``"unit"`` or ``"sqrt"``; static.
      vectors_dtype: a narrower dtype for accelerators, in which all sweeps but the last read a copy of the
        gradient. ``"bfloat16"`` moves 38 bytes per entry of a float32 gradient instead of 48, and changes the
        direction by 3e-5 (normal entries) to 3e-4 (Cauchy). With None, and always on a CPU, all sweeps read the
        gradient; static.
      layout: see `layout_optax.LayoutLike`; static.

    Returns:
      A transformation with state ``optax.EmptyState()``. Updates have the shape and dtype of the gradients.
      Unmanaged leaves pass through.

    Raises:
      ValueError: for an unknown variant, ``iterations`` below 1, a negative or non-finite ``eps`` (traced
        values are not checked), a ``vectors_dtype`` that is not a float dtype, and a leaf that the layout does
        not explain.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = scale_by_sinkhorn()
      >>> g = jnp.array([[3.0, -4.0], [0.0, 2.0]])
      >>> updates, _ = tx.update({"kernel": g}, tx.init({"kernel": g}))
      >>> jnp.round(jnp.linalg.norm(updates["kernel"], axis=1), 3)  # (in, out): axis 0 holds columns
      Array([1., 1.], dtype=float32)
    """
    _check(iterations, eps, variant)
    narrow = float_dtype("scale_by_sinkhorn: vectors_dtype", vectors_dtype)

    def init_fn(params: Any) -> optax.EmptyState:
        check_layout(layout, params)
        leaves = flatten_with_layout(layout, params)
        # Refuse unexplained and untrainable leaves now rather than in a step.
        leaves.check_trainable()
        leaves.map(lambda path, *_: note(path, "sinkgd"))
        return optax.EmptyState()

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        del params, extra_args

        def direction(path, leaf_layout, g):
            g = jnp.asarray(g)
            if not g.size:
                return g
            x = sinkhorn(
                g,
                leaf_layout,
                iterations=iterations,
                eps=eps,
                variant=variant,
                vectors_dtype=narrow,
            )
            return x.astype(g.dtype)

        return flatten_with_layout(layout, updates).map(direction, other="leaf"), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sinkgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    iterations: jax.Array | int = 5,
    eps: jax.Array | float = 1e-8,
    variant: Variant = "sqrt",
    scale: jax.Array | float = 0.05,
    weight_decay: jax.Array | float = 0.0,
    weight_decay_mask: Any = None,
    vectors_dtype: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SinkGD on every parameter, with decoupled weight decay.

    .. math::
      \theta \leftarrow \theta - \eta \, (\alpha X + \lambda \theta)

    where :math:`X` is the direction of `scale_by_sinkhorn`, :math:`\eta` the learning rate, :math:`\alpha`
    ``scale`` and :math:`\lambda` ``weight_decay``. The defaults come from arXiv:2502.06742, for a learning rate
    of 0.02; the hybrid of SAGE's authors uses ``variant="unit"`` and ``scale=10``. Both normalise only matrices
    well; the hybrids use another rule for the other roles.

    Args:
      learning_rate: a float or a schedule.
      iterations: see `scale_by_sinkhorn`.
      eps: see `scale_by_sinkhorn`.
      variant: see `scale_by_sinkhorn`; static.
      scale: multiplies the direction before weight decay is added.
      weight_decay: decay per unit of learning rate.
      weight_decay_mask: a tree of booleans, True where weight decay applies, or a callable from parameters to
        such a tree; static.
      vectors_dtype: see `scale_by_sinkhorn`; static.
      layout: see `layout_optax.LayoutLike`; static.

    Returns:
      A chain of `scale_by_sinkhorn`, `optax.scale`, `optax.add_decayed_weights` and
      `optax.scale_by_learning_rate`. Its ``update`` needs the parameters.

    Raises:
      ValueError: see `scale_by_sinkhorn`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> tx = sinkgd(0.02)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> jnp.round(updates["kernel"][0], 6)
      Array([-0.001, -0.001, -0.001], dtype=float32)
    """
    check_mask(weight_decay_mask)
    check_rate("learning_rate", learning_rate)
    check_rate("scale", scale)
    check_number("weight_decay", weight_decay, 0)
    return in_gradient_dtype(
        optax.chain(
            scale_by_sinkhorn(
                iterations, eps, variant=variant, vectors_dtype=vectors_dtype, layout=layout
            ),
            with_standard_promotion(optax.scale(scale)),  # pyright: ignore[reportArgumentType]
            decayed_weights(weight_decay, weight_decay_mask),
            scale_by_rate(learning_rate),
        )
    )


def _check(iterations: Any, eps: Any, variant: Any) -> None:
    """Refuses invalid settings; traced values pass."""
    if variant not in get_args(Variant):
        raise ValueError(f"scale_by_sinkhorn: variant must be 'unit' or 'sqrt', got {variant!r}.")
    for name, value in (("iterations", iterations), ("eps", eps)):
        if callable(value):
            raise TypeError(f"scale_by_sinkhorn: {name} must be a number, not a schedule.")
        if isinstance(value, (str, bool, list)):
            raise TypeError(f"scale_by_sinkhorn: {name} must be a number, got {value!r}.")
    known = lambda value: not isinstance(value, Tracer)  # noqa: E731
    if known(iterations) and (np.ndim(iterations) or not 1 <= np.rint(iterations) < math.inf):
        raise ValueError(
            f"scale_by_sinkhorn: iterations must be a number of at least 1, got {iterations!r}."
        )
    if known(eps) and not 0 <= float(eps) < math.inf:
        raise ValueError(f"scale_by_sinkhorn: eps must be finite and not negative, got {eps!r}.")
