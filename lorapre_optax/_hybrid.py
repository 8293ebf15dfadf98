"""LoRA-Pre on the tables, SinkGD on the matrices: hardly any state at all."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import optax

from layout_optax.roles import LayoutLike
from lorapre_optax._adam import (
    BiasCorrection,
    SecondMoment,
    full_adam,
    scale_by_lorapre_adam,
)
from lorapre_optax._factors import DampingKind
from lorapre_optax._moment import InitialSubspace
from lorapre_optax._numbers import Number, check_number
from lorapre_optax._rank import RankLike
from lorapre_optax._recommended import RECOMMENDED
from sage_optax._hybrid import HeadRule
from sage_optax._routing import OTHER, choose, route, sinkgd_direction
from sage_optax._sage import scale_by_sage
from sage_optax._sinkhorn import Variant

# The options of `scale_by_lorapre_adam`, with the recommended ones in place of the paper's.
_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(scale_by_lorapre_adam).parameters.items()
} | dict(RECOMMENDED)


def lorapre_sinkgd(
    learning_rate: optax.ScalarOrSchedule,
    rank: RankLike = 64,
    b1: Number = _DEFAULTS["b1"],
    b2: Number = _DEFAULTS["b2"],
    eps: Number = _DEFAULTS["eps"],
    *,
    table_scale: Number = _DEFAULTS["scale"],
    bias_correction: BiasCorrection = _DEFAULTS["bias_correction"],
    bound: Number | None = _DEFAULTS["bound"],
    residual: Number | None = _DEFAULTS["residual"],
    second_moment: SecondMoment = _DEFAULTS["second_moment"],
    gamma1: Number | None = _DEFAULTS["gamma1"],
    gamma2: Number | None = _DEFAULTS["gamma2"],
    damping: Number = _DEFAULTS["damping"],
    damping_kind: DampingKind = _DEFAULTS["damping_kind"],
    initial_subspace: InitialSubspace = _DEFAULTS["initial_subspace"],
    factor_dtype: Any = _DEFAULTS["factor_dtype"],
    full_rank_fallback: bool = _DEFAULTS["full_rank_fallback"],
    scale: Any = 10.0,
    iterations: Any = 5,
    sinkhorn_eps: Any = 1e-8,
    variant: Variant = "unit",
    vector_rule: Literal["adamw", "sage"] = "adamw",
    head_rule: HeadRule = "table",
    embedding_learning_rate: optax.ScalarOrSchedule | None = None,
    head_learning_rate: optax.ScalarOrSchedule | None = None,
    vector_learning_rate: optax.ScalarOrSchedule | None = None,
    matrix_learning_rate: optax.ScalarOrSchedule | None = None,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    learning_rate_multipliers: Mapping[str, float] | None = None,
    weight_decay: Number = 0.01,
    weight_decay_mask: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LoRA-Pre Adam on embedding and head, SinkGD on matrices, full AdamW on vectors.

    A composite of two papers' methods that neither describes. Per parameter :math:`\theta` of role :math:`k`

    .. math::
      \theta \leftarrow \theta - \eta_k (u + \lambda \theta), \qquad
      u = \mathrm{table\_scale} \cdot \mathrm{LoRA\text{-}Pre}(g), \;
      \mathrm{scale} \cdot \mathrm{Sinkhorn}(g) \text{ or } \mathrm{Adam}(g)

    State: four factors of r numbers a row or column of each table, two moments a vector, nothing for
    matrices. In the 1.3B Llama of the SAGE paper at rank 64 that is 67.5 MB in float32 where AdamW keeps
    10.6 GB.

    Having no paper to follow, its defaults are the options of `lorapre_optax.RECOMMENDED`. For the paper's rule
    on the tables give ``bias_correction="paper", bound=None, residual=None, initial_subspace="normal"``.

    Args:
      learning_rate: a number or schedule for every role that has no rate of its own.
      rank: see `lorapre_optax.RankLike`, applied to embedding and head.
      b1: of the tables and of AdamW on the rest. Every number here may be a schedule.
      b2: of the tables and of AdamW on the rest.
      eps: of the tables and of AdamW on the rest.
      table_scale: multiplies the direction of tables with factors: ``scale`` of `scale_by_lorapre_adam`.
      bias_correction: see `scale_by_lorapre_adam`.
      bound: see `scale_by_lorapre_adam`.
      residual: see `scale_by_lorapre_adam`; the recommended value goes with ``b1=0.9``.
      second_moment: see `scale_by_lorapre_adam`.
      gamma1: see `scale_by_lorapre_adam`.
      gamma2: see `scale_by_lorapre_adam`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`; of the tables.
      full_rank_fallback: see `low_rank_ema`.
      scale: multiplies the matrices' direction before weight decay is added.
      iterations: see `sage_optax.scale_by_sinkhorn`.
      sinkhorn_eps: eps of `sage_optax.scale_by_sinkhorn`.
      variant: see `sage_optax.scale_by_sinkhorn`.
      vector_rule: ``"adamw"`` or ``"sage"``.
      head_rule: ``"table"`` (LoRA-Pre), ``"matrix"`` (SinkGD) or ``"adamw"`` with full moments.
      embedding_learning_rate: rate of the embedding's direction and decay; None for ``learning_rate``.
      head_learning_rate: the same for the head.
      vector_learning_rate: the same for vectors.
      matrix_learning_rate: the same for matrices.
      other_learning_rate: the same for leaves that are not ours, which get AdamW with full moments.
      learning_rate_multipliers: factors on ``learning_rate`` by role (``"other"`` among them).
      weight_decay: decoupled, times the role's rate; the default is `sage_optax.sinkgd_hybrid`'s.
      weight_decay_mask: a tree of booleans over all parameters, or a callable to one; None decays all.
      layout: see `layout_optax.ParamLayout`; None infers it.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``.

    Raises:
      ValueError: see `scale_by_lorapre_adam` and `sage_optax.sinkgd_hybrid`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"embed": jnp.ones((64, 32)), "up": {"kernel": jnp.ones((32, 48))}}
      >>> tx = lorapre_sinkgd(1e-3, rank=4, weight_decay=0.0)
      >>> updates, state = jax.jit(tx.update)(params, tx.init(params), params)
      >>> print(updates["embed"][0, 0].round(6), updates["up"]["kernel"][0, 0].round(6))
      -0.001 -0.001443
      >>> sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)  # nothing for the kernel
      [(4, 32), (4, 32), (4, 64), (4, 64)]
    """
    check_number("weight_decay", weight_decay, 0)
    table = scale_by_lorapre_adam(
        rank,
        b1,
        b2,
        eps,
        scale=table_scale,
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
        layout=layout,
    )
    adam = full_adam(b1, b2, eps)
    vectors = {"adamw": adam, "sage": scale_by_sage(layout=layout)}
    return route(
        table=table,
        vector=choose("vector_rule", vector_rule, vectors),
        matrix=sinkgd_direction(scale, iterations, sinkhorn_eps, variant, layout),
        other=adam,
        head_rule=head_rule,
        learning_rate=learning_rate,
        rates={
            "embedding": embedding_learning_rate,
            "head": head_learning_rate,
            "vector": vector_learning_rate,
            "matrix": matrix_learning_rate,
            OTHER: other_learning_rate,
        },
        multipliers=learning_rate_multipliers,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        layout=layout,
    )
