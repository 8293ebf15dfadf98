"""LoRA-Pre on embedding and head, SinkGD on the matrices, for very little state."""

from typing import Any, Literal, Unpack

import optax

from layout_optax.hyperparameters import Number
from layout_optax.layout import LayoutLike
from layout_optax.routing import OTHER, WholeModel, by_role, takes_whole_model, times
from lorapre_optax._adam import (
    BiasCorrection,
    SecondMoment,
    full_adam,
    scale_by_lorapre_adam,
)
from lorapre_optax._moment import InitialSubspace
from lorapre_optax._rank import RankLike, checking_keys
from sage_optax import scale_by_sinkhorn


@takes_whole_model(weight_decay=0.01)
def lorapre_sinkgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 64,
    b1: Number = 0.9,
    b2: Number = 0.95,
    eps: Number = 1e-8,
    *,
    bias_correction: BiasCorrection = "exact",
    bound: Number | None = 1.0,
    residual: Number | None = 0.9,
    second_moment: SecondMoment = "low_rank",
    damping: Number = 1e-4,
    initial_subspace: InitialSubspace = "gradient",
    factor_dtype: Any = None,
    scale: Any = 10.0,
    iterations: Any = 5,
    variant: Literal["unit", "sqrt"] = "unit",
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-Pre Adam on embedding and head, SinkGD on matrices, full AdamW on vectors.

    This composite combines the methods of two papers; neither describes it. Per parameter :math:`\theta` of
    role :math:`k`

    .. math::
      \theta \leftarrow \theta - \eta_k (u + \lambda \theta), \qquad
      u = \mathrm{LoRA\text{-}Pre}(g), \;
      \mathrm{scale} \cdot \mathrm{Sinkhorn}(g) \text{ or } \mathrm{Adam}(g)

    The state holds four factors of r numbers per row or column of embedding and head, two moments per vector,
    and nothing for matrices. In the 1.3B Llama of the SAGE paper at rank 64 it takes 67.5 MB in float32, where
    AdamW's takes 10.6 GB.

    There is no paper to follow, so its defaults are the options of `lorapre_optax.RECOMMENDED`. For the paper's
    rule on embedding and head give
    ``bias_correction="paper", bound=None, residual=None, initial_subspace="normal"``.

    It is a call of `layout_optax.by_role`. For another rule on the head or the vectors, or another option of
    `scale_by_lorapre_adam` or `sage_optax.scale_by_sinkhorn`, write that call; the second example does.

    Args:
      learning_rate: a number or schedule for every role without a learning rate of its own.
      rank: rank of the factors of embedding and head; see `lorapre_optax.RankLike`.
      b1: decay of the first moment, for LoRA-Pre and for AdamW. Every number except the rank may be a schedule.
      b2: decay of the second moment, for LoRA-Pre and for AdamW.
      eps: added to the denominator, for LoRA-Pre and for AdamW.
      bias_correction: see `scale_by_lorapre_adam`.
      bound: see `scale_by_lorapre_adam`.
      residual: see `scale_by_lorapre_adam`; the recommended value is for ``b1=0.9``.
      second_moment: see `scale_by_lorapre_adam`.
      damping: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`; for embedding and head.
      scale: multiplies the direction of matrices before weight decay is added.
      iterations: see `sage_optax.scale_by_sinkhorn`.
      variant: see `sage_optax.scale_by_sinkhorn`.
      layout: see `layout_optax.ParamLayout`; None infers it.
      **whole_model: see `layout_optax.by_role`.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``.

    Raises:
      ValueError: see `scale_by_lorapre_adam` and `sage_optax.scale_by_sinkhorn`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"embed": jnp.ones((64, 32)), "up": {"kernel": jnp.ones((32, 48))}}
      >>> tx = lorapre_sinkgd(1e-3, rank=4, weight_decay=0.0)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> print(updates["embed"][0, 0].round(6), updates["up"]["kernel"][0, 0].round(6))
      -0.001 -0.001443
      >>> sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)  # nothing for the kernel
      [(4, 32), (4, 32), (4, 64), (4, 64)]

      >>> from layout_optax import by_role  # an untied head as a matrix, vectors by SAGE
      >>> from lorapre_optax import RECOMMENDED
      >>> from sage_optax import scale_by_sage
      >>> matrix = optax.chain(scale_by_sinkhorn(), optax.scale(10.0))
      >>> tables = scale_by_lorapre_adam(4, damping_kind="absolute", **RECOMMENDED)
      >>> rules = {"embedding": tables, "head": matrix, "matrix": matrix, "vector": scale_by_sage()}
      >>> state = by_role(rules, 1e-3, weight_decay=0.01).init(params)
    """
    table = scale_by_lorapre_adam(
        rank,
        b1,
        b2,
        eps,
        bias_correction=bias_correction,
        bound=bound,
        residual=residual,
        second_moment=second_moment,
        damping=damping,
        initial_subspace=initial_subspace,
        factor_dtype=factor_dtype,
        layout=layout,
    )
    adam = full_adam(b1, b2, eps)
    matrix = times(scale_by_sinkhorn(iterations, variant=variant, layout=layout), scale)
    directions = {
        "embedding": table,
        "head": table,
        "vector": adam,
        "matrix": matrix,
        OTHER: adam,
    }
    tx = by_role(directions, learning_rate, layout=layout, **whole_model)
    return checking_keys(tx, rank, layout, ("embedding", "head"))
