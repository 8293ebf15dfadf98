"""Starts the run, kills it while it lives, and compares what it comes to with an undisturbed run."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from examples.llama.reporting.metrics import read_metrics
from examples.llama.training.checkpoints import FOLDER
from tests.faults.entry import RESULT, Job, train

PATIENCE = 300.0
"""Seconds that a process may take to do what is waited for; a machine may be busy."""

# A server that has imported everything but not begun with JAX: a child of it starts in no time.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.faults.entry"])


@dataclass(frozen=True)
class Kill:
    """One kill -9 and what it hit.

    Attributes:
        step: The last step that the process had written when it was killed.
        resumed_from: The step that it had begun from.
        in_save: Whether it left a checkpoint that it was writing.
        exit_code: What the system says of its end.
    """

    step: int
    resumed_from: int
    in_save: bool
    exit_code: int


def start(job: Job) -> Any:
    """Starts the run in a new process."""
    process = _CONTEXT.Process(target=train, args=(job,), daemon=True)
    process.start()
    return process


def run_to_end(job: Job) -> int:
    """Runs the job without harm; returns the exit status."""
    process = start(job)
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the run did not end:\n{job.log.read_text()}")
    return process.exitcode


def kill_once(job: Job, generator: random.Random, *, in_save: bool, steps: tuple[int, int]) -> Kill:
    """Starts the job, lets it take a random number of steps, and kills it.

    The moment is counted in steps and not in seconds, so that a busy machine makes no difference.

    Args:
        job: The run.
        generator: Source of the moment.
        in_save: Wait for a checkpoint that is being written, and kill within it.
        steps: Least and most steps to let it take.
    """
    count = generator.randint(*steps)
    job.log.write_text("")
    process = start(job)
    began = time.monotonic()
    while len(taken := _steps(job.log)) < count:
        _check_alive(process, began, job)
        time.sleep(0.002)
    if in_save:
        while not _unfinished(job.out):
            _check_alive(process, began, job)
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, 0.01))
    else:
        time.sleep(generator.uniform(0, 2 * job.pace))
    alive = process.is_alive()
    process.kill()
    process.join(PATIENCE)
    if not alive or process.exitcode != -signal.SIGKILL:
        raise AssertionError(f"the run had ended by itself ({process.exitcode})")
    found = re.search(r"resumed from step (\d+)", job.log.read_text())
    return Kill(
        step=max(_steps(job.log), default=taken[-1]),
        resumed_from=int(found[1]) if found else 0,
        in_save=bool(_unfinished(job.out)),
        exit_code=process.exitcode,
    )


def killed_run(
    job: Job, seed: int, random_kills: int, save_kills: int, steps: tuple[int, int]
) -> list[Kill]:
    """Kills one run many times, at random moments and inside saves in random order, then lets it end.

    A kill that came when the save was just done counts as one at a random moment and is made up for.
    """
    generator = random.Random(seed)
    plan = [False] * random_kills + [True] * save_kills
    generator.shuffle(plan)
    kills = []
    while plan:
        wanted = plan.pop(0)
        kills.append(kill_once(job, generator, in_save=wanted, steps=steps))
        if wanted and not kills[-1].in_save:
            plan.append(True)
        if len(kills) > 3 * (random_kills + save_kills):
            raise AssertionError("saves are too short to be hit")
    job.log.write_text("")
    status = run_to_end(replace(job, pace=0.0))
    assert status == 0, job.log.read_text()
    return kills


def result(job: Job) -> dict[str, str]:
    """Hashes of the parameters and the optimizer state that a run ended with."""
    return json.loads((job.out / RESULT).read_text())


def lines(job: Job) -> list[dict[str, Any]]:
    """The run's metrics without what depends on the clock."""
    clocks = {"tokens_per_second", "seconds"}
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_metrics(job.out)]


def make_job(folder: Path, name: str, **fields: Any) -> Job:
    """A job in a folder of its own; all in one folder share what is compiled."""
    return Job(out=folder / name, log=folder / f"{name}.log", **fields)


def _steps(log: Path) -> list[int]:
    if not log.exists():
        return []
    return [int(step) for step in re.findall(r" step (\d+)/\d+ loss", log.read_text())]


def _unfinished(out: Path) -> list[Path]:
    """Checkpoints that are being written, or were when the process died."""
    return list((out / FOLDER).glob("*.orbax-checkpoint-tmp*"))


def _check_alive(process: Any, began: float, job: Job) -> None:
    if not process.is_alive() or time.monotonic() - began > PATIENCE:
        process.kill()
        raise AssertionError(f"the run ended too early:\n{job.log.read_text()}")
