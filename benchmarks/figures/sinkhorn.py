"""The effect of Sinkhorn's sweeps on real gradients: norms of rows and columns, and singular values."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.faithfulness import matrices_of
from benchmarks.figures.observe import Seen
from benchmarks.figures.style import finish, panels, short
from examples.llama.comparing.palette import BLUE, GREEN, ORANGE, RED
from examples.llama.comparing.plots import save
from layout_optax import ParamLayout, infer_layout
from sage_optax import scale_by_sinkhorn

SWEEPS = (1, 2, 3, 4, 5, 8, 12)


def measure(run: Iterable[Seen], chosen: int) -> dict[str, Any]:
    """Spreads of norms by sweeps and spectra, of the matrices' gradients at one step of a run.

    Returns:
      ``rows`` and ``columns``: by number of sweeps the largest over the smallest norm (tenth, median and last
      tenth of all matrices); ``spectra``: by name the median over the matrices of the k-th singular
      value over the largest; ``stable_rank``: ||X||_F^2 / ||X||_2^2 of each, median.
    """
    gradients = next(matrices_of(seen.gradients) for seen in run if seen.step == chosen)
    directions = {"G": gradients} | {sweeps: normalised(gradients, sweeps) for sweeps in SWEEPS}
    spreads: dict[str, list[list[float]]] = {"rows": [], "columns": []}
    for tree in directions.values():
        for side, found in spreads.items():
            found.append(short(np.quantile(_spreads(tree, side), (0.1, 0.5, 0.9))))
    named = {
        "G": gradients,
        "sign(G)": jax.tree.map(jnp.sign, gradients),
        "Sinkhorn, 5 sweeps": directions[5],
    }
    spectra = {name: _spectra(tree) for name, tree in named.items()}
    return {
        "chosen": chosen,
        "sweeps": [0, *SWEEPS],
        **spreads,
        "spectra": {name: short(np.median(each, axis=0)) for name, each in spectra.items()},
        "stable_rank": {
            name: short([np.median(np.sum(each**2, axis=1))])[0] for name, each in spectra.items()
        },
    }


@jax.jit
def normalised(gradients: Any, sweeps: int) -> Any:
    """SinkGD's direction after some sweeps, whose number is not a constant of the program."""
    return scale_by_sinkhorn(sweeps).update(gradients, optax.EmptyState())[0]


def _every(tree: Any, of: Callable[[np.ndarray, ParamLayout], np.ndarray]) -> list[np.ndarray]:
    """A function of each stack (layers, in, out) and its layout."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(infer_layout(tree)), strict=True)
    return [of(np.asarray(leaf, np.float64), layout) for leaf, layout in pairs]


def _spreads(tree: Any, side: str) -> np.ndarray:
    """Largest over smallest norm of the rows or columns of every matrix."""

    def of(stack: np.ndarray, layout: ParamLayout) -> np.ndarray:
        over = layout.column_axes if side == "rows" else layout.row_axes
        norms = np.sqrt(np.sum(stack**2, axis=over))
        return norms.max(axis=1) / norms.min(axis=1)

    return np.concatenate(_every(tree, of))


def _spectra(tree: Any) -> np.ndarray:
    """Singular values over the largest, one row per matrix, as many as the smallest matrix has."""
    values = _every(tree, lambda stack, _: np.linalg.svd(stack, compute_uv=False))
    few = min(each.shape[1] for each in values)
    return np.concatenate([each[:, :few] / each[:, :1] for each in values])


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Spread of norms by sweeps, and spectra."""
    figure, (left, right) = panels(2)
    for side, colour in (("rows", BLUE), ("columns", RED)):
        low, middle, high = np.array(results[side]).T
        left.fill_between(results["sweeps"], low, high, color=colour, alpha=0.2, linewidth=0)
        left.plot(results["sweeps"], middle, "o-", color=colour, markersize=4, label=side)
    left.axvline(5, color="0.6", linewidth=0.8, linestyle="--")
    left.legend(fontsize=9)
    finish(left, "Largest over smallest norm", "sweeps (default: 5)", "ratio", yscale="log")
    colours = (ORANGE, GREEN, BLUE)
    for (name, values), colour in zip(results["spectra"].items(), colours, strict=True):
        label = f"{name}, stable rank {results['stable_rank'][name]:.1f}"
        right.plot(np.arange(1, len(values) + 1), values, color=colour, label=label)
    right.axhline(1, color="0.6", linewidth=0.8, linestyle="--", label="orthogonalised (Muon)")
    right.legend(fontsize=9, loc="lower left")
    finish(
        right,
        f"Singular values of the direction, step {results['chosen']}",
        "index",
        "over the largest",
        xscale="log",
        yscale="log",
    )
    save(figure, path)
