"""The main job: trains a Llama with one optimizer and writes down everything about it.

    python -m examples.llama.train --preset demo --optimizer sage_hybrid --steps 400 --out runs/sage

The folder then holds config.json (what was asked, what it came to, versions, the corpus and its hash),
metrics.jsonl (one line a log interval and an evaluation, flushed at once), summary.json and TensorBoard files.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console

from examples.llama.clock import StepClock
from examples.llama.data import Dataset, heldout_batches, prepare_data, train_iterator
from examples.llama.distributed import abort, agree, finish, is_main, start_devices
from examples.llama.metrics import (
    CONFIG,
    SUMMARY,
    MetricsWriter,
    command_line,
    jsonable,
    read_json,
    versions,
    write_json,
)
from examples.llama.presets import LlamaConfig
from examples.llama.program import Program
from examples.llama.progress import Progress, make_progress
from examples.llama.report import RunSummary, perplexity, summary_table
from examples.llama.settings import Settings, TrainConfig, data_config, resolve
from examples.llama.step import StepMetrics

INTERRUPTED_EXIT, NON_FINITE_EXIT, USAGE_EXIT = 130, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    config = tyro.cli(TrainConfig, args=arguments, prog="python -m examples.llama.train")
    try:
        config = start_devices(config)
        console = Console(quiet=not is_main())
        run = prepared(config, console)
    except (ValueError, FileExistsError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        return USAGE_EXIT
    try:
        summary = run.train()
        finish()
    except Exception:
        if jax.process_count() > 1:
            abort()
        raise
    console.print(summary_table(summary))
    console.print(f"Written to {config.out}", highlight=False, soft_wrap=True)
    if summary.message:
        Console(stderr=True).print(summary.message, markup=False, soft_wrap=True)
    codes = {"finished": 0, "interrupted": INTERRUPTED_EXIT, "non_finite": NON_FINITE_EXIT}
    return codes[summary.status]


def train(config: TrainConfig, **arguments: Any) -> RunSummary:
    """Prepares and trains; see `Run` for the arguments and errors."""
    return Run(config, **arguments).train()


def prepared(config: TrainConfig, console: Console) -> Run:
    """A run that every process can begin with the same settings and data; see `Run` for the errors."""
    run, problem = None, None
    try:
        run = Run(config, console=console)
    except (ValueError, FileExistsError) as error:
        problem = error
    agree(problem, "" if run is None else run.identity())
    assert run is not None
    return run


class Run:
    """One training run, checked and ready to start; fine-tuning derives its own from it.

    Args:
        config: What was asked for.
        model: A shape to use instead of the preset's.
        dataset: Prepared data to use instead of reading it.
        program: A compiled program to use where it serves.
        console: Where to show progress; by default standard output.
        name: What progress calls the run; by default the optimizer's name.

    Raises:
        ValueError: The configuration, the data or the batch cannot be used.
        FileExistsError: The folder holds a finished run and `overwrite` is not set.
    """

    module = "examples.llama.train"
    """The module whose command line this is."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: LlamaConfig | None = None,
        dataset: Dataset | None = None,
        program: Program | None = None,
        console: Console | None = None,
        name: str | None = None,
    ):
        self.config = config
        self.settings = settings = resolve(config, model)
        check_folder(config.out, overwrite=config.overwrite)
        self.dataset = prepare_data(data_config(config, settings)) if dataset is None else dataset
        check_vocabulary(self.dataset, settings)
        served = program is not None and program.serves(settings)
        self.program = program if program is not None and served else Program(settings)
        self.batches, self.heldout = self._open_batches()
        self.console = console or Console()
        self.name = name or settings.optimizer
        self.summary = RunSummary(
            status="interrupted",
            preset=config.preset,
            optimizer=settings.optimizer,
            learning_rate=settings.learning_rate,
            rate_source=settings.rate_source,
            seed=settings.seed,
            planned_steps=settings.steps,
            parameters=self.program.parameter_count(),
            optimizer_state_bytes=self.program.state_bytes(),
            device_state_bytes=self.program.state_bytes_per_device(),
            adamw_state_bytes=self.program.adamw_state_bytes(),
            corpus_sha256=self.dataset.corpus_sha256,
        )

    def _open_batches(self) -> tuple[Any, list[np.ndarray]]:
        """The iterator of training batches and the batches held out; of both this process's share."""
        settings, share = self.settings, self.program.share_of_batch()
        batches = train_iterator(
            self.dataset, settings.batch_size, settings.seq_len, settings.seed, **share
        )
        heldout = heldout_batches(
            self.dataset,
            settings.batch_size // settings.accumulate,
            settings.seq_len,
            settings.eval_batches * settings.accumulate,
            **share,
        )
        return batches, heldout

    def identity(self) -> str:
        """What must be the same in all processes of a run: settings, data and versions."""
        known = versions()
        del known["platform"]
        parts = {"settings": self.settings, "data": self.dataset.describe(), "versions": known}
        return json.dumps(jsonable(parts), sort_keys=True)

    def train(self) -> RunSummary:
        """Trains to the end, to a loss that is not finite, or to an interrupt from the keyboard.

        Whichever it is, the summary of what was reached is written and returned.
        """
        config, summary = self.config, self.summary
        started = time.perf_counter()
        main = is_main()
        if main:
            (config.out / SUMMARY).unlink(missing_ok=True)
            self._write_config()
        for note in self.program.notes():
            self.console.print(note, markup=False, highlight=False, soft_wrap=True)
        with (
            MetricsWriter(config.out, tensorboard=config.tensorboard, active=main) as writer,
            make_progress(self.console, self.name, summary.planned_steps) as progress,
        ):
            try:
                self._loop(writer, progress)
                summary.status = "finished"
            except NonFiniteLossError as error:
                summary.status, summary.message = "non_finite", str(error)
            except KeyboardInterrupt:
                summary.message = f"Interrupted after step {summary.steps}."
            summary.total_seconds = time.perf_counter() - started
            if main:
                write_json(config.out / SUMMARY, summary.to_dict())
        return summary

    def _loop(self, writer: MetricsWriter, progress: Progress) -> None:
        settings, program, summary = self.settings, self.program, self.summary
        compiled_before = program.compile_seconds
        program.compile(detailed=settings.statistics_every > 0)
        summary.compile_seconds = program.compile_seconds - compiled_before
        state = program.init(settings.seed)
        clock = StepClock()
        pending: list[StepMetrics] = []
        clock.start()
        for step in range(1, settings.steps + 1):
            detailed = settings.statistics_every > 0 and step % settings.statistics_every == 0
            if detailed and pending:
                # So that the median step time is that of ordinary steps.
                jax.block_until_ready(pending[-1])
                clock.stop(ordinary=True)
                clock.start()
            state, metrics, numbers = program.step(
                state, next(self.batches), settings.learning_rate, detailed=detailed
            )
            pending.append(metrics)
            clock.count()
            evaluates = step % settings.eval_every == 0 or step == settings.steps
            if step % settings.log_every and not evaluates:
                continue
            fetched, numbers = jax.device_get((pending, numbers))  # waits for the device
            clock.stop(ordinary=not detailed)
            pending = []
            self._record(step, fetched, numbers, clock, writer, progress)
            if evaluates:
                self._evaluate(step, state.params, writer, progress)
            clock.start()

    def _record(
        self,
        step: int,
        fetched: Sequence[StepMetrics],
        numbers: dict[str, np.ndarray],
        clock: StepClock,
        writer: MetricsWriter,
        progress: Progress,
    ) -> None:
        """Checks and writes what the steps since the last log line reported."""
        settings, summary = self.settings, self.summary
        first = step - len(fetched) + 1
        for offset, metrics in enumerate(fetched):
            if not math.isfinite(metrics.loss) or not math.isfinite(metrics.grad_norm):
                summary.steps = first + offset
                summary.tokens = summary.steps * settings.tokens_per_step
                values = {name: float(value) for name, value in metrics._asdict().items()}
                writer.write("non_finite", summary.steps, values)
                raise NonFiniteLossError(summary.steps, metrics, settings)
        seconds, steps = clock.interval()
        seconds_left = (settings.steps - step) * clock.seconds / clock.steps
        summary.steps, summary.tokens = step, step * settings.tokens_per_step
        summary.train_loss = float(np.mean([metrics.loss for metrics in fetched]))
        summary.tokens_per_second = summary.tokens / clock.seconds
        summary.median_step_seconds = clock.median()
        last = fetched[-1]
        line = {
            "loss": summary.train_loss,
            "loss_last": float(last.loss),
            "grad_norm": float(last.grad_norm),
            "learning_rate": float(last.learning_rate),
            "tokens": summary.tokens,
            "tokens_per_second": settings.tokens_per_step * steps / seconds,
            "seconds": clock.seconds,
        }
        writer.write("train", step, line)
        if numbers:
            writer.write("statistics", step, {key: float(v) for key, v in numbers.items()})
        progress.update(
            step,
            loss=line["loss"],
            tokens_per_second=line["tokens_per_second"],
            rate=line["learning_rate"],
            remaining=seconds_left,
        )

    def _evaluate(self, step: int, params: Any, writer: MetricsWriter, progress: Progress) -> None:
        summary = self.summary
        loss, tokens = self.program.evaluate(params, self.heldout)
        summary.heldout_loss, summary.heldout_tokens, summary.heldout_step = loss, tokens, step
        line = {"loss": loss, "perplexity": perplexity(loss), "tokens": summary.tokens}
        writer.write("heldout", step, line)
        progress.note(
            f"{self.name} step {step}: held-out loss {loss:.4f}, "
            f"perplexity {line['perplexity']:.3f}"
        )

    def _write_config(self) -> None:
        write_json(
            self.config.out / CONFIG,
            {
                "config": jsonable(self.config),
                "settings": jsonable(self.settings),
                "data": self.dataset.describe(),
                "mesh": self.program.describe_mesh(),
                "versions": versions(),
                "command": command_line(self.module),
            },
        )


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient is NaN or infinite."""

    def __init__(self, step: int, metrics: StepMetrics, settings: Settings):
        super().__init__(
            f"Step {step}: the loss is {float(metrics.loss):.4g} and the gradient's norm "
            f"{float(metrics.grad_norm):.4g} at learning rate {float(metrics.learning_rate):.3g} "
            f"(peak {settings.learning_rate:g}). Stopped; a lower --learning-rate or a longer "
            "--warmup-fraction may help."
        )


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuses a folder that holds a finished run.

    Raises:
        FileExistsError: It does, and `overwrite` is not set.
    """
    summary = read_json(folder / SUMMARY)
    if summary is not None and summary.get("status") == "finished" and not overwrite:
        raise FileExistsError(
            f"{folder} holds a finished run; give another --out, or --overwrite to replace it."
        )


def check_vocabulary(dataset: Dataset, settings: Settings) -> None:
    """Refuses data whose tokens the model has no embedding for.

    Raises:
        ValueError: The tokenizer has more tokens than the model.
    """
    if dataset.vocab_size > settings.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {dataset.vocab_size} tokens, the model {settings.model.vocab_size}; "
            f"give --vocab-size {dataset.vocab_size}"
        )


if __name__ == "__main__":
    sys.exit(main())
