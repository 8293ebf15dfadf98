"""The trained parameters of a program, and the source of all parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from examples.llama.devices.mesh import Placement
from examples.llama.model.blocks import Constrain
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import Params, abstract, create, structure
from examples.llama.training.settings import Settings


class Source(Protocol):
    """Says which parameters are trained, and gives them and the frozen ones."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The arrays of a batch, by name."""
        ...

    def structure(self, settings: Settings, constrain: Constrain) -> Any:
        """The model's structure, for the trained and the frozen parameters merged."""
        ...

    def shapes(self, settings: Settings) -> tuple[Params, Params]:
        """Shapes and dtypes of the trained parameters and of the frozen ones."""
        ...

    def frozen(self, settings: Settings, placement: Placement | None) -> Params:
        """The frozen parameters, with their shardings."""
        ...

    def trained(
        self, settings: Settings, placement: Placement | None, seed: int, frozen: Params
    ) -> Params:
        """The trained parameters before the first step, with their shardings; the caller may donate them."""
        ...


@dataclass(frozen=True)
class FromSeed:
    """New parameters from a seed, all trained on text."""

    fields: tuple[str, ...] = ("tokens",)

    def structure(self, settings: Settings, constrain: Constrain) -> Any:
        """The model's structure."""
        return structure(
            settings.model,
            scan_layers=settings.scan_layers,
            remat=settings.remat,
            dtype=settings.compute_dtype,
            constrain=constrain,
        )

    def shapes(self, settings: Settings) -> tuple[Params, Params]:
        """Shapes and dtypes of all parameters; there are no frozen ones."""
        return abstract(settings.model, scan_layers=settings.scan_layers), {}

    def frozen(self, settings: Settings, placement: Placement | None) -> Params:
        """No frozen parameters."""
        return {}

    def trained(
        self, settings: Settings, placement: Placement | None, seed: int, frozen: Params
    ) -> Params:
        """New parameters; on a mesh each device makes its own part."""
        model, scan_layers = settings.model, settings.scan_layers
        if placement is None:
            return _init_params(model, scan_layers, np.uint32(seed))
        shapes = self.shapes(settings)[0]
        # On Auto axes the compiler splits the random numbers too; afterwards only the type changes.
        born = jax.jit(
            partial(_create_params, model, scan_layers),
            out_shardings=placement.params(shapes, auto=True),
        )(np.uint32(seed))
        return jax.device_put(born, placement.params(shapes))


def _create_params(model: LlamaConfig, scan_layers: bool, seed: jax.Array) -> Params:
    return create(model, seed, scan_layers=scan_layers)[1]


_init_params = jax.jit(_create_params, static_argnums=(0, 1))
