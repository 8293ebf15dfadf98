"""Bytes of parameters and optimizer state, leaf by leaf, without allocating them."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax

from layout_optax.fit import check_transformation
from layout_optax.layout import LayoutLike, PyTree, is_empty, path_string
from layout_optax.leaves import flatten_with_layout
from layout_optax.sharding import state_shardings


def state_bytes(tx: optax.GradientTransformation, params: PyTree) -> int:
    """Bytes of the state that ``tx.init(params)`` makes, by abstract evaluation.

    The count follows the stored dtypes: one byte for an int8 code, two for a bfloat16 entry.

    Args:
      tx: any optax transformation.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      TypeError: if ``tx`` is not a transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"embed": jax.ShapeDtypeStruct((1000, 64), jnp.float32)}
      >>> state_bytes(optax.adam(1e-3), params)  # two moments and a counter
      512004
    """
    check_transformation("state_bytes", tx)
    return tree_bytes(jax.eval_shape(tx.init, params))


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays or shapes in a pytree."""
    return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def leaf_bytes(leaf: Any) -> int:
    """Bytes of one array or `jax.ShapeDtypeStruct`."""
    return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class StateLeaf:
    """One array of an optimizer's state and the parameter it belongs to.

    Attributes:
      owner: path of the parameter, or None for state without a parameter, such as a step count.
      transformation: the transformation that keeps the array, from its state's class: ``scale_by_adam``.
      field: the array's field in that state: ``mu``.
      value: the array or shape.
      place: path of that state, to group arrays of one state.
    """

    owner: str | None
    transformation: str
    field: str
    value: Any
    place: str = ""


@dataclasses.dataclass(frozen=True)
class MemoryBytes:
    """Bytes of parameters and of optimizer state; ``+`` adds them.

    Gradients are not counted. They have the parameters' shapes, and their dtypes in most training steps.

    Attributes:
      parameters: bytes of the parameters.
      state: bytes of the optimizer's state.
    """

    parameters: int = 0
    state: int = 0

    def __add__(self, other: MemoryBytes) -> MemoryBytes:
        return MemoryBytes(self.parameters + other.parameters, self.state + other.state)


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """One parameter with its state, or all state that belongs to no parameter.

    Attributes:
      path: the parameter's path; ``"(shared)"`` for state without a parameter (step counts).
      role: its role; ``"other"`` for an unmanaged leaf, ``"shared"`` without a parameter.
      shape: its shape.
      dtype: its dtype's name.
      state: the arrays of its state, as shapes (with shardings, if there are any).
      total: bytes over all devices; copies count once.
      per_device: bytes on each device.
    """

    path: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    state: tuple[StateLeaf, ...]
    total: MemoryBytes
    per_device: MemoryBytes


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """The result of `memory_report`.

    Attributes:
      rows: one per parameter in the tree's order, then one for shared state if there is any.
      devices: number of devices of the mesh; 1 without shardings.
    """

    rows: tuple[MemoryRow, ...]
    devices: int = 1

    @property
    def total(self) -> MemoryBytes:
        """Bytes over all devices; copies count once."""
        return functools.reduce(operator.add, (row.total for row in self.rows), MemoryBytes())

    @property
    def per_device(self) -> MemoryBytes:
        """Bytes on each device; a named sharding gives every device the same."""
        return functools.reduce(operator.add, (row.per_device for row in self.rows), MemoryBytes())

    @property
    def by_role(self) -> dict[str, MemoryReport]:
        """One report per role, in the order in which roles occur."""
        roles = dict.fromkeys(row.role for row in self.rows)
        return {
            role: MemoryReport(tuple(row for row in self.rows if row.role == role), self.devices)
            for role in roles
        }

    def __str__(self) -> str:
        """Returns bytes by role and in total as a text table."""
        lines = [f"{'role':<10} {'parameters':>16} {'state':>16} {'state a device':>16}"]
        for role, part in [*self.by_role.items(), ("total", self)]:
            numbers = (part.total.parameters, part.total.state, part.per_device.state)
            lines.append(f"{role:<10} " + " ".join(f"{number:>16,}" for number in numbers))
        return "\n".join(lines)


def memory_report(
    tx: optax.GradientTransformation,
    params: PyTree,
    shardings: PyTree = None,
    *,
    layout: LayoutLike = None,
) -> MemoryReport:
    """Bytes of every parameter and of its state under ``tx``, by role and per device.

    The function only evaluates ``tx.init`` abstractly. It takes seconds for any size, and the devices of the
    mesh need not exist (`jax.sharding.AbstractMesh`). It does not count activations and temporaries of a step.

    Args:
      tx: any optax transformation.
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      shardings: a tree, or prefix tree, of `jax.sharding.NamedSharding` on one mesh, as for `state_shardings`.
        None puts everything on one device.
      layout: the layout that gives the roles; see `layout_optax.LayoutLike`. None infers it.

    Returns:
      A `MemoryReport` of rows, with totals, totals by role and bytes per device.

    Raises:
      ValueError: for a leaf that no layout rule explains, or a sharding that does not fit.
      TypeError: if ``tx`` is not a transformation.

    Example:
      >>> import jax.numpy as jnp
      >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
      >>> params = {"embed": {"embedding": jax.ShapeDtypeStruct((1000, 64), jnp.float32)}}
      >>> sharding = NamedSharding(AbstractMesh((8,), ("fsdp",)), PartitionSpec(None, "fsdp"))
      >>> report = memory_report(optax.adamw(1e-3), params, {"embed": sharding})
      >>> report.total.state, report.per_device.state
      (512004, 64004)
      >>> report.by_role["embedding"].per_device
      MemoryBytes(parameters=32000, state=64000)
      >>> print(report)
      role             parameters            state   state a device
      embedding           256,000          512,000           64,000
      shared                    0                4                4
      total               256,000          512,004           64,004
    """
    check_transformation("memory_report", tx)

    def init(params: PyTree) -> tuple[PyTree, PyTree]:
        return params, tx.init(params)

    shapes, state = jax.eval_shape(init, params)
    devices = 1
    if shardings is not None:
        both = optax.GradientTransformation(init, optax.identity().update)  # only init is used
        found = state_shardings(both, params, shardings)
        shapes, state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            (shapes, state),
            found,
        )
        devices = jax.tree.leaves(found)[0].mesh.size
    by_owner: dict[str | None, list[StateLeaf]] = {}
    for kept in state_leaves(state, params):
        by_owner.setdefault(kept.owner, []).append(kept)
    leaves = flatten_with_layout(layout, shapes)
    rows = []
    for path, found, leaf in zip(leaves.paths, leaves.layouts, leaves.leaves, strict=True):
        if not is_empty(leaf):
            role = "other" if found is None else found.role
            rows.append(_row(path, role, leaf, by_owner.get(path, [])))
    if None in by_owner:
        rows.append(_row("(shared)", "shared", None, by_owner[None]))
    return MemoryReport(tuple(rows), devices)


def _row(path: str, role: str, parameter: Any, state: list[StateLeaf]) -> MemoryRow:
    own = [] if parameter is None else [parameter]
    total, per_device = (
        MemoryBytes(sum(map(count, own)), sum(count(kept.value) for kept in state))
        for count in (leaf_bytes, _device_bytes)
    )
    shape, dtype = ((), "") if parameter is None else (parameter.shape, parameter.dtype.name)
    return MemoryRow(path, role, tuple(shape), dtype, tuple(state), total, per_device)


def _device_bytes(leaf: Any) -> int:
    """Bytes of a shape on each device of its sharding's mesh."""
    if getattr(leaf, "sharding", None) is None:
        return leaf_bytes(leaf)
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def state_leaves(state: PyTree, params: PyTree) -> list[StateLeaf]:
    """Splits an optimizer state into arrays and finds the parameter that each belongs to.

    An array belongs to the parameter whose path is the longest suffix of the array's own path. A scalar beside
    named parameters (a count) belongs to none.

    Args:
      state: the state of any optax transformation, concrete or abstract.
      params: the parameters that the state was made for.
    """
    flat = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_empty)[0]
    owners = {path_string(path) for path, leaf in flat if not is_empty(leaf)}
    found = []
    for keys, state_name, field, place, value in _walk(state, (), "", "", ""):
        found.append(StateLeaf(_owner(keys, owners), _snake(state_name), field, value, place))
    return found


def _owner(keys: tuple[Any, ...], owners: set[str]) -> str | None:
    for start in range(len(keys) + 1):
        suffix = path_string(keys[start:])
        # An empty suffix is the path of a bare array given as the whole tree.
        if suffix in owners and (suffix or not _is_count(keys)):
            return suffix
    return None


def _is_count(keys: tuple[Any, ...]) -> bool:
    return bool(keys) and "count" in path_string(keys[-1:])


def _is_namedtuple(node: Any) -> bool:
    """Whether a node is a named tuple to JAX too; one that flattens itself is no state."""
    return (
        isinstance(node, tuple) and hasattr(node, "_fields") and not hasattr(node, "tree_flatten")
    )


def _walk(
    node: Any, keys: tuple, state: str, field: str, place: str
) -> Iterator[tuple[tuple, str, str, str, Any]]:
    """Yields every array with its key path, and the innermost named tuple, field and place that hold it."""
    if _is_namedtuple(node):
        for name, child in zip(node._fields, node, strict=True):
            key = jax.tree_util.GetAttrKey(name)
            yield from _walk(child, (*keys, key), type(node).__name__, name, path_string(keys))
        return
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=_is_namedtuple)[0]
    for path, child in children:
        if _is_namedtuple(child):
            yield from _walk(child, keys + tuple(path), state, field, place)
        else:
            yield keys + tuple(path), state, field, place, child


def _snake(class_name: str) -> str:
    """``ScaleByAdamState`` -> ``scale_by_adam``."""
    name = class_name.removesuffix("State")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
