"""Rules for tables and rules for matrices by name, and any pair of them as an optimizer: `sage+muon`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lorapre_optax
import sage_optax
from examples.llama.optimizers.options import OptimizerOptions
from examples.llama.optimizers.registry import OptimizerEntry, register_optimizer
from layout_optax import by_role, resolve_layout

Make = Callable[[], optax.GradientTransformation]
RANKS = (4, 8, 16, 32)
ROW_POWERS = (0.5, 1.0)
"""Exponents of SAGE's row damper."""
_RMS = 0.2
"""Root mean square of an orthogonalised update, near AdamW's, as in the trainer's Muon."""


@dataclass(frozen=True)
class Rule:
    """A direction for one kind of parameter.

    Attributes:
        label: Its name in tables.
        make: Makes it, without rate and decay.
        start: The peak rate where a search begins.
    """

    label: str
    make: Make
    start: float


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(b2=0.95)


def _factored() -> optax.GradientTransformation:
    # optax factors from sides of 128 on by default; the small shapes' tables are narrower.
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=32), optax.clip_by_block_rms(1.0)
    )


def _sinkgd(variant: Any, iterations: int, momentum: Make | None = None) -> Make:
    """SinkGD in the hybrids' scaling: 10 for the unit form, 0.6 for the square-root form."""
    scale = 10.0 if variant == "unit" else 0.6

    def make() -> optax.GradientTransformation:
        parts = [
            sage_optax.scale_by_sinkhorn(iterations, variant=variant),
            optax.scale(scale),
        ]
        return optax.chain(*([] if momentum is None else [momentum()]), *parts)

    return make


def _low_rank_ema(rank: int) -> Make:
    return lambda: lorapre_optax.low_rank_ema(0.95, rank, residual=0.9)


def _muon(**options: Any) -> Make:
    return lambda: lorapre_optax.scale_by_lorapre_muon(consistent_rms=_RMS, **options)


def _lorapre_adam(rank: int) -> Make:
    return lambda: lorapre_optax.scale_by_lorapre_adam(rank, **lorapre_optax.RECOMMENDED)


def centred(direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """A direction for tables less its mean over the vocabulary.

    The same step of every row adds the same number to all logits of a token, which no probability notices. The
    gradient of a head has no such part; a rule that normalises its rows one by one adds it.

    >>> tx = centred(optax.identity())
    >>> table = {"embed_tokens": {"embedding": jnp.asarray([[1.0, 0.0], [3.0, 0.0]])}}
    >>> tx.update(table, tx.init(table))[0]["embed_tokens"]["embedding"].tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """

    def without_mean(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(
            lambda layout, leaf: leaf - jnp.mean(leaf, layout.row_axes, keepdims=True),
            resolve_layout(None, updates),
            updates,
        )

    return optax.chain(direction, optax.stateless(without_mean))


def capped(direction: optax.GradientTransformation, limit: float) -> optax.GradientTransformation:
    """A direction for matrices whose singular values are at most `limit` times their root mean square.

    Matrices are the last two axes. With 1 and a full rank all singular values end alike, as in Muon.

    >>> tx = capped(optax.identity(), 1.0)
    >>> matrix = {"kernel": jnp.diag(jnp.asarray([3.0, 4.0, 0.0, 0.0]))}
    >>> [round(float(x), 3) for x in jnp.diag(tx.update(matrix, tx.init(matrix))[0]["kernel"])]
    [2.5, 2.5, 0.0, 0.0]
    """

    def cap(matrix: jax.Array) -> jax.Array:
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        rms = jnp.sqrt(jnp.mean(jnp.square(values), axis=-1, keepdims=True))
        return (left * jnp.minimum(values, limit * rms)[..., None, :]) @ right

    return optax.chain(direction, optax.stateless(lambda updates, _: jax.tree.map(cap, updates)))


TABLES: Mapping[str, Rule] = {
    "adamw": Rule("AdamW", _adam, 1.2e-2),
    "sage": Rule("SAGE", sage_optax.scale_by_sage, 4e-3),
    "sage_int8": Rule("SAGE int8", lambda: sage_optax.scale_by_sage(mu_dtype=jnp.int8), 4e-3),
    **{
        f"sage_rows_{power:g}": Rule(
            f"SAGE, row damper {power:g}",
            lambda power=power: sage_optax.scale_by_sage(row_damper=power),
            8e-3,
        )
        for power in ROW_POWERS
    },
    "sage_centred": Rule("SAGE, centred", lambda: centred(sage_optax.scale_by_sage()), 4e-3),
    "lion": Rule("Lion", optax.scale_by_lion, 2e-3),
    "factored": Rule("factored RMS", _factored, 1.2e-2),
    **{
        f"lorapre_adam_r{rank}": Rule(f"LoRA-Pre Adam r={rank}", _lorapre_adam(rank), 1.2e-2)
        for rank in RANKS
    },
}
"""Rules for embedding and head."""
MATRICES: Mapping[str, Rule] = {
    "adamw": Rule("AdamW", _adam, 2e-3),
    "muon": Rule("Muon", _muon(rank=None, nesterov=True), 6e-3),
    "orthogonal": Rule("orthogonalised gradient", _muon(rank=1, mu=0.0), 2.4e-2),
    "sinkgd": Rule("SinkGD", _sinkgd("unit", 5), 1e-3),
    "sinkgd_1": Rule("SinkGD, 1 iteration", _sinkgd("unit", 1), 1e-3),
    "sinkgd_capped": Rule(
        "SinkGD, singular values capped", lambda: capped(_sinkgd("unit", 5)(), 2.0), 1e-3
    ),
    "sinkgd_sqrt": Rule("SinkGD sqrt", _sinkgd("sqrt", 5), 2e-3),
    "sinkgd_sqrt_1": Rule("SinkGD sqrt, 1 iteration", _sinkgd("sqrt", 1), 2e-3),
    "sinkgd_ema": Rule(
        "SinkGD sqrt on the EMA", _sinkgd("sqrt", 5, lambda: optax.ema(0.95, debias=False)), 1e-3
    ),
    **{
        f"sinkgd_ema_r{rank}": Rule(
            f"SinkGD sqrt on the low-rank EMA r={rank}",
            _sinkgd("sqrt", 5, _low_rank_ema(rank)),
            1e-3,
        )
        for rank in RANKS
    },
    **{
        f"lorapre_muon_r{rank}": Rule(f"LoRA-Pre Muon r={rank}", _muon(rank=rank), 1.2e-2)
        for rank in RANKS
    },
    **{
        f"lorapre_muon_r{rank}_residual": Rule(
            f"LoRA-Pre Muon r={rank} residual", _muon(rank=rank, residual=0.9), 1.2e-2
        )
        for rank in RANKS
    },
    **{
        f"lorapre_muon_r{rank}_nesterov": Rule(
            f"LoRA-Pre Muon r={rank} nesterov", _muon(rank=rank, nesterov=True), 1.2e-2
        )
        for rank in RANKS
    },
}
"""Rules for matrices. Vectors have AdamW, at the matrices' rate."""


@functools.cache
def crossing(table: str, matrix: str) -> OptimizerEntry:
    """The optimizer of a table rule and a matrix rule.

    Raises:
        ValueError: A name is unknown; the message lists those there are.

    >>> crossing("sage", "muon").label
    'tables SAGE, matrices Muon'
    """
    for name, known in ((table, TABLES), (matrix, MATRICES)):
        if name not in known:
            raise ValueError(f"unknown rule {name!r}; use one of {', '.join(known)}")

    def factory(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
        directions = {
            "embedding": TABLES[table].make(),
            "matrix": MATRICES[matrix].make(),
            "vector": _adam(),
        }
        return by_role(
            directions,
            learning_rate,
            weight_decay=options.weight_decay,
            weight_decay_mask=options.decay_mask(),
        )

    return OptimizerEntry(
        f"tables {TABLES[table].label}, matrices {MATRICES[matrix].label}",
        factory,
        state="the table rule's for embedding and head, the matrix rule's, two moments a vector",
        description="A table rule and a matrix rule of the token benchmark.",
    )


def register_crossing(key: str) -> None:
    """Adds `table+matrix` to the example's registry; other keys are left alone.

    Raises:
        ValueError: A rule is unknown.
    """
    name = key.partition(":")[0].strip()
    table, plus, matrix = name.partition("+")
    if plus:
        register_optimizer(name, crossing(table, matrix))
