"""The spectrum of momentum during training: the number of directions that hold its energy, step by step."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.faithfulness import matrices_of
from benchmarks.figures.observe import Seen
from benchmarks.figures.style import finish, panels, whole_numbers
from examples.llama.comparing.palette import BLUE, GREEN, ORANGE, PINK, RED, SKY
from examples.llama.comparing.plots import save

B1, B2 = 0.9, 0.95
SHARES = (0.5, 0.9, 0.99)
TRACKED = {"first": "first moment", "size": "average of |G|"}
"""Adam's first moment, and the target of LoRA-Pre's second moment: |G| at decay sqrt(b2)."""


def measure(run: Iterable[Seen], chosen: Iterable[int], every: int) -> dict[str, Any]:
    """Energies of the averages' singular values over all matrices.

    Args:
      run: any run of the demo model.
      chosen: steps whose whole curves are kept.
      every: steps between records, after the tenth.

    Returns:
      ``steps``; for each of `TRACKED` ``ranks``: by share of the energy the smallest rank that holds it (first
      tenth, median and last tenth over the matrices), one entry a step; ``curves``: by chosen step the
      median share that the first r directions hold, r from 1; the same of the gradient as ``G``.
    """
    names = ("G", *TRACKED)
    chosen, steps = set(chosen), []
    ranks: dict[str, dict[str, list[list[float]]]] = {
        name: {str(share): [] for share in SHARES} for name in names
    }
    curves: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    averages: Any = None
    for seen in run:
        matrices = matrices_of(seen.gradients)
        averages = follow(averages, matrices)
        if not (seen.step <= 10 or seen.step % every == 0 or seen.step in chosen):
            continue
        steps.append(seen.step)
        for name, tree in {"G": matrices, **averages}.items():
            held = _together([_held(leaf) for leaf in jax.tree.leaves(tree)])
            for share, found in ranks[name].items():
                needed = 1 + np.sum(held < float(share), axis=1)
                found.append([float(x) for x in np.quantile(needed, (0.1, 0.5, 0.9))])
            if seen.step in chosen:
                middle = np.median(held, axis=0)
                curves[name][str(seen.step)] = [float(f"{value:.4g}") for value in middle]
    return {"steps": steps, "ranks": ranks, "curves": curves}


@jax.jit
def follow(averages: Any, matrices: Any) -> Any:
    """The two averages after another gradient, without bias correction: scale does not affect a spectrum."""
    if averages is None:
        zeros = jax.tree.map(jnp.zeros_like, matrices)
        averages = {"first": zeros, "size": zeros}
    decays = {"first": (B1, lambda g: g), "size": (B2**0.5, jnp.abs)}
    return {
        name: jax.tree.map(partial(_average, *decays[name]), averages[name], matrices)
        for name in TRACKED
    }


def _average(decay: float, target: Any, old: jax.Array, gradient: jax.Array) -> jax.Array:
    return decay * old + (1 - decay) * target(gradient)


def _held(stack: jax.Array) -> np.ndarray:
    """Share of the energy in the first r singular directions of each matrix, up to the smaller side.

    It uses the Gram matrix of that side in float64, which is much faster than a decomposition.
    """
    matrices = np.asarray(stack, np.float64)
    if matrices.shape[1] < matrices.shape[2]:
        matrices = matrices.swapaxes(1, 2)
    energy = np.maximum(np.linalg.eigvalsh(matrices.swapaxes(1, 2) @ matrices)[:, ::-1], 0)
    return np.cumsum(energy, axis=1) / energy.sum(axis=1, keepdims=True)


def _together(stacks: list[np.ndarray]) -> np.ndarray:
    """One row per matrix; matrices with fewer directions hold everything beyond them."""
    most = max(each.shape[1] for each in stacks)
    return np.concatenate(
        [np.pad(each, ((0, 0), (0, most - each.shape[1])), constant_values=1.0) for each in stacks]
    )


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Curves of the first moment at the chosen steps, and the ranks of both averages over the run."""
    figure, (left, *right) = panels(3)
    curves = results["curves"]["first"]
    for (step, held), colour in zip(
        curves.items(), (SKY, GREEN, ORANGE, RED, BLUE, PINK), strict=False
    ):
        left.plot(np.arange(1, len(held) + 1), held, color=colour, label=f"step {step}")
    left.legend(fontsize=9, loc="lower right")
    title = "First moment: what its first r directions hold"
    finish(
        left,
        title,
        "rank r (log scale)",
        "share of energy, median of matrices",
        xscale="log",
        ylim=(0, 1.02),
    )
    whole_numbers(left.xaxis)
    shown = {**TRACKED, "size": "average of the gradient's magnitudes |G|"}
    for panel, (name, words) in zip(right, shown.items(), strict=True):
        for share, colour in zip(SHARES, (GREEN, BLUE, RED), strict=True):
            low, middle, high = np.array(results["ranks"][name][str(share)]).T
            panel.fill_between(results["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(results["steps"], middle, color=colour, label=f"{share:.0%} of the energy")
        panel.legend(fontsize=9, loc="upper right", title="bands: first to last tenth of matrices")
        title = f"Smallest rank that holds a share of the energy: {words}"
        finish(panel, title, "training step", "rank (log scale)", yscale="log", ylim=(0.9, 200))
        whole_numbers(panel.yaxis)
    save(figure, path)


def summary(results: Mapping[str, Any]) -> list[list[str]]:
    """A row for the gradient and each average: medians over the second half of the run."""
    half = len(results["steps"]) // 2
    rows = []
    for name, words in {"G": "gradient of a step", **TRACKED}.items():
        middles = [
            np.median(np.array(results["ranks"][name][str(share)])[half:, 1]) for share in SHARES
        ]
        rows.append([words.replace("|", r"\|"), *(f"{value:.0f}" for value in middles)])
    return rows
