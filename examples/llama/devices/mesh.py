"""Shardings of parameters, optimizer state and batch on a mesh of devices, by named rules.

A mesh has three axes: `data` (the batch is split, everything else is copied), `fsdp` (the batch and every
parameter are split) and `tensor` (heads, hidden units and vocabulary are split, as in Megatron). `DIMENSIONS`
names the dimensions of each kind of parameter, and `RULES` gives the axes that split a name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from layout_optax import state_shardings
from layout_optax.layout import path_string

AXES = ("data", "fsdp", "tensor")
"""The axes of every mesh here; an axis of size 1 has no effect."""

MeshMode = Literal["auto", "explicit"]

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "adapter": (),
    "layers": (),
}
"""The mesh axes that a named dimension is split over."""

DIMENSIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embed_tokens/embedding", ("vocab", "embed")),
    ("layers/self_attn/q_proj/kernel", ("embed", "heads")),
    ("layers/self_attn/[kv]_proj/kernel", ("embed", "kv_heads")),
    ("layers/self_attn/o_proj/kernel", ("heads", "embed")),
    ("layers/mlp/(gate|up)_proj/kernel", ("embed", "mlp")),
    ("layers/mlp/down_proj/kernel", ("mlp", "embed")),
    ("(layers/(input|post_attention)_layer)?norm/scale", ("norm",)),
    ("lm_head/kernel", ("embed", "vocab")),
    ("layers/.*/lora/lora_[ab]", ("adapter", "adapter")),
    ("layers/.*/magnitude", ("adapter",)),
)
"""Pattern of a parameter's path (without the layer's number) and the names of its dimensions."""


@dataclass(frozen=True)
class Activations:
    """Constrains activations on the mesh, so that the compiler never gathers what can stay split.

    Otherwise the compiler may split a batch's features instead of its sequences, or gather the logits.

    Attributes:
        mesh: The mesh, of Auto axes.
    """

    mesh: Mesh

    def __call__(self, x: jax.Array, *names: str | None) -> jax.Array:
        """Splits each dimension as its name says, where the devices divide it.

        Args:
            x: An activation.
            names: A key of `RULES`, or None for a dimension that stays whole, for each axis of `x`.
        """
        axes = [_dividing(self.mesh, name, size) for name, size in zip(names, x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


class Placement:
    """A mesh, and the shardings of arrays on it.

    Args:
        axes: Sizes of the mesh's axes, as `parse_mesh` gives them.
        mode: Whether types carry their sharding outside the model (`explicit`), or only the compiler knows it
            (`auto`). Inside the model the compiler always decides.
        strict: Whether to refuse a parameter that the rules cannot split, instead of copying it along that
            axis.
        devices: The devices; by default all.

    Raises:
        ValueError: The axes do not multiply to the number of devices.

    Attributes:
        mesh: The mesh.
        notes: A line for each parameter that is not split as the rules say.
    """

    def __init__(
        self,
        axes: Mapping[str, int],
        *,
        mode: MeshMode = "auto",
        strict: bool = False,
        devices: Sequence[Any] | None = None,
    ):
        devices = jax.devices() if devices is None else devices
        shape = mesh_shape(axes, len(devices))
        self.mode: MeshMode = mode
        self.auto_mesh = _make_mesh(shape, AxisType.Auto, devices)
        # Both hold the same devices, so arrays move between them without a copy.
        self.mesh = self.auto_mesh
        if mode == "explicit":
            self.mesh = _make_mesh(shape, AxisType.Explicit, devices)
        self.strict = strict
        self.notes: list[str] = []

    @property
    def replicated(self) -> NamedSharding:
        """A copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def batch(self) -> NamedSharding:
        """Shards sequences over the batch's axes and keeps time whole."""
        return NamedSharding(self.mesh, PartitionSpec(RULES["batch"], None))

    @property
    def batch_shards(self) -> int:
        """The number of parts that a batch is split into."""
        return math.prod(self.mesh.shape[axis] for axis in RULES["batch"])

    @property
    def activations(self) -> Activations:
        """Constrains activations; see `examples.llama.model.llama.Llama`."""
        return Activations(self.auto_mesh)

    def params(self, params: Any, *, auto: bool = False) -> Any:
        """The sharding of each parameter, by `DIMENSIONS` and `RULES`.

        Args:
            params: Arrays or shapes, the pure dict of `examples.llama.model.llama.create`.
            auto: Whether to use the mesh of Auto axes in any mode.

        Raises:
            ValueError: No pattern matches a path, or in strict mode an axis does not divide a dimension.
        """
        notes: list[str] = []
        mesh = self.auto_mesh if auto else self.mesh

        def sharding(keys: Any, leaf: Any) -> NamedSharding:
            path = path_string(keys)
            return NamedSharding(mesh, PartitionSpec(*self._split(path, leaf.shape, notes)))

        found = jax.tree_util.tree_map_with_path(sharding, params)
        if notes and self.strict:
            raise ValueError(
                "; ".join(notes) + ". Choose another --mesh or leave out --mesh-strict."
            )
        self.notes = list(dict.fromkeys((*self.notes, *notes)))  # for trained and frozen parameters
        return found

    def state(self, init: Callable[..., Any], params: Any) -> Any:
        """The sharding of every array that `init` makes from the parameters, such as an optimizer's state."""
        tx = optax.GradientTransformation(init, optax.identity().update)
        return state_shardings(tx, params, self.params(params))

    def bytes_per_device(self, shapes: Any, shardings: Any) -> int:
        """The bytes that a tree takes on one device."""
        sizes = jax.tree.map(
            lambda leaf, sharding: (
                math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            ),
            shapes,
            shardings,
        )
        return sum(jax.tree.leaves(sizes))

    def describe(self) -> dict[str, Any]:
        """The description to store with a result, as JSON."""
        devices = list(self.mesh.devices.flat)
        return {
            "axes": dict(self.mesh.shape),
            "mode": self.mode,
            "devices": len(devices),
            "device_kinds": dict(Counter(device.device_kind for device in devices)),
            "processes": len({device.process_index for device in devices}),
            "not_split_as_the_rules_say": self.notes,
        }

    def _split(self, path: str, shape: tuple[int, ...], notes: list[str]) -> list[Any]:
        names = dimension_names(path, len(shape))
        split = []
        for name, size in zip(names, shape, strict=True):
            axes = _dividing(self.mesh, name, size)
            count = math.prod(self.mesh.shape[axis] for axis in RULES[name])
            if axes is None and count > 1:
                wanted = " x ".join(f"{axis}={self.mesh.shape[axis]}" for axis in RULES[name])
                notes.append(
                    f"{path}: {size} ({name}) does not divide over {wanted}, not split there"
                )
            split.append(axes)
        return split


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `data=2,fsdp=2,tensor=2`. Omitted axes have size 1; one size may be free, `*` or -1.

    Raises:
        ValueError: An item is no such pair, an axis is unknown or given twice, or two sizes are free.

    >>> parse_mesh("fsdp=*,tensor=2")
    {'data': 1, 'fsdp': -1, 'tensor': 2}
    """
    given: dict[str, int] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in AXES:
            raise ValueError(f"mesh: unknown axis in {item!r}; the axes are {', '.join(AXES)}")
        if name in given:
            raise ValueError(f"mesh: the axis {name} is given twice in {text!r}")
        try:
            size = -1 if value == "*" else int(value)
        except ValueError:
            size = 0
        if size < -1 or size == 0:
            raise ValueError(
                f"mesh: expected axis=size with a size of at least 1 or *, got {item!r}"
            )
        given[name] = size
    if not given:
        raise ValueError("mesh: name at least one axis, as in data=2,fsdp=4")
    if list(given.values()).count(-1) > 1:
        raise ValueError(f"mesh: only one size may be free, got {text!r}")
    return {axis: given.get(axis, 1) for axis in AXES}


def mesh_shape(axes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """The sizes, with the free one computed.

    Raises:
        ValueError: They do not multiply to the number of devices.

    >>> mesh_shape({"data": -1, "fsdp": 2, "tensor": 2}, devices=8)
    (2, 2, 2)
    """
    fixed = math.prod(size for size in axes.values() if size != -1)
    free = [axis for axis, size in axes.items() if size == -1]
    asked = ",".join(f"{axis}={'*' if size == -1 else size}" for axis, size in axes.items())
    if free and devices % fixed:
        raise ValueError(
            f"mesh {asked}: {fixed} does not divide the {devices} devices there are; "
            "choose sizes that do"
        )
    if not free and fixed != devices:
        raise ValueError(
            f"mesh {asked} needs {fixed} devices, there are {devices}; choose sizes whose product is "
            f"{devices}, one of them as * (fsdp=*), or on CPU --simulate-devices {fixed}"
        )
    return tuple(devices // fixed if size == -1 else size for size in axes.values())


def dimension_names(path: str, dimensions: int) -> tuple[str, ...]:
    """The names of a parameter's dimensions, with `layers` first if layers are stacked.

    Raises:
        ValueError: No pattern of `DIMENSIONS` matches, or the parameter has other dimensions.

    >>> dimension_names("layers/3/mlp/up_proj/kernel", 2), dimension_names("layers/mlp/up_proj/kernel", 3)
    (('embed', 'mlp'), ('layers', 'embed', 'mlp'))
    """
    plain = re.sub(r"^layers/\d+/", "layers/", path)
    for pattern, names in DIMENSIONS:
        if re.fullmatch(pattern, plain):
            stacked = plain.startswith("layers/") and plain == path
            names = ("layers", *names) if stacked else names
            if len(names) == dimensions:
                return names
            raise ValueError(f"{path}: expected the dimensions {names}, got {dimensions}")
    raise ValueError(f"{path}: no rule says how to split it; add one to mesh.DIMENSIONS")


def with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf, placed."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _make_mesh(shape: tuple[int, ...], kind: AxisType, devices: Sequence[Any]) -> Mesh:
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * len(AXES), devices=devices)


def _dividing(mesh: Mesh, name: str | None, size: int) -> tuple[str, ...] | str | None:
    """The axes of a named dimension if there are any and they divide its size, else None."""
    if name is None:
        return None
    axes = [axis for axis in RULES[name] if mesh.shape[axis] > 1]
    if not axes or size % math.prod(mesh.shape[axis] for axis in axes):
        return None
    return tuple(axes) if len(axes) > 1 else axes[0]
