"""Names for the axes of an optimizer's state, by which trainers place it, from those of the parameters."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from layout_optax.axes import dividing_axes, mesh_axes, named_sharding
from layout_optax.layout import PyTree
from layout_optax.sharding import state_shardings

_NAMES = ("out_sharding", "sharding_names", "sharding")
"""Attributes with axis names, today's and older ones; MaxText's variables have two at once."""


class Owner(NamedTuple):
    """A parameter with names: the box it lies in, its array, and the names on its axes."""

    box: Any
    value: Any
    names: tuple[Any, ...]


def is_named_array(node: Any) -> bool:
    """Whether a node is a Haliax ``NamedArray``, told by its class: an array with a name for each axis."""
    return {"array", "axis_names"} <= getattr(type(node), "__dataclass_fields__", {}).keys()


def partition_names(box: Any, ndim: int) -> tuple[Any, ...] | None:
    """The names that an NNX variable or a Haliax array has for its axes; None where it has none.

    Names are mesh axes, or logical axes that rules turn into mesh axes later. MaxText stores a scanned axis
    separately; this function inserts it.
    """
    if is_named_array(box):
        return tuple(box.axis_names) if len(box.axis_names) == ndim else None
    if not hasattr(type(box), "get_metadata"):
        return None
    metadata, names = box.get_metadata(), _names(box)
    scanned, axis = metadata.get("partition_name"), metadata.get("param_scan_axis")
    if scanned is not None and axis is not None and scanned not in names and len(names) < ndim:
        names.insert(axis, scanned)
    if not any(names) or len(names) > ndim:
        return None
    return (*names, *(None,) * (ndim - len(names)))


def has_partition_names(box: Any) -> bool:
    """Whether an NNX variable names any axis."""
    return any(_names(box))


def _names(box: Any) -> list[Any]:
    metadata = box.get_metadata()
    found = (metadata.get(key) for key in ("optimizer_sharding", *_NAMES))
    names = next(filter(None, found), None)
    if isinstance(names, NamedSharding):
        names = names.spec
    return [names] if isinstance(names, str) else list(names or ())


def with_metadata(
    tx: optax.GradientTransformation, params: PyTree, owners: list[Owner | None], state: PyTree
) -> PyTree:
    """Puts every state array whose parameter has axis names into a variable of its parameter's kind.

    Every named axis of every parameter counts as a mesh axis of its own, of one device. `state_shardings` then
    shows for each axis of the state which axes of which parameter it may follow.

    Args:
      tx: the transformation, on arrays.
      params: the parameters without boxes.
      owners: for each of their leaves the parameter with its names, or None if it has none.
      state: the result of ``tx.init`` for the parameters.

    Returns:
      The state. Arrays without a name on any axis stay as they are.
    """
    sizes: dict[str, int] = {}
    named: dict[str, tuple[Owner, Any]] = {}
    specs = []
    for i, owner in enumerate(owners):
        tokens = []
        for axis, entry in enumerate(() if owner is None else owner.names):
            token = f"{i}.{axis}" if entry else None
            tokens.append(token)
            if token and owner:
                named[token] = owner, entry
                sizes[token] = _shards(owner, axis)
        specs.append(PartitionSpec(*tokens))
    mesh = AbstractMesh((1,) * len(sizes), tuple(sizes))
    leaves, treedef = jax.tree.flatten(params)
    shapes = [
        jax.ShapeDtypeStruct(
            jnp.shape(leaf), jax.dtypes.result_type(leaf), sharding=NamedSharding(mesh, spec)
        )
        for leaf, spec in zip(leaves, specs, strict=True)
    ]
    try:
        with _axes_of_one_device():
            shardings = state_shardings(tx, treedef.unflatten(shapes))
    except Exception as error:  # any error that a third-party init raises on Explicit axes
        warnings.warn(
            "unboxed: the state gets no sharding metadata, since init does not run on a mesh of Explicit "
            f"axes ({type(error).__name__}: {error}). Place the state yourself.",
            stacklevel=4,
        )
        return state

    def box(leaf: Any, sharding: NamedSharding) -> Any:
        found = [named[token] for entry in sharding.spec for token in mesh_axes(entry)]
        if not found:
            return leaf
        names = tuple(
            _entry(size, mesh_axes(entry), named, sizes)
            for size, entry in zip(leaf.shape, sharding.spec, strict=True)
        )
        return _boxed(leaf, found[0][0].box, names) if any(names) else leaf

    return jax.tree.map(box, state, shardings)


@contextlib.contextmanager
def _axes_of_one_device() -> Iterator[None]:
    """Has types keep mesh axes of one device, as all are here; MaxText has JAX drop them."""
    flag = "jax_remove_size_one_mesh_axis_from_type"
    before = getattr(jax.config, flag, False)
    if before:
        jax.config.update(flag, False)
    try:
        yield
    finally:
        if before:
            jax.config.update(flag, before)


def _mesh(owner: Owner) -> Mesh | AbstractMesh | None:
    """The mesh that a parameter is on or will be on."""
    sharding = named_sharding(owner.value)
    if sharding is not None:
        return sharding.mesh
    mesh = _metadata(owner.box).get("mesh") or jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def _metadata(box: Any) -> Mapping[str, Any]:
    """What an NNX variable knows beside its value; a Haliax array knows names alone."""
    return {} if is_named_array(box) else box.get_metadata()


def _shards(owner: Owner, axis: int) -> int:
    """The number of parts of an axis, or a multiple of it that divides the axis.

    Without a mesh, or where other rules turn the name into mesh axes, the number of devices stands for the
    number of parts: if it divides an axis, so does any mesh of these devices.
    """
    size, mesh = jnp.shape(owner.value)[axis], _mesh(owner)
    rules = dict(_metadata(owner.box).get("sharding_rules") or ())
    names = [
        name for each in mesh_axes(owner.names[axis]) for name in mesh_axes(rules.get(each, each))
    ]
    if mesh is not None and all(name in mesh.shape for name in names):
        return math.gcd(size, math.prod(mesh.shape[name] for name in names))
    return math.gcd(size, jax.device_count() if mesh is None else mesh.size)


def _entry(
    size: int,
    tokens: tuple[str, ...],
    named: Mapping[str, tuple[Owner, Any]],
    sizes: Mapping[str, int],
) -> Any:
    """The names of one axis of the state, from the tokens of the axes that it may follow.

    An axis keeps the name of a parameter axis of its own size. The other names belong to axes that the state
    lacks (for a rank axis or a large statistic); as many are kept as divide the axis.
    """
    # First comes the name of a kept axis: a rank may be as long as an axis that the factor lacks.
    own = tuple(t for t in tokens[:1] if named[t][0].value.shape[_axis(t)] == size)
    others = tokens[len(own) :]
    left = size // math.prod(sizes[token] for token in own)
    mesh = _mesh(named[tokens[0]][0]) if tokens else None
    if mesh is not None and all(
        name in mesh.shape for token in tokens for name in mesh_axes(named[token][1])
    ):
        chosen = (*own, *mesh_axes(dividing_axes(left, others, sizes)))
    else:
        # Rules turn single names into mesh axes, not tuples: of heads and their features, keep the heads.
        divide = (token for token in others if sizes[token] > 1 and left % sizes[token] == 0)
        chosen = own or tuple(divide)[:1]
    if len(chosen) == 1:
        return named[chosen[0]][1]
    return tuple(name for token in chosen for name in mesh_axes(named[token][1])) or None


def _axis(token: str) -> int:
    return int(token.partition(".")[2])


def _boxed(value: Any, box: Any, names: tuple[Any, ...]) -> Any:
    """A value in a variable of a parameter's kind and metadata, with names of its own."""
    if is_named_array(box):  # each axis has one name, and no two the same
        single = (next(iter(mesh_axes(entry)), f"state_{i}") for i, entry in enumerate(names))
        return type(box)(value, tuple(single))
    dropped = (*_NAMES, "optimizer_sharding", "partition_name", "param_scan_axis")
    metadata = {
        key: item
        for key, item in box.get_metadata().items()
        if key not in dropped and not key.startswith("on_")
    }
    # Init has placed the value; variables made from this one need no mesh in their context.
    metadata |= {"out_sharding": names, "eager_sharding": False}
    return type(box).from_metadata(value, metadata)
