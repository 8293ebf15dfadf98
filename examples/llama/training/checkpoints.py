"""Checkpoints of a run: their content, saving in the background, and verification on reading.

A checkpoint has two items. `state` is the train state (parameters, optimizer state, counts), as Orbax stores
arrays. `run` is one JSON record: schema version, step, settings, data, versions, the position in the data, the
counters from which logs continue, and a fingerprint of every array. See docs/checkpoints.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers

from examples.llama.reporting.files import jsonable
from examples.llama.training.fingerprint import fingerprints
from examples.llama.training.step import TrainState

SCHEMA = 1
"""Version of a checkpoint's content; a content that old programs cannot read gets a new number."""

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged-checkpoints"
"""Names of a run's folders of checkpoints and of damaged checkpoints."""

_STATE, _RUN, _LOSS = "state", "run", "heldout_loss"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names it and the reason."""


class SchemaError(ValueError):
    """A checkpoint has a schema that this program does not read."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; the message names it, the reason, and what remains."""


class Checkpoints:
    """The checkpoints of one run; it keeps the newest and the best.

    Saving copies the arrays and returns; they are written in the background, under a temporary name
    until all is on disk. An error there is raised by the next call of `save`, `wait` or `close`.

    Args:
        out: The run's folder; the checkpoints are in its folder `checkpoints`.
        keep_last: Number of newest checkpoints to keep.
        keep_best: Number of checkpoints of least held-out loss to keep as well.
        read_only: Whether to only read, and not touch what an active run may be writing.
    """

    def __init__(
        self, out: Path, *, keep_last: int = 2, keep_best: int = 1, read_only: bool = False
    ):
        self.out = out.absolute()
        self.folder = self.out / FOLDER
        policies: list[Any] = [checkpoint_managers.LatestN(n=keep_last)]
        if keep_best:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[_LOSS],
                    reverse=True,
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._saving: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps of the completely written checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(
        self, state: TrainState, record: Mapping[str, Any], heldout_loss: float | None = None
    ) -> None:
        """Starts to save a state; the caller may change or donate the arguments as soon as this returns.

        Args:
            state: The train state.
            record: Further data to store, as JSON.
            heldout_loss: The held-out loss at this very step, if it was evaluated.

        Raises:
            SaveError: This checkpoint or the one before could not be written.
        """
        self.wait()
        step = int(state.step)
        whole = {
            **jsonable(record),
            "schema": SCHEMA,
            "step": step,
            "fingerprints": fingerprints(state),
        }
        whole["sha256"] = _digest(whole)
        args = ocp.args.Composite(
            **{_STATE: ocp.args.StandardSave(state), _RUN: ocp.args.JsonSave(whole)}
        )
        metrics = None if heldout_loss is None else {_LOSS: heldout_loss}
        self._saving = step
        self._guarded(lambda: self._manager.save(step, args=args, metrics=metrics, force=True))

    def wait(self) -> None:
        """Waits until all started saves are on disk.

        Raises:
            SaveError: A save failed.
        """
        self._guarded(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits and frees threads.

        Raises:
            SaveError: The last checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def record(self, step: int) -> dict[str, Any]:
        """The record of a checkpoint.

        Raises:
            CheckpointError: The record cannot be read or was changed.
            SchemaError: The record has another schema.
        """
        try:
            args = ocp.args.Composite(**{_RUN: ocp.args.JsonRestore()})
            found = self._manager.restore(step, args=args)[_RUN]
        except Exception as error:  # Orbax raises whatever the damage causes
            raise CheckpointError(f"its record cannot be read ({_brief(error)})") from error
        if not isinstance(found, dict) or found.get("sha256") != _digest(found):
            raise CheckpointError("its record is not what was written")
        if found["schema"] != SCHEMA:
            raise SchemaError(
                f"The checkpoint of step {step} in {self.folder} is of schema {found['schema']}; this "
                f"program reads schema {SCHEMA}."
            )
        return found

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads a state and compares every array with its fingerprint.

        Args:
            step: The checkpoint's step.
            abstract: Shapes, dtypes and, on a mesh, shardings to restore to; the mesh may be another than
                the one that was saved from. Without a sharding an array goes to the first device.

        Raises:
            CheckpointError: The state cannot be read, or an array differs from what was written.
        """
        expected = self.record(step)["fingerprints"]
        target = jax.tree.map(_target, abstract)
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(target)})
        failure = ""
        state = None
        try:
            state = self._manager.restore(step, args=args)[_STATE]
        except Exception as error:  # as above
            failure = f"its arrays cannot be read ({_brief(error)})"
        _agree_on(failure)
        if state is None:
            raise CheckpointError(failure)
        found = fingerprints(state)
        wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise CheckpointError(f"'{wrong[0]}'{more} is not what was written")
        return state

    def set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint to another folder; returns its new path."""
        parent = self.out / DAMAGED_FOLDER
        target, count = parent / str(step), 1
        while target.exists():
            target, count = parent / f"{step}-{count}", count + 1
        if jax.process_index() == 0:
            parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"set aside {step}")
        self._manager.reload()
        return target

    def _guarded(self, act: Callable[[], Any]) -> None:
        """Runs an action, and describes a failed save in one sentence."""
        try:
            act()
        except Exception as error:
            failed, self._saving = self._saving, None
            self._manager.reload()
            steps = self.steps()
            left = (
                f"the newest whole checkpoint is that of step {steps[0]}"
                if steps
                else "there is no whole checkpoint"
            )
            raise SaveError(
                f"The checkpoint of step {failed} could not be written to {self.folder} "
                f"({_brief(error)}); {left}."
            ) from error


def checkpoint_steps(out: Path) -> list[int]:
    """The steps of a folder's checkpoints, newest first, without opening them."""
    folder = out / FOLDER
    if not folder.is_dir():
        return []
    return sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)


def _target(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _agree_on(failure: str) -> None:
    """Makes all processes fail if one does, so that none trains alone."""
    if jax.process_count() > 1:
        failed = np.asarray(multihost_utils.process_allgather(np.int32(bool(failure))))
        if failed.any() and not failure:
            raise CheckpointError(f"process {int(failed.argmax())} cannot read it")


def _digest(record: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _brief(error: BaseException) -> str:
    """The first line of an error, and its kind."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500]}" if lines else type(error).__name__
