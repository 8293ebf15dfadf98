"""Random bits for each parameter, independent of dict order, sharding and scanning.

A leaf's seed is the hash of its path without the indices of layer stacks (``layers/3/q``, ``layers_3/q`` and
``layers/q`` have the same hash), mixed with those indices in order and then with the indices along the batch
axes. Layer 3 therefore draws the same numbers in a list and in a stack.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from layout_optax.layout import ParamLayout

_NUMBERED_STACK = re.compile(r"^((?:\w+_)?(?:layers|blocks|layer|block))_(\d+)$")


def split_path(path: str) -> tuple[str, tuple[int, ...]]:
    """Splits a path into the path without stack indices, and those indices in order.

    Example:
      >>> split_path("layers/3/q"), split_path("layers_3/q"), split_path("layers/q")
      (('layers/q', (3,)), ('layers/q', (3,)), ('layers/q', ()))
    """
    names, indices = [], []
    for component in path.split("/"):
        if component.isdigit():
            indices.append(int(component))
        elif numbered := _NUMBERED_STACK.match(component):
            names.append(numbered[1])
            indices.append(int(numbered[2]))
        else:
            names.append(component)
    return "/".join(names), tuple(indices)


def mix(x: jax.Array) -> jax.Array:
    """A bijective 32-bit mixer: every input bit changes every output bit about half the time.

    The two multipliers are C. Wellons's ``lowbias32`` constants (a published low-bias search result).
    """
    x = jnp.asarray(x, jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def fold(seed: jax.Array, value: jax.Array | int) -> jax.Array:
    """Mixes a value into a seed (uint32, any broadcastable shapes). The order of calls matters."""
    return mix(mix(seed) + jnp.asarray(value, jnp.uint32) * jnp.uint32(0x9E3779B9))


def leaf_seeds(
    path: str, shape: Sequence[int], layout: ParamLayout, seed: jax.Array | int = 0
) -> jax.Array:
    """One uint32 seed per batch index of a parameter.

    Args:
      path: the leaf's path in normal form.
      shape: the parameter's shape.
      layout: its layout with non-negative axes.
      seed: a number from the user, possibly traced (a step count).

    Returns:
      uint32, shape of the batch axes: ``()`` for a plain matrix, ``(layers,)`` for a stack.

    Example:
      >>> matrix, stack = ParamLayout("matrix", (1,), (0,)), ParamLayout("matrix", (2,), (1,))
      >>> one = leaf_seeds("layers/3/q", (4, 5), matrix)
      >>> bool(one == leaf_seeds("layers/q", (8, 4, 5), stack)[3])
      True
    """
    return seeds_of_words(path_words(path), shape, layout, seed)


def path_words(path: str) -> tuple[int, ...]:
    """The numbers that represent a path in a seed: the hash of its name, then its stack indices."""
    name, indices = split_path(path)
    return zlib.crc32(name.encode()), *indices


def seeds_of_words(
    words: Sequence[jax.Array | int],
    shape: Sequence[int],
    layout: ParamLayout,
    seed: jax.Array | int = 0,
) -> jax.Array:
    """`leaf_seeds` of a path given as `path_words`, which may be traced."""
    seeds = jnp.asarray(seed, jnp.uint32)
    for word in words:
        seeds = fold(seeds, word)
    for axis in layout.batch_axes(len(shape)):
        seeds = fold(seeds[..., None], jnp.arange(shape[axis], dtype=jnp.uint32))
    return seeds


def element_bits(
    path: str, shape: Sequence[int], layout: ParamLayout, seed: jax.Array
) -> jax.Array:
    """Hashes seeds and coordinates into one uint32 of random bits per entry of a parameter.

    The hash uses only element-wise integer arithmetic on iotas, so it fuses into its consumer and never
    depends on sharding.

    Returns:
      uint32, the parameter's shape.
    """
    return bits_of_seeds(leaf_seeds(path, shape, layout, seed), shape, layout)


def bits_of_seeds(seeds: jax.Array, shape: Sequence[int], layout: ParamLayout) -> jax.Array:
    """`element_bits` from the seeds of all batch indices."""
    ndim = len(shape)
    core = layout.row_axes + layout.column_axes
    bits = jnp.expand_dims(seeds, core)
    # Fold rows and columns in turn: a product of coordinates would repeat along diagonals.
    for axis in core:
        index = jnp.arange(shape[axis], dtype=jnp.uint32)
        bits = fold(bits, jnp.expand_dims(index, tuple(a for a in range(ndim) if a != axis)))
    return bits
