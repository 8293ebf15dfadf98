"""Damped inverses of small Gram matrices, many at once.

A Llama has some hundred matrices and each moment two r x r systems; one kernel for each would cost far more
than the arithmetic. Systems of one rank, whatever the shape of their parameters, are stacked and solved by
one batched Cholesky call, in groups under a byte limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp

from layout_optax.layout import PyTree
from lorapre_optax._factors import DampingKind

GROUP_BYTES = 128 * 2**20
"""The most bytes of Gram matrices that one batched call takes (a single leaf is never split)."""


def damped_inverses(
    grams: PyTree, damping: jax.Array | float, kind: DampingKind = "relative"
) -> PyTree:
    """(gram + damping)^-1 of every Gram matrix in a tree, of any ranks and batch shapes.

    A float32 Gram matrix carries rounding of about r * 6e-8 of its largest eigenvalue: a relative
    damping below 1e-5 can leave it indefinite, and the factorisation then gives NaN.

    Args:
      grams: symmetric arrays of shape (..., r, r).
      damping: lambda. ``"relative"`` adds lambda * trace(gram) / r to the diagonal of each Gram matrix,
        ``"absolute"`` lambda itself.
      kind: of the damping.

    Returns:
      A tree like ``grams``.
    """

    def invert(stack: jax.Array) -> jax.Array:
        inverse_root = _invert_lower(_cholesky(stack, damping, kind))
        return jnp.einsum("nji,njk->nik", inverse_root, inverse_root, precision="highest")

    return _in_groups(invert, grams)


def damped_inverse_roots(grams: PyTree, damping: float) -> PyTree:
    """L^-1 of the damped Cholesky factors L L^T, which make rows with these Gram matrices orthonormal."""
    return _in_groups(lambda stack: _invert_lower(_cholesky(stack, damping, "relative")), grams)


def _in_groups(solve: Callable[[jax.Array], jax.Array], tree: PyTree) -> PyTree:
    """Applies a function of (n, r, r) arrays to a tree of arrays (..., r, r), one call a group."""
    matrices, structure = jax.tree.flatten(tree)
    results: list[jax.Array | None] = [None] * len(matrices)
    for group in _groups(matrices):
        stacks = [matrices[i].reshape(-1, *matrices[i].shape[-2:]) for i in group]
        stack = jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0]
        # XLA:CPU spreads a batched LAPACK call over its threads and waits for them; two such calls at
        # once can wait for ever on few cores. One matrix at a time needs no other thread.
        solved = jax.lax.platform_dependent(
            stack, cpu=lambda x: jax.lax.map(lambda each: solve(each[None])[0], x), default=solve
        )
        start = 0
        for i, stack in zip(group, stacks, strict=True):
            part = jax.lax.slice_in_dim(solved, start, start + stack.shape[0])
            results[i] = part.reshape(matrices[i].shape)
            start += stack.shape[0]
    return structure.unflatten(results)


def _groups(matrices: Sequence[jax.Array]) -> Iterable[list[int]]:
    """Positions of matrices of one rank and dtype, in runs that stay under `GROUP_BYTES`."""
    by_kind: dict[tuple[int, str], list[list[int]]] = {}
    filled: dict[tuple[int, str], int] = {}
    for i, matrix in enumerate(matrices):
        key = (matrix.shape[-1], str(matrix.dtype))
        size = matrix.size * matrix.dtype.itemsize
        if key not in by_kind or filled[key] + size > GROUP_BYTES:
            by_kind.setdefault(key, []).append([])
            filled[key] = 0
        by_kind[key][-1].append(i)
        filled[key] += size
    return [group for groups in by_kind.values() for group in groups]


def _cholesky(grams: jax.Array, damping: jax.Array | float, kind: DampingKind) -> jax.Array:
    """Lower Cholesky factors of damped (n, r, r) matrices; a zero matrix counts as the identity."""
    rank = grams.shape[-1]
    damping = jnp.asarray(damping, grams.dtype)
    if kind == "relative":
        trace = jnp.trace(grams, axis1=-2, axis2=-1)
        damping = jnp.where(trace > 0, damping * trace / rank, 1)[:, None, None]
    damped = grams + damping * jnp.eye(rank, dtype=grams.dtype)[None]
    return jax.lax.linalg.cholesky(damped, symmetrize_input=False)


def _invert_lower(lower: jax.Array) -> jax.Array:
    """Inverses of lower triangular (n, r, r) matrices."""
    identity = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)
