"""The long form of the faults, as a table: python -m tests.faults.kill (or make faults).

Writes docs/results/faults.md: each fault, how often, and what came of it, beside the size of a demo
checkpoint and the time that saving takes. Fails if an outcome is not what it must be.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from rich.console import Console

from examples.llama.reporting.files import command_line, versions
from examples.llama.reporting.summary import size
from examples.llama.training.checkpoints import FOLDER, Checkpoints
from examples.llama.training.config import TrainConfig, resolve
from examples.llama.training.program import Program
from examples.llama.training.resume import target
from tests.faults import harness
from tests.faults.damage import DAMAGES

STEPS = 400
PAGE = Path("docs/results/faults.md")


@dataclass(frozen=True)
class FaultConfig:
    """Harms a small training run in every way, and writes down what came of it."""

    seed: int = 0
    """Seed of the moments."""
    random_kills: int = 8
    """Kills at random moments."""
    save_kills: int = 4
    """Kills while a checkpoint is being written."""
    demo: Annotated[bool, tyro.conf.arg(help="Also save the demo preset's state.")] = True
    """Measure checkpoints of the demo preset too."""
    page: Path = PAGE
    """Where the table goes."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    times: int
    outcome: str


def main(config: FaultConfig) -> None:
    """Runs all faults and writes the page."""
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed = harness.make_job(folder, "undisturbed", steps=STEPS, pace=0.0)
        assert harness.run_to_end(undisturbed) == 0, undisturbed.log.read_text()
        rows, kills = [], []
        for part in (
            _kills(folder, undisturbed, config, kills),
            _damages(undisturbed),
            _full_disk(folder, undisturbed),
        ):
            for row in part:
                console.print(f"{row.fault} ({row.times}): {row.outcome}", soft_wrap=True)
                rows.append(row)
    demo = []
    for optimizer in ("adamw", "sage_hybrid") if config.demo else ():
        demo.append(_demo(optimizer))
        console.print(demo[-1])
    config.page.parent.mkdir(parents=True, exist_ok=True)
    config.page.write_text(_page(rows, kills, demo), encoding="utf-8")
    console.print(f"Written to {config.page}")


def _same(job: harness.Job, undisturbed: harness.Job) -> str:
    assert harness.result(job) == harness.result(undisturbed), f"{job.out}: other parameters"
    assert harness.lines(job) == harness.lines(undisturbed), f"{job.out}: other metrics"
    return "parameters, optimizer state and metrics.jsonl as in the undisturbed run, bit for bit"


def _kills(
    folder: Path, undisturbed: harness.Job, config: FaultConfig, kills: list[harness.Kill]
) -> Iterator[Row]:
    job = harness.make_job(folder, "killed", steps=STEPS, pace=0.02)
    kills += harness.killed_run(
        job, config.seed, config.random_kills, config.save_kills, steps=(1, 20)
    )
    outcome = _same(job, undisturbed)
    inside = sum(kill.in_save for kill in kills)
    assert len(kills) >= 10
    assert inside >= 2
    assert max(kill.resumed_from for kill in kills) > STEPS // 10
    yield Row("kill -9 of a training run", len(kills), f"resumed each time; {outcome}")
    yield Row("of these while a checkpoint was being written", inside, "the one before was used")


def _damages(undisturbed: harness.Job) -> Iterator[Row]:
    before = harness.result(undisturbed), harness.lines(undisturbed)
    for name, harm in DAMAGES.items():
        harm(undisturbed.out, STEPS)
        undisturbed.log.write_text("")
        assert harness.run_to_end(undisturbed) == 0, undisturbed.log.read_text()
        text = undisturbed.log.read_text()
        assert f"The checkpoint of step {STEPS} is damaged: " in text
        assert f"resumed from step {STEPS - 4}" in text
        assert (harness.result(undisturbed), harness.lines(undisturbed)) == before
        reason = text.split("is damaged: ")[1].split(". Moved")[0].splitlines()[0]
        reason = reason.replace(str(undisturbed.out), "OUT").replace("|", "/")[:110]
        yield Row(
            f"newest checkpoint damaged: {name}",
            1,
            f"named (“{reason}”), set aside, the one before used; same end, bit for bit",
        )


def _full_disk(folder: Path, undisturbed: harness.Job) -> Iterator[Row]:
    job = harness.make_job(folder, "full", steps=STEPS, pace=0.0, limit_from=10)
    status = harness.run_to_end(job)
    text = job.log.read_text()
    assert status == 1, text
    assert "The checkpoint of step 12 could not be written" in text, text
    assert "the newest whole checkpoint is that of step 8" in text, text
    assert harness.run_to_end(replace(job, limit_from=None)) == 0
    yield Row(
        "files cannot grow (RLIMIT_FSIZE) while a checkpoint is written",
        1,
        "exit status 1, the error names the checkpoint and the newest whole one; resumed from that: "
        + _same(job, undisturbed),
    )


def _demo(optimizer: str) -> str:
    """Size of a checkpoint of the demo preset, and how long saving and restoring it take."""
    program = Program(resolve(TrainConfig(preset="demo", optimizer=optimizer)))
    random = np.random.default_rng(0)
    # Numbers everywhere, as after training: the moments of a new state are zeros and would compress.
    state = jax.tree.map(
        lambda x: jax.numpy.asarray(random.normal(size=x.shape), x.dtype), program.init(0)
    )
    blocked, total, read = [], [], []
    with tempfile.TemporaryDirectory() as name, Checkpoints(Path(name)) as checkpoints:
        for step in range(6):
            state = state._replace(step=jax.numpy.int32(step))
            started = time.perf_counter()
            checkpoints.save(state, {})
            blocked.append(time.perf_counter() - started)
            checkpoints.wait()
            total.append(time.perf_counter() - started)
        for _ in range(3):
            started = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(5, target(program)))
            read.append(time.perf_counter() - started)
        files = [p for p in (Path(name) / FOLDER / "5").rglob("*") if p.is_file()]
        stored = sum(path.stat().st_size for path in files)
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    # The first of each compiles the fingerprints.
    numbers = [statistics.median(times[1:]) for times in (blocked, total, read)]
    return (
        f"| {optimizer} | {program.parameter_count():,} | {size(arrays)} | {size(stored)} | "
        + " | ".join(f"{number:.2f}" for number in numbers)
        + " |"
    )


def _page(rows: list[Row], kills: list[harness.Kill], demo: list[str]) -> str:
    found = versions()
    text = [
        "# Faults",
        "",
        f"Written by `{command_line('tests.faults.kill')}` with JAX {found['jax']}, on {os.cpu_count()} CPU "
        "cores. The run is a Llama of one layer with LoRA-Pre Adam, "
        f"{STEPS} steps, a checkpoint every 4; each process resumes from what the one before left.",
        "",
        "| fault | times | outcome |",
        "|---|---|---|",
        *(f"| {row.fault} | {row.times} | {row.outcome} |" for row in rows),
        "",
        "## The kills",
        "",
        "Every process had taken at least one step and was alive when it was killed (exit code -9). In a "
        "save: it left a checkpoint under its temporary name.",
        "",
        "| kill | resumed from step | last step written | in a save |",
        "|---|---|---|---|",
        *(
            f"| {number} | {kill.resumed_from} | {kill.step} | {'yes' if kill.in_save else 'no'} |"
            for number, kill in enumerate(kills, 1)
        ),
        "",
    ]
    if demo:
        text += [
            "## Checkpoints of the demo preset",
            "",
            "Medians of five saves and two restores. Training waits for the first time only; the second ends "
            "when all is on disk. Both contain the fingerprints, restoring also their check.",
            "",
            "| optimizer | parameters | arrays | on disk | training waits (s) | saved (s) | restored (s) |",
            "|---|---|---|---|---|---|---|",
            *demo,
            "",
        ]
    return "\n".join(text)


if __name__ == "__main__":
    main(tyro.cli(FaultConfig, prog="python -m tests.faults.kill"))
