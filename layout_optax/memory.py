"""How many bytes an optimizer's state takes, leaf by leaf, without allocating any of it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from layout_optax.roles import PyTree, is_empty, path_string


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """Bytes of the state that ``tx.init(params)`` would make, by abstract evaluation.

    Counts what is stored: int8 codes as one byte an entry, a bfloat16 momentum as two.

    Args:
      tx: any optax transformation.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jax.ShapeDtypeStruct((1000, 64), jnp.float32)}
      >>> state_bytes(optax.adam(1e-3), params)  # two moments and a counter
      512004
    """
    return tree_bytes(jax.eval_shape(tx.init, params))


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays or shapes in a pytree."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(leaf: Any) -> int:
    """Bytes of one array or `jax.ShapeDtypeStruct`."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class StateLeaf:
    """One array of an optimizer's state and what it belongs to.

    Attributes:
      owner: path of the parameter it belongs to, or None (a step count, say).
      transformation: the transformation that keeps it, from its state's class: ``scale_by_adam``.
      field: the field of that state: ``mu``.
      value: the array or shape.
      place: path of that state: what belongs together.
    """

    owner: str | None
    transformation: str
    field: str
    value: Any
    place: str = ""


def state_leaves(state: PyTree, params: PyTree) -> list[StateLeaf]:
    """Takes an optimizer state apart and finds the parameter that each array belongs to.

    An array belongs to the parameter whose path is the longest suffix of its own; a scalar beside
    named parameters (a count) belongs to none.

    Args:
      state: the state of any optax transformation, concrete or abstract.
      params: the parameters it was made for.
    """
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_empty)[0]
    owners = {path_string(path) for path, leaf in flat if not is_empty(leaf)}
    found = []
    for keys, state_name, field, place, value in _walk(state, (), "", "", ""):
        found.append(StateLeaf(_owner(keys, owners), _snake(state_name), field, value, place))
    return found


def _owner(keys: tuple[Any, ...], owners: set[str]) -> str | None:
    for start in range(len(keys) + 1):
        suffix = path_string(keys[start:])
        # An empty suffix is the path of a bare array given as the whole tree.
        if suffix in owners and (suffix or not _is_count(keys)):
            return suffix
    return None


def _is_count(keys: tuple[Any, ...]) -> bool:
    return bool(keys) and "count" in path_string(keys[-1:])


def _is_namedtuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _walk(
    node: Any, keys: tuple, state: str, field: str, place: str
) -> Iterator[tuple[tuple, str, str, str, Any]]:
    """Yields every array with its key path and the innermost named tuple, field and place it lies in."""
    if _is_namedtuple(node):
        for name, child in zip(node._fields, node, strict=True):
            key = jax.tree_util.GetAttrKey(name)
            yield from _walk(child, (*keys, key), type(node).__name__, name, path_string(keys))
        return
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=_is_namedtuple)[0]
    for path, child in children:
        if _is_namedtuple(child):
            yield from _walk(child, keys + tuple(path), state, field, place)
        else:
            yield keys + tuple(path), state, field, place, child


def _snake(class_name: str) -> str:
    """``ScaleByAdamState`` -> ``scale_by_adam``."""
    name = class_name.removesuffix("State")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
