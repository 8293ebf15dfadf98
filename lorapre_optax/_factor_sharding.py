"""Shape and sharding of a factor: the rank, second to last, takes the mesh axes that the others leave over."""

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
    """A shape with the rank axis second to last."""
    return (*shape[:-1], rank, shape[-1])


def factor_sharding(
    own: NamedSharding | None, ndim: int, removed: Sequence[int], rank: int | None = None
) -> NamedSharding | None:
    """The sharding of a factor of a parameter.

    The factor's axes keep the mesh axes that they have in the parameter. The rank axis takes those of the
    removed axes, as many as divide the rank; a mesh axis that does not shard the parameter stays unused.

    Args:
      own: the parameter's sharding; None gives None.
      ndim: the parameter's number of axes.
      removed: its axes that the factor lacks.
      rank: the factor's rank; None leaves the rank axis whole, as products want it.

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
    """A factor with its rank axis whole on each device, its other axes as they are.

    Where types carry shardings this is a gather, if the rank is sharded. On Auto mesh axes it is a constraint
    on the rank axis alone, since the rest is XLA's to know; without a mesh it is the factor itself.
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
    """A traced array on Auto mesh axes with these axes whole on each device; any other as it is."""
    sharding = named_sharding(x)
    if sharding is None or not isinstance(x, Tracer):
        return x
    if any(kind != AxisType.Auto for kind in sharding.mesh.axis_types):
        return x
    spec = (None if axis in whole else PartitionSpec.UNCONSTRAINED for axis in range(x.ndim))
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))
