"""The compiled functions of a run: initialisation, train step, train step with statistics, evaluation.

Each is compiled once, ahead of its first call, for one shape of batch: a batch of another shape is an error
and never a second compile. Parameters and optimizer state are donated to the step. On a mesh every array is
made where it belongs and stays there; a process gives its own share of each batch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.llama.data.checks import check_batch
from examples.llama.devices.mesh import Placement, parse_mesh
from examples.llama.devices.processes import share_of_batch
from examples.llama.model.blocks import unconstrained
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import abstract, apply, create, structure
from examples.llama.model.loss import automatic_chunk, next_token_loss
from examples.llama.optimizers.registry import make_optimizer
from examples.llama.optimizers.sage import damper_arguments
from examples.llama.training.settings import Settings
from examples.llama.training.step import (
    LossFn,
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


class Program:
    """What a run executes on its devices, compiled when first used.

    The learning rate and the seed of `settings` play no part, so that runs which differ in these
    alone can share one program (`serves`).

    Raises:
        ValueError: The mesh does not fit the devices, the batch or, in strict mode, the model.

    Attributes:
        settings: What it was made for.
        placement: Where arrays live on the mesh, or None without a mesh.
        compile_seconds: Time that compiling train steps has taken so far.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.compile_seconds = 0.0
        self.placement = placement = _placement(settings)
        self._graphdef = structure(
            settings.model,
            scan_layers=settings.scan_layers,
            remat=settings.remat,
            dtype=settings.compute_dtype,
            constrain=unconstrained if placement is None else placement.activations,
        )
        if placement is not None:
            rows = settings.batch_size // settings.accumulate
            check_batch(rows, devices=placement.batch_shards)
            placement.params(self.abstract_params)

    def serves(self, settings: Settings) -> bool:
        """Whether this program is the one that other settings need."""
        return _without_rate(self.settings) == _without_rate(settings)

    @cached_property
    def abstract_params(self) -> Any:
        """Shapes and dtypes of the parameters."""
        return abstract(self.settings.model, scan_layers=self.settings.scan_layers)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the train state."""
        make = self.settings.optimizer_from
        return jax.eval_shape(lambda params: init_state(params, make), self.abstract_params)

    def parameter_count(self) -> int:
        """Number of parameters."""
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
        """Bytes that AdamW's state would take for this model."""
        tx = make_optimizer("adamw", optax.constant_schedule(0.0))
        return state_bytes(tx, self.abstract_params)

    def share_of_batch(self) -> dict[str, int]:
        """Which share of each batch this process reads, as the data's functions take it."""
        if self.placement is None:
            return {"process_index": 0, "process_count": 1}
        index, count = share_of_batch(self.placement.batch, self.settings.batch_size)
        return {"process_index": index, "process_count": count}

    def describe_mesh(self) -> dict[str, Any] | None:
        """The mesh and what is not split on it, fit for JSON; None without a mesh."""
        return None if self.placement is None else self.placement.describe()

    def notes(self) -> list[str]:
        """What whoever starts a run should know about its devices."""
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

        The parameters come from a function of their own, whatever the optimizer, so that all
        optimizers start from the same bits. On a mesh each device makes its own part of them.
        """
        settings, placement = self.settings, self.placement
        if placement is None:
            params = _init_params(settings.model, settings.scan_layers, np.uint32(seed))
        else:
            # On Auto axes the compiler splits the random numbers too; what changes after is the type.
            born = jax.jit(
                partial(_create_params, settings.model, settings.scan_layers),
                out_shardings=placement.params(self.abstract_params, auto=True),
            )(np.uint32(seed))
            params = jax.device_put(born, placement.params(self.abstract_params))
        make = settings.optimizer_from
        return jax.jit(
            lambda params: init_state(params, make),
            donate_argnums=0,
            out_shardings=self.state_shardings,
        )(params)

    def compile(self, *, detailed: bool = False) -> None:
        """Compiles the train step now, and the one with statistics if asked."""
        _ = self._step
        if detailed:
            _ = self._detailed_step

    def step(
        self, state: TrainState, tokens: np.ndarray, peak: float, *, detailed: bool = False
    ) -> StepOutput:
        """Takes one optimizer step; `state` is donated.

        Args:
            state: The state.
            tokens: int32 (batch_size, seq_len + 1), of several processes each its share of the sequences.
            peak: Peak learning rate.
            detailed: Compute the statistics of updates, damper and factors too.
        """
        compiled = self._detailed_step if detailed else self._step
        return compiled(state, self._placed(tokens), jax.device_put(np.float32(peak)))

    def evaluate(self, params: Any, batches: Sequence[np.ndarray]) -> tuple[float, int]:
        """The mean loss over all tokens of some batches, and their number."""
        sums: Any = (np.float32(0), np.float32(0))
        for tokens in batches:
            sums = self._evaluate(params, self._placed(tokens), sums)
        total, count = jax.device_get(sums)
        return float(total) / float(count), int(count)

    def _placed(self, tokens: np.ndarray) -> Any:
        """A batch on the device, or on the mesh from the share of it that this process has read."""
        if self.placement is None:
            return jax.device_put(tokens)
        return jax.make_array_from_process_local_data(self.placement.batch, tokens)

    @cached_property
    def _evaluate(self) -> Callable[..., Any]:
        if self.placement is None:
            return partial(_evaluate, self._graphdef, self.settings.loss_chunk)
        evaluation = make_evaluation(self._loss_fn())
        return jax.jit(evaluation, out_shardings=self.placement.replicated)

    def _loss_fn(self) -> LossFn:
        settings, placement = self.settings, self.placement
        if placement is None:
            return _loss_fn(self._graphdef, settings.loss_chunk)
        chunk = settings.loss_chunk
        if chunk is None:
            # The limit is of one device's memory.
            tokens = settings.tokens_per_step
            chunk = automatic_chunk(tokens, settings.model.vocab_size, placement.batch_shards)
        loss_fn = _loss_fn(self._graphdef, chunk)
        if placement.mode == "auto":
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
        settings, placement = self.settings, self.placement
        step = make_train_step(
            self._loss_fn(),
            settings.optimizer_from,
            warmup_cosine(settings.steps, settings.warmup_steps, settings.final_rate_fraction),
            clip_norm=settings.clip_norm,
            accumulate=settings.accumulate,
            statistics=statistics,
        )
        started = time.perf_counter()
        state, tokens = self.abstract_state, self._abstract_tokens()
        peak = jax.ShapeDtypeStruct((), jnp.float32)
        options: dict[str, Any] = {"donate_argnums": 0}
        if placement is not None:
            state = jax.tree.map(_with_sharding, state, self.state_shardings)
            tokens = _with_sharding(tokens, placement.batch)
            replicated = placement.replicated
            options["out_shardings"] = (self.state_shardings, replicated, replicated)
        compiled = jax.jit(step, **options).lower(state, tokens, peak).compile()
        self.compile_seconds += time.perf_counter() - started
        return compiled

    def _abstract_tokens(self) -> jax.ShapeDtypeStruct:
        shape = (self.settings.batch_size, self.settings.seq_len + 1)
        return jax.ShapeDtypeStruct(shape, jnp.int32)


@partial(jax.jit, static_argnums=(0, 1))
def _init_params(model: LlamaConfig, scan_layers: bool, seed: jax.Array) -> Params:
    return _create_params(model, scan_layers, seed)


def _create_params(model: LlamaConfig, scan_layers: bool, seed: jax.Array) -> Params:
    return create(model, seed, scan_layers=scan_layers)[1]


def _placement(settings: Settings) -> Placement | None:
    if settings.mesh is None:
        return None
    return Placement(
        parse_mesh(settings.mesh),
        mode=settings.mesh_mode or "auto",
        strict=settings.mesh_strict or False,
    )


def _with_sharding(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


@partial(jax.jit, static_argnums=(0, 1))
def _evaluate(
    graphdef: Any, chunk: int | None, params: Params, tokens: jax.Array, sums: Any
) -> Any:
    return make_evaluation(_loss_fn(graphdef, chunk))(params, tokens, sums)


def _loss_fn(graphdef: Any, chunk: int | None) -> LossFn:
    return lambda params, tokens: next_token_loss(apply(graphdef, params), tokens, chunk=chunk)


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
