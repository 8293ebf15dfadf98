"""The rank of each parameter's momentum, and the full-rank fallback where factors save no memory."""

from __future__ import annotations

import difflib
import math
import numbers
import re
import warnings
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
"""The type of every ``rank`` argument: an integer; a fraction in (0, 1) of the smaller side; None for a full
moment; a mapping; or a function of path, layout and shape. The keys of a mapping are whole paths, roles, or
regular expressions searched in the path. A key equal to the path wins, so the result of `suggest_ranks` is a
valid rank; then the first match in the mapping's order wins. A leaf without a match keeps a full moment. A key
that matches no leaf is an error."""


def leaf_rank(
    rank: RankLike, path: str, layout: ParamLayout, shape: Sequence[int], *, fallback: bool = True
) -> int | None:
    """Returns the rank of one parameter's factors, or None if its moment is full.

    A moment is full for vectors, where the rule gives None, and, with ``fallback``, where factors would not be
    smaller: r (p + q) >= p q. Without ``fallback`` a rank above min(p, q) becomes min(p, q).

    Args:
      rank: see `RankLike`.
      path: the leaf's path in normal form, for rules and messages.
      layout: the leaf's layout with non-negative axes.
      shape: the leaf's shape.
      fallback: whether a full moment replaces factors that save no memory.

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


def check_rule(
    rank: RankLike,
    leaves: LayoutLeaves,
    roles: Collection[str] = ("embedding", "head", "matrix"),
) -> None:
    """Refuses a mapping with a key that matches nothing, or without a match for any leaf with rows and columns.

    A key may be the path of a leaf that another optimizer trains, so that the result of `suggest_ranks` is
    valid, and it may be a role that the model lacks.

    Raises:
      ValueError: with the key and the nearest name; also for a key that is not a regular expression.
    """
    tables = [
        (path, layout)
        for path, layout in zip(leaves.paths, leaves.layouts, strict=True)
        if layout is not None and layout.role in roles
    ]
    if not isinstance(rank, Mapping) or not tables:
        return
    for key in rank:
        if key in ROLES or key in leaves.paths:
            continue
        if not isinstance(key, str):
            raise ValueError(
                f"rank: key {key!r} is neither a role, a path nor a regular expression."
            )
        if not matches(key, tuple(leaves.paths), "rank: key"):
            near = difflib.get_close_matches(key, ROLES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"{nearest(key, tuple(leaves.paths))}."
            raise ValueError(
                f"rank: key {key!r} is no role ({', '.join(ROLES)}) and matches no parameter; {hint} "
                "Correct the key or remove it."
            )
    if rank and all(_key(rank, path, layout) is None for path, layout in tables):
        path, layout = tables[0]
        raise ValueError(
            f"rank: no key of {sorted(rank)} matches any of the {len(tables)} parameters that could have "
            f"factors, such as {path!r} of role {layout.role!r}."
        )


def warn_of_full_ranks(options_rank: RankLike, leaves: LayoutLeaves) -> None:
    """Warns once, with counts, of ranks that save nothing because full moments replace the factors."""
    asked, useless = 0, []
    for path, layout, leaf in zip(leaves.paths, leaves.layouts, leaves.leaves, strict=True):
        if layout is None or layout.role == "vector" or not math.prod(leaf.shape):
            continue
        if leaf_rank(options_rank, path, layout, leaf.shape, fallback=False) is None:
            continue
        asked += 1
        if leaf_rank(options_rank, path, layout, leaf.shape) is None:
            value = look_up(options_rank, path, layout, tuple(leaf.shape))
            useless.append((path, tuple(leaf.shape), value, layout))
    if not useless:
        return
    path, shape, value, layout = useless[0]
    rows, columns = (
        math.prod(shape[axis] for axis in axes) for axes in (layout.row_axes, layout.column_axes)
    )
    most = (rows * columns - 1) // (rows + columns)
    below = f"up to {most} would" if most else "none would"
    warnings.warn(
        f"rank {value} saves nothing on {len(useless)} of {asked} parameters: full moments take the place of "
        f"factors (the first is {path!r} of shape {shape}, where {below} save).",
        stacklevel=2,
    )


def _key(rank: Mapping[str, Any], path: str, layout: ParamLayout) -> str | None:
    """The key of a mapping that decides for one leaf."""
    if path in rank:
        return path
    for key in rank:
        if key == layout.role or (key not in ROLES and re.search(key, path)):
            return key
    return None


def warn_of_other_roles(
    rank: Mapping[str, Any], leaves: LayoutLeaves, roles: Collection[str]
) -> None:
    """Warns of keys of a mapping that match only parameters without factors.

    Args:
      rank: ranks by path, pattern or role; see `RankLike`.
      leaves: the leaves of all parameters.
      roles: the roles whose moments can be factors.
    """
    found = {
        path: layout.role
        for path, layout in zip(leaves.paths, leaves.layouts, strict=True)
        if layout is not None
    }
    for key, value in rank.items():
        if key in ROLES or key in found or value is None:
            continue
        hit = {path: role for path, role in found.items() if re.search(key, path)}
        if hit and not any(role in roles for role in hit.values()):
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
    """Makes a transformation's init check the keys of ``rank`` on all parameters."""

    def init_fn(params: PyTree) -> PyTree:
        if isinstance(rank, Mapping):
            leaves = flatten_with_layout(layout, params)
            check_rule(rank, leaves, roles)
            warn_of_other_roles(rank, leaves, roles)
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def look_up(rank: Any, path: str, layout: ParamLayout, shape: tuple[int, ...]) -> Any:
    """The rule's result for one leaf: a number or None."""
    if isinstance(rank, Mapping):
        key = _key(rank, path, layout)
        return None if key is None else rank[key]
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
