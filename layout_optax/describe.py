"""Prints the layout, the transformation and the state of every parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.extend.core import Literal

from layout_optax.inference import inference_rules
from layout_optax.layout import LayoutLike, ParamLayout, PyTree, is_empty, path_string
from layout_optax.leaves import flatten_with_layout
from layout_optax.memory import StateLeaf, leaf_bytes, state_leaves
from layout_optax.notes import Note, collect
from layout_optax.rules import infer_leaf


def describe(
    params: PyTree,
    tx: optax.GradientTransformation | None = None,
    *,
    layout: LayoutLike = None,
) -> str:
    """Returns a text table of every parameter's layout and, with ``tx``, its optimizer state.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      tx: any optax transformation. `describe` evaluates ``tx.init`` abstractly and allocates nothing. Pass the
        same ``layout`` as to ``tx``.
      layout: see `layout_optax.LayoutLike`; None infers it.

    Returns:
      A text table with path, shape, role, row, column and batch axes, and the rule that decided, marked if it
      is a guess. With ``tx`` it also shows the transformation that trains the parameter, its rank if it is
      low-rank, and the bytes of its state. ``(stateless)`` marks a parameter that a transformation without
      state or name trains, ``(frozen)`` one that is not trained, and ``(unmanaged)`` one that a layout rule
      excludes.

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
    with collect() as notes:
        shapes = jax.eval_shape(tx.init, params)
    state = state_leaves(shapes, params)
    said: dict[str, list[Note]] = {}
    for note in notes:
        said.setdefault(note.path, []).append(note)
    silent = {row[0] for row in rows} - set(said) - {leaf.owner for leaf in state}
    frozen = _frozen(tx, params, shapes) if silent else set()
    for row in rows:
        own = [leaf for leaf in state if leaf.owner == row[0]]
        trains = _transformations(own, said.get(row[0], []))
        row.append(trains or ("(frozen)" if row[0] in frozen else "(stateless)"))
        row += [_rank(said.get(row[0], []), row[2]), _bytes(own)]
    header += ["transformation", "rank", "state bytes"]
    shared = sum(leaf_bytes(leaf.value) for leaf in state if leaf.owner is None)
    total_bytes = sum(leaf_bytes(leaf.value) for leaf in state)
    rows.append(["(shared)", *[""] * 8, f"{shared:,}"])
    rows.append(["total", f"{count:,}", *[""] * 7, f"{total_bytes:,}"])
    return _table(header, rows)


def _reasons(params: PyTree, layout: LayoutLike) -> dict[str, str]:
    """The reason for each leaf's layout, by path."""
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
        return ["(unmanaged)", "-", "-", "-"]
    groups = (layout.row_axes, layout.column_axes, layout.batch_axes(ndim))
    return [layout.role, *(",".join(map(str, axes)) or "-" for axes in groups)]


def _transformations(state: Sequence[StateLeaf], notes: Sequence[Note]) -> str:
    """The transformations that train a parameter: those noted, and the states without a note."""
    spoken = {note.state for note in notes}
    names = [leaf.transformation for leaf in state if leaf.transformation not in spoken]
    return "+".join(dict.fromkeys([*names, *(note.transformation for note in notes)]))


def _rank(notes: Sequence[Note], role: str) -> str:
    """The ranks of a parameter's factors, or the reason why a low-rank transformation has none."""
    ranks = dict.fromkeys(note.rank for note in notes if note.rank)
    numbers = [rank for rank in ranks if rank.isdigit()]
    whole = [] if role == "vector" else list(ranks)
    return ",".join(sorted(numbers, key=int) or whole) or "-"


def _frozen(tx: optax.GradientTransformation, params: PyTree, state: PyTree) -> set[str]:
    """Paths of the parameters whose update depends on neither their gradient nor their value."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    try:
        jaxpr = jax.make_jaxpr(lambda g, s, p: tx.update(g, s, p)[0])(params, state, params).jaxpr
    except Exception:  # the update needs more than gradients and parameters, so nothing is known
        return set()
    count = len(flat)
    depends: dict[Any, set[int]] = {}  # variable -> indices of the parameters it depends on
    for position, variable in enumerate(jaxpr.invars):
        behind = len(jaxpr.invars) - position
        own = {position} if position < count else {count - behind} if behind <= count else set()
        depends[variable] = own
    for equation in jaxpr.eqns:
        inputs = [v for v in equation.invars if not isinstance(v, Literal)]
        union = set().union(*(depends.get(v, set()) for v in inputs))
        depends.update(dict.fromkeys(equation.outvars, union))
    frozen = set()
    for index, ((keys, _), out) in enumerate(zip(flat, jaxpr.outvars, strict=True)):
        if isinstance(out, Literal) or index not in depends.get(out, set()):
            frozen.add(path_string(keys))
    return frozen


def _bytes(state: Sequence[StateLeaf]) -> str:
    return f"{sum(leaf_bytes(leaf.value) for leaf in state):,}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *rows]
    ]
    return "\n".join(lines)
