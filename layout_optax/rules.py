"""Infers a leaf's layout from its path and shape: the user's rules first, then names from frameworks.

`layout_optax.stacks` removes the axes of layer stacks, then `layout_optax.presets` finds the names. Inference
looks at one leaf at a time, so it gives the same answer on the whole tree and on the masked trees inside
`optax.partition`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from layout_optax.layout import (
    LayoutLike,
    ParamLayout,
    Role,
    as_layout,
    is_keyless,
    path_string,
)
from layout_optax.presets import (
    DEFAULT,
    EMBEDDING,
    EXPERTS,
    HEAD_KERNEL,
    KERNEL,
    SCALAR,
    VECTOR,
    Preset,
)
from layout_optax.stacks import Stack, find_stack

Rule: TypeAlias = tuple[str, "ParamLayout | Role | None"]
"""A regular expression searched in the leaf's path, and a layout, a role, or None for an unmanaged leaf."""

_BY_ROLE: Mapping[str, ParamLayout] = {
    "embedding": EMBEDDING,
    "head": HEAD_KERNEL,
    "matrix": KERNEL,
    "vector": VECTOR,
}


@dataclasses.dataclass(frozen=True)
class Inferred:
    """A leaf's layout and the reason for it.

    Attributes:
      layout: the layout with non-negative axes; None if the leaf is unmanaged.
      assumed: the deciding rule or preset, as `describe` prints it.
      grade: ``"rule"`` for a rule of the user; otherwise see `Preset.grade`.
      guess: the uncertainty about the layout, or empty.
      other: the layout if the guess is wrong, or None.
    """

    layout: ParamLayout | None
    assumed: str
    grade: Literal["rule", "name", "general", "shape"] = "name"
    guess: str = ""
    other: ParamLayout | None = None

    @property
    def note(self) -> str:
        """``assumed``, marked if it is a guess."""
        by_shape = self.grade == "shape" and self.layout is not None and self.layout.row_axes
        return f"guess: {self.assumed}" if self.guess or by_shape else self.assumed


def infer_leaf(keys: Sequence[Any], shape: tuple[int, ...], rules: Sequence[Rule] = ()) -> Inferred:
    """Infers the layout of one leaf from its key path and shape.

    Args:
      keys: the leaf's key path, as from `jax.tree_util.tree_flatten_with_path`.
      shape: the leaf's shape.
      rules: the user's rules; the first rule whose pattern matches the path decides.

    Raises:
      ValueError: if no rule matches the leaf; the message gives its path and the rule to add.
    """
    named = any(_is_name(key) for key in keys)
    return _infer(path_string(keys), named, is_keyless(keys), tuple(shape), tuple(rules))


@functools.lru_cache(
    maxsize=65536
)  # a hybrid asks for role, learning rate and direction of every leaf
def _infer(
    path: str, named: bool, keyless: bool, shape: tuple[int, ...], rules: tuple[Rule, ...]
) -> Inferred:
    """`infer_leaf` of a path, cached so that the rules are tried once for each leaf."""
    ndim = len(shape)
    for pattern, value in rules:
        if re.search(pattern, path):
            layout = _read_rule(pattern, value, path, ndim)
            return Inferred(layout, f"rule {pattern!r}", "rule")
    if not named:
        layouts = {0: SCALAR, 1: VECTOR}
        reason = "unnamed: last two axes (in, out)" if ndim > 1 else "unnamed"
        return Inferred(layouts.get(ndim, KERNEL).resolve(ndim), reason, "shape")
    name = path.replace(".", "/")  # the flat names of a state dictionary
    stack = find_stack(name, ndim)
    found = _look_up(name, keyless, shape, stack)
    if found is None:
        raise UnexplainedLeafError(path, shape, stack)
    preset, layout = found
    guess, other = preset.guess, None
    if stack.guess:
        guess = stack.guess
        again = _look_up(name, keyless, shape, Stack((1,))) if ndim > 1 else None
        other = None if again is None else again[1]
    elif guess:
        other = ParamLayout(layout.role, layout.column_axes, layout.row_axes)
    return Inferred(layout, preset.name + stack.note, preset.grade, guess, other)


def _look_up(
    name: str, keyless: bool, shape: tuple[int, ...], stack: Stack
) -> tuple[Preset, ParamLayout] | None:
    """Finds the first preset for one layer of a leaf, and the layout of the whole leaf."""
    kept = [axis for axis in range(len(shape)) if axis not in stack.axes]
    layer = tuple(shape[axis] for axis in kept)
    for preset in DEFAULT:
        if (layout := preset.find(name, layer, keyless)) is not None:
            layout = layout.resolve(len(layer), name)
            rows, columns = (
                [kept[axis] for axis in axes] for axes in (layout.row_axes, layout.column_axes)
            )
            return preset, ParamLayout(layout.role, rows, columns)
    return None


def _is_name(key: Any) -> bool:
    """Whether a key of a path is a word rather than a position in a list."""
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


class UnexplainedLeafError(ValueError):
    """Signals a named leaf that no rule explains; the message gives its path and the rule to add."""

    def __init__(
        self, path: str, shape: tuple[int, ...], stack: Stack, features: Collection[int] = ()
    ):
        """Takes the feature sizes of the model, if known, to tell which axes are rows and columns."""
        self.path, self.shape, self.stack = path, shape, stack
        assumed = f" (read as a stack{stack.note}: its 'layers' or 'blocks' has no index)"
        rows, columns = _suggested_axes(path, shape, stack, features)
        super().__init__(
            f"layout: no rule explains '{path}' of shape {shape}{assumed if stack.axes else ''}. Say which "
            "axes are its rows (outputs) and columns (inputs); the others are batch axes: "
            f"layout=functools.partial(infer_layout, rules=[(r'{anchored(path)}', "
            f"ParamLayout('matrix', row_axes={rows}, column_axes={columns}))]), or None instead of the "
            "layout to leave it to AdamW."
        )


def _suggested_axes(
    path: str, shape: tuple[int, ...], stack: Stack, features: Collection[int]
) -> tuple[str, str]:
    """Rows and columns to suggest; ``OUTPUTS`` and ``INPUTS`` where they are unknown."""
    axes = [axis for axis in range(len(shape)) if axis not in stack.axes]
    inner = [axis for axis in axes if shape[axis] in features]
    if re.search(r"(?i)conv", path) and len(axes) > 2:
        rows, columns = axes[-1:], axes[:-1]
    elif len(axes) < 2 or len(inner) != 1:
        return "OUTPUTS", "INPUTS"
    else:
        if EXPERTS.search(path) and len(axes) == 3 and inner[0] != axes[0]:
            axes = axes[1:]  # one matrix per expert
        others = [axis for axis in axes if axis != inner[0]]
        rows, columns = (inner, others) if inner[0] == axes[-1] else (others, inner)
    return str(tuple(rows)), str(tuple(columns))


def anchored(path: str) -> str:
    """A pattern that matches only this path."""
    return f"^{re.escape(path)}$"


__all__ = ["Inferred", "LayoutLike", "Rule", "UnexplainedLeafError", "anchored", "infer_leaf"]
