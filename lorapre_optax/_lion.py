"""LoRA-Pre Lion: the sign of a momentum whose history is two thin factors."""

from typing import Any, Literal, Unpack

import jax.numpy as jnp
import optax

from layout_optax.fit import check_state_type
from layout_optax.hyperparameters import (
    Number,
    at,
    check_factor_decay,
    check_number,
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
    collect,
    coupled_gamma,
    in_compute_dtype,
    init,
    next_count,
    residual_weight,
    step_leaves,
)
from lorapre_optax._rank import RankLike
from lorapre_optax._routing import route_matrices
from sage_optax import scale_by_sage


def scale_by_lorapre_lion(
    rank: RankLike = 128,
    b1: Number = 0.9,
    b2: Number = 0.99,
    *,
    scale: Number = 1.0,
    residual: Number | None = None,
    gamma: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    product_dtype: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Computes Lion's direction from a low-rank momentum: factors decay with b2, the sign mixes with b1.

    ::

        direction = sign(b1 B A + (1-b1) G)             from the PREVIOUS factors
        B' = (1-g) B + g G A^T (A A^T)^-1               g = 1 - sqrt(b2)
        A' = (1-g) A + g (B^T B)^-1 B^T G

    The paper suggests the extension to further optimizers and tries none, so this rule is not in the paper. A
    sign gives every entry the same size and so amplifies the error of a low rank. On embeddings it works badly:
    a sketch with SAGE's sign on the embedding of a small model reached perplexity 43 at rank 16, and 51 with a
    residual, while the full momentum reached 26. `lorapre_lion` therefore keeps embedding and head full.

    Args:
      rank: an int, a fraction of the smaller side, a mapping from roles or path patterns, or a function; see
        `lorapre_optax.RankLike`. Vectors, and leaves where factors save no memory, use `optax.scale_by_lion`.
      b1: weight of the old momentum in the sign, in [0, 1). Every number except the rank may be a schedule.
      b2: decay of the momentum, in [0, 1).
      scale: multiplies the direction of leaves with factors.
      residual: kappa in [0, b1], or None for no residual. The history holds b2's average, of weight
        1 - b2^(t-1) at step t, and enters with b1, so the sign's argument gets
        kappa (1 - b2^(t-1)) (G - (P_B G + G P_A) / 2). With kappa = b1 the gradient outside the tracked
        subspace has the same weight as inside. Step 1 has no such term.
      gamma: g; None uses the value above.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`.
      full_rank_fallback: see `low_rank_ema`.
      product_dtype: see `scale_by_lorapre_adam`; static.
      layout: see `layout_optax.ParamLayout`; None infers it. Unmanaged leaves pass through.

    Returns:
      A transformation with state `LowRankState`. Updates keep their dtype.

    Raises:
      ValueError: for numbers out of range, at construction if they are concrete.

    Example:
      >>> import jax
      >>> params = {"mlp": {"kernel": jnp.full((24, 40), -3.0)}}
      >>> tx = scale_by_lorapre_lion(rank=4)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params))
      >>> print(updates["mlp"]["kernel"][0, 0], state.left["mlp"]["kernel"].shape)
      -1.0 (4, 40)
    """
    check_factor_decay("b1", b1)
    check_factor_decay("b2", b2)
    check_number("residual", residual, 0, 1)
    check_number("gamma", gamma, 0, 1)
    check_rate("scale", scale)
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
        check_state_type("scale_by_lorapre_lion", state, LowRankState)
        leaves = flatten_with_layout(layout, updates)
        before, t = state.count, next_count(state)
        d1, d2 = at(b1, before), at(b2, before)
        rate = coupled_gamma(d2) if gamma is None else at(gamma, before)
        numbers = d1, d2, rate, at(residual, before), at(scale, before)

        def step(path, own, leaf, history):
            g = in_compute_dtype(leaf)
            d1, d2, rate, kappa, factor = in_dtype(g.dtype, *numbers)
            if not history.factored:
                past = history.past(g)
                # Follow optax's order of operations, so that results agree bit for bit.
                direction, moment = jnp.sign((1.0 - d1) * g + d1 * past), (1 - d2) * g + d2 * past
                return direction, history.keep(None, moment)
            newton = history.step(g, rate)
            if kappa is None:
                mix = d1 * history.past(g) + (1 - d1) * g
            else:
                weight = residual_weight(kappa, d2, t, g.dtype)
                mix = history.remembered(g, newton, d1, weight) + (1 - d1 + weight) * g
            return jnp.sign(mix) * factor, history.keep(newton, mix)

        stepped = step_leaves(leaves, options, step, (state, jnp.asarray))
        directions, state = collect(leaves, t, stepped, state)
        return as_updates(leaves, directions), state

    return optax.GradientTransformationExtraArgs(init(options, layout), update_fn)


@takes_whole_model(weight_decay=0.0)
def lorapre_lion(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    b1: Number = 0.9,
    b2: Number = 0.99,
    *,
    scale: Number = 1.0,
    residual: Number | None = None,
    gamma: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    product_dtype: Any = None,
    others: Literal["lion", "sage"] = "lion",
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pre Lion for a whole model: low-rank momentum on matrices, full Lion on everything else.

    Embedding and head keep a full momentum, because signs of a low-rank one do badly there; see
    `scale_by_lorapre_lion`.

    Args:
      learning_rate: a number or schedule for every role without a learning rate of its own.
      rank: rank of the matrices' factors; see `scale_by_lorapre_lion`.
      b1: weight of the old momentum in the sign, for the matrices and for Lion or SAGE on the rest.
      b2: decay of the momentum, for the matrices and for Lion or SAGE on the rest.
      scale: see `scale_by_lorapre_lion`.
      residual: see `scale_by_lorapre_lion`.
      gamma: see `scale_by_lorapre_lion`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`; for the matrices.
      full_rank_fallback: see `low_rank_ema`.
      product_dtype: see `scale_by_lorapre_adam`; static.
      others: ``"lion"`` or ``"sage"`` for embedding, head and vectors. Leaves excluded by a layout rule use
        Lion.
      layout: see `layout_optax.ParamLayout`; None infers it.
      **whole_model: see `layout_optax.by_role`.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``.

    Raises:
      ValueError: see `scale_by_lorapre_lion`; also for unknown options or roles.

    Example:
      >>> import jax
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}, "norm": {"scale": jnp.ones(40)}}
      >>> tx = lorapre_lion(1e-4, rank=4)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> print(updates["mlp"]["kernel"][0, 0].round(6), updates["norm"]["scale"][0].round(6))
      -1e-04 -1e-04
    """
    direction = scale_by_lorapre_lion(
        rank,
        b1,
        b2,
        scale=scale,
        residual=residual,
        gamma=gamma,
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
        scale_by_lorapre_lion(None, b1, b2, layout=ANY_LEAF),
        others=others,
        learning_rate=learning_rate,
        layout=layout,
        rank=rank,
        family="lion",
        sage=scale_by_sage(b1, b2, layout=layout),
        **whole_model,
    )
