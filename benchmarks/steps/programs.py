"""The trainer's settings for a benchmark, without its command line; it needs only JAX, optax and Flax."""

from __future__ import annotations

from benchmarks.steps.updates import variant_options
from examples.llama.model.config import preset
from examples.llama.optimizers.rates import default_rank
from examples.llama.optimizers.registry import optimizer_entry
from examples.llama.optimizers.variants import parse_variant
from examples.llama.training.protocols import PROTOCOLS, default_protocol
from examples.llama.training.settings import Settings, check_settings


def trainer_settings(
    preset_name: str,
    key: str,
    *,
    compute_dtype: str = "float32",
    learning_rate: float = 1e-5,
    steps: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
) -> Settings:
    """The settings that the trainer would choose, without its command line.

    Args:
        preset_name: The model's shape; its family's protocol gives the defaults.
        key: The optimizer, with options (`examples.llama.optimizers.variants`).
        compute_dtype: Dtype of the matrix products.
        learning_rate: Peak learning rate.
        steps: Optimizer steps.
        batch_size: Sequences per step.
        seq_len: Predicted tokens per sequence.

    Raises:
        ValueError: A name is unknown or a number out of range.

    >>> settings = trainer_settings("demo", "lorapre_adamw:options=recommended", steps=50)
    >>> settings.options.rank, settings.warmup_steps, settings.clip_norm
    (48, 5, 1.0)
    """
    model, protocol = preset(preset_name), PROTOCOLS[default_protocol(preset_name)]
    variant = parse_variant(key)
    entry = optimizer_entry(variant.optimizer)
    rank = (
        variant.options.get("rank", default_rank(preset_name, model.hidden_size))
        if entry.has_rank
        else None
    )
    steps = protocol.steps if steps is None else steps
    settings = Settings(
        model=model,
        optimizer=variant.optimizer,
        options=variant_options(variant, rank, protocol.weight_decay),
        learning_rate=learning_rate,
        rate_source="given",
        steps=steps,
        warmup_steps=round(protocol.warmup_fraction * steps),
        final_rate_fraction=protocol.final_rate_fraction,
        batch_size=protocol.batch_size if batch_size is None else batch_size,
        seq_len=protocol.seq_len if seq_len is None else seq_len,
        accumulate=1,
        clip_norm=protocol.clip_norm or None,
        compute_dtype=compute_dtype,
        scan_layers=not entry.needs_unscanned,
        remat=False,
        loss_chunk=None,
        seed=0,
        eval_every=max(1, steps // 10),
        eval_batches=16,
        log_every=1,
        statistics_every=0,
    )
    check_settings(settings)
    return settings
