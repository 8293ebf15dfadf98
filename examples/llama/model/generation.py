"""Completes prompts: a key-value cache, one compiled prefill, one compiled decoding loop.

Prompts of unequal length are padded on the left, so that all rows of a batch write the same slot of the cache.
No token attends to a row's padding, and its positions start at its first token. Prefill and decoding are
compiled once for a batch size, a prompt length and a number of new tokens; temperature, top-p and seed are
operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama.model.blocks import KVCache
from examples.llama.model.llama import Params, apply


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token.

    Attributes:
        temperature: 0 takes the most likely token (greedy); otherwise logits are divided by it.
        top_p: Draw only from the smallest set of tokens whose probability reaches it.
        seed: Seed of the draws. A prompt's draws depend on its place in the list, but not on the rest of the
            batch.

    Raises:
        ValueError: A number is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


class Completion(NamedTuple):
    """The completion of a prompt.

    Attributes:
        tokens: The new tokens, without the stop token.
        stopped: Whether a stop token ended the completion, rather than the limit.
    """

    tokens: list[int]
    stopped: bool


class Generator:
    """Completes batches of prompts with one model.

    Args:
        graphdef: The model's structure, scanned or not.
        params: Its parameters, sharded or not.
        batch_size: Prompts to run at the same time.
        prompt_tokens: Length of the padded prompts.
        new_tokens: Largest number of tokens to add to a prompt.
        stop_ids: Tokens that end a completion.

    Raises:
        ValueError: A size is not positive or their sum exceeds the model's `max_seq_len`.

    >>> from examples.llama.model.llama import create
    >>> from examples.llama.model.config import preset
    >>> graphdef, params = create(preset("demo", vocab_size=32, hidden_size=16, num_layers=1))
    >>> generator = Generator(graphdef, params, batch_size=2, prompt_tokens=4, new_tokens=3)
    >>> [len(completion.tokens) for completion in generator([[1, 2], [3], [4, 5, 6, 7]])]
    [3, 3, 3]
    """

    def __init__(
        self,
        graphdef: Any,
        params: Params,
        *,
        batch_size: int,
        prompt_tokens: int,
        new_tokens: int,
        stop_ids: Sequence[int] = (),
    ):
        sizes = {"batch_size": batch_size, "prompt_tokens": prompt_tokens}
        for name, size in (sizes | {"new_tokens": new_tokens}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        limit = apply(graphdef, params).config.max_seq_len
        if prompt_tokens + new_tokens > limit:
            raise ValueError(
                f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are more than the "
                f"model's max_seq_len ({limit})"
            )
        self.batch_size = batch_size
        self.prompt_tokens = prompt_tokens
        self.new_tokens = new_tokens
        self._params = params
        self._stop = jnp.asarray(sorted(set(stop_ids)), jnp.int32)
        self._prefill = jax.jit(partial(_prefill, graphdef, prompt_tokens + new_tokens))
        # The cache is donated: the loop writes it in place.
        self._decode = jax.jit(
            partial(_decode, graphdef, prompt_tokens, new_tokens), donate_argnums=1
        )

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling = GREEDY,
        report: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """Completes any number of prompts, one batch at a time.

        Args:
            prompts: Tokens of each prompt.
            sampling: The choice of tokens.
            report: Called after each batch with the number of prompts completed.

        Raises:
            ValueError: A prompt is empty or longer than `prompt_tokens`; the message gives its place.
        """
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) <= self.prompt_tokens:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, it needs 1 to {self.prompt_tokens}"
                )
        completions = []
        for start in range(0, len(prompts), self.batch_size):
            completions += self._batch(start, prompts[start : start + self.batch_size], sampling)
            if report is not None:
                report(len(completions))
        return completions

    def _batch(
        self, start: int, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> list[Completion]:
        tokens = np.zeros((self.batch_size, self.prompt_tokens), np.int32)
        padding = np.full((self.batch_size,), self.prompt_tokens - 1, np.int32)
        for row, prompt in enumerate(prompts):
            padding[row] = self.prompt_tokens - len(prompt)
            tokens[row, padding[row] :] = prompt
        draw = _Draw(
            np.float32(sampling.temperature),
            np.float32(sampling.top_p),
            jax.random.key(sampling.seed),
            np.arange(start, start + self.batch_size, dtype=np.int32),
        )
        live = np.arange(self.batch_size) < len(prompts)
        first, cache = self._prefill(self._params, tokens, padding, draw)
        new, _ = self._decode(self._params, cache, first, padding, live, self._stop, draw)
        new = np.asarray(new)[: len(prompts)]
        stops = np.isin(new, self._stop)
        lengths = np.where(stops.any(axis=1), stops.argmax(axis=1), self.new_tokens)
        return [
            Completion(row[:length].tolist(), bool(length < self.new_tokens))
            for row, length in zip(new, lengths, strict=True)
        ]


class _Draw(NamedTuple):
    """The operands of sampling: float32 scalars, a key, and int32 (B,) places of the prompts."""

    temperature: Any
    top_p: Any
    key: jax.Array
    places: Any


def _prefill(
    graphdef: Any, slots: int, params: Params, tokens: jax.Array, padding: jax.Array, draw: _Draw
) -> tuple[jax.Array, KVCache]:
    """Reads the prompts (B, P); returns each row's first new token (B,) and the cache."""
    model = apply(graphdef, params)
    batch, length = tokens.shape
    place = jnp.arange(length)
    real = (place <= place[:, None]) & (place >= padding[:, None, None])
    # Padding sees itself, since a softmax over nothing would be NaN.
    visible = jnp.pad(real | (place == place[:, None]), ((0, 0), (0, 0), (0, slots - length)))
    positions = jnp.maximum(place - padding[:, None], 0)
    cache = model.init_cache(batch, slots)
    hidden, cache = model.cached(tokens, positions, visible, cache, 0)
    return sample(model.logits(hidden[:, -1]), draw, 0), cache


def _decode(
    graphdef: Any,
    prompt_tokens: int,
    new_tokens: int,
    params: Params,
    cache: KVCache,
    first: jax.Array,
    padding: jax.Array,
    live: jax.Array,
    stop: jax.Array,
    draw: _Draw,
) -> tuple[jax.Array, KVCache]:
    """Adds tokens until every live row has stopped or is full; returns (B, new_tokens) and the cache."""
    model = apply(graphdef, params)
    slots = jnp.arange(prompt_tokens + new_tokens)

    def stopped(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == stop, axis=-1)

    def unfinished(carry):
        count, _, _, done, _ = carry
        return (count < new_tokens) & ~jnp.all(done)

    def add(carry):
        count, token, new, done, cache = carry
        slot = prompt_tokens + count - 1
        visible = (slots <= slot) & (slots >= padding[:, None])
        hidden, cache = model.cached(
            token[:, None], (slot - padding)[:, None], visible[:, None], cache, slot
        )
        token = sample(model.logits(hidden[:, 0]), draw, count)
        new = jax.lax.dynamic_update_slice(new, token[:, None], (0, count))
        return count + 1, token, new, done | stopped(token), cache

    new = jnp.zeros((first.shape[0], new_tokens), jnp.int32).at[:, 0].set(first)
    start = (jnp.int32(1), first, new, ~live | stopped(first), cache)
    _, _, new, _, cache = jax.lax.while_loop(unfinished, add, start)
    return new, cache


def sample(logits: jax.Array, draw: _Draw, count: jax.Array | int) -> jax.Array:
    """The next token of each row, int32 (B,), from logits (B, V) and the number of tokens so far."""

    def greedy() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def random() -> jax.Array:
        kept = nucleus(logits / draw.temperature, draw.top_p)
        keys = jax.vmap(lambda place: jax.random.fold_in(draw.key, place))(draw.places)
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    # A branch, not a select: greedy decoding does not sort the vocabulary.
    return jax.lax.cond(draw.temperature > 0, random, greedy)


def nucleus(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
    """Logits (..., V) with all but the most likely tokens at -inf.

    It keeps the smallest set, in descending order, whose probability reaches `top_p`: each token whose
    predecessors do not reach it, so at least one.

    >>> logits = jnp.log(jnp.array([0.1, 0.5, 0.15, 0.25]))
    >>> jnp.exp(nucleus(logits, 0.7)).round(2).tolist()
    [0.0, 0.5, 0.0, 0.25]
    """
    order = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    probabilities = jax.nn.softmax(order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
    # At 1 nothing is cut, whatever the rounding of the sum.
    return jnp.where((logits >= least) | (top_p >= 1), logits, -jnp.inf)


def round_up(length: int, multiple: int = 32) -> int:
    """Rounds up to a multiple, so that lengths share a compiled program.

    >>> round_up(33), round_up(32)
    (64, 32)
    """
    return -(-length // multiple) * multiple
