"""The role of each parameter, and which of its axes are rows and columns.

A layout describes the meaning of axes, not memory; it has nothing to do with XLA's memory layout. All methods
use one rule. ROW axes are the vocabulary of an embedding or head, or the output units of a matrix. COLUMN axes
are the other matrix axes. Every remaining axis is a batch axis (scanned layers, experts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np
import optax

Role = Literal["embedding", "head", "matrix", "vector"]
ROLES: tuple[str, ...] = get_args(Role)
PyTree: TypeAlias = Any
EINSUM_AXES = "abcdefghijklmnopqrstuvwxy"
"""One letter for each axis of a parameter with rows and columns; ``z`` is left for a rank axis."""


@dataclasses.dataclass(frozen=True, init=False)
class ParamLayout:
    """Role and axes of one parameter.

    A frozen, hashable dataclass, and not a pytree node: in a tree of layouts it is a leaf. Negative axes count
    from the end and leave any number of leading axes to the batch. An integer stands for a tuple of one axis.

    Attributes:
      role: ``"embedding"``, ``"head"``, ``"matrix"`` or ``"vector"``.
      row_axes: vocabulary of an embedding or head, output units of a matrix; ``()`` for a vector.
      column_axes: features of an embedding or head, input (reduction) axes of a matrix, entries of a vector.

    Raises:
      ValueError: for an unknown role, a repeated axis, a vector with row axes, or an embedding, head or matrix
        without rows or columns.

    Example:
      >>> ParamLayout("matrix", row_axes=-1, column_axes=-2).batch_axes(ndim=3)
      (0,)
    """

    role: Role
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]

    def __init__(self, role: Role, row_axes: int | Sequence[int], column_axes: int | Sequence[int]):
        """Turns integers into tuples and checks the layout."""
        object.__setattr__(self, "role", role)
        for field, axes in (("row_axes", row_axes), ("column_axes", column_axes)):
            axes = (axes,) if isinstance(axes, (int, np.integer)) else axes
            object.__setattr__(self, field, tuple(int(axis) for axis in axes))
        if self.role not in ROLES:
            raise ValueError(f"ParamLayout: role must be one of {ROLES}, got {self.role!r}.")
        named = self.row_axes + self.column_axes
        if len(set(named)) != len(named):
            raise ValueError(f"ParamLayout: an axis is named twice in {self}.")
        if self.role == "vector" and self.row_axes:
            raise ValueError(f"ParamLayout: a vector has column axes only, got {self}.")
        if self.role != "vector" and not (self.row_axes and self.column_axes):
            raise ValueError(f"ParamLayout: a {self.role} needs row and column axes, got {self}.")

    def resolve(self, ndim: int, path: str = "") -> ParamLayout:
        """Returns the layout with non-negative, sorted axes for a parameter of ``ndim`` axes.

        Raises:
          ValueError: if an axis lies outside the parameter, two entries mean the same axis, or a parameter
            with rows and columns has more than 25 axes.
        """
        rows, columns = (
            tuple(sorted(axis + ndim if axis < 0 else axis for axis in axes))
            for axes in (self.row_axes, self.column_axes)
        )
        where = f" of '{path}'" if path else ""
        if any(not 0 <= axis < ndim for axis in rows + columns):
            raise ValueError(
                f"ParamLayout: {self} names an axis that the parameter{where} does not have ({ndim} "
                "axes). Give a layout that fits its shape."
            )
        if len(set(rows + columns)) != len(rows + columns):
            raise ValueError(f"ParamLayout: {self} names one axis{where} twice ({ndim} axes).")
        if rows and ndim > len(EINSUM_AXES):
            raise ValueError(
                f"ParamLayout: the parameter{where} has {ndim} axes, and a {self.role} can have "
                f"{len(EINSUM_AXES)}. Reshape its batch axes into one."
            )
        return ParamLayout(self.role, rows, columns)

    def batch_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of a parameter of ``ndim`` axes that are neither row nor column axes."""
        resolved = self.resolve(ndim)
        named = resolved.row_axes + resolved.column_axes
        return tuple(axis for axis in range(ndim) if axis not in named)


ANY_LEAF = ParamLayout("vector", (), ())
"""The layout of a leaf with batch axes only, for rules that work entry by entry."""

LayoutLike: TypeAlias = ParamLayout | PyTree | Callable[[PyTree], PyTree] | None
"""The type of every ``layout`` argument: ``None`` (inferred from paths and shapes), one `ParamLayout` for every
leaf, a tree (or prefix tree) of them, or a callable from parameters to a tree."""


def as_layout(spec: Any, path: str = "") -> ParamLayout | None:
    """Reads one layout specification; None if it is ``None`` or ``optax.MaskedNode``.

    It reads objects with ``reduction_axis`` and ``output_axis`` (optax's ``MuonDimensionNumbers`` and
    ``GaLoreDimensionNumbers``) as matrices: output axes are rows, reduction axes are columns.

    Raises:
      TypeError: for anything else.
    """
    if spec is None or isinstance(spec, optax.MaskedNode):
        return None
    if isinstance(spec, ParamLayout):
        return spec
    if hasattr(spec, "reduction_axis") and hasattr(spec, "output_axis"):
        return ParamLayout("matrix", spec.output_axis, spec.reduction_axis)
    where = f" for '{path}'" if path else ""
    raise TypeError(
        f"layout{where}: expected a ParamLayout, None, or dimension numbers, got {spec!r}."
    )


def is_layout_leaf(value: Any) -> bool:
    """Whether a node of a layout tree is a leaf: a layout, dimension numbers, None or a mask."""
    return (
        value is None
        or isinstance(value, (ParamLayout, optax.MaskedNode))
        or (hasattr(value, "reduction_axis") and hasattr(value, "output_axis"))
    )


def is_empty(value: Any) -> bool:
    """Whether a leaf position of a parameter tree has no parameter (``None``, ``MaskedNode``)."""
    return value is None or isinstance(value, optax.MaskedNode)


def path_string(path: Sequence[Any]) -> str:
    """The normal form of a leaf's path: components joined by ``/``, without what a wrapper adds at the end.

    NNX and Linen boxes add an attribute ``value`` at ``init`` that is absent at ``update``. Only that trailing
    attribute is removed, since attention has a submodule of the same name. A node that does not name its
    children (Haliax's ``NamedArray``) adds the number of its child; the number of an only or a first child is
    removed.

    Example:
      >>> path_string((jax.tree_util.DictKey("mlp"), jax.tree_util.GetAttrKey("value")))
      'mlp'
    """
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value"
    if boxed or is_keyless(path):
        path = path[:-1]
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def is_keyless(path: Sequence[Any]) -> bool:
    """Whether a leaf is the first child of a node that does not name its children."""
    return bool(path) and path[-1] == jax.tree_util.FlattenedIndexKey(0)
