"""Newton-Schulz on whole matrices: on a mesh, each matrix moves to one device before the iteration.

The iteration multiplies matrices five times, and on sharded matrices every product moves about as much data as
the matrix holds. Here the matrices move once. Equal matrices are stacked, and the mesh axes move from the
matrix axes to the stack, one at a time, each by an all-to-all of a shard's size. Every device then iterates on
its own matrices without further communication, and the mesh axes move back.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layout_optax.axes import mesh_axes, named_sharding, placed, spec_entries
from layout_optax.layout import ParamLayout
from lorapre_optax._newton_schulz import orthogonalize
from lorapre_optax._products import Narrow

Parts = list[tuple[str, ...]]
"""The mesh axes on each axis of an array."""


def distributed_orthogonalize(
    xs: Sequence[jax.Array],
    layouts: Sequence[ParamLayout],
    steps: jax.Array | int = 5,
    eps: jax.Array | float = 1e-8,
    narrow: Sequence[Narrow | None] | None = None,
) -> list[jax.Array]:
    """Applies `orthogonalize` to many parameters, with every matrix whole on some device.

    A mesh axis that divides no stack is gathered, and its devices repeat the same work. Without a mesh this
    function calls `orthogonalize` on each parameter.

    Args:
      xs: float32 or wider, any number of row, column and batch axes each.
      layouts: their layouts with non-negative axes.
      steps: number of iterations.
      eps: see `orthogonalize`.
      narrow: see `orthogonalize`, one for each parameter or None.

    Returns:
      Arrays like ``xs``, on Explicit mesh axes with their shardings.
    """
    results: list[jax.Array | None] = [None] * len(xs)
    narrow = [None] * len(xs) if narrow is None else narrow
    for group in _groups(xs, layouts, narrow):
        members = [xs[i] for i in group]
        layout = layouts[group[0]]
        if named_sharding(members[0]) is None or len(group) == 1:
            for i in group:
                results[i] = _reshard(xs[i], layout, steps, eps, narrow[i])
            continue
        above = ParamLayout(
            layout.role,
            tuple(axis + 1 for axis in layout.row_axes),
            tuple(axis + 1 for axis in layout.column_axes),
        )
        stack = _reshard(jnp.stack(members), above, steps, eps, narrow[group[0]])
        for position, i in enumerate(group):
            results[i] = jax.lax.index_in_dim(stack, position, keepdims=False)
    return [result for result in results if result is not None]


def _groups(
    xs: Sequence[jax.Array], layouts: Sequence[ParamLayout], narrow: Sequence[Narrow | None]
) -> Iterator[list[int]]:
    """Groups positions of arrays that can be stacked: of one layout, shape, dtypes and sharding."""
    groups: dict[Hashable, list[int]] = {}
    for i, (x, layout, rounded) in enumerate(zip(xs, layouts, narrow, strict=True)):
        groups.setdefault((layout, x.shape, x.dtype, rounded, named_sharding(x)), []).append(i)
    yield from groups.values()


def _reshard(
    x: jax.Array, layout: ParamLayout, steps: Any, eps: Any, narrow: Narrow | None
) -> jax.Array:
    """Orthogonalises with the mesh axes moved to the batch axes, then moves them back."""
    sharding = named_sharding(x)
    if sharding is None:
        return orthogonalize(x, layout, steps, eps, narrow)
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    # The spec in a traced type shows Explicit axes only.
    movable = AxisType.Explicit if AxisType.Explicit in kinds.values() else AxisType.Auto
    known = not isinstance(x, Tracer) or movable == AxisType.Explicit
    parts = _parts(sharding, x.ndim) if known else [()] * x.ndim
    sizes = {
        name: size
        for name, size in sharding.mesh.shape.items()
        if kinds[name] == movable and size > 1
    }
    if not sizes or (known and not any(parts)):
        return orthogonalize(x, layout, steps, eps, narrow)
    path, touched = _moves(parts, x.shape, layout.batch_axes(x.ndim), sizes)

    def place(y: jax.Array, parts: Parts, free: bool) -> jax.Array:
        spec = [names or None for names in parts]
        if known:
            target = NamedSharding(sharding.mesh, PartitionSpec(*spec))
            return placed(y, target)
        if free:  # XLA finds the unspecified axes from the step before or after
            spec = [
                names if axis in touched else PartitionSpec.UNCONSTRAINED
                for axis, names in enumerate(spec)
            ]
        return jax.lax.with_sharding_constraint(
            y, NamedSharding(sharding.mesh, PartitionSpec(*spec))
        )

    for position, each in enumerate(path[1:], start=1):
        x = place(x, each, free=position < len(path) - 1)
    whole = PartitionSpec(*(names or None for names in path[-1]))
    # Without this frame XLA would find work for an axis that a matrix is gathered over.
    x = jax.shard_map(
        lambda x, steps, eps: orthogonalize(x, layout, steps, eps, narrow),
        mesh=sharding.mesh,
        in_specs=(whole, PartitionSpec(), PartitionSpec()),
        out_specs=whole,
        axis_names=set(sizes),
    )(x, jnp.asarray(steps), jnp.asarray(eps, x.dtype))
    for each in reversed(path[:-1]):
        x = place(x, each, free=True)
    return x


def _parts(sharding: NamedSharding, ndim: int) -> Parts:
    return [mesh_axes(entry) for entry in spec_entries(sharding, ndim)]


def _moves(
    parts: Parts, shape: Sequence[int], batch: Sequence[int], sizes: dict[str, int]
) -> tuple[list[Parts], set[int]]:
    """The placements from the present one to whole matrices, and the batch axes that get mesh axes.

    One mesh axis moves at a time, the largest first, because XLA moves several at once by gathering all.
    """
    path, touched = [list(parts)], set()
    pieces = list(shape)
    for axis in batch:
        for name in parts[axis]:
            pieces[axis] //= sizes.get(name, 1)
    placed = {name for axis in batch for name in parts[axis]}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        target = next((axis for axis in batch if pieces[axis] % sizes[name] == 0), None)
        if name in placed or target is None:
            continue
        now = [tuple(other for other in names if other != name) for names in path[-1]]
        now[target] = (*now[target], name)
        pieces[target] //= sizes[name]
        touched.add(target)
        path.append(now)
    last = [names if axis in batch else () for axis, names in enumerate(path[-1])]
    if last != path[-1] or len(path) == 1:
        path.append(last)
    return path, touched
