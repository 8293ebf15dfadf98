"""LoRA-Pre Adam: Adam with two moments stored as thin factors (Algorithm 1 of the paper)."""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

import jax
import jax.numpy as jnp
import optax

from layout_optax.fit import check_state_type
from layout_optax.hyperparameters import (
    Number,
    at,
    check_factor_decay,
    check_number,
    check_one_of,
    check_rate,
    in_dtype,
)
from layout_optax.layout import ANY_LEAF, LayoutLike
from layout_optax.leaves import flatten_with_layout
from layout_optax.routing import WholeModel, takes_whole_model
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
from lorapre_optax._routing import Others, route_matrices

BiasCorrection: TypeAlias = Literal["paper", "exact"]
SecondMoment: TypeAlias = Literal["low_rank", "full"]


class LorapreAdamState(NamedTuple):
    """The two moments of LoRA-Pre Adam.

    Attributes:
      mu: first moment; its factors follow G.
      nu: second moment; its factors follow abs(G). Its full moments are Adam's EMA of G^2.
    """

    mu: LowRankState
    nu: LowRankState


def scale_by_lorapre_adam(
    rank: RankLike = 128,
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    *,
    scale: Number = 1.0,
    bias_correction: BiasCorrection = "paper",
    bound: Number | None = None,
    residual: Number | None = None,
    second_moment: SecondMoment = "low_rank",
    gamma1: Number | None = None,
    gamma2: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    product_dtype: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Computes Adam's direction from low-rank moments: Algorithm 1, with the previous factors.

    ::

        m = b1 mB mA + (1-b1) G           v = b2 (vB vA)^2 + (1-b2) G^2
        direction = m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps)

    Then one Newton step moves (mB, mA) towards G at rate 1 - sqrt(b1), and (vB, vA) towards the ABSOLUTE
    gradient at rate 1 - b2^(1/4), since the product is squared and decays by sqrt(b2). Step 1 equals Adam's.

    The defaults are the paper's rule, which has two weaknesses. The direction is not bounded, because v's
    low-rank part can be near zero where m's is not. And v is far too small in the first steps, because its
    factors accumulate 1 - b2^(t/2) while the rule divides by 1-b2^t. ``bound`` and ``bias_correction="exact"``
    correct these. ``residual`` restores the weight of the gradient outside the tracked subspace.

    Args:
      rank: an int, a fraction of the smaller side, a mapping from roles or path patterns, or a function; see
        `lorapre_optax.RankLike`. Vectors, and leaves where factors save no memory, use Adam's moments.
      b1: decay of the first moment, in [0, 1). Every number except the rank may be a schedule.
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator.
      scale: multiplies the direction of leaves with factors (0.25 in the GaLore protocol).
      bias_correction: correction of factored second moments: ``"paper"``, 1-b2^t, or ``"exact"``,
        b2 (1 - b2^((t-1)/2))^2 + 1 - b2.
      bound: largest absolute entry of the direction of leaves with factors, before ``scale``; 1 is Adam's own
        bound. None sets no bound. (To limit the RMS, chain `optax.clip_by_block_rms`.)
      residual: kappa in [0, b1], see `low_rank_ema`; None in the paper.
      second_moment: ``"low_rank"``, or ``"full"`` to compress only the first moment.
      gamma1: rate of the first moment's factors; None uses 1 - sqrt(b1).
      gamma2: rate of the second moment's factors; None uses 1 - b2^(1/4).
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: storage dtype of the state; None for float32 (float64 for float64 parameters).
      full_rank_fallback: whether to keep full moments where r (p + q) >= p q.
      product_dtype: dtype of the gradient and the factors in products with a whole matrix, and of the product
        B A. Sums and the state stay float32. None means bfloat16 for bfloat16 gradients on accelerators,
        otherwise no rounding; ``"float32"`` never rounds; static.
      layout: see `layout_optax.ParamLayout`; None infers it. Unmanaged leaves pass through.

    Returns:
      A transformation with state `LorapreAdamState`. Updates keep their dtype.

    Raises:
      ValueError: for numbers out of range, at construction if they are concrete.

    Example:
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}}
      >>> tx = scale_by_lorapre_adam(rank=4)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params))
      >>> print(updates["mlp"]["kernel"][0, 0].round(3), state.nu.left["mlp"]["kernel"].shape)
      1.0 (4, 40)
    """
    check_factor_decay("b1", b1)
    check_factor_decay("b2", b2)
    for name, value in (("eps", eps), ("bound", bound)):
        check_number(name, value, 0)
    for name, value in (("residual", residual), ("gamma1", gamma1), ("gamma2", gamma2)):
        check_number(name, value, 0, 1)
    check_rate("scale", scale)
    check_one_of("bias_correction", bias_correction, ("paper", "exact"))
    check_one_of("second_moment", second_moment, ("low_rank", "full"))
    options = MomentOptions(
        rank,
        damping,
        damping_kind,
        initial_subspace,
        factor_dtype,
        full_rank_fallback,
        product_dtype,
    )
    second = options if second_moment == "low_rank" else dataclasses.replace(options, rank=None)
    first_init, second_init = init(options, layout), init(second, layout, seed=1)

    def init_fn(params):
        return LorapreAdamState(first_init(params), second_init(params))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state_type("scale_by_lorapre_adam", state, LorapreAdamState)
        leaves = flatten_with_layout(layout, updates)
        before, t = state.mu.count, next_count(state.mu)
        d1, d2 = at(b1, before), at(b2, before)
        rate1 = coupled_gamma(d1) if gamma1 is None else at(gamma1, before)
        rate2 = coupled_gamma(d2**0.5) if gamma2 is None else at(gamma2, before)
        numbers = (
            d1,
            d2,
            rate1,
            rate2,
            *(at(each, before) for each in (residual, bound, eps, scale)),
        )

        def step(path, own, leaf, mu, nu):
            g = in_compute_dtype(leaf)
            d1, d2, rate1, rate2, kappa, limit, offset, factor = in_dtype(g.dtype, *numbers)
            mu_step = mu.step(g, rate1)  # (5), (6)
            if mu.factored and kappa is not None:
                weight = residual_weight(kappa, d1, t, g.dtype)
                m = mu.remembered(g, mu_step, d1, weight) + (1 - d1 + weight) * g
            else:
                m = d1 * mu.past(g) + (1 - d1) * g  # (4)
            past = jnp.square(nu.past(g)) if nu.factored else nu.past(g)
            v = d2 * past + (1 - d2) * jnp.square(g)  # (8)
            nu_step = nu.step(jnp.abs(g), rate2)  # (9), (10)
            exact = nu.factored and bias_correction == "exact"
            m_hat = m / bias_weight(d1, t, g.dtype)  # (11)
            v_hat = v / (_squared_weight if exact else bias_weight)(d2, t, g.dtype)  # (12)
            direction = m_hat / (jnp.sqrt(v_hat) + offset)  # (13)
            if mu.factored:
                direction = direction if limit is None else jnp.clip(direction, -limit, limit)
                direction = direction * factor
            return direction, mu.keep(mu_step, m), nu.keep(nu_step, v)

        stepped = step_leaves(leaves, options, step, (state.mu, jnp.asarray), (state.nu, jnp.abs))
        directions, mu, nu = collect(leaves, t, stepped, state.mu, state.nu)
        return as_updates(leaves, directions), LorapreAdamState(mu, nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@takes_whole_model(weight_decay=0.0)
def lorapre_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    *,
    scale: Number = 1.0,
    bias_correction: BiasCorrection = "paper",
    bound: Number | None = None,
    residual: Number | None = None,
    second_moment: SecondMoment = "low_rank",
    gamma1: Number | None = None,
    gamma2: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    product_dtype: Any = None,
    others: Others = "adamw",
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pre AdamW for a whole model: low-rank moments on matrices, full AdamW on everything else.

    This is the paper's scope. Attention and MLP matrices have low-rank moments. Embeddings, head, norms and
    biases keep plain AdamW, or SAGE by option. The defaults are the paper's rule. Start with ``**RECOMMENDED``
    instead: it was better in training from scratch at every rank that we tried (docs/lorapre.md).

    Args:
      learning_rate: a number or schedule for every role without a learning rate of its own.
      rank: rank of the matrices' factors; see `scale_by_lorapre_adam`.
      b1: decay of the first moment, for the matrices and for AdamW on the rest.
      b2: decay of the second moment, for the matrices and for AdamW on the rest.
      eps: added to the denominator, for the matrices and for AdamW on the rest.
      scale: see `scale_by_lorapre_adam`.
      bias_correction: see `scale_by_lorapre_adam`.
      bound: see `scale_by_lorapre_adam`.
      residual: see `scale_by_lorapre_adam`.
      second_moment: see `scale_by_lorapre_adam`.
      gamma1: see `scale_by_lorapre_adam`.
      gamma2: see `scale_by_lorapre_adam`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`.
      full_rank_fallback: see `low_rank_ema`.
      product_dtype: see `scale_by_lorapre_adam`; static.
      others: ``"adamw"`` or ``"sage"`` for embedding, head and vectors. Leaves excluded by a layout rule use
        AdamW.
      layout: see `layout_optax.ParamLayout`; None infers it.
      **whole_model: see `layout_optax.by_role`.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``.

    Raises:
      ValueError: see `scale_by_lorapre_adam`.

    Example:
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}, "norm": {"scale": jnp.ones(40)}}
      >>> tx = lorapre_adamw(1e-3, rank=4)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> print(updates["mlp"]["kernel"][0, 0].round(6), updates["norm"]["scale"][0].round(6))
      -0.001 -0.001
    """
    direction = scale_by_lorapre_adam(
        rank,
        b1,
        b2,
        eps,
        scale=scale,
        bias_correction=bias_correction,
        bound=bound,
        residual=residual,
        second_moment=second_moment,
        gamma1=gamma1,
        gamma2=gamma2,
        damping=damping,
        damping_kind=damping_kind,
        initial_subspace=initial_subspace,
        factor_dtype=factor_dtype,
        full_rank_fallback=full_rank_fallback,
        product_dtype=product_dtype,
        layout=layout,
    )
    return route_matrices(
        direction,
        full_adam(b1, b2, eps),
        others=others,
        learning_rate=learning_rate,
        layout=layout,
        rank=rank,
        **whole_model,
    )


def full_adam(b1: Number, b2: Number, eps: Number) -> optax.GradientTransformationExtraArgs:
    """Adam's direction with full moments on every leaf, whatever its role.

    Moments are float32 whatever the parameter's dtype, and the state is a `LorapreAdamState`.
    `layout_optax.adam_direction` has the dtypes and the state of optax.
    """
    return scale_by_lorapre_adam(None, b1, b2, eps, layout=ANY_LEAF)


def _squared_weight(decay: Any, count: jax.Array, dtype: Any) -> jax.Array:
    """The ratio of v to the square of a constant gradient at step t: b2 (1 - b2^((t-1)/2))^2 + 1 - b2."""
    past = bias_weight(jnp.asarray(decay, dtype) ** 0.5, count - 1, dtype)
    return decay * jnp.square(past) + 1 - decay
