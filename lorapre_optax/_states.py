"""Finds low-rank moments, and the parameters they belong to, in the state of any optax chain.

`optax.partition` and `optax.masked` may replace a whole subtree by one ``MaskedNode``, so nodes are found by
path and not by the structure of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from layout_optax.layout import LayoutLike, ParamLayout, PyTree, is_empty, path_string
from layout_optax.leaves import flatten_with_layout
from lorapre_optax._adam import LorapreAdamState
from lorapre_optax._moment import LowRankState, factor_shapes


class Moment(NamedTuple):
    """One parameter's part of a `LowRankState`; ``MaskedNode`` for absent fields."""

    path: str
    left: Any
    right: Any
    full: Any

    @property
    def factored(self) -> bool:
        """Whether the moment is stored as factors."""
        return not is_empty(self.left)


class Owner(NamedTuple):
    """The parameter, gradient or shape that a moment belongs to; ``layout`` is None for an unmanaged leaf."""

    layout: ParamLayout | None
    leaf: Any


def moments(state: LowRankState) -> list[Moment]:
    """The moments of a state, empty ones included, in the order of its trees."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(state.left, is_leaf=is_empty)
    rows = zip(with_paths, *map(treedef.flatten_up_to, (state.right, state.full)), strict=True)
    return [Moment(path_string(keys), left, right, full) for (keys, left), right, full in rows]


def with_moments(state: LowRankState, new: list[Moment]) -> LowRankState:
    """Replaces the moments of a state, in the order of `moments`."""
    treedef = jax.tree_util.tree_structure(state.left, is_leaf=is_empty)
    trees = (treedef.unflatten([getattr(each, f) for each in new]) for f in Moment._fields[1:])
    return LowRankState(state.count, *trees)


def is_factored(state: LowRankState) -> bool:
    """Whether any moment of a state is stored as factors."""
    return any(moment.factored for moment in moments(state))


def first_moments(state: PyTree) -> Iterator[LowRankState]:
    """The low-rank states in an optimizer state; of Adam's two moments only the first."""
    for node in jax.tree.leaves(state, is_leaf=_is_low_rank):
        if _is_low_rank(node):
            yield node.mu if isinstance(node, LorapreAdamState) else node


def map_states(
    first: Callable[[LowRankState], LowRankState],
    second: Callable[[LowRankState], LowRankState],
    state: PyTree,
) -> tuple[PyTree, int]:
    """Maps the low-rank states in an optimizer state; also returns how many nodes hold them.

    Args:
      first: function of first moments and of states outside Adam.
      second: function of Adam's second moments, whose factors follow abs(G) and whose full moments follow G^2.
      state: the state of any optax chain.
    """
    found = 0

    def visit(node):
        nonlocal found
        if not _is_low_rank(node):
            return node
        found += 1
        if isinstance(node, LorapreAdamState):
            return LorapreAdamState(first(node.mu), second(node.nu))
        return first(node)

    return jax.tree.map(visit, state, is_leaf=_is_low_rank), found


def owners(params: PyTree, layout: LayoutLike) -> dict[str, Owner]:
    """The leaves of a tree and their layouts, by path, without empty leaves."""
    leaves = flatten_with_layout(layout, params)
    rows = zip(leaves.paths, leaves.layouts, leaves.leaves, strict=True)
    return {path: Owner(found, leaf) for path, found, leaf in rows if not is_empty(leaf)}


def owner_of(moment: Moment, found: Mapping[str, Owner], name: str) -> tuple[ParamLayout, Any]:
    """The layout and leaf of a moment that is not empty.

    Args:
      moment: a moment.
      found: see `owners`.
      name: the name of the tree of leaves, for messages.

    Raises:
      ValueError: if the tree has no such leaf, or a leaf that does not fit the moment; it names the path.
    """
    path = moment.path
    if path not in found:
        raise ValueError(f"the state has a moment for '{path}', which {name} does not have.")
    layout, leaf = found[path]
    if layout is None:
        raise ValueError(
            f"the state has a moment for '{path}', which this layout leaves unmanaged. Give the "
            "layout that the optimizer was made with."
        )
    if moment.factored:
        rank = moment.left.shape[-2] if moment.left.ndim > 1 else 0
        expected = factor_shapes(leaf.shape, layout, rank)
        actual = (moment.left.shape, moment.right.shape)
    else:
        expected, actual = tuple(leaf.shape), moment.full.shape
    if actual != expected:
        raise ValueError(
            f"the moment of '{path}' has shape {actual}, but a leaf of shape {tuple(leaf.shape)} with "
            f"rows {layout.row_axes} and columns {layout.column_axes} has {expected}. Only ranks can "
            f"differ: give the layout and the {name} that the optimizer was made with."
        )
    return layout, leaf


def _is_low_rank(node: Any) -> bool:
    return isinstance(node, (LorapreAdamState, LowRankState))
