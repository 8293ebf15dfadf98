"""Shardings for every array of any optax state on a mesh."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from layout_optax.layout import PyTree, is_empty, path_string


def state_shardings(
    tx: optax.GradientTransformation, params: PyTree, param_shardings: PyTree = None
) -> PyTree:
    """Returns a `jax.sharding.NamedSharding` for every array of the state that ``tx.init(params)`` makes.

    ``jax.jit(tx.init)`` on a mesh of Auto axes puts the state on one device, since zeros depend on no data.
    Pass these shardings to it and to the training step::

        param_shardings = jax.tree.map(lambda p: p.sharding, params)
        shardings = state_shardings(tx, params, param_shardings)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(step, out_shardings=(param_shardings, shardings))

    This function evaluates ``tx.init`` abstractly on a mesh of the same axes, all Explicit. There a type
    carries its sharding, and the function reads the types of the result. It allocates nothing and works for any
    optax chain. LoRA-Pre's factors and SAGE's statistics get their parameter's sharding without the axes they
    lack, and moments made by ``zeros_like`` get their parameter's sharding. Arrays that ``init`` makes from a
    bare shape are replicated: a step count, or all projectors of `optax.contrib.galore`.

    Args:
      tx: any optax transformation, or another object with an ``init``.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`. ``None``, ``optax.MaskedNode`` and boxes stay in
        place.
      param_shardings: a tree, or prefix tree, of named shardings on one mesh, matched by path, so boxes may be
        missing in it. None uses the parameters' own shardings. The mesh may be Auto, Explicit or mixed, and
        abstract, to plan for devices that are not present.

    Returns:
      A tree like the state, with a `jax.sharding.NamedSharding` on the parameters' mesh for every array.

    Raises:
      TypeError: if a sharding is not a `jax.sharding.NamedSharding`. All errors name the path.
      ValueError: if a parameter has no sharding, one on another mesh, or one that does not fit its shape.

    Example:
      >>> mesh = jax.sharding.AbstractMesh((2, 4), ("x", "y"))
      >>> params = {"embed": jax.ShapeDtypeStruct((64, 16), jnp.float32)}
      >>> sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
      >>> state = state_shardings(optax.adam(1e-3), params, {"embed": sharding})
      >>> state[0].mu["embed"].spec, state[0].count.spec
      (P('x', 'y'), P())
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_empty)
    given = None if param_shardings is None else _by_path(param_shardings)
    found: dict[str, NamedSharding] = {}
    shapes = []
    for keys, leaf in flat:
        if is_empty(leaf):
            shapes.append(leaf)
            continue
        path = path_string(keys)
        sharding = _own(leaf, path) if given is None else _look_up(given, path)
        found[path] = sharding
        _check(sharding, jnp.shape(leaf), path)
        shapes.append((jnp.shape(leaf), jax.dtypes.result_type(leaf), sharding.spec))
    mesh = _one_mesh(found)
    twin = explicit_twin(mesh)
    abstract = treedef.unflatten(
        shape
        if is_empty(shape)
        else jax.ShapeDtypeStruct(*shape[:2], sharding=NamedSharding(twin, shape[2]))
        for shape in shapes
    )
    try:
        # JAX changes the size of the mesh in context only by way of an empty one.
        with (
            jax.sharding.use_abstract_mesh(AbstractMesh((), ())),
            jax.sharding.use_abstract_mesh(twin),
        ):
            state = jax.eval_shape(tx.init, abstract)
    except Exception as error:
        if "shard" in str(error).lower():
            error.add_note(
                "state_shardings evaluates tx.init on a mesh of Explicit axes, and this init fails there. Wrap "
                "the failing part of init in jax.sharding.auto_axes."
            )
        raise
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf)), state)


def explicit_twin(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    """An abstract mesh of the same axes, all of them Explicit, so that types carry shardings.

    Example:
      >>> explicit_twin(jax.sharding.AbstractMesh((2, 4), ("x", "y"))).axis_types
      (Explicit, Explicit)
    """
    kinds = (AxisType.Explicit,) * len(mesh.axis_names)
    return AbstractMesh(tuple(mesh.shape.values()), mesh.axis_names, axis_types=kinds)


def _by_path(shardings: PyTree) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(shardings, is_leaf=is_empty)[0]
    return {path_string(keys): sharding for keys, sharding in flat}


def _look_up(given: dict[str, Any], path: str) -> NamedSharding:
    """The sharding at a path, or at its longest prefix that has one."""
    prefix = path
    while prefix not in given:
        if not prefix:
            raise ValueError(
                f"state_shardings: param_shardings has no entry for '{path}'. Add a "
                "jax.sharding.NamedSharding there or above it (PartitionSpec() replicates)."
            )
        prefix = prefix.rpartition("/")[0]
    if is_empty(given[prefix]):
        raise ValueError(
            f"state_shardings: the sharding of '{path}' is {given[prefix]}. Give it a "
            "jax.sharding.NamedSharding (PartitionSpec() replicates)."
        )
    if not isinstance(given[prefix], NamedSharding):
        raise TypeError(
            f"state_shardings: the sharding of '{path}' is {given[prefix]!r}, expected a "
            "jax.sharding.NamedSharding(mesh, spec)."
        )
    return given[prefix]


def _own(leaf: Any, path: str) -> NamedSharding:
    """The sharding that a parameter carries itself."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, Tracer) else _sharding(leaf)
    known = isinstance(sharding, NamedSharding) and not sharding.mesh.empty
    # The type of a traced value does not show Auto axes.
    if isinstance(leaf, Tracer) and known:
        known = all(kind == AxisType.Explicit for kind in sharding.mesh.axis_types)
    if not known:
        raise ValueError(
            f"state_shardings: '{path}' has no named sharding of its own. Put the parameters on a mesh "
            "first, or pass param_shardings."
        )
    return sharding


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None)


def _check(sharding: NamedSharding, shape: tuple[int, ...], path: str) -> None:
    """Refuses a sharding with more axes than the parameter, or with shards of unequal size."""
    spec = sharding.spec
    if len(spec) > len(shape):
        raise ValueError(
            f"state_shardings: {spec} names {len(spec)} axes, but '{path}' has shape {shape}."
        )
    for axis, (size, part) in enumerate(zip(shape, spec, strict=False)):
        names = part if isinstance(part, tuple) else (part,)
        devices = math.prod(
            sharding.mesh.shape[name] for name in names if name in sharding.mesh.shape
        )
        if size % devices:
            raise ValueError(
                f"state_shardings: axis {axis} of '{path}' has {size} entries, which {part!r} of "
                f"{devices} devices does not divide. Shard another axis, or pad the parameter."
            )


def _one_mesh(shardings: dict[str, NamedSharding]) -> Mesh | AbstractMesh:
    if not shardings:
        raise ValueError(
            "state_shardings: there are no parameters, so there is no mesh for the state."
        )
    first = next(iter(shardings))
    mesh = shardings[first].mesh
    for path, sharding in shardings.items():
        if sharding.mesh != mesh:
            raise ValueError(
                f"state_shardings: '{first}' is on {mesh}, but '{path}' on {sharding.mesh}. Use one mesh."
            )
    return mesh


def _spec(leaf: Any) -> PartitionSpec:
    """The spec in a type of the abstract state; scalars have none."""
    sharding = leaf.sharding
    return PartitionSpec() if sharding is None else sharding.spec
