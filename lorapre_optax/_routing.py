"""Which parameters a low-rank optimizer gets: matrices; the rest keeps full moments, or SAGE by option."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import optax

from layout_optax.roles import LayoutLike
from lorapre_optax._numbers import Number, check_number
from sage_optax._routing import OTHER, choose, route
from sage_optax._sage import scale_by_sage

Others: TypeAlias = Literal["adamw", "sage"]


def route_matrices(
    matrix: optax.GradientTransformation,
    full: optax.GradientTransformation,
    *,
    others: str,
    learning_rate: optax.ScalarOrSchedule,
    rates: tuple[optax.ScalarOrSchedule | None, ...],
    multipliers: Mapping[str, float] | None,
    weight_decay: Number,
    weight_decay_mask: Any,
    layout: LayoutLike,
    family: str = "adamw",
    sage: optax.GradientTransformation | None = None,
    table: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for a model: directions by role, then decay, then rates by role.

    Args:
      matrix: direction of the matrices.
      full: the same family's direction with full moments, for leaves without a layout and where
        ``others`` is ``family``.
      others: direction of embedding, head and vectors: ``family`` or ``"sage"``.
      learning_rate: of every role without its own.
      rates: of embedding, head, vector, matrix and leaves that are not ours, or None.
      multipliers: factors on ``learning_rate`` by role.
      weight_decay: decoupled, in every role.
      weight_decay_mask: as in `optax.adamw`.
      layout: decides the roles; the directions must have been made with the same.
      family: what ``others`` calls ``full``.
      sage: SAGE's direction; None for its defaults.
      table: direction of embedding and head; None for that of ``others``.
    """
    check_number("weight_decay", weight_decay, 0)
    sage = scale_by_sage(layout=layout) if sage is None else sage
    rest = choose("others", others, {family: full, "sage": sage})
    return route(
        table=rest if table is None else table,
        vector=rest,
        matrix=matrix,
        other=full,
        head_rule="table",
        learning_rate=learning_rate,
        rates=dict(zip(("embedding", "head", "vector", "matrix", OTHER), rates, strict=True)),
        multipliers=multipliers,
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        layout=layout,
    )
