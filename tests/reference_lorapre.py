"""LoRA-Pre once more in float64 NumPy, equation by equation and one matrix at a time (tests/reference.py)."""

from __future__ import annotations

import numpy as np

from layout_optax.layout import ParamLayout
from tests.reference import from_matrices, to_matrices


def factor_matrices(factor, layout: ParamLayout, ndim: int, side: str) -> np.ndarray:
    """A factor as float64 matrices: left as (batch, p, r), right as (batch, r, q)."""
    layout = layout.resolve(ndim)
    removed = layout.column_axes if side == "left" else layout.row_axes
    core = layout.row_axes if side == "left" else layout.column_axes
    factor = np.moveaxis(np.asarray(factor, np.float64), -2, -1)  # rank last: axes count as before
    kept = [axis for axis in range(ndim) if axis not in removed]
    axes = tuple(kept.index(axis) for axis in core)
    rank_axis = (ndim - len(removed),)
    rows, columns = (axes, rank_axis) if side == "left" else (rank_axis, axes)
    return to_matrices(factor, ParamLayout("matrix", rows, columns))


def damped(gram: np.ndarray, damping: float, kind: str) -> np.ndarray:
    rank = len(gram)
    extra = damping * np.trace(gram) / rank + 1e-30 if kind == "relative" else damping
    return gram + extra * np.eye(rank)


def newton_step(G, B, A, gamma, damping=1e-4, kind="relative"):
    """Theorem 3.1 on one matrix: both right-hand sides use the old factors."""
    G_A_plus = np.linalg.solve(damped(A @ A.T, damping, kind), A @ G.T).T
    B_plus_G = np.linalg.solve(damped(B.T @ B, damping, kind), B.T @ G)
    return (1 - gamma) * B + gamma * G_A_plus, (1 - gamma) * A + gamma * B_plus_G


def outside(G, B, A, damping=1e-4, kind="relative"):
    """What the factors cannot hold of G: G - (P_B G + G P_A) / 2."""
    P_B = B @ np.linalg.solve(damped(B.T @ B, damping, kind), B.T)
    P_A = A.T @ np.linalg.solve(damped(A @ A.T, damping, kind), A)
    return G - (P_B @ G + G @ P_A) / 2


def adam(
    grads, right_m, right_v, layout, b1=0.9, b2=0.95, eps=1e-8, damping=1e-4, kind="relative",
    exact=False, kappa=0.0, bound=np.inf,
):  # fmt: skip
    """Algorithm 1 on one parameter. ``grads`` is (steps, ...), the rights are (batch, r, q).

    Options beside the paper's: the exact bias correction, a residual and a bound on the direction.
    Returns directions (steps, ...) and, per batch index, the final mB, mA, vB, vA.
    """
    shape = grads.shape[1:]
    steps = [to_matrices(g, layout) for g in grads]
    directions = np.zeros((len(steps), *steps[0].shape))
    final = []
    for i in range(steps[0].shape[0]):
        mA, vA = right_m[i], right_v[i]
        p, r = steps[0].shape[1], mA.shape[0]
        mB, vB = np.zeros((p, r)), np.zeros((p, r))
        g1, g2 = 1 - b1**0.5, 1 - b2**0.25
        for t in range(1, len(steps) + 1):
            G = steps[t - 1][i]
            m = b1 * mB @ mA + (1 - b1) * G
            m += kappa * (1 - b1 ** (t - 1)) * outside(G, mB, mA, damping, kind)
            v = b2 * (vB @ vA) ** 2 + (1 - b2) * G**2
            mB, mA = newton_step(G, mB, mA, g1, damping, kind)
            vB, vA = newton_step(np.abs(G), vB, vA, g2, damping, kind)
            correction = 1 - b2**t
            if exact:
                correction = b2 * (1 - b2 ** ((t - 1) / 2)) ** 2 + 1 - b2
            direction = m / (1 - b1**t) / (np.sqrt(v / correction) + eps)
            directions[t - 1, i] = np.clip(direction, -bound, bound)
        final.append((mB, mA, vB, vA))
    return np.stack([from_matrices(d, layout, shape) for d in directions]), final


def trace(grads, right, layout, mu=0.95, damping=1e-4, kind="relative"):
    """The accumulator of Algorithm 2: (steps, ...)."""
    shape = grads.shape[1:]
    steps = [to_matrices(g, layout) for g in grads]
    accumulators = np.zeros((len(steps), *steps[0].shape))
    for i in range(steps[0].shape[0]):
        A = right[i]
        B = np.zeros((steps[0].shape[1], A.shape[0]))
        for t, step in enumerate(steps):
            accumulators[t, i] = mu * B @ A + step[i]
            B, A = newton_step(step[i] / (1 - mu), B, A, 1 - mu**0.5, damping, kind)
    return np.stack([from_matrices(a, layout, shape) for a in accumulators])


def lion(
    grads, right, layout, b1=0.9, b2=0.99, kappa=0.0, damping=1e-4, kind="relative", residual_b=None
):
    """LoRA-Pre Lion on one parameter: what the sign is taken of, (steps, ...), and the final products.

    ``residual_b`` decays the residual's weight, b2 unless a test wants a wrong one.
    """
    shape = grads.shape[1:]
    steps = [to_matrices(g, layout) for g in grads]
    arguments = np.zeros((len(steps), *steps[0].shape))
    products = np.zeros(steps[0].shape)
    past = b2 if residual_b is None else residual_b
    for i in range(steps[0].shape[0]):
        A = right[i]
        B = np.zeros((steps[0].shape[1], A.shape[0]))
        for t, step in enumerate(steps, 1):
            G = step[i]
            arguments[t - 1, i] = b1 * B @ A + (1 - b1) * G
            weight = kappa * (1 - past ** (t - 1))
            arguments[t - 1, i] += weight * outside(G, B, A, damping, kind)
            B, A = newton_step(G, B, A, 1 - b2**0.5, damping, kind)
        products[i] = B @ A
    back = lambda x: from_matrices(x, layout, shape)  # noqa: E731
    return np.stack([back(x) for x in arguments]), back(products)


def ema(grads, b):
    """The exact EMA, no bias correction."""
    m, out = np.zeros(grads.shape[1:]), []
    for g in np.asarray(grads, np.float64):
        m = b * m + (1 - b) * g
        out.append(m)
    return np.stack(out)


def cosine(x, y) -> float:
    x, y = np.ravel(np.asarray(x, np.float64)), np.ravel(np.asarray(y, np.float64))
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
