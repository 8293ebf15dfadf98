"""A table of what was decided for every parameter, so that no routing stays silent."""

from __future__ import annotations

from collections.abc import Container, Sequence

import jax
import numpy as np
import optax

from layout_optax.inference import inference_rules
from layout_optax.layout import LayoutLike, ParamLayout, PyTree, is_empty, path_string
from layout_optax.leaves import flatten_with_layout
from layout_optax.memory import StateLeaf, leaf_bytes, state_leaves
from layout_optax.rules import infer_leaf


def describe(
    params: PyTree,
    tx: optax.GradientTransformation | None = None,
    *,
    layout: LayoutLike = None,
) -> str:
    """Describes the layout of every parameter and, with ``tx``, the state that it gets.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      tx: any optax transformation; its state is read from ``jax.eval_shape(tx.init, params)``, so nothing
        is allocated. Give the same ``layout`` that ``tx`` was made with.
      layout: as every transformation takes it; None infers.

    Returns:
      A text table: path, shape, role, row, column and batch axes, what was assumed; with ``tx`` also the
      transformation that keeps state for the parameter, its rank where it is low-rank, and bytes.

    Raises:
      ValueError: for a leaf that no rule explains.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jax.ShapeDtypeStruct((16, 64), jnp.float32)
      >>> print(describe({"up": {"kernel": kernel}}))
      path      | shape   | role   | rows | columns | batch | assumed
      up/kernel | (16,64) | matrix | 1    | 0       | -     | kernel (in, out)
      total     | 1,024   |        |      |         |       |
    """
    leaves = flatten_with_layout(layout, params)
    reasons = _reasons(params, layout)
    header = ["path", "shape", "role", "rows", "columns", "batch", "assumed"]
    rows, count = [], 0
    for path, found, leaf in zip(leaves.paths, leaves.layouts, leaves.leaves, strict=True):
        if is_empty(leaf):
            continue
        shape = tuple(np.shape(leaf))
        count += int(np.prod(shape, dtype=np.int64))
        rows.append([path, "(" + ",".join(map(str, shape)) + ")", *_axes(found, len(shape))])
        rows[-1].append(reasons[path])
    if tx is None:
        total = [["total", f"{count:,}", *[""] * 5]]
        return _table(header, rows + total)
    state = state_leaves(jax.eval_shape(tx.init, params), params)
    factored = {leaf.place for leaf in state if leaf.field == "left"}
    for row in rows:
        own = [leaf for leaf in state if leaf.owner == row[0]]
        row += [_transformations(own), _rank(own, row[2], factored), _bytes(own)]
    header += ["transformation", "rank", "state bytes"]
    shared = sum(leaf_bytes(leaf.value) for leaf in state if leaf.owner is None)
    total_bytes = sum(leaf_bytes(leaf.value) for leaf in state)
    rows.append(["(shared)", *[""] * 8, f"{shared:,}"])
    rows.append(["total", f"{count:,}", *[""] * 7, f"{total_bytes:,}"])
    return _table(header, rows)


def _reasons(params: PyTree, layout: LayoutLike) -> dict[str, str]:
    """Why each leaf has its layout, by path."""
    rules = inference_rules(layout)
    reasons = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_empty)[0]:
        if not is_empty(leaf):
            shape = np.shape(leaf)
            reason = "given" if rules is None else infer_leaf(keys, shape, rules).note
            reasons[path_string(keys)] = reason
    return reasons


def _axes(layout: ParamLayout | None, ndim: int) -> list[str]:
    if layout is None:
        return ["(not ours)", "-", "-", "-"]
    groups = (layout.row_axes, layout.column_axes, layout.batch_axes(ndim))
    return [layout.role, *(",".join(map(str, axes)) or "-" for axes in groups)]


def _transformations(state: Sequence[StateLeaf]) -> str:
    return "+".join(dict.fromkeys(leaf.transformation for leaf in state)) or "(stateless)"


def _rank(state: Sequence[StateLeaf], role: str, factored: Container[str]) -> str:
    """The rank of a parameter's thin factors, or why a low-rank transformation has none for it.

    Low-rank states keep their factors in fields named left and right, the rank axis second to last, and
    moments without factors in a field named full. ``factored`` are the places of states with factors.
    """
    ranks = {str(leaf.value.shape[-2]) for leaf in state if leaf.field == "left"}
    if ranks:
        return ",".join(sorted(ranks))
    full = [leaf for leaf in state if leaf.field == "full"]
    if not full or role == "vector":
        return "-"
    # Tables that another rule of the same family was meant for are no fallback.
    fallback = role == "matrix" or any(leaf.place in factored for leaf in full)
    return "full-rank fallback" if fallback else "full"


def _bytes(state: Sequence[StateLeaf]) -> str:
    return f"{sum(leaf_bytes(leaf.value) for leaf in state):,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *rows]
    ]
    return "\n".join(lines)
