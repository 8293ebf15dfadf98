"""Standard promotion inside JAX's strict promotion modes.

The arithmetic of these packages names its dtypes and ranks. optax's does not always: `optax.scale_by_adam`
raises a float to an int32 count. A result that must match optax's bit for bit has to promote as optax does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import optax


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """Traces under ``jax_numpy_dtype_promotion="standard"`` and ``jax_numpy_rank_promotion="allow"``.

    Example:
      >>> import jax.numpy as jnp
      >>> with jax.numpy_dtype_promotion("strict"), standard_promotion():
      ...     (jnp.float32(1) + jnp.bfloat16(1)).dtype
      dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def with_standard_promotion(
    tx: optax.GradientTransformation, *, keep_dtypes: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Makes init and update of a transformation follow the standard rules; the state does not change.

    Args:
      tx: any optax transformation.
      keep_dtypes: whether updates keep the gradients' dtypes and state arrays their old dtypes. Otherwise a
        float32 hyperparameter widens the arrays of bfloat16 parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> tx, g = with_standard_promotion(optax.scale_by_adam()), jnp.ones(3)
      >>> with jax.numpy_dtype_promotion("strict"):  # optax.scale_by_adam() alone raises here
      ...     print(tx.update(g, tx.init(g))[0].round(3))
      [1. 1. 1.]
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: optax.Params) -> Any:
        with standard_promotion():
            return tx.init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        with standard_promotion():
            new, new_state = tx.update(updates, state, params, **extra_args)
        if keep_dtypes:
            return _as_dtypes(new, updates), _as_dtypes(new_state, state)
        return new, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def in_gradient_dtype(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Casts updates back to the gradients' dtypes where a float32 hyperparameter or moment widens them."""
    tx = optax.with_extra_args_support(tx)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        new, state = tx.update(updates, state, params, **extra_args)
        return _as_dtypes(new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def _as_dtypes(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), tree, like)
