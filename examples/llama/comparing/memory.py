"""Plans the memory of Llama training on each device for every optimizer, without allocating it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from examples.llama.devices.mesh import AXES, RULES, dimension_names
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import abstract
from examples.llama.optimizers.options import OptimizerOptions
from examples.llama.optimizers.rates import parse_rates
from examples.llama.optimizers.registry import make_optimizer, optimizer_entry
from examples.llama.optimizers.variants import Variant
from layout_optax import memory_report, resolve_layout
from layout_optax.layout import ROLES, path_string
from layout_optax.memory import leaf_bytes


@dataclass(frozen=True)
class PlanRow:
    """The memory of one optimizer on each device, in bytes.

    Attributes:
        key: The variant, `galore (paper's formula)` or `lora`.
        label: Its name in the table.
        rank: Rank of its factors or projections, or None.
        source: `abstract evaluation` of the optimizer's own `init`, or `formula`.
        parameters: All parameters, frozen ones too.
        gradients: Gradients of the trained parameters, in the parameters' dtype.
        state: Optimizer state by role; `shared` is state without a parameter.
        all_devices_state: Optimizer state over all devices; copies count once.
        matrix_elements: Numbers stored for the matrices over all devices.
        activations: Peak of a step apart from these; with accumulation the sum of gradients too.
        sequences: Sequences that a device computes at once, or None without activations.
    """

    key: str
    label: str
    rank: int | None
    source: str
    parameters: int
    gradients: int
    state: Mapping[str, int]
    all_devices_state: int
    matrix_elements: int
    activations: int = 0
    sequences: int | None = None

    @property
    def state_bytes(self) -> int:
        """Optimizer state of all roles on each device."""
        return sum(self.state.values())

    @property
    def bytes(self) -> int:
        """Parameters, gradients, state and activations on each device."""
        return self.parameters + self.gradients + self.state_bytes + self.activations


class Planner:
    """Plans for one model.

    Args:
        model: The shape.
        rank: Default rank for variants without one.
        dtype: Dtype of parameters and gradients, from which each optimizer derives its state's dtype.
        mesh: Sizes of the mesh's axes (`mesh.AXES`), or None for one device. The devices need not exist.
        finetune: Whether only attention and MLP matrices train; the rest is frozen, without gradient or state.

    Raises:
        ValueError: The mesh leaves a size open, or a rank is not positive.

    >>> from examples.llama.model.config import preset
    >>> from examples.llama.optimizers.variants import parse_variant
    >>> planner = Planner(preset("sage_1.3b"), rank=512)
    >>> round(planner.row(parse_variant("sage_hybrid")).state_bytes / 2**30, 3)
    0.979
    """

    def __init__(
        self,
        model: LlamaConfig,
        *,
        rank: int,
        dtype: DTypeLike = np.float32,
        mesh: Mapping[str, int] | None = None,
        finetune: bool = False,
    ):
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if mesh is not None and any(size < 1 for size in mesh.values()):
            raise ValueError("plan: every size of --mesh must be given, as in fsdp=8")
        self.model, self.rank, self.dtype, self.finetune = model, rank, np.dtype(dtype), finetune
        self.mesh = None
        if mesh is not None:
            self.mesh = AbstractMesh(tuple(mesh[axis] for axis in AXES), AXES)

    def row(self, variant: Variant) -> PlanRow:
        """The memory of an optimizer of the registry, by abstract evaluation of its `init`.

        Raises:
            ValueError: The optimizer does not take one of the options.
        """
        entry = optimizer_entry(variant.optimizer)
        fields = variant.fields()
        name = fields.pop("optimizer")
        if entry.has_rank:
            fields.setdefault("rank", self.rank)
        if "role_multipliers" in fields:
            fields["role_multipliers"] = parse_rates(fields["role_multipliers"], ROLES, "role")
        tx = make_optimizer(name, 1e-3, OptimizerOptions(**fields))
        params = self._params(scan_layers=not entry.needs_unscanned)
        trained = self._trained(params)
        report = memory_report(tx, trained, self._shardings(trained))
        matrices = [kept for row in report.rows if row.role == "matrix" for kept in row.state]
        return PlanRow(
            key=variant.key,
            label=variant.label,
            rank=fields.get("rank"),
            source="abstract evaluation",
            parameters=self._device_bytes(params),
            gradients=report.per_device.parameters,
            state={role: part.per_device.state for role, part in report.by_role.items()},
            all_devices_state=report.total.state,
            matrix_elements=sum(math.prod(kept.value.shape) for kept in matrices),
        )

    def galore_paper(self, rank: int | None = None) -> PlanRow:
        """GaLore by its paper's formula, (min + 2 max) r numbers per matrix, AdamW on the rest.

        The paper stores the projection of the smaller side and two moments on the larger one;
        `optax.contrib.galore` keeps its moments on the smaller side, (max + 2 min) r. The numbers have the
        parameters' dtype. On a mesh they count as copies on every device, like optax's.
        """
        rank = self.rank if rank is None else rank
        adamw = self.row(Variant("adamw"))
        shapes = self._matrix_shapes()
        elements = sum(
            count * min(rank, p, q) * (min(p, q) + 2 * max(p, q)) for count, p, q in shapes
        )
        matrices = elements * self.dtype.itemsize
        others = adamw.all_devices_state - 2 * self.dtype.itemsize * sum(
            count * p * q for count, p, q in shapes
        )
        return dataclasses.replace(
            adamw,
            key="galore (paper's formula)",
            label="GaLore (paper's formula)",
            rank=rank,
            source="formula (min + 2 max) r",
            state={**adamw.state, "matrix": matrices},
            all_devices_state=others + matrices,
            matrix_elements=elements,
        )

    def lora(self, rank: int | None = None) -> PlanRow:
        """LoRA adapters on every matrix, (p + q) r parameters each, trained by AdamW; the rest is frozen.

        Adapters, their gradients and moments are float32 and copied to every device of a mesh.
        """
        rank = self.rank if rank is None else rank
        elements = sum(count * min(rank, p, q) * (p + q) for count, p, q in self._matrix_shapes())
        return PlanRow(
            key="lora",
            label="LoRA adapters, AdamW",
            rank=rank,
            source="formula (p + q) r",
            parameters=self._device_bytes(self._params()) + 4 * elements,
            gradients=4 * elements,
            state={"matrix": 8 * elements, "shared": 4},
            all_devices_state=8 * elements + 4,
            matrix_elements=2 * elements,
        )

    def head_gradient(self) -> int:
        """Bytes of the head's gradient on each device; 0 where the head is frozen."""
        if self.finetune:
            return 0
        params = self._params()
        head = {"embed_tokens": params["embed_tokens"]}
        if not self.model.tie_embeddings:
            head = {"lm_head": params["lm_head"]}
        return self._device_bytes(head)

    def _params(self, *, scan_layers: bool = True) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.dtype),
            abstract(self.model, scan_layers=scan_layers),
        )

    def _trained(self, params: Any) -> Any:
        """The parameters without the frozen ones."""
        return _only_matrices(params, resolve_layout(None, params)) if self.finetune else params

    def _shardings(self, params: Any) -> Any:
        """The sharding of each parameter by the example's rules, or None without a mesh."""
        mesh = self.mesh
        if mesh is None:
            return None

        def sharding(keys: Any, leaf: Any) -> NamedSharding:
            names = dimension_names(path_string(keys), len(leaf.shape))
            sizes = zip(names, leaf.shape, strict=True)
            return NamedSharding(mesh, PartitionSpec(*(self._axes(mesh, *pair) for pair in sizes)))

        return jax.tree_util.tree_map_with_path(sharding, params)

    def _axes(self, mesh: AbstractMesh, name: str, size: int) -> tuple[str, ...]:
        """The mesh axes of a dimension; none if they do not divide it, which is then copied."""
        axes = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1)
        return () if size % math.prod(mesh.shape[axis] for axis in axes) else axes

    def _device_bytes(self, params: Any) -> int:
        shardings = self._shardings(params)
        if shardings is None:
            return sum(map(leaf_bytes, jax.tree.leaves(params)))
        shards = jax.tree.map(
            lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), params, shardings
        )
        return self.dtype.itemsize * sum(jax.tree.leaves(shards))

    def _matrix_shapes(self) -> list[tuple[int, int, int]]:
        """Number of layers, rows and columns of each matrix."""
        params = self._params()
        layouts = jax.tree.leaves(resolve_layout(None, params))
        return [
            (leaf.shape[0], leaf.shape[1], leaf.shape[2])
            for leaf, layout in zip(jax.tree.leaves(params), layouts, strict=True)
            if layout.role == "matrix"
        ]


def _only_matrices(params: Any, layouts: Any) -> Any:
    """A nested dict without leaves whose layout is not a matrix, and without empty dicts."""
    if not isinstance(params, dict):
        return params if layouts.role == "matrix" else None
    kept = {key: _only_matrices(value, layouts[key]) for key, value in params.items()}
    return {key: value for key, value in kept.items() if value} or None
