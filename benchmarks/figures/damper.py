"""SAGE's damper on the gradients of a real run: how often and how much it damps, and by which term."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
import optax
from matplotlib.ticker import FuncFormatter

from benchmarks.figures.observe import Seen
from benchmarks.figures.style import finish, panels, short
from examples.llama.comparing.palette import BLUE, ORANGE, RED
from examples.llama.comparing.plots import save
from examples.llama.training.step_statistics import sage_states
from layout_optax import ParamLayout, infer_layout
from sage_optax import SageState, sage_damper

ROLES = {"embedding": "table (tied embedding)", "vector": "norm scales"}


def measure(run: Iterable[Seen], chosen: int) -> dict[str, Any]:
    """Quantiles of H by role and step, and every column of one step.

    Args:
      run: a run of SAGE-Hybrid.
      chosen: the step whose columns are all kept.

    Returns:
      ``steps``; by role ``quantiles`` of H (least, tenth, median, last tenth), ``damped`` (share of columns
      with H below 1) and ``instant`` (share where the step's own term is the smaller one); ``columns``
      of the chosen step: the instantaneous s over its rms, and H.
    """
    steps: list[int] = []
    roles: dict[str, dict[str, list[Any]]] = {
        role: {"quantiles": [], "damped": [], "instant": []} for role in ROLES
    }
    columns: dict[str, dict[str, list[float]]] = {}
    for seen in run:
        steps.append(seen.step)
        for role, found in dampers(seen.gradients, seen.state).items():
            both, ema = found["both"], found["ema"]
            roles[role]["quantiles"].append(
                short([both.min(), *np.quantile(both, (0.1, 0.5, 0.9))])
            )
            roles[role]["damped"].append(float(f"{np.mean(both < 0.9999):.4g}"))
            roles[role]["instant"].append(float(f"{np.mean(both < 0.9999 * ema):.4g}"))
            if seen.step == chosen:
                columns[role] = {"s": short(found["s"]), "h": short(both)}
    return {"steps": steps, "roles": roles, "chosen": chosen, "columns": columns}


def dampers(gradients: Any, state: Any) -> dict[str, dict[str, np.ndarray]]:
    """H with both terms and with the averaged one alone, and s over its rms, over all columns of a role."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for old in sage_states(state):
        own = jax.tree.map(
            lambda place, gradient: place if isinstance(place, optax.MaskedNode) else gradient,
            old.magnitude,
            gradients,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        for name, values in _numbers(own, old).items():
            for layout, value in zip(jax.tree.leaves(infer_layout(own)), values, strict=True):
                found.setdefault(layout.role, {}).setdefault(name, []).append(np.ravel(value))
    return {
        role: {name: np.concatenate(values) for name, values in numbers.items()}
        for role, numbers in found.items()
    }


def _numbers(own: Any, old: SageState) -> dict[str, list[Any]]:
    layouts = jax.tree.leaves(infer_layout(own))
    gradients = jax.tree.leaves(own)
    return {
        "both": jax.tree.leaves(_damper(own, old, "both")),
        "ema": jax.tree.leaves(_damper(own, old, "ema")),
        "s": [_relative(g, layout) for g, layout in zip(gradients, layouts, strict=True)],
    }


@partial(jax.jit, static_argnums=2)
def _damper(own: Any, old: SageState, damper: Literal["both", "ema"]) -> Any:
    return sage_damper(own, old, damper=damper)


def _relative(gradient: jax.Array, layout: ParamLayout) -> np.ndarray:
    """Mean magnitude of each column over the rms of those means."""
    size = np.abs(np.asarray(gradient, np.float64))
    s = size.mean(axis=layout.row_axes, keepdims=True) if layout.row_axes else size
    return s / np.sqrt(np.mean(s**2, axis=layout.column_axes, keepdims=True))


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """H over the run for embedding, head and vectors, and H against s at one step."""
    figure, axes = panels(3)
    for panel, (role, title) in zip(axes, ROLES.items(), strict=False):
        least, low, middle, high = np.array(results["roles"][role]["quantiles"]).T
        band = "first to last tenth of columns"
        panel.fill_between(
            results["steps"], low, high, color=BLUE, alpha=0.2, linewidth=0, label=band
        )
        panel.plot(results["steps"], middle, color=BLUE, label="median of columns")
        panel.plot(results["steps"], least, color=RED, linewidth=1, label="smallest column")
        finish(
            panel, title.capitalize(), "training step", "damper H (1: no damping)", ylim=(0, 1.05)
        )
        panel.legend(
            fontsize=9, loc="lower right", bbox_to_anchor=(1, 0 if least[-1] > 0.3 else 0.25)
        )
    panel = axes[2]
    for role, colour in (("vector", ORANGE), ("embedding", BLUE)):
        columns = results["columns"][role]
        panel.scatter(columns["s"], columns["h"], s=9, color=colour, alpha=0.5, label=ROLES[role])
    s = np.geomspace(0.01, 20, 200)
    panel.plot(
        s,
        np.minimum(1, 1 / s),
        color="0.2",
        linewidth=1,
        label="rms / s, at most 1: what the latest gradient allows",
    )
    finish(
        panel,
        f"Every column at step {results['chosen']}",
        "s, the mean size of a column's gradient, as a multiple of its rms over the columns (log scale)",
        "damper H (1: no damping)",
        xscale="log",
        ylim=(0, 1.05),
        xlim=(0.01, 20),
    )
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.legend(fontsize=9, loc="lower left")
    save(figure, path)


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """One row per role: medians over the second half of the run."""
    rows = []
    for role, title in ROLES.items():
        found = results["roles"][role]
        half = len(results["steps"]) // 2
        least, low, middle, _ = np.median(np.array(found["quantiles"])[half:], axis=0)
        shares = [float(np.median(found[name][half:])) for name in ("damped", "instant")]
        rows.append([title, *(f"{value:.3f}" for value in (middle, low, least, *shares))])
    return rows
