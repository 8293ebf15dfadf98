"""Arithmetic on a parameter's own axes: means, norms and contractions over rows or columns.

These functions neither transpose nor reshape. A reduced array keeps the parameter's remaining axes in
order, so its sharding is the parameter's without the reduced axes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layout_optax.layout import EINSUM_AXES, ParamLayout

LARGE_STATISTIC = 2**16
"""Statistics with at least this many elements are also sharded along the mesh axes of removed axes."""


def compute_dtype(dtype: Any) -> jnp.dtype:
    """The dtype for computing statistics: float32, or the given dtype where that is wider.

    Example:
      >>> compute_dtype(jnp.bfloat16)
      dtype('float32')
    """
    # `jnp.promote_types` finds no common dtype under strict promotion.
    dtype = jnp.dtype(dtype)
    wide = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 4
    return dtype if wide else jnp.dtype("float32")


def rms(x: jax.Array, axes: Sequence[int], *, keepdims: bool = True) -> jax.Array:
    """Root mean square over ``axes``; the absolute value if there are no axes."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(axes), keepdims=keepdims))


def remaining(axes: Sequence[int], removed: Sequence[int]) -> tuple[int, ...]:
    """The positions of a parameter's ``axes`` after the ``removed`` axes are gone.

    Example:
      >>> remaining((0, 3), removed=(1,))
      (0, 2)
    """
    return tuple(axis - sum(gone < axis for gone in removed) for axis in axes)


def shape_without(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """A shape without the given axes."""
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def subscripts(layout: ParamLayout, ndim: int) -> tuple[str, str, str]:
    """Einsum axes of a whole parameter, of its batch and row axes, and of its batch and column axes.

    Each keeps the parameter's axis order. None uses ``z``, which is free for a rank axis.
    `ParamLayout.resolve` refuses parameters with more axes than there are letters.

    Example:
      >>> subscripts(ParamLayout("matrix", (2,), (1,)), 3)
      ('abc', 'ac', 'ab')
    """
    letters = EINSUM_AXES[:ndim]
    without = lambda axes: "".join(c for i, c in enumerate(letters) if i not in axes)  # noqa: E731
    return letters, without(layout.column_axes), without(layout.row_axes)


def named_sharding(x: Any) -> NamedSharding | None:
    """The named sharding of an array, shape or tracer on any kind of mesh, or None."""
    traced = isinstance(x, Tracer)
    # Arrays and shapes know their concrete mesh, which an eager computation needs.
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    named = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    return sharding if named else None


def spec_entries(sharding: NamedSharding, ndim: int) -> tuple[Any, ...]:
    """The entries of a sharding's spec, one per axis; a spec may omit its last entries.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((2,), ("x",))
      >>> spec_entries(NamedSharding(mesh, PartitionSpec("x")), 2)
      ('x', None)
    """
    return tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes that an entry of a spec names.

    Example:
      >>> mesh_axes(None), mesh_axes("x"), mesh_axes(("x", "y"))
      ((), ('x',), ('x', 'y'))
    """
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def dividing_axes(
    size: int, names: Sequence[str], devices: Mapping[str, int]
) -> str | tuple[str, ...] | None:
    """The spec entry that shards an axis of this size over as many devices as these mesh axes allow.

    JAX requires shards of equal size, so mesh axes are left out until the rest divides the axis. Among the
    possible choices, the one with the most devices wins, then the one with the most mesh axes.

    Args:
      size: the axis's size.
      names: mesh axes to choose from.
      devices: the number of devices along each mesh axis, as in ``mesh.shape``.

    Example:
      >>> [dividing_axes(size, ("x", "y"), {"x": 2, "y": 4}) for size in (16, 12, 6, 5)]
      [('x', 'y'), 'y', 'x', None]
    """
    best, most = (), 1
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            pieces = math.prod(devices[name] for name in chosen)
            if size % pieces == 0 and (pieces > most or (pieces == most and count > len(best))):
                best, most = chosen, pieces
    return joined(best)


def joined(names: Sequence[str]) -> str | tuple[str, ...] | None:
    """The spec entry of some mesh axes; see `mesh_axes`."""
    return tuple(names) if len(names) > 1 else names[0] if names else None


def project(sharding: NamedSharding, ndim: int, axes: Sequence[int]) -> NamedSharding:
    """Removes the entries of the given axes from a sharding of ``ndim`` axes."""
    entries = enumerate(spec_entries(sharding, ndim))
    kept = [entry for axis, entry in entries if axis not in axes]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding of an array, shape or tracer if any of its mesh axes is Explicit, else None.

    In the types of a mesh with axes of both kinds, the spec shows the Explicit ones.
    """
    sharding = named_sharding(x)
    if sharding is None:
        return None
    explicit = any(kind == AxisType.Explicit for kind in sharding.mesh.axis_types)
    return sharding if explicit else None


def known_sharding(x: Any) -> NamedSharding | None:
    """The sharding if it is known: for a tracer on Explicit mesh axes only, otherwise on any mesh."""
    return explicit_sharding(x) if isinstance(x, Tracer) else named_sharding(x)


def placed(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """Places an array in this sharding; None leaves the array as it is."""
    if sharding is None:
        return x
    reshard = jax.sharding.reshard if isinstance(x, Tracer) else jax.device_put
    return reshard(x, sharding)


def sharding_without(x: Any, axes: Sequence[int]) -> NamedSharding | None:
    """The sharding without the entries of ``axes`` if all mesh axes are Explicit, else None."""
    sharding = explicit_sharding(x)
    return None if sharding is None else project(sharding, len(x.shape), axes)


def statistic_sharding(
    own: NamedSharding | None, shape: Sequence[int], removed: Sequence[int]
) -> NamedSharding | None:
    """The sharding of a statistic, which lacks some axes of its parameter.

    The statistic's axes keep the mesh axes that they have in the parameter. If it has at least
    `LARGE_STATISTIC` elements, its longest axis also takes as many mesh axes of the removed axes as divide it.
    For smaller statistics a copy on every device is cheaper than moving data.

    Args:
      own: the parameter's sharding; None gives None.
      shape: the parameter's shape.
      removed: axes that the statistic lacks.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
      >>> own = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
      >>> [statistic_sharding(own, (size, 4096), (1,)).spec for size in (4096, 128256)]
      [P(None,), P('fsdp',)]
    """
    if own is None:
        return None
    kept, sizes = project(own, len(shape), removed), shape_without(shape, removed)
    entries = spec_entries(own, len(shape))
    free = [name for axis in sorted(removed) for name in mesh_axes(entries[axis])]
    if not free or math.prod(sizes) < LARGE_STATISTIC:
        return kept
    spec, longest = list(kept.spec), max(range(len(sizes)), key=lambda axis: sizes[axis])
    has = mesh_axes(spec[longest])
    pieces = sizes[longest] // math.prod(own.mesh.shape[name] for name in has)
    names = (*has, *mesh_axes(dividing_axes(pieces, free, own.mesh.shape)))
    spec[longest] = joined(names)
    return NamedSharding(own.mesh, PartitionSpec(*spec))


def open_statistic(x: jax.Array, like: jax.Array, removed: Sequence[int]) -> jax.Array:
    """Reshards a statistic for a step: along its parameter's axes, with the mesh axes they have there."""
    if x.size < LARGE_STATISTIC:
        return x
    return placed(x, sharding_without(like, removed))


def close_statistic(x: jax.Array, like: jax.Array, removed: Sequence[int]) -> jax.Array:
    """Reshards a statistic as the state stores it; see `statistic_sharding`."""
    if x.size < LARGE_STATISTIC:
        return x
    return placed(x, statistic_sharding(explicit_sharding(like), like.shape, removed))


def zeros_without(param: Any, axes: Sequence[int], dtype: Any) -> jax.Array:
    """Zeros of a parameter's shape without ``axes``, created with the projected sharding.

    Under `jax.jit` the projection needs a mesh of Explicit axes, since a tracer on an Auto mesh does not know
    its sharding. Outside of `jax.jit` it uses the array's own sharding on any mesh.

    Args:
      param: an array, tracer or `jax.ShapeDtypeStruct`.
      axes: non-negative axes to leave out; ``()`` for the parameter's own shape.
      dtype: the dtype of the zeros.
    """
    sharding = known_sharding(param)
    projected = None if sharding is None else project(sharding, len(param.shape), axes)
    return _zeros(param, shape_without(param.shape, axes), dtype, projected)


def zero_statistic(param: Any, axes: Sequence[int], dtype: Any) -> jax.Array:
    """`zeros_without` with the sharding of `statistic_sharding`, for use as state."""
    sharding = statistic_sharding(known_sharding(param), param.shape, axes)
    return _zeros(param, shape_without(param.shape, axes), dtype, sharding)


def _zeros(param: Any, shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    if isinstance(param, Tracer):
        return jnp.zeros(shape, dtype, out_sharding=sharding)
    return jnp.zeros(shape, dtype, device=sharding)


def contract(
    x: jax.Array, weights: jax.Array, layout: ParamLayout, over: str, *, precision: Any = "highest"
) -> jax.Array:
    """Sums ``x * weights`` over the rows or the columns of a parameter.

    Args:
      x: an array of the parameter's shape.
      weights: shape of the parameter without its other core axes (``over="columns"``: batch and
        column axes; ``over="rows"``: batch and row axes).
      layout: the parameter's layout with non-negative axes.
      over: ``"rows"`` or ``"columns"``, the axes that are summed away.
      precision: matmul precision; accelerators default to bfloat16 or TF32, which are too coarse for norms.

    Returns:
      Shape of the parameter without the summed axes.
    """
    full, rows, columns = subscripts(layout, x.ndim)
    weight, out = (columns, rows) if over == "columns" else (rows, columns)
    axes = layout.column_axes if over == "columns" else layout.row_axes
    return jnp.einsum(
        f"{full},{weight}->{out}",
        x,
        weights,
        precision=precision,
        out_sharding=sharding_without(x, axes),
    )
