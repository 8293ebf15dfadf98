"""Adafactor's direction for embedding and head: the gradient over a factored rms, V + d floats of state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from layout_optax.axes import (
    close_statistic,
    compute_dtype,
    open_statistic,
    rms,
    shape_without,
    zero_statistic,
)
from layout_optax.boxes import refuse_boxes
from layout_optax.fit import check_shapes, check_state_type
from layout_optax.hyperparameters import check_layout
from layout_optax.layout import LayoutLike, ParamLayout
from layout_optax.leaves import flatten_with_layout

_DECAY = 0.8  # Adafactor's exponent: the averages' decay is 1 - t**-0.8
_OFFSET = 1e-30  # added to squares


class FactoredRmsState(NamedTuple):
    """State of `scale_by_factored_rms`; trees are shaped like the parameters.

    Attributes:
      count: int32 scalar, the number of updates so far.
      row_square: running mean of g^2 over a row's columns: the parameter's shape without column axes, float32
        (float64 for float64 parameters); ``optax.MaskedNode()`` at unmanaged leaves.
      column_square: the same over a column's rows: the parameter's shape without row axes.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    row_square: Any
    column_square: Any


class _Leaf(NamedTuple):
    direction: Any
    row_square: Any
    column_square: Any


def scale_by_factored_rms(layout: LayoutLike = None) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor's direction without a first moment (arXiv:1804.04235, algorithm 4), clipped to an rms of 1.

    For a V x d embedding with gradient :math:`G` in step :math:`t` from 1, with :math:`\beta = 1 - t^{-0.8}`:

    .. math::
      R &\leftarrow \beta R + (1 - \beta) \, \mathrm{mean}_{columns}(G^2 + 10^{-30}), \qquad
        C \leftarrow \beta C + (1 - \beta) \, \mathrm{mean}_{rows}(G^2 + 10^{-30}) \\
      U &= G \, / \sqrt{R \, C \, / \, \mathrm{mean}(R)}, \qquad
        \mathrm{direction} = U / \max(1, \mathrm{rms}(U))

    It is a rule for embedding and head beside SinkGD (`sinkgd_hybrid`) or LoRA-Pre Muon
    (``lorapre_optax.lorapre_muon``). A vector is one row and keeps a full mean of its squares.

    `optax.scale_by_factored_rms` keeps the averages in the parameters' dtype, in which a bfloat16 average stops
    changing once its decay is near 1, it uses the two largest axes as rows and columns, and below a side of 128
    it keeps a full second moment.

    Args:
      layout: see `layout_optax.LayoutLike`.

    Returns:
      A transformation with state `FactoredRmsState`. Updates keep the gradients' dtype; empty arrays and
      unmanaged leaves pass through.

    Raises:
      TypeError: at init, for boxes, and for a managed leaf that is not a real floating-point array.
      ValueError: at init, for a layout that `optax.inject_hyperparams` has called; at update, for a state of
        another transformation or of parameters with other shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jnp.ones((6, 4))}
      >>> tx = scale_by_factored_rms()
      >>> state = tx.init(params)
      >>> state.row_square["embed"].shape, state.column_square["embed"].shape
      ((6,), (4,))
      >>> sizes = jnp.asarray([0.0, 0.01, 0.1, 1.0, 10.0, 100.0])  # a rare token's row moves as far
      >>> updates, state = tx.update({"embed": jnp.outer(sizes, jnp.ones(4))}, state)
      >>> updates["embed"][:, 0].round(3).tolist()
      [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def init_fn(params: optax.Params) -> FactoredRmsState:
        refuse_boxes(params)
        check_layout(layout, params)
        ours = flatten_with_layout(layout, params)
        ours.check_trainable()

        def zeros(removed: str) -> Any:
            return ours.map(
                lambda _, own, p: zero_statistic(p, getattr(own, removed), compute_dtype(p.dtype))
            )

        return FactoredRmsState(jnp.zeros([], jnp.int32), zeros("column_axes"), zeros("row_axes"))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, FactoredRmsState]:
        del params, extra_args
        check_state_type("scale_by_factored_rms", state, FactoredRmsState)
        ours = flatten_with_layout(layout, updates)
        count = jnp.asarray(optax.safe_increment(state.count))

        def step(path: str, own: ParamLayout, g: jax.Array, row: Any, column: Any) -> _Leaf:
            check_shapes(path, g.shape, row, shape_without(g.shape, own.column_axes))
            check_shapes(path, g.shape, column, shape_without(g.shape, own.row_axes))
            return _step(own, g, row, column, count) if g.size else _Leaf(g, row, column)

        steps = ours.map(step, state.row_square, state.column_square)
        direction, row, column = (
            ours.map(lambda _, own, g, leaf, field=field: leaf[field], steps, other=other)
            for field, other in ((0, "leaf"), (1, optax.MaskedNode), (2, optax.MaskedNode))
        )
        return direction, FactoredRmsState(count, row, column)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step(
    layout: ParamLayout, gradient: jax.Array, row: jax.Array, column: jax.Array, count: jax.Array
) -> _Leaf:
    """One step of one leaf."""
    rows, columns = layout.row_axes, layout.column_axes
    g = gradient.astype(compute_dtype(gradient.dtype))
    weight = jnp.asarray(count, g.dtype) ** jnp.asarray(-_DECAY, g.dtype)  # 1 - beta
    square = jnp.square(g) + jnp.asarray(_OFFSET, g.dtype)

    def average(old: jax.Array, removed: tuple[int, ...]) -> jax.Array:
        old = open_statistic(old, gradient, removed).astype(g.dtype)
        return (1 - weight) * old + weight * jnp.mean(square, removed)

    new_row, new_column = average(row, columns), average(column, rows)
    r, c = jnp.expand_dims(new_row, columns), jnp.expand_dims(new_column, rows)
    # A row that never had a gradient may fall out of the range here; its gradient is 0 then.
    share = jnp.maximum(r / jnp.mean(r, rows, keepdims=True), jnp.finfo(g.dtype).tiny)
    u = g * jax.lax.rsqrt(share) * jax.lax.rsqrt(c)
    direction = u / jnp.maximum(1, rms(u, (*rows, *columns)))
    return _Leaf(
        direction.astype(gradient.dtype),
        close_statistic(new_row.astype(row.dtype), gradient, columns),
        close_statistic(new_column.astype(column.dtype), gradient, rows),
    )
