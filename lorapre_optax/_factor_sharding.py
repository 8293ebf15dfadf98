"""Shape and sharding of a factor: its rank axis, second to last, takes the mesh axes that the others leave."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from layout_optax.axes import (
    dividing_axes,
    explicit_sharding,
    mesh_axes,
    named_sharding,
    placed,
    project,
    spec_entries,
)


def with_rank(shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Inserts the rank axis into a shape, second to last."""
    return (*shape[:-1], rank, shape[-1])


def factor_sharding(
    own: NamedSharding | None, ndim: int, removed: Sequence[int], rank: int | None = None
) -> NamedSharding | None:
    """Returns the sharding of a factor of a parameter.

    The factor's axes keep the mesh axes that they have in the parameter. The rank axis takes as many mesh axes
    of the removed axes as divide the rank. A mesh axis that does not shard the parameter stays unused.

    Args:
      own: the parameter's sharding; None gives None.
      ndim: the parameter's number of axes.
      removed: the parameter's axes that the factor lacks.
      rank: the factor's rank; None leaves the rank axis whole, as products need it.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((8,), ("fsdp",))
      >>> own = NamedSharding(mesh, PartitionSpec("fsdp", None))
      >>> [factor_sharding(own, 2, (axis,), rank=64).spec for axis in (0, 1)]
      [P('fsdp', None), P(None, 'fsdp')]
    """
    if own is None:
        return None
    kept = project(own, ndim, removed).spec
    entries = spec_entries(own, ndim)
    free = [name for axis in sorted(removed) for name in mesh_axes(entries[axis])]
    part = None if rank is None else dividing_axes(rank, free, own.mesh.shape)
    return NamedSharding(own.mesh, PartitionSpec(*kept[:-1], part, kept[-1]))


def rank_whole(factor: jax.Array) -> jax.Array:
    """Makes the rank axis of a factor whole on each device and leaves its other axes.

    If types carry shardings and the rank is sharded, this is a gather. On Auto mesh axes it constrains only the
    rank axis, since XLA decides the rest. Without a mesh it returns the factor.
    """
    sharding = named_sharding(factor)
    if sharding is None:
        return factor
    if explicit_sharding(factor) is None:
        return constrained(factor, (factor.ndim - 2,))
    entries = spec_entries(sharding, factor.ndim)
    if entries[-2] is None:
        return factor
    whole = PartitionSpec(*entries[:-2], None, entries[-1])
    return placed(factor, NamedSharding(sharding.mesh, whole))


def constrained(x: jax.Array, whole: Sequence[int]) -> jax.Array:
    """Constrains a traced array on Auto mesh axes to have these axes whole on each device."""
    sharding = named_sharding(x)
    if sharding is None or not isinstance(x, Tracer):
        return x
    if any(kind != AxisType.Auto for kind in sharding.mesh.axis_types):
        return x
    spec = (None if axis in whole else PartitionSpec.UNCONSTRAINED for axis in range(x.ndim))
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
