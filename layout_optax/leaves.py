"""Flattens a tree of parameters into leaves, each with its path and its layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from layout_optax.fit import check_trainable, misfit
from layout_optax.inference import infer_leaves
from layout_optax.layout import (
    LayoutLike,
    ParamLayout,
    PyTree,
    as_layout,
    is_empty,
    is_layout_leaf,
    path_string,
)
from layout_optax.rules import infer_leaf


@dataclasses.dataclass(frozen=True)
class LayoutLeaves:
    """The leaves of a tree with their paths and layouts; see `flatten_with_layout`.

    Attributes:
      treedef: the tree's structure, in which ``None`` and ``MaskedNode`` count as leaves.
      paths: the leaves' paths in normal form.
      layouts: each leaf's layout with non-negative axes, or None if the leaf is empty or unmanaged.
      leaves: the leaves.
    """

    treedef: Any
    paths: list[str]
    layouts: list[ParamLayout | None]
    leaves: list[Any]

    def align(self, tree: PyTree) -> list[Any]:
        """Returns the nodes of another tree (a state field) at these leaves' positions.

        Raises:
          ValueError: if the tree has other leaves, so the state belongs to other parameters. It names a path.
        """
        try:
            return self.treedef.flatten_up_to(tree)
        except (ValueError, TypeError):
            raise misfit(self.paths, self.leaves, tree) from None

    def check_trainable(self) -> None:
        """Refuses managed leaves that are not real floating-point arrays, by path.

        Raises:
          TypeError: see `layout_optax.fit.check_trainable`.
        """
        for path, layout, leaf in zip(self.paths, self.layouts, self.leaves, strict=True):
            if layout is not None:
                check_trainable(path, leaf)

    def unflatten(self, values: Sequence[Any]) -> PyTree:
        """A tree of this structure with the given values at the leaves."""
        return self.treedef.unflatten(values)

    def map(self, fn: Callable[..., Any], *trees: PyTree, other: Any = optax.MaskedNode) -> PyTree:
        """Maps ``fn(path, layout, leaf, *nodes)`` over the managed leaves.

        ``other`` gives the value at unmanaged leaves: a function without arguments, or ``"leaf"`` to pass the
        leaf through. Empty leaves stay as they are.
        """
        rows = zip(self.paths, self.layouts, self.leaves, *map(self.align, trees), strict=True)
        values = []
        for path, layout, leaf, *nodes in rows:
            if layout is not None:
                values.append(fn(path, layout, leaf, *nodes))
            else:
                values.append(leaf if is_empty(leaf) or other == "leaf" else other())
        return self.unflatten(values)


def flatten_with_layout(layout: LayoutLike, tree: PyTree) -> LayoutLeaves:
    """Flattens a tree of parameters, gradients or shapes and finds each leaf's layout.

    ``None`` and ``optax.MaskedNode`` positions of ``tree`` stay and have no layout, so a layout given as a tree
    works inside `optax.partition` and `optax.masked`. In a layout tree ``None`` means "infer" and
    ``MaskedNode`` means "unmanaged".

    Args:
      layout: see `LayoutLike`.
      tree: any pytree whose leaves have a ``shape``.

    Raises:
      ValueError: if a leaf has no layout in the given tree, or none can be inferred; it names the path.
      TypeError: if the layout tree holds something that is not a layout.
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)
    paths = [path_string(path) for path, _ in with_paths]
    leaves = [leaf for _, leaf in with_paths]
    if all(map(is_empty, leaves)):  # includes placeholder trees of optax.tree.map_params
        return LayoutLeaves(treedef, paths, [None] * len(leaves), leaves)
    if callable(layout) and not isinstance(layout, ParamLayout) and not is_layout_leaf(layout):
        layout = layout(tree)
    if layout is None:
        inferred = infer_leaves(tree)
        layouts = [None if found is None else found.layout for found in inferred]
        return LayoutLeaves(treedef, paths, layouts, leaves)
    find = _finder(layout, with_paths, paths)
    layouts = []
    for (_, leaf), path in zip(with_paths, paths, strict=True):
        found = None if is_empty(leaf) else find(path)
        layouts.append(None if found is None else found.resolve(len(np.shape(leaf)), path))
    return LayoutLeaves(treedef, paths, layouts, leaves)


def _finder(layout: Any, with_paths: Any, paths: list[str]) -> Callable[[str], ParamLayout | None]:
    """A function from a leaf's path to its layout, or None for an unmanaged leaf."""
    by_path = dict(zip(paths, with_paths, strict=True))

    def infer(path: str) -> ParamLayout | None:
        keys, leaf = by_path[path]
        return infer_leaf(keys, np.shape(leaf)).layout

    if is_layout_leaf(layout):
        one = as_layout(layout)
        return lambda path: one
    given = {
        path_string(path): spec
        for path, spec in jax.tree_util.tree_flatten_with_path(layout, is_leaf=is_layout_leaf)[0]
    }

    def look_up(path: str) -> ParamLayout | None:
        prefix = path
        while prefix not in given:
            if not prefix:
                raise ValueError(
                    f"layout: the layout tree has no entry for '{path}'. Add one there or above it "
                    "(a ParamLayout, None to infer it, optax.MaskedNode() to leave it alone)."
                )
            prefix = prefix.rpartition("/")[0]
        return infer(path) if given[prefix] is None else as_layout(given[prefix], path)

    return look_up


def resolve_layout(layout: LayoutLike, params: PyTree) -> PyTree:
    """Returns a tree shaped like ``params`` with a `ParamLayout` at every managed leaf.

    Unmanaged leaves become ``optax.MaskedNode()``; empty leaves stay. The result is a valid ``layout``
    argument.

    Args:
      layout: see `LayoutLike`.
      params: any pytree of arrays or shapes.

    Raises:
      ValueError: see `flatten_with_layout`.

    Example:
      >>> import jax.numpy as jnp
      >>> resolve_layout(None, {"norm": {"scale": jnp.ones(8)}})
      {'norm': {'scale': ParamLayout(role='vector', row_axes=(), column_axes=(0,))}}
    """
    return flatten_with_layout(layout, params).map(lambda path, layout, leaf: layout)
