"""Fingerprints of arrays, computed where the arrays are: equal on every mesh, different for every changed bit.

Storage formats check their own indices but not always the numbers. Fingerprints show whether the arrays read
are the arrays written. Integer sums do not depend on their order, so each device sums its own part.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from layout_optax.layout import path_string

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
_ODD, _STRIDE = 0x9E3779B1, 0x85EBCA6B


def fingerprints(tree: Any) -> dict[str, str]:
    """64 bits of every array of a tree, as 16 hexadecimal digits by path.

    Two sums modulo 2^32 over all elements, of their bits b at position p: b (2 p + 1) K, and a bijective mix of
    b and p. A single changed element changes both. Other changes, exchanged elements and another dtype also do,
    except with probability 2^-64.

    Args:
        tree: A pytree of arrays, sharded or not. Several processes must call it together.

    Raises:
        TypeError: A leaf has no readable bits (a typed key); the message names it.

    >>> one = fingerprints({"w": jnp.arange(4.0)})
    >>> one == fingerprints({"w": jnp.arange(4.0)}), one == fingerprints({"w": -jnp.arange(4.0)})
    (True, False)
    >>> len(one["w"])
    16
    """
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    paths = [path_string(keys) for keys, _ in flat]
    for path, (_, leaf) in zip(paths, flat, strict=True):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"'{path}' is of dtype {leaf.dtype}, which has no fingerprint")
    arrays = [_on_auto_axes(leaf) for _, leaf in flat]
    shardings = [getattr(leaf, "sharding", None) for leaf in arrays]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
    replicated = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    sums = jax.device_get(jax.jit(_sums, out_shardings=replicated)(arrays))
    return {path: f"{a:08x}{b:08x}" for path, (a, b) in zip(paths, sums, strict=True)}


def _sums(arrays: list[jax.Array]) -> jax.Array:
    """uint32 (number of arrays, 2)."""
    rows = [jnp.stack(_sum(array)) for array in arrays]
    return jnp.stack(rows) if rows else jnp.zeros((0, 2), jnp.uint32)


def _sum(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, _WORDS[array.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        stride = jnp.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
        position += stride * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) if size else 0
    kind = jnp.uint32(sum(ord(c) << i for i, c in enumerate(str(array.dtype))))
    product = bits * (2 * position + 1) * jnp.uint32(_ODD)
    mixed = _mix(bits + position * jnp.uint32(_STRIDE) + kind)
    return jnp.sum(product, dtype=jnp.uint32), jnp.sum(mixed, dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which every input bit reaches every output bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def _on_auto_axes(leaf: Any) -> Any:
    """The same array on the same devices, but without its sharding in its type."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return leaf
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.device_put(leaf, NamedSharding(mesh, sharding.spec))
