"""The settings of a training run, and the checks that they fit together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from examples.llama.data.checks import check_batch
from examples.llama.devices.mesh import MeshMode
from examples.llama.model.config import LlamaConfig, RopeScaling
from examples.llama.optimizers.options import WRITTEN, OptimizerOptions
from examples.llama.optimizers.registry import make_optimizer


@dataclass(frozen=True)
class Settings:
    """All settings of a run, derived from `TrainConfig` and the tables.

    Attributes:
        model: The model's shape.
        optimizer: Name of the optimizer.
        options: The optimizer's settings.
        learning_rate: Peak learning rate.
        rate_source: The source of that learning rate.
        steps: Optimizer steps.
        warmup_steps: Steps of the warm-up, of these.
        final_rate_fraction: Learning rate at the end, as a share of the peak.
        batch_size: Sequences per step.
        seq_len: Predicted tokens per sequence.
        accumulate: Parts of a batch.
        clip_norm: Global gradient norm to clip to, or None.
        compute_dtype: Dtype of the matrix products.
        scan_layers: Whether layers are stacked.
        remat: Whether activations are recomputed.
        mesh: Sizes of the mesh's axes as requested, or None for one device.
        mesh_mode: Auto or Explicit axes, or None without a mesh.
        mesh_strict: Whether the mesh must divide the model, or None without a mesh.
        loss_chunk: Tokens whose logits exist at once, or None for automatic.
        seed: Seed of parameters and data order.
        eval_every: Steps between evaluations.
        eval_batches: Batches of an evaluation.
        log_every: Steps between log lines.
        statistics_every: Steps between statistics, 0 for none.
    """

    model: LlamaConfig
    optimizer: str
    options: OptimizerOptions
    learning_rate: float
    rate_source: str
    steps: int
    warmup_steps: int
    final_rate_fraction: float
    batch_size: int
    seq_len: int
    accumulate: int
    clip_norm: float | None
    compute_dtype: str
    scan_layers: bool
    remat: bool
    loss_chunk: int | None
    seed: int
    eval_every: int
    eval_batches: int
    log_every: int
    statistics_every: int
    mesh: str | None = None
    mesh_mode: MeshMode | None = None
    mesh_strict: bool | None = None

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens per optimizer step."""
        return self.batch_size * self.seq_len

    def optimizer_from(self, schedule: Any) -> Any:
        """The optimizer with a learning-rate schedule."""
        return make_optimizer(self.optimizer, schedule, self.options)


def check_settings(settings: Settings) -> None:
    """Raises ValueError for values that the parts would refuse later or less clearly."""
    for name in ("steps", "batch_size", "seq_len", "eval_every", "eval_batches", "log_every"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(settings, name)}")
    check_finite(settings)
    if not settings.learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {settings.learning_rate}")
    if settings.clip_norm is not None and settings.clip_norm < 0:
        raise ValueError(f"clip_norm must not be negative, got {settings.clip_norm}")
    if not 0 <= settings.final_rate_fraction <= 1:
        raise ValueError(
            f"final_rate_fraction must be between 0 and 1, got {settings.final_rate_fraction}"
        )
    if settings.statistics_every < 0 or settings.statistics_every % settings.log_every:
        raise ValueError(
            f"statistics_every ({settings.statistics_every}) must be 0 or a multiple of log_every "
            f"({settings.log_every})"
        )
    if settings.loss_chunk is not None and settings.loss_chunk < 1:
        raise ValueError(f"loss_chunk must be at least 1, got {settings.loss_chunk}")
    if settings.seq_len > settings.model.max_seq_len:
        raise ValueError(
            f"seq_len {settings.seq_len} is more than the model's max_seq_len "
            f"({settings.model.max_seq_len})"
        )
    if settings.model.tie_embeddings:
        if "head" in (settings.options.role_multipliers or {}):
            raise ValueError(
                "role head: this model has none, its embedding is tied; name embedding"
            )
        if settings.options.head_rule is not None:
            raise ValueError("head_rule is for a head of its own; this model's embedding is tied")
    check_batch(settings.batch_size, accumulate=settings.accumulate)
    make_optimizer(settings.optimizer, settings.learning_rate, settings.options)


def check_finite(settings: Settings) -> None:
    """Raises ValueError for a number that is not finite; only `bound` may be infinite."""
    numbers = {
        "learning_rate": settings.learning_rate,
        "clip_norm": settings.clip_norm,
        "final_rate_fraction": settings.final_rate_fraction,
        "weight_decay": settings.options.weight_decay,
        **settings.options.given(),
        **{
            f"the rate of {role}": x
            for role, x in (settings.options.role_multipliers or {}).items()
        },
    }
    for name, value in numbers.items():
        if isinstance(value, float) and not math.isfinite(value):
            if name == "bound" and value == math.inf:
                continue
            raise ValueError(f"{name} must be a finite number, got {value}")
    for name in ("weight_decay", "eps"):
        value = numbers.get(name)
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    # A negative scale would increase the loss, and a bound or scale of zero would train nothing.
    for name in ("scale", "bound"):
        value = numbers.get(name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name in ("rank", "table_rank", "update_gap", "sinkhorn_iterations"):
        value = numbers.get(name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def settings_from_json(fields: dict[str, Any]) -> Settings:
    """Reads the recorded settings of a run.

    Raises:
        ValueError: Another version of this program wrote them.

    >>> from examples.llama.reporting.files import jsonable
    >>> from examples.llama.training.config import TrainConfig, resolve
    >>> config = TrainConfig(optimizer="lorapre_adamw", learning_rate=1e-3, bound=float("inf"))
    >>> settings = resolve(config)
    >>> settings_from_json(jsonable(settings)) == settings
    True
    """
    try:
        model = dict(fields["model"])
        if model["rope_scaling"] is not None:
            model["rope_scaling"] = RopeScaling(**model["rope_scaling"])
        options: dict[str, Any] = {
            WRITTEN[name]: float(value) if value in ("Infinity", "-Infinity", "NaN") else value
            for name, value in fields["options"].items()
        }
        parts = {"model": LlamaConfig(**model), "options": OptimizerOptions(**options)}
        return Settings(**{**fields, **parts})
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"the run's settings are of another version of this program ({error})"
        ) from error
