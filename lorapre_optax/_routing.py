"""Which parameters a low-rank optimizer gets: matrices; the rest keeps full moments, or SAGE by option."""

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
    """One optimizer for a model: `layout_optax.by_role` with low-rank momentum on the matrices.

    Args:
      matrix: direction of the matrices.
      full: the same family's direction with full moments, for unmanaged leaves and where ``others`` is
        ``family``.
      others: direction of embedding, head and vectors: ``family`` or ``"sage"``.
      learning_rate: of every role without its own.
      layout: decides the roles; the directions must have been made with the same.
      family: the name that ``others`` has for ``full``.
      sage: SAGE's direction; None for its defaults.
      table: direction of embedding and head; None for that of ``others``.
      rank: of the matrices, whose keys are checked against all parameters at init.
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
