"""The same command in several processes, and as it is stored with results."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

import jax

FOLDERS = ("--out", "--output")
"""Options that name a folder of one machine."""


def share_work(module: str, arguments: Sequence[str], workers: int) -> None:
    """Runs a command in several processes that share its work through claims, and waits for them.

    On a CPU each computes on one thread; on an accelerator none takes the whole memory at its start.

    Args:
        module: What `python -m` runs.
        arguments: Its command line.
        workers: How many.

    Raises:
        SystemExit: One of them failed.
    """
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if jax.default_backend() == "cpu":
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    command = [sys.executable, "-m", module, *arguments, "--workers", "1"]
    processes = [subprocess.Popen(command, env=environment) for _ in range(workers)]
    try:
        ended = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.terminate()
    if any(ended):
        raise SystemExit(f"workers ended with {ended}")


def plain_command(module: str, arguments: Sequence[str]) -> str:
    """The command to store: files by their names alone and no folder for results.

    >>> plain_command("benchmarks.tokens", ["/a/b.npz", "--out", "/c", "--list", "base"])
    'python -m benchmarks.tokens b.npz --list base'
    """
    shown = [pathlib.Path(part).name if part.endswith(".npz") else part for part in arguments]
    for option in FOLDERS:
        if option in shown:
            place = shown.index(option)
            del shown[place : place + 2]
    return shlex.join(["python", "-m", module, *shown])
