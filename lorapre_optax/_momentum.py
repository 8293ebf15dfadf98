"""Momentum as two thin factors: the low-rank EMA and trace that the optimizers here use.

An EMA ``m <- b m + (1-b) g`` is one gradient step of size 1-b on 1/2 ||m - g||^2, so momentum is a linear model
trained online. LoRA-Pre stores that model as a product B A and trains each factor by a Newton step towards a
target. Adam's two moments, Muon's accumulator and heavy-ball momentum differ only in the target (the gradient,
its absolute value, the gradient over 1-mu) and in how they read the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from layout_optax.fit import check_state_type
from layout_optax.hyperparameters import Number, at, check_factor_decay, check_number, in_dtype
from layout_optax.layout import LayoutLike, PyTree
from layout_optax.leaves import LayoutLeaves, flatten_with_layout
from lorapre_optax._factors import DampingKind
from lorapre_optax._moment import (
    InitialSubspace,
    LowRankState,
    MomentOptions,
    as_updates,
    bias_weight,
    collect,
    coupled_gamma,
    in_compute_dtype,
    init,
    next_count,
    residual_weight,
    step_leaves,
)
from lorapre_optax._rank import RankLike


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
    product_dtype: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """An exponential moving average of the updates with a history of two thin factors.

    It replaces the updates G by (equations 4 to 6 of the paper's Algorithm 1)::

        m  = b B A + (1-b) T              T = target(G), and the PREVIOUS factors
        B' = (1-g) B + g T A^T (A A^T)^-1
        A' = (1-g) A + g (B^T B)^-1 B^T T

    divided by 1 - b^t if ``debias``. The current T enters in full; only the past is compressed. A NaN or
    infinite update reaches the factors, so wrap the chain in `optax.apply_if_finite` if that can happen.

    Args:
      decay: b in [0, 1). Every number except the rank may be a schedule.
      rank: an int, a fraction of the smaller side, a mapping from roles or path patterns, or a function; see
        `lorapre_optax.RankLike`. Leaves without factors use `optax.ema`.
      target: element-wise map of the updates (``jnp.abs``, a multiple); None for the identity.
      gamma: g; None uses 1 - g = sqrt(b), since two factors decay together.
      residual: kappa in [0, b], or None for the paper's rule. Adds kappa (1 - b^(t-1)) times the part of T that
        the factors cannot hold, T - (P_B T + T P_A) / 2. With kappa = b this part has the weight that T inside
        the tracked subspace accumulates over time.
      debias: whether to divide by 1 - b^t, as `optax.ema` does.
      damping: damping of the r x r systems, see ``damping_kind``.
      damping_kind: ``"relative"`` (times trace / r of each system) or ``"absolute"``.
      initial_subspace: ``"normal"`` (paper), or ``"gradient"`` to start from the first update's row space.
      factor_dtype: storage dtype of the state; None for float32 (float64 for float64 parameters).
      full_rank_fallback: whether to keep a full moment where factors would not be smaller.
      product_dtype: see `scale_by_lorapre_adam`; static.
      layout: see `layout_optax.ParamLayout`; None infers it.

    Returns:
      A transformation with state `LowRankState`. Updates keep their dtype.

    Raises:
      ValueError: for numbers out of range, at construction if they are concrete.

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
    options = MomentOptions(
        rank,
        damping,
        damping_kind,
        initial_subspace,
        factor_dtype,
        full_rank_fallback,
        product_dtype,
    )

    map_target = jnp.asarray if target is None else target

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state_type("low_rank_ema", state, LowRankState)
        leaves = flatten_with_layout(layout, updates)
        before, t = state.count, next_count(state)
        b = at(decay, before)
        rate = coupled_gamma(b) if gamma is None else at(gamma, before)
        numbers = b, rate, at(residual, before)

        def step(path, own, leaf, history):
            goal = map_target(in_compute_dtype(leaf))
            b, rate, kappa = in_dtype(goal.dtype, *numbers)
            newton = history.step(goal, rate)  # (5), (6)
            if history.factored and kappa is not None:
                weight = residual_weight(kappa, b, t, goal.dtype)
                m = history.remembered(goal, newton, b, weight) + (1 - b + weight) * goal
            else:
                m = b * history.past(goal) + (1 - b) * goal  # (4)
            m_hat = m / bias_weight(b, t, m.dtype) if debias else m  # (11)
            return m_hat, history.keep(newton, m)

        stepped = step_leaves(leaves, options, step, (state, map_target))
        moments, state = collect(leaves, t, stepped, state)
        return as_updates(leaves, moments), state

    return optax.GradientTransformationExtraArgs(init(options, layout), update_fn)


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
    product_dtype: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """The accumulator ``m = mu m + G`` (heavy ball, Muon) with a history of two thin factors.

    Its fixed point is G / (1-mu), so it is the low-rank EMA of the target T = G / (1-mu) (Algorithm 2)::

        m  = mu B A + G
        B' = d B + (1-d)/(1-mu) G A^T (A A^T)^-1          d = sqrt(mu)
        A' = d A + (1-d)/(1-mu) (B^T B)^-1 B^T G

    Args:
      decay: mu in [0, 1).
      rank: see `low_rank_ema`. Leaves without factors use `optax.trace`.
      nesterov: whether to return G + mu m instead of m.
      gamma: 1 - d; None uses the value above.
      residual: kappa in [0, mu], see `low_rank_ema`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`.
      full_rank_fallback: see `low_rank_ema`.
      product_dtype: see `scale_by_lorapre_adam`; static.
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
    options = MomentOptions(
        rank,
        damping,
        damping_kind,
        initial_subspace,
        factor_dtype,
        full_rank_fallback,
        product_dtype,
    )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state_type("low_rank_trace", state, LowRankState)
        leaves = flatten_with_layout(layout, updates)
        moments, state = step_trace(
            leaves, state, options, decay, nesterov=nesterov, gamma=gamma, residual=residual
        )
        return as_updates(leaves, moments), state

    return optax.GradientTransformationExtraArgs(init(options, layout), update_fn)


def step_trace(
    leaves: LayoutLeaves,
    state: LowRankState,
    options: MomentOptions,
    decay: Number,
    *,
    nesterov: bool,
    gamma: Number | None,
    residual: Number | None,
) -> tuple[PyTree, LowRankState]:
    """Returns the trace of every leaf in float32 or wider, see `low_rank_trace`, and the next state."""
    before, t = state.count, next_count(state)
    mu = at(decay, before)
    rate = coupled_gamma(mu) if gamma is None else at(gamma, before)
    numbers = mu, rate, at(residual, before)

    def step(path, own, leaf, history):
        g = in_compute_dtype(leaf)
        mu, rate, kappa = in_dtype(g.dtype, *numbers)
        newton = history.step(g, rate, 1 / (1 - mu))
        if history.factored and kappa is not None:
            weight = residual_weight(kappa, mu, t, g.dtype)
            m = history.remembered(g, newton, mu, weight) + (1 + weight / (1 - mu)) * g
        else:
            m = mu * history.past(g) + g
        return g + mu * m if nesterov else m, history.keep(newton, m)

    stepped = step_leaves(
        leaves, options, step, (state, lambda g: g / (1 - in_dtype(g.dtype, mu)[0]))
    )
    moments, state = collect(leaves, t, stepped, state)
    return moments, state
