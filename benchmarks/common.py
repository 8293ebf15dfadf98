"""Common parts of the benchmarks: times taken in turns, XLA's counts, and results with their circumstances."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "optax", "numpy")


@dataclass(frozen=True)
class Paired:
    """Times of two functions in seconds, taken in turns in one process.

    Example:
      >>> pairs = Paired([1.0, 2.0, 3.0], [2.0, 4.0, 12.0])
      >>> pairs.ratio, pairs.spread
      (0.5, (0.375, 0.5))
    """

    seconds: Sequence[float]
    baseline_seconds: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        """The first function's time over the baseline's, pair by pair."""
        return [a / b for a, b in zip(self.seconds, self.baseline_seconds, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios, which is robust to disturbances of single runs."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the ratios."""
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    def summary(self) -> dict[str, Any]:
        """The figures for the report."""
        return {
            "pairs": len(self.seconds),
            "median_seconds": statistics.median(self.seconds),
            "baseline_median_seconds": statistics.median(self.baseline_seconds),
            "ratio": self.ratio,
            "ratio_quartiles": list(self.spread),
        }


def paired_times(
    function: Callable[..., Any], baseline: Callable[..., Any], *args: Any, pairs: int = 20
) -> Paired:
    """Times two functions of the same arguments in turns and waits for each run.

    The function that goes first alternates between pairs. The first pair compiles and is not counted.

    Raises:
      ValueError: for fewer than two pairs, which have no spread.
    """
    if pairs < 2:
        raise ValueError(f"paired_times: at least 2 pairs, got {pairs}.")
    functions = (function, baseline)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(pairs + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            jax.block_until_ready(functions[which](*args))
            if number:
                times[which].append(time.perf_counter() - started)
    return Paired(*times)


def temporary_bytes(function: Callable[..., Any], *args: Any) -> int:
    """Bytes that the compiled function allocates besides its arguments and results.

    Raises:
      RuntimeError: if the backend does not report them.
    """
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError("temporary_bytes: this backend has no memory analysis.")
    return analysis.temp_size_in_bytes


def bytes_accessed(function: Callable[..., Any], *args: Any, library_fusions: bool = True) -> float:
    """Bytes that all operations read and write by XLA's cost analysis, loops unrolled.

    XLA counts a loop's body once for any number of iterations. This function therefore replaces
    `jax.lax.fori_loop` with a fixed number of iterations by a Python loop; ``function`` must not be jitted
    already.

    Args:
      function: the function to count.
      *args: its arguments.
      library_fusions: False compiles without the fusions that XLA:CPU leaves to a library, whose internal reads
        and writes are not counted.

    Raises:
      RuntimeError: if the backend does not report them.

    Example:
      >>> def twice_doubled(x):
      ...     return jax.lax.fori_loop(0, 2, lambda _, x: jnp.sort(2 * x), x)
      >>> x = jnp.zeros(1000)
      >>> bytes_accessed(twice_doubled, x) > bytes_accessed(lambda x: jnp.sort(2 * x), x)
      True
    """

    def unrolled(lower, upper, body, value, **_):  # optax passes fori_loop an `unroll`
        for index in range(int(lower), int(upper)):
            value = body(jnp.int32(index), value)
        return value

    options: dict[str, str | bool] = {}
    if not library_fusions and jax.default_backend() == "cpu":
        options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    with mock.patch("jax.lax.fori_loop", unrolled):
        # A new function, because jit would find the one with the loop in its cache.
        lowered = jax.jit(lambda *args: function(*args)).lower(*args)
        analysis = lowered.compile(compiler_options=options).cost_analysis()
    if analysis is None:
        raise RuntimeError("bytes_accessed: this backend has no cost analysis.")
    return analysis["bytes accessed"]


def circumstances(command: str) -> dict[str, Any]:
    """Versions, hardware and command, so that the numbers can be judged and reproduced."""
    return {
        "command": command,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average_one_minute": round(os.getloadavg()[0], 1),
    }


def describe_circumstances(facts: Mapping[str, Any]) -> str:
    """The circumstances in a sentence or two for a page of results."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"`{facts['command']}` on {facts['processor']} ({facts['cores']} cores, backend "
        f"{facts['platform']}); {versions}. Load average at the end "
        f"{facts['load_average_one_minute']} (above the number of cores, others were running too)."
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table.

    Example:
      >>> print(table(["name", "ratio"], [["a", 0.5]]))
      | name | ratio |
      |---|---|
      | a | 0.5 |
    """
    lines = [header, ["---"] * len(header), *rows]
    marks = ["|{}|" if line is lines[1] else "| {} |" for line in lines]
    joints = ["|" if line is lines[1] else " | " for line in lines]
    return "\n".join(
        mark.format(joint.join(map(str, line)))
        for mark, joint, line in zip(marks, joints, lines, strict=True)
    )


def write_results(folder: pathlib.Path, name: str, results: Mapping[str, Any], page: str) -> None:
    """Writes ``name.json`` with the numbers and ``name.md`` with the page about them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (folder / f"{name}.md").write_text(page.rstrip() + "\n")


def _processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in _lines("/proc/cpuinfo"):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(path: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        yield from file
