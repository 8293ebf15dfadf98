"""Model shapes and named presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rescaling of the rotary frequencies (`rope_type: llama3`).

    Wavelengths longer than `original_max_position_embeddings / low_freq_factor` are stretched by
    `factor`, those shorter than `original_max_position_embeddings / high_freq_factor` are kept,
    and those between are interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.original_max_position_embeddings <= 0:
            raise ValueError(
                "rope_scaling: factor and original_max_position_embeddings must be positive, got "
                f"{self.factor} and {self.original_max_position_embeddings}"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope_scaling: need 0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama decoder; frozen and hashable, so it can be a static argument.

    Attributes:
        vocab_size: Number of tokens V.
        hidden_size: Width d of the residual stream.
        intermediate_size: Width of the SwiGLU layer.
        num_layers: Number of blocks.
        num_heads: Query heads per block.
        num_kv_heads: Key and value heads; divides `num_heads` (grouped-query attention).
        head_dim: Width of one head; 0 means `hidden_size // num_heads`.
        tie_embeddings: Whether the head is the transposed embedding.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Llama 3.1's frequency scaling, or None.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        init_std: Standard deviation of every kernel and of the embedding at initialisation.
        max_seq_len: Longest sequence the model accepts.

    Raises:
        ValueError: A size is not positive, or one does not divide another as required.

    >>> LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=80, num_layers=2,
    ...             num_heads=4, num_kv_heads=2).head_dim
    8
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 0
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    init_std: float = 0.02
    max_seq_len: int = 1024

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "rope_theta",
            "rms_norm_eps",
            "init_std",
            "max_seq_len",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if self.head_dim == 0:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) is not a multiple of num_heads "
                    f"({self.num_heads}); give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(
                f"head_dim must be positive and even for rotary embeddings, got {self.head_dim}"
            )


def preset(name: str, **overrides: Any) -> LlamaConfig:
    """Returns a named model shape, with some of its fields replaced.

    `head_dim` follows an overridden `hidden_size` or `num_heads` unless it is given too.

    Args:
        name: A key of `PRESETS`.
        **overrides: Fields of `LlamaConfig`.

    Returns:
        The configuration.

    Raises:
        ValueError: The preset or a field is unknown (the message lists the names), or the result is not a valid
            configuration.

    >>> preset("demo", num_layers=2).num_layers
    2
    >>> preset("demo", hidden_size=96).head_dim
    24
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    fields = [field.name for field in dataclasses.fields(LlamaConfig)]
    unknown = [key for key in overrides if key not in fields]
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r} for preset {name!r}; the fields are {', '.join(fields)}"
        )
    if {"hidden_size", "num_heads"} & set(overrides):
        overrides.setdefault("head_dim", 0)
    return dataclasses.replace(PRESETS[name], **overrides)


PRESETS: dict[str, LlamaConfig] = {
    "demo": LlamaConfig(
        vocab_size=8192,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        tie_embeddings=True,
    ),
    "galore_60m": LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_layers=8,
        num_heads=8,
        num_kv_heads=8,
    ),
    "galore_130m": LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
    ),
    "galore_350m": LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2736,
        num_layers=24,
        num_heads=16,
        num_kv_heads=16,
    ),
    "galore_1b": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5461,
        num_layers=24,
        num_heads=32,
        num_kv_heads=32,
    ),
    "sage_1.3b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=5461,
        num_layers=24,
        num_heads=32,
        num_kv_heads=8,
        tie_embeddings=True,
    ),
    # Reconstructed from the published parameter count; the published shape is unknown.
    "sage_270m": LlamaConfig(
        vocab_size=128256,
        hidden_size=1024,
        intermediate_size=2736,
        num_layers=12,
        num_heads=16,
        num_kv_heads=8,
        tie_embeddings=True,
    ),
    "llama2_7b": LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        rms_norm_eps=1e-5,
        max_seq_len=4096,
    ),
    "llama3.1_8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        rope_theta=500000.0,
        rope_scaling=RopeScaling(
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        rms_norm_eps=1e-5,
        max_seq_len=131072,
    ),
}
