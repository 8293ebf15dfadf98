"""One fine-tuning run: its trained parameters, its data, and its trainer configuration."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from examples.llama.data.documents import BadRecords
from examples.llama.data.instruction_batches import (
    InstructionData,
    heldout_rows,
    instruction_iterator,
    prepare_instructions,
    rows_per_epoch,
)
from examples.llama.data.instructions import Template, chat_template, prompt_template, read_records
from examples.llama.devices.processes import ClusterConfig
from examples.llama.finetuning.adapters import TARGETS, AdapterSpec, adapter_notes, check_rank
from examples.llama.finetuning.loading import FINETUNE, Model, load_model
from examples.llama.finetuning.program import FromModel, Tuned, tuned_to_json
from examples.llama.model.subtrees import trainable_patterns
from examples.llama.optimizers.options import OptionSet
from examples.llama.optimizers.registry import OPTIMIZERS, optimizer_entry
from examples.llama.reporting.files import jsonable
from examples.llama.reporting.summary import RunSummary
from examples.llama.reporting.wandb_run import check_wandb
from examples.llama.training.config import (
    CheckpointConfig,
    RecordConfig,
    StepConfig,
    TrainConfig,
    check_not_empty,
    resolve,
)
from examples.llama.training.notes import rank_notes
from examples.llama.training.program import Program
from examples.llama.training.replacement import claim_folder
from examples.llama.training.run import Run

ADAPTERS = ("lora", "rslora", "dora")

PAPER_RATE, PAPER_METHODS = 2e-5, (*ADAPTERS, "adamw", "lorapre_adamw")
"""Peak learning rate of the LoRA-Pre paper's fine-tuning, and the methods that use it by default."""


@dataclass(frozen=True)
class FinetuneConfig(StepConfig, RecordConfig, CheckpointConfig, ClusterConfig):
    """Fine-tunes a Llama on instructions. Defaults are those of the LoRA-Pre paper's experiment."""

    model: Annotated[
        str, tyro.conf.arg(help="Hugging Face folder, or folder of a run, to start from.")
    ] = ""
    data: str = ""
    """A JSONL file, hf:NAME[:CONFIG] or arithmetic:SEED[:COUNT[:STEPS]]."""
    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"Adapters: {', '.join(ADAPTERS)}. Optimizers of the trainable parameters themselves: "
            f"{', '.join(OPTIMIZERS)}."
        ),
    ] = "lorapre_adamw"
    rank: int = 8
    """Rank of adapters, factors or projections."""
    alpha: float = 16.0
    """For adapters: the scale is alpha / rank, with rslora alpha / sqrt(rank)."""
    targets: tuple[str, ...] = TARGETS
    """Projections that get an adapter."""
    trainable: str = "matrices"
    """Parameters that train without adapters: matrices (attention and MLP), all, or patterns of paths
    separated by commas, as layers/self_attn/*."""
    learning_rate: float | None = None
    """Peak learning rate; by default the paper's 2e-5 for the methods that the paper fine-tuned with."""
    scale: float | None = None
    """Factor on the matrices' direction, for optimizers with this option."""
    option_set: Annotated[OptionSet | None, tyro.conf.arg(name="options")] = dataclasses.field(
        default=None, metadata={"name": "options"}
    )
    """LoRA-Pre Adam's options: the paper's (the default) or the recommended ones."""
    update_gap: int | None = None
    """Steps between two projections of GaLore."""
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup_fraction: float = 0.03
    final_rate_fraction: float = 0.0
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 128
    """Rows per step."""
    seq_len: int = 512
    """Predicted tokens per row; a longer example is cut."""
    packing: bool = True
    """Pack several examples into a row, without attention between them; otherwise one padded example a row."""
    template: str = "alpaca"
    """alpaca, plain, chat (the tokenizer's own), or a file with {query}."""
    query_field: str | None = None
    """Field of the query; by default query, question, problem or instruction."""
    response_field: str | None = None
    """Field of the response; by default response, answer, output or solution."""
    split: str = "train"
    """Split of a hub data set."""
    limit: int | None = None
    """Read at most this many records."""
    skip_bad_records: bool = False
    """Skip records that are not JSON objects or do not fit the template, count them and name the first."""
    heldout_fraction: float = 0.02
    """Share of the examples held out for the held-out loss."""
    tokenizer: str | None = None
    """A tokenizer.json or its folder; by default the model's."""
    seed: int = 0
    """Seed of adapters, the held-out split and the order of the data."""
    statistics_every: int = 0
    """Steps between statistics of updates, damper and factors (not of adapters), 0 for none."""
    out: Path = Path("runs/finetune")
    """Folder for config.json, tokenizer.json, metrics.jsonl, summary.json and checkpoints."""


def finetune(config: FinetuneConfig, **arguments: Any) -> RunSummary:
    """Prepares and trains; see `prepare_finetuning` for the arguments and errors."""
    return prepare_finetuning(config, **arguments).train()


def prepare_finetuning(
    config: FinetuneConfig,
    *,
    model: Model | None = None,
    data: InstructionData | None = None,
    program: Program | None = None,
    console: Console | None = None,
) -> Run:
    """A fine-tuning run, checked and ready to start.

    Args:
        config: The configuration.
        model: An opened model to use instead of opening it.
        data: Prepared data to use instead of reading it.
        program: A compiled program to reuse if it fits.
        console: Where to show progress.

    Raises:
        ValueError: The configuration, the model, the data or the batch cannot be used.
        FileNotFoundError: There is no such model.
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` is set.
    """
    check(config)
    check_wandb(config.wandb)
    claim_folder(
        config.out,
        {"--model": config.model, "--data": config.data},
        overwrite=config.overwrite,
        resume=config.resume,
    )
    what = tuned(config)
    model = load_model(config.model, tokenizer=config.tokenizer) if model is None else model
    if what.adapter is not None:
        check_rank(model.config, what.adapter)
    data = instruction_data(config, model) if data is None else data
    steps = config.steps
    if steps is None:
        rows = rows_per_epoch(data, config.seq_len)
        steps = max(1, math.ceil(config.epochs * rows / config.batch_size))
    job = trainer_config(config, steps)
    # The trainer uses the learning rate as given.
    settings = dataclasses.replace(resolve(job, model.config), rate_source=peak_rate(config)[1])
    source = FromModel(what, model.read)
    if program is None or not program.serves(settings, source):
        program = Program(settings, source)
    share, parts = program.share_of_batch(), settings.accumulate
    base = Path(config.model).expanduser().absolute()
    section = jsonable({"base": base, "tuned": tuned_to_json(what)})
    sizes = {
        "trained_parameters": program.parameter_count(),
        "model_parameters": source.model_parameter_count(settings),
    }
    return Run(
        job,
        settings,
        data,
        program,
        instruction_iterator(data, settings.batch_size, settings.seq_len, settings.seed, **share),
        heldout_rows(
            data,
            settings.batch_size // parts,
            settings.seq_len,
            settings.eval_batches * parts,
            **share,
        ),
        asked=config,
        sections={FINETUNE: section | sizes},
        identity={f"{FINETUNE}.{name}": value for name, value in section.items()},
        module="examples.llama.finetune",
        console=console,
        name=config.method,
        # The options were compared only in training from scratch.
        notes=(
            rank_notes(settings, program.abstract_params)
            if what.adapter is None
            else adapter_notes(model.config, what.adapter)
        ),
    )


def check(config: FinetuneConfig) -> None:
    """Raises ValueError for missing or contradictory options, before anything is read."""
    if not config.model or not config.data:
        raise ValueError("give --model (a Hugging Face folder or a run) and --data")
    check_not_empty(config)
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit must be at least 1, got {config.limit}")
    if config.method in ADAPTERS:
        if config.trainable != "matrices":
            raise ValueError("trainable is for methods without adapters; use targets")
        if config.statistics_every:
            raise ValueError("there are no statistics of adapters; leave statistics_every out")
    elif config.method not in OPTIMIZERS:
        raise ValueError(
            f"unknown method {config.method!r}; the methods are {', '.join((*ADAPTERS, *OPTIMIZERS))}"
        )
    elif config.targets != TARGETS:
        raise ValueError("targets is for adapters; use trainable")
    elif config.alpha != FinetuneConfig.alpha:
        raise ValueError("alpha is for adapters; the factor of other methods is scale")
    if not config.heldout_fraction > 0:
        raise ValueError("heldout_fraction must be positive: its loss is what a run reports")
    if config.steps is not None and config.steps < 1:
        raise ValueError(f"steps must be at least 1, got {config.steps}")
    if config.steps is None and not 0 < config.epochs < math.inf:
        raise ValueError(f"epochs must be positive, got {config.epochs}")
    peak_rate(config)


def peak_rate(config: FinetuneConfig) -> tuple[float, str]:
    """The peak learning rate, and its source.

    Raises:
        ValueError: None was given, and the method has no default; the message suggests a start.

    >>> peak_rate(FinetuneConfig(method="lora"))
    (2e-05, "default: the LoRA-Pre paper's")
    """
    if config.learning_rate is not None:
        return config.learning_rate, "given"
    if config.method in PAPER_METHODS:
        return PAPER_RATE, "default: the LoRA-Pre paper's"
    raise ValueError(
        f"{config.method} has no default rate for fine-tuning; give --learning-rate. Other methods' best rates "
        "were 0.003 to 0.081 on a small model (docs/results/finetuning.md); a large one wants less, so try "
        "1e-4, 3e-4 and 1e-3 on a few hundred steps"
    )


def tuned(config: FinetuneConfig) -> Tuned:
    """The part of the model that a configuration trains.

    >>> tuned(FinetuneConfig(method="rslora", rank=4)).adapter.scale
    8.0
    >>> tuned(FinetuneConfig(method="galore")).patterns
    ('layers/*kernel',)
    """
    if config.method in ADAPTERS:
        kind: Any = config.method
        return Tuned(adapter=AdapterSpec(kind, config.rank, config.alpha, config.targets))
    return Tuned(trainable_patterns(config.trainable))


def trainer_config(config: FinetuneConfig, steps: int) -> TrainConfig:
    """The trainer's configuration; AdamW trains adapters."""
    optimizer = "adamw" if config.method in ADAPTERS else config.method
    entry = optimizer_entry(optimizer)
    given = {name: getattr(config, name) for name in ("scale", "option_set", "update_gap")}
    given["rank"] = config.rank if entry.has_rank else None
    given["learning_rate"] = peak_rate(config)[0]
    same = [
        field.name
        for kind in (StepConfig, RecordConfig, CheckpointConfig)
        for field in dataclasses.fields(kind)
        if field.name != "steps"
    ]
    return TrainConfig(
        preset=Path(config.model).name,
        protocol="demo",  # every field of it is given
        optimizer=optimizer,
        steps=steps,
        **given,
        **{name: getattr(config, name) for name in same},
    )


def template_of(
    model: Model,
    name: str,
    tokenizer: str | None = None,
    *,
    query: str | None = None,
    response: str | None = None,
) -> Template:
    """A template by name; `chat` is the chat template of the model's or the given tokenizer."""
    if name == "chat":
        return chat_template(tokenizer or model.hub_folder or model.folder)
    return prompt_template(name, query=query, response=response)


def instruction_data(config: FinetuneConfig, model: Model) -> InstructionData:
    """Reads and tokenizes the data of a configuration."""
    bad = BadRecords(skip=config.skip_bad_records)
    return prepare_instructions(
        read_records(config.data, split=config.split, limit=config.limit, bad=bad),
        template_of(
            model,
            config.template,
            config.tokenizer,
            query=config.query_field,
            response=config.response_field,
        ),
        model.tokenizer,
        seq_len=config.seq_len,
        end_id=model.stop_ids[0] if model.stop_ids else None,
        source=config.data,
        heldout_fraction=config.heldout_fraction,
        packed=config.packing,
        seed=config.seed,
        bad=bad,
    )
