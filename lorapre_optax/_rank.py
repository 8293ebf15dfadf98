"""Which rank each parameter's momentum gets, and where factors do not pay (the full-rank fallback)."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import optax

from layout_optax.doubts import matches, nearest, warn_once
from layout_optax.layout import ROLES, LayoutLike, ParamLayout, PyTree
from layout_optax.leaves import LayoutLeaves, flatten_with_layout

RankLike: TypeAlias = (
    int
    | float
    | Mapping[str, "int | float | None"]
    | Callable[[str, ParamLayout, tuple[int, ...]], "int | float | None"]
    | None
)
"""How ranks are given: an integer; a fraction in (0, 1) of the smaller side; None for a full moment; a
mapping; or a function of path, layout and shape. The keys of a mapping are whole paths, roles, or regular
expressions searched in the path: a key equal to the path wins (so that `suggest_ranks` can be given as it
is), then the first match in the mapping's order; no match means a full moment."""


def leaf_rank(
    rank: RankLike, path: str, layout: ParamLayout, shape: Sequence[int], *, fallback: bool = True
) -> int | None:
    """The rank of one parameter's factors, or None where its moment is kept in full.

    A moment is kept in full for vectors, where the rule says None, and, with ``fallback``, where factors
    would not be smaller: r (p + q) >= p q. Without ``fallback`` a rank above min(p, q) becomes min(p, q).

    Args:
      rank: see `RankLike`.
      path: the leaf's path in normal form, used in rules and messages.
      layout: its layout with non-negative axes.
      shape: its shape.
      fallback: whether factors that do not pay are replaced by a full moment.

    Raises:
      ValueError: for a rank below 1 or a fraction outside (0, 1); the message gives the path.
      TypeError: if the rank is not static (``inject_hyperparams`` without ``static_args=STATIC_ARGS``).

    Example:
      >>> kernel = ParamLayout("matrix", (1,), (0,))
      >>> leaf_rank(0.25, "q/kernel", kernel, (64, 32)), leaf_rank(32, "q/kernel", kernel, (64, 32))
      (8, None)
    """
    rows, columns = (
        math.prod(shape[axis] for axis in axes) for axes in (layout.row_axes, layout.column_axes)
    )
    value = look_up(rank, path, layout, tuple(shape))
    if value is not None:
        value = _as_int(value, path, min(rows, columns))
    if value is None or layout.role == "vector" or rows * columns == 0:
        return None
    if fallback and value * (rows + columns) >= rows * columns:
        return None
    return min(value, rows, columns)


def check_keys(
    rank: RankLike, leaves: LayoutLeaves, roles: Collection[str] = ("embedding", "head", "matrix")
) -> None:
    """Refuses keys of a mapping that match nothing in a whole tree, and warns of those for other roles.

    Args:
      rank: see `RankLike`.
      leaves: of all parameters; nothing is checked where some are masked.
      roles: those whose moments can be factors.

    Raises:
      ValueError: for a key that is no role and matches no path, or that is no regular expression.
    """
    masked = any(isinstance(leaf, optax.MaskedNode) for leaf in leaves.leaves)
    if not isinstance(rank, Mapping) or masked:
        return
    found = {
        path: layout.role
        for path, layout in zip(leaves.paths, leaves.layouts, strict=True)
        if layout is not None
    }
    for key, value in rank.items():
        if key in ROLES or key in found or not found:
            continue
        if not matches(key, tuple(found), "rank: key"):
            raise ValueError(
                f"rank: {key!r} is no role ({', '.join(ROLES)}) and matches no parameter; "
                f"{nearest(key, tuple(found))}. Correct the key or remove it."
            )
        hit = {path: role for path, role in found.items() if re.search(key, path)}
        if value is not None and not any(role in roles for role in hit.values()):
            path, role = next(iter(hit.items()))
            warn_once(
                f"rank: {key!r} matches parameters that get no factors here, '{path}' for one, whose "
                f"role is {role!r}. Factors are for: {', '.join(sorted(roles))}."
            )


def checking_keys(
    tx: optax.GradientTransformationExtraArgs,
    rank: RankLike,
    layout: LayoutLike,
    roles: Collection[str],
) -> optax.GradientTransformationExtraArgs:
    """The transformation, whose init calls `check_keys` on all parameters."""

    def init_fn(params: PyTree) -> PyTree:
        if isinstance(rank, Mapping):
            check_keys(rank, flatten_with_layout(layout, params), roles)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def look_up(rank: Any, path: str, layout: ParamLayout, shape: tuple[int, ...]) -> Any:
    """The rule's answer for one leaf: a number or None."""
    if isinstance(rank, Mapping):
        if path in rank:
            return rank[path]
        for key, value in rank.items():
            if key == layout.role or (key not in ROLES and re.search(key, path)):
                return value
        return None
    return rank(path, layout, shape) if callable(rank) else rank


def _as_int(value: Any, path: str, smaller_side: int) -> int:
    """A rank of at least 1 from an integer or a fraction of the smaller side."""
    where = f"rank of '{path}'" if path else "rank"
    if not isinstance(value, (numbers.Real, np.generic)) or isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{where}: expected an int, a fraction or None, got {value!r}. Ranks are shapes and "
            "cannot be traced: under optax.inject_hyperparams pass static_args=STATIC_ARGS."
        )
    number = float(value)
    if isinstance(value, (numbers.Integral, np.integer)):
        if number < 1:
            raise ValueError(f"{where}: must be at least 1, got {value}.")
        return int(value)
    if not 0 < number < 1:
        raise ValueError(
            f"{where}: a fraction must lie in (0, 1), got {value}; give an int for a rank."
        )
    return max(1, round(number * smaller_side))
