"""Settings of the example's optimizers, and their keyword arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from layout_optax import resolve_layout

Damper = Literal["both", "ema", "none"]
EpsMode = Literal["absolute", "relative"]
MuDtype = Literal["float32", "bfloat16", "int8"]
HeadRule = Literal["table", "matrix", "adamw"]
VectorRule = Literal["sage", "adamw"]
SinkhornVariant = Literal["unit", "sqrt"]
OptionSet = Literal["paper", "recommended"]
BiasCorrection = Literal["paper", "exact"]
SecondMoment = Literal["low_rank", "full"]
InitialSubspace = Literal["normal", "gradient"]
TableRule = Literal["others", "factored_rms", "sage", "sage_int8"]
FactorDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class RuleOptions:
    """Settings that only some optimizers take, as the command line has them; None: the optimizer's default."""

    b1: float | None = None
    """Weight of the old momentum in the update."""
    b2: float | None = None
    """Decay of the momentum (sign rules) or of the second moment (Adam rules)."""
    eps: float | None = None
    """Added to denominators (SAGE's damper, Adam)."""
    damper: Damper | None = None
    """SAGE's damper: both terms, the averaged one only, or none (which is Lion)."""
    eps_mode: EpsMode | None = None
    """Whether SAGE's eps is absolute or relative to the scale's rms."""
    mu_dtype: MuDtype | None = None
    """Storage of the momentum."""
    head_rule: HeadRule | None = None
    """The rule of a hybrid for an untied head: the embedding's (table), the matrices' or AdamW."""
    vector_rule: VectorRule | None = None
    """The rule of SAGE-Hybrid and LoRA-Pre SinkGD for vectors."""
    scale: float | None = None
    """Factor on the matrices' direction."""
    sinkhorn_iterations: int | None = None
    """Iterations of SinkGD."""
    sinkhorn_variant: SinkhornVariant | None = None
    """Whether SinkGD's norms are 1 or the square roots of the dimensions."""
    rank: int | None = None
    """Rank of low-rank projections and factors."""
    table_rank: int | None = None
    """Rank of LoRA-Pre Adam on embedding and head, in LoRA-Pre Muon."""
    table_rule: TableRule | None = None
    """Rule of LoRA-Pre Muon and SinkGD-Hybrid for embedding and head: AdamW's, Adafactor's (V + d numbers) or,
    in LoRA-Pre Muon, SAGE's."""
    update_gap: int | None = None
    """Steps between two projections of GaLore."""
    # Files and the command line say `options`; here that is the whole of an optimizer's settings.
    option_set: OptionSet | None = dataclasses.field(default=None, metadata={"name": "options"})
    """Values for options that are not given, of LoRA-Pre Adam and Muon and of SinkGD-Hybrid: the paper's or the
    recommended ones."""
    bias_correction: BiasCorrection | None = None
    """Bias correction of LoRA-Pre's second moment."""
    bound: float | None = None
    """Largest entry of LoRA-Pre Adam's direction; inf for none."""
    residual: float | None = None
    """Weight of the gradient outside LoRA-Pre's subspace; 0 for none."""
    second_moment: SecondMoment | None = None
    """Whether LoRA-Pre Adam's second moment is low-rank too."""
    initial_subspace: InitialSubspace | None = None
    """Initial factors of LoRA-Pre: random, or from the first gradient."""
    factor_dtype: FactorDtype | None = None
    """Storage of LoRA-Pre's factors."""
    damping: float | None = None
    """Damping of the inverses in LoRA-Pre's factor step."""


RULE_OPTIONS = tuple(field.name for field in dataclasses.fields(RuleOptions))

OPTION_NAMES = (*RULE_OPTIONS, "role_multipliers")
"""The settings that only some optimizers take."""


@dataclass(frozen=True)
class OptimizerOptions(RuleOptions):
    """All settings of an optimizer."""

    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""
    decay_vectors: bool = True
    """Whether weight decay also applies to vectors (norm scales)."""
    role_multipliers: Mapping[str, float] | None = None
    """Learning rate of a role as a multiple of the common one."""

    def only(self, *names: str, prefix: str = "") -> dict[str, Any]:
        """The named settings that were given, under names with a prefix.

        >>> OptimizerOptions(b1=0.95, eps=1e-6).only("b1", "b2", prefix="adam_")
        {'adam_b1': 0.95}
        """
        return {prefix + name: value for name, value in self.given().items() if name in names}

    def decay_mask(self) -> Callable[[Any], Any] | None:
        """None for decay on everything, else a function from parameters to True at all but vectors."""
        if self.decay_vectors:
            return None
        return lambda params: jax.tree.map(
            lambda layout: layout.role != "vector", resolve_layout(None, params)
        )

    def given(self) -> dict[str, Any]:
        """The optional settings that are not None.

        >>> OptimizerOptions(b1=0.95).given()
        {'b1': 0.95}
        """
        return {
            name: getattr(self, name) for name in OPTION_NAMES if getattr(self, name) is not None
        }


WRITTEN = {
    field.metadata.get("name", field.name): field.name
    for field in dataclasses.fields(OptimizerOptions)
}
"""Each field by its name in files, flags and variants."""
