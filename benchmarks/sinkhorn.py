"""Compares Sinkhorn on two scaling vectors with the plain float32 loop: time, bytes and accuracy."""

from __future__ import annotations

import argparse
import functools
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import (
    bytes_accessed,
    circumstances,
    describe_circumstances,
    paired_times,
    table,
    temporary_bytes,
    write_results,
)
from layout_optax import ParamLayout
from sage_optax import scale_by_sinkhorn

ITERATIONS, EPS = 5, 1e-8
SIZES = (1.0, 1e22)  # the squares of the second exceed float32


@dataclass(frozen=True)
class Case:
    """A parameter to normalise."""

    title: str
    shape: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    dtype: Any = jnp.float32

    @property
    def layout(self) -> ParamLayout:
        """Its layout."""
        return ParamLayout("matrix", self.rows, self.columns)


CASES = {
    "torch": Case("weight (out, in)", (2048, 5461), (0,), (1,)),
    "flax": Case("kernel (in, out)", (5461, 2048), (1,), (0,)),
    "bfloat16": Case("weight (out, in), bfloat16", (2048, 5461), (0,), (1,), jnp.bfloat16),
    "stack": Case("kernels, layers on axis 0", (8, 2048, 688), (2,), (1,)),
    "stack1": Case("kernels, layers on axis 1", (2048, 8, 688), (2,), (0,)),
    "experts": Case("experts in layers", (4, 4, 512, 1024), (3,), (2,)),
    "query": Case("query (d, heads, head_dim)", (2048, 32, 128), (1, 2), (0,)),
    "output": Case("output (heads, head_dim, d)", (32, 128, 2048), (2,), (0, 1)),
    "small": Case("small kernel", (256, 688), (1,), (0,)),
}


def plain_loop(g: jax.Array, case: Case) -> jax.Array:
    """The loop as published: every half-step rewrites the matrix in float32."""

    def sweep(_, x):
        x = x / (jnp.sqrt(jnp.sum(x * x, axis=case.columns, keepdims=True)) + EPS)
        return x / (jnp.sqrt(jnp.sum(x * x, axis=case.rows, keepdims=True)) + EPS)

    x = jax.lax.fori_loop(0, ITERATIONS, sweep, g.astype(jnp.float32))
    return x.astype(g.dtype)


def ours(g: jax.Array, case: Case) -> jax.Array:
    """The transformation's update of one leaf."""
    tx = scale_by_sinkhorn(ITERATIONS, EPS, layout=case.layout)
    direction, _ = tx.update({"g": g}, tx.init({"g": g}))
    return jax.tree.leaves(direction)[0]


def gradient(case: Case, size: float = 1.0) -> np.ndarray:
    """A gradient whose rows and columns differ by a few powers of e, in float64."""
    rng = np.random.default_rng(0)
    g = size * rng.standard_normal(case.shape)
    for axes in (case.rows, case.columns):
        shape = [n if axis in axes else 1 for axis, n in enumerate(case.shape)]
        g *= np.exp(rng.standard_normal(shape))
    return g


def error(case: Case, function: Callable[[jax.Array], jax.Array], size: float) -> float:
    """Relative error (norms) against the plain loop in float64 from the same gradient."""
    g = jnp.asarray(gradient(case, size), case.dtype)
    x = np.asarray(g.astype(jnp.float32), np.float64)
    for _ in range(ITERATIONS):
        x /= np.sqrt(np.sum(x * x, axis=case.columns, keepdims=True)) + EPS
        x /= np.sqrt(np.sum(x * x, axis=case.rows, keepdims=True)) + EPS
    found = np.asarray(function(g).astype(jnp.float32), np.float64)
    return float(np.linalg.norm(found - x) / np.linalg.norm(x))


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """All figures of one parameter."""
    function = functools.partial(ours, case=case)
    baseline = functools.partial(plain_loop, case=case)
    jitted, jitted_baseline = jax.jit(function), jax.jit(baseline)
    g = jnp.asarray(gradient(case), case.dtype)
    timed = paired_times(jitted, jitted_baseline, g, pairs=pairs)
    accessed = {
        f"{name}{suffix}": bytes_accessed(f, g, library_fusions=not suffix)
        for suffix in ("", "_without_library_fusions")
        for name, f in (("bytes_accessed", function), ("baseline_bytes_accessed", baseline))
    }
    return {
        "title": case.title,
        "shape": list(case.shape),
        "dtype": jnp.dtype(case.dtype).name,
        "time": timed.summary(),
        **accessed,
        "float32_matrix_bytes": 4 * g.size,
        "temporary_bytes": temporary_bytes(function, g),
        "baseline_temporary_bytes": temporary_bytes(baseline, g),
        "error": {f"{size:g}": error(case, jitted, size) for size in SIZES},
        "baseline_error": {f"{size:g}": error(case, jitted_baseline, size) for size in SIZES},
    }


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    times, sizes = [], []
    for case in results["cases"].values():
        name = f"{case['title']} {'x'.join(map(str, case['shape']))}"
        timed, matrix = case["time"], case["float32_matrix_bytes"]
        low, high = timed["ratio_quartiles"]
        seconds = timed["median_seconds"], timed["baseline_median_seconds"]
        milliseconds = [f"{1e3 * value:.3g}" for value in seconds]
        times.append([name, *milliseconds, f"**{timed['ratio']:.2f}**", f"{low:.2f} to {high:.2f}"])
        counts = (
            case[key] / matrix
            for key in (
                "bytes_accessed",
                "baseline_bytes_accessed",
                "bytes_accessed_without_library_fusions",
                "baseline_bytes_accessed_without_library_fusions",
                "temporary_bytes",
                "baseline_temporary_bytes",
            )
        )
        errors = (
            f"{case[key][size]:.0e}"
            for size in case["error"]
            for key in ("error", "baseline_error")
        )
        sizes.append([name, *(f"{count:.2f}" for count in counts), *errors])
    pairs = min(case["time"]["pairs"] for case in results["cases"].values())
    return f"""# Sinkhorn: two scaling vectors against the plain loop

Five sweeps, eps 1e-8, unit variant, both compiled. The plain loop divides the whole matrix in each of the ten
half-steps; `scale_by_sinkhorn` reads the squared gradient ten times and writes the direction once. Times in
milliseconds, medians of at least {
        pairs
    } pairs measured in turns in one process; the ratio is the median of
the pairs' ratios, with their quartiles.

{describe_circumstances(results["circumstances"])}

{table(["parameter", "ours", "plain loop", "ratio", "quartiles"], times)}

The table gives bytes that operations read and write (XLA's cost analysis, loops unrolled), in float32 matrices
of the parameter's size. Ours are 2 for the peaks of rows and columns, 2 for the squares, 10 for the
half-steps, 2 for the direction. XLA:CPU passes steps of the plain loop to a library and counts only its inputs
and outputs; the second pair of columns is compiled without that library. Temporary memory (memory analysis)
has the same unit. Errors are relative to the loop in float64, for a gradient of ordinary size and for one at
1e+22, whose squares leave float32; from bfloat16 the error is the rounding of the result.

{
        table(
            [
                "parameter",
                "read and written",
                "plain loop",
                "without library",
                "plain loop",
                "temporary",
                "plain loop",
                "error",
                "plain loop",
                "error at 1e+22",
                "plain loop",
            ],
            sizes,
        )
    }
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and writes ``sinkhorn.json`` and ``sinkhorn.md``.

    Args:
      arguments: command line, without the program's name.

    Returns:
      The JSON file's content.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sinkhorn", description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="pairs of timed runs (at least 20)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    cases = {}
    for name in options.cases:
        cases[name] = measure(CASES[name], options.pairs)
        print(f"{name}: ratio {cases[name]['time']['ratio']:.3f}", flush=True)
    command = shlex.join(["python", "-m", "benchmarks.sinkhorn", *arguments])
    results = {"circumstances": circumstances(command), "cases": cases}
    write_results(options.output, "sinkhorn", results, page(results))
    return results


if __name__ == "__main__":
    main()
