"""The model shapes of the token benchmarks, and the settings of a run on one of them."""

from __future__ import annotations

import dataclasses

from benchmarks.steps.programs import trainer_settings
from examples.llama.model.config import PRESETS, LlamaConfig, preset
from examples.llama.training.settings import Settings, check_settings

SHAPES: dict[str, LlamaConfig] = {
    # One core trains a million tokens of it in a minute or two.
    "core": preset(
        "demo",
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=172,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
    ),
    # Two cores.
    "small": preset(
        "demo",
        vocab_size=8192,
        hidden_size=128,
        intermediate_size=344,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
    ),
    # An accelerator: the shape of the published runs of 16.4 million tokens.
    "wide": preset(
        "demo",
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_layers=6,
        num_heads=4,
        num_kv_heads=4,
    ),
}
SHAPES["wide_untied"] = dataclasses.replace(SHAPES["wide"], tie_embeddings=False)
SHAPES["core_untied"] = dataclasses.replace(SHAPES["core"], tie_embeddings=False)


def shape(name: str) -> LlamaConfig:
    """A shape of `SHAPES`, or a preset of the trainer.

    Raises:
        ValueError: The name is neither; the message lists both.

    >>> shape("wide").hidden_size, shape("galore_60m").vocab_size
    (256, 32000)
    """
    if name in SHAPES:
        return SHAPES[name]
    if name in PRESETS:
        return PRESETS[name]
    raise ValueError(f"unknown shape {name!r}; use one of {', '.join([*SHAPES, *PRESETS])}")


def token_settings(
    name: str,
    key: str,
    *,
    tokens: int,
    batch_size: int,
    seq_len: int,
    dtype: str = "float32",
    accumulate: int = 1,
    final_rate_fraction: float | None = None,
) -> Settings:
    """The settings of a run over a number of tokens, rounded down to whole steps.

    Clipping, decay and warm-up are those of the demo's protocol for a shape, of its own for a preset.

    Args:
        name: The shape.
        key: The optimizer, with options.
        tokens: The budget.
        batch_size: Sequences of a step.
        seq_len: Predicted tokens of a sequence.
        dtype: Dtype of the matrix products.
        accumulate: Parts of a batch.
        final_rate_fraction: Rate at the end as a share of the peak; None for the protocol's.

    Raises:
        ValueError: The budget is less than a step, a name is unknown, or a number out of range.

    >>> token_settings("wide", "adamw", tokens=16_384_000, batch_size=32, seq_len=512).steps
    1000
    """
    steps = tokens // (batch_size * seq_len)
    if steps < 1:
        raise ValueError(
            f"a budget of {tokens} tokens is less than a step of {batch_size} x {seq_len}"
        )
    base = trainer_settings(
        name if name in PRESETS else "demo",
        key,
        compute_dtype=dtype,
        steps=steps,
        batch_size=batch_size,
        seq_len=min(seq_len, shape(name).max_seq_len),
    )
    settings = dataclasses.replace(
        base,
        model=dataclasses.replace(shape(name), max_seq_len=max(seq_len, shape(name).max_seq_len)),
        seq_len=seq_len,
        accumulate=accumulate,
        final_rate_fraction=base.final_rate_fraction
        if final_rate_fraction is None
        else final_rate_fraction,
    )
    check_settings(settings)
    return settings
