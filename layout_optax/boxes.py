"""Optimizers for boxed parameters: Flax's metadata stays with the parameters and out of the state."""

from __future__ import annotations

from typing import Any

import jax
import optax

from layout_optax.fit import check_transformation
from layout_optax.layout import PyTree, path_string


def unboxed(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation see arrays where Flax keeps boxes, and boxes its updates again.

    Boxes are Linen's ``nn.Partitioned``, ``nn.LogicallyPartitioned`` and any other ``AxisMetadata``, and NNX's
    ``Variable`` with all its kinds (``Param``). Both carry a partition spec that is true of the parameter
    alone. A `jax.tree.map` in an optimizer would copy it onto statistics of other shapes, where it names axes
    that are not there: `optax.adafactor` fails on such parameters, a thin factor would be sharded along
    the wrong axis. NNX moreover shows an optimizer variables at init and arrays at update.

    With ``unboxed`` outermost the inner transformation sees one and the same tree of arrays, always. Its state
    holds no boxes: it is the state that the unboxed parameters would have, so that checkpoints of
    both are alike. Since the state carries no metadata, ``nn.get_partition_spec`` finds none in it and says
    "replicated"; take the state's shardings from `state_shardings`. Trees without boxes pass through.

    Masks, labels and layouts that are given to ``tx`` as trees are matched with the parameters without boxes.

    Args:
      tx: any optax transformation; `optax.chain` and every other wrapper go inside.

    Returns:
      A transformation with the same state. Updates have the structure of the gradients, each in a
      copy of its gradient's box. Extra arguments reach ``tx`` without boxes too; a function among them is
      called with what ``tx`` sees, arrays.

    Raises:
      TypeError: if ``tx`` is no transformation; at init and update, for a box that is not a pytree node of
        one child (it names the path).

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
        return tx.init(_unbox(params))

    def update_fn(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any):
        new, state = tx.update(_unbox(updates), state, _unbox(params), **_unbox(extra_args))
        return _rebox(updates, new), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def is_box(node: Any) -> bool:
    """Whether a node of a tree is a Linen box or an NNX variable, told by its class's methods."""
    # By the class alone: an instance of an NNX variable forwards unknown names to its array.
    kind = type(node)
    linen = hasattr(kind, "unbox") and hasattr(kind, "replace_boxed")
    return linen or (hasattr(kind, "get_raw_value") and hasattr(kind, "get_metadata"))


def _unbox(tree: PyTree) -> PyTree:
    """The tree with each box replaced by what is in it; boxes may lie in boxes."""

    def content(path: tuple[Any, ...], node: Any) -> Any:
        if not is_box(node):
            return node
        value, _ = _open(path, node)
        return content(path, value) if is_box(value) else _unbox(value)

    return jax.tree_util.tree_map_with_path(content, tree, is_leaf=is_box)


def _rebox(boxed: PyTree, values: PyTree) -> PyTree:
    """The values in copies of the boxes that stand at their places in another tree."""

    def enclose(path: tuple[Any, ...], node: Any, value: Any) -> Any:
        if not is_box(node):
            return value
        inner, box = _open(path, node)
        return box.unflatten([_rebox(inner, value)])

    return jax.tree_util.tree_map_with_path(enclose, boxed, values, is_leaf=is_box)


def _open(path: tuple[Any, ...], box: Any) -> tuple[Any, Any]:
    """What is in a box, and the box itself as a tree structure with one place to fill.

    ``box.unbox()`` would put a sharding constraint on the value, which an abstract value cannot bear, and
    NNX's constructor would place it anew. As a pytree node a box only wraps.
    """
    values, structure = jax.tree_util.tree_flatten(box, is_leaf=lambda node: node is not box)
    if len(values) != 1 or values[0] is box:
        raise TypeError(
            f"unboxed: the box at '{path_string(path)}' is a {type(box).__name__}, which is not a pytree "
            "node with exactly one child. Derive it from flax.linen.Partitioned, or from "
            "flax.struct.PyTreeNode with one field that is a node, or unbox it before the optimizer."
        )
    return values[0], structure
