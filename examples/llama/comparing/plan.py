"""A plan: the memory of each optimizer on each device, the parts of a batch that fit, and the row to use."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from examples.llama.comparing.activations import ComputeDtype, activations
from examples.llama.comparing.memory import Planner, PlanRow
from examples.llama.comparing.order import recommend
from examples.llama.devices.mesh import RULES, parse_mesh
from examples.llama.model.config import PRESETS, LlamaConfig, preset
from examples.llama.model.hf_config import read_shape
from examples.llama.model.llama import parameter_count
from examples.llama.optimizers.rates import default_rank
from examples.llama.optimizers.variants import parse_variants
from examples.llama.reporting.files import jsonable
from examples.llama.reporting.folders import check_file
from examples.llama.training.protocols import PROTOCOLS, default_protocol

Attention = Literal["scores", "flash"]

GIB = 2**30

OPTIMIZERS = (
    "adamw,lion,adafactor,muon,galore,sinkgd_hybrid,sinkgd_hybrid:options=recommended,lion_hybrid,sage_hybrid,"
    "sage_hybrid_int8,lorapre_adamw,lorapre_adamw:options=recommended,lorapre_muon,"
    "lorapre_muon:rank=4:options=recommended,lorapre_lion,lorapre_sinkgd"
)
FINETUNE_OPTIMIZERS = (
    "adamw,lion,adafactor,muon,galore,sage_hybrid,lorapre_adamw,"
    "lorapre_adamw:options=recommended,lorapre_muon,lorapre_lion"
)

FINETUNE_BATCH, FINETUNE_LENGTH = 128, 512
"""Default rows and tokens of a step of `finetune`."""


@dataclass(frozen=True)
class PlanConfig:
    """Prints the memory that each optimizer needs on each device, and the one to use."""

    preset: Annotated[str | None, tyro.conf.arg(help=f"One of {', '.join(PRESETS)}.")] = None
    """Model shape."""
    hf_config: Path | None = None
    """A Hugging Face config.json, or its folder, instead of a preset; of other models only the sizes."""
    finetune: bool = False
    """Train only attention and MLP matrices; embedding, norms and head are frozen."""
    device_gb: float = 80.0
    """Memory of one device in GiB; a card sold with 80 GB has about that."""
    optimizers: str | None = None
    """Optimizers, with options if wanted: adamw,lorapre_adamw:rank=64. By default the main ones."""
    rank: int | None = None
    """Default rank for optimizers without one; by default the preset's published one, else hidden / 4."""
    batch_size: int | None = None
    """Sequences per step, over all devices; by default the trainer's."""
    seq_len: int | None = None
    """Predicted tokens per sequence; by default the trainer's."""
    accumulate: int | None = None
    """Parts that a batch is computed in; by default the fewest that fit, for each row."""
    remat: bool = False
    """Recompute activations in the backward pass."""
    compute_dtype: ComputeDtype = "float32"
    """Dtype of matrix products and activations."""
    attention: Attention | None = None
    """Whether attention keeps its scores; by default not with --compute-dtype bfloat16, for which NVIDIA GPUs
    have cuDNN's flash attention. A CPU, a TPU and float32 keep them."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of parameters and gradients, for your own trainer; this one keeps float32. Momenta of optax and
    SAGE follow it, LoRA-Pre's state is float32."""
    mesh: str | None = None
    """Sizes of the mesh's axes, as in fsdp=8 or data=2,fsdp=4,tensor=2; no device need exist."""
    activation_gb: float | None = None
    """GiB of activations on a device, instead of the estimate."""
    margin: float = 0.1
    """Share of a device kept free for the optimizer's temporaries, fragmentation and the runtime."""
    prefer: str | None = None
    """Optimizers in order of preference, instead of the order of docs/choosing.md."""
    json: str | None = None
    """File for the plan as JSON; - prints it instead of the table."""


@dataclass(frozen=True)
class Plan:
    """A plan and its inputs.

    Attributes:
        config: The configuration.
        model: The shape.
        model_type: `llama`, or the model type of the file.
        rank: Default rank.
        batch_size: Sequences per step.
        seq_len: Predicted tokens per sequence.
        devices: Parts of the mesh that a batch is split over.
        rows: One for each optimizer.
        limit: Bytes of a device that the plan may use.
        recommended: Key of the row to use, or None if none fits or no order exists.
    """

    config: PlanConfig
    model: LlamaConfig
    model_type: str
    rank: int
    batch_size: int
    seq_len: int
    devices: int
    rows: tuple[PlanRow, ...]
    limit: float
    recommended: str | None

    @property
    def attention(self) -> Attention:
        """Whether attention keeps its scores."""
        return attention(self.config)

    def fits(self, row: PlanRow) -> bool:
        """Whether a row stays within the limit."""
        return row.bytes <= self.limit

    def accumulate(self, row: PlanRow) -> int:
        """The number of parts in which a row computes its batch."""
        return self.batch_size // (self.devices * (row.sequences or 1)) if row.sequences else 1

    @property
    def rule(self) -> str:
        """The rule for the recommended row."""
        config = self.config
        if config.prefer is not None:
            order = f"your preference ({config.prefer})"
        elif config.finetune:
            return "none: exact match of all methods overlaps in our experiment (docs/results/finetuning.md)"
        else:
            order = (
                "docs/choosing.md: held-out perplexity of a model of 6.8M parameters after 16.4M tokens, one "
                "seed, and for what was not run there of 3.3M parameters after 0.8M tokens"
            )
        return f"of the rows within {self.limit / GIB:.1f} GiB the first in the order of {order}"

    def to_dict(self) -> dict[str, Any]:
        """All data in bytes, as JSON."""
        rows = [
            {
                **dataclasses.asdict(row),
                "state_bytes": row.state_bytes,
                "bytes": row.bytes,
                "fits": self.fits(row),
                "accumulate": self.accumulate(row),
            }
            for row in self.rows
        ]
        return jsonable(
            {
                "config": self.config,
                "model": self.model,
                "model_type": self.model_type,
                "parameter_count": parameter_count(self.model),
                "rank": self.rank,
                "batch_size": self.batch_size,
                "seq_len": self.seq_len,
                "unit": "bytes on each device",
                "not_counted": "temporaries of the optimizer, the runtime",
                "limit": self.limit,
                "rows": rows,
                "recommended": self.recommended,
                "rule": self.rule,
            }
        )


def make_plan(config: PlanConfig) -> Plan:
    """Plans every optimizer.

    Raises:
        ValueError: A name, option, size or mesh cannot be used, or preset and file are both given.
        FileNotFoundError: There is no such config.json.

    >>> plan = make_plan(PlanConfig(preset="sage_1.3b", optimizers="adamw,sage_hybrid", device_gb=24))
    >>> plan.recommended
    'sage_hybrid'
    """
    _check(config)
    model, model_type = _model(config)
    rank = config.rank
    if rank is None:
        rank = default_rank(config.preset or "", model.hidden_size)
    mesh = None if config.mesh is None else parse_mesh(config.mesh)
    planner = Planner(model, rank=rank, dtype=config.dtype, mesh=mesh, finetune=config.finetune)
    sizes = {} if mesh is None else mesh
    devices = math.prod(sizes.get(axis, 1) for axis in RULES["batch"])
    protocol = PROTOCOLS[default_protocol(config.preset or "")]
    batch, length = protocol.batch_size, protocol.seq_len
    if config.finetune:
        batch, length = FINETUNE_BATCH, FINETUNE_LENGTH
    batch = batch if config.batch_size is None else config.batch_size
    length = length if config.seq_len is None else config.seq_len
    if batch % devices:
        raise ValueError(
            f"batch_size must be a multiple of the {devices} devices that share it, got {batch}"
        )
    if config.accumulate is not None and batch // devices % config.accumulate:
        raise ValueError(
            f"accumulate must divide the {batch // devices} sequences of a device, got {config.accumulate}"
        )
    limit = GIB * config.device_gb * (1 - config.margin)
    rows = [
        _with_activations(row, config, planner, sizes, batch // devices, length, limit)
        for row in _rows(config, planner)
    ]
    found = None
    if config.prefer is not None:
        found = recommend(rows, limit, [one.key for one in parse_variants(config.prefer)])
    elif not config.finetune:
        found = recommend(rows, limit)
    key = None if found is None else found.key
    return Plan(config, model, model_type, rank, batch, length, devices, tuple(rows), limit, key)


def attention(config: PlanConfig) -> Attention:
    """Whether attention keeps its scores, as given or as the trainer does on a GPU."""
    if config.attention is not None:
        return config.attention
    return "flash" if config.compute_dtype == "bfloat16" else "scores"


def _check(config: PlanConfig) -> None:
    given = config.activation_gb
    if not (config.device_gb > 0 and 0 <= config.margin < 1 and (given is None or given >= 0)):
        raise ValueError(
            "plan: device_gb must be positive, activation_gb at least 0 and margin in [0, 1), got "
            f"{config.device_gb}, {given} and {config.margin}"
        )
    for name in ("batch_size", "seq_len", "accumulate"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config.json not in (None, "-"):
        keys = frozenset({"recommended", "rows"})
        check_file(Path(str(config.json)), {"--hf-config": config.hf_config}, keys, flag="--json")


def _rows(config: PlanConfig, planner: Planner) -> list[PlanRow]:
    wanted = config.optimizers or (FINETUNE_OPTIMIZERS if config.finetune else OPTIMIZERS)
    rows = []
    for variant in parse_variants(wanted):
        rows.append(planner.row(variant))
        if variant.optimizer == "galore":
            rows.append(planner.galore_paper(rows[-1].rank))
    return [*rows, planner.lora()] if config.finetune else rows


def _with_activations(
    row: PlanRow,
    config: PlanConfig,
    planner: Planner,
    mesh: dict[str, int],
    sequences: int,
    length: int,
    limit: float,
) -> PlanRow:
    """The row with the activations of its batch, in the fewest parts that fit or need the least memory."""
    if config.activation_gb is not None:
        return dataclasses.replace(row, activations=round(GIB * config.activation_gb))
    flash = attention(config) == "flash"
    head = planner.head_gradient()

    def in_parts(parts: int) -> PlanRow:
        found = activations(
            planner.model,
            rows=sequences // parts,
            length=length,
            compute_dtype=config.compute_dtype,
            remat=config.remat,
            flash=flash,
            tensor=mesh.get("tensor", 1),
            fsdp=mesh.get("fsdp", 1),
        )
        peak = max(0, found.peak(row.gradients, min(head, row.gradients)))
        if parts > 1:  # the sum of the parts' gradients is float32
            peak += row.gradients // np.dtype(config.dtype).itemsize * 4
        return dataclasses.replace(row, activations=peak, sequences=sequences // parts)

    if config.accumulate is not None:
        return in_parts(config.accumulate)
    choices = [in_parts(parts) for parts in divisors(sequences)]
    fitting = (choice for choice in choices if choice.bytes <= limit)
    return next(fitting, min(choices, key=lambda choice: choice.bytes))


@functools.cache
def divisors(number: int) -> Sequence[int]:
    """The divisors of a number, ascending.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    return tuple(part for part in range(1, number + 1) if number % part == 0)


def _model(config: PlanConfig) -> tuple[LlamaConfig, str]:
    if (config.preset is None) == (config.hf_config is None):
        raise ValueError("plan: give --preset or --hf-config, one of them")
    if config.hf_config is None:
        return preset(str(config.preset)), "llama"
    path = config.hf_config
    if path.is_file() and path.name != "config.json":
        raise ValueError(f"plan: {path} must be a config.json, or a folder that holds one")
    return read_shape(path.parent if path.is_file() else path)
