"""Optimizers for boxed parameters: Flax's metadata stays with the parameters, not with the state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from layout_optax.fit import check_transformation
from layout_optax.layout import PyTree, path_string
from layout_optax.metadata import (
    Owner,
    has_partition_names,
    is_named_array,
    partition_names,
    with_metadata,
)


def unboxed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Gives a transformation plain arrays instead of Flax's or Haliax's boxes, and boxes its updates again.

    Boxes are Linen's ``nn.Partitioned``, ``nn.LogicallyPartitioned`` and any other ``AxisMetadata``, and NNX's
    ``Variable`` with its subclasses (``Param``). Both carry a partition spec that applies to the parameter
    only. A `jax.tree.map` in an optimizer copies this spec onto statistics of other shapes, where it names axes
    that do not exist. `optax.adafactor` fails on such parameters, and a thin factor would be sharded along the
    wrong axis. NNX also passes variables to an optimizer's init but arrays to its update.

    With ``unboxed`` outermost, the inner transformation always sees the same tree of arrays. For Linen's
    parameters the state holds no boxes: it equals the state of the unboxed parameters, and
    ``nn.get_partition_spec`` finds nothing in it, so take its shardings from `state_shardings`. For NNX
    variables with names on their axes (``out_sharding``), every array of the state is a variable too, with
    those names of its parameter that apply. ``nnx.get_partition_spec`` and ``nnx.get_named_sharding`` of an
    ``nnx.Optimizer`` then agree with `state_shardings`. Trees without boxes pass through.

    Haliax's ``NamedArray`` is such a box too, whose names Levanter's trainer turns into shardings: every
    array of the state is a ``NamedArray`` with the names that apply, its other axes ``state_0``, ``state_1``...

    If masks, labels and layouts are given to ``tx`` as trees, they must match the parameters without boxes.

    Args:
      tx: any optax transformation, with `optax.chain` and every other wrapper inside.

    Returns:
      A transformation with the same state, up to boxes. Updates have the structure of the gradients, each in a
      copy of its gradient's box. Extra arguments reach ``tx`` without boxes too. A function among them receives
      arrays, as ``tx`` does.

    Raises:
      TypeError: if ``tx`` is not a transformation; at init and update for a box that is not a pytree node with
        one child. The message names the path.

    Example:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> params = {"up": {"kernel": nn.Partitioned(jnp.ones((8, 16)), names=("embed", "mlp"))}}
      >>> tx = unboxed(optax.adafactor(1e-3, min_dim_size_to_factor=1))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> updates["up"]["kernel"].names, state[0].v_row["up"]["kernel"].shape
      (('embed', 'mlp'), (8,))
    """
    check_transformation("unboxed", tx)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: PyTree) -> PyTree:
        plain, owners = _unbox(params), _owners(params)
        state = tx.init(plain)
        return _named(with_metadata(tx, plain, owners, state)) if any(owners) else state

    def update_fn(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        new, following = tx.update(
            _unbox(updates), _unbox(state), _unbox(params), **_unbox(extra_args)
        )
        return _rebox(updates, new), _rebox(state, following)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


@jax.tree_util.register_pytree_node_class
class _Nameless(NamedTuple):
    """Stands for a Haliax array inside of ``unboxed``: its child has no key, by which rules know Haliax.

    Where a leaf is masked it stays in the state. Levanter's checkpoints walk through a named tuple.
    """

    array: Any

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> _Nameless:
        return cls(*children)


def _named(state: PyTree) -> PyTree:
    """The state with Haliax arrays in place of the nodes around them."""

    def is_nameless(node: Any) -> bool:
        return isinstance(node, _Nameless)

    def inner(node: Any) -> Any:
        return node.array if is_nameless(node) and is_named_array(node.array) else node

    return jax.tree.map(inner, state, is_leaf=is_nameless)


def is_box(node: Any) -> bool:
    """Whether a node of a tree is a Linen box, an NNX variable or a Haliax array, told by its class."""
    # By the class alone: an instance of an NNX variable forwards unknown names to its array.
    kind = type(node)
    linen = hasattr(kind, "unbox") and hasattr(kind, "replace_boxed")
    variable = hasattr(kind, "get_raw_value") and hasattr(kind, "get_metadata")
    return linen or variable or is_named_array(node)


def refuse_boxes(params: PyTree) -> None:
    """Refuses boxes with axis names: state of other shapes would inherit them and fail far from here.

    Raises:
      TypeError: with the path, and `unboxed` as the remedy.
    """
    for path, node in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box):
        if is_box(node) and _has_names(node):
            raise TypeError(
                f"'{path_string(path)}' is a {type(node).__name__} with names for its axes, which state of "
                "other shapes would inherit. Wrap the whole optimizer: layout_optax.unboxed(tx)."
            )


def _has_names(box: Any) -> bool:
    if is_named_array(box):  # only Levanter's trainer makes shardings of these
        return False
    if hasattr(type(box), "get_metadata"):
        return has_partition_names(box)
    return any(getattr(box, "names", None) or ())


def _unbox(tree: PyTree) -> PyTree:
    """Replaces each box in a tree by its content; boxes may be nested."""

    def content(path: tuple[Any, ...], node: Any) -> Any:
        if not is_box(node):
            return node
        value, _ = _open(path, node)
        if is_named_array(node):
            return _Nameless(value)
        return content(path, value) if is_box(value) else _unbox(value)

    return jax.tree_util.tree_map_with_path(content, tree, is_leaf=is_box)


def _rebox(boxed: PyTree, values: PyTree) -> PyTree:
    """Puts values into copies of the boxes at the same places in another tree."""

    def enclose(path: tuple[Any, ...], node: Any, value: Any) -> Any:
        if not is_box(node):
            return value
        inner, box = _open(path, node)
        return box.unflatten([_rebox(inner, value.array if is_named_array(node) else value)])

    return jax.tree_util.tree_map_with_path(enclose, boxed, values, is_leaf=is_box)


def _owners(params: PyTree) -> list[Owner | None]:
    """For each leaf of the parameters without boxes, the box with axis names, or None."""
    owners: list[Owner | None] = []
    for node in jax.tree.leaves(params, is_leaf=is_box):
        values = jax.tree.leaves(_unbox(node))
        names = None
        if is_box(node) and len(values) == 1:
            names = partition_names(node, jnp.ndim(values[0]))
        owners += [None] * len(values) if names is None else [Owner(node, values[0], names)]
    return owners


def _open(path: tuple[Any, ...], box: Any) -> tuple[Any, Any]:
    """The content of a box, and the box itself as a tree structure with one place to fill.

    ``box.unbox()`` would put a sharding constraint on the value, which fails for an abstract value, and NNX's
    constructor would place the value again. As a pytree node a box only wraps its content.
    """
    values, structure = jax.tree_util.tree_flatten(box, is_leaf=lambda node: node is not box)
    if len(values) != 1 or values[0] is box:
        raise TypeError(
            f"unboxed: the box at '{path_string(path)}' is a {type(box).__name__}, which is not a pytree "
            "node with exactly one child. Derive it from flax.linen.Partitioned, or from "
            "flax.struct.PyTreeNode with one field that is a node, or unbox it before the optimizer."
        )
    return values[0], structure
