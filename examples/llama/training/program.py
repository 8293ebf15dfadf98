"""The compiled functions of a run: initialisation, train step, train step with statistics, evaluation.

Each is compiled once, before its first call, for one shape of batch; another shape is an error and never
compiles again. Trained parameters and optimizer state are donated to the step. Frozen parameters are an operand
that is neither differentiated nor donated. On a mesh every array is created with its final sharding, and a
process passes its own share of each batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.llama.data.checks import check_batch
from examples.llama.devices.mesh import Placement, parse_mesh, with_sharding
from examples.llama.devices.processes import share_of_batch
from examples.llama.model.blocks import unconstrained
from examples.llama.model.llama import apply
from examples.llama.model.loss import automatic_chunk, document_positions, next_token_loss
from examples.llama.model.subtrees import merge_trees
from examples.llama.optimizers.registry import make_optimizer
from examples.llama.optimizers.sage import damper_arguments
from examples.llama.training.settings import Settings
from examples.llama.training.sources import FromSeed, Source
from examples.llama.training.step import (
    Batch,
    Params,
    StepMetrics,
    TrainState,
    init_state,
    make_evaluation,
    make_train_step,
    warmup_cosine,
)
from examples.llama.training.step_statistics import make_statistics
from layout_optax import state_bytes
from layout_optax.memory import tree_bytes

StepOutput = tuple[TrainState, StepMetrics, dict[str, jax.Array]]


LossFn = Callable[[Params, Params, Any], tuple[jax.Array, jax.Array]]
"""From the trained parameters, the frozen ones and a batch to the mean loss and the number of its tokens."""


@dataclass(frozen=True)
class NextTokenLoss:
    """The loss of a batch of text, or of instructions if the batch marks the tokens to learn.

    Hashable, so that programs of one model share compiled functions.

    Attributes:
        graphdef: The model's structure.
        chunk: Tokens whose logits exist at once, or None for automatic.
    """

    graphdef: Any
    chunk: int | None

    def __call__(self, trained: Params, frozen: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        """The mean loss over the learned tokens, and their number."""
        given = {}
        if "learned" in batch:
            given["mask"] = batch["learned"][:, 1:]
        if "documents" in batch:
            given["segments"] = documents = batch["documents"][:, :-1]
            given["positions"] = document_positions(documents)
        model = apply(self.graphdef, merge_trees(trained, frozen))
        return next_token_loss(model, batch["tokens"], chunk=self.chunk, **given)


class Program:
    """The functions that a run executes on its devices, compiled when first used.

    The learning rate and the seed of `settings` do not matter, so runs that differ only in these can share one
    program (`serves`).

    Args:
        settings: The run's settings.
        source: The trained parameters and the source of all of them; None trains new ones, all of them.

    Raises:
        ValueError: The mesh does not fit the devices, the batch or, in strict mode, the model.

    Attributes:
        settings: The settings it was made for.
        source: The source of its parameters.
        placement: The shardings on the mesh, or None without a mesh.
        compile_seconds: Time that compiling train steps has taken so far.
    """

    def __init__(self, settings: Settings, source: Source | None = None):
        self.settings = settings
        self.source = FromSeed() if source is None else source
        self.compile_seconds = 0.0
        self.placement = placement = _placement(settings)
        constrain = unconstrained if placement is None else placement.activations
        self._graphdef = self.source.structure(settings, constrain)
        if placement is not None:
            rows = settings.batch_size // settings.accumulate
            check_batch(rows, devices=placement.batch_shards)
            placement.params(self.abstract_params)

    def serves(self, settings: Settings, source: Source | None = None) -> bool:
        """Whether this program fits other settings."""
        same = _without_rate(self.settings) == _without_rate(settings)
        return same and self.source == (FromSeed() if source is None else source)

    @cached_property
    def abstract_params(self) -> Params:
        """Shapes and dtypes of the trained parameters."""
        return self.source.shapes(self.settings)[0]

    @cached_property
    def abstract_frozen(self) -> Params:
        """Shapes and dtypes of the frozen parameters."""
        return self.source.shapes(self.settings)[1]

    @cached_property
    def frozen(self) -> Params:
        """The frozen parameters with their shardings; read on first use."""
        return self.source.frozen(self.settings, self.placement)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the train state."""
        make = self.settings.optimizer_from
        return jax.eval_shape(lambda params: init_state(params, make), self.abstract_params)

    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))

    def state_bytes(self) -> int:
        """Bytes of the optimizer's state, over all devices without copies."""
        return tree_bytes(self.abstract_state.opt_state)

    def state_bytes_per_device(self) -> int:
        """Bytes of the optimizer's state that one device holds."""
        if self.placement is None:
            return self.state_bytes()
        state, shardings = self.abstract_state, self.state_shardings
        return self.placement.bytes_per_device(state.opt_state, shardings.opt_state)

    def adamw_state_bytes(self) -> int:
        """Bytes of AdamW's state for the trained parameters."""
        tx = make_optimizer("adamw", optax.constant_schedule(0.0))
        return state_bytes(tx, self.abstract_params)

    def share_of_batch(self) -> dict[str, int]:
        """The share of each batch that this process reads, for the data's functions."""
        if self.placement is None:
            return {"process_index": 0, "process_count": 1}
        index, count = share_of_batch(self.placement.batch, self.settings.batch_size)
        return {"process_index": index, "process_count": count}

    def describe_mesh(self) -> dict[str, Any] | None:
        """The mesh and the parameters that are not split on it, as JSON; None without a mesh."""
        return None if self.placement is None else self.placement.describe()

    def notes(self) -> list[str]:
        """Notes on the devices for the run's user."""
        if self.placement is not None:
            return [f"Note: {note}." for note in self.placement.notes]
        devices = jax.devices()
        if len(devices) > 1 and devices[0].platform != "cpu":
            return [f"Note: one of {len(devices)} devices is used; --mesh fsdp=* uses them all."]
        return []

    @cached_property
    def state_shardings(self) -> Any:
        """The sharding of each array of the train state; None without a mesh."""
        if self.placement is None:
            return None
        make = self.settings.optimizer_from
        return self.placement.state(lambda params: init_state(params, make), self.abstract_params)

    def init(self, seed: int) -> TrainState:
        """The state before the first step.

        The parameters come from a separate function for every optimizer, so that all optimizers start from the
        same bits.
        """
        trained = self.source.trained(self.settings, self.placement, seed, self.frozen)
        make = self.settings.optimizer_from
        return jax.jit(
            lambda params: init_state(params, make),
            donate_argnums=0,
            out_shardings=self.state_shardings,
        )(trained)

    def compile(self, *, detailed: bool = False) -> None:
        """Compiles the train step now, and the one with statistics on request."""
        _ = self._step
        if detailed:
            _ = self._detailed_step

    def step(
        self, state: TrainState, batch: Batch, peak: float, *, detailed: bool = False
    ) -> StepOutput:
        """Takes one optimizer step; `state` is donated.

        Args:
            state: The state.
            batch: int32 arrays (batch_size, seq_len + 1); with several processes each passes its share of the
                sequences.
            peak: Peak learning rate.
            detailed: Whether to compute the statistics of updates, damper and factors too.
        """
        compiled = self._detailed_step if detailed else self._step
        return compiled(state, self.frozen, self._placed(batch), jax.device_put(np.float32(peak)))

    def evaluate(self, params: Params, batches: Sequence[Batch]) -> tuple[float, int]:
        """The mean loss over all learned tokens of some batches, and their number."""
        sums: Any = (np.float32(0), np.float32(0))
        for batch in batches:
            sums = self._evaluate(params, self.frozen, self._placed(batch), sums)
        total, count = jax.device_get(sums)
        return float(total) / max(float(count), 1.0), int(count)

    def lower(self, statistics: Any = None, *, platforms: Sequence[str] | None = None) -> Any:
        """The lowered train step, a function of state, frozen parameters, batch and rate.

        Nothing is allocated.

        Args:
            statistics: See `make_train_step`.
            platforms: The platforms to lower for, as ("cuda",); by default the present devices.
        """
        settings, placement, loss_fn = self.settings, self.placement, self._loss_fn()

        def step(state: TrainState, frozen: Params, batch: Any, peak: jax.Array) -> StepOutput:
            take = make_train_step(
                lambda trained, batch: loss_fn(trained, frozen, batch),
                settings.optimizer_from,
                warmup_cosine(settings.steps, settings.warmup_steps, settings.final_rate_fraction),
                clip_norm=settings.clip_norm,
                accumulate=settings.accumulate,
                statistics=statistics,
            )
            return take(state, batch, peak)

        state, frozen, batch = self.abstract_state, self.abstract_frozen, self._abstract_batch()
        options: dict[str, Any] = {"donate_argnums": 0}
        if placement is not None:
            state = jax.tree.map(with_sharding, state, self.state_shardings)
            frozen = jax.tree.map(with_sharding, frozen, placement.params(frozen))
            batch = {name: with_sharding(leaf, placement.batch) for name, leaf in batch.items()}
            replicated = placement.replicated
            options["out_shardings"] = (self.state_shardings, replicated, replicated)
        peak = jax.ShapeDtypeStruct((), jnp.float32)
        traced = jax.jit(step, **options).trace(state, frozen, batch, peak)
        return traced.lower(lowering_platforms=None if platforms is None else tuple(platforms))

    def _placed(self, batch: Batch) -> Any:
        """A batch on the device, or on the mesh, from the share that this process has read."""
        if self.placement is None:
            return jax.device_put(batch)
        place = partial(jax.make_array_from_process_local_data, self.placement.batch)
        return jax.tree.map(place, batch)

    @cached_property
    def _evaluate(self) -> Callable[..., Any]:
        loss_fn = self._loss_fn()
        if self.placement is None:
            return partial(_evaluate, loss_fn)
        return jax.jit(partial(_add_evaluation, loss_fn), out_shardings=self.placement.replicated)

    def _loss_fn(self) -> LossFn:
        settings, placement = self.settings, self.placement
        chunk = settings.loss_chunk
        if placement is not None and chunk is None:
            # The limit applies to the memory of one device.
            tokens = settings.tokens_per_step
            chunk = automatic_chunk(tokens, settings.model.vocab_size, placement.batch_shards)
        loss_fn = NextTokenLoss(self._graphdef, chunk)
        if placement is None or placement.mode == "auto":
            return loss_fn
        scalar = placement.replicated
        wrapped: Any = jax.sharding.auto_axes(loss_fn, out_sharding=(scalar, scalar))
        return wrapped

    @cached_property
    def _step(self) -> Callable[..., StepOutput]:
        return self._compiled_step(None)

    @cached_property
    def _detailed_step(self) -> Callable[..., StepOutput]:
        return self._compiled_step(make_statistics(damper_arguments(self.settings.options)))

    def _compiled_step(self, statistics: Any) -> Callable[..., StepOutput]:
        started = time.perf_counter()
        compiled = self.lower(statistics).compile()
        self.compile_seconds += time.perf_counter() - started
        return compiled

    def _abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        shape = (self.settings.batch_size, self.settings.seq_len + 1)
        return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in self.source.fields}


def _placement(settings: Settings) -> Placement | None:
    if settings.mesh is None:
        return None
    return Placement(
        parse_mesh(settings.mesh),
        mode=settings.mesh_mode or "auto",
        strict=settings.mesh_strict or False,
    )


def _add_evaluation(loss_fn: LossFn, trained: Params, frozen: Params, batch: Any, sums: Any) -> Any:
    evaluate = make_evaluation(lambda trained, batch: loss_fn(trained, frozen, batch))
    return evaluate(trained, batch, sums)


_evaluate = jax.jit(_add_evaluation, static_argnums=0)


def _without_rate(settings: Settings) -> Settings:
    return dataclasses.replace(
        settings,
        learning_rate=1.0,
        rate_source="",
        seed=0,
        eval_every=1,
        eval_batches=1,
        log_every=1,
        statistics_every=0,
    )
