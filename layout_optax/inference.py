"""Infers a tree of layouts: each leaf from its path and shape, then warnings about the whole tree."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from layout_optax.doubts import check_rules, warn_of_guesses, warn_of_roles
from layout_optax.layout import PyTree, is_empty, path_string
from layout_optax.rules import Inferred, Rule, UnexplainedLeafError, infer_leaf


def infer_layout(params: PyTree, rules: Sequence[Rule] = ()) -> PyTree:
    """Infers the `ParamLayout` of every parameter from its path and shape.

    To add rules to a transformation, pass ``layout=functools.partial(infer_layout, rules=[...])``.

    Inference makes two assumptions that `describe` prints. A leaf under a ``layers`` or ``blocks`` component
    without an index is a stack with one more leading axis. MaxText's ``decoder/layers`` keeps that axis second.
    Inference reads a gate and an up projection that are fused in one axis as one matrix.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      rules: ``(pattern, layout)`` pairs, tried before the presets; the first match wins. The pattern is a
        regular expression searched in the path (``layers/0/mlp/up/kernel``). The layout is a `ParamLayout`
        (negative axes leave leading axes to the batch), a role, or None for an unmanaged leaf, which the
        hybrids train with AdamW.

    Returns:
      A tree like ``params`` with a `ParamLayout` at each leaf and ``optax.MaskedNode()`` at unmanaged leaves.

    Raises:
      ValueError: for a named leaf that no rule explains, with its path and the rule to add; for a rule that
        matches no parameter or is not a regular expression.

    Warns:
      LayoutWarning: for leaves with an uncertain layout, with the rules to add; once for each message.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = infer_layout({"lm_head": {"kernel": jnp.ones((8, 100))}})
      >>> tree["lm_head"]["kernel"]
      ParamLayout(role='head', row_axes=(1,), column_axes=(0,))
    """
    found = iter(infer_leaves(params, rules))

    def layout_of(leaf):
        inferred = next(found)
        return leaf if inferred is None else inferred.layout or optax.MaskedNode()

    return jax.tree.map(layout_of, params, is_leaf=is_empty)


def infer_leaves(params: PyTree, rules: Sequence[Rule] = ()) -> list[Inferred | None]:
    """Applies `infer_leaf` to every leaf (None where there is no parameter) and checks the whole tree.

    Raises:
      ValueError: see `infer_layout`.
    """
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_empty)
    present = [(keys, tuple(np.shape(leaf))) for keys, leaf in flat if not is_empty(leaf)]
    paths = [path_string(keys) for keys, _ in present]
    whole = not any(isinstance(leaf, optax.MaskedNode) for _, leaf in flat)
    if rules and whole and any(paths):  # a bare array has no name to match
        check_rules(tuple(rules), tuple(paths))
    try:
        inferred = [infer_leaf(keys, shape, rules) for keys, shape in present]
    except UnexplainedLeafError as error:
        raise UnexplainedLeafError(
            error.path, error.shape, error.stack, _features(present, rules)
        ) from None
    if whole:
        warn_of_guesses(tuple(paths), tuple(shape for _, shape in present), tuple(inferred))
    rest = iter(inferred)
    return [None if is_empty(leaf) else next(rest) for _, leaf in flat]


def _features(present: Sequence[tuple[Any, tuple[int, ...]]], rules: Sequence[Rule]) -> set[int]:
    """Lengths of the feature axes of the embeddings."""
    lengths = set()
    for keys, shape in present:
        try:
            layout = infer_leaf(keys, shape, rules).layout
        except UnexplainedLeafError:
            continue
        if layout is not None and layout.role == "embedding" and len(layout.column_axes) == 1:
            lengths.add(shape[layout.column_axes[0]])
    return lengths


def warn_of_missed_tables(layout: Any, params: PyTree) -> None:
    """Warns of embeddings and heads that inference may have read as matrices; given layouts are not checked."""
    rules = inference_rules(layout)
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_empty)
    if rules is None or any(isinstance(leaf, optax.MaskedNode) for _, leaf in flat):
        return
    present = [(keys, tuple(np.shape(leaf))) for keys, leaf in flat if not is_empty(leaf)]
    warn_of_roles(
        [path_string(keys) for keys, _ in present],
        [shape for _, shape in present],
        [infer_leaf(keys, shape, rules) for keys, shape in present],
    )


def inference_rules(layout: Any) -> tuple[Rule, ...] | None:
    """The rules of an inferred layout; None if the layout is given in another way."""
    if layout is None or layout is infer_layout:
        return ()
    if isinstance(layout, functools.partial) and layout.func is infer_layout and not layout.args:
        return tuple(layout.keywords.get("rules", ()))
    return None


__all__ = ["infer_layout", "infer_leaves", "inference_rules", "warn_of_missed_tables"]
