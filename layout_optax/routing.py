"""Direction, weight decay and learning rate by role: `by_role` builds an optimizer of a whole model.

`optax.partition` covers directions and learning rates only. Weight decay is one transformation over the
whole tree, so a mask given as a tree has the structure of the user's parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ParamSpec, TypedDict, TypeVar, Unpack, get_type_hints

import jax.numpy as jnp
import optax

from layout_optax.fit import check_state_type, check_trainable_tree, checked_adam
from layout_optax.hyperparameters import (
    Number,
    check_adam,
    check_layout,
    check_mask,
    check_number,
    check_rate,
    float_dtype,
)
from layout_optax.inference import warn_of_missed_tables
from layout_optax.layout import ROLES, LayoutLike
from layout_optax.leaves import flatten_with_layout
from layout_optax.promotion import in_gradient_dtype, with_standard_promotion

P = ParamSpec("P")
R = TypeVar("R")

OTHER = "other"
"""Label of unmanaged leaves. A layout rule excludes them, and they use AdamW's direction."""


class WholeModel(TypedDict, total=False):
    """The keywords that every optimizer of a whole model takes besides its own; see `by_role`.

    Attributes:
      embedding_learning_rate: learning rate of embeddings; None uses ``learning_rate``.
      head_learning_rate: learning rate of the head; None uses ``learning_rate``.
      vector_learning_rate: learning rate of vectors; None uses ``learning_rate``.
      matrix_learning_rate: learning rate of matrices; None uses ``learning_rate``.
      other_learning_rate: learning rate of unmanaged leaves, which a layout rule excludes.
      learning_rate_multipliers: factors on ``learning_rate`` by role, ``"other"`` included, for roles without a
        learning rate of their own.
      weight_decay: decoupled weight decay, multiplied by the role's learning rate. A number or a schedule.
      weight_decay_mask: a tree of booleans over all parameters, or a callable from parameters to such a tree.
        None decays every parameter.
    """

    embedding_learning_rate: optax.ScalarOrSchedule | None
    head_learning_rate: optax.ScalarOrSchedule | None
    vector_learning_rate: optax.ScalarOrSchedule | None
    matrix_learning_rate: optax.ScalarOrSchedule | None
    other_learning_rate: optax.ScalarOrSchedule | None
    learning_rate_multipliers: Mapping[str, float] | None
    weight_decay: Number
    weight_decay_mask: Any


def takes_whole_model(weight_decay: float) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Adds the keywords of `WholeModel` to an optimizer's signature and docstring.

    The optimizer ends in ``**whole_model: Unpack[WholeModel]``, which type checkers and editors read. At run
    time ``help``, `inspect.signature` and `optax.inject_hyperparams` see each keyword with its type and
    default.

    Args:
      weight_decay: the default of ``weight_decay``; every other keyword defaults to None.

    Returns:
      A decorator. The decorated function raises TypeError for an unknown keyword.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        bare = inspect.signature(function, eval_str=True)
        own = [p for p in bare.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=weight_decay if name == "weight_decay" else None,
                annotation=annotation,
            )
            for name, annotation in get_type_hints(WholeModel).items()
        ]
        signature = bare.replace(parameters=[*own, *added])

        @functools.wraps(function)
        def optimizer(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}: {error}") from None
            kwargs.setdefault("weight_decay", weight_decay)
            return function(*args, **kwargs)

        optimizer.__dict__["__signature__"] = signature
        optimizer.__doc__ = _with_arguments(function.__doc__)
        return optimizer

    return decorate


def by_role(
    directions: Mapping[str, optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: LayoutLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    r"""Builds an optimizer of a whole model: a direction, a weight decay and a learning rate for each role.

    Per parameter :math:`\theta` of role :math:`k`, with the direction :math:`u_k` of its gradient

    .. math::
      \theta \leftarrow \theta - \eta_k (u_k + \lambda \theta)

    The hybrids of `sage_optax` and the whole-model optimizers of `lorapre_optax` call this function with their
    own directions. Use it to compose others.

    Args:
      directions: a transformation per role, without learning rate and sign flip (``scale_by_...``). The roles
        are ``"embedding"``, ``"head"``, ``"matrix"`` and ``"vector"``; ``"other"`` takes the leaves that a
        layout rule excludes. The head defaults to the embedding's direction and ``"other"`` to
        `adam_direction`.
      learning_rate: a number or schedule for every role without a learning rate of its own.
      layout: see `layout_optax.LayoutLike`. Give the directions the same layout.
      **whole_model: see `WholeModel`; ``weight_decay`` defaults to 0.

    Returns:
      A chain of `optax.partition` over directions, `optax.add_decayed_weights` and the learning rates. Updates
      keep the gradients' dtypes, also where hyperparameters are injected as arrays.

    Raises:
      ValueError: for an unknown role or a role without a direction, a role with both a learning rate and a
        multiplier, and numbers that are not finite.
      TypeError: for a learning rate that is neither a number nor a schedule; at init for a leaf that is not a
        real floating-point array; at update for the state of another optimizer.

    Example:
      >>> import jax.numpy as jnp
      >>> adam = optax.scale_by_adam()
      >>> rules = {"embedding": optax.scale_by_sign(), "matrix": adam, "vector": adam}
      >>> tx = by_role(rules, 1e-3, matrix_learning_rate=1e-4)
      >>> params = {"embed": jnp.ones((6, 4)), "up": {"kernel": jnp.ones((4, 8))}}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["embed"][0, 0], updates["up"]["kernel"][0, 0].round(6))
      -0.001 -1e-04
    """
    mask = whole_model.get("weight_decay_mask")
    decay = whole_model.get("weight_decay", 0.0)
    check_mask(mask)
    check_number("weight_decay", decay, 0)
    labels = labels_by_role(layout)
    return _refusing(
        in_gradient_dtype(
            optax.chain(
                optax.partition(_complete(directions), labels),
                decayed_weights(decay, mask),
                _scale_by_rates(
                    learning_rate,
                    {role: whole_model.get(f"{role}_learning_rate") for role in (*ROLES, OTHER)},
                    whole_model.get("learning_rate_multipliers"),
                    labels,
                ),
            )
        )
    )


def labels_by_role(layout: LayoutLike = None) -> Callable[[Any], Any]:
    """Returns a callable for `optax.partition`: each leaf's role, or ``"other"`` if a rule excludes it.

    Example:
      >>> import jax.numpy as jnp
      >>> labels_by_role()({"norm": {"scale": jnp.ones(4)}, "none": None})
      {'none': None, 'norm': {'scale': 'vector'}}
    """

    def labels(tree: Any) -> Any:
        check_layout(layout, tree)
        leaves = flatten_with_layout(layout, tree)
        warn_of_missed_tables(layout, tree)
        return leaves.map(lambda _, found, leaf: found.role, other=lambda: OTHER)

    return labels


def adam_direction(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, mu_dtype: Any = None
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with numbers or schedules.

    Raises:
      ValueError: for decays outside [0, 1), an eps that is negative or not finite, or a dtype that is not
        floating-point; at update for a state that does not fit. The message names the argument or the path.
      TypeError: for an argument that is not a number; for a leaf that is not a real floating-point array.
    """
    check_adam(b1, b2, eps)
    float_dtype("mu_dtype", mu_dtype)
    factory = optax.scale_by_adam
    if any(map(callable, (b1, b2, eps))):
        factory = optax.inject_hyperparams(
            optax.scale_by_adam, static_args=("mu_dtype",), hyperparam_dtype=jnp.dtype("float32")
        )
    adam = factory(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)  # pyright: ignore[reportArgumentType]
    return checked_adam(with_standard_promotion(adam, keep_dtypes=True))


def times(
    direction: optax.GradientTransformation, scale: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """Multiplies a direction by a number or a schedule, before weight decay is added.

    Raises:
      ValueError: for a number that is not finite.
      TypeError: for an argument that is not a number.
    """
    check_rate("scale", scale)
    # optax names this for learning rates, but has no other public way to multiply by a number or a schedule.
    return optax.chain(direction, scale_by_rate(scale, flip_sign=False))


def decayed_weights(weight_decay: Number, mask: Any = None) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` with schedules, for parameters of any dtype in any promotion mode."""
    return with_standard_promotion(
        optax.add_decayed_weights(weight_decay, mask)  # pyright: ignore[reportArgumentType]
    )


def scale_by_rate(
    rate: optax.ScalarOrSchedule, *, flip_sign: bool = True
) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`, in any promotion mode."""
    return with_standard_promotion(optax.scale_by_learning_rate(rate, flip_sign=flip_sign))


def _refusing(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Adds checks of leaves and states to the chain of `by_role`, with errors clearer than optax's."""

    def init_fn(params: Any) -> Any:
        check_trainable_tree(params)
        return tx.init(params)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        direction = state[0] if type(state) is tuple and len(state) == 3 else state
        check_state_type("by_role", direction, optax.transforms.PartitionState)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _complete(
    directions: Mapping[str, optax.GradientTransformation],
) -> dict[Hashable, optax.GradientTransformation]:
    """Fills in the directions of the head and of unmanaged leaves where they are missing."""
    known = (*ROLES, OTHER)
    for role in directions:
        if role not in known:
            raise ValueError(f"by_role: unknown role {role!r} in directions; use {known}.")
    complete: dict[Hashable, optax.GradientTransformation] = {**directions}
    if "embedding" in complete:
        complete.setdefault("head", complete["embedding"])
    if OTHER not in complete:
        complete[OTHER] = adam_direction()
    for role in ROLES:
        if role not in complete:
            raise ValueError(
                f"by_role: directions has no entry for {role!r}. Add one, for example "
                "adam_direction()."
            )
    return complete


def _scale_by_rates(
    learning_rate: optax.ScalarOrSchedule,
    rates: Mapping[str, Any],
    multipliers: Mapping[str, float] | None,
    labels: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """Scales by one learning rate, or by one per role where any role has its own."""
    check_rate("learning_rate", learning_rate)
    multipliers = dict(multipliers or {})
    own = {role: rate for role, rate in rates.items() if rate is not None}
    for role, rate in own.items():
        check_rate(f"{role}_learning_rate", rate)
    for role, factor in multipliers.items():
        if role not in rates:
            raise ValueError(
                f"learning_rate_multipliers: unknown role {role!r}; use {tuple(rates)}."
            )
        if role in own:
            raise ValueError(
                f"learning_rate_multipliers: {role} has both {role}_learning_rate and a multiplier; "
                "give one."
            )
        check_rate(f"learning_rate_multipliers[{role!r}]", factor)
        own[role] = _times(learning_rate, factor)
    if not own:
        return scale_by_rate(learning_rate)
    by_label: dict[Hashable, optax.GradientTransformation] = {
        role: scale_by_rate(own.get(role, learning_rate)) for role in rates
    }
    return optax.partition(by_label, labels)


def _times(rate: optax.ScalarOrSchedule, factor: float) -> optax.ScalarOrSchedule:
    return (lambda count: factor * rate(count)) if callable(rate) else factor * rate


def _with_arguments(doc: str | None) -> str:
    """Replaces the ``**whole_model`` line of a docstring by the arguments that `WholeModel` describes."""
    # Python 3.13 removes the indentation of docstrings when it compiles them; earlier versions do not.
    arguments = inspect.cleandoc(WholeModel.__doc__ or "").partition("Attributes:\n")[2]
    text, line, rest = inspect.cleandoc(doc or "").partition("  **whole_model:")
    if not line:
        return text
    return text + arguments + "\n" + rest.partition("\n")[2]


__all__ = [
    "OTHER",
    "WholeModel",
    "adam_direction",
    "by_role",
    "decayed_weights",
    "labels_by_role",
    "scale_by_rate",
    "takes_whole_model",
    "times",
]
