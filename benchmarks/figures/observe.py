"""A run of the demo model that yields its gradients and optimizer states, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from examples.llama.data.batches import train_iterator
from examples.llama.data.dataset import Dataset, prepare_data
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import apply, create
from examples.llama.model.loss import next_token_loss
from examples.llama.training.config import TrainConfig, data_config, resolve
from examples.llama.training.step import accumulated_gradients, warmup_cosine


class Seen(NamedTuple):
    """One step of a run.

    Attributes:
      step: its number, from 1.
      loss: the loss of its batch.
      gradients: the clipped gradients that the optimizer sees, a tree like the parameters.
      state: the optimizer's state before the step.
      learning_rate: the run's peak learning rate.
      corpus_sha256: of the training text.
    """

    step: int
    loss: float
    gradients: Any
    state: Any
    learning_rate: float
    corpus_sha256: str


def steps_of(
    config: TrainConfig, *, model: LlamaConfig | None = None, dataset: Dataset | None = None
) -> Iterator[Seen]:
    """Trains as configured and yields every step.

    Args:
      config: the run's configuration; its number of steps ends the run.
      model: a shape to use instead of the preset's.
      dataset: prepared data to use instead of reading it.
    """
    settings = resolve(config, model)
    dataset = prepare_data(data_config(config, settings)) if dataset is None else dataset
    batches = train_iterator(dataset, settings.batch_size, settings.seq_len, settings.seed)
    graphdef, params = create(settings.model, settings.seed)
    share = warmup_cosine(settings.steps, settings.warmup_steps, settings.final_rate_fraction)
    tx = settings.optimizer_from(lambda count: settings.learning_rate * share(count))
    clip = optax.clip_by_global_norm(settings.clip_norm or float("inf"))

    def loss_fn(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(apply(graphdef, params), tokens)

    @partial(jax.jit, donate_argnums=0)
    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        loss, gradients = accumulated_gradients(loss_fn, params, tokens)
        gradients, _ = clip.update(gradients, clip.init(params))
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss, gradients

    state = jax.jit(tx.init)(params)
    for number in range(1, settings.steps + 1):
        before = state
        params, state, loss, gradients = jax.block_until_ready(
            step(params, state, next(batches)["tokens"])
        )
        yield Seen(
            number, float(loss), gradients, before, settings.learning_rate, dataset.corpus_sha256
        )
