"""The run that the fault tests harm: a tiny model in a process of its own, slow enough to be hit."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from examples.llama.training.checkpoints import Checkpoints
from examples.llama.training.resume import target
from examples.llama.training.run import EXIT_CODES, prepare_run
from tests.llama import tiny

RESULT = "result.json"


@dataclass(frozen=True)
class Job:
    """What the process does.

    Attributes:
        out: The run's folder.
        log: Where its console goes.
        steps: Optimizer steps.
        checkpoint_every: Steps between checkpoints.
        optimizer: Its name.
        pace: Seconds to wait in each step.
        limit_from: Step after which files cannot grow beyond `limit_bytes`, or None.
        limit_bytes: See there.
    """

    out: Path
    log: Path
    steps: int
    checkpoint_every: int = 4
    optimizer: str = "lorapre_adamw"
    pace: float = 0.01
    limit_from: int | None = None
    limit_bytes: int = 24 * 1024


def train(job: Job) -> None:
    """Trains, resuming where it can; exits as the command line does, and says what it ended with."""
    # A process that comes after one that was killed finds the programs compiled.
    jax.config.update("jax_compilation_cache_dir", str(job.out.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    config = tiny.config(
        job.out,
        optimizer=job.optimizer,
        steps=job.steps,
        rank=2 if job.optimizer.startswith("lorapre") else None,
        log_every=1,
        eval_every=5 * job.checkpoint_every,
        checkpoint_every=job.checkpoint_every,
        resume=True,
    )
    with job.log.open("a", encoding="utf-8", buffering=1) as log:
        console = Console(file=log, width=200)
        run = prepare_run(config, model=tiny.MODEL, dataset=tiny.dataset(), console=console)
        step = run.program.step

        def slow_step(state, *arguments, **options):
            time.sleep(job.pace)
            if int(state.step) == job.limit_from:
                while list(job.out.glob("checkpoints/*tmp*")):  # what was begun before is let be
                    time.sleep(0.01)
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (job.limit_bytes, hard))
            return step(state, *arguments, **options)

        run.program.step = slow_step  # pyright: ignore[reportAttributeAccessIssue]
        summary = run.train()
        if summary.message:
            console.print(summary.message, soft_wrap=True)
        if summary.status == "finished":
            with Checkpoints(job.out) as checkpoints:
                state = checkpoints.restore(checkpoints.steps()[0], target(run.program))
            (job.out / RESULT).write_text(json.dumps(digests(state)))
        log.flush()
    os._exit(EXIT_CODES[summary.status])


def digests(state) -> dict[str, str]:
    """SHA-256 of the parameters' bytes and of the optimizer state's."""
    return {
        name: hashlib.sha256(
            b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(part))
        ).hexdigest()
        for name, part in (("params", state.params), ("opt_state", state.opt_state))
    }
