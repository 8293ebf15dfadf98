"""The optimizers of the example by name: what each is, stores and accepts.

One peak learning rate drives an optimizer, also where its parts are different rules: the unit SinkGD of
the hybrids carries its own `scale` (10), so that a rate that suits a sign or Adam rule on the tables
suits the matrices too. Where that is not enough, `role_multipliers` gives a role another rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from optax import contrib

import sage_optax
from layout_optax import ParamLayout, resolve_layout

Damper = Literal["both", "ema", "none"]
EpsMode = Literal["absolute", "relative"]
MuDtype = Literal["float32", "bfloat16", "int8"]
Factory = Callable[[optax.ScalarOrSchedule, "OptimizerOptions"], optax.GradientTransformation]


@dataclass(frozen=True)
class OptimizerOptions:
    """Settings of an optimizer; None means the optimizer's own default.

    Attributes:
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        decay_vectors: Whether weight decay also applies to vectors (norm scales).
        b1: Weight of the old momentum in the update's direction.
        b2: Decay of the momentum (sign rules) or of the second moment (Adam rules).
        eps: Added to the denominators of the tables' and vectors' rule.
        damper: SAGE's damper: both terms, the averaged one alone, or none (Lion).
        eps_mode: Whether SAGE's eps is absolute or relative to the rms of the scale.
        mu_dtype: Storage of SAGE's momentum.
        scale: Factor on the matrices' direction, before weight decay.
        rank: Rank of low-rank projections.
        update_gap: Steps between two projections of GaLore.
        role_multipliers: Learning rate of a role as a multiple of the common one.
    """

    weight_decay: float = 0.0
    decay_vectors: bool = True
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    damper: Damper | None = None
    eps_mode: EpsMode | None = None
    mu_dtype: MuDtype | None = None
    scale: float | None = None
    rank: int | None = None
    update_gap: int | None = None
    role_multipliers: Mapping[str, float] | None = None

    def given(self) -> dict[str, Any]:
        """The optional settings that are not None.

        >>> OptimizerOptions(b1=0.95).given()
        {'b1': 0.95}
        """
        return {
            name: getattr(self, name) for name in OPTION_NAMES if getattr(self, name) is not None
        }


OPTION_NAMES = tuple(
    field.name for field in dataclasses.fields(OptimizerOptions) if field.default is None
)
"""The settings that only some optimizers take."""


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer of the registry.

    Attributes:
        label: Its name in tables and plots.
        factory: Makes the transformation from a learning rate and options.
        state: What it stores for each parameter.
        description: What it is, in a line.
        options: The names of `OPTION_NAMES` it takes.
        needs_unscanned: Whether it can only do without stacked layers.
        has_rank: Whether it needs a rank; the preset gives one by default.
    """

    label: str
    factory: Factory
    state: str
    description: str
    options: tuple[str, ...] = ()
    needs_unscanned: bool = False
    has_rank: bool = False


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    options: OptimizerOptions | None = None,
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
    ValueError: adamw takes no damper; its options are b1, b2, eps, mu_dtype.
    """
    entry = optimizer_entry(name)
    options = dataclasses.replace(options or OptimizerOptions(), **overrides)
    for option in options.given():
        if option not in entry.options:
            known = (
                f"its options are {', '.join(entry.options)}" if entry.options else "it has none"
            )
            raise ValueError(f"{name} takes no {option}; {known}.")
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


def damper_arguments(options: OptimizerOptions) -> dict[str, Any]:
    """The settings that `sage_optax.sage_damper` needs to know, as keyword arguments.

    >>> damper_arguments(OptimizerOptions(b1=0.8, b2=0.95))
    {'b2': 0.95}
    """
    return _only(options, "b2", "eps", "damper", "eps_mode")


def _adamw(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate,
        **_only(options, "b1", "b2", "eps", "mu_dtype"),
        weight_decay=options.weight_decay,
        mask=_decay_mask(options),
    )


def _lion(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    return optax.lion(
        learning_rate,
        **_only(options, "b1", "b2", "mu_dtype"),
        weight_decay=options.weight_decay,
        mask=_decay_mask(options),
    )


def _adafactor(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    # optax.adafactor's decay is not multiplied by the learning rate, so its parts are put together
    # here in another order; without decay the two are the same.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.scale_by_param_block_rms(),
        optax.add_decayed_weights(options.weight_decay, _decay_mask(options)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _muon(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    adam = {f"adam_{name}": value for name, value in _only(options, "b1", "b2").items()}
    return contrib.muon(
        learning_rate,
        weight_decay=options.weight_decay,
        adam_weight_decay=options.weight_decay,
        # The update's rms is then 0.2 in every matrix, near AdamW's, so that one rate suits both parts.
        consistent_rms=0.2 if options.scale is None else options.scale,
        muon_weight_dimension_numbers=muon_dimension_numbers,
        **adam,
    )


def muon_dimension_numbers(params: Any) -> Any:
    """Muon's view of each matrix (batch axes implied), None at tables and vectors.

    >>> import jax.numpy as jnp
    >>> numbers = muon_dimension_numbers({"layers": {"up": {"kernel": jnp.ones((2, 4, 8))}}})
    >>> numbers["layers"]["up"]["kernel"]
    MuonDimensionNumbers(reduction_axis=(1,), output_axis=(2,))
    """

    def numbers(layout: ParamLayout) -> contrib.MuonDimensionNumbers | None:
        if layout.role != "matrix":
            return None
        return contrib.MuonDimensionNumbers(layout.column_axes, layout.row_axes)

    return jax.tree.map(numbers, resolve_layout(None, params))


def _galore(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    # Inside a partition, since optax's GaLore would project tables too and give what it does not
    # project placeholders of size zero, which no checkpoint can hold.
    matrices = contrib.galore(
        learning_rate,
        rank=options.rank or 0,
        update_proj_gap=200 if options.update_gap is None else options.update_gap,
        scale=0.25 if options.scale is None else options.scale,
        base_optimizer=optax.scale_by_adam(**_only(options, "b1", "b2", "eps")),
        weight_decay=options.weight_decay,
    )
    others = _adamw(learning_rate, options)
    return optax.partition({"matrix": matrices, "other": others}, _matrix_or_other)


def _sage(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    return sage_optax.sage(learning_rate, **_sage_options(options), **_decay(options))


def _sinkgd(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    return sage_optax.sinkgd(learning_rate, **_only(options, "scale"), **_decay(options))


def _sage_hybrid(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    return sage_optax.sage_hybrid(
        learning_rate, **_sage_options(options), **_hybrid_options(options)
    )


def _sage_hybrid_int8(
    learning_rate: Any, options: OptimizerOptions
) -> optax.GradientTransformation:
    return _sage_hybrid(learning_rate, dataclasses.replace(options, mu_dtype="int8"))


def _sinkgd_hybrid(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    return sage_optax.sinkgd_hybrid(
        learning_rate, **_only(options, "b1", "b2", "eps", "mu_dtype"), **_hybrid_options(options)
    )


def _lion_hybrid(learning_rate: Any, options: OptimizerOptions) -> optax.GradientTransformation:
    return sage_optax.lion_hybrid(
        learning_rate, **_only(options, "b1", "b2", "mu_dtype"), **_hybrid_options(options)
    )


def _sage_options(options: OptimizerOptions) -> dict[str, Any]:
    given = _only(options, "b1", "b2", "eps", "damper", "eps_mode", "mu_dtype")
    if given.get("damper") == "none":
        given["damper"] = None
    return given


def _hybrid_options(options: OptimizerOptions) -> dict[str, Any]:
    multipliers = options.role_multipliers
    given = {} if multipliers is None else {"learning_rate_multipliers": dict(multipliers)}
    return {**_only(options, "scale"), **given, **_decay(options)}


def _decay(options: OptimizerOptions) -> dict[str, Any]:
    return {"weight_decay": options.weight_decay, "weight_decay_mask": _decay_mask(options)}


def _decay_mask(options: OptimizerOptions) -> Callable[[Any], Any] | None:
    """None for everything, else a function from parameters to True at all that are no vectors."""
    if options.decay_vectors:
        return None
    return lambda params: jax.tree.map(
        lambda layout: layout.role != "vector", resolve_layout(None, params)
    )


def _matrix_or_other(params: Any) -> Any:
    return jax.tree.map(
        lambda layout: "matrix" if layout.role == "matrix" else "other",
        resolve_layout(None, params),
    )


def _only(options: OptimizerOptions, *names: str) -> dict[str, Any]:
    """Those of the named settings that were given."""
    return {name: value for name, value in options.given().items() if name in names}


_ADAM = ("b1", "b2", "eps", "mu_dtype")
_SAGE = ("b1", "b2", "eps", "damper", "eps_mode", "mu_dtype")
_HYBRID = ("scale", "role_multipliers")

OPTIMIZERS: dict[str, OptimizerEntry] = {
    "adamw": OptimizerEntry(
        "AdamW",
        _adamw,
        state="two moments of the parameter's shape",
        description="optax.adamw on everything: what the others are measured against.",
        options=_ADAM,
    ),
    "lion": OptimizerEntry(
        "Lion",
        _lion,
        state="one momentum of the parameter's shape",
        description="optax.lion on everything.",
        options=("b1", "b2", "mu_dtype"),
    ),
    "adafactor": OptimizerEntry(
        "Adafactor",
        _adafactor,
        state="row and column sums of squares; the full second moment of small parameters",
        description="optax.adafactor's parts with decay times the learning rate; steps are relative to "
        "a parameter's rms (of a whole stack, where layers are stacked).",
    ),
    "muon": OptimizerEntry(
        "Muon",
        _muon,
        state="one momentum for matrices, two moments for the rest",
        description="optax.contrib.muon on matrices, layer by layer, at update rms `scale` (0.2), with "
        "its AdamW on the rest.",
        options=("b1", "b2", "scale"),
    ),
    "galore": OptimizerEntry(
        "GaLore",
        _galore,
        state="a projection and two moments of rank r for matrices, two moments for the rest",
        description="optax.contrib.galore on matrices, AdamW on the rest; needs unstacked layers.",
        options=("b1", "b2", "eps", "scale", "rank", "update_gap"),
        needs_unscanned=True,
        has_rank=True,
    ),
    "sage_hybrid": OptimizerEntry(
        "SAGE-Hybrid",
        _sage_hybrid,
        state="one momentum and one number a column for tables and vectors, nothing for matrices",
        description="SAGE on tables and vectors, SinkGD on matrices: the paper's method.",
        options=_SAGE + _HYBRID,
    ),
    "sage_hybrid_int8": OptimizerEntry(
        "SAGE-Hybrid int8",
        _sage_hybrid_int8,
        state="an int8 momentum, one number a row and one a column for tables and vectors",
        description="SAGE-Hybrid with its momentum in int8.",
        options=("b1", "b2", "eps", "damper", "eps_mode", *_HYBRID),
    ),
    "sinkgd_hybrid": OptimizerEntry(
        "SinkGD-Hybrid",
        _sinkgd_hybrid,
        state="two moments for tables and vectors, nothing for matrices",
        description="AdamW on tables and vectors, SinkGD on matrices, at one peak rate and `scale` (10).",
        options=_ADAM + _HYBRID,
    ),
    "lion_hybrid": OptimizerEntry(
        "Lion-Hybrid",
        _lion_hybrid,
        state="one momentum for tables and vectors, nothing for matrices",
        description="Lion on tables and vectors, SinkGD on matrices: the control without damper.",
        options=("b1", "b2", "mu_dtype", *_HYBRID),
    ),
    "sage": OptimizerEntry(
        "SAGE-Pure",
        _sage,
        state="one momentum and one number a column for everything",
        description="SAGE on everything, matrices too: a control that the paper shows to fail.",
        options=_SAGE,
    ),
    "sinkgd": OptimizerEntry(
        "SinkGD-Pure",
        _sinkgd,
        state="nothing",
        description="SinkGD on everything, tables too: a control that the paper shows to fail.",
        options=("scale",),
    ),
}
"""The optimizers by name."""
