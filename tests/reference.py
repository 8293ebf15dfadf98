"""Every algorithm once more in float64 NumPy, equation by equation: the oracle for random layouts.

The route is deliberately another one than the library's: parameters are transposed and reshaped into
(batch, rows, columns) matrices, worked on one matrix at a time with plain loops, and put back.
"""

from __future__ import annotations

import numpy as np

from layout_optax.roles import ParamLayout


def to_matrices(x, layout: ParamLayout) -> np.ndarray:
    """A parameter as float64 matrices of shape (batch, rows, columns); a vector is one row."""
    x = np.asarray(x, np.float64)
    layout = layout.resolve(x.ndim)
    batch = layout.batch_axes(x.ndim)
    size = lambda axes: int(np.prod([x.shape[a] for a in axes], dtype=int))  # noqa: E731
    order = batch + layout.row_axes + layout.column_axes
    return x.transpose(order).reshape(size(batch), size(layout.row_axes), size(layout.column_axes))


def from_matrices(matrices, layout: ParamLayout, shape) -> np.ndarray:
    """The inverse of `to_matrices` for a parameter of the given shape."""
    layout = layout.resolve(len(shape))
    order = layout.batch_axes(len(shape)) + layout.row_axes + layout.column_axes
    back = np.argsort(order)
    return np.asarray(matrices).reshape([shape[a] for a in order]).transpose(back)
