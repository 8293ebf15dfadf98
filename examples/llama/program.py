"""The compiled functions of a run: initialisation, train step, train step with statistics, evaluation.

Each is compiled once, ahead of its first call, for one shape of batch: a batch of another shape is an error
and never a second compile. Parameters and optimizer state are donated to the step.
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

from examples.llama.loss import next_token_loss
from examples.llama.model import abstract, apply, create, structure
from examples.llama.optimizers import damper_arguments, make_optimizer
from examples.llama.presets import LlamaConfig
from examples.llama.settings import Settings
from examples.llama.step import (
    LossFn,
    Params,
    StepMetrics,
    TrainState,
    init_state,
    make_evaluation,
    make_train_step,
    warmup_cosine,
)
from examples.llama.update_stats import make_statistics
from layout_optax import state_bytes
from layout_optax.memory import tree_bytes

StepOutput = tuple[TrainState, StepMetrics, dict[str, jax.Array]]


class Program:
    """What a run executes on the device, compiled when first used.

    The learning rate and the seed of `settings` play no part, so that runs which differ in these
    alone can share one program (`serves`).

    Attributes:
        settings: What it was made for.
        compile_seconds: Time that compiling train steps has taken so far.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.compile_seconds = 0.0
        self._graphdef = structure(
            settings.model,
            scan_layers=settings.scan_layers,
            remat=settings.remat,
            dtype=settings.compute_dtype,
        )

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
        """Bytes of the optimizer's state."""
        return tree_bytes(self.abstract_state.opt_state)

    def adamw_state_bytes(self) -> int:
        """Bytes that AdamW's state would take for this model."""
        tx = make_optimizer("adamw", optax.constant_schedule(0.0))
        return state_bytes(tx, self.abstract_params)

    def init(self, seed: int) -> TrainState:
        """The state before the first step.

        The parameters come from a function of their own, whatever the optimizer, so that all
        optimizers start from the same bits.
        """
        params = _init_params(self.settings.model, self.settings.scan_layers, np.uint32(seed))
        make = self.settings.optimizer_from
        return jax.jit(lambda params: init_state(params, make), donate_argnums=0)(params)

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
            tokens: int32 (batch_size, seq_len + 1).
            peak: Peak learning rate.
            detailed: Compute the statistics of updates, damper and factors too.
        """
        compiled = self._detailed_step if detailed else self._step
        return compiled(state, tokens, np.float32(peak))

    def evaluate(self, params: Any, batches: Sequence[np.ndarray]) -> tuple[float, int]:
        """The mean loss over all tokens of some batches, and their number."""
        sums = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
        for tokens in batches:
            sums = _evaluate(self._graphdef, self.settings.loss_chunk, params, tokens, sums)
        total, count = jax.device_get(sums)
        return float(total) / float(count), int(count)

    @cached_property
    def _step(self) -> Callable[..., StepOutput]:
        return self._compiled_step(None)

    @cached_property
    def _detailed_step(self) -> Callable[..., StepOutput]:
        return self._compiled_step(make_statistics(damper_arguments(self.settings.options)))

    def _compiled_step(self, statistics: Any) -> Callable[..., StepOutput]:
        settings = self.settings
        step = make_train_step(
            _loss_fn(self._graphdef, settings.loss_chunk),
            settings.optimizer_from,
            warmup_cosine(settings.steps, settings.warmup_steps, settings.final_rate_fraction),
            clip_norm=settings.clip_norm,
            accumulate=settings.accumulate,
            statistics=statistics,
        )
        tokens = jax.ShapeDtypeStruct((settings.batch_size, settings.seq_len + 1), jnp.int32)
        peak = jax.ShapeDtypeStruct((), jnp.float32)
        started = time.perf_counter()
        compiled = (
            jax.jit(step, donate_argnums=0).lower(self.abstract_state, tokens, peak).compile()
        )
        self.compile_seconds += time.perf_counter() - started
        return compiled


@partial(jax.jit, static_argnums=(0, 1))
def _init_params(model: LlamaConfig, scan_layers: bool, seed: jax.Array) -> Params:
    return create(model, seed, scan_layers=scan_layers)[1]


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
