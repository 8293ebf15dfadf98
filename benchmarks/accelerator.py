"""Measures on a machine with a GPU or TPU, in one command: the most wanted figures first, within a budget.

    python -m benchmarks.accelerator --budget 350

It needs only JAX, optax, Flax and matplotlib. Every row is written to measured.json at once and not measured
again when the command is restarted. Updates and steps compile ahead in threads. At the end, or with `--report`
alone, the command writes the page accelerator.md from all measurements.

The scripts that took the figures of 2026-11-27 (docs/results/accelerator/h200_*.json) became this command.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks import mfu
from benchmarks.accelerators import parts
from benchmarks.accelerators.page import page
from benchmarks.common import Paired, circumstances
from benchmarks.peers import register_peers
from benchmarks.steps.updates import Store, Update, device_name, random_tree

KEYS = ("kind", "preset", "dtype", "name", "device")
WANTED = ("sage_hybrid", "sage_hybrid:sinkhorn_iterations=1")
LORAPRE = ("lorapre_adamw", "products", "lorapre_muon", "muon")
OTHERS = (
    "lorapre_adamw:options=recommended",
    "sage_hybrid_int8",
    "lion",
    "adafactor",
    "lorapre_sinkgd",
    "lorapre_lion",
)
RESERVE = 8.0
"""Seconds reserved for the page."""


@dataclass(frozen=True)
class Job:
    """A row to measure: of kind `update`, `part` or `mfu`."""

    kind: str
    preset: str
    dtype: str
    name: str

    def fields(self) -> dict[str, Any]:
        """The row's key."""
        return {**vars(self), "device": device_name()}


@dataclass(frozen=True)
class Sizes:
    """Presets and shapes of a run of the command."""

    presets: tuple[str, str]
    mfu: tuple[str, ...]
    shapes: parts.Shapes
    seq_len: int = 1024
    batch_size: int | None = None


SIZES = {
    "full": Sizes(
        ("galore_350m", "sage_1.3b"), ("galore_350m", "galore_1b", "galore_130m"), parts.FULL
    ),
    "small": Sizes(("demo", "demo"), ("demo",), parts.SMALL, seq_len=16, batch_size=2),
}


def jobs(sizes: Sizes) -> list[Job]:
    """All rows, most wanted first."""
    first, second = sizes.presets
    both = ("bfloat16", "float32")
    found = [Job("update", first, dtype, key) for dtype in both for key in (*WANTED, *LORAPRE)]
    found += [Job("update", second, dtype, key) for dtype in both for key in WANTED]
    found += [Job("mfu", sizes.mfu[0], "bfloat16", key) for key in ("adamw", "sage_hybrid")]
    found += [Job("part", "", "", name) for name in parts.parts(sizes.shapes)]
    found += [Job("mfu", preset, "bfloat16", "adamw") for preset in sizes.mfu[1:]]
    found += [Job("mfu", sizes.mfu[0], "bfloat16", key) for key in ("lorapre_adamw", "muon")]
    found += [Job("update", first, dtype, key) for dtype in both for key in OTHERS]
    return list(dict.fromkeys(found))


class Session:
    """The rows of one call: compilation ahead, and the remaining time.

    Args:
        sizes: Presets and shapes.
        budget: Seconds, compiling and the page included.
        peak: The device's TFLOP/s, or None to leave MFU rows out.
        threads: Compilations at once.
        pairs: Pairs of stretches of an update and AdamW's.
        repeats: Steps of a stretch.
    """

    def __init__(
        self,
        sizes: Sizes,
        budget: float,
        peak: float | None,
        threads: int,
        pairs: int = 10,
        repeats: int = 10,
    ):
        self.sizes, self.peak, self.pairs, self.repeats = sizes, peak, pairs, repeats
        self._deadline = time.monotonic() + budget - min(RESERVE, budget / 10)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self._compiled: dict[Any, concurrent.futures.Future[Any]] = {}
        self._parts = parts.parts(sizes.shapes)
        self._baseline: tuple[Any, ...] | None = None

    def left(self) -> float:
        """Seconds left for rows."""
        return self._deadline - time.monotonic()

    def compile_ahead(self, wanted: Sequence[Job]) -> None:
        """Starts compiling the updates and steps of these rows, in their order."""
        for job in wanted:
            if job.kind == "update":
                self._submit(("update", job.preset, job.dtype, "adamw"), self._update)
                self._submit(("update", job.preset, job.dtype, job.name), self._update)
            elif job.kind == "mfu" and self.peak is not None:
                self._submit(("mfu", job.preset, job.dtype, job.name), self._step)

    def close(self) -> None:
        """Starts no more compilations and does not wait for running ones."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def measure(self, job: Job) -> dict[str, Any]:
        """Measures a row.

        Raises:
            TimeoutError: It did not compile in the remaining time.
        """
        if job.kind == "part":
            found = {"milliseconds": parts.milliseconds(self._parts[job.name], self.repeats)}
        elif job.kind == "mfu":
            self._baseline = None  # memory for the model's step
            assert self.peak is not None
            step, update = self._result(("mfu", job.preset, job.dtype, job.name))
            found = step.measure(update, self.repeats, self.peak)
        else:
            found = self._ratio(job)
        return {**found, **job.fields(), "jax": jax.__version__}

    def _submit(self, key: tuple[str, ...], build: Callable[..., Any]) -> None:
        if key not in self._compiled:
            self._compiled[key] = self._pool.submit(build, *key[1:])

    def _result(self, key: tuple[str, ...]) -> Any:
        return self._compiled[key].result(timeout=max(0.1, self.left()))

    @staticmethod
    def _update(preset: str, dtype: str, name: str) -> tuple[Update, Any, float]:
        update = Update(preset, name, dtype)
        return update, *update.compile()

    def _step(self, preset: str, dtype: str, name: str) -> tuple[mfu.Step, Any]:
        batch_size = self.sizes.batch_size or mfu.PRESETS.get(preset, 16)
        step = mfu.Step(preset, name, dtype, batch_size, self.sizes.seq_len)
        return step, step.compile()

    def _ratio(self, job: Job) -> dict[str, Any]:
        """Times an update and apply in turns with AdamW's, on the same parameters."""
        where = ("update", job.preset, job.dtype)
        base, base_function, base_compile = self._result((*where, "adamw"))
        update, function, compile_seconds = self._result((*where, job.name))
        if self._baseline is None or self._baseline[0] != where:
            self._baseline = None
            params = random_tree(base.params, 0.02)
            grads = random_tree(base.params, 1e-3, seed=1)
            self._baseline = where, params, jax.jit(base.tx.init)(params), grads
        _, params, base_state, grads = self._baseline
        state = jax.jit(update.tx.init)(params)
        self._baseline = None  # its arrays are donated from here on

        def stretch(function: Any, params: Any, state: Any, count: int) -> tuple[Any, Any, float]:
            jax.block_until_ready((params, state))
            started = time.perf_counter()
            for _ in range(count):
                params, state = function(params, state, grads)
            jax.block_until_ready((params, state))
            return params, state, (time.perf_counter() - started) / count

        times: tuple[list[float], list[float]] = ([], [])
        for number in range(self.pairs + 1):
            count = self.repeats if number else 2
            params, state, ours = stretch(function, params, state, count)
            params, base_state, theirs = stretch(base_function, params, base_state, count)
            if number:
                times[0].append(ours)
                times[1].append(theirs)
        self._baseline = where, params, base_state, grads
        analysis = function.memory_analysis()
        return {
            "label": update.label,
            "rank": update.rank,
            "time": Paired(*times).summary(),
            "milliseconds": 1e3 * statistics.median(times[0]),
            "ratio": Paired(*times).ratio,
            "temporaries": analysis.temp_size_in_bytes / update.largest_leaf_bytes,
            "state_bytes": update.state_bytes,
            "compile_seconds": compile_seconds,
            "compile_ratio": compile_seconds / base_compile,
        }


def measure_all(
    session: Session, store: Store, wanted: Sequence[Job], facts: dict[str, Any]
) -> Iterator[str]:
    """Measures the missing rows while there is time; yields a line of text per row.

    A row that fails (memory, an unsupported operation) is skipped with its reason, and tried again at the
    next start.
    """
    missing = [job for job in wanted if store.find(**job.fields()) is None]
    if session.peak is None:
        missing = [job for job in missing if job.kind != "mfu"]
    session.compile_ahead(missing)
    for done, job in enumerate(missing):
        if session.left() <= 0:
            yield f"the budget is spent; {len(missing) - done} rows are left for the next start"
            return
        where = " ".join(filter(None, (job.kind, job.preset, job.dtype, job.name)))
        try:
            cell = session.measure(job)
        except TimeoutError:
            yield f"{where}: did not compile in the time that was left"
            continue
        except (jax.errors.JaxRuntimeError, MemoryError, NotImplementedError, ValueError) as error:
            yield f"{where}: left out, {str(error).splitlines()[0][:200]}"
            continue
        store.put(cell, facts)
        number = cell.get("ratio", cell.get("mfu", cell.get("milliseconds")))
        yield f"{where}: {number:.3g}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the missing rows within the budget and writes measured.json and accelerator.md.

    Args:
        arguments: command line, without the program's name.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=350, help="seconds, all included")
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--threads", type=int, default=min(10, os.cpu_count() or 1))
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=10, help="steps of a stretch")
    parser.add_argument("--peak-tflops", type=float, help="of a device that mfu does not know")
    parser.add_argument("--report", action="store_true", help="write the page only")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    folder = options.out / "accelerator"
    store = Store(folder / "measured.json", KEYS)
    if not options.report:
        register_peers()
        try:
            peak = mfu.peak_tflops(device_name(), options.peak_tflops)
        except ValueError as error:
            peak = None
            print(f"MFU rows are left out: {error}", flush=True)
        sizes = SIZES[options.sizes]
        session = Session(
            sizes, options.budget, peak, options.threads, options.pairs, options.repeats
        )
        facts = circumstances(shlex.join(["python", "-m", "benchmarks.accelerator", *given]))
        started = time.monotonic()
        for line in measure_all(session, store, jobs(sizes), facts):
            print(f"[{time.monotonic() - started:.0f} s] {line}", flush=True)
        session.close()
    (options.out / "accelerator.md").write_text(page(folder, store.content))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    # Exit at once: threads that still compile would exceed the budget, and everything is on disk.
    os._exit(0)
