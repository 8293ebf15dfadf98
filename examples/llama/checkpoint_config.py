"""What a run can be asked for about its checkpoints, and about steps that fail."""

from __future__ import annotations

from dataclasses import dataclass

MIGRATIONS = {
    "layers": ("scan_layers",),
    "rank": ("options.rank", "options.table_rank"),
    "schedule": ("steps", "warmup_steps", "final_rate_fraction", "learning_rate"),
}
"""What a resumed run may change when asked to, by the names of the settings."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved and how often, how a run goes on from it, and when it gives up."""

    checkpoint_every: int | None = None
    """Steps between checkpoints, written to the folder `checkpoints` under `out` while training goes on; by
    default those between evaluations, 0 for none."""
    keep_last: int = 2
    """Checkpoints to keep, the newest ones."""
    keep_best: int = 1
    """Checkpoints to keep beside them: those of least held-out loss, among steps that were evaluated."""
    resume: bool = False
    """Go on from the newest whole checkpoint in `out`; begin if there is none."""
    migrate: str | None = None
    """Changes that the resumed run may have, separated by commas: layers (stacked or not), rank (of LoRA-Pre's
    factors), schedule (steps, warm-up, final rate, peak rate)."""
    max_skipped: int = 5
    """Stop after so many steps in a row whose loss or gradient is not finite."""


def parse_migrations(text: str | None) -> tuple[str, ...]:
    """Reads names of migrations separated by commas.

    Raises:
        ValueError: A name is unknown.

    >>> parse_migrations("rank, layers")
    ('rank', 'layers')
    """
    names = tuple(filter(None, (part.strip() for part in (text or "").split(","))))
    for name in names:
        if name not in MIGRATIONS:
            raise ValueError(f"unknown migration {name!r}; use {', '.join(MIGRATIONS)}")
    return names


def check(config: CheckpointConfig) -> None:
    """Raises ValueError for options that are out of range or do not go together."""
    if config.checkpoint_every is not None and config.checkpoint_every < 0:
        raise ValueError(f"checkpoint_every must not be negative, got {config.checkpoint_every}")
    if config.keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {config.keep_last}")
    if config.keep_best < 0:
        raise ValueError(f"keep_best must not be negative, got {config.keep_best}")
    if config.max_skipped < 1:
        raise ValueError(f"max_skipped must be at least 1, got {config.max_skipped}")
    if parse_migrations(config.migrate) and not config.resume:
        raise ValueError("migrate is for a run that is resumed; add --resume")
