"""Compares an optimizer's step with AdamW's: updates on real parameter trees, and the trainer's whole step.

    python -m benchmarks.steps.step_time --presets galore_60m,galore_350m --dtypes float32,bfloat16
    python -m benchmarks.steps.step_time --presets "" --train demo

Every time is a ratio to `optax.adamw` on the same tree, taken in turns in one process. Measured cells are kept
in step_time.json; a restart continues, and `--again` measures the named optimizers anew. A cell that does not
fit in memory is skipped with a message. Freed memory stays with the process, as in the trainer; `--allocator
default` leaves it to the C library.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.common import Paired, circumstances
from benchmarks.peers import register_peers
from benchmarks.steps.programs import trainer_settings
from benchmarks.steps.step_time_page import page, plot
from benchmarks.steps.updates import (
    VARIANTS,
    Store,
    Update,
    compile_ratio,
    device_name,
    random_tree,
)
from examples.llama.comparing.timing import paired_step_times
from examples.llama.devices.host_memory import keep_freed_memory, release_freed_memory
from examples.llama.optimizers.variants import parse_variant
from examples.llama.training.program import Program

KEYS = ("kind", "preset", "dtype", "variant", "device", "allocator")
PAIRS = 20


def measure_update(
    preset: str, dtype: str, key: str, allocator: str, pairs: int, compiles: int
) -> dict[str, Any]:
    """Times one optimizer's update and apply in turns with AdamW's.

    Both step the same parameters in turn, so one copy of them suffices; each has its own state.

    Raises:
      MemoryError: The device or machine has too little memory; the message says how much is needed.
    """
    update = Update(preset, key, dtype)
    baseline = Update(preset, "adamw", dtype, scan_layers=update.scan_layers)
    ratio, seconds, baseline_seconds = compile_ratio(update, baseline, compiles)
    functions = [one.compile()[0] for one in (update, baseline)]
    needed = 2 * _bytes(update) + update.state_bytes + baseline.state_bytes
    temporaries = max(function.memory_analysis().temp_size_in_bytes for function in functions)
    # Kept memory has holes: with them an update of 1.3 billion parameters took half as much again.
    needed += temporaries * 3 // 2 if allocator == "keep" else temporaries
    check_memory(needed)
    params, grads = random_tree(update.params, 0.02), random_tree(update.params, 1e-3, seed=1)
    states = [jax.jit(one.tx.init)(params) for one in (update, baseline)]
    jax.block_until_ready(states)
    release_freed_memory()  # holes that drawing left, too small for a step's temporaries
    times: tuple[list[float], list[float]] = ([], [])
    faults: tuple[list[int], list[int]] = ([], [])
    first = 0.0
    for number in range(pairs + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            jax.block_until_ready((params, states[which]))
            faults_before = _page_faults()
            started = time.perf_counter()
            params, states[which] = functions[which](params, states[which], grads)
            jax.block_until_ready((params, states[which]))
            elapsed = time.perf_counter() - started
            if number:
                times[which].append(elapsed)
                faults[which].append(_page_faults() - faults_before)
            elif which == 0:
                first = elapsed
    return {
        **_names("update", preset, dtype, key, allocator),
        "label": update.label,
        "rank": update.rank,
        "scan_layers": update.scan_layers,
        "parameters": update.parameter_count,
        "time": Paired(*times).summary(),
        "first_step_seconds": first,
        "page_faults": statistics.median(faults[0]),
        "baseline_page_faults": statistics.median(faults[1]),
        "temporary_bytes": functions[0].memory_analysis().temp_size_in_bytes,
        "compile_ratio": ratio,
        "compile_seconds": seconds,
        "baseline_compile_seconds": baseline_seconds,
        "load_average_one_minute": circumstances("")["load_average_one_minute"],
    }


def measure_training(
    preset: str, dtype: str, key: str, allocator: str, pairs: int
) -> dict[str, Any]:
    """Times the trainer's whole step (gradients, clipping, update) in turns with AdamW's.

    It also returns tokens per second. The dtype is that of the matrix products; the trainer's parameters are
    float32.
    """
    variant = parse_variant(key)
    programs = [
        Program(trainer_settings(preset, optimizer, compute_dtype=dtype))
        for optimizer in (key, "adamw")
    ]
    settings = programs[0].settings
    rng = np.random.default_rng(0)
    shape = (settings.batch_size, settings.seq_len + 1)
    batches = [
        {"tokens": rng.integers(0, settings.model.vocab_size, shape).astype(np.int32)}
        for _ in range(4)
    ]
    for program in programs:
        program.compile()
    found = paired_step_times(programs[0], programs[1], batches, pairs)
    timed = Paired(found.seconds, found.reference_seconds).summary()
    return {
        **_names("train", preset, dtype, key, allocator),
        "label": variant.label,
        "rank": settings.options.rank,
        "scan_layers": settings.scan_layers,
        "parameters": programs[0].parameter_count(),
        "time": timed,
        "tokens_per_step": settings.tokens_per_step,
        "tokens_per_second": settings.tokens_per_step / timed["median_seconds"],
        "compile_ratio": programs[0].compile_seconds / programs[1].compile_seconds,
        "load_average_one_minute": circumstances("")["load_average_one_minute"],
    }


def check_memory(needed: int) -> None:
    """Refuses cells that do not fit the device's free memory, or the machine's on a CPU.

    Raises:
      MemoryError: The cell needs more than nine tenths of the free memory.
    """
    statistics = jax.devices()[0].memory_stats()
    if jax.default_backend() != "cpu" and statistics:
        free = statistics["bytes_limit"] - statistics["bytes_in_use"]
    else:
        free = _available_bytes()
    if needed > 0.9 * free:
        raise MemoryError(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def _available_bytes() -> int:
    """Memory that Linux reports as available; on other systems no limit is known."""
    path = pathlib.Path("/proc/meminfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
    return 2**62


def _page_faults() -> int:
    """Pages given to the process so far, since XLA:CPU requests a step's temporaries from the system anew."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _bytes(update: Update) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(update.params))


def _names(kind: str, preset: str, dtype: str, key: str, allocator: str) -> dict[str, Any]:
    names = (kind, preset, dtype, key, device_name(), allocator)
    return dict(zip(KEYS, names, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the missing cells and writes step_time.json, .md and .png.

    Args:
      arguments: command line, without the program's name.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="galore_60m,galore_350m", help="trees to update")
    parser.add_argument("--train", default="demo", help="presets whose whole step is timed")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--optimizers", default=",".join(VARIANTS))
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--compiles", type=int, default=3, help="pairs of compilations")
    parser.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="what becomes of freed memory",
    )
    parser.add_argument("--again", default="", help="optimizers to measure anew")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", "-m", "benchmarks.steps.step_time", *given])
    register_peers()
    if options.allocator == "keep":
        keep_freed_memory()
    store = Store(options.out / "step_time.json", KEYS)
    again = options.again.split(",")
    wanted = [("update", name) for name in filter(None, options.presets.split(","))]
    wanted += [("train", name) for name in filter(None, options.train.split(","))]
    for kind, preset in wanted:
        for dtype in options.dtypes.split(","):
            for key in options.optimizers.split(","):
                where = (preset, dtype, key, options.allocator)
                known = store.find(**_names(kind, *where))
                if known is not None and key not in again:
                    continue
                release_freed_memory()  # otherwise the last cell's would count as used
                try:
                    if kind == "update":
                        cell = measure_update(*where, options.pairs, options.compiles)
                    else:
                        cell = measure_training(*where, options.pairs)
                except MemoryError as error:
                    print(f"{kind} {preset} {dtype} {key}: left out, {error}", flush=True)
                    continue
                store.put(cell, circumstances(command))
                ratio, compiled = cell["time"]["ratio"], cell["compile_ratio"]
                print(
                    f"{kind} {preset} {dtype} {key}: {ratio:.2f}, compile {compiled:.2f}",
                    flush=True,
                )
    (options.out / "step_time.md").write_text(page(store.content))
    plot(store.content, options.out / "step_time.png")


if __name__ == "__main__":
    main()
