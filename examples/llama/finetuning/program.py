"""The compiled functions of fine-tuning: a step that trains part of the parameters, or adapters of them.

The train state holds the trained part alone. The rest is an operand of the step that is neither differentiated
nor donated: it has no gradient and no optimizer state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from examples.llama.data.instruction_batches import DOCUMENTS, LEARNED, TOKENS, document_positions
from examples.llama.finetuning.adapters import (
    AdapterSpec,
    adapted_structure,
    init_adapters,
    merge_adapters,
)
from examples.llama.model.blocks import unconstrained
from examples.llama.model.llama import Params, abstract, apply
from examples.llama.model.loss import automatic_chunk, next_token_loss
from examples.llama.model.subtrees import merge_trees, split_params
from examples.llama.training.program import Program, StepOutput
from examples.llama.training.settings import Settings
from examples.llama.training.step import (
    TrainState,
    init_state,
    make_evaluation,
    make_train_step,
    warmup_cosine,
)
from layout_optax.layout import path_string

LoadParams = Callable[..., Params]
"""`load(scan_layers=..., shardings=..., wanted=...)` gives parameters of the model that training starts from:
those whose path is wanted, or all."""


@dataclass(frozen=True)
class Tuned:
    """What is trained of a model.

    Attributes:
        patterns: Paths of the parameters trained; None with an adapter.
        adapter: The adapter trained in their place, or None.
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


class FinetuneProgram(Program):
    """A `Program` whose state is the trained part; batches are those of `instruction_batches`.

    Args:
        settings: The run's settings.
        tuned: What is trained.
        load: Reads the model that training starts from, when it is first needed.
    """

    def __init__(self, settings: Settings, tuned: Tuned, load: LoadParams):
        self.tuned = tuned
        self._load = load
        super().__init__(settings)
        if tuned.adapter is not None:
            placement = self.placement
            self._graphdef = adapted_structure(
                settings.model,
                tuned.adapter,
                scan_layers=settings.scan_layers,
                remat=settings.remat,
                dtype=settings.compute_dtype,
                constrain=unconstrained if placement is None else placement.activations,
            )

    @cached_property
    def abstract_model(self) -> Params:
        """Shapes and dtypes of all the model's parameters."""
        return abstract(self.settings.model, scan_layers=self.settings.scan_layers)

    @cached_property
    def abstract_params(self) -> Any:
        """Shapes and dtypes of what is trained."""
        spec = self.tuned.adapter
        if spec is None:
            return self.tuned.split(self.abstract_model)[0]
        return jax.eval_shape(lambda params: init_adapters(params, spec, 0), self.abstract_model)

    def model_parameter_count(self) -> int:
        """Number of parameters of the model, without adapters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_model))

    @cached_property
    def frozen(self) -> Params:
        """The parameters that are not trained, where they belong."""
        shapes = self.tuned.split(self.abstract_model)[1]
        held = {path_string(path) for path, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]}
        return self._read(held.__contains__)

    def init(self, seed: int) -> TrainState:
        """The state before the first step: the model's own parameters, or new adapters."""
        settings, placement, spec = self.settings, self.placement, self.tuned.adapter
        if spec is None:
            # Read once for both parts.
            trained, self.__dict__["frozen"] = self.tuned.split(self._read())
        else:
            frozen = self.frozen
            shardings = None
            if placement is not None:
                # On Auto axes, as in `Program.init`; to go there and back costs nothing.
                frozen = jax.device_put(frozen, placement.params(frozen, auto=True))
                shardings = placement.params(self.abstract_params, auto=True)
            make_adapters = jax.jit(
                lambda params, seed: init_adapters(params, spec, seed), out_shardings=shardings
            )
            trained = make_adapters(frozen, np.uint32(seed))
            if placement is not None:
                trained = jax.device_put(trained, placement.params(self.abstract_params))
        make = settings.optimizer_from
        return jax.jit(
            lambda params: init_state(params, make),
            donate_argnums=0,
            out_shardings=self.state_shardings,
        )(trained)

    def step(
        self, state: TrainState, tokens: np.ndarray, peak: float, *, detailed: bool = False
    ) -> StepOutput:
        """Takes one optimizer step; `state` is donated. The batch is int32 (batch_size, 3, seq_len + 1)."""
        compiled = self._detailed_step if detailed else self._step
        return compiled(state, self.frozen, self._placed(tokens), np.float32(peak))

    def evaluate(self, params: Any, batches: Sequence[np.ndarray]) -> tuple[float, int]:
        """The mean loss over all learned tokens of some batches, and their number."""
        sums: Any = (np.float32(0), np.float32(0))
        for tokens in batches:
            sums = self._evaluation(params, self.frozen, self._placed(tokens), sums)
        total, count = jax.device_get(sums)
        return float(total) / max(float(count), 1.0), int(count)

    def merged(self, trained: Params) -> Params:
        """The parameters of the plain model after training."""
        return self.tuned.merge(trained, self.frozen)

    def lower(self, statistics: Any = None) -> Any:
        """The lowered train step; nothing is allocated."""
        settings, placement = self.settings, self.placement
        loss_fn = self._split_loss()

        def step(state: TrainState, frozen: Params, tokens: jax.Array, peak: jax.Array) -> Any:
            make = make_train_step(
                lambda trained, tokens: loss_fn(trained, frozen, tokens),
                settings.optimizer_from,
                warmup_cosine(settings.steps, settings.warmup_steps, settings.final_rate_fraction),
                clip_norm=settings.clip_norm,
                accumulate=settings.accumulate,
                statistics=statistics,
            )
            return make(state, tokens, peak)

        state, frozen = self.abstract_state, self.tuned.split(self.abstract_model)[1]
        shape = (settings.batch_size, 3, settings.seq_len + 1)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        options: dict[str, Any] = {"donate_argnums": 0}
        if placement is not None:
            state = jax.tree.map(_with_sharding, state, self.state_shardings)
            frozen = jax.tree.map(_with_sharding, frozen, placement.params(frozen))
            tokens = _with_sharding(tokens, placement.batch)
            replicated = placement.replicated
            options["out_shardings"] = (self.state_shardings, replicated, replicated)
        return jax.jit(step, **options).lower(
            state, frozen, tokens, jax.ShapeDtypeStruct((), jnp.float32)
        )

    def _read(self, wanted: Callable[[str], bool] | None = None) -> Params:
        if self.placement is not None:
            shardings = self.placement.params(self.abstract_model)
        else:
            # Not by way of a copy on the host: one parameter after the other.
            first = SingleDeviceSharding(jax.devices()[0])
            shardings = jax.tree.map(lambda _: first, self.abstract_model)
        scan_layers = self.settings.scan_layers
        return self._load(scan_layers=scan_layers, shardings=shardings, wanted=wanted)

    def _compiled_step(self, statistics: Any) -> Callable[..., StepOutput]:
        started = time.perf_counter()
        compiled = self.lower(statistics).compile()
        self.compile_seconds += time.perf_counter() - started
        return compiled

    @cached_property
    def _evaluation(self) -> Callable[..., Any]:
        loss_fn = self._split_loss()

        def evaluate(trained: Params, frozen: Params, tokens: jax.Array, sums: Any) -> Any:
            add = make_evaluation(lambda trained, tokens: loss_fn(trained, frozen, tokens))
            return add(trained, tokens, sums)

        replicated = None if self.placement is None else self.placement.replicated
        return jax.jit(evaluate, out_shardings=replicated)

    def _split_loss(self) -> Callable[[Params, Params, jax.Array], tuple[jax.Array, jax.Array]]:
        """The mean loss of the learned tokens and their number, from the trained part and the rest."""
        settings, placement, graphdef = self.settings, self.placement, self._graphdef
        chunk = settings.loss_chunk
        if chunk is None and placement is not None:
            shards, vocab_size = placement.batch_shards, settings.model.vocab_size
            chunk = automatic_chunk(settings.tokens_per_step, vocab_size, shards)

        def loss_fn(trained: Params, frozen: Params, batch: jax.Array) -> Any:
            documents = batch[:, DOCUMENTS, :-1]
            return next_token_loss(
                apply(graphdef, merge_trees(trained, frozen)),
                batch[:, TOKENS],
                chunk=chunk,
                mask=batch[:, LEARNED, 1:],
                positions=document_positions(documents),
                segments=documents,
            )

        if placement is None or placement.mode == "auto":
            return loss_fn
        scalar = placement.replicated
        wrapped: Any = jax.sharding.auto_axes(loss_fn, out_sharding=(scalar, scalar))
        return wrapped


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
