"""Checks that name the path: leaves that cannot be trained, and states that do not fit the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from layout_optax.layout import PyTree, is_empty, path_string

WAY_OUT = "Make a new state with init(params); docs/compatibility.md shows how to keep the rest."


def check_transformation(caller: str, tx: Any) -> None:
    """Refuses anything but an optax transformation, such as a factory that was not called.

    Raises:
      TypeError: with the value that was given.

    Example:
      >>> check_transformation("state_bytes", optax.adam(1e-3))
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        given = f"a {type(tx).__name__}" if isinstance(tx, (dict, list, tuple)) else repr(tx)
        raise TypeError(
            f"{caller}: expected an optax.GradientTransformation, got {given}. Call the optimizer first: "
            f"{caller}(optax.adam(1e-3), ...)."
        )


def check_trainable(path: str, leaf: Any) -> None:
    """Refuses a leaf that is not an array (or shape) of real floating-point numbers.

    Raises:
      TypeError: with the path and the dtype.

    Example:
      >>> check_trainable("rope/phase", 1.0)
      Traceback (most recent call last):
        ...
      TypeError: 'rope/phase' is a float, not an array. Give the parameters as arrays (jnp.asarray).
    """
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        raise TypeError(
            f"{path!r} is a {type(leaf).__name__}, not an array. Give the parameters as arrays "
            "(jnp.asarray)."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{path!r} has dtype {dtype}: an optimizer here needs real floating-point parameters. Mask the "
            "leaf out (optax.masked) or give it to another optimizer (optax.partition)."
        )


def check_trainable_tree(params: PyTree) -> None:
    """Applies `check_trainable` to every leaf that is not empty."""
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params, is_leaf=is_empty)[0]:
        if not is_empty(leaf):
            check_trainable(path_string(keys), leaf)


def check_state_type(optimizer: str, state: Any, kind: type) -> None:
    """Refuses the state of another optimizer, and a state that was restored as plain dictionaries.

    Raises:
      TypeError: with both types.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"{optimizer}: expected the {kind.__name__} that its init makes, got a {type(state).__name__}. "
            "The state belongs to another optimizer, or was restored without init's structure."
        )


def check_shapes(path: str, shape: Sequence[int], found: Any, expected: Any) -> None:
    """Refuses the state of a leaf if its shape does not fit the parameter's.

    Args:
      path: the leaf's path.
      shape: the shape of the leaf's gradient.
      found: the state's array, or a tuple of arrays.
      expected: the expected shape, or a tuple of shapes.

    Raises:
      ValueError: with the path, the shapes and the remedy.
    """
    several = isinstance(found, tuple) and not hasattr(found, "shape") and not is_empty(found)
    arrays, shapes = (found, expected) if several else ((found,), (expected,))
    if any(map(is_empty, arrays)):
        raise ValueError(
            f"the state has nothing for {path!r}, whose gradient has shape {tuple(shape)}: it was not this "
            f"optimizer's when the state was made. {WAY_OUT}"
        )
    own = tuple(tuple(np.shape(each)) for each in arrays)
    if own != tuple(map(tuple, shapes)):
        are = " and ".join(map(str, own))
        should = " and ".join(str(tuple(each)) for each in shapes)
        raise ValueError(
            f"the state of {path!r} has shape {are}, but its gradient has shape {tuple(shape)}, which needs "
            f"{should}: the parameter is not the one that the state was made for. {WAY_OUT}"
        )


def misfit(paths: Sequence[str], leaves: Sequence[Any], tree: PyTree) -> ValueError:
    """The error for a state tree with other leaves than the gradients; it names the first of them."""
    held = [
        path_string(k) for k, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)[0]
    ]
    added = [(p, leaf) for p, leaf in zip(paths, leaves, strict=True) if p not in held]
    gone = [path for path in held if path not in paths]
    said = []
    if added:
        path, leaf = added[0]
        # Inside `optax.partition` the new leaf may belong to another role and be masked.
        shape = "" if is_empty(leaf) else f" of shape {tuple(np.shape(leaf))}"
        said.append(f"has nothing for {path!r}{shape}{_more(added)}")
    if gone:
        said.append(f"holds {gone[0]!r}{_more(gone)}, which the gradients do not have")
    if not said:
        said.append("has another structure than the gradients (other containers)")
    return ValueError(f"the state {' and '.join(said)}. {WAY_OUT}")


def check_like(tree: PyTree, state: PyTree) -> None:
    """Refuses a state tree that does not have the structure and shapes of the gradients.

    Raises:
      ValueError: with the path, both shapes and the remedy.
    """
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_empty)
    paths, leaves = [path_string(keys) for keys, _ in with_paths], [leaf for _, leaf in with_paths]
    try:
        held = treedef.flatten_up_to(state)
    except (ValueError, TypeError):
        raise misfit(paths, leaves, state) from None
    for path, leaf, own in zip(paths, leaves, held, strict=True):
        if not is_empty(leaf):
            check_shapes(path, np.shape(leaf), own, np.shape(leaf))


def checked_adam(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Adds the checks of this module to init and update of optax's Adam.

    Args:
      tx: `optax.scale_by_adam`, possibly inside `optax.inject_hyperparams`.
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> Any:
        check_trainable_tree(params)
        return tx.init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        adam = getattr(state, "inner_state", state)
        check_state_type("adam_direction", adam, optax.ScaleByAdamState)
        check_like(updates, adam.mu)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _more(items: Sequence[Any]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""
