"""One training run: prepared, trained, and written down."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console

from examples.llama.data.batches import heldout_batches, train_iterator
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
    read_json,
    versions,
    write_json,
)
from examples.llama.reporting.folders import check_output
from examples.llama.reporting.metrics import MetricsWriter
from examples.llama.reporting.progress import make_progress
from examples.llama.reporting.summary import RunSummary, summary_table
from examples.llama.reporting.wandb_run import check_wandb
from examples.llama.training.checkpoints import (
    Checkpoints,
    SaveError,
    checkpoint_steps,
)
from examples.llama.training.config import TrainConfig, data_config, resolve
from examples.llama.training.migrations import parse_migrations
from examples.llama.training.notes import rank_note
from examples.llama.training.orbax_noise import quiet_orbax
from examples.llama.training.program import Program
from examples.llama.training.recorder import NonFiniteLossError, Recorder
from examples.llama.training.replacement import Replacement, locked, recover
from examples.llama.training.resume import (
    check_folder_holds,
    describe_run,
    differences,
    restore_newest,
)
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
"""What the process returns for each status of a run."""


def train(config: TrainConfig, **arguments: Any) -> RunSummary:
    """Prepares and trains; see `Run` for the arguments and errors."""
    return Run(config, **arguments).train()


def run_command(
    config: C, make_run: Callable[[C, Console], Run], usage_errors: tuple[type[Exception], ...]
) -> int:
    """Starts the devices, prepares a run with all processes, trains, and shows how it ended.

    Args:
        config: What the command line asked for.
        make_run: Makes the run from the configuration and a console.
        usage_errors: Exceptions of the training that the user's arguments or files cause: one line says what
            they say. Any other is raised, after this process has told the others to end.

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
        # What the others were told to wait for does not come, unless all of them see the same.
        if jax.process_count() > 1 and isinstance(error, OSError):
            abort()
        return fail(error, type(config))
    except Exception:
        if jax.process_count() > 1:
            abort()
        raise
    console.print(summary_table(summary))
    console.print(f"Written to {run.config.out}", markup=False, highlight=False, soft_wrap=True)
    if summary.message:
        errors.print(summary.message, markup=False, soft_wrap=True)
    return EXIT_CODES[summary.status]


def prepared(config: C, console: Console, make_run: Callable[[C, Console], Run]) -> Run:
    """A run that every process can begin with the same settings and data; see `Run` for the errors."""
    run, problem = None, None
    try:
        run = make_run(config, console)
    except (ValueError, OSError) as error:
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
        FileExistsError: The folder holds a run, and neither `resume` nor `overwrite` is set.
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
        check_wandb(config.wandb)
        check_output(config.out, "run", self.inputs())
        if is_main():
            recover(config.out)
        check_folder(config.out, overwrite=config.overwrite, resume=config.resume)
        self.dataset = prepare_data(data_config(config, settings)) if dataset is None else dataset
        check_vocabulary(self.dataset, settings)
        self.migrations = parse_migrations(config.migrate)
        if config.resume:
            check_folder_holds(config.out, self.describe(), self.migrations)
        self.checkpoint_every = (
            settings.eval_every if config.checkpoint_every is None else config.checkpoint_every
        )
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

    def inputs(self) -> dict[str, str]:
        """Files and folders that the run reads, by flag; its own folder must be none of them."""
        return {"--data": self.config.data}

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

    def describe(self) -> dict[str, Any]:
        """What must be the same when a run goes on from a checkpoint."""
        return describe_run(self.settings, self.dataset.describe())

    def train(self) -> RunSummary:
        """Trains to the end, to too many steps that are not finite, to a signal or to a save that fails.

        Whichever it is, the summary of what was reached is written and returned.

        Raises:
            ResumeError: None of the checkpoints to resume from is whole, or they are of another run.
            SchemaError: They are of another schema.
            MigrationError: They do not have what the migration needs.
        """
        config, summary = self.config, self.summary
        started, main = time.perf_counter(), is_main()
        rank = rank_note(self.settings, self.program.abstract_params)
        for note in (*self.program.notes(), *([rank] if rank else [])):
            self._say(note)
        with ExitStack() as stack:
            stack.enter_context(locked(config.out, force=config.force_unlock))
            replaces = config.overwrite and not config.resume
            replacement = stack.enter_context(
                Replacement(config.out, replace=replaces, active=main)
            )
            stop = stack.enter_context(StopSignals(terminate=self.checkpoint_every > 0))
            checkpoints = self._open_checkpoints()
            restored = self._restore(checkpoints)
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
                if checkpoints is not None:
                    summary.total_seconds = before + time.perf_counter() - started
                    writer.sync()
                    evaluated = summary.heldout_step == summary.steps
                    loss = summary.heldout_loss if evaluated else None
                    checkpoints.save(state, self._record(recorder), loss)

            try:
                with _closing(checkpoints):
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

        `begun` is called when the step is compiled and the state is there.
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
                # So that the median step time is that of ordinary steps.
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
            # After a step that failed the parameters may be what is wrong: the older checkpoint stays.
            if (saves and not recorder.skipped_in_row) or stops:
                save(state)
            if stops:
                break
            recorder.clock.start()

    def _open_checkpoints(self) -> Checkpoints | None:
        config = self.config
        if not (self.checkpoint_every or (config.resume and checkpoint_steps(config.out))):
            return None
        return Checkpoints(config.out, keep_last=config.keep_last, keep_best=config.keep_best)

    def _restore(self, checkpoints: Checkpoints | None) -> tuple[TrainState, dict[str, Any]] | None:
        """The state and record to go on from, if there is one; the batches go on from there too."""
        if checkpoints is None or not self.config.resume:
            return None
        found = restore_newest(
            checkpoints, self.program, self.describe(), self.migrations, self._say
        )
        if found is None:
            self._say(f"{self.name}: no checkpoint in {self.config.out}, training begins")
            return None
        _, record = found
        self.batches.set_state(record["data_iterator"])
        self._say(f"{self.name}: resumed from step {record['step']}")
        if changes := differences(record["versions"], jsonable(versions())):
            self._say(f"Since then: {'; '.join(map(str, changes))}.")
        return found

    def _record(self, recorder: Recorder) -> dict[str, Any]:
        """What a checkpoint holds beside the train state."""
        return {
            "run": self.describe(),
            "settings": self.settings,
            "data": self.dataset.describe(),
            "mesh": self.program.describe_mesh(),
            "versions": versions(),
            "data_iterator": self.batches.get_state(),
            "progress": recorder.to_dict(),
        }

    def _conclude(self, stop: StopSignals) -> None:
        """Says in the summary how the run ended: at its last step, or at a signal before it."""
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
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

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
        # So that the run can be generated from and fine-tuned without its data.
        self.dataset.tokenizer.save(str(self.config.out / TOKENIZER))


@contextmanager
def _closing(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Closes the checkpoints at the end, unless that could mean to wait for a process that is gone."""
    try:
        yield
    except BaseException as error:
        alone = jax.process_count() == 1 or isinstance(error, NonFiniteLossError)
        if checkpoints is not None and alone:
            checkpoints.close()
        raise
    if checkpoints is not None:
        checkpoints.close()


def check_folder(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuses a folder that holds a finished run, or checkpoints of one that is not.

    Raises:
        FileExistsError: It does, and neither `overwrite` nor `resume` is set.
    """
    if overwrite or resume:
        return
    summary = read_json(folder / SUMMARY)
    if summary is not None and summary.get("status") == "finished":
        raise FileExistsError(
            f"{folder} holds a finished run; give another --out, or --overwrite to replace it."
        )
    if steps := checkpoint_steps(folder):
        raise FileExistsError(
            f"{folder} holds a run with checkpoints up to step {steps[0]}; --resume goes on, "
            "--overwrite replaces it."
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
