"""Resumes from a checkpoint: finds it, checks that it is of the same run, and applies migrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from examples.llama.devices.mesh import with_sharding
from examples.llama.reporting.files import jsonable, versions
from examples.llama.training.checkpoints import CheckpointError, Checkpoints, checkpoint_steps
from examples.llama.training.config import TrainConfig
from examples.llama.training.migrations import (
    MIGRATIONS,
    migrate_layers,
    migrate_ranks,
    parse_migrations,
)
from examples.llama.training.program import Program
from examples.llama.training.recorder import NonFiniteLossError
from examples.llama.training.settings import Settings
from examples.llama.training.step import TrainState

FREE = frozenset(
    {
        *("rate_source", "eval_every", "eval_batches", "log_every", "statistics_every"),
        *("remat", "loss_chunk", "accumulate", "mesh", "mesh_mode", "mesh_strict"),
    }
)
"""Settings that a resumed run may change: they only affect logs, or the numbers by rounding."""

DATA = (
    *("corpus_sha256", "tokenizer_sha256", "vocab_size", "train_tokens", "heldout_tokens"),
    *("heldout_fraction", "seed"),
)
"""The fields of `Dataset.describe` that identify data; its path may change."""


class ResumeError(ValueError):
    """A run cannot continue from its folder; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class Difference:
    """A setting that changed.

    Attributes:
        name: Its name, with dots for nested fields.
        saved: The value in the checkpoint.
        asked: The value of the new run.
    """

    name: str
    saved: Any
    asked: Any

    @property
    def migration(self) -> str | None:
        """The migration that allows the change, or None."""
        return next((key for key, names in MIGRATIONS.items() if self.name in names), None)

    def __str__(self) -> str:
        return f"{self.name} is {self.asked!r} and was {self.saved!r}"


class RunCheckpoints:
    """The checkpoints of one run: the one it resumes from, and those it writes.

    As a context manager it closes them at the end of training, unless that could wait for a process that
    has died.

    Args:
        config: The run's folder, and what to keep there.
        every: Steps between checkpoints; 0 saves nothing.
        program: The run's program.
        batches: Its training batches, whose position is part of a checkpoint.
        run: The run's description, from `describe_run`.
        record: Further data to store with the train state.
        name: The run's name in messages.
        say: Shows a line.
    """

    def __init__(
        self,
        config: TrainConfig,
        every: int,
        program: Program,
        batches: Any,
        *,
        run: Mapping[str, Any],
        record: Mapping[str, Any],
        name: str,
        say: Callable[[str], None],
    ):
        self._resume, self._out = config.resume, config.out
        self._migrations = parse_migrations(config.migrate)
        self._program, self._batches = program, batches
        self._run, self._fixed = run, record
        self._name, self._say = name, say
        self._checkpoints: Checkpoints | None = None
        if every or (config.resume and checkpoint_steps(config.out)):
            self._checkpoints = Checkpoints(
                config.out, keep_last=config.keep_last, keep_best=config.keep_best
            )

    def restore(self) -> tuple[TrainState, dict[str, Any]] | None:
        """The state and record to resume from, or None; the batches move to the same position.

        Raises:
            ResumeError, SchemaError, MigrationError: See `restore_newest`.
        """
        if self._checkpoints is None or not self._resume:
            return None
        found = restore_newest(
            self._checkpoints, self._program, self._run, self._migrations, self._say
        )
        if found is None:
            self._say(f"{self._name}: no checkpoint in {self._out}, training begins")
            return None
        record = found[1]
        self._batches.set_state(record["data_iterator"])
        self._say(f"{self._name}: resumed from step {record['step']}")
        if changes := differences(record["versions"], jsonable(versions())):
            self._say(f"Since then: {'; '.join(map(str, changes))}.")
        return found

    def save(self, state: TrainState, progress: Mapping[str, Any], loss: float | None) -> None:
        """Saves a step, in the background.

        Args:
            state: The train state.
            progress: The state that the recorder resumes from.
            loss: The held-out loss of this step, if it was evaluated.

        Raises:
            SaveError: This save or the previous one failed.
        """
        if self._checkpoints is None:
            return
        record = {
            "run": self._run,
            **self._fixed,
            "data_iterator": self._batches.get_state(),
            "progress": progress,
        }
        self._checkpoints.save(state, record, loss)

    def close(self) -> None:
        """Waits for running saves, and closes."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # With several processes, one that failed alone would wait for the others forever.
        if error is None or jax.process_count() == 1 or isinstance(error, NonFiniteLossError):
            self.close()


def describe_run(settings: Settings, data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and data that a resumed run must keep, by name."""
    flat = _flatten(jsonable(settings))
    flat |= {f"data.{name}": jsonable(data).get(name) for name in DATA}
    return {name: value for name, value in flat.items() if name not in FREE}


def differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Difference]:
    """The differences of two descriptions; a missing name counts as None.

    >>> [str(d) for d in differences({"optimizer": "lion", "rank": 4}, {"optimizer": "lion"})]
    ['rank is None and was 4']
    """
    names = {**saved, **asked}
    rows = [Difference(name, saved.get(name), asked.get(name)) for name in names]
    return [row for row in rows if row.saved != row.asked]


def check_same_run(
    saved: Mapping[str, Any], asked: Mapping[str, Any], migrations: Sequence[str], folder: Path
) -> list[Difference]:
    """Refuses to continue another run; returns the requested differences.

    Raises:
        ResumeError: There are other differences; the message names each with both values.
    """
    found = differences(saved, asked)
    refused = [row for row in found if row.migration not in migrations]
    if refused:
        hints = sorted({row.migration for row in refused if row.migration})
        said = "; ".join(map(str, refused))
        if not all(row.migration for row in refused):
            # The others would be refused anyway.
            said, hints = "; ".join(map(_with_migration, refused)), []
        how = f"give the run's own options or another --out{_or_migrate(hints)}"
        raise ResumeError(f"{folder} holds another run: {said}; {how}")
    return found


def restore_newest(
    checkpoints: Checkpoints,
    program: Program,
    asked: Mapping[str, Any],
    migrations: Sequence[str],
    say: Callable[[str], None],
) -> tuple[TrainState, dict[str, Any]] | None:
    """The state and record of the newest whole checkpoint, in the form that a program needs.

    Damaged ones move to the folder `damaged-checkpoints`, with a message.

    Args:
        checkpoints: The run's checkpoints.
        program: The program that resumes; on a mesh its arrays get its shardings, from any mesh.
        asked: The new run's description, from `describe_run`.
        migrations: The requested names of `MIGRATIONS`.
        say: Shows a line.

    Returns:
        None if there is no checkpoint.

    Raises:
        ResumeError: All are damaged, or the newest whole one belongs to another run.
        SchemaError: It has another schema.
        MigrationError: Its state has no counterpart in the requested form.
    """
    steps = checkpoints.steps()
    for step in steps:
        try:
            record = checkpoints.record(step)
            changed = check_same_run(record["run"], asked, migrations, checkpoints.out)
            state = _restored(checkpoints, step, program, changed)
        except CheckpointError as error:
            where = checkpoints.set_aside(step)
            say(f"The checkpoint of step {step} is damaged: {error}. Moved to {where}.")
            continue
        for row in changed:
            say(f"Migrated: {row}.")
        return state, record
    if steps:
        raise ResumeError(
            f"none of the {len(steps)} checkpoints in {checkpoints.folder} is whole; --overwrite starts "
            "the run over"
        )
    return None


def check_folder_holds(out: Path, asked: Mapping[str, Any], migrations: Sequence[str]) -> None:
    """Refuses a folder whose newest readable checkpoint belongs to another run, before anything is compiled.

    Raises:
        ResumeError: It belongs to another run.
        SchemaError: It has another schema.
    """
    if not checkpoint_steps(out):
        return
    with Checkpoints(out, read_only=True) as checkpoints:
        for step in checkpoints.steps():
            try:
                record = checkpoints.record(step)
            except CheckpointError:
                continue
            check_same_run(record["run"], asked, migrations, checkpoints.out)
            return


def target(program: Program) -> TrainState:
    """Shapes, dtypes and, on a mesh, shardings of a program's train state."""
    if program.state_shardings is None:
        return program.abstract_state
    return jax.tree.map(with_sharding, program.abstract_state, program.state_shardings)


def _restored(
    checkpoints: Checkpoints, step: int, program: Program, changed: Sequence[Difference]
) -> TrainState:
    """The state of one checkpoint, migrated."""
    saved = {row.name: row.saved for row in changed}
    asked = {row.migration for row in changed}
    if not asked & {"layers", "rank"}:
        return checkpoints.restore(step, target(program))
    settings = program.settings
    ranks = {
        name.removeprefix("options."): saved[name] for name in MIGRATIONS["rank"] if name in saved
    }
    old_ranks = dataclasses.replace(
        settings, options=dataclasses.replace(settings.options, **ranks)
    )
    old = old_ranks
    if "layers" in asked:
        old = dataclasses.replace(old, scan_layers=saved["scan_layers"])
    state = checkpoints.restore(step, target(Program(old)))
    if "layers" in asked:
        like = target(Program(old_ranks))
        shardings = None
        if program.state_shardings is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        state = jax.jit(lambda state: migrate_layers(state, like), out_shardings=shardings)(state)
    if "rank" in asked:
        state = migrate_ranks(state, settings, program.abstract_state)
        if program.state_shardings is not None:
            state = jax.device_put(state, program.state_shardings)
    return state


def _with_migration(row: Difference) -> str:
    return f"{row} (--migrate {row.migration} allows that)" if row.migration else str(row)


def _or_migrate(hints: Sequence[str]) -> str:
    return f", or ask for the change with --migrate {','.join(hints)}" if hints else ""


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens a nested mapping to dotted names, without entries that are None."""
    if not isinstance(value, Mapping):
        return {} if value is None else {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat
