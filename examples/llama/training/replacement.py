"""A run that takes another's folder: the old one waits until the new one has begun, or else comes back.

The files of the old run move to the folder `.replaced` of the same file system. The new run commits after its
first state stands: its data, its base model and its compiled step were all good by then. Until that moment an
error, Ctrl-C or the death of the process leaves the old run whole.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from examples.llama.devices.processes import agree, is_main
from examples.llama.reporting.files import CONFIG, METRICS, SUMMARY, read_json
from examples.llama.reporting.folders import REPLACED, FolderError, check_output
from examples.llama.reporting.locks import FolderLock
from examples.llama.training.checkpoints import checkpoint_steps

_MOVED = (CONFIG, SUMMARY, "tokenizer.json", "checkpoints", "damaged-checkpoints", "tensorboard")
_COPIED = (METRICS,)
"""The next run renames the old lines by itself."""


def recover(out: Path) -> None:
    """Puts back the old run of a folder where a process died while another was to begin in its place.

    Raises:
        FolderError: That process is not dead.
    """
    if (out / REPLACED).is_dir():
        with FolderLock(out), Replacement(out, replace=False):
            pass


@contextmanager
def locked(out: Path, *, force: bool = False) -> Iterator[None]:
    """Holds a run's folder for the main process; all processes go on, or none.

    Raises:
        FolderError: Another run is writing there, or the folder cannot be written.
        ValueError: In the other processes.
    """
    with ExitStack() as stack:
        problem = None
        try:
            stack.enter_context(FolderLock(out, force=force, active=is_main()))
        except FolderError as error:
            problem = error
        agree(problem, "lock")
        yield


class Replacement:
    """Keeps a folder's old run until `commit`; a context manager, used under the folder's lock.

    Args:
        out: The run's folder.
        replace: Whether the old run is to go; without it this only undoes what a dead process left half done.
        active: Whether to do anything; of several processes one does.
    """

    def __init__(self, out: Path, *, replace: bool, active: bool = True):
        self._out, self._kept = out, out / REPLACED
        self._replace, self._active = replace, active
        self._pending = False

    def __enter__(self) -> Self:
        if not self._active:
            return self
        if self._kept.is_dir():
            self._restore()
        if self._replace and any((self._out / name).exists() for name in (*_MOVED, *_COPIED)):
            self._kept.mkdir()
            self._pending = True
            for name in _COPIED:
                if (self._out / name).exists():
                    shutil.copy2(self._out / name, self._kept / name)
            for name in _MOVED:
                if (self._out / name).exists():
                    (self._out / name).rename(self._kept / name)
        return self

    def commit(self) -> None:
        """Removes the old run: the new one has begun."""
        if self._pending:
            self._pending = False
            # One rename decides; what a crash leaves of the removal is no run any more.
            gone = self._out / f".{uuid.uuid4().hex}.part"
            self._kept.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pending:
            self._pending = False
            self._restore()

    def _restore(self) -> None:
        """Puts the old run back in the place of what began."""
        for kept in self._kept.iterdir():
            begun = self._out / kept.name
            if begun.is_dir():
                shutil.rmtree(begun)
            kept.replace(begun)
        self._kept.rmdir()


def claim_folder(folder: Path, inputs: Mapping[str, str], *, overwrite: bool, resume: bool) -> None:
    """Refuses an output folder that is an input or holds another run, before anything is read.

    Args:
        folder: The run's folder.
        inputs: Files and folders that the run reads, by flag.
        overwrite: Whether the run may take another's place.
        resume: Whether it goes on from what is there.

    Raises:
        ValueError: The folder is one of them, or holds what is no run.
        FileExistsError: It holds a run, and neither `resume` nor `overwrite` is set.
    """
    check_output(folder, "run", dict(inputs))
    if is_main():
        recover(folder)
    check_folder(folder, overwrite=overwrite, resume=resume)


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
