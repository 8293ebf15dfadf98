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
FactorDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class OptimizerOptions:
    """Settings of an optimizer; None means the optimizer's own default.

    Attributes:
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        decay_vectors: Whether weight decay also applies to vectors (norm scales).
        b1: Weight of the old momentum in the update's direction.
        b2: Decay of the momentum (sign rules) or of the second moment (Adam rules).
        eps: Added to the denominators of the rule for embedding, head and vectors.
        damper: SAGE's damper: both terms, the averaged one alone, or none (Lion).
        eps_mode: Whether SAGE's eps is absolute or relative to the rms of the scale.
        mu_dtype: Storage of SAGE's momentum.
        head_rule: The rule of a hybrid for an untied head: the embedding's (`table`), the matrices', or AdamW.
        vector_rule: The rule of SAGE-Hybrid and LoRA-Pre SinkGD for vectors.
        scale: Factor on the matrices' direction, before weight decay.
        sinkhorn_iterations: Iterations of SinkGD.
        sinkhorn_variant: Whether SinkGD's norms are 1 or the square roots of the dimensions.
        rank: Rank of low-rank projections and factors.
        table_rank: Rank of LoRA-Pre Adam on embedding and head; by default their moments are full.
        update_gap: Steps between two projections of GaLore.
        options: LoRA-Pre Adam's values for options that are not given: the paper's rule, or the
            recommendation of `lorapre_optax`.
        bias_correction: Correction of LoRA-Pre's second moment: the paper's or the exact one.
        bound: Largest entry of LoRA-Pre's direction; infinite for none, also where `options` has one.
        residual: Weight of the gradient outside LoRA-Pre's subspace; 0 for none, likewise.
        second_moment: Whether LoRA-Pre Adam's second moment is low-rank too.
        initial_subspace: Whether LoRA-Pre's factors start at random or from the first gradient.
        factor_dtype: Storage of LoRA-Pre's factors.
        damping: Damping of the inverses in LoRA-Pre's factor step.
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
    head_rule: HeadRule | None = None
    vector_rule: VectorRule | None = None
    scale: float | None = None
    sinkhorn_iterations: int | None = None
    sinkhorn_variant: SinkhornVariant | None = None
    rank: int | None = None
    table_rank: int | None = None
    update_gap: int | None = None
    options: OptionSet | None = None
    bias_correction: BiasCorrection | None = None
    bound: float | None = None
    residual: float | None = None
    second_moment: SecondMoment | None = None
    initial_subspace: InitialSubspace | None = None
    factor_dtype: FactorDtype | None = None
    damping: float | None = None
    role_multipliers: Mapping[str, float] | None = None

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


OPTION_NAMES = tuple(
    field.name for field in dataclasses.fields(OptimizerOptions) if field.default is None
)
"""The settings that only some optimizers take."""
