"""The options of a training run, and the values that the protocol and the preset fill in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from examples.llama.data.dataset import DataConfig
from examples.llama.devices.mesh import MeshMode, parse_mesh
from examples.llama.devices.processes import ClusterConfig, DeviceConfig
from examples.llama.model.config import PRESETS, LlamaConfig, preset
from examples.llama.optimizers.options import RULE_OPTIONS, OptimizerOptions, RuleOptions
from examples.llama.optimizers.rates import default_rank, parse_rates, tuned_rate
from examples.llama.optimizers.registry import OPTIMIZERS, optimizer_entry
from examples.llama.reporting.wandb_run import WandbMode
from examples.llama.training.migrations import parse_migrations
from examples.llama.training.protocols import PROTOCOLS, default_protocol
from examples.llama.training.settings import Settings, check_settings
from layout_optax.layout import ROLES


@dataclass(frozen=True)
class CheckpointConfig:
    """What to save and how often, how to resume, and when to give up."""

    checkpoint_every: int | None = None
    """Steps between checkpoints, written to the folder `checkpoints` under `out` while training goes on; by
    default those between evaluations, 0 for none."""
    keep_last: int = 2
    """Checkpoints to keep, the newest ones."""
    keep_best: int = 1
    """Checkpoints of least held-out loss to keep as well, among evaluated steps."""
    resume: bool = False
    """Continue from the newest whole checkpoint in `out`; start if there is none."""
    migrate: str | None = None
    """Changes that the resumed run may have, separated by commas: layers (stacked or not), rank (of LoRA-Pre's
    factors), schedule (steps, warm-up, final rate, peak rate)."""
    force_unlock: bool = False
    """Take over `out` from a run on another host that has ended."""
    max_skipped: int = 5
    """Stop after this many consecutive steps whose loss or gradient is not finite."""


def check_checkpoints(config: CheckpointConfig) -> None:
    """Raises ValueError for options that are out of range or contradict each other."""
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


@dataclass(frozen=True)
class StepConfig:
    """Length of a run, size of a step, and evaluation. None takes the value of the protocol or the data."""

    steps: int | None = None
    """Optimizer steps."""
    batch_size: int | None = None
    """Sequences per step."""
    seq_len: int | None = None
    """Predicted tokens per sequence."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other."""
    warmup_fraction: float | None = None
    """Share of the steps for warm-up."""
    final_rate_fraction: float | None = None
    """Learning rate at the end of the cosine, as a share of the peak."""
    clip_norm: float | None = None
    """Global gradient norm to clip to; 0 for no clipping."""
    weight_decay: float | None = None
    """Decoupled weight decay, multiplied by the learning rate."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of matrix products and activations; parameters and gradients are float32."""
    remat: bool = False
    """Recompute activations in the backward pass."""
    mesh: str | None = None
    """Sizes of the device mesh's axes: data=2,fsdp=2,tensor=2; one may be * for what is left. By default one
    device, or fsdp=* with several processes."""
    mesh_mode: MeshMode | None = None
    """Whether the mesh's axes are Auto (the default) or Explicit, where the optimizer sees typed shardings."""
    mesh_strict: bool | None = None
    """Refuse a model that the mesh does not divide, instead of copying that parameter along that axis."""
    loss_chunk: int | None = None
    """Tokens whose logits exist at once; by default as many as fit 256 MiB."""
    seed: int = 0
    """Seed of the initial parameters, the held-out split and the order of the data."""
    eval_every: int | None = None
    """Steps between evaluations; by default a tenth of the run. There is always one at the end."""
    eval_batches: int = 16
    """Held-out batches of an evaluation, spread evenly over the held-out text."""
    log_every: int = 10
    """Steps between log lines; the program waits for the device only then."""


@dataclass(frozen=True)
class JobConfig(StepConfig, DeviceConfig):
    """Data and length of the training, for any optimizer. None takes the protocol's or the preset's value."""

    preset: Annotated[str, tyro.conf.arg(help=f"Model shape: {', '.join(PRESETS)}.")] = "demo"
    protocol: Annotated[
        str | None,
        tyro.conf.arg(
            help="Sequence length, batch, clipping, decay and schedule: "
            f"{', '.join(PROTOCOLS)}; by default the one of the preset's family."
        ),
    ] = None
    decay_vectors: bool = True
    """Let weight decay act on norm scales too."""
    scan_layers: bool | None = None
    """Stack and scan the layers; by default yes, unless the optimizer does not support it."""
    data: str = "stdlib"
    """stdlib, a text or JSONL file, a folder, hf:NAME[:CONFIG] or synthetic:SEED[:COUNT]."""
    tokenizer: str | None = None
    """A tokenizer.json; by default a BPE is trained on the data and cached."""
    vocab_size: int | None = None
    """Vocabulary of model and tokenizer; by default the preset's."""
    heldout_fraction: float = 0.05
    """Share of the tokens held out, in whole documents."""
    max_documents: int | None = None
    """Read at most this many documents."""
    max_bytes: int | None = None
    """Read at most this many bytes of text."""
    text_field: str = "text"
    """Field of a JSONL or hub record that holds its text."""
    skip_bad_records: bool = False
    """Skip files that are not UTF-8 and records without text, count them and name the first."""
    cache_dir: str | None = None
    """Folder for tokenizers and encoded text; by default the user's cache folder."""


@dataclass(frozen=True)
class RecordConfig:
    """What to record of a run, and where."""

    statistics_every: int | None = None
    """Steps between statistics of updates, damper and factors, a multiple of log_every; by default log_every,
    0 for none."""
    tensorboard: bool = True
    """Write TensorBoard files too."""
    wandb: WandbMode | None = None
    """Log to Weights & Biases too: at once (online), or into `out` (offline)."""
    out: Path = Path("runs/train")
    """Folder for config.json, metrics.jsonl, summary.json, checkpoints and the TensorBoard files."""
    overwrite: bool = False
    """Replace the run in that folder, with its checkpoints."""


@dataclass(frozen=True)
class TrainConfig(JobConfig, RuleOptions, RecordConfig, CheckpointConfig, ClusterConfig):
    """Trains a Llama with one optimizer. The protocol and the preset give the defaults."""

    optimizer: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(OPTIMIZERS)}.")] = (
        "sage_hybrid"
    )
    learning_rate: float | None = None
    """Peak learning rate; by default the tuned one for preset and optimizer."""
    role_rates: str | None = None
    """Peak learning rates of single roles: embedding=1e-3,vector=2e-3."""
    role_multipliers: str | None = None
    """The same as multiples of the common learning rate: matrix=0.25."""


def resolve(config: TrainConfig, model: LlamaConfig | None = None) -> Settings:
    """Fills in the open values of a configuration, and checks it before anything is loaded.

    Args:
        config: The configuration.
        model: A shape to use instead of the preset's.

    Raises:
        ValueError: A name is unknown, a number is out of range, or the batch does not divide.

    >>> settings = resolve(TrainConfig(preset="demo", optimizer="adamw", steps=50))
    >>> settings.batch_size, settings.warmup_steps, settings.clip_norm
    (16, 5, 1.0)
    """
    check_checkpoints(config)
    if not config.data:
        raise ValueError(
            "--data is empty; give stdlib, a file, a folder, hf:NAME or synthetic:SEED"
        )
    check_not_empty(config)
    shape = preset(config.preset) if model is None else model
    if config.vocab_size is not None:
        shape = dataclasses.replace(shape, vocab_size=config.vocab_size)
    entry = optimizer_entry(config.optimizer)
    name = config.protocol or default_protocol(config.preset)
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; the protocols are {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]

    steps = _or(config.steps, protocol.steps)
    warmup_fraction = _or(config.warmup_fraction, protocol.warmup_fraction)
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must be at least 0 and below 1, got {warmup_fraction}")
    if config.learning_rate is None:
        rate, source = tuned_rate(config.preset, config.optimizer)
    else:
        rate, source = config.learning_rate, "given"
    clip_norm = _or(config.clip_norm, protocol.clip_norm)
    scan_layers = _or(config.scan_layers, not entry.needs_unscanned)
    if scan_layers and entry.needs_unscanned:
        raise ValueError(f"{config.optimizer} refuses stacked layers; leave scan_layers out")
    settings = Settings(
        model=shape,
        optimizer=config.optimizer,
        options=_options(config, shape, rate, _or(config.weight_decay, protocol.weight_decay)),
        learning_rate=rate,
        rate_source=source,
        steps=steps,
        warmup_steps=round(warmup_fraction * steps),
        final_rate_fraction=_or(config.final_rate_fraction, protocol.final_rate_fraction),
        batch_size=_or(config.batch_size, protocol.batch_size),
        seq_len=_or(config.seq_len, protocol.seq_len),
        accumulate=config.accumulate,
        clip_norm=clip_norm or None,
        compute_dtype=config.compute_dtype,
        scan_layers=scan_layers,
        remat=config.remat,
        loss_chunk=config.loss_chunk,
        seed=config.seed,
        eval_every=_or(config.eval_every, max(1, steps // 10)),
        eval_batches=config.eval_batches,
        log_every=config.log_every,
        statistics_every=_or(config.statistics_every, config.log_every),
        **_mesh(config),
    )
    check_settings(settings)
    return settings


def check_not_empty(config: Any) -> None:
    """Raises ValueError for an option with an empty text, such as an unset shell variable.

    >>> check_not_empty(TrainConfig(cache_dir=""))
    Traceback (most recent call last):
      ...
    ValueError: cache_dir is empty; give a value or leave it out
    """
    for option in dataclasses.fields(config):
        if option.name != "preset" and getattr(config, option.name) == "":
            raise ValueError(f"{option.name} is empty; give a value or leave it out")


def data_config(config: TrainConfig, settings: Settings) -> DataConfig:
    """The part of a configuration that is about the data."""
    return DataConfig(
        data=config.data,
        tokenizer=config.tokenizer,
        vocab_size=settings.model.vocab_size,
        heldout_fraction=config.heldout_fraction,
        seed=config.seed,
        text_field=config.text_field,
        skip_bad_records=config.skip_bad_records,
        max_documents=config.max_documents,
        max_bytes=config.max_bytes,
        cache_dir=config.cache_dir,
    )


def _options(
    config: TrainConfig, model: LlamaConfig, rate: float, weight_decay: float
) -> OptimizerOptions:
    given = {name: getattr(config, name) for name in RULE_OPTIONS}
    if optimizer_entry(config.optimizer).has_rank and given["rank"] is None:
        given["rank"] = default_rank(config.preset, model.hidden_size)
    if config.role_rates and config.role_multipliers:
        raise ValueError("give role_rates or role_multipliers, not both")
    rates = parse_rates(config.role_rates, ROLES, "role")
    multipliers = parse_rates(config.role_multipliers, ROLES, "role")
    given["role_multipliers"] = (
        multipliers or {role: value / rate for role, value in rates.items()} or None
    )
    return OptimizerOptions(weight_decay=weight_decay, decay_vectors=config.decay_vectors, **given)


def _mesh(config: TrainConfig) -> dict[str, Any]:
    """The settings of the mesh; None without a mesh, as in files from before meshes."""
    if config.mesh is None:
        for name in ("mesh_mode", "mesh_strict"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} needs a mesh; give --mesh too, fsdp=* for all devices")
        return {}
    parse_mesh(config.mesh)
    if config.mesh_mode == "explicit" and optimizer_entry(config.optimizer).needs_auto_mesh:
        raise ValueError(f"{config.optimizer} fails on Explicit axes; give --mesh-mode auto")
    mode, strict = _or(config.mesh_mode, "auto"), _or(config.mesh_strict, False)
    return {"mesh": config.mesh, "mesh_mode": mode, "mesh_strict": strict}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
