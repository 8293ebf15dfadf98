"""Trains the demo in several processes on this machine and compares with one process on the same mesh.

    python -m benchmarks.meshes.two_processes

Two processes with four simulated CPU devices each connect over loopback, read their own share of every batch
and train as one. One process of eight devices repeats the run; the losses must agree. The folder then holds
comparison.json and .md, the two runs and the output of each process.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.meshes.launch import Command, LaunchError, free_port, run_together
from examples.llama.optimizers.registry import OPTIMIZERS
from examples.llama.reporting.files import (
    CONFIG,
    SUMMARY,
    command_line,
    jsonable,
    read_json,
    write_json,
)
from examples.llama.reporting.metrics import read_metrics

FAILED_EXIT = 1


@dataclass(frozen=True)
class DemoConfig:
    """Trains the demo in several processes on this machine and in one, and compares the losses."""

    optimizer: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(OPTIMIZERS)}.")] = (
        "sage_hybrid"
    )
    steps: int = 40
    """Optimizer steps."""
    processes: int = 2
    """Number of processes."""
    devices: int = 4
    """Simulated CPU devices of each."""
    mesh: str = "data=2,fsdp=2,tensor=2"
    """Sizes of the mesh's axes."""
    batch_size: int = 16
    """Sequences per step."""
    seq_len: int = 128
    """Predicted tokens per sequence."""
    compared_steps: int = 20
    """Number of steps whose losses must agree."""
    tolerance: float = 1e-5
    """Largest relative difference that counts as agreement."""
    time_limit: float = 900.0
    """Time limit of each of the two runs, in seconds."""
    out: Path = Path("out/distributed")
    """Folder for the comparison, the runs and the logs."""
    options: tuple[str, ...] = ()
    """Further options of examples.llama.train, each as one argument: --options=--seed=1."""


@dataclass(frozen=True)
class Step:
    """The losses of one step and their relative difference."""

    step: int
    one: float
    several: float

    @property
    def difference(self) -> float:
        """|several - one| / |one|."""
        return abs(self.several - self.one) / abs(self.one)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = tyro.cli(DemoConfig, args=arguments, prog="python -m benchmarks.meshes.two_processes")
    console = Console()
    one, several = config.out / "one", config.out / "several"
    total = config.processes * config.devices
    try:
        if not 1 <= config.compared_steps <= config.steps:
            raise ValueError(
                f"compared_steps must be in 1..{config.steps} (--steps), got {config.compared_steps}"
            )
        console.print(f"One process of {total} devices, mesh {config.mesh}", highlight=False)
        _train(config, console, one, 1, total)
        console.print(
            f"{config.processes} processes of {config.devices} devices each, the same mesh",
            highlight=False,
        )
        _train(config, console, several, config.processes, config.devices)
    except (ValueError, LaunchError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return FAILED_EXIT
    steps = compare_losses(one, several, config.compared_steps)
    worst = max(step.difference for step in steps)
    agree = worst <= config.tolerance
    summaries = [read_json(folder / SUMMARY) for folder in (one, several)]
    result = {
        "config": config,
        "steps": [{"difference": step.difference, **vars(step)} for step in steps],
        "largest_difference": worst,
        "agree": agree,
        "heldout_loss": [summary["heldout_loss"] for summary in summaries],
        "mesh": read_json(several / CONFIG)["mesh"],
        "versions": read_json(several / CONFIG)["versions"],
        "command": command_line("benchmarks.meshes.two_processes"),
    }
    write_json(config.out / "comparison.json", result)
    (config.out / "comparison.md").write_text(markdown(jsonable(result)), encoding="utf-8")
    console.print(comparison_table(steps, config.processes))
    for name, summary in zip(
        ("one process", f"{config.processes} processes"), summaries, strict=True
    ):
        console.print(
            f"{name}: held-out loss {summary['heldout_loss']:.6f} after {summary['steps']} steps, "
            f"{summary['tokens_per_second']:,.0f} tokens/s",
            highlight=False,
        )
    verdict = "agree" if agree else "DO NOT agree"
    console.print(
        f"The losses of the first {len(steps)} steps {verdict}: they differ by at most {worst:.2e} "
        f"(allowed {config.tolerance:g}). Written to {config.out}",
        highlight=False,
        soft_wrap=True,
    )
    return 0 if agree else FAILED_EXIT


def compare_losses(one: Path, several: Path, count: int) -> list[Step]:
    """The losses of the first steps of two runs, side by side.

    Raises:
        ValueError: A run has fewer steps.
    """
    losses = [
        {line["step"]: line["loss_last"] for line in read_metrics(folder, "train")}
        for folder in (one, several)
    ]
    for folder, found in zip((one, several), losses, strict=True):
        if set(range(1, count + 1)) - found.keys():
            raise ValueError(f"{folder} does not hold the losses of steps 1 to {count}")
    return [Step(step, losses[0][step], losses[1][step]) for step in range(1, count + 1)]


def comparison_table(steps: Sequence[Step], processes: int) -> Table:
    """Losses and differences for the terminal."""
    table = Table(title=f"Loss of each step: one process and {processes}")
    for name in ("step", "one process", f"{processes} processes", "relative difference"):
        table.add_column(name, justify="right")
    for step in steps:
        table.add_row(
            str(step.step), f"{step.one:.7f}", f"{step.several:.7f}", f"{step.difference:.1e}"
        )
    return table


def markdown(result: Mapping[str, Any]) -> str:
    """The content of comparison.json as a page."""
    config, versions = result["config"], result["versions"]
    heldout = " and ".join(f"{loss:.6f}" for loss in result["heldout_loss"])
    verdict = "agree" if result["agree"] else "do NOT agree"
    lines = [
        f"# One process and {config['processes']}: the losses of each step",
        "",
        f"`{result['command']}`: the demo with {config['optimizer']}, {config['batch_size']} x "
        f"{config['seq_len']} tokens a step, mesh {config['mesh']}; one process of "
        f"{config['processes'] * config['devices']} simulated CPU devices, and {config['processes']} of "
        f"{config['devices']}. JAX {versions['jax']}, Python {versions['python']}.",
        "",
        f"The losses {verdict}: they differ by at most {result['largest_difference']:.2e} (allowed "
        f"{config['tolerance']:g}). Held-out loss after {config['steps']} steps: {heldout}.",
        "",
        f"| step | one process | {config['processes']} processes | relative difference |",
        "|---:|---:|---:|---:|",
    ]
    for step in result["steps"]:
        losses = f"{step['one']:.7f} | {step['several']:.7f}"
        lines.append(f"| {step['step']} | {losses} | {step['difference']:.1e} |")
    return "\n".join(lines) + "\n"


def _train(config: DemoConfig, console: Console, out: Path, processes: int, devices: int) -> None:
    """One run of the trainer, in one process or several."""
    options = {
        "preset": "demo",
        "optimizer": config.optimizer,
        "steps": config.steps,
        "batch-size": config.batch_size,
        "seq-len": config.seq_len,
        "mesh": config.mesh,
        "simulate-devices": devices,
        "eval-every": config.steps,
        "eval-batches": 2,
        "log-every": 1,
        "statistics-every": 0,
        "out": out,
    }
    if processes > 1:
        options |= {"coordinator": f"127.0.0.1:{free_port()}", "processes": processes}
    arguments = [sys.executable, "-m", "examples.llama.train", "--overwrite", "--no-tensorboard"]
    arguments += [f"--{name}={value}" for name, value in options.items()]
    commands = [
        Command(
            f"process {i}",
            [*arguments, *([f"--process-id={i}"] if processes > 1 else []), *config.options],
            config.out / f"{out.name}.{i}.log",
        )
        for i in range(processes)
    ]
    for path in ("metrics.jsonl", SUMMARY):
        (out / path).unlink(missing_ok=True)
    with console.status("starting") as status:

        def show() -> None:
            if (out / "metrics.jsonl").exists():
                lines = read_metrics(out, "train")
                status.update(f"step {lines[-1]['step'] if lines else 0} of {config.steps}")

        run_together(
            commands,
            time_limit=config.time_limit,
            # The devices are simulated on the CPU, even if there are others.
            environment={"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
            on_tick=show,
        )


if __name__ == "__main__":
    sys.exit(main())
