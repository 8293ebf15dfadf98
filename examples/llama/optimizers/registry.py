"""The optimizers of the example by name, with their state and options.

One peak learning rate drives an optimizer, also if its parts use different rules. The unit SinkGD of the
hybrids has its own `scale` (10), so that a learning rate for a sign or Adam rule on the embedding suits the
matrices too. If that is not enough, `role_multipliers` gives a role another learning rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from examples.llama.optimizers import baselines, lorapre, sage
from examples.llama.optimizers.options import OptimizerOptions

Factory = Callable[[optax.ScalarOrSchedule, OptimizerOptions], optax.GradientTransformation]


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer of the registry.

    Attributes:
        label: Its name in tables and plots.
        factory: Makes the transformation from a learning rate and options.
        state: The numbers that it stores for each parameter.
        description: A one-line description.
        options: The names of `OPTION_NAMES` that it takes.
        needs_unscanned: Whether it fails on stacked layers.
        needs_auto_mesh: Whether it fails on a mesh of Explicit axes.
        has_rank: Whether it needs a rank; the preset gives one by default.
        int8_momentum: Whether its `mu_dtype` may be int8.
    """

    label: str
    factory: Factory
    state: str
    description: str
    options: tuple[str, ...] = ()
    needs_unscanned: bool = False
    needs_auto_mesh: bool = False
    has_rank: bool = False
    int8_momentum: bool = False


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    options: OptimizerOptions | None = None,
    /,
    **overrides: Any,
) -> optax.GradientTransformation:
    """Makes an optimizer by name.

    Args:
        name: A key of `OPTIMIZERS`.
        learning_rate: The learning rate or an optax schedule.
        options: Its settings.
        **overrides: Fields of `OptimizerOptions` to replace.

    Raises:
        ValueError: The name is unknown, or the optimizer does not take one of the settings.

    >>> tx = make_optimizer("adamw", 1e-3, weight_decay=0.1)
    >>> make_optimizer("adamw", 1e-3, damper="ema")
    Traceback (most recent call last):
        ...
    ValueError: adamw takes no damper; its options are b1, b2, eps, mu_dtype, role_multipliers.
    """
    entry = optimizer_entry(name)
    options = dataclasses.replace(options or OptimizerOptions(), **overrides)
    for option in options.given():
        if option not in entry.options:
            known = (
                f"its options are {', '.join(entry.options)}" if entry.options else "it has none"
            )
            raise ValueError(f"{name} takes no {option}; {known}.")
    if options.mu_dtype == "int8" and not entry.int8_momentum:
        raise ValueError(f"{name} has no int8 momentum; its mu_dtype is float32 or bfloat16.")
    if entry.has_rank and options.rank is None:
        raise ValueError(f"{name} needs a rank.")
    return entry.factory(learning_rate, options)


def optimizer_entry(name: str) -> OptimizerEntry:
    """The registry's entry of a name.

    Raises:
        ValueError: The name is unknown; the message lists those there are.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; the optimizers are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def register_optimizer(name: str, entry: OptimizerEntry) -> None:
    """Adds an optimizer to the registry, for a benchmark's peers; adding the same entry again does nothing.

    Raises:
        ValueError: The name is taken by another entry.

    >>> register_optimizer("adamw", OPTIMIZERS["adamw"])
    """
    if OPTIMIZERS.setdefault(name, entry) != entry:
        raise ValueError(f"there is an optimizer {name!r} already")


_ADAM = ("b1", "b2", "eps", "mu_dtype")
_SAGE = ("b1", "b2", "eps", "damper", "eps_mode", "mu_dtype")
_SINKHORN = ("sinkhorn_iterations", "sinkhorn_variant")
_HYBRID = ("scale", "head_rule", *_SINKHORN, "role_multipliers")
_FACTORS = ("rank", "residual", "initial_subspace", "factor_dtype", "damping", "role_multipliers")
_LORAPRE_ADAM = (
    "b1",
    "b2",
    "eps",
    "option_set",
    "bias_correction",
    "bound",
    "second_moment",
    *_FACTORS,
)

OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(
        "AdamW",
        baselines.adamw,
        state="two moments of the parameter's shape",
        description="optax.adamw on everything: the reference for the others.",
        options=(*_ADAM, "role_multipliers"),
    ),
    "lion": OptimizerEntry(
        "Lion",
        baselines.lion,
        state="one momentum of the parameter's shape",
        description="optax.lion on everything.",
        options=("b1", "b2", "mu_dtype"),
    ),
    "adafactor": OptimizerEntry(
        "Adafactor",
        baselines.adafactor,
        state="row and column sums of squares; the full second moment of small parameters",
        description="optax.adafactor's parts with decay times the learning rate; steps are relative to "
        "a parameter's rms (of a whole stack, where layers are stacked).",
    ),
    "muon": OptimizerEntry(
        "Muon",
        baselines.muon,
        state="one momentum for matrices, two moments for the rest",
        description="optax.contrib.muon on matrices, layer by layer, at update rms `scale` (0.2), with "
        "its AdamW on the rest.",
        options=("b1", "b2", "scale"),
        needs_auto_mesh=True,
    ),
    "galore": OptimizerEntry(
        "GaLore",
        baselines.galore,
        state="a projection of the larger side and two moments on the smaller, (max + 2 min) r numbers "
        "per matrix; two moments for the rest",
        description="optax.contrib.galore on matrices, AdamW on the rest; needs unstacked layers.",
        options=("b1", "b2", "eps", "scale", "rank", "update_gap"),
        needs_unscanned=True,
        needs_auto_mesh=True,
        has_rank=True,
    ),
    "sage_hybrid": OptimizerEntry(
        "SAGE-Hybrid",
        sage.sage_hybrid,
        state="one momentum and one number per column for all but matrices, nothing for matrices",
        description="SinkGD on matrices, SAGE on everything else: the paper's method.",
        options=(*_SAGE, "vector_rule", *_HYBRID),
        int8_momentum=True,
    ),
    "sage_hybrid_int8": OptimizerEntry(
        "SAGE-Hybrid int8",
        sage.sage_hybrid_int8,
        state="an int8 momentum, one number per row and one per column for all but matrices",
        description="SAGE-Hybrid with its momentum in int8.",
        options=("b1", "b2", "eps", "damper", "eps_mode", "vector_rule", *_HYBRID),
    ),
    "sinkgd_hybrid": OptimizerEntry(
        "SinkGD-Hybrid",
        sage.sinkgd_hybrid,
        state="two moments for all but matrices, or V + d numbers for embedding and head with "
        "`table_rule=factored_rms`; nothing for matrices",
        description="SinkGD on matrices, AdamW on everything else, at one peak rate and `scale` (10); with "
        "`table_rule` Adafactor's rule on embedding and head.",
        options=(*_ADAM, "option_set", "table_rule", *_HYBRID),
    ),
    "lion_hybrid": OptimizerEntry(
        "Lion-Hybrid",
        sage.lion_hybrid,
        state="one momentum for all but matrices, nothing for matrices",
        description="SinkGD on matrices, Lion on everything else: the control without damper.",
        options=("b1", "b2", "mu_dtype", *_HYBRID),
        int8_momentum=True,
    ),
    "sage": OptimizerEntry(
        "SAGE-Pure",
        sage.sage,
        state="one momentum and one number per column for everything",
        description="SAGE on everything, matrices too: a control that the paper shows to fail.",
        options=_SAGE,
        int8_momentum=True,
    ),
    "sinkgd": OptimizerEntry(
        "SinkGD-Pure",
        sage.sinkgd,
        state="nothing",
        description="SinkGD on everything, embedding too: a control that the paper shows to fail.",
        options=("scale", *_SINKHORN),
    ),
    "lorapre_adamw": OptimizerEntry(
        "LoRA-Pre Adam",
        lorapre.adamw,
        state="two factor pairs, (2p + 2q) r numbers per p x q matrix; two moments for the rest",
        description="LoRA-Pre Adam on matrices, AdamW on the rest; `scale` (1) is on the matrices.",
        options=(*_LORAPRE_ADAM, "scale"),
        has_rank=True,
    ),
    "lorapre_muon": OptimizerEntry(
        "LoRA-Pre Muon",
        lorapre.muon,
        state="one factor pair, (p + q) r numbers per p x q matrix; two moments for the rest, or two factor "
        "pairs for embedding and head with `table_rank`, V + d numbers with `table_rule=factored_rms`, one "
        "momentum with `sage`",
        description="LoRA-Pre Muon on matrices at update rms `scale` (0.2), AdamW on the rest; with "
        "`table_rank` LoRA-Pre Adam, with `table_rule` Adafactor's or SAGE's rule on embedding and head.",
        options=("b1", "b2", "scale", "option_set", "table_rank", "table_rule", *_FACTORS),
        has_rank=True,
    ),
    "lorapre_sgd": OptimizerEntry(
        "LoRA-Pre SGD",
        lorapre.sgd,
        state="one factor pair, (p + q) r numbers per p x q matrix; one momentum for the rest",
        description="SGD with momentum `b1` (0.9), which is low-rank on matrices.",
        options=("b1", "scale", *_FACTORS),
        has_rank=True,
    ),
    "lorapre_lion": OptimizerEntry(
        "LoRA-Pre Lion",
        lorapre.lion,
        state="one factor pair, (p + q) r numbers per p x q matrix; one momentum for the rest",
        description="Lion with a low-rank momentum on matrices, Lion on the rest.",
        options=("b1", "b2", "scale", *_FACTORS),
        has_rank=True,
    ),
    "lorapre_sinkgd": OptimizerEntry(
        "LoRA-Pre SinkGD",
        lorapre.sinkgd,
        state="two factor pairs, (2p + 2q) r numbers for a p x q embedding or head; two moments for "
        "vectors, nothing for matrices",
        description="LoRA-Pre Adam with the recommended options on embedding and head, SinkGD on "
        "matrices, AdamW on vectors, at one peak rate and `scale` (10).",
        options=(*_LORAPRE_ADAM, "scale", "head_rule", "vector_rule"),
        has_rank=True,
    ),
}
"""The optimizers by name."""
