"""The text of a plan: a table that fits any terminal, the answer, and the command to run."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from rich import box
from rich.table import Table

from examples.llama.comparing.memory import PlanRow
from examples.llama.comparing.order import LONG, names_in_order
from examples.llama.comparing.plan import GIB, Plan, make_plan
from examples.llama.model.llama import parameter_count
from examples.llama.optimizers.options import WRITTEN
from examples.llama.optimizers.rates import TUNED_RATES, rate_to_begin_with
from examples.llama.optimizers.variants import parse_variant
from examples.llama.reporting.summary import size

_ROLES = {
    "embedding": "embedding",
    "head": "head",
    "matrix": "matrices",
    "vector": "vectors",
    "other": "other",
}
"""Roles in the table's columns; shared step counts are a few bytes and appear only in the sum."""

ADAPTER = "lora"
"""The row of an adapter, which has the same name in `finetune`."""

ABOVE = 1.001
"""A row above this share of AdamW's state is marked; a few counters more are not."""

PAPER_RATE, PAPER_METHODS = 2e-5, (ADAPTER, "adamw", "lorapre_adamw")
"""Peak learning rate of the LoRA-Pre paper's fine-tuning, and the rows that use it; those of `finetune`."""

_NAME = 20
"""Smallest width of a name in the terminal; a longer name is wrapped."""

_GAP = 3
"""Terminal columns between two columns of the table: its padding and a line of the box."""


def plan_tables(plan: Plan, width: int) -> list[Table]:
    """The plan in GiB per device, as several tables if one is wider than the terminal.

    Names are wrapped; headings and numbers never are. The recommended row is bold and marked `>`.

    Args:
        plan: The plan.
        width: Columns of the terminal.
    """
    names, columns = _cells(plan)
    longest = max(map(len, names))
    name_width = max(min(longest, _NAME), min(longest, width - 30))
    blocks: list[list[tuple[str, list[str]]]] = [[]]
    room = width - name_width - _GAP
    for heading, cells in columns:
        needed = max(map(len, (heading, *cells))) + _GAP
        if needed > room and blocks[-1]:
            blocks.append([])
            room = width - name_width - _GAP
        blocks[-1].append((heading, cells))
        room -= needed
    return [_table(plan, names, name_width, block) for block in blocks]


def _table(
    plan: Plan, names: list[str], name_width: int, columns: list[tuple[str, list[str]]]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("optimizer", width=name_width, overflow="fold")
    for heading, cells in columns:
        table.add_column(
            heading, justify="right", no_wrap=True, min_width=max(map(len, (heading, *cells)))
        )
    for position, row in enumerate(plan.rows):
        style = "bold" if row.key == plan.recommended else None
        table.add_row(names[position], *(cells[position] for _, cells in columns), style=style)
    return table


def _cells(plan: Plan) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The names, and each column's heading and cells, most important first."""
    rows = plan.rows
    adamw = _adamw(plan)

    def column(heading: str, text: Any) -> tuple[str, list[str]]:
        return heading, [text(row) for row in rows]

    columns = [
        column("in all", lambda row: _gib(row.bytes)),
        column("fits", lambda row: "yes" if plan.fits(row) else "no"),
        column("state", lambda row: _gib(row.state_bytes)),
    ]
    if adamw:
        columns.append(
            column(
                "of AdamW's",
                lambda row: (
                    ("! " if row.state_bytes > ABOVE * adamw else "")
                    + _percent(row.state_bytes / adamw)
                ),
            )
        )
    columns += [
        column("rank", lambda row: "-" if row.rank is None else str(row.rank)),
        column("parameters", lambda row: _gib(row.parameters)),
        column("gradients", lambda row: _gib(row.gradients)),
        column("activations", lambda row: _gib(row.activations)),
    ]
    if any(row.sequences for row in rows):
        columns.append(column("at once", lambda row: str(row.sequences)))
    for role, heading in _ROLES.items():
        if any(row.state.get(role) for row in rows):
            columns.append(
                column(f"state: {heading}", lambda row, r=role: _gib(row.state.get(r, 0)))
            )
    marks = [("> " if row.key == plan.recommended else "  ") + row.label for row in rows]
    return marks, columns


def _adamw(plan: Plan) -> int | None:
    return next((row.state_bytes for row in plan.rows if row.key == "adamw"), None)


def title(plan: Plan) -> list[str]:
    """The text before the table: what was planned."""
    config = plan.config
    name = config.preset or str(config.hf_config)
    parts = [f"{name}: {parameter_count(plan.model):,} parameters in {config.dtype}"]
    parts += ["attention and MLP matrices trained, the rest frozen"] if config.finetune else []
    parts += [f"mesh {config.mesh}"] if config.mesh else []
    step = f"A step is {plan.batch_size} sequences of {plan.seq_len} tokens, products in {config.compute_dtype}"
    step += ", activations recomputed" if config.remat else ""
    lines = [", ".join(parts) + ".", f"{step}. GiB on each device:"]
    if plan.model_type != "llama":
        lines.insert(
            1,
            f"A {plan.model_type} is planned as a Llama of its sizes; the trainer cannot load it.",
        )
    return lines


def answer(plan: Plan) -> list[str]:
    """The text after the table: the basis of the order, the choice, uncounted memory, and the command."""
    config = plan.config
    lines = [f"Order: {plan.rule}."]
    taken = next((row for row in plan.rows if row.key == plan.recommended), None)
    fitting = [row for row in plan.rows if plan.fits(row)]
    if taken is None and config.finetune and fitting:
        taken = min(
            (row for row in fitting if _runnable(row)), key=lambda row: row.bytes, default=None
        )
    if taken is not None:
        lead = "Recommended" if taken.key == plan.recommended else "Needs least memory"
        lines.append(
            f"{lead}: {taken.label}, {taken.bytes / GIB:.2f} of {config.device_gb:g} GiB"
            + (f", {taken.sequences} sequences at once." if taken.sequences else ".")
        )
    elif not fitting:
        least = min(plan.rows, key=lambda row: row.bytes)
        lines.append(
            f"Nothing fits {plan.limit / GIB:.1f} GiB; the least is {least.label} with "
            f"{size(least.bytes)}. {_way_out(plan)}"
        )
    lines += _above_adamw(plan)
    lines.append(_counted(plan))
    return [*lines, *([] if taken is None else command_lines(plan, taken))]


def _above_adamw(plan: Plan) -> list[str]:
    adamw = _adamw(plan)
    above = [row.label for row in plan.rows if adamw and row.state_bytes > ABOVE * adamw]
    if not above:
        return []
    where = " (docs/choosing.md, low rank under FSDP)" if plan.config.mesh else ""
    return [f"! More state than AdamW: {', '.join(above)}. Take a lower --rank{where}."]


def _counted(plan: Plan) -> str:
    config = plan.config
    rest = (
        "Not counted: the optimizer's temporaries and the runtime; "
        f"{config.margin:.0%} of the device are kept for them (--margin)."
    )
    if config.activation_gb is not None:
        return f"Activations: {config.activation_gb:g} GiB as given. {rest}"
    kind = "writes no scores (flash)" if plan.attention == "flash" else "keeps its scores"
    return f"Activations: estimated from the model's trace, with attention that {kind}. {rest}"


def _way_out(plan: Plan) -> str:
    """Changes that make a row fit, tried with the planner."""
    config = plan.config
    steps: list[tuple[str, dict[str, Any]]] = []
    if config.activation_gb is None:
        steps = [
            ("--remat", {"remat": True}),
            ("--compute-dtype bfloat16", {"compute_dtype": "bfloat16"}),
            (f"--batch-size {plan.devices}", {"batch_size": plan.devices, "accumulate": None}),
        ]
    flags = []
    for flag, change in steps:
        if all(getattr(config, name) == value for name, value in change.items()):
            continue
        flags.append(flag)
        config = dataclasses.replace(config, **change)
        tried = make_plan(config)
        fitting = [row.label for row in tried.rows if tried.fits(row)]
        if fitting:
            return f"With {' '.join(flags)} {', '.join(fitting)} would fit."
    return "Try --mesh fsdp=N with more devices."


def _runnable(row: PlanRow) -> bool:
    """Whether a row is an optimizer or an adapter, not a paper's formula."""
    return row.source == "abstract evaluation" or row.key == ADAPTER


def command_lines(plan: Plan, row: PlanRow) -> list[str]:
    """The command that trains as planned and the source of its learning rate, or the reason for none."""
    config = plan.config
    rate, source = suggested_rate(plan, row)
    said = f"Rate {rate:g}: {source}."
    where = None
    if config.dtype != "float32":
        where = f"Parameters in {config.dtype} are for a trainer of your own; the one here keeps float32."
    elif plan.model_type != "llama":
        where = "The trainer loads Llama only; the optimizer goes into a trainer of your own."
    elif config.preset is None and not config.finetune:
        where = "The trainer takes presets; for this shape the optimizer goes into a trainer of your own."
    if where is not None:
        return [where, said]
    return [said, "Run:", f"    {shlex.join(_command(plan, row, rate))}"]


def _command(plan: Plan, row: PlanRow, rate: float) -> list[str]:
    config = plan.config
    given: dict[str, Any] = {}
    if row.key == ADAPTER:
        given["method"] = row.key
    else:
        fields = parse_variant(row.key).fields()
        given["method" if config.finetune else "optimizer"] = fields.pop("optimizer")
        given |= fields
        given |= {n: v for n, v in _long_options(plan, row).items() if n not in given}
    if row.rank is not None:
        given["rank"] = row.rank
    given["learning_rate"] = f"{rate:g}"
    given |= {"batch_size": plan.batch_size, "seq_len": plan.seq_len}
    parts = plan.accumulate(row) if config.accumulate is None else config.accumulate
    given |= {"accumulate": parts} if parts > 1 else {}
    given |= {"compute_dtype": "bfloat16"} if config.compute_dtype == "bfloat16" else {}
    given |= {"mesh": config.mesh} if config.mesh else {}
    if config.finetune:
        folder = config.hf_config
        if folder is not None and folder.is_file():
            folder = folder.parent
        first = ["--model", str(folder or "MODEL_FOLDER"), "--data", "DATA.jsonl"]
    else:
        first = ["--preset", str(config.preset)]
    written = {field: name for name, field in WRITTEN.items()}
    flags = []
    for name, value in given.items():
        flags += [f"--{written.get(name, name).replace('_', '-')}", str(value)]
    module = f"examples.llama.{'finetune' if config.finetune else 'train'}"
    return ["python", "-m", module, *first, *flags, *(["--remat"] if config.remat else [])]


def _long_options(plan: Plan, row: PlanRow) -> dict[str, float]:
    """The options of the longer experiment's row, if the suggested learning rate is that row's."""
    if plan.config.finetune or _of_preset(plan, row):
        return {}
    return (
        dict(LONG[names_in_order(row.key)[0]].options) if names_in_order(row.key)[0] in LONG else {}
    )


def _of_preset(plan: Plan, row: PlanRow) -> tuple[float, str] | None:
    rates = TUNED_RATES.get(plan.config.preset or "", {})
    return next(
        (rates[key] for key in (row.key, *names_in_order(row.key)[:1]) if key in rates), None
    )


def suggested_rate(plan: Plan, row: PlanRow) -> tuple[float, str]:
    """A peak learning rate to start from, and its source.

    For the methods that the paper fine-tuned with it is the paper's. Otherwise it is that of the preset, of the
    longer experiment, or of the largest preset that has one.
    """
    if plan.config.finetune and _method(row.key) in PAPER_METHODS:
        return PAPER_RATE, "that of the LoRA-Pre paper's fine-tuning (7B, 8B)"
    found = None if plan.config.finetune else _of_preset(plan, row)
    if found is not None:
        return found[0], f"{found[1]}, {plan.config.preset}"
    name = names_in_order(row.key)[0]
    if name in LONG:
        why = "best of the runs of 16.4M tokens at 6.8M parameters; search yours (docs/tuning.md)"
        return LONG[name].rate, why
    begin = rate_to_begin_with(row.key)
    if begin is not None:
        return begin[0], f"{begin[1]}, {begin[2]}; search yours (docs/tuning.md)"
    return 1e-3, "a start that nothing supports; search yours (docs/tuning.md)"


def _method(key: str) -> str:
    """The optimizer or adapter of a row's key.

    >>> _method("lorapre_adamw:options=recommended"), _method("lora")
    ('lorapre_adamw', 'lora')
    """
    return key.partition(":")[0]


def _gib(number: float) -> str:
    """GiB with enough digits to distinguish small states from none.

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
    """A share as text.

    >>> _percent(1.0), _percent(0.0996), _percent(0.0004)
    ('100.0%', '10.0%', '0.04%')
    """
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2%}"
