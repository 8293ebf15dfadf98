"""A matrix as the product of two thin factors: initial factors, Newton step, balance and reconstruction.

Pure functions on arrays in the parameter's own axes. They apply to a parameter with batch, row and column axes
and rank r, with the paper's m = B A per batch index:

* The LEFT factor (B) has the parameter's batch and row axes, the RIGHT factor (A) its batch and column axes,
  both in the parameter's order. So a factor's sharding is the parameter's without the axes that it lacks.
* The rank axis is second to last in both. Accelerators store the last two axes in tiles of 8 x 128 and would
  pad a small rank in last place to 128; second to last it needs no padding. A stack of matrices has a stack of
  factors: (layers, in, out) has factors (layers, r, out) and (layers, r, in).
* On a mesh the rank axis takes as many mesh axes of the removed parameter axes as divide the rank
  (`factor_sharding`), so no device of a mesh that shards a parameter holds a whole factor. Products read
  factors with a whole rank (`rank_whole`): each device gathers thin factors, and the sums are scattered over
  the rank again.

Reference: Wang et al., "Taming Momentum: Rethinking Optimizer States Through Low-Rank Approximation",
ICLR 2026, https://arxiv.org/abs/2602.24283.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from layout_optax.axes import (
    compute_dtype,
    explicit_sharding,
    known_sharding,
    placed,
    remaining,
    shape_without,
    sharding_without,
    spec_entries,
    subscripts,
)
from layout_optax.keys import bits_of_seeds, path_words, seeds_of_words
from layout_optax.layout import ParamLayout
from lorapre_optax._factor_sharding import constrained, factor_sharding, rank_whole, with_rank
from lorapre_optax._products import Narrow, exact_product, large_product

DampingKind: TypeAlias = Literal["relative", "absolute"]
INIT_STD = 0.02
MAX_JUMP = 30.0
"""The largest growth of the left factor in a step, relative to its size, before the right step shrinks."""


class EinsumAxes(NamedTuple):
    """Einsum axes of a parameter, its factors (rank ``z``) and its batch axes."""

    param: str
    left: str
    right: str
    batch: str


class Prepared(NamedTuple):
    """The factors before a step, in a scale that float32 holds, and their Gram matrices.

    Attributes:
      left: the left factor after balancing, sharded as stored.
      right: the right factor after balancing, sharded as stored.
      left_unit: the left factor times a power of two, so that its largest entry is between 1/2 and 1; the rank
        is whole on each device.
      right_unit: the right factor, with the rank whole on each device.
      left_scale: shape of the batch axes; ``left = left_unit * left_scale``.
      left_gram: B^T B of ``left_unit``, batch axes and (r, r), replicated.
      right_gram: A A^T of ``right``, batch axes and (r, r), replicated.
    """

    left: jax.Array
    right: jax.Array
    left_unit: jax.Array
    right_unit: jax.Array
    left_scale: jax.Array
    left_gram: jax.Array
    right_gram: jax.Array


class Step(NamedTuple):
    """New factors, and the pseudo-inverse products (at the old factors) that give them.

    Attributes:
      left: (1-g) B + g G A^+.
      right: (1-g) A + g B^+ G.
      left_step: G A^+, shaped like the left factor, with the rank whole on each device.
      right_step: B^+ G, shaped like the right factor, with the rank whole on each device.
    """

    left: jax.Array
    right: jax.Array
    left_step: jax.Array
    right_step: jax.Array


def einsum_axes(layout: ParamLayout, ndim: int) -> EinsumAxes:
    """Einsum axes for a parameter of ``ndim`` axes.

    Example:
      >>> einsum_axes(ParamLayout("matrix", (2,), (1,)), 3)
      EinsumAxes(param='abc', left='azc', right='azb', batch='a')
    """
    param, rows, columns = subscripts(layout, ndim)
    batch = "".join(param[axis] for axis in layout.batch_axes(ndim))
    return EinsumAxes(param, rows[:-1] + "z" + rows[-1], columns[:-1] + "z" + columns[-1], batch)


def init_factors(
    path: str, param: Any, layout: ParamLayout, rank: int, dtype: Any = None, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """The paper's initial factors: a zero left factor and a right factor drawn from N(0, 0.02^2).

    The draw hashes the leaf's path and each entry's coordinates (see `layout_optax.keys`). It depends neither
    on the order of a dict nor on sharding, and layer 3 of a stack draws the same numbers as ``layers/3`` in a
    list. No key is stored.

    Args:
      path: the leaf's path in normal form.
      param: an array, tracer or `jax.ShapeDtypeStruct`.
      layout: the parameter's layout with non-negative axes.
      rank: r >= 1.
      dtype: dtype of both factors; None for float32, float64 for a float64 parameter.
      seed: distinguishes the moments of one parameter.

    Returns:
      The left and the right factor, with the sharding of `factor_sharding` if the parameter's is known (for a
      tracer, on an Explicit mesh only).
    """
    dtype = compute_dtype(param.dtype) if dtype is None else dtype
    left_shape = with_rank(shape_without(param.shape, layout.column_axes), rank)
    left = jnp.zeros(left_shape, dtype)
    right = INIT_STD * normal_factor(path, param, layout, rank, "right", seed)
    own, ndim = known_sharding(param), len(param.shape)
    return (
        placed(left, factor_sharding(own, ndim, layout.column_axes, rank)),
        placed(right.astype(dtype), factor_sharding(own, ndim, layout.row_axes, rank)),
    )


def normal_factor(
    path: str,
    param: Any,
    layout: ParamLayout,
    rank: int,
    side: Literal["left", "right"],
    seed: int = 0,
) -> jax.Array:
    """Standard normal numbers shaped like a factor, from hashed coordinates; float32, on no mesh."""
    removed, kept = (
        (layout.row_axes, layout.column_axes)
        if side == "right"
        else (layout.column_axes, layout.row_axes)
    )
    shape = with_rank(shape_without(param.shape, removed), rank)
    rank_axis = len(shape) - 2
    # The one axis after the rank moves up by one, and the factor becomes a small "parameter".
    core = tuple(a if a < rank_axis else a + 1 for a in remaining(kept, removed))
    words = np.asarray(path_words(path), np.uint32)
    own = ParamLayout("matrix", (rank_axis,), core)
    return _hashed_normal(words, np.uint32(seed), shape, own)


@functools.partial(jax.jit, static_argnames=("shape", "layout"))
def _hashed_normal(
    words: jax.Array, seed: jax.Array, shape: tuple[int, ...], layout: ParamLayout
) -> jax.Array:
    """Standard normal numbers from hashed coordinates; XLA compiles this once per shape."""
    bits = bits_of_seeds(seeds_of_words(list(words), shape, layout, seed), shape, layout)
    # 23 bits at the middle of each cell: never 0 or 1, where the quantile is infinite.
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return jnp.sqrt(jnp.float32(2)) * jax.lax.erf_inv(2 * uniform - 1)


def reconstruct(
    left: jax.Array,
    right: jax.Array,
    layout: ParamLayout,
    like: jax.Array,
    narrow: Narrow | None = None,
) -> jax.Array:
    """The product B A in the parameter's axes, shaped and sharded like ``like``; factors have whole ranks."""
    names = einsum_axes(layout, like.ndim)
    equation = f"{names.left},{names.right}->{names.param}"
    return large_product(
        equation, left, right, narrow, sharding_without(like, ()), narrow_result=True
    )


def past(
    prepared: Prepared, layout: ParamLayout, like: jax.Array, narrow: Narrow | None = None
) -> jax.Array:
    """The product B A of the old factors, shaped and sharded like ``like``."""
    names = einsum_axes(layout, like.ndim)
    product = reconstruct(prepared.left_unit, prepared.right_unit, layout, like, narrow)
    # The scale is a power of two: multiplying after the product is exact and saves gathering B as well.
    return product * broadcast(prepared.left_scale, names.param, names.batch)


def prepare(
    left: jax.Array, right: jax.Array, layout: ParamLayout, ndim: int, kind: DampingKind
) -> Prepared:
    """Balances the factors and computes their Gram matrices.

    Relative damping does not depend on the factors' scales, so they are free. The right factor is kept near one
    and the left one is measured in units of its own size, so that Gram matrices neither overflow nor underflow.
    Absolute damping does depend on the scales and gets the factors unchanged.
    """
    names = einsum_axes(layout, ndim)
    if kind == "relative":
        left, right = balance(left, right, layout, ndim)
        left_scale = power_of_two(left, names.left, names.batch)
        unit = left / broadcast(left_scale, names.left, names.batch)
    else:
        left_scale, unit = _ones(left, names.left, names.batch), left
    grams = (gram(unit, names.left, names), gram(right, names.right, names))
    return Prepared(left, right, rank_whole(unit), rank_whole(right), left_scale, *grams)


def newton_step(
    target: jax.Array,
    prepared: Prepared,
    left_inverse: jax.Array,
    right_inverse: jax.Array,
    gamma: jax.Array | float,
    layout: ParamLayout,
    kind: DampingKind,
    narrow: Narrow | None = None,
    scale: jax.Array | float = 1.0,
) -> Step:
    """Computes one Newton step of both factors towards a target (Theorem 3.1), from the old factors.

    ::

        B' = (1-g) B + g G A^T (A A^T)^-1
        A' = (1-g) A + g (B^T B)^-1 B^T G

    Both factors step at once, so their product gets a cross term g^2 G A^+ B^+ G, of the size of a squared
    gradient over the momentum. It explodes if the momentum has vanished, or if one gradient has 10^6 times the
    usual size. With relative damping the right factor's step is therefore shrunk where the left one would jump
    by more than `MAX_JUMP` times its size (a gradient some thousand times larger than those before it). It is
    skipped where B is lost in rounding against G A^+, as the rule does from its start B = 0. Other steps do not
    change.

    Args:
      target: G, with the parameter's shape, float32 or wider.
      prepared: the old factors, see `prepare`.
      left_inverse: damped (B^T B)^-1 of ``prepared.left_gram``.
      right_inverse: damped (A A^T)^-1 of ``prepared.right_gram``.
      gamma: rate of each factor.
      layout: the parameter's layout with non-negative axes.
      kind: the kind of damping.
      narrow: how to round the operands of the products with G.
      scale: the factor of G = ``scale * target``, multiplied into the factors, which are small.
    """
    names = einsum_axes(layout, target.ndim)
    own, rank = explicit_sharding(target), prepared.left.shape[-2]

    def solve(inverse, side, factor):
        equation = f"{names.batch}zZ,{side.replace('z', 'Z')}->{side}"
        return rank_whole(exact_product(equation, inverse, factor, sharding_without(factor, ())))

    def product(equation, factor, removed):
        whole = factor_sharding(own, target.ndim, removed)
        found = rank_whole(large_product(equation, target, factor * scale, narrow, whole))
        return found, placed(found, factor_sharding(own, target.ndim, removed, rank))

    # The inverses act on the thin factors first. The product leaves a sum over devices, of which each device
    # keeps its part of the rank: XLA makes one reduce-scatter of the two.
    left_whole, left_step = product(
        f"{names.param},{names.right}->{names.left}",
        solve(right_inverse, names.right, prepared.right_unit),
        layout.column_axes,
    )
    right_whole, right_step = product(
        f"{names.param},{names.left}->{names.right}",
        solve(left_inverse, names.left, prepared.left_unit),
        layout.row_axes,
    )
    if kind == "relative":
        axes = core_axes(names.left, names.batch)
        size = lambda x: jnp.max(jnp.abs(x), axis=axes, initial=0)  # noqa: E731
        old, fresh = size(prepared.left), size(left_step)
        alive = old > jnp.finfo(target.dtype).eps * fresh
        unit = broadcast(jnp.where(alive, 1 / prepared.left_scale, 0), names.right, names.batch)
        right_step, right_whole = right_step * unit, right_whole * unit
        limit, fresh = MAX_JUMP * old, gamma * fresh
        trust = jnp.where(fresh > limit, limit / jnp.where(fresh > limit, fresh, 1), 1)
        trusted = right_step * broadcast(trust, names.right, names.batch)
    else:
        trusted = right_step
    return Step(
        (1 - gamma) * prepared.left + gamma * left_step,
        (1 - gamma) * prepared.right + gamma * trusted,
        left_whole,
        right_whole,
    )


def remembered(
    target: jax.Array,
    prepared: Prepared,
    step: Step,
    decay: jax.Array | float,
    weight: jax.Array | float,
    layout: ParamLayout,
    narrow: Narrow | None = None,
) -> jax.Array:
    """``decay B A - weight / 2 (P_B G + G P_A)``, as one product of twice the rank.

    P_B and P_A project on the spans of the old factors; their products with G reuse those of the step. Adding
    ``weight`` times G adds the part of a target that the factors cannot hold to the history.
    """
    names = einsum_axes(layout, target.ndim)
    unit = broadcast(prepared.left_scale, names.right, names.batch)
    half = weight / 2
    left = jnp.concatenate([prepared.left_unit, step.left_step], axis=-2)
    right = jnp.concatenate(
        [
            (decay * prepared.right_unit - half * step.right_step) * unit,
            -half * prepared.right_unit,
        ],
        axis=-2,
    )
    return reconstruct(left, right, layout, target, narrow)


def balance(
    left: jax.Array, right: jax.Array, layout: ParamLayout, ndim: int
) -> tuple[jax.Array, jax.Array]:
    """Moves scale between the factors so that the right one's largest entry is in [1/2, 1).

    (B s, A / s) is the same momentum, and the rule does not determine s. Without balancing the norms drift
    apart, and zero gradients let both factors decay until the subspace is lost. With the right factor's size
    fixed, only the left factor decays; it may reach zero and start again as at first. s is a power of two, so
    the product does not change by a bit. There is one s per batch index.
    """
    names = einsum_axes(layout, ndim)
    scale = power_of_two(right, names.right, names.batch)
    return (
        left * broadcast(scale, names.left, names.batch),
        right / broadcast(scale, names.right, names.batch),
    )


def gram(factor: jax.Array, side: str, names: EinsumAxes) -> jax.Array:
    """Gram matrix over all axes but batch and rank; replicated, since it is small."""
    sharding = explicit_sharding(factor)
    split = None
    if sharding is not None:
        # Keep batch and rank as the factor has them: each device computes on its rows of its matrices.
        entries = dict(zip(side, spec_entries(sharding, factor.ndim), strict=True))
        spec = (*(entries[axis] for axis in names.batch), entries["z"], None)
        split = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    equation = f"{side},{side.replace('z', 'Z')}->{names.batch}zZ"
    found = exact_product(equation, factor, rank_whole(factor), split)
    # A separate step: otherwise each device gathers the factors of all batch indices.
    if split is None:
        return constrained(constrained(found, (found.ndim - 1,)), range(found.ndim))
    return placed(found, NamedSharding(split.mesh, PartitionSpec()))


def core_axes(side: str, batch: str) -> tuple[int, ...]:
    """The axes of a factor that are not batch axes."""
    return tuple(axis for axis, letter in enumerate(side) if letter not in batch)


def broadcast(values: jax.Array, side: str, batch: str) -> jax.Array:
    """Adds axes of size one to batch-shaped values where the factor has core axes."""
    return jnp.expand_dims(values, core_axes(side, batch))


def _ones(factor: jax.Array, side: str, batch: str) -> jax.Array:
    """Ones in the shape of a factor's batch axes."""
    return jnp.ones(tuple(factor.shape[side.index(letter)] for letter in batch), factor.dtype)


def power_of_two(factor: jax.Array, side: str, batch: str) -> jax.Array:
    """The power of two just above a factor's largest entry per batch index; 1 for a zero factor."""
    largest = jnp.max(jnp.abs(factor), axis=core_axes(side, batch))
    # From the exponent's bits: frexp and ldexp take five times as many operations to compile.
    info = jnp.finfo(largest.dtype)
    integer = jnp.int64 if info.bits == 64 else jnp.int32
    field = jax.lax.bitcast_convert_type(largest, integer) >> info.nmant
    one = 1 - int(info.minexp)  # the field of 1, and of numbers below 2
    power = (jnp.clip(field + 1, one - 120, one + 120) << info.nmant).astype(integer)
    power = jax.lax.bitcast_convert_type(power, largest.dtype)
    return jnp.where((largest > 0) & jnp.isfinite(largest), power, 1)
