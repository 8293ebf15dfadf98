"""What whoever starts a run should know about its settings: a rank that saves nothing."""

from __future__ import annotations

from typing import Any

import jax

from examples.llama.optimizers.registry import optimizer_entry
from examples.llama.training.settings import Settings
from layout_optax import resolve_layout


def rank_note(settings: Settings, params: Any) -> str | None:
    """Says on how many parameters the rank saves no state, if on any.

    LoRA-Pre keeps (p + q) r numbers in place of the p q of a moment, GaLore (max + 2 min) r in place of 2 p q.

    Args:
        settings: The run's settings.
        params: Shapes of the trained parameters.
    """
    rank = settings.options.rank
    if rank is None or not optimizer_entry(settings.optimizer).has_rank:
        return None
    # LoRA-Pre SinkGD has its factors on the tables; its matrices have no state.
    tables = settings.optimizer == "lorapre_sinkgd"
    roles = ("embedding", "head") if tables else ("matrix",)
    shapes = [
        (leaf.shape[-2], leaf.shape[-1])
        for leaf, layout in zip(
            jax.tree.leaves(params), jax.tree.leaves(resolve_layout(None, params)), strict=True
        )
        if layout.role in roles
    ]
    galore = settings.optimizer == "galore"
    useless = [
        (p, q)
        for p, q in shapes
        if (rank * (max(p, q) + 2 * min(p, q)) >= 2 * p * q if galore else rank * (p + q) >= p * q)
    ]
    if not useless:
        return None
    what = "tables" if tables else "kinds of matrices"
    full = "GaLore keeps more than AdamW there" if galore else "they keep full moments, as AdamW"
    p, q = min(useless, key=min)
    most = (2 * p * q - 1) // (max(p, q) + 2 * min(p, q)) if galore else (p * q - 1) // (p + q)
    return (
        f"Note: rank {rank} saves nothing on {len(useless)} of {len(shapes)} {what}; {full}. "
        f"On {p} x {q} a rank saves up to {most}."
    )
