"""A plan: what each optimizer needs on each device, and which one to take."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.table import Table

from examples.llama.comparing.memory import Planner, PlanRow, recommend
from examples.llama.devices.mesh import parse_mesh
from examples.llama.model.config import PRESETS, LlamaConfig, preset
from examples.llama.model.hf import read_config
from examples.llama.model.llama import parameter_count
from examples.llama.optimizers.rates import default_rank
from examples.llama.optimizers.variants import parse_variants
from examples.llama.reporting.files import jsonable
from examples.llama.reporting.summary import size

GIB = 2**30

OPTIMIZERS = (
    "adamw,lion,adafactor,muon,galore,sinkgd_hybrid,lion_hybrid,sage_hybrid,sage_hybrid_int8,"
    "lorapre_adamw,lorapre_adamw:options=recommended,lorapre_muon,lorapre_lion,lorapre_sinkgd"
)
FINETUNE_OPTIMIZERS = (
    "adamw,lion,adafactor,muon,galore,sage_hybrid,lorapre_adamw,"
    "lorapre_adamw:options=recommended,lorapre_muon,lorapre_lion"
)


@dataclass(frozen=True)
class PlanConfig:
    """Prints what each optimizer needs on each device, and which one to take."""

    preset: Annotated[str | None, tyro.conf.arg(help=f"One of {', '.join(PRESETS)}.")] = None
    """Model shape."""
    hf_config: Path | None = None
    """A Hugging Face config.json, or its folder, instead of a preset."""
    optimizers: str | None = None
    """Optimizers, with options if wanted: adamw,lorapre_adamw:rank=64. By default the main ones."""
    rank: int | None = None
    """Rank where an optimizer names none; by default the preset's published one, else hidden / 4."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of parameters and gradients. Momenta of optax and SAGE follow it, LoRA-Pre's state is float32."""
    mesh: str | None = None
    """Sizes of the mesh's axes, as in fsdp=8 or data=2,fsdp=4,tensor=2; no device need exist."""
    finetune: bool = False
    """Train attention and MLP matrices only; embedding, norms and head are frozen."""
    device_gb: float = 80.0
    """Memory of one device in GiB; a card sold with 80 GB has about that."""
    activation_gb: float = 0.0
    """GiB of a device that activations take, if known: they are not computed here."""
    margin: float = 0.1
    """Share of a device kept free for temporaries, fragmentation and the runtime."""
    prefer: str | None = None
    """Optimizers in order of preference, instead of the demo's perplexities."""
    json: str | None = None
    """File for the plan as JSON; - prints it instead of the table."""


@dataclass(frozen=True)
class Plan:
    """A plan and what it was made for.

    Attributes:
        config: What was asked.
        model: The shape.
        rank: Rank where an optimizer names none.
        rows: One for each optimizer.
        limit: Bytes of a device that parameters, gradients and state may take.
        recommended: Key of the row to take, or None if none fits.
    """

    config: PlanConfig
    model: LlamaConfig
    rank: int
    rows: tuple[PlanRow, ...]
    limit: float
    recommended: str | None

    @property
    def rule(self) -> str:
        """How the recommended row is chosen."""
        order = (
            "the demo's held-out perplexity (3.3M parameters, 400 steps: docs/results/quality.md)"
            if self.config.prefer is None
            else f"your preference ({self.config.prefer})"
        )
        return (
            f"of the rows within {self.limit / GIB:.1f} GiB, the first in order of {order}; "
            "rows of formulas are left out"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in bytes, fit for JSON."""
        rows = [
            {
                **dataclasses.asdict(row),
                "state_bytes": row.state_bytes,
                "bytes": row.bytes,
                "fits": row.bytes <= self.limit,
            }
            for row in self.rows
        ]
        return jsonable(
            {
                "config": self.config,
                "model": self.model,
                "parameter_count": parameter_count(self.model),
                "rank": self.rank,
                "unit": "bytes on each device",
                "not_counted": "activations, temporaries of a step, the runtime",
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

    >>> plan = make_plan(PlanConfig(preset="sage_1.3b", optimizers="adamw,sage_hybrid", device_gb=16))
    >>> plan.recommended
    'sage_hybrid'
    """
    if not (config.device_gb > 0 and config.activation_gb >= 0 and 0 <= config.margin < 1):
        raise ValueError(
            "plan: device_gb must be positive, activation_gb at least 0 and margin in [0, 1), got "
            f"{config.device_gb}, {config.activation_gb} and {config.margin}"
        )
    model = _model(config)
    rank = config.rank
    if rank is None:
        rank = default_rank(config.preset or "", model.hidden_size)
    mesh = None if config.mesh is None else parse_mesh(config.mesh)
    planner = Planner(model, rank=rank, dtype=config.dtype, mesh=mesh, finetune=config.finetune)
    wanted = config.optimizers or (FINETUNE_OPTIMIZERS if config.finetune else OPTIMIZERS)
    rows = []
    for variant in parse_variants(wanted):
        rows.append(planner.row(variant))
        if variant.optimizer == "galore":
            rows.append(planner.galore_paper(rows[-1].rank))
    if config.finetune:
        rows.append(planner.lora())
    limit = GIB * (config.device_gb * (1 - config.margin) - config.activation_gb)
    prefer = None
    if config.prefer is not None:
        prefer = [variant.key for variant in parse_variants(config.prefer)]
    found = recommend(rows, limit, prefer)
    return Plan(config, model, rank, tuple(rows), limit, None if found is None else found.key)


def _model(config: PlanConfig) -> LlamaConfig:
    if (config.preset is None) == (config.hf_config is None):
        raise ValueError("plan: give --preset or --hf-config, one of them")
    if config.hf_config is None:
        return preset(str(config.preset))
    path = config.hf_config
    if path.is_file() and path.name != "config.json":
        raise ValueError(f"plan: {path} must be a config.json, or a folder that holds one")
    return read_config(path.parent if path.is_file() else path)


def plan_table(plan: Plan) -> Table:
    """The plan to read: GiB on each device, the recommended row marked."""
    roles = [role for role in _ROLES if any(row.state.get(role) for row in plan.rows)]
    table = Table(box=box.SIMPLE_HEAD, title=_title(plan), title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    numbers = ["rank", "parameters", "gradients", *(f"state: {_ROLES[role]}" for role in roles)]
    for name in (*numbers, "state", "of AdamW's", "in all", "fits"):
        table.add_column(name, justify="right")
    adamw = next((row.state_bytes for row in plan.rows if row.key == "adamw"), None)
    for row in plan.rows:
        taken = row.key == plan.recommended
        table.add_row(
            ("> " if taken else "  ") + row.label,
            "-" if row.rank is None else str(row.rank),
            *map(_gib, (row.parameters, row.gradients)),
            *(_gib(row.state.get(role, 0)) for role in roles),
            _gib(row.state_bytes),
            "-" if not adamw else _percent(row.state_bytes / adamw),
            _gib(row.bytes),
            "yes" if row.bytes <= plan.limit else "no",
            style="bold" if taken else None,
        )
    return table


_ROLES = {
    "embedding": "embedding",
    "head": "head",
    "matrix": "matrices",
    "vector": "vectors",
    "other": "other",
}
"""Roles of the table's columns; shared step counts are a few bytes and only in the sum."""


def _title(plan: Plan) -> str:
    config = plan.config
    name = config.preset or str(config.hf_config)
    parts = [f"{name}: {parameter_count(plan.model):,} parameters in {config.dtype}"]
    parts += ["attention and MLP matrices trained, the rest frozen"] if config.finetune else []
    parts += [f"mesh {config.mesh}"] if config.mesh else []
    return ", ".join(parts) + ". GiB on each device"


def answer(plan: Plan) -> list[str]:
    """What to take and why, what was not counted, and what to do where nothing fits."""
    config = plan.config
    lines = []
    taken = next((row for row in plan.rows if row.key == plan.recommended), None)
    if taken is not None:
        free = config.device_gb - taken.bytes / GIB
        lines.append(
            f"Recommended: {taken.label}, {taken.bytes / GIB:.2f} of {config.device_gb:g} GiB, "
            f"which leaves {free:.2f}."
        )
    else:
        least = min(plan.rows, key=lambda row: row.bytes)
        lines.append(
            f"Nothing fits {plan.limit / GIB:.1f} GiB; the least is {least.label} with "
            f"{size(least.bytes)}. Try --mesh fsdp=N with more devices"
            + (", or --dtype bfloat16." if config.dtype == "float32" else ".")
        )
    lines.append(f"Rule: {plan.rule}.")
    lines.append(
        "Not counted: activations, temporaries of a step and the runtime. "
        f"{config.activation_gb:g} GiB are set aside for activations (--activation-gb) and "
        f"{config.margin:.0%} of the device for the rest (--margin)."
    )
    if config.finetune:
        lines.append("The order comes from pre-training; fine-tuning may rank otherwise.")
    return lines


def _gib(number: float) -> str:
    """GiB, fine enough to tell small states from none.

    >>> _gib(0), _gib(2**30), _gib(70_000), _gib(4)
    ('-', '1.000', '0.0001', '<0.0001')
    """
    value = number / GIB
    if not number:
        return "-"
    if value < 0.00005:
        return "<0.0001"
    return f"{value:.3f}" if value >= 0.0995 else f"{value:.4f}"


def _percent(share: float) -> str:
    """A share to read.

    >>> _percent(1.0), _percent(0.0996), _percent(0.0004)
    ('100.0%', '10.0%', '0.04%')
    """
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2%}"
