"""Every algorithm once more in float64 NumPy, equation by equation: the oracle for random layouts.

The route is deliberately another one than the library's: parameters are transposed and reshaped into
(batch, rows, columns) matrices, worked on one matrix at a time with plain loops, and put back.
"""

from __future__ import annotations

import numpy as np

from layout_optax.layout import ParamLayout


def to_matrices(x, layout: ParamLayout) -> np.ndarray:
    """A parameter as float64 matrices of shape (batch, rows, columns); a vector is one row."""
    x = np.array(x, np.float64)  # a copy: callers work in place
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


def sage_step(
    g, mu, magnitude, t, layout, *, b1=0.9, b2=0.99, eps=1e-8, damper="both", relative=False
):
    """One step of SAGE on one parameter; returns direction, momentum, magnitude S and H.

    ``magnitude`` and H are (batch, columns) arrays, everything else has the parameter's shape.
    """
    shape = np.shape(g)
    g, mu = to_matrices(g, layout), to_matrices(mu, layout)
    direction, magnitude = np.empty_like(g), np.array(magnitude, np.float64)
    damping = np.ones_like(magnitude)
    for i in range(len(g)):
        s = np.abs(g[i]).sum(axis=0) / g.shape[1]
        magnitude[i] = b2 * magnitude[i] + (1 - b2) * s
        for term in [magnitude[i] / (1 - b2**t)] + ([s] if damper == "both" else []):
            root = np.sqrt(np.sum(term**2) / len(term))
            offset = eps * root if relative else eps
            quotient = root / (term + offset) if root > 0 else np.zeros_like(term)
            if damper is not None:
                damping[i] = np.minimum(damping[i], quotient)
        direction[i] = np.sign(b1 * mu[i] + (1 - b1) * g[i]) * damping[i]
    new_mu = b2 * mu + (1 - b2) * g
    back = lambda x: from_matrices(x, layout, shape)  # noqa: E731
    return back(direction), back(new_mu), magnitude, damping


def lion_step(g, mu, b1=0.9, b2=0.99):
    """One step of Lion; returns direction and momentum."""
    g, mu = np.asarray(g, np.float64), np.asarray(mu, np.float64)
    return np.sign(b1 * mu + (1 - b1) * g), b2 * mu + (1 - b2) * g


def adam_step(g, mu, nu, t, b1=0.9, b2=0.999, eps=1e-8):
    """One step of Adam; returns direction, first and second moment."""
    g = np.asarray(g, np.float64)
    mu, nu = b1 * np.asarray(mu) + (1 - b1) * g, b2 * np.asarray(nu) + (1 - b2) * g**2
    return mu / (1 - b1**t) / (np.sqrt(nu / (1 - b2**t)) + eps), mu, nu


def decayed_step(p, direction, learning_rate, weight_decay):
    """A parameter after a step with decoupled weight decay."""
    p = np.asarray(p, np.float64)
    return p - learning_rate * (np.asarray(direction) + weight_decay * p)


def sinkhorn(g, layout, *, iterations=5, eps=1e-8, variant="unit"):
    """The plain loop: every half-step rewrites the matrix."""
    matrices = to_matrices(g, layout)
    n_rows, n_columns = matrices.shape[1:]
    row_gain, column_gain = (n_columns**0.5, n_rows**0.5) if variant == "sqrt" else (1, 1)
    for x in matrices:
        for _ in range(iterations):
            for i in range(n_rows):
                x[i] *= row_gain / (np.sqrt(np.sum(x[i] ** 2)) + eps)
            for j in range(n_columns):
                x[:, j] *= column_gain / (np.sqrt(np.sum(x[:, j] ** 2)) + eps)
    return from_matrices(matrices, layout, np.shape(g))


def factored_rms_directions(gradients, layout):
    """Adafactor's directions (algorithm 4, no first moment) for the gradients of successive steps."""
    found = []
    row = column = 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = to_matrices(gradient, layout)
        beta = 1 - t**-0.8
        square = g**2 + 1e-30
        row = beta * row + (1 - beta) * square.mean(2, keepdims=True)
        column = beta * column + (1 - beta) * square.mean(1, keepdims=True)
        direction = np.empty_like(g)
        for i in range(len(g)):
            direction[i] = g[i] / np.sqrt(row[i] * column[i] / row[i].mean())
            direction[i] /= max(1.0, np.sqrt(np.mean(direction[i] ** 2)))
        found.append(from_matrices(direction, layout, np.shape(gradient)))
    return np.stack(found)
