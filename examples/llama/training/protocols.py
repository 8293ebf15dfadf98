"""Training protocols of published tables: tokens, steps, clipping, decay, schedule."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protocol:
    """Training settings of a published table.

    Attributes:
        seq_len: Tokens per sequence.
        batch_size: Sequences per step.
        steps: Optimizer steps.
        clip_norm: Global gradient norm to clip to, or None.
        weight_decay: Decoupled weight decay.
        warmup_fraction: Share of the steps for the linear warm-up from zero.
        final_rate_fraction: Learning rate at the end of the cosine, as a share of the peak.
    """

    seq_len: int
    batch_size: int
    steps: int
    clip_norm: float | None
    weight_decay: float
    warmup_fraction: float
    final_rate_fraction: float

    @property
    def tokens_per_step(self) -> int:
        """Training tokens per optimizer step.

        >>> PROTOCOLS["galore"].tokens_per_step
        131072
        """
        return self.seq_len * self.batch_size

    @property
    def warmup_steps(self) -> int:
        """Steps of the linear warm-up.

        >>> PROTOCOLS["sage"].warmup_steps
        5000
        """
        return round(self.warmup_fraction * self.steps)


PROTOCOLS: dict[str, Protocol] = {
    # The 60M model's number of steps; 130M took 20k, 350M 60k and 1B 100k.
    "galore": Protocol(
        seq_len=256,
        batch_size=512,
        steps=10_000,
        clip_norm=None,
        weight_decay=0.0,
        warmup_fraction=0.1,
        final_rate_fraction=0.1,
    ),
    "sage": Protocol(
        seq_len=512,
        batch_size=256,
        steps=50_000,
        clip_norm=1.0,
        weight_decay=0.01,
        warmup_fraction=0.1,
        final_rate_fraction=0.0,
    ),
    # 2048 tokens per step, few enough for two CPU cores.
    "demo": Protocol(
        seq_len=128,
        batch_size=16,
        steps=400,
        clip_norm=1.0,
        weight_decay=0.01,
        warmup_fraction=0.1,
        final_rate_fraction=0.0,
    ),
}


def default_protocol(preset_name: str) -> str:
    """The protocol of a preset's family; `demo` for presets without one.

    >>> default_protocol("sage_1.3b"), default_protocol("llama2_7b")
    ('sage', 'demo')
    """
    family = preset_name.partition("_")[0]
    return family if family in PROTOCOLS else "demo"
