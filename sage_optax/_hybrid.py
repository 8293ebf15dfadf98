"""The hybrids: SAGE-Hybrid, which is the paper's method, and its two controls."""

from typing import Any, Literal, TypeAlias, Unpack

import jax.numpy as jnp
import optax

from layout_optax.hyperparameters import check_adam, choose
from layout_optax.layout import LayoutLike
from layout_optax.routing import OTHER, WholeModel, adam_direction, by_role, takes_whole_model
from sage_optax._damper import Damper, EpsMode
from sage_optax._factored_rms import scale_by_factored_rms
from sage_optax._options import momentum_dtype
from sage_optax._routing import sinkgd_direction
from sage_optax._sage import scale_by_sage
from sage_optax._sinkhorn import Variant

HeadRule: TypeAlias = Literal["table", "matrix", "adamw"]
TableRule: TypeAlias = Literal["adamw", "factored_rms"]
Rate: TypeAlias = optax.ScalarOrSchedule


@takes_whole_model(weight_decay=0.01)
def sage_hybrid(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.99,
    eps: Rate = 1e-8,
    *,
    damper: Damper = "both",
    eps_mode: EpsMode = "absolute",
    mu_dtype: Any = None,
    scale: Any = 10.0,
    iterations: Any = 5,
    sinkhorn_eps: Any = 1e-8,
    variant: Variant = "unit",
    vector_rule: Literal["sage", "adamw"] = "sage",
    head_rule: HeadRule = "table",
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    adam_eps: Any = 1e-8,
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    r"""SAGE-Hybrid, the paper's method: SAGE on embedding, head and vectors, SinkGD on matrices.

    arXiv:2604.07663, section 3. Per parameter :math:`\theta` of role :math:`k`

    .. math::
      \theta \leftarrow \theta - \eta_k (u + \lambda \theta), \qquad
      u = \mathrm{SAGE}(g) \text{ or } \mathrm{scale} \cdot \mathrm{Sinkhorn}(g)

    The state holds one momentum for embedding, head and vectors, and nothing for matrices. In the paper's 1.3B
    Llama it takes 0.979 GiB in float32, where AdamW's takes 9.832. With ``mu_dtype="int8"`` it takes a quarter
    of that.

    It is a call of `layout_optax.by_role`. For another option of `scale_by_sinkhorn`, such as
    ``vectors_dtype``, write that call; the second example does.

    Args:
      learning_rate: a number or schedule for every role without a learning rate of its own.
      b1: see `scale_by_sage`.
      b2: see `scale_by_sage`.
      eps: SAGE's eps; see `scale_by_sage`.
      damper: see `scale_by_sage`; None gives `lion_hybrid`.
      eps_mode: see `scale_by_sage`.
      mu_dtype: dtype of the momentum of embedding, head and vectors: None (the parameter's dtype), a float
        dtype or int8. Roles that use AdamW store their first moment in it unless it is int8.
      scale: multiplies the direction of matrices before weight decay is added; a number or schedule.
      iterations: see `scale_by_sinkhorn`.
      sinkhorn_eps: ``eps`` of `scale_by_sinkhorn`.
      variant: see `scale_by_sinkhorn`.
      vector_rule: ``"sage"`` as in the released code, or ``"adamw"`` (the paper allows both readings).
      head_rule: ``"table"`` (SAGE, as on the embedding), ``"matrix"`` (SinkGD) or ``"adamw"``.
      adam_b1: decay of the first moment where AdamW is used. ``adam_b1``, ``adam_b2`` and ``adam_eps`` may be
        schedules.
      adam_b2: decay of AdamW's second moment.
      adam_eps: AdamW's eps.
      layout: see `layout_optax.LayoutLike`.
      **whole_model: see `layout_optax.by_role`.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``.

    Raises:
      ValueError: for unknown options or roles, a role with both a learning rate and a multiplier, and arguments
        that `scale_by_sage` and `scale_by_sinkhorn` refuse.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.ones((6, 4)), "up": {"kernel": jnp.ones((4, 8))}}
      >>> tx = sage_hybrid(1e-3, matrix_learning_rate=5e-4, weight_decay=0.0)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> float(updates["embed"][0, 0]), round(float(updates["up"]["kernel"][0, 0]), 6)
      (-0.0010000000474974513, -0.001768)

      >>> from layout_optax import by_role  # other options of SinkGD: its sweeps read a copy in bfloat16
      >>> from sage_optax import scale_by_sage, scale_by_sinkhorn
      >>> matrix = optax.chain(scale_by_sinkhorn(vectors_dtype="bfloat16"), optax.scale(10.0))
      >>> rules = dict.fromkeys(("embedding", "head", "vector"), scale_by_sage())
      >>> tx = by_role({**rules, "matrix": matrix}, 1e-3, weight_decay=0.01)
      >>> found = tx.update(params, tx.init(params), params)[0]["up"]["kernel"]
      >>> tx = sage_hybrid(1e-3)  # on a CPU, which makes no copy, the same bits
      >>> bool((found == tx.update(params, tx.init(params), params)[0]["up"]["kernel"]).all())
      True
    """
    sage = scale_by_sage(
        b1, b2, eps, damper=damper, eps_mode=eps_mode, mu_dtype=mu_dtype, layout=layout
    )
    dtype = momentum_dtype(mu_dtype)
    check_adam(adam_b1, adam_b2, adam_eps, prefix="adam_")
    adam = adam_direction(adam_b1, adam_b2, adam_eps, None if dtype == jnp.int8 else dtype)
    matrix = sinkgd_direction(scale, iterations, sinkhorn_eps, variant, layout)
    directions = {
        "embedding": sage,
        "head": choose("head_rule", head_rule, {"table": sage, "matrix": matrix, "adamw": adam}),
        "vector": choose("vector_rule", vector_rule, {"sage": sage, "adamw": adam}),
        "matrix": matrix,
        OTHER: adam,
    }
    return by_role(directions, learning_rate, layout=layout, **whole_model)


@takes_whole_model(weight_decay=0.01)
def lion_hybrid(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.99,
    *,
    mu_dtype: Any = None,
    scale: Any = 10.0,
    iterations: Any = 5,
    sinkhorn_eps: Any = 1e-8,
    variant: Variant = "unit",
    head_rule: HeadRule = "table",
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    """Lion-Hybrid, the control: Lion on embedding, head and vectors, SinkGD on matrices.

    This is `sage_hybrid` with ``damper=None``. Its state is smaller only by O(d) floats per embedding or head.

    Args:
      learning_rate: see `sage_hybrid`, as for every argument.
      b1: see `sage_hybrid`.
      b2: see `sage_hybrid`.
      mu_dtype: see `sage_hybrid`.
      scale: see `sage_hybrid`.
      iterations: see `sage_hybrid`.
      sinkhorn_eps: see `sage_hybrid`.
      variant: see `sage_hybrid`.
      head_rule: see `sage_hybrid`; ``"table"`` means Lion here.
      layout: see `sage_hybrid`.
      **whole_model: see `layout_optax.by_role`.

    Returns:
      The transformation.

    Raises:
      ValueError: see `sage_hybrid`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.ones((6, 4))}
      >>> tx = lion_hybrid(1e-3, weight_decay=0.0)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> float(updates["embed"][0, 0])
      -0.0010000000474974513
    """
    return sage_hybrid(
        learning_rate,
        b1,
        b2,
        damper=None,
        mu_dtype=mu_dtype,
        scale=scale,
        iterations=iterations,
        sinkhorn_eps=sinkhorn_eps,
        variant=variant,
        head_rule=head_rule,
        layout=layout,
        **whole_model,
    )


@takes_whole_model(weight_decay=0.01)
def sinkgd_hybrid(
    learning_rate: Rate,
    adam_b1: Any = 0.9,
    adam_b2: Any = 0.999,
    adam_eps: Any = 1e-8,
    *,
    mu_dtype: Any = None,
    scale: Any = 10.0,
    iterations: Any = 5,
    sinkhorn_eps: Any = 1e-8,
    variant: Variant = "unit",
    table_rule: TableRule = "adamw",
    head_rule: HeadRule = "table",
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    """SinkGD-Hybrid: AdamW or Adafactor's rule on embedding and head, AdamW on vectors, SinkGD on matrices.

    Adam and SinkGD often need different learning rates: set ``matrix_learning_rate`` or change ``scale``. With
    ``table_rule="factored_rms"`` a whole model keeps V + d floats for an embedding of V x d, two for each entry
    of a vector, and nothing for matrices; `sage_optax.RECOMMENDED_SINKGD` has the settings for it.

    Args:
      learning_rate: see `sage_hybrid`, as for every argument not named here.
      adam_b1: decay of Adam's first moment.
      adam_b2: decay of Adam's second moment.
      adam_eps: Adam's eps.
      mu_dtype: float dtype of Adam's first moment; None for the parameter's dtype.
      scale: see `sage_hybrid`.
      iterations: see `sage_hybrid`.
      sinkhorn_eps: see `sage_hybrid`.
      variant: see `sage_hybrid`.
      table_rule: rule of the embedding: ``"adamw"``, or ``"factored_rms"``, Adafactor's direction
        (`scale_by_factored_rms`). Not in the paper.
      head_rule: ``"table"`` (the embedding's rule), ``"matrix"`` (SinkGD) or ``"adamw"``.
      layout: see `sage_hybrid`.
      **whole_model: see `layout_optax.by_role`.

    Returns:
      The transformation.

    Raises:
      ValueError: see `sage_hybrid`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
      >>> sinkgd_hybrid(1e-3).init(params)[0].inner_states["matrix"].inner_state  # SinkGD has no state
      (EmptyState(), EmptyState())

      >>> from layout_optax import state_bytes
      >>> from sage_optax import RECOMMENDED_SINKGD  # 64 + 32 floats and four step counts
      >>> params = {"embed": jnp.ones((64, 32)), "up": {"kernel": jnp.ones((32, 48))}}
      >>> state_bytes(sinkgd_hybrid(0.01, **RECOMMENDED_SINKGD), params)
      400
    """
    dtype = momentum_dtype(mu_dtype)
    if dtype == jnp.int8:
        raise ValueError(
            "sinkgd_hybrid: Adam's first moment has no int8 form; give a float mu_dtype, or use "
            "sage_hybrid or lion_hybrid."
        )
    check_adam(adam_b1, adam_b2, adam_eps, prefix="adam_")
    adam = adam_direction(adam_b1, adam_b2, adam_eps, dtype)
    rules = {"adamw": adam, "factored_rms": scale_by_factored_rms(layout)}
    table = choose("table_rule", table_rule, rules)
    matrix = sinkgd_direction(scale, iterations, sinkhorn_eps, variant, layout)
    directions = {
        "embedding": table,
        "head": choose("head_rule", head_rule, {"table": table, "matrix": matrix, "adamw": adam}),
        "vector": adam,
        "matrix": matrix,
        OTHER: adam,
    }
    return by_role(directions, learning_rate, layout=layout, **whole_model)
