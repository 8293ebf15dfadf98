"""Starts several processes on this machine, watches them, and ends all of them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LOG_TAIL = 15
"""Number of lines of a failed process's log in an error."""


@dataclass(frozen=True)
class Command:
    """A process to start.

    Attributes:
        name: Its name in messages.
        arguments: Its command line.
        log: File for its output.
    """

    name: str
    arguments: Sequence[str]
    log: Path


class LaunchError(RuntimeError):
    """A process failed or took too long; the others have been ended."""


def run_together(
    commands: Sequence[Command],
    *,
    time_limit: float,
    environment: Mapping[str, str] | None = None,
    on_tick: Callable[[], None] = lambda: None,
) -> None:
    """Runs processes side by side until all have succeeded.

    Args:
        commands: The processes to start.
        time_limit: Seconds for all of them together.
        environment: Variables to set on top of this process's.
        on_tick: Called twice a second.

    Raises:
        LaunchError: One failed or the time was up; the message names it and shows the end of its log.
    """
    with contextlib.ExitStack() as stack:
        started = {}
        for command in commands:
            command.log.parent.mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(command.log.open("w", encoding="utf-8"))
            started[command.name] = process = subprocess.Popen(
                list(command.arguments),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
            stack.callback(_end, process)
        end = time.monotonic() + time_limit
        while True:
            codes = {name: process.poll() for name, process in started.items()}
            for command in commands:
                code = codes[command.name]
                if code:
                    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
                    raise LaunchError(f"{command.name} {how}. {_tail(command.log)}")
            if all(code == 0 for code in codes.values()):
                return
            if time.monotonic() > end:
                late = [command for command in commands if codes[command.name] is None]
                names = ", ".join(command.name for command in late)
                raise LaunchError(
                    f"{names}: not done after {time_limit:.0f} s. {_tail(late[0].log)}"
                )
            on_tick()
            time.sleep(0.5)


def free_port() -> int:
    """A port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"The end of {log}:", *lines[-LOG_TAIL:]])
