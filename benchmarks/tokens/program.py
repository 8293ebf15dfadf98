"""One optimizer's compiled step, with both rates as operands, and its runs over a file of tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.tokens.file import Tokens, batches, windows
from examples.llama.model.llama import apply, structure
from examples.llama.model.loss import next_token_loss
from examples.llama.training.program import Program
from examples.llama.training.settings import Settings
from examples.llama.training.step import (
    StepRecord,
    TrainState,
    make_train_step,
    warmup_cosine,
)
from layout_optax import resolve_layout

HELDOUT_BATCHES = 16
CHECKS = 20
"""So many times in a run the loss is read, and a run without hope or without time is ended."""
TABLES = ("embedding", "head")
"""The roles whose rate the ratio is of."""


class OutOfTimeError(Exception):
    """The budget ended within a run."""


class TokenProgram:
    """What one optimizer's runs execute; peak rate and the tables' rate are operands, so that it compiles once.

    Args:
        settings: The run; its learning rate and seed play no part.

    Attributes:
        settings: See above.
        program: The trainer's own program: initialisation, evaluation, sizes.
        compile_seconds: Time that compiling the step took, 0 before.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.program = Program(settings)
        self.compile_seconds = 0.0

    def compile(self) -> None:
        """Compiles the step now."""
        _ = self._compiled

    def train_step(
        self,
        state: TrainState,
        tokens: jax.Array,
        rate: jax.Array,
        ratio: jax.Array,
        statistics: Callable[[StepRecord], dict[str, Any]] | None = None,
    ) -> tuple[TrainState, jax.Array, dict[str, Any]]:
        """The trainer's step; embedding and head move `ratio` times as far, decay included.

        Args:
            state: The state.
            tokens: int32 (batch_size, seq_len + 1).
            rate: Peak rate, a scalar.
            ratio: Scalar.
            statistics: Further numbers, or None.

        Returns:
            The next state, the loss before the update, and the numbers.
        """
        settings = self.settings

        def optimizer(schedule: optax.Schedule) -> optax.GradientTransformation:
            return scale_tables(settings.optimizer_from(schedule), ratio)

        step = make_train_step(
            self._loss_fn,
            optimizer,
            warmup_cosine(settings.steps, settings.warmup_steps, settings.final_rate_fraction),
            clip_norm=settings.clip_norm,
            accumulate=settings.accumulate,
            statistics=statistics,
        )
        state, metrics, numbers = step(state, tokens, rate)
        return state, metrics.loss, numbers

    def run(
        self,
        tokens: Tokens,
        rate: float,
        ratio: float = 1.0,
        *,
        seed: int = 0,
        left: Callable[[], float] = lambda: math.inf,
    ) -> dict[str, Any]:
        """Trains from the start: the losses on the way, the held-out loss at the end, and the pace.

        A run whose loss is not finite, or after a quarter of its steps more than 0.1 above that of the first
        step, ends there without a held-out loss.

        Args:
            tokens: What to train on and evaluate with.
            rate: Peak rate.
            ratio: The tables' rate over it.
            seed: Of parameters and order.
            left: Seconds that are left.

        Raises:
            OutOfTimeError: None are left.
            ValueError: The tokens do not fill a batch, or lie outside the vocabulary.
        """
        settings, heldout = self.settings, self._heldout(tokens)
        every = max(1, settings.steps // CHECKS)
        compiled = self._compiled
        state, curve, began, first = self.program.init(seed), [], 0.0, math.inf
        operands = jax.device_put((np.float32(rate), np.float32(ratio)))
        found = batches(
            windows(tokens.train, settings.seq_len), settings.batch_size, settings.steps, seed
        )
        for number, batch in enumerate(found, start=1):
            state, loss = compiled(state, batch, *operands)
            if number == 1:
                first = float(loss)
                began = time.perf_counter()  # the first step warms up
            if number % every == 0 or number == settings.steps:
                curve.append([number * settings.tokens_per_step, round(float(loss), 4)])
                hopeless = number > settings.steps // 4 and curve[-1][1] > first + 0.1
                if hopeless or not math.isfinite(curve[-1][1]):
                    return self._result(None, curve, number, began, 0)
                if left() <= 0:
                    raise OutOfTimeError
        jax.block_until_ready(state)
        ended = time.perf_counter()
        loss, count = self.program.evaluate(state.params, heldout)
        return self._result(loss, curve, settings.steps, began, count, ended)

    def _result(
        self,
        loss: float | None,
        curve: list[list[float]],
        steps: int,
        began: float,
        count: int,
        ended: float | None = None,
    ) -> dict[str, Any]:
        finite = loss is not None and math.isfinite(loss)
        seconds = (time.perf_counter() if ended is None else ended) - began
        size = self.settings.tokens_per_step
        return {
            "heldout_loss": loss if finite else None,
            "heldout_perplexity": math.exp(loss) if finite and loss is not None else None,
            "heldout_tokens": count,
            "train_curve": curve,
            "tokens": steps * size,
            "seconds": seconds,
            "tokens_per_second": (steps - 1) * size / seconds if steps > 1 else None,
            "compile_seconds": self.compile_seconds,
            "optimizer_state_bytes": self.program.state_bytes(),
            "state_ratio": self.program.state_bytes() / self.program.adamw_state_bytes(),
            "parameters": self.program.parameter_count(),
        }

    def _heldout(self, tokens: Tokens) -> Sequence[dict[str, np.ndarray]]:
        settings = self.settings
        if tokens.largest >= settings.model.vocab_size:
            raise ValueError(
                f"token {tokens.largest} is outside the vocabulary of {settings.model.vocab_size}; make "
                "the file with a smaller --vocab-size"
            )
        found = windows(tokens.heldout, settings.seq_len)
        count = min(HELDOUT_BATCHES, len(found) // settings.batch_size)
        if count == 0:
            raise ValueError(f"{len(found)} held-out windows do not fill a batch")
        parts = np.split(found[: count * settings.batch_size], count)
        return [{"tokens": part} for part in parts]

    @cached_property
    def _loss_fn(self) -> Callable[..., tuple[jax.Array, jax.Array]]:
        settings = self.settings
        graphdef = structure(
            settings.model,
            scan_layers=settings.scan_layers,
            remat=settings.remat,
            dtype=settings.compute_dtype,
        )

        def loss_fn(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
            return next_token_loss(apply(graphdef, params), tokens, chunk=settings.loss_chunk)

        return loss_fn

    @cached_property
    def _compiled(self) -> Callable[..., tuple[TrainState, jax.Array]]:
        settings = self.settings

        def step(state: TrainState, tokens: jax.Array, rate: jax.Array, ratio: jax.Array):
            return self.train_step(state, tokens, rate, ratio)[:2]

        scalar = jax.ShapeDtypeStruct((), jnp.float32)
        batch = jax.ShapeDtypeStruct((settings.batch_size, settings.seq_len + 1), jnp.int32)
        started = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(
            self.program.abstract_state, batch, scalar, scalar
        )
        compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - started
        return compiled


def scale_tables(
    optimizer: optax.GradientTransformation, ratio: jax.Array | float
) -> optax.GradientTransformation:
    """An optimizer whose updates of embedding and head are multiplied by a number, whatever its rule.

    Since an update is its rate times direction and decay, this is a rate of the tables' own.

    >>> tx = scale_tables(optax.sgd(1.0), 0.5)
    >>> params = {"embed_tokens": {"embedding": jnp.ones((8, 2))}, "norm": {"scale": jnp.ones(2)}}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["embed_tokens"]["embedding"][0, 0]), float(updates["norm"]["scale"][0])
    (-0.5, -1.0)
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = optax.with_extra_args_support(optimizer).update(
            updates, state, params, **extra
        )
        layouts = resolve_layout(None, updates)

        def scaled(layout: Any, leaf: jax.Array) -> jax.Array:
            return leaf * jnp.asarray(ratio, leaf.dtype) if layout.role in TABLES else leaf

        return jax.tree.map(scaled, layouts, updates), state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
