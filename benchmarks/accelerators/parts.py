"""Times the parts of updates and steps alone: Sinkhorn, LoRA-Pre, attention, embedding lookup."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import sage_optax
from examples.llama.model.attention import causal_attention
from examples.llama.model.embedding import lookup


@dataclass(frozen=True)
class Shapes:
    """Sizes of the parts.

    Attributes:
        matrices: Stacks of matrices (layers, rows, columns); the first is LoRA-Pre's.
        rank: LoRA-Pre's rank.
        grams: Number of Gram matrices to invert at once.
        attention: Batch, tokens, heads, width of a head.
        table: Vocabulary and width of the embedding.
    """

    matrices: tuple[tuple[int, int, int], ...]
    rank: int
    grams: int
    attention: tuple[int, int, int, int]
    table: tuple[int, int]


FULL = Shapes(((24, 1024, 2736), (24, 2048, 5456)), 256, 672, (32, 1024, 16, 64), (32000, 1024))
SMALL = Shapes(((2, 16, 24),), 4, 3, (2, 16, 2, 8), (50, 16))
Part = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]
"""A function and a function that makes its arguments."""


def parts(shapes: Shapes) -> dict[str, Part]:
    """All parts by name, most wanted first."""
    return {**_sinkhorn(shapes), **_lorapre(shapes), **_model(shapes)}


def milliseconds(part: Part, repeats: int = 10) -> float:
    """Median time of a part in milliseconds, over six stretches, compiled and warm."""
    function, make = part
    jitted, given = jax.jit(function), make()
    for _ in range(2):
        jax.block_until_ready(jitted(*given))
    found = []
    for _ in range(6):
        started = time.perf_counter()
        out = None
        for _ in range(repeats):
            out = jitted(*given)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - started) / repeats)
    return 1e3 * statistics.median(found)


def _sinkhorn(shapes: Shapes) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for shape in shapes.matrices:
        for dtype in ("bfloat16", "float32"):
            where = f"{'x'.join(map(str, shape))} {dtype}"
            make = partial(_normal, (shape,), dtype)
            found[f"read and write once, {where}"] = (lambda g: 2 * g, make)
            for iterations in (5, 1):
                name = f"scale_by_sinkhorn, {iterations} iterations, {where}"
                found[name] = (partial(_direction, iterations=iterations), make)
            found[f"plain loop, 5 iterations, {where}"] = (_plain_loop, make)
    return found


def _direction(g: jax.Array, iterations: int) -> jax.Array:
    tx = sage_optax.scale_by_sinkhorn(iterations=iterations)
    tree = {"layers": {"mlp": {"up_proj": {"kernel": g}}}}
    return jax.tree.leaves(tx.update(tree, tx.init(tree), tree)[0])[0]


def _plain_loop(g: jax.Array) -> jax.Array:
    def sweep(_: Any, x: jax.Array) -> jax.Array:
        x = x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-8)
        return x / (jnp.linalg.norm(x, axis=2, keepdims=True) + 1e-8)

    return jax.lax.fori_loop(0, 5, sweep, g.astype(jnp.float32)).astype(g.dtype)


def _lorapre(shapes: Shapes) -> dict[str, Part]:
    (layers, rows, columns), rank = shapes.matrices[0], shapes.rank
    left, right, matrix = (layers, rows, rank), (layers, rank, columns), (layers, rows, columns)
    found: dict[str, Part] = {}
    for dtype, precision in (
        ("bfloat16", "default"),
        ("float32", "default"),
        ("float32", "high"),
        ("float32", "highest"),
    ):
        product = partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)
        where = f"{dtype}, {precision}"
        found[f"reconstruct B A, {where}"] = (product, partial(_normal, (left, right), dtype))
        found[f"G A^T, {where}"] = (
            lambda g, a, product=product: product(g, a.mT),
            partial(_normal, (matrix, right), dtype),
        )
        found[f"Gram matrix, {where}"] = (
            lambda a, product=product: product(a, a.mT),
            partial(_normal, (right,), dtype),
        )
    make = partial(_grams, shapes.grams, rank)
    found["Cholesky"] = (jnp.linalg.cholesky, make)
    found["triangular solve against the identity"] = (
        lambda c: jax.lax.linalg.triangular_solve(
            c, jnp.broadcast_to(jnp.eye(rank), c.shape), left_side=True, lower=True
        ),
        lambda: (jnp.linalg.cholesky(make()[0]),),
    )
    for dtype in ("bfloat16", "float32"):
        found[f"Newton-Schulz, 5 steps, {dtype}"] = (
            _newton_schulz,
            partial(_normal, (matrix,), dtype),
        )
    return found


def _newton_schulz(x: jax.Array) -> jax.Array:
    x = x / jnp.linalg.norm(x.astype(jnp.float32), axis=(1, 2), keepdims=True).astype(x.dtype)

    def step(_: Any, x: jax.Array) -> jax.Array:
        gram = x @ x.mT
        return 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x

    return jax.lax.fori_loop(0, 5, step, x)


def _model(shapes: Shapes) -> dict[str, Part]:
    batch, length, heads, width = shapes.attention
    qkv = ((batch, length, heads, width),) * 3
    found: dict[str, Part] = {}
    for name in ("auto", "xla", "plain"):

        def loss(q: Any, k: Any, v: Any, name: Any = name) -> jax.Array:
            return jnp.sum(causal_attention(q, k, v, name).astype(jnp.float32))

        found[f"attention and gradient, {name}, bfloat16"] = (
            jax.grad(loss, argnums=(0, 1, 2)),
            partial(_normal, qkv, "bfloat16"),
        )
    for name in ("scatter", "products"):

        def of_table(table: Any, tokens: Any, rows: Any, name: Any = name) -> jax.Array:
            return jax.vjp(lambda t: lookup(t, tokens, jnp.bfloat16, name), table)[1](rows)[0]

        found[f"gradient of the embedding, {name}"] = (of_table, partial(_lookup_arguments, shapes))
    return found


def _lookup_arguments(shapes: Shapes) -> tuple[Any, ...]:
    (batch, length, _, _), (vocab_size, width) = shapes.attention, shapes.table
    # Frequent tokens occur often, as in text: the square of a uniform number.
    uniform = jax.random.uniform(jax.random.key(1), (batch, length))
    tokens = (vocab_size * uniform**2).astype(jnp.int32)
    (rows,) = _normal(((batch, length, width),), "bfloat16")
    return *_normal(((vocab_size, width),), "float32"), tokens, rows


def _normal(shapes: tuple[tuple[int, ...], ...], dtype: str) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(
        jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)
    )


def _grams(count: int, rank: int) -> tuple[jax.Array]:
    (factor,) = _normal(((count, rank, 2 * rank),), "float32")
    return (factor @ factor.mT / (2 * rank) + 1e-3 * jnp.eye(rank),)
