"""Where LoRA-Pre Adam ends on a full-rank quadratic, from starts that differ by rounding.

    python -m benchmarks.convergence

The gradient is the distance to a random target, without noise, and the rank is a sixth of the matrix's. A rule
that converges ends at the target from every start. It writes convergence.json and convergence.md.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import circumstances, describe_circumstances, table, write_results
from lorapre_optax import RECOMMENDED, scale_by_lorapre_adam

SHAPE, RANK = (24, 40), 4
NEAR = 0.03
"""Largest entry of the distance at which a run counts as converged; the target's entries are near 1."""


@dataclass(frozen=True)
class Setting:
    """A rule and its schedule.

    Attributes:
        options: Of `scale_by_lorapre_adam`; None for Adam with full moments.
        rate: Peak of a cosine that ends at 0.
        steps: Its length.
    """

    options: Mapping[str, Any] | None = field(default_factory=dict)
    rate: float = 0.03
    steps: int = 1500


SETTINGS = {
    "Adam (full moments)": Setting(None),
    "LoRA-Pre Adam, the paper's rule": Setting(),
    "the same in three times the steps": Setting(steps=4500),
    "the same at a third of the rate": Setting(rate=0.01, steps=4500),
    "the same at a tenth of the rate": Setting(rate=0.003, steps=4500),
    '`bias_correction="exact"`': Setting({"bias_correction": "exact"}),
    "`residual=0.9`": Setting({"residual": 0.9}),
    '`initial_subspace="gradient"`': Setting({"initial_subspace": "gradient"}),
    "`eps=1e-4`": Setting({"eps": 1e-4}),
    "`bound=10.0`": Setting({"bound": 10.0}),
    "`bound=1.0`": Setting({"bound": 1.0}),
    "`**RECOMMENDED`": Setting(dict(RECOMMENDED)),
}


def targets(count: int, copies: int, spread: float = 1e-6) -> np.ndarray:
    """Random matrices, each with copies that differ from it by `spread` of each entry.

    Returns:
        float32 (count * copies, *SHAPE); the copies of a matrix follow each other.
    """
    rng = np.random.default_rng(0)
    target = rng.normal(size=(count, 1, *SHAPE))
    factors = 1 + spread * rng.normal(size=(count, copies, *SHAPE))
    return np.asarray(target * factors, np.float32).reshape(-1, *SHAPE)


def measure(setting: Setting, wanted: np.ndarray) -> dict[str, list[float]]:
    """The largest entry of each run's distance at its end, and of its direction at any step."""
    tx: Any = optax.scale_by_adam()
    if setting.options is not None:
        tx = scale_by_lorapre_adam(RANK, full_rank_fallback=False, **setting.options)
    schedule = optax.cosine_decay_schedule(setting.rate, setting.steps)

    def run(target: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: Any, count: jax.Array) -> Any:
            params, state, largest = carry
            direction, state = tx.update({"kernel": params - target}, state)
            direction = direction["kernel"]
            largest = jnp.maximum(largest, jnp.max(jnp.abs(direction)))
            return (params - schedule(count) * direction, state, largest), None

        params = jnp.zeros_like(target)
        start = (params, tx.init({"kernel": params}), jnp.float32(0))
        (params, _, largest), _ = jax.lax.scan(step, start, jnp.arange(setting.steps))
        return jnp.max(jnp.abs(params - target)), largest

    distances, largest = jax.jit(jax.vmap(run))(wanted)
    return {
        "distance": [float(f"{x:.4g}") for x in distances],
        "direction": [float(f"{x:.4g}") for x in largest],
    }


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    copies, rows = results["copies"], []
    for label, row in results["rows"].items():
        distances = np.array(row["distance"])
        near = (distances < NEAR).reshape(-1, copies)
        rows.append(
            [
                label,
                f"{row['rate']:g}",
                row["steps"],
                f"{np.sum(~near)} of {near.size}",
                f"{np.sum(near.any(axis=1) & ~near.all(axis=1))} of {len(near)}",
                f"{np.median(distances):.0e}",
                f"{np.max(distances):.1g}",
                f"{np.max(row['direction']):.3g}",
            ]
        )
    header = ["rule", "peak rate", "steps", "runs that missed", "targets missed at times"]
    header += ["distance: median", "largest", "largest entry of a direction"]
    return f"""# Where LoRA-Pre Adam ends on a quadratic

The gradient is the distance to a random target of {SHAPE[0]} x {SHAPE[1]}, without noise; rank {RANK}; a cosine
schedule that ends at 0. The target's entries are near 1. Each target has {copies} copies that differ by 1e-6 of
each entry, and each copy has a run: a rule that converges ends at the target from every one. "Distance" is the
largest entry of what is left, and a run has missed its target with {NEAR:g} or more. "At times" counts the
targets that some copies missed and others reached. A direction's largest entry is that of all steps and runs.

{describe_circumstances(results["circumstances"])}

{table(header, rows)}

Where the low-rank second moment is near zero and the first is not, an entry of the direction is far above
Adam's, and one step carries that parameter away. What is left of the schedule may not suffice to come back.
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, and writes the JSON file and the page; returns the JSON file's content."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--copies", type=int, default=16)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    wanted = targets(options.targets, options.copies)
    rows = {
        label: {"rate": setting.rate, "steps": setting.steps, **measure(setting, wanted)}
        for label, setting in SETTINGS.items()
    }
    command = shlex.join(["python", "-m", "benchmarks.convergence", *arguments])
    results = {"circumstances": circumstances(command), "copies": options.copies, "rows": rows}
    write_results(options.output, "convergence", results, page(results))
    return results


if __name__ == "__main__":
    main()
