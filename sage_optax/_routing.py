"""One rule per role: how the hybrids send each leaf to its direction and its learning rate.

Only directions and rates are partitioned. Weight decay stands between them over the whole tree, so that
a mask given as a tree has the structure of the parameters as the user knows them.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from layout_optax.roles import ROLES, LayoutLike, flatten_with_layout
from sage_optax._options import check_layout, check_mask
from sage_optax._sinkgd import scale_by_sinkhorn
from sage_optax._sinkhorn import Variant

OTHER = "other"
"""Label of the leaves that a rule declares not ours; they get AdamW's direction."""


def labels_by_role(layout: LayoutLike = None) -> Callable[[Any], Any]:
    """A callable for `optax.partition`: every leaf's role, ``"other"`` where it is not ours.

    Example:
      >>> import jax.numpy as jnp
      >>> labels_by_role()({"norm": {"scale": jnp.ones(4)}, "none": None})
      {'none': None, 'norm': {'scale': 'vector'}}
    """

    def labels(tree: Any) -> Any:
        check_layout(layout, tree)
        ours = flatten_with_layout(layout, tree)
        return ours.map(lambda _, found, leaf: found.role, other=lambda: OTHER)

    return labels


def route(
    *,
    table: optax.GradientTransformation,
    vector: optax.GradientTransformation,
    matrix: optax.GradientTransformation,
    other: optax.GradientTransformation,
    head_rule: str,
    learning_rate: optax.ScalarOrSchedule,
    rates: Mapping[str, optax.ScalarOrSchedule | None],
    multipliers: Mapping[str, float] | None,
    weight_decay: Any,
    weight_decay_mask: Any,
    layout: LayoutLike,
) -> optax.GradientTransformationExtraArgs:
    """Directions by role, then decay, then rates by role.

    Args:
      table: direction of embeddings, and of heads where ``head_rule`` is ``"table"``.
      vector: direction of vectors.
      matrix: direction of matrices, and of heads where ``head_rule`` is ``"matrix"``.
      other: AdamW's direction, for leaves that are not ours and ``head_rule="adamw"``.
      head_rule: which of the three a head takes.
      learning_rate: rate of every role without its own.
      rates: a rate of its own, or None, for each role and ``"other"``.
      multipliers: factors on ``learning_rate`` by role.
      weight_decay: see `optax.add_decayed_weights`.
      weight_decay_mask: see `optax.add_decayed_weights`.
      layout: see `layout_optax.LayoutLike`; the directions must have been made with the same.

    Returns:
      The whole optimizer. Updates have the gradients' dtypes, whatever numbers were injected as arrays.
    """
    check_mask(weight_decay_mask)
    labels = labels_by_role(layout)
    directions: dict[Hashable, optax.GradientTransformation] = {
        "embedding": table,
        "head": choose("head_rule", head_rule, {"table": table, "matrix": matrix, "adamw": other}),
        "vector": vector,
        "matrix": matrix,
        OTHER: other,
    }
    return _in_gradient_dtype(
        optax.chain(
            optax.partition(directions, labels),
            optax.add_decayed_weights(weight_decay, weight_decay_mask),
            _scale_by_rates(learning_rate, rates, multipliers, labels),
        )
    )


def sinkgd_direction(
    scale: optax.ScalarOrSchedule, iterations: Any, eps: Any, variant: Variant, layout: LayoutLike
) -> optax.GradientTransformation:
    """Sinkhorn's iterate times ``scale``, a number or a schedule."""
    sinkhorn = scale_by_sinkhorn(iterations, eps, variant=variant, layout=layout)
    # Named for rates, but this is the one public way to multiply by a number or a schedule.
    return optax.chain(sinkhorn, optax.scale_by_learning_rate(scale, flip_sign=False))


def adam_direction(b1: Any, b2: Any, eps: Any, mu_dtype: Any) -> optax.GradientTransformation:
    """Adam's direction with numbers or schedules."""
    factory = optax.scale_by_adam
    if any(map(callable, (b1, b2, eps))):
        factory = optax.inject_hyperparams(
            optax.scale_by_adam, static_args=("mu_dtype",), hyperparam_dtype=jnp.dtype("float32")
        )
    return factory(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)


def choose(option: str, value: Any, choices: Mapping[str, Any]) -> Any:
    """The choice that an option names.

    Raises:
      ValueError: if it names none of them.
    """
    if value not in choices:
        raise ValueError(f"{option} must be one of {tuple(choices)}, got {value!r}.")
    return choices[value]


def _in_gradient_dtype(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Casts updates back where a float32 hyperparameter or moment has widened them."""

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        new, state = tx.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _scale_by_rates(
    learning_rate: optax.ScalarOrSchedule,
    rates: Mapping[str, optax.ScalarOrSchedule | None],
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
    by_role: dict[Hashable, optax.GradientTransformation] = {
        role: optax.scale_by_learning_rate(own.get(role, learning_rate)) for role in rates
    }
    return optax.partition(by_role, labels)


def _times(rate: optax.ScalarOrSchedule, factor: float) -> optax.ScalarOrSchedule:
    return (lambda count: factor * rate(count)) if callable(rate) else factor * rate
