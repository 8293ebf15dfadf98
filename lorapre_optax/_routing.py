"""Routes low-rank momentum to matrices; the other roles keep full moments, or SAGE by option."""

from typing import Any, Literal, TypeAlias, Unpack

import optax

from layout_optax.hyperparameters import choose
from layout_optax.layout import LayoutLike
from layout_optax.routing import OTHER, WholeModel, by_role
from lorapre_optax._rank import RankLike, checking_keys
from sage_optax import scale_by_sage

Others: TypeAlias = Literal["adamw", "sage"]


def route_matrices(
    matrix: optax.GradientTransformation,
    full: optax.GradientTransformation,
    *,
    others: str,
    learning_rate: optax.ScalarOrSchedule,
    layout: LayoutLike,
    family: str = "adamw",
    sage: optax.GradientTransformation | None = None,
    table: optax.GradientTransformation | None = None,
    rank: RankLike = None,
    **whole_model: Unpack[WholeModel],
) -> optax.GradientTransformationExtraArgs:
    """Calls `layout_optax.by_role` with low-rank momentum on the matrices.

    Args:
      matrix: direction of the matrices.
      full: direction of the same family with full moments, for unmanaged leaves and for other roles if
        ``others`` is ``family``.
      others: direction of embedding, head and vectors: ``family`` or ``"sage"``.
      learning_rate: learning rate of every role without its own.
      layout: the layout that gives the roles; the directions must use the same.
      family: the value of ``others`` that selects ``full``.
      sage: SAGE's direction; None for its defaults.
      table: direction of embedding and head; None uses that of ``others``.
      rank: rank of the matrices; init checks its keys against all parameters.
      **whole_model: see `layout_optax.by_role`.
    """
    sage = scale_by_sage(layout=layout) if sage is None else sage
    rest = choose("others", others, {family: full, "sage": sage})
    directions: dict[str, Any] = {
        "embedding": rest if table is None else table,
        "vector": rest,
        "matrix": matrix,
        OTHER: full,
    }
    tx = by_role(directions, learning_rate, layout=layout, **whole_model)
    return checking_keys(tx, rank, layout, ("matrix",))
