"""Notes on a run's settings for its user: ranks that save nothing, a rule with a better alternative."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import jax

from examples.llama.optimizers.registry import optimizer_entry
from examples.llama.training.settings import Settings
from layout_optax import resolve_layout

TABLES = ("embedding", "head")


def quiet_rank_warning() -> None:
    """Silences the warnings of `lorapre_optax` at each init, since `rank_notes` reports the same."""
    warnings.filterwarnings("ignore", "rank .* saves nothing", UserWarning)


def settings_notes(settings: Settings, params: Any) -> list[str]:
    """All notes on a run's settings; `params` are shapes of the trained parameters."""
    return [*rank_notes(settings, params), *rule_notes(settings)]


def rank_notes(settings: Settings, params: Any) -> list[str]:
    """Reports on how many parameters a rank saves no state, if on any.

    LoRA-Pre keeps (p + q) r numbers in place of the p q of a moment, GaLore (max + 2 min) r in place of 2 p q.

    Args:
        settings: The run's settings.
        params: Shapes of the trained parameters.
    """
    if not optimizer_entry(settings.optimizer).has_rank:
        return []
    options, galore = settings.options, settings.optimizer == "galore"
    # LoRA-Pre SinkGD has factors on embedding and head; its matrices have no state.
    roles = TABLES if settings.optimizer == "lorapre_sinkgd" else ("matrix",)
    notes = [
        _rank_note(options.rank, _sides(params, roles), roles, galore=galore),
        _rank_note(options.table_rank, _sides(params, TABLES), TABLES, galore=False),
    ]
    return [note for note in notes if note is not None]


def rule_notes(settings: Settings) -> list[str]:
    """Recommends the recommended options if LoRA-Pre Adam uses the paper's rule."""
    options = settings.options
    changed = (options.bias_correction, options.bound, options.residual, options.initial_subspace)
    if (
        settings.optimizer != "lorapre_adamw"
        or options.option_set
        or any(x is not None for x in changed)
    ):
        return []
    return [
        "Note: this is LoRA-Pre by the paper's rule. From scratch --options recommended was better at every "
        "rank tried here (docs/lorapre.md); --options paper takes this note away."
    ]


def _sides(params: Any, roles: Sequence[str]) -> list[tuple[int, int]]:
    """The last two axes of every parameter of these roles."""
    layouts = jax.tree.leaves(resolve_layout(None, params))
    return [
        (leaf.shape[-2], leaf.shape[-1])
        for leaf, layout in zip(jax.tree.leaves(params), layouts, strict=True)
        if layout.role in roles
    ]


def _rank_note(
    rank: int | None, shapes: Sequence[tuple[int, int]], roles: Sequence[str], *, galore: bool
) -> str | None:
    if rank is None:
        return None
    useless = [
        (p, q)
        for p, q in shapes
        if (rank * (max(p, q) + 2 * min(p, q)) >= 2 * p * q if galore else rank * (p + q) >= p * q)
    ]
    if not useless:
        return None
    what = "tables" if roles == TABLES else "kinds of matrices"
    full = "GaLore keeps more than AdamW there" if galore else "they keep full moments, as AdamW"
    p, q = min(useless, key=min)
    most = (2 * p * q - 1) // (max(p, q) + 2 * min(p, q)) if galore else (p * q - 1) // (p + q)
    return (
        f"Note: rank {rank} saves nothing on {len(useless)} of {len(shapes)} {what}; {full}. "
        f"On {p} x {q} a rank saves up to {most}."
    )
