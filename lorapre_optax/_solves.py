"""Damped inverses of many small Gram matrices at once.

A Llama has about a hundred matrices, and each moment two r x r systems. One kernel per system would cost far
more than the arithmetic. Systems of one rank, whatever the shapes of their parameters, are stacked and solved
by one batched Cholesky call, in groups under a byte limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from layout_optax.layout import PyTree
from lorapre_optax._factors import DampingKind
from lorapre_optax._products import exact_product

Triangles: TypeAlias = Callable[[jax.Array], jax.Array]
"""Inverts lower triangular (n, r, r) matrices."""

LEAST = 32
"""Largest triangle that accelerators invert by one solve; products combine larger ones."""

GROUP_BYTES = 32 * 2**20
"""The most bytes of Gram matrices that are solved at once (a single leaf is never split): 128 of rank 256,
about as many as a GPU has multiprocessors."""


def damped_inverses(
    grams: PyTree, damping: jax.Array | float, kind: DampingKind = "relative"
) -> PyTree:
    """Computes (gram + damping)^-1 of every Gram matrix in a tree, of any ranks and batch shapes.

    A float32 Gram matrix has a rounding error of about r * 6e-8 of its largest eigenvalue. A relative damping
    below 1e-5 can leave it indefinite, and the factorisation then gives NaN.

    Args:
      grams: symmetric arrays of shape (..., r, r).
      damping: lambda. ``"relative"`` adds lambda * trace(gram) / r to the diagonal of each Gram matrix,
        ``"absolute"`` adds lambda itself.
      kind: the kind of damping.

    Returns:
      A tree like ``grams``.
    """

    def invert(stack: jax.Array, invert_lower: Triangles) -> jax.Array:
        inverse_root = invert_lower(_cholesky(stack, damping, kind))
        return exact_product("nji,njk->nik", inverse_root, inverse_root)

    return _in_groups(invert, grams)


def damped_inverse_roots(grams: PyTree, damping: float) -> PyTree:
    """L^-1 of the damped Cholesky factors L L^T; it makes rows with these Gram matrices orthonormal.

    Every platform uses solves here: only a first step and the metrics need roots, and the products that would
    save their time have to be compiled with every step.
    """
    return _in_groups(
        lambda stack, _: _solve_identity(_cholesky(stack, damping, "relative")), grams
    )


def _in_groups(solve: Callable[[jax.Array, Triangles], jax.Array], tree: PyTree) -> PyTree:
    """Applies a function of (n, r, r) arrays to a tree of arrays (..., r, r), one call per group."""
    matrices, structure = jax.tree.flatten(tree)
    results: list[jax.Array | None] = [None] * len(matrices)
    for group in _groups(matrices):
        stacks = [matrices[i].reshape(-1, *matrices[i].shape[-2:]) for i in group]
        stack = jnp.concatenate(stacks) if len(stacks) > 1 else stacks[0]
        # XLA:CPU distributes a batched LAPACK call over its threads and waits for them. Two such calls at once
        # can wait forever on few cores. One matrix at a time needs no other thread.
        solved = jax.lax.platform_dependent(
            stack,
            cpu=lambda x: jax.lax.map(lambda each: solve(each[None], _solve_identity)[0], x),
            default=lambda x: solve(x, _invert_by_halves),
        )
        start = 0
        for i, stack in zip(group, stacks, strict=True):
            part = jax.lax.slice_in_dim(solved, start, start + stack.shape[0])
            results[i] = part.reshape(matrices[i].shape)
            start += stack.shape[0]
    return structure.unflatten(results)


def _groups(matrices: Sequence[jax.Array]) -> Iterable[list[int]]:
    """Positions of matrices of one rank and dtype, in groups that stay under `GROUP_BYTES`."""
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


def _solve_identity(lower: jax.Array) -> jax.Array:
    """Inverts lower triangular (n, r, r) matrices by one solve."""
    identity = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
    return jax.lax.linalg.triangular_solve(lower, identity, left_side=True, lower=True)


def _invert_by_halves(lower: jax.Array) -> jax.Array:
    """Inverts lower triangular matrices by solves of `LEAST` rows on the diagonal and batched products.

    [[A, 0], [B, C]] has the inverse [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. A solve goes through its rows one by
    one, while an accelerator computes the products of all blocks of one size at once.
    """
    n, rank, _ = lower.shape
    if rank <= LEAST:
        return _solve_identity(lower)
    size = LEAST
    while size < rank:
        size *= 2
    padded = jnp.pad(lower, ((0, 0), (0, size - rank), (0, size - rank)))
    padded += jnp.diag((jnp.arange(size) >= rank).astype(lower.dtype))

    def blocks(width: int, below: bool) -> jax.Array:
        """Blocks of some width on the diagonal, or the blocks below every other one of them."""
        step = 2 * width if below else width
        first = width if below else 0
        return jnp.stack(
            [
                jax.lax.slice(padded, (0, k + first, k), (n, k + first + width, k + width))
                for k in range(0, size, step)
            ],
            axis=1,
        )

    inverses = _solve_identity(blocks(LEAST, False).reshape(-1, LEAST, LEAST))
    inverses = inverses.reshape(n, -1, LEAST, LEAST)
    width = LEAST
    while width < size:
        a, c = inverses[:, 0::2], inverses[:, 1::2]
        product = lambda x, y: jnp.einsum("nkij,nkjl->nkil", x, y, precision="highest")  # noqa: E731
        corner = -product(product(c, blocks(width, True)), a)
        upper = jnp.concatenate([a, jnp.zeros_like(a)], axis=-1)
        inverses = jnp.concatenate([upper, jnp.concatenate([corner, c], axis=-1)], axis=-2)
        width *= 2
    return inverses[:, 0, :rank, :rank]
