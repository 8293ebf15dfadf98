"""A damper over rows, not in the paper: rows with small gradients, such as those of rare tokens, move less."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from layout_optax.axes import compute_dtype, rms, shape_without, zeros_without
from layout_optax.fit import check_shapes, check_state_type
from layout_optax.hyperparameters import at, check_number
from layout_optax.layout import LayoutLike, ParamLayout
from layout_optax.leaves import flatten_with_layout


class RowDamperState(NamedTuple):
    r"""State of `scale_by_sage` with ``row_damper``.

    Attributes:
      sage: the `SageState`.
      row_magnitude: q, the running mean of \|g\| over a row's columns: the parameter's shape without column
        axes, float32 (float64 for float64 parameters). Unmanaged leaves hold ``optax.MaskedNode()``.
    """

    sage: Any
    row_magnitude: Any


def with_row_damper(
    sage: optax.GradientTransformationExtraArgs,
    power: optax.ScalarOrSchedule,
    b2: optax.ScalarOrSchedule,
    layout: LayoutLike,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies SAGE's direction by the row damper; see `scale_by_sage`.

    Raises:
      ValueError: for a power outside (0, 1].
    """
    check_number("row_damper", power, 0, 1, strictly=True)

    def init_fn(params: optax.Params) -> RowDamperState:
        ours = flatten_with_layout(layout, params)

        def zeros(path: str, layout: ParamLayout, param: jax.Array) -> jax.Array:
            return zeros_without(param, layout.column_axes, compute_dtype(param.dtype))

        return RowDamperState(sage.init(params), ours.map(zeros))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, RowDamperState]:
        check_state_type("scale_by_sage", state, RowDamperState)
        ours = flatten_with_layout(layout, updates)
        decay, exponent = (at(number, state.sage.count) for number in (b2, power))
        directions, inner = sage.update(updates, state.sage, params, **extra_args)

        def average(path: str, layout: ParamLayout, g: jax.Array, old: jax.Array) -> jax.Array:
            check_shapes(path, g.shape, old, shape_without(g.shape, layout.column_axes))
            if not g.size:
                return old
            instant = jnp.mean(jnp.abs(g.astype(compute_dtype(g.dtype))), axis=layout.column_axes)
            weight = jnp.asarray(decay, instant.dtype)
            return ((1 - weight) * instant + weight * old.astype(instant.dtype)).astype(old.dtype)

        def damped(
            path: str, layout: ParamLayout, g: jax.Array, direction: jax.Array, average: jax.Array
        ) -> jax.Array:
            if not g.size:
                return direction
            damping = row_damping(jnp.expand_dims(average, layout.column_axes), layout, exponent)
            return (direction.astype(damping.dtype) * damping).astype(direction.dtype)

        magnitude = ours.map(average, state.row_magnitude)
        return (
            ours.map(damped, directions, magnitude, other="leaf"),
            RowDamperState(inner, magnitude),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def row_damping(average: jax.Array, layout: ParamLayout, power: ArrayLike) -> jax.Array:
    r"""Returns R from the rows' running means; 0 where all of them are 0.

    The bias correction of the means cancels in the quotient.

    Args:
      average: q with the column axes kept as ones, float32 or wider.
      layout: the parameter's layout with non-negative axes.
      power: p.

    Example:
      >>> layout = ParamLayout("embedding", 0, 1)
      >>> found = row_damping(jnp.array([[7.0], [1.0], [0.0], [0.0]]), layout, 1.0)
      >>> [round(float(one), 3) for one in found[:, 0]]
      [1.0, 0.283, 0.0, 0.0]
    """
    # Divide by the maximum first: squares of the smallest and largest float32 leave the range.
    largest = jnp.max(average, axis=layout.row_axes, keepdims=True, initial=0)
    scaled = average / jnp.where(largest == 0, 1, largest)
    root = rms(scaled, layout.row_axes)
    share = jnp.minimum(scaled / jnp.where(root == 0, 1, root), 1)
    return jnp.power(share, jnp.asarray(power, share.dtype))
