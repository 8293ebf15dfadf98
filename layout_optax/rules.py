"""From a leaf's path and shape to its layout: the user's rules, then the names that frameworks use.

Stacks of layers come off first (`layout_optax.stacks`), then the names are looked up (`layout_optax.presets`).
Inference looks at one leaf at a time, so it gives the same answer on the whole tree and on the masked
trees inside `optax.partition`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from layout_optax.layout import (
    LayoutLike,
    ParamLayout,
    PyTree,
    Role,
    as_layout,
    is_empty,
    is_keyless,
    path_string,
)
from layout_optax.presets import DEFAULT, EMBEDDING, HEAD_KERNEL, KERNEL, SCALAR, VECTOR
from layout_optax.stacks import Stack, find_stack

Rule: TypeAlias = tuple[str, "ParamLayout | Role | None"]
"""A regular expression searched in the leaf's path, and its layout, its role, or None (not ours)."""

_BY_ROLE: Mapping[str, ParamLayout] = {
    "embedding": EMBEDDING,
    "head": HEAD_KERNEL,
    "matrix": KERNEL,
    "vector": VECTOR,
}


@dataclasses.dataclass(frozen=True)
class Inferred:
    """A leaf's layout (None: not ours) and, for `describe`, why it was chosen."""

    layout: ParamLayout | None
    assumed: str


def infer_leaf(keys: Sequence[Any], shape: tuple[int, ...], rules: Sequence[Rule] = ()) -> Inferred:
    """The layout of one leaf from its key path and shape.

    Args:
      keys: the leaf's key path, as `jax.tree_util.tree_flatten_with_path` gives it.
      shape: the leaf's shape.
      rules: the user's rules; the first whose pattern is found in the path decides.

    Raises:
      ValueError: if nothing explains the leaf; the message gives its path and the rule to add.
    """
    named = any(_is_name(key) for key in keys)
    return _infer(path_string(keys), named, is_keyless(keys), tuple(shape), tuple(rules))


@functools.lru_cache(
    maxsize=65536
)  # a hybrid asks at every leaf for its role, its rate and its direction
def _infer(
    path: str, named: bool, keyless: bool, shape: tuple[int, ...], rules: tuple[Rule, ...]
) -> Inferred:
    """`infer_leaf` of a path, which tries the rules once for a leaf of a model."""
    ndim = len(shape)
    for pattern, value in rules:
        if re.search(pattern, path):
            return Inferred(_read_rule(pattern, value, path, ndim), f"rule {pattern!r}")
    if not named:
        layouts = {0: SCALAR, 1: VECTOR}
        reason = "unnamed: last two axes (in, out)" if ndim > 1 else "unnamed"
        return Inferred(layouts.get(ndim, KERNEL).resolve(ndim), reason)
    name = path.replace(".", "/")  # the flat names of a state dictionary
    stack = find_stack(name, ndim)
    kept = [axis for axis in range(ndim) if axis not in stack.axes]
    layer = tuple(shape[axis] for axis in kept)
    for preset in DEFAULT:
        if (layout := preset.find(name, layer, keyless)) is not None:
            layout = layout.resolve(len(layer), path)
            rows, columns = (
                [kept[axis] for axis in axes] for axes in (layout.row_axes, layout.column_axes)
            )
            return Inferred(ParamLayout(layout.role, rows, columns), preset.name + stack.note)
    raise ValueError(_unexplained(path, shape, stack))


def infer_layout(params: PyTree, rules: Sequence[Rule] = ()) -> PyTree:
    """Infers the `ParamLayout` of every parameter from its path and shape.

    To give a transformation rules of your own, pass
    ``layout=functools.partial(infer_layout, rules=[...])``.

    Two readings are assumptions that `describe` prints: a leaf under a ``layers`` or ``blocks`` component
    that carries no index is a stack with one more leading axis, and MaxText's ``decoder/layers`` keeps
    that axis second. A gate and an up projection fused in one axis cannot be expressed: they are one
    matrix here.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      rules: ``(pattern, layout)`` pairs, tried before the presets, first match wins. The pattern is a
        regular expression searched in the path (``layers/0/mlp/up/kernel``); the layout is a
        `ParamLayout` (negative axes leave leading axes to the batch), a role, or None: not ours,
        which the hybrids give to AdamW.

    Returns:
      A tree like ``params`` with a `ParamLayout` at each leaf, ``optax.MaskedNode()`` where not ours.

    Raises:
      ValueError: for a named leaf that no rule explains, with its path and the rule to add.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = infer_layout({"lm_head": {"kernel": jnp.ones((8, 100))}})
      >>> tree["lm_head"]["kernel"]
      ParamLayout(role='head', row_axes=(1,), column_axes=(0,))
    """

    def infer(keys, leaf):
        if is_empty(leaf):
            return leaf
        return infer_leaf(keys, np.shape(leaf), rules).layout or optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(infer, params, is_leaf=is_empty)


def _is_name(key: Any) -> bool:
    """Whether a key of a path is a word, as against a position in a list."""
    name = path_string((key,))
    return bool(name) and not name.lstrip("-").isdigit()


def _read_rule(pattern: str, value: Any, path: str, ndim: int) -> ParamLayout | None:
    if isinstance(value, str):
        if value not in _BY_ROLE:
            raise ValueError(
                f"rule {pattern!r}: unknown role {value!r}; use one of {tuple(_BY_ROLE)}, a "
                "ParamLayout, or None."
            )
        value = SCALAR if value == "vector" and ndim == 0 else _BY_ROLE[value]
    layout = as_layout(value, path)
    return None if layout is None else layout.resolve(ndim, path)


def _unexplained(path: str, shape: tuple[int, ...], stack: Stack) -> str:
    assumed = f" (read as a stack{stack.note}: its 'layers' or 'blocks' has no index)"
    return (
        f"layout: no rule explains '{path}' of shape {shape}{assumed if stack.axes else ''}. Say which "
        "axes are its rows (outputs) and columns (inputs); the others are batch axes: "
        f"layout=functools.partial(infer_layout, rules=[(r'{re.escape(path)}$', "
        "ParamLayout('matrix', row_axes=(-1,), column_axes=(-2,)))]), or None instead of the layout to "
        "leave it to AdamW."
    )


__all__ = ["Inferred", "LayoutLike", "Rule", "infer_layout", "infer_leaf"]
