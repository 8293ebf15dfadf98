"""One writer per folder: a lock that ends with its process.

The lock is `flock` on the folder's file `run.lock`. The kernel releases it when the process ends in any way, so
a crash needs no clean-up. Most shared file systems pass the lock on to other hosts; some keep it local or do
not support it. The file therefore also names the holder's process and host. A granted lock is not trusted in
two cases. If the file names a live process on this host, `flock` does nothing on this file system. If it names
a process on another host, this host cannot tell whether it lives. `--force-unlock` takes the lock of another
host; a live process on this host has to end first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from examples.llama.reporting.folders import LOCK, FolderError, make_folder


class FolderLock:
    """Locks a folder for one writer; a context manager.

    Args:
        folder: The folder; made if it is missing.
        force: Whether to take over the lock of a process on another host, which may have ended.
        active: Whether to lock at all; among several processes of a run one does.

    Raises:
        FolderError: Another process writes there, or the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name, FolderLock(Path(name)):
    ...     try:
    ...         FolderLock(Path(name)).__enter__()
    ...     except FolderError as error:
    ...         print("is writing" in str(error))
    True
    """

    def __init__(self, folder: Path, *, force: bool = False, active: bool = True):
        self._folder, self._force, self._active = folder, force, active
        self._file: int | None = None

    def __enter__(self) -> Self:
        if not self._active:
            return self
        make_folder(self._folder)
        path = self._folder / LOCK
        try:
            self._file = _locked(path)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES) and path.is_file():
                raise FolderError(_taken(self._folder, _holder(path))) from None
            raise FolderError(
                f"--out {self._folder} cannot be written ({error.strerror})"
            ) from error
        problem = self._doubt(_holder(path))
        if problem:
            os.close(self._file)
            self._file = None
            raise FolderError(problem)
        os.ftruncate(self._file, 0)
        os.write(self._file, json.dumps(_self()).encode())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            # Removed while the lock is held: a process that opened it meanwhile sees that and tries again.
            with contextlib.suppress(OSError):
                (self._folder / LOCK).unlink()
            os.close(self._file)
            self._file = None

    def _doubt(self, holder: dict[str, Any] | None) -> str:
        """The reason why a granted lock may not be valid; empty if it is."""
        if holder is None or holder == _self():
            return ""
        if holder["host"] == socket.gethostname():
            return _taken(self._folder, holder) if _lives(holder) else ""
        if self._force:
            return ""
        return (
            f"{_taken(self._folder, holder)}; whether it still runs cannot be seen from here. If it does "
            "not, --force-unlock takes the folder over"
        )


def _locked(path: Path) -> int:
    """Opens and locks a file that still exists once the lock is held.

    Raises:
        OSError: Another process holds it, or it cannot be written.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # A file system without flock: the file's content has to suffice.
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                    raise
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
        except OSError:
            os.close(file)
            raise
        os.close(file)


def _self() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "started": _start_of(os.getpid()),
    }


def _holder(path: Path) -> dict[str, Any] | None:
    """The process and host in the file, or None."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if {"process", "host"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _lives(holder: dict[str, Any]) -> bool:
    """Whether a process of this host still lives, and its number was not reused."""
    try:
        os.kill(holder["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_of(holder["process"]) == holder.get("started")


def _start_of(process: int) -> str | None:
    """Start time of a process, in ticks since the host started; None if the system does not provide it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _taken(folder: Path, holder: dict[str, Any] | None) -> str:
    who = (
        f"process {holder['process']} on {holder['host']}"
        if holder is not None
        else "another process"
    )
    return f"{who} is writing to {folder}; wait for it, end it, or give another --out"
