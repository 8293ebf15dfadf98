"""Momentum as two thin factors: the low-rank EMA and trace that every optimizer here is built on.

An EMA ``m <- b m + (1-b) g`` is one gradient step of size 1-b on 1/2 ||m - g||^2, so momentum is a linear model
trained online. LoRA-Pre keeps that model as a product B A and trains each factor by a Newton step towards a
target. What the target is (the gradient, its absolute value, the gradient over 1-mu) and what is read from the
product is all that Adam's two moments, Muon's accumulator and heavy-ball momentum differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from layout_optax.hyperparameters import Number, at, check_factor_decay, check_number
from layout_optax.layout import LayoutLike
from layout_optax.leaves import LayoutLeaves, flatten_with_layout
from lorapre_optax._factors import DampingKind
from lorapre_optax._rank import RankLike
from lorapre_optax._tracking import (
    InitialSubspace,
    LowRankState,
    Tracking,
    advance_states,
    as_updates,
    bias_weight,
    blend,
    coupled_gamma,
    in_compute_dtype,
    initialiser,
    next_state,
)


def low_rank_ema(
    decay: Number,
    rank: RankLike,
    *,
    target: Callable[[jax.Array], jax.Array] | None = None,
    gamma: Number | None = None,
    residual: Number | None = None,
    debias: bool = True,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """An exponential moving average of the updates whose history is kept as two thin factors.

    In place of the updates G it returns (equations 4 to 6 of the paper's Algorithm 1)::

        m  = b B A + (1-b) T              T = target(G), and the PREVIOUS factors
        B' = (1-g) B + g T A^T (A A^T)^-1
        A' = (1-g) A + g (B^T B)^-1 B^T T

    over 1 - b^t with ``debias``. The fresh T enters in full: only the past is compressed. NaN or Inf in an
    update reaches the factors; wrap the chain in `optax.apply_if_finite` where that can happen.

    Args:
      decay: b in [0, 1), or a schedule, as every number here may be.
      rank: an int, a fraction of the smaller side, a mapping from roles or path patterns, or a function;
        see `lorapre_optax.RankLike`. Leaves without factors get `optax.ema`.
      target: element-wise map of the updates (``jnp.abs``, a multiple); None for the identity.
      gamma: g; None couples it to the decay, 1 - g = sqrt(b), since two factors decay together.
      residual: kappa in [0, b], None for the paper's rule. Adds kappa (1 - b^(t-1)) times the part of T
        that the factors cannot hold, T - (P_B T + T P_A) / 2; kappa = b gives it the weight that T
        inside the tracked subspace gathers over time.
      debias: divide by 1 - b^t, as `optax.ema` does.
      damping: of the r x r systems, see ``damping_kind``.
      damping_kind: ``"relative"`` (times trace / r of each system) or ``"absolute"``.
      initial_subspace: ``"normal"`` (paper) or ``"gradient"``: from the first update.
      factor_dtype: storage dtype of the state; None for float32 (float64 for float64 parameters).
      full_rank_fallback: keep a full moment where factors would not be smaller.
      layout: see `layout_optax.ParamLayout`; None infers it.

    Returns:
      A transformation with state `LowRankState`. Updates keep their dtype.

    Raises:
      ValueError: for numbers out of range, at construction where they are concrete.

    Example:
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}}
      >>> tx = low_rank_ema(0.9, rank=4)
      >>> state = tx.init(params)
      >>> state.left["mlp"]["kernel"].shape, state.right["mlp"]["kernel"].shape
      ((4, 40), (4, 24))
      >>> updates, state = jax.jit(tx.update)(params, state)
      >>> round(float(updates["mlp"]["kernel"][0, 0]), 5)  # step 1 is the update itself
      1.0
    """
    check_factor_decay("decay", decay)
    check_number("gamma", gamma, 0, 1)
    check_number("residual", residual, 0, 1)
    tracking = Tracking(
        rank, damping, damping_kind, initial_subspace, factor_dtype, full_rank_fallback
    )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = flatten_with_layout(layout, updates)
        b = at(decay, state.count)
        targets = in_compute_dtype(leaves, target)
        fresh = [None if t is None else (1 - b) * t for t in targets]
        moments, state = follow(leaves, state, tracking, targets, fresh, b, gamma, residual)
        if debias:
            moments = [
                None if m is None else m / bias_weight(b, state.count, m.dtype) for m in moments
            ]
        return as_updates(leaves, moments), state

    return _transformation(tracking, layout, update_fn)


def low_rank_trace(
    decay: Number,
    rank: RankLike,
    *,
    nesterov: bool = False,
    gamma: Number | None = None,
    residual: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """The accumulator ``m = mu m + G`` (heavy ball, Muon) whose history is kept as two thin factors.

    Its fixed point is G / (1-mu), so it is the low-rank EMA of the target T = G / (1-mu) (Algorithm 2)::

        m  = mu B A + G
        B' = d B + (1-d)/(1-mu) G A^T (A A^T)^-1          d = sqrt(mu)
        A' = d A + (1-d)/(1-mu) (B^T B)^-1 B^T G

    Args:
      decay: mu in [0, 1).
      rank: see `low_rank_ema`. Leaves without factors get `optax.trace`.
      nesterov: return G + mu m instead of m.
      gamma: 1 - d; None couples it as above.
      residual: kappa in [0, mu], see `low_rank_ema`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`.
      full_rank_fallback: see `low_rank_ema`.
      layout: see `low_rank_ema`.

    Returns:
      A transformation with state `LowRankState`. Updates keep their dtype.

    Example:
      >>> tx = low_rank_trace(0.95, rank={"matrix": 8, "head": None})
      >>> state = tx.init({"q": {"kernel": jnp.ones((64, 32))}, "norm": {"scale": jnp.ones(32)}})
      >>> state.full["norm"]["scale"].shape, state.right["q"]["kernel"].shape
      ((32,), (8, 64))
    """
    check_factor_decay("decay", decay)
    check_number("gamma", gamma, 0, 1)
    check_number("residual", residual, 0, 1)
    tracking = Tracking(
        rank, damping, damping_kind, initial_subspace, factor_dtype, full_rank_fallback
    )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = flatten_with_layout(layout, updates)
        moments, state = accumulate(
            leaves, state, tracking, decay, nesterov=nesterov, gamma=gamma, residual=residual
        )
        return as_updates(leaves, moments), state

    return _transformation(tracking, layout, update_fn)


def _transformation(tracking: Tracking, layout: LayoutLike, update_fn: Any):
    init = initialiser(tracking, layout)

    def init_fn(params):
        return init(params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def accumulate(
    leaves: LayoutLeaves,
    state: LowRankState,
    tracking: Tracking,
    decay: Number,
    *,
    nesterov: bool,
    gamma: Number | None,
    residual: Number | None,
) -> tuple[list[jax.Array | None], LowRankState]:
    """The trace of the updates in ``leaves``, in float32 or wider, and the next state."""
    mu = at(decay, state.count)
    grads = in_compute_dtype(leaves)
    targets = [None if g is None else g / (1 - mu) for g in grads]
    moments, state = follow(leaves, state, tracking, targets, grads, mu, gamma, residual)
    if nesterov:
        moments = [
            None if m is None or g is None else g + mu * m
            for m, g in zip(moments, grads, strict=True)
        ]
    return moments, state


def follow(
    leaves: LayoutLeaves,
    state: LowRankState,
    tracking: Tracking,
    targets: Sequence[jax.Array | None],
    fresh: Sequence[jax.Array | None],
    decay: jax.Array | float,
    gamma: Number | None,
    residual: Number | None,
) -> tuple[list[jax.Array | None], LowRankState]:
    """``decay * (previous moment) + fresh`` of every leaf, and the next state."""
    count = jnp.asarray(optax.safe_increment(state.count))
    rate = coupled_gamma(decay) if gamma is None else at(gamma, state.count)
    (done,) = advance_states(leaves, [(state, targets, rate)], tracking)
    kappa = at(residual, state.count)
    moments = blend(leaves, state, done, targets, fresh, decay, count, kappa)
    return moments, next_state(leaves, state, count, done, moments)
