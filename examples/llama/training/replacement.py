"""Replaces the run in a folder: the old run waits until the new one has started, and otherwise comes back.

The files of the old run move to the folder `.replaced` of the same file system. The new run commits after its
first state exists, so its data, its base model and its compiled step are valid by then. Until that moment an
error, Ctrl-C or the death of the process keeps the old run whole.
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
"""The next run renames the old lines itself."""


def recover(out: Path) -> None:
    """Restores the old run of a folder if a process died while it replaced the run.

    Raises:
        FolderError: That process is still alive.
    """
    if (out / REPLACED).is_dir():
        with FolderLock(out), Replacement(out, replace=False):
            pass


@contextmanager
def locked(out: Path, *, force: bool = False) -> Iterator[None]:
    """Locks a run's folder for the main process; all processes continue, or none.

    Raises:
        FolderError: Another run writes there, or the folder cannot be written.
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
        replace: Whether to replace the old run; otherwise this only repairs what a dead process left
            unfinished.
        active: Whether to do anything; among several processes one does.
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
        """Removes the old run, since the new one has started."""
        if self._pending:
            self._pending = False
            # One rename decides; files that a crash leaves during the removal no longer form a run.
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
        """Restores the old run in place of the new one."""
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
        overwrite: Whether the run may replace another.
        resume: Whether it continues the run in the folder.

    Raises:
        ValueError: The folder is an input, or holds something other than a run.
        FileExistsError: It holds a run, without `resume` or `overwrite`.
    """
    check_output(folder, "run", dict(inputs))
    if is_main():
        recover(folder)
    check_folder(folder, overwrite=overwrite, resume=resume)


def check_folder(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuses a folder with a finished run, or with checkpoints of an unfinished one.

    Raises:
        FileExistsError: The folder holds one, without `overwrite` or `resume`.
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
