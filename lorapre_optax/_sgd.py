"""LoRA-Pre SGD: heavy-ball momentum whose history is two thin factors."""

from typing import Any, Literal, Unpack

import optax

from layout_optax.hyperparameters import Number, check_factor_decay
from layout_optax.layout import ANY_LEAF, LayoutLike
from layout_optax.routing import WholeModel, takes_whole_model, times
from lorapre_optax._factors import DampingKind
from lorapre_optax._moment import InitialSubspace
from lorapre_optax._momentum import low_rank_trace
from lorapre_optax._rank import RankLike
from lorapre_optax._routing import route_matrices


@takes_whole_model(weight_decay=0.0)
def lorapre_sgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 128,
    momentum: Number = 0.9,
    *,
    nesterov: bool = False,
    scale: Number = 1.0,
    residual: Number | None = None,
    gamma: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    product_dtype: Any = None,
    others: Literal["sgd", "sage"] = "sgd",
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum for a whole model: low-rank traces of matrices, full traces of everything else.

    ::

        m = mu B A + G          the factors follow G / (1-mu), see `low_rank_trace`
        theta <- theta - rate (scale m + weight_decay theta)

    The paper covers momentum in general and tries Adam and Muon. This is its Algorithm 2 without the
    orthogonalisation. Full moments follow `optax.sgd`, with a float32 accumulator.

    Args:
      learning_rate: a number or schedule for every role without a learning rate of its own.
      rank: rank of the matrices' factors; see `low_rank_ema`.
      momentum: mu in [0, 1), for every leaf. Every number except the rank may be a schedule.
      nesterov: whether to use G + mu m instead of m, as `optax.sgd` does.
      scale: multiplies the direction of matrices.
      residual: kappa in [0, mu], see `low_rank_ema`; None in the paper.
      gamma: see `low_rank_trace`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`; for the matrices.
      full_rank_fallback: see `low_rank_ema`.
      product_dtype: see `scale_by_lorapre_adam`; static.
      others: ``"sgd"`` or ``"sage"`` for embedding, head and vectors. Leaves excluded by a layout rule use SGD.
        SAGE's updates have entries of about 1, so give those roles their own learning rate with ``"sage"``.
      layout: see `layout_optax.ParamLayout`; None infers it.
      **whole_model: see `layout_optax.by_role`.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``. Updates keep
      their dtype.

    Raises:
      ValueError: for numbers out of range, at construction if they are concrete; for unknown options or roles.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}, "norm": {"scale": jnp.ones(40)}}
      >>> tx = lorapre_sgd(0.1, rank=4)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> print(updates["mlp"]["kernel"][0, 0].round(6), updates["norm"]["scale"][0].round(6))
      -0.1 -0.1
    """
    check_factor_decay("momentum", momentum)  # before low_rank_trace, which calls it decay
    trace = low_rank_trace(
        momentum,
        rank,
        nesterov=nesterov,
        gamma=gamma,
        residual=residual,
        damping=damping,
        damping_kind=damping_kind,
        initial_subspace=initial_subspace,
        factor_dtype=factor_dtype,
        full_rank_fallback=full_rank_fallback,
        product_dtype=product_dtype,
        layout=layout,
    )
    return route_matrices(
        times(trace, scale),
        low_rank_trace(momentum, None, nesterov=nesterov, layout=ANY_LEAF),
        others=others,
        learning_rate=learning_rate,
        layout=layout,
        rank=rank,
        family="sgd",
        **whole_model,
    )
