"""One step of one leaf on plain arrays: Lion's direction and momentum, SAGE's damper and magnitude."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from layout_optax.axes import rms
from layout_optax.layout import ParamLayout
from layout_optax.promotion import standard_promotion

Damper = Literal["both", "ema"] | None
EpsMode = Literal["absolute", "relative"]


def lion_step(
    g: jax.Array, mu: jax.Array, b1: float | jax.Array, b2: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns Lion's direction from the old momentum, and the new momentum.

    Order and promotion follow `optax.lion`, so results agree bit for bit in any dtype.
    """
    with standard_promotion():
        direction = jnp.sign((1.0 - b1) * g + b1 * mu)
        return direction, (1 - b2) * g + b2 * mu


def sage_damping(
    g: jax.Array,
    magnitude: jax.Array,
    layout: ParamLayout,
    count: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    damper: Literal["both", "ema"],
    eps_mode: EpsMode,
) -> tuple[jax.Array, jax.Array]:
    """Returns the safe damper H of one leaf, and the new magnitude.

    Args:
      g: the gradient, float32 or wider.
      magnitude: the old S, the parameter's shape without row axes.
      layout: the parameter's layout with non-negative axes.
      count: the number of this step, starting at 1.
      b2: decay of S.
      eps: offset of the denominators.
      damper: ``"both"`` includes the instantaneous term, ``"ema"`` does not.
      eps_mode: whether eps has the gradient's units or is a fraction of the rms.

    Returns:
      H with the row axes kept as ones, and S of ``magnitude``'s shape.
    """
    decay = jnp.asarray(b2, g.dtype)  # also if hyperparameters are injected in bfloat16
    instant = jnp.mean(jnp.abs(g), axis=layout.row_axes, keepdims=True)
    average = jnp.expand_dims(magnitude.astype(g.dtype), layout.row_axes)
    average = (1 - decay) * instant + decay * average
    corrected = average / (1 - jnp.power(decay, jnp.asarray(count, g.dtype)))
    damping = _share(corrected, layout.column_axes, eps, eps_mode)
    if damper == "both":
        damping = jnp.minimum(damping, _share(instant, layout.column_axes, eps, eps_mode))
    return jnp.minimum(damping, 1), jnp.squeeze(average, layout.row_axes)


def _share(s: jax.Array, axes: tuple[int, ...], eps: ArrayLike, eps_mode: EpsMode) -> jax.Array:
    """``rms(s) / (s + eps)`` over ``axes``; 0 if all of s is 0.

    Divides s by its maximum first, since squares of the smallest and largest float32 leave the range.
    """
    largest = jnp.max(s, axis=axes, keepdims=True, initial=0)
    divisor = jnp.where(largest == 0, 1, largest)
    scaled = s / divisor
    root = rms(scaled, axes)
    eps = jnp.asarray(eps, s.dtype)
    offset = eps * root if eps_mode == "relative" else eps / divisor
    return jnp.where(largest == 0, 0, root / (scaled + offset))
