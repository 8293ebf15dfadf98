"""The program of a fine-tuning run, which trains part of a model's parameters, or adapters.

The train state holds only the trained part. The rest is frozen and has no gradient and no optimizer state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from examples.llama.data.instruction_batches import FIELDS
from examples.llama.devices.mesh import Placement
from examples.llama.finetuning.adapters import (
    AdapterSpec,
    adapted_structure,
    init_adapters,
    merge_adapters,
)
from examples.llama.model.blocks import Constrain
from examples.llama.model.llama import Params, abstract
from examples.llama.model.subtrees import merge_trees, split_params
from examples.llama.training.program import Program
from examples.llama.training.settings import Settings
from examples.llama.training.sources import FromSeed
from layout_optax.layout import path_string

LoadParams = Callable[..., Params]
"""`load(scan_layers=..., shardings=..., wanted=...)` gives parameters of the base model: those whose path is
wanted, or all."""


@dataclass(frozen=True)
class Tuned:
    """The trained part of a model.

    Attributes:
        patterns: Paths of the parameters trained; None with an adapter.
        adapter: The adapter trained instead, or None.
    """

    patterns: tuple[str, ...] | None = None
    adapter: AdapterSpec | None = None

    def __post_init__(self) -> None:
        if (self.patterns is None) == (self.adapter is None):
            raise ValueError("give the parameters to train or an adapter, not both")

    def split(self, params: Params) -> tuple[Params, Params]:
        """The model's parameters that are trained, and the rest."""
        return ({}, params) if self.patterns is None else split_params(params, self.patterns)

    def merge(self, trained: Params, frozen: Params) -> Params:
        """The parameters of the plain model after training."""
        if self.adapter is None:
            return merge_trees(trained, frozen)
        return merge_adapters(frozen, trained, self.adapter)


def tuned_to_json(tuned: Tuned) -> dict[str, Any]:
    """The trained part, as JSON."""
    return dataclasses.asdict(tuned)


def tuned_from_json(fields: dict[str, Any]) -> Tuned:
    """The inverse of `tuned_to_json`, also through JSON.

    >>> import json
    >>> tuned = Tuned(adapter=AdapterSpec("dora", rank=4))
    >>> tuned_from_json(json.loads(json.dumps(tuned_to_json(tuned)))) == tuned
    True
    """
    patterns, adapter = fields["patterns"], fields["adapter"]
    if adapter is not None:
        adapter = AdapterSpec(**{**adapter, "targets": tuple(adapter["targets"])})
    return Tuned(None if patterns is None else tuple(patterns), adapter)


def finetuning_program(settings: Settings, tuned: Tuned, load: LoadParams) -> Program:
    """The program of a fine-tuning run, for batches of `instruction_batches`.

    Args:
        settings: The run's settings.
        tuned: The trained part.
        load: Reads the base model when it is first needed.
    """
    return Program(settings, FromModel(tuned, load))


@dataclass(frozen=True)
class FromModel:
    """Trains some of a model's own parameters, or new adapters.

    Attributes:
        tuned: The trained part.
        load: Reads the model.
        fields: The arrays of a batch.
    """

    tuned: Tuned
    load: LoadParams = dataclasses.field(compare=False)
    fields: tuple[str, ...] = FIELDS

    def structure(self, settings: Settings, constrain: Constrain) -> Any:
        """The model's structure, with adapters if there are any."""
        if self.tuned.adapter is None:
            return FromSeed().structure(settings, constrain)
        return adapted_structure(
            settings.model,
            self.tuned.adapter,
            scan_layers=settings.scan_layers,
            remat=settings.remat,
            dtype=settings.compute_dtype,
            constrain=constrain,
        )

    def shapes(self, settings: Settings) -> tuple[Params, Params]:
        """Shapes and dtypes of the trained parameters and of the rest."""
        trained, frozen = self.tuned.split(self.model_shapes(settings))
        spec = self.tuned.adapter
        if spec is not None:
            trained = jax.eval_shape(lambda params: init_adapters(params, spec, 0), frozen)
        return trained, frozen

    def model_shapes(self, settings: Settings) -> Params:
        """Shapes and dtypes of all the model's parameters, without adapters."""
        return abstract(settings.model, scan_layers=settings.scan_layers)

    def model_parameter_count(self, settings: Settings) -> int:
        """Number of parameters of the model, without adapters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.model_shapes(settings)))

    def frozen(self, settings: Settings, placement: Placement | None) -> Params:
        """The frozen parameters."""
        return self._read(settings, placement, self.shapes(settings)[1])

    def trained(
        self, settings: Settings, placement: Placement | None, seed: int, frozen: Params
    ) -> Params:
        """The model's own parameters, or new adapters from a seed."""
        spec, shapes = self.tuned.adapter, self.shapes(settings)[0]
        if spec is None:
            return self._read(settings, placement, shapes)
        shardings = None
        if placement is not None:
            # On Auto axes, like new parameters; moving there and back needs no copy.
            frozen = jax.device_put(frozen, placement.params(frozen, auto=True))
            shardings = placement.params(shapes, auto=True)
        make = jax.jit(
            lambda params, seed: init_adapters(params, spec, seed), out_shardings=shardings
        )
        adapters = make(frozen, np.uint32(seed))
        return adapters if placement is None else jax.device_put(adapters, placement.params(shapes))

    def _read(self, settings: Settings, placement: Placement | None, part: Params) -> Params:
        """The parameters of the model at the paths of a part of its tree."""
        model = self.model_shapes(settings)
        if placement is not None:
            shardings = placement.params(model)
        else:
            # One parameter after the other, not by a copy on the host.
            first = SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: first, model)
        held = {path_string(path) for path, _ in jax.tree_util.tree_flatten_with_path(part)[0]}
        return self.load(
            scan_layers=settings.scan_layers, shardings=shardings, wanted=held.__contains__
        )
