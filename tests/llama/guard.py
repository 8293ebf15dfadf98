"""A small training run for each main optimizer, and what its loss was: the guard's measurements.

    python -m tests.llama.guard

prints the table that `RECORDED` holds. It is to be recorded anew only when a rule was changed on purpose.

Everything random comes from generators that are the same with every version: the corpus from
`random.Random.random`, parameters and batches from `numpy.random.RandomState`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.llama.data.sources import synthetic_documents
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import abstract, apply, structure
from examples.llama.model.loss import next_token_loss
from examples.llama.optimizers.registry import make_optimizer
from examples.llama.training.step import warmup_cosine

MODEL = LlamaConfig(
    vocab_size=128,  # characters
    hidden_size=32,
    intermediate_size=80,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=32,
)
STEPS, BATCH, LENGTH, LAST = 30, 16, 32, 10
SHAKE, SHAKES = 1e-6, 3

RUNS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "adamw": ("adamw", 1e-2, {}),
    "lion": ("lion", 3e-3, {}),
    "sage": ("sage", 3e-3, {}),
    "sage_hybrid": ("sage_hybrid", 3e-3, {}),
    "sage_hybrid_int8": ("sage_hybrid_int8", 3e-3, {}),
    "lion_hybrid": ("lion_hybrid", 3e-3, {}),
    "sinkgd": ("sinkgd", 2e-2, {}),
    "sinkgd_hybrid": ("sinkgd_hybrid", 3e-3, {}),
    "lorapre_adamw": ("lorapre_adamw", 3e-3, {"rank": 4}),
    "lorapre_adamw recommended": (
        "lorapre_adamw",
        3e-3,
        {"rank": 4, "option_set": "recommended"},
    ),
    "lorapre_muon": ("lorapre_muon", 1e-2, {"rank": 4}),
    "lorapre_sgd": ("lorapre_sgd", 0.1, {"rank": 4}),
    "lorapre_lion": ("lorapre_lion", 3e-3, {"rank": 4}),
    "lorapre_sinkgd": ("lorapre_sinkgd", 3e-3, {"rank": 4}),
}
"""Name, optimizer of the example's registry, peak rate, options; weight decay is 0.1."""

RECORDED: dict[str, tuple[float, float]] = {
    "adamw": (2.38610, 1.9e-06),
    "lion": (3.16414, 4.8e-07),
    "sage": (3.26519, 2.4e-06),
    "sage_hybrid": (3.29662, 3.2e-05),
    "sage_hybrid_int8": (3.29541, 2.6e-05),
    "lion_hybrid": (3.18187, 1.8e-04),
    "sinkgd": (4.06631, 4.8e-07),
    "sinkgd_hybrid": (3.30908, 1.0e-05),
    "lorapre_adamw": (3.41527, 3.7e-05),
    "lorapre_adamw recommended": (3.28725, 5.0e-06),
    "lorapre_muon": (2.24384, 4.8e-07),
    "lorapre_sgd": (2.35441, 4.1e-06),
    "lorapre_lion": (3.16570, 4.4e-05),
    "lorapre_sinkgd": (3.30179, 3.5e-05),
}
"""Mean loss of the last ten steps, and its largest change when the start was shaken."""


def band(name: str) -> float:
    """How far from the recorded loss a run may end: three times the spread, and at least 0.003."""
    return max(3 * RECORDED[name][1], 0.003)


def trainer(
    optimizer: str,
    rate: float,
    options: dict[str, Any],
    change: Callable[[optax.GradientTransformation], optax.GradientTransformation] = lambda tx: tx,
) -> Callable[[int], float]:
    """A function that trains and returns the mean training loss of the last ten steps.

    Args:
        optimizer: Name in the example's registry.
        rate: Peak learning rate.
        options: Options of the optimizer.
        change: What to do to the transformation: a deliberate mistake.

    Returns:
        The function. Its argument, if not 0, is the seed of a relative disturbance of 1e-6 of every initial
        parameter: more than what another order of additions does.
    """
    schedule = warmup_cosine(STEPS, STEPS // 10, 0.1)
    tx = change(
        make_optimizer(optimizer, lambda step: rate * schedule(step), weight_decay=0.1, **options)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    init = jax.jit(tx.init)

    def train(shake: int = 0) -> float:
        params = jax.tree.map(jnp.asarray, _initial(shake))
        state, losses = init(params), []
        for tokens in _batches():
            loss, gradients = _loss_and_gradient()(params, tokens)
            params, state = update(params, state, gradients)
            losses.append(loss)
        return float(np.mean(jax.device_get(losses[-LAST:])))

    return train


@functools.cache
def _loss_and_gradient() -> Callable[..., tuple[jax.Array, Any]]:
    """Compiled once for all optimizers."""
    graphdef = structure(MODEL)

    def loss(params, tokens):
        return next_token_loss(apply(graphdef, params), tokens)[0]

    return jax.jit(jax.value_and_grad(loss))


def _initial(shake: int) -> Any:
    random, noise = np.random.RandomState(0), np.random.RandomState(shake)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        vector = leaf.shape[-1] == MODEL.hidden_size and len(leaf.shape) < 3
        table = leaf.shape in ((128, 32), (32, 128))
        values = 0.02 * random.standard_normal(leaf.shape)
        values = np.ones(leaf.shape) if vector and not table else values
        if shake:
            values = values * (1 + SHAKE * noise.standard_normal(leaf.shape))
        return values.astype(np.float32)

    return jax.tree.map(draw, abstract(MODEL))


@functools.cache
def _batches() -> list[np.ndarray]:
    text = "".join(document.text for document in synthetic_documents(7, 60))
    tokens = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)
    random = np.random.RandomState(1)
    starts = random.randint(0, len(tokens) - LENGTH - 1, (STEPS, BATCH))
    return [np.stack([tokens[s : s + LENGTH + 1] for s in row]) for row in starts]


def main() -> None:
    """Measures every run and its spread, and prints them as `RECORDED` has them."""
    for name, (optimizer, rate, options) in RUNS.items():
        train = trainer(optimizer, rate, options)
        loss = train(0)
        shaken = [train(seed) for seed in range(1, SHAKES + 1)]
        spread = max(abs(other - loss) for other in shaken)
        print(f'    "{name}": ({loss:.5f}, {spread:.1e}),', flush=True)


if __name__ == "__main__":
    main()
