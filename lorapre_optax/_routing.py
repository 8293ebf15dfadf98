"""Which parameters a low-rank optimizer gets: matrices; the rest goes to AdamW, or to SAGE by option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import optax

from layout_optax.roles import LayoutLike, flatten_with_layout
from lorapre_optax._numbers import Number, check_one_of

Others: TypeAlias = Literal["adamw", "sage"]
_NOT_OURS = "not ours"


def route_matrices(
    matrix: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    others: Others,
    adam: optax.GradientTransformation,
    weight_decay: Number,
    weight_decay_mask: Any,
    learning_rates: Mapping[str, optax.ScalarOrSchedule | None],
    layout: LayoutLike,
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for a model: ``matrix`` on matrices, AdamW or SAGE on the other roles.

    Args:
      matrix: the direction of the matrices, without learning rate.
      learning_rate: of the matrices, and of every role without its own.
      others: what the other roles get. Leaves without a layout (``None`` in a rule) always get AdamW.
      adam: Adam's direction with full moments.
      weight_decay: decoupled, in every role.
      weight_decay_mask: as in `optax.adamw`.
      learning_rates: by role; None: ``learning_rate``.
      layout: decides the roles.
    """
    check_one_of("others", others, ("adamw", "sage"))

    def finished(direction: optax.GradientTransformation, rate: Any):
        return optax.chain(
            direction,
            optax.add_decayed_weights(weight_decay, weight_decay_mask),  # pyright: ignore[reportArgumentType]
            optax.scale_by_learning_rate(rate),
        )

    def full(role: str):
        rate = learning_rates.get(role)
        rate = learning_rate if rate is None else rate
        if others == "sage" and role != _NOT_OURS:
            from sage_optax import scale_by_sage

            return finished(scale_by_sage(layout=layout), rate)
        return finished(adam, rate)

    def roles(params: Any) -> Any:
        return flatten_with_layout(layout, params).map(
            lambda path, leaf_layout, leaf: leaf_layout.role, other=lambda: _NOT_OURS
        )

    transforms: dict[Any, Any] = {
        role: full(role) for role in ("embedding", "head", "vector", _NOT_OURS)
    }
    transforms["matrix"] = finished(matrix, learning_rate)
    return optax.partition(transforms, roles)
