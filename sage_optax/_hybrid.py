"""The hybrids: one rule per role through `optax.partition`; SAGE-Hybrid and its two controls.

Only directions are partitioned. Weight decay and learning rates follow in the same chain over the
whole tree, so that a mask given as a tree has the structure of the parameters as the user knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import optax

from layout_optax.roles import ROLES, LayoutLike, flatten_with_layout
from sage_optax._damper import Damper, EpsMode
from sage_optax._sage import scale_by_sage
from sage_optax._sinkgd import scale_by_sinkhorn
from sage_optax._sinkhorn import Variant

HeadRule: TypeAlias = Literal["table", "matrix", "adamw"]
Rate: TypeAlias = optax.ScalarOrSchedule
OTHER = "other"
"""Label of the leaves that a rule declares not ours; they get AdamW's direction."""


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
    embedding_learning_rate: Rate | None = None,
    head_learning_rate: Rate | None = None,
    vector_learning_rate: Rate | None = None,
    matrix_learning_rate: Rate | None = None,
    other_learning_rate: Rate | None = None,
    learning_rate_multipliers: Mapping[str, float] | None = None,
    weight_decay: Any = 0.01,
    weight_decay_mask: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAGE-Hybrid, the paper's method: SAGE on tables and vectors, SinkGD on matrices.

    arXiv:2604.07663, section 3. Per parameter :math:`\theta` of role :math:`k`

    .. math::
      \theta \leftarrow \theta - \eta_k (u + \lambda \theta), \qquad
      u = \mathrm{SAGE}(g) \text{ or } \mathrm{scale} \cdot \mathrm{Sinkhorn}(g)

    State: one momentum for embedding, head and vectors, nothing for matrices. In the paper's 1.3B
    Llama that is 0.979 GiB in float32 where AdamW keeps 9.832, and a quarter of it with
    ``mu_dtype="int8"``.

    Args:
      learning_rate: a number or schedule for every role that has no rate of its own.
      b1: see `scale_by_sage`.
      b2: see `scale_by_sage`.
      eps: SAGE's eps; see `scale_by_sage`.
      damper: see `scale_by_sage`; None gives `lion_hybrid`.
      eps_mode: see `scale_by_sage`.
      mu_dtype: momentum of tables and vectors: None (the parameter's dtype), a float dtype or int8. AdamW
        parts store their first moment in it unless it is int8.
      scale: multiplies the matrices' direction before weight decay is added.
      iterations: see `scale_by_sinkhorn`.
      sinkhorn_eps: eps of `scale_by_sinkhorn`.
      variant: see `scale_by_sinkhorn`.
      vector_rule: ``"sage"`` as in the released code, or ``"adamw"`` (the paper allows both readings).
      head_rule: ``"table"`` (SAGE), ``"matrix"`` (SinkGD) or ``"adamw"``.
      adam_b1: decay of the first moment where AdamW's direction is used.
      adam_b2: decay of its second moment.
      adam_eps: its eps.
      embedding_learning_rate: rate of the embedding's direction and decay; None for ``learning_rate``.
      head_learning_rate: the same for the head.
      vector_learning_rate: the same for vectors.
      matrix_learning_rate: the same for matrices.
      other_learning_rate: the same for leaves that are not ours, which get AdamW.
      learning_rate_multipliers: factors on ``learning_rate`` by role (``"other"`` among them).
      weight_decay: decoupled, times the role's rate.
      weight_decay_mask: a tree of booleans over all parameters, or a callable to one; None decays all.
      layout: see `layout_optax.LayoutLike`.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``.

    Raises:
      ValueError: for unknown options or roles, a role with both a rate and a multiplier, and what
        `scale_by_sage` and `scale_by_sinkhorn` refuse.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.ones((6, 4)), "up": {"kernel": jnp.ones((4, 8))}}
      >>> tx = sage_hybrid(1e-3, matrix_learning_rate=5e-4, weight_decay=0.0)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> float(updates["embed"][0, 0]), round(float(updates["up"]["kernel"][0, 0]), 6)
      (-0.0010000000474974513, -0.001768)
    """
    sage = scale_by_sage(
        b1, b2, eps, damper=damper, eps_mode=eps_mode, mu_dtype=mu_dtype, layout=layout
    )
    adam = optax.scale_by_adam(adam_b1, adam_b2, adam_eps, mu_dtype=_float_dtype(mu_dtype))
    return _hybrid(
        table=sage,
        vector=_choose("vector_rule", vector_rule, {"sage": sage, "adamw": adam}),
        matrix=_sinkgd_direction(scale, iterations, sinkhorn_eps, variant, layout),
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
    embedding_learning_rate: Rate | None = None,
    head_learning_rate: Rate | None = None,
    vector_learning_rate: Rate | None = None,
    matrix_learning_rate: Rate | None = None,
    other_learning_rate: Rate | None = None,
    learning_rate_multipliers: Mapping[str, float] | None = None,
    weight_decay: Any = 0.01,
    weight_decay_mask: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion-Hybrid, the control: Lion on tables and vectors, SinkGD on matrices.

    `sage_hybrid` with ``damper=None``: the same state but for O(d) floats a table.

    Args:
      learning_rate: see `sage_hybrid`, as for every argument.
      b1: see `sage_hybrid`.
      b2: see `sage_hybrid`.
      mu_dtype: see `sage_hybrid`.
      scale: see `sage_hybrid`.
      iterations: see `sage_hybrid`.
      sinkhorn_eps: see `sage_hybrid`.
      variant: see `sage_hybrid`.
      head_rule: see `sage_hybrid`; ``"table"`` is Lion here.
      embedding_learning_rate: see `sage_hybrid`.
      head_learning_rate: see `sage_hybrid`.
      vector_learning_rate: see `sage_hybrid`.
      matrix_learning_rate: see `sage_hybrid`.
      other_learning_rate: see `sage_hybrid`.
      learning_rate_multipliers: see `sage_hybrid`.
      weight_decay: see `sage_hybrid`.
      weight_decay_mask: see `sage_hybrid`.
      layout: see `sage_hybrid`.

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
        embedding_learning_rate=embedding_learning_rate,
        head_learning_rate=head_learning_rate,
        vector_learning_rate=vector_learning_rate,
        matrix_learning_rate=matrix_learning_rate,
        other_learning_rate=other_learning_rate,
        learning_rate_multipliers=learning_rate_multipliers,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        layout=layout,
    )


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
    head_rule: HeadRule = "table",
    embedding_learning_rate: Rate | None = None,
    head_learning_rate: Rate | None = None,
    vector_learning_rate: Rate | None = None,
    matrix_learning_rate: Rate | None = None,
    other_learning_rate: Rate | None = None,
    learning_rate_multipliers: Mapping[str, float] | None = None,
    weight_decay: Any = 0.01,
    weight_decay_mask: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SinkGD-Hybrid: AdamW on tables and vectors, SinkGD on matrices.

    Adam and SinkGD often want different rates: give ``matrix_learning_rate`` or change ``scale``.

    Args:
      learning_rate: see `sage_hybrid`, as for every argument not named here.
      adam_b1: decay of Adam's first moment.
      adam_b2: decay of its second moment.
      adam_eps: its eps.
      mu_dtype: dtype of Adam's first moment, a float dtype; None for the parameter's.
      scale: see `sage_hybrid`.
      iterations: see `sage_hybrid`.
      sinkhorn_eps: see `sage_hybrid`.
      variant: see `sage_hybrid`.
      head_rule: ``"table"`` and ``"adamw"`` are AdamW here, ``"matrix"`` SinkGD.
      embedding_learning_rate: see `sage_hybrid`.
      head_learning_rate: see `sage_hybrid`.
      vector_learning_rate: see `sage_hybrid`.
      matrix_learning_rate: see `sage_hybrid`.
      other_learning_rate: see `sage_hybrid`.
      learning_rate_multipliers: see `sage_hybrid`.
      weight_decay: see `sage_hybrid`.
      weight_decay_mask: see `sage_hybrid`.
      layout: see `sage_hybrid`.

    Returns:
      The transformation.

    Raises:
      ValueError: see `sage_hybrid`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.ones((4, 8))}}
      >>> sinkgd_hybrid(1e-3).init(params)[0].inner_states["matrix"].inner_state  # SinkGD has no state
      (EmptyState(), EmptyState())
    """
    adam = optax.scale_by_adam(adam_b1, adam_b2, adam_eps, mu_dtype=mu_dtype)
    return _hybrid(
        table=adam,
        vector=adam,
        matrix=_sinkgd_direction(scale, iterations, sinkhorn_eps, variant, layout),
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


def labels_by_role(layout: LayoutLike = None) -> Callable[[Any], Any]:
    """A callable for `optax.partition`: every leaf's role, ``"other"`` where it is not ours.

    Example:
      >>> import jax.numpy as jnp
      >>> labels_by_role()({"norm": {"scale": jnp.ones(4)}, "none": None})
      {'none': None, 'norm': {'scale': 'vector'}}
    """

    def labels(tree: Any) -> Any:
        ours = flatten_with_layout(layout, tree)
        return ours.map(lambda _, found, leaf: found.role, other=lambda: OTHER)

    return labels


def _hybrid(
    *,
    table: optax.GradientTransformation,
    vector: optax.GradientTransformation,
    matrix: optax.GradientTransformation,
    other: optax.GradientTransformation,
    head_rule: str,
    learning_rate: Rate,
    rates: Mapping[str, Rate | None],
    multipliers: Mapping[str, float] | None,
    weight_decay: Any,
    weight_decay_mask: Any,
    layout: LayoutLike,
) -> optax.GradientTransformationExtraArgs:
    """Directions by role, then decay, then rates by role."""
    labels = labels_by_role(layout)
    directions = {
        "embedding": table,
        "head": _choose("head_rule", head_rule, {"table": table, "matrix": matrix, "adamw": other}),
        "vector": vector,
        "matrix": matrix,
        OTHER: other,
    }
    return optax.chain(
        optax.partition(directions, labels),
        optax.add_decayed_weights(weight_decay, weight_decay_mask),
        _scale_by_rates(learning_rate, rates, multipliers, labels),
    )


def _sinkgd_direction(
    scale: Any, iterations: Any, eps: Any, variant: Variant, layout: LayoutLike
) -> optax.GradientTransformation:
    sinkhorn = scale_by_sinkhorn(iterations, eps, variant=variant, layout=layout)
    return optax.chain(sinkhorn, optax.scale(scale))


def _scale_by_rates(
    learning_rate: Rate,
    rates: Mapping[str, Rate | None],
    multipliers: Mapping[str, float] | None,
    labels: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """One learning rate for all, or one per role where any role has its own."""
    multipliers = dict(multipliers or {})
    own = {role: rate for role, rate in rates.items() if rate is not None}
    for role in multipliers:
        if role not in rates:
            known = (*ROLES, OTHER)
            raise ValueError(f"learning_rate_multipliers: unknown role {role!r}; use {known}.")
        if role in own:
            raise ValueError(
                f"learning_rate_multipliers: {role} has both {role}_learning_rate and a multiplier; "
                "give one."
            )
        own[role] = _times(learning_rate, multipliers[role])
    if not own:
        return optax.scale_by_learning_rate(learning_rate)
    by_role = {role: optax.scale_by_learning_rate(own.get(role, learning_rate)) for role in rates}
    return optax.partition(by_role, labels)


def _times(rate: Any, factor: float) -> Any:
    return (lambda count: factor * rate(count)) if callable(rate) else factor * rate


def _choose(option: str, value: Any, choices: Mapping[str, Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{option} must be one of {tuple(choices)}, got {value!r}.")
    return choices[value]


def _float_dtype(mu_dtype: Any) -> Any:
    """AdamW parts follow a float momentum dtype, and keep the parameter's beside int8 momenta."""
    return None if mu_dtype is None or "int8" in str(mu_dtype) else mu_dtype
