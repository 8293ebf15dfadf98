"""One training run: preparation, training, and records."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import jax
from rich.console import Console

from examples.llama.data.batches import Batch, heldout_batches, train_iterator
from examples.llama.data.dataset import Dataset, prepare_data
from examples.llama.devices.processes import (
    ClusterConfig,
    abort,
    agree,
    finish,
    is_main,
    start_devices,
)
from examples.llama.devices.stop_signals import StopSignals
from examples.llama.model.config import LlamaConfig
from examples.llama.reporting.command import fail
from examples.llama.reporting.files import (
    CONFIG,
    SUMMARY,
    command_line,
    jsonable,
    versions,
    write_json,
)
from examples.llama.reporting.metrics import MetricsWriter
from examples.llama.reporting.progress import make_progress, say
from examples.llama.reporting.summary import RunSummary, summary_table
from examples.llama.reporting.wandb_run import check_wandb
from examples.llama.training.checkpoints import SaveError, checkpoint_steps
from examples.llama.training.config import TrainConfig, data_config, resolve
from examples.llama.training.migrations import parse_migrations
from examples.llama.training.notes import quiet_rank_warning, settings_notes
from examples.llama.training.orbax_noise import quiet_orbax
from examples.llama.training.program import Program
from examples.llama.training.recorder import NonFiniteLossError, Recorder
from examples.llama.training.replacement import Replacement, claim_folder, locked
from examples.llama.training.resume import RunCheckpoints, check_folder_holds, describe_run
from examples.llama.training.settings import Settings
from examples.llama.training.step import TrainState

C = TypeVar("C", bound=ClusterConfig)

INTERRUPTED_EXIT = 130
TOKENIZER = "tokenizer.json"
EXIT_CODES = {
    "finished": 0,
    "preempted": 0,
    "interrupted": INTERRUPTED_EXIT,
    "non_finite": 1,
    "save_failed": 1,
}
"""The exit status of the process for each status of a run."""


def train(config: TrainConfig, **arguments: Any) -> RunSummary:
    """Prepares and trains; see `prepare_run` for the arguments and errors."""
    return prepare_run(config, **arguments).train()


def prepare_run(
    config: TrainConfig,
    *,
    model: LlamaConfig | None = None,
    dataset: Dataset | None = None,
    program: Program | None = None,
    console: Console | None = None,
    name: str | None = None,
) -> Run:
    """A run on text, checked and ready to start.

    Args:
        config: The configuration.
        model: A shape to use instead of the preset's.
        dataset: Prepared data to use instead of reading it.
        program: A compiled program to reuse if it fits.
        console: Where to show progress; by default standard output.
        name: The run's name in the display; by default the optimizer's name.

    Raises:
        ValueError: The configuration, the data or the batch cannot be used.
        FileExistsError: The folder holds a run, without `resume` or `overwrite`.
    """
    settings = resolve(config, model)
    check_wandb(config.wandb)
    claim_folder(
        config.out, {"--data": config.data}, overwrite=config.overwrite, resume=config.resume
    )
    dataset = prepare_data(data_config(config, settings)) if dataset is None else dataset
    if program is None or not program.serves(settings):
        program = Program(settings)
    share, parts = program.share_of_batch(), settings.accumulate
    batches = train_iterator(dataset, settings.batch_size, settings.seq_len, settings.seed, **share)
    heldout = heldout_batches(
        dataset,
        settings.batch_size // parts,
        settings.seq_len,
        settings.eval_batches * parts,
        **share,
    )
    return Run(config, settings, dataset, program, batches, heldout, console=console, name=name)


def run_command(
    config: C, make_run: Callable[[C, Console], Run], usage_errors: tuple[type[Exception], ...]
) -> int:
    """Starts the devices, prepares a run with all processes, trains, and shows the result.

    Args:
        config: The command line's configuration.
        make_run: Makes the run from the configuration and a console.
        usage_errors: Exceptions of the training that the user's arguments or files cause; their message is
            shown in
            one line. Others are raised after this process has told the other processes to end.

    Returns:
        The exit status.
    """
    quiet_orbax()
    errors = Console(stderr=True)
    try:
        config = start_devices(config)
    except (ValueError, RuntimeError) as error:
        return fail(error, type(config))
    console = Console(quiet=not is_main())
    try:
        run = prepared(config, console, make_run)
    except (ValueError, OSError) as error:
        return fail(error, type(config))
    try:
        summary = run.train()
        finish()
    except (*usage_errors, OSError) as error:
        # The other processes wait for this one, unless all of them see the same error.
        if jax.process_count() > 1 and isinstance(error, OSError):
            abort()
        return fail(error, type(config))
    except Exception:
        if jax.process_count() > 1:
            abort()
        raise
    console.print(summary_table(summary))
    say(console, f"Written to {run.config.out}")
    if summary.message:
        errors.print(summary.message, markup=False, soft_wrap=True)
    return EXIT_CODES[summary.status]


def prepared(config: C, console: Console, make_run: Callable[[C, Console], Run]) -> Run:
    """A run that every process can start with the same settings and data; see `prepare_run` for the errors."""
    run, problem = None, None
    try:
        run = make_run(config, console)
    except (ValueError, OSError) as error:
        problem = error
    agree(problem, "" if run is None else run.identity())
    assert run is not None
    return run


class Run:
    """One training run, checked and ready to start; `prepare_run` makes one from a configuration.

    Args:
        config: The trainer's configuration: folder, checkpoints, display.
        settings: The settings.
        data: The data of the batches: `describe()`, `tokenizer`, `vocab_size`, `corpus_sha256` and `notes`.
        program: The program.
        batches: Its training batches, an iterator with `get_state` and `set_state`.
        heldout: The batches of an evaluation.
        asked: The configuration to record if it is not `config`.
        sections: Further sections of config.json, by name.
        identity: What a resumed run must keep, besides settings and data.
        module: The module of the command line.
        console: Where to show progress; by default standard output.
        name: The run's name in the display; by default the optimizer's name.
        notes: Notes for the run's user; by default on its settings.

    Raises:
        ValueError: The data has more tokens than the model, or the folder holds another run.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: Settings,
        data: Any,
        program: Program,
        batches: Any,
        heldout: Sequence[Batch],
        *,
        asked: Any = None,
        sections: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        module: str = "examples.llama.train",
        console: Console | None = None,
        name: str | None = None,
        notes: Sequence[str] | None = None,
    ):
        quiet_rank_warning()
        self.config, self.settings, self.data = config, settings, data
        self.program, self.batches, self.heldout = program, batches, heldout
        self.console = console or Console()
        self.name = name or settings.optimizer
        self._asked = config if asked is None else asked
        self._sections, self._identity, self._module = sections or {}, identity or {}, module
        self.notes = settings_notes(settings, program.abstract_params) if notes is None else notes
        check_vocabulary(data, settings)
        if config.resume:
            check_folder_holds(config.out, self.describe(), parse_migrations(config.migrate))
        self.checkpoint_every = (
            settings.eval_every if config.checkpoint_every is None else config.checkpoint_every
        )
        self.summary = RunSummary(
            status="interrupted",
            preset=config.preset,
            optimizer=settings.optimizer,
            learning_rate=settings.learning_rate,
            rate_source=settings.rate_source,
            seed=settings.seed,
            planned_steps=settings.steps,
            parameters=program.parameter_count(),
            optimizer_state_bytes=program.state_bytes(),
            device_state_bytes=program.state_bytes_per_device(),
            adamw_state_bytes=program.adamw_state_bytes(),
            corpus_sha256=data.corpus_sha256,
        )

    def identity(self) -> str:
        """What all processes of a run must agree on: settings, data and versions."""
        known = versions()
        del known["platform"]
        parts = {"settings": self.settings, "data": self.data.describe(), "versions": known}
        return json.dumps(jsonable(parts), sort_keys=True)

    def describe(self) -> dict[str, Any]:
        """What a run that resumes from a checkpoint must keep."""
        return describe_run(self.settings, self.data.describe()) | dict(self._identity)

    def train(self) -> RunSummary:
        """Trains to the end, to too many non-finite steps, to a signal or to a failed save.

        In each case it writes and returns a summary of the progress.

        Raises:
            ResumeError: No checkpoint to resume from is whole, or the checkpoints belong to another run.
            SchemaError: They have another schema.
            MigrationError: They lack what the migration needs.
        """
        config, summary = self.config, self.summary
        started, main = time.perf_counter(), is_main()
        for note in (*self.program.notes(), *self.data.notes, *self.notes):
            self._say(note)
        with ExitStack() as stack:
            stack.enter_context(locked(config.out, force=config.force_unlock))
            replaces = config.overwrite and not config.resume
            replacement = stack.enter_context(
                Replacement(config.out, replace=replaces, active=main)
            )
            stop = stack.enter_context(StopSignals(terminate=self.checkpoint_every > 0))
            checkpoints = RunCheckpoints(
                config,
                self.checkpoint_every,
                self.program,
                self.batches,
                run=self.describe(),
                record=self._facts(),
                name=self.name,
                say=self._say,
            )
            restored = checkpoints.restore()
            if main:
                (config.out / SUMMARY).unlink(missing_ok=True)
                self._write_config()
            writer = stack.enter_context(
                MetricsWriter(
                    config.out,
                    tensorboard=config.tensorboard,
                    active=main,
                    wandb=config.wandb,
                    keep_until=None if restored is None else restored[1]["step"],
                )
            )
            progress = stack.enter_context(
                make_progress(self.console, self.name, summary.planned_steps)
            )
            recorder = Recorder(
                summary, self.settings, config.max_skipped, writer, progress, self.name
            )
            if restored is not None:
                recorder.go_on_from(restored[1]["progress"])
            before = summary.total_seconds

            def save(state: TrainState) -> None:
                summary.total_seconds = before + time.perf_counter() - started
                writer.sync()
                evaluated = summary.heldout_step == summary.steps
                loss = summary.heldout_loss if evaluated else None
                checkpoints.save(state, recorder.to_dict(), loss)

            try:
                with checkpoints:
                    state = None if restored is None else restored[0]
                    self._loop(recorder, stop, save, state, begun=replacement.commit)
                self._conclude(stop)
            except NonFiniteLossError as error:
                left = checkpoint_steps(config.out)
                last = f" The last checkpoint is that of step {left[0]}." if left else ""
                summary.status, summary.message = "non_finite", f"{error}{last}"
            except SaveError as error:
                summary.status, summary.message = "save_failed", f"{error} Free space and --resume."
            except KeyboardInterrupt:
                summary.message = f"Interrupted after step {summary.steps}."
            summary.total_seconds = before + time.perf_counter() - started
            if main:
                write_json(config.out / SUMMARY, summary.to_dict())
        return summary

    def _loop(
        self,
        recorder: Recorder,
        stop: StopSignals,
        save: Callable[[TrainState], None],
        state: TrainState | None,
        *,
        begun: Callable[[], None],
    ) -> None:
        """Trains from a state, or from the beginning, to the last step or to a signal.

        It calls `begun` when the step is compiled and the state exists.
        """
        settings, program, summary = self.settings, self.program, self.summary
        if summary.steps >= settings.steps:
            return
        compiled_before = program.compile_seconds
        program.compile(detailed=settings.statistics_every > 0)
        summary.compile_seconds += program.compile_seconds - compiled_before
        state = program.init(settings.seed) if state is None else state
        begun()
        recorder.clock.start()
        for step in range(summary.steps + 1, settings.steps + 1):
            detailed = settings.statistics_every > 0 and step % settings.statistics_every == 0
            if detailed:
                # So that the median step time counts only ordinary steps.
                recorder.split()
            state, metrics, numbers = program.step(
                state, next(self.batches), settings.learning_rate, detailed=detailed
            )
            recorder.add(metrics)
            last, stops = step == settings.steps, stop.should_stop(step)
            evaluates = step % settings.eval_every == 0 or last
            logs = step % settings.log_every == 0 or evaluates
            saves = self.checkpoint_every > 0 and (step % self.checkpoint_every == 0 or last)
            if not (logs or saves or stops):
                continue
            recorder.fetch(step, ordinary=not detailed)
            if logs:
                recorder.write(numbers)
            if evaluates:
                recorder.evaluated(*program.evaluate(state.params, self.heldout))
            # After a failed step the parameters may be the cause, so the older checkpoint stays.
            if (saves and not recorder.skipped_in_row) or stops:
                save(state)
            if stops:
                break
            recorder.clock.start()

    def _conclude(self, stop: StopSignals) -> None:
        """Records in the summary how the run ended: at its last step, or at a signal before it."""
        summary = self.summary
        if summary.steps >= self.settings.steps:
            summary.status = "finished"
            if summary.skipped >= summary.steps:
                summary.status = "non_finite"
                summary.message = (
                    f"None of the {summary.steps} steps changed anything: each had a loss or a gradient that "
                    "is not finite. A lower --learning-rate may help, or other weights to start from."
                )
            return
        saved = f", saved. The same command with --resume goes on from there, in {self.config.out}"
        saved = saved if self.checkpoint_every else ""
        if stop.received == signal.SIGTERM:
            summary.status = "preempted"
            summary.message = f"SIGTERM: stopped after step {summary.steps}{saved}."
        else:
            summary.message = f"Interrupted after step {summary.steps}{saved}."

    def _say(self, text: str) -> None:
        say(self.console, text)

    def _facts(self) -> dict[str, Any]:
        """The description of the run for config.json and every checkpoint."""
        return {
            "settings": jsonable(self.settings),
            "data": self.data.describe(),
            "mesh": self.program.describe_mesh(),
            "versions": versions(),
        }

    def _write_config(self) -> None:
        write_json(
            self.config.out / CONFIG,
            {
                "config": jsonable(self._asked),
                **self._facts(),
                "command": command_line(self._module),
                **self._sections,
            },
        )
        # For generation and fine-tuning without the run's data.
        self.data.tokenizer.save(str(self.config.out / TOKENIZER))


def check_vocabulary(dataset: Any, settings: Settings) -> None:
    """Refuses data with more tokens than the model has embeddings.

    Raises:
        ValueError: The tokenizer has more tokens than the model.
    """
    if dataset.vocab_size > settings.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {dataset.vocab_size} tokens, the model {settings.model.vocab_size}; "
            f"give --vocab-size {dataset.vocab_size}"
        )
