"""Compares low-rank momentum with the exact one, over a real training run of the demo model.

    python -m benchmarks.faithfulness

trains the demo Llama with AdamW and feeds each gradient of its matrices to the factors of every rank, which do
not affect the run. It writes faithfulness.json, faithfulness.md and two pictures.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.common import circumstances, describe_circumstances, table, write_results
from examples.llama.comparing.palette import BLUE, GREEN, PINK, RED, SKY
from examples.llama.comparing.plots import WIDTH
from examples.llama.data.batches import train_iterator
from examples.llama.data.dataset import Dataset, prepare_data
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import apply, create
from examples.llama.model.loss import next_token_loss
from examples.llama.training.config import TrainConfig, data_config, resolve
from examples.llama.training.step import accumulated_gradients, warmup_cosine
from layout_optax import ParamLayout, infer_layout
from lorapre_optax import LowRankState, lorapre_metrics, low_rank_ema, low_rank_trace

B1, B2, MU = 0.9, 0.95, 0.95
MOMENTS = {
    "first": "Adam's first moment",
    "second": "Adam's second moment",
    "trace": "Muon's accumulator",
}


class Tracked(NamedTuple):
    """The momenta of one rank."""

    first: LowRankState
    second: LowRankState
    trace: LowRankState


class Exact(NamedTuple):
    """The same momenta in full."""

    first: Any
    second: Any
    trace: Any


def remember(old: Exact, gradients: Any) -> Exact:
    """The exact momenta after another gradient."""
    return Exact(
        jax.tree.map(lambda m, g: B1 * m + (1 - B1) * g, old.first, gradients),
        jax.tree.map(lambda v, g: B2 * v + (1 - B2) * g**2, old.second, gradients),
        jax.tree.map(lambda m, g: MU * m + g, old.trace, gradients),
    )


def observer(rank: int) -> tuple[Callable[[Any], Tracked], Callable[..., Any]]:
    """The functions ``init(matrices)`` and ``observe(tracked, gradients, exact)`` of one rank.

    ``observe`` takes the exact momenta after the gradient and returns the next factors and arrays with one
    number per matrix: for each of `MOMENTS` ``cosine`` and ``ratio`` of norms between the stored product and
    the exact momentum, the same for the applied momentum (product of the previous factors plus the current
    gradient), and the share of the gradient's energy outside the tracked subspace. The second moment's product
    is squared.
    """
    options: dict[str, Any] = {"full_rank_fallback": False}
    chains = (
        low_rank_ema(B1, rank, debias=False, **options),
        low_rank_ema(B2**0.5, rank, debias=False, target=jnp.abs, **options),
        low_rank_trace(MU, rank, **options),
    )

    # One program per moment compiles faster than one for all.
    shares = jax.jit(lambda state, gradients: lorapre_metrics(state, gradients))
    updates = [jax.jit(tx.update) for tx in chains]

    @partial(jax.jit, static_argnums=0)
    def compare(name: str, before: LowRankState, after: LowRankState, gradients: Any, exact: Any):
        kept, stored = products(before, gradients), products(after, gradients)
        applied = jax.tree.map(partial(_applied, name), kept, gradients)
        if name == "second":
            stored = jax.tree.map(jnp.square, stored)
        found = {}
        for what, tree in (("stored", stored), ("applied", applied)):
            cosine, ratio = agreement(tree, exact)
            found[f"{name}/{what}/cosine"], found[f"{name}/{what}/ratio"] = cosine, ratio
        return found

    def init(matrices: Any) -> Tracked:
        return Tracked(*(jax.jit(tx.init)(matrices) for tx in chains))  # pyright: ignore[reportArgumentType]

    def observe(tracked: Tracked, gradients: Any, exact: Exact) -> tuple[Tracked, dict[str, Any]]:
        energy = jax.device_get(shares(tracked.first, gradients))
        outside = [1 - np.ravel(each["energy_share"]) for each in energy.values()]
        found = {"outside": np.concatenate(outside)}
        after: list[Any] = []
        for name, update, before in zip(MOMENTS, updates, tracked, strict=True):
            _, following = jax.block_until_ready(update(gradients, before))
            numbers = compare(name, before, following, gradients, getattr(exact, name))
            found |= jax.device_get(numbers)
            after.append(following)
        return Tracked(*after), found

    return init, observe


def products(state: LowRankState, like: Any) -> Any:
    """B A of every matrix, in the parameters' axes."""
    layouts = infer_layout(like)

    def product(layout: ParamLayout, left: jax.Array, right: jax.Array) -> jax.Array:
        if left.ndim != 3 or layout.batch_axes(3) != (0,):
            raise ValueError("faithfulness: the matrices of the demo model are stacks on axis 0.")
        rows_first = jnp.einsum("lrp,lrq->lpq", left, right)
        return rows_first if layout.row_axes == (1,) else rows_first.swapaxes(1, 2)

    return jax.tree.map(product, layouts, state.left, state.right)


def agreement(found: Any, exact: Any) -> tuple[jax.Array, jax.Array]:
    """Cosines and ratios of norms, one number per matrix of every stack."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    cosines, ratios = [], []
    for low, full in pairs:
        # Largest entries become one, so that squares of small gradients stay in range.
        tops = [jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True) for x in (low, full)]
        low, full = (
            x / jnp.where(top > 0, top, 1) for x, top in zip((low, full), tops, strict=True)
        )
        sizes = [jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2))) for x in (low, full)]
        cosines.append(jnp.sum(low * full, axis=(1, 2)) / jnp.maximum(sizes[0] * sizes[1], 1e-30))
        scale = (tops[0] / jnp.where(tops[1] > 0, tops[1], 1))[:, 0, 0]
        ratios.append(scale * sizes[0] / jnp.maximum(sizes[1], 1e-30))
    return jnp.concatenate(cosines), jnp.concatenate(ratios)


def run(
    ranks: Sequence[int],
    config: TrainConfig,
    *,
    model: LlamaConfig | None = None,
    dataset: Dataset | None = None,
    every: int = 1,
) -> dict[str, Any]:
    """Trains and observes; returns medians and deciles over all matrices by rank and number."""
    settings = resolve(config, model)
    steps = settings.steps
    dataset = prepare_data(data_config(config, settings)) if dataset is None else dataset
    batches = train_iterator(dataset, settings.batch_size, settings.seq_len, settings.seed)
    graphdef, params = create(settings.model, settings.seed)
    shares = warmup_cosine(steps, settings.warmup_steps, settings.final_rate_fraction)
    tx = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm or float("inf")),
        settings.optimizer_from(lambda count: settings.learning_rate * shares(count)),
    )

    def loss_fn(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return next_token_loss(apply(graphdef, params), tokens)

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, tokens: jax.Array) -> Any:
        params, opt_state, exact = state
        loss, gradients = accumulated_gradients(loss_fn, params, tokens)
        updates, opt_state = tx.update(gradients, opt_state, params)
        matrices = matrices_of(gradients)
        exact = remember(exact, matrices)
        return (optax.apply_updates(params, updates), opt_state, exact), loss, matrices

    zeros = jax.tree.map(jnp.zeros_like, matrices_of(params))
    state = (params, jax.jit(tx.init)(params), Exact(zeros, zeros, zeros))
    state = jax.tree.map(jnp.copy, state)  # donated buffers must not be shared
    observers = {rank: observer(rank) for rank in ranks}
    tracked = {rank: init(zeros) for rank, (init, _) in observers.items()}
    taken, losses, rows = [], [], []
    for number in range(1, steps + 1):
        state, loss, matrices = jax.block_until_ready(step(state, next(batches)["tokens"]))
        row = {}
        for rank, (_, observe) in observers.items():
            tracked[rank], row[rank] = observe(tracked[rank], matrices, state[2])
        if number % every == 0 or number <= 10:
            taken.append(number)
            losses.append(float(loss))
            rows.append(row)
    return {
        "steps": taken,
        "loss": losses,
        "learning_rate": settings.learning_rate,
        "corpus_sha256": dataset.corpus_sha256,
        "matrices": int(rows[0][ranks[0]]["outside"].size),
        "ranks": {
            str(rank): {key: _quantiles([row[rank][key] for row in rows]) for key in rows[0][rank]}
            for rank in ranks
        },
    }


def matrices_of(tree: Any) -> dict[str, Any]:
    """The attention and MLP kernels, as a separate tree."""
    layers = tree["layers"]
    return {"layers": {name: layers[name] for name in ("mlp", "self_attn")}}


def weight_share(outside: np.ndarray | float, fresh: float = 1 - B1) -> np.ndarray:
    """Share of a gradient's total weight that its part outside the subspace receives.

    Inside, a gradient is remembered and its weights (1-b1) b1^k add up to 1. Outside it enters once with 1-b1
    (the paper's rule). A residual of kappa = b1 makes ``fresh`` 1.

    >>> round(float(weight_share(0.5)), 4), float(weight_share(0.5, fresh=1.0))
    (0.0909, 0.5)
    """
    outside = np.asarray(outside)
    return fresh * outside / (fresh * outside + 1 - outside)


def plot(results: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Draws faithfulness.png (cosines and ratios) and faithfulness_weights.png (weights outside)."""
    steps, ranks = results["steps"], list(results["ranks"])
    colours = dict(zip(ranks, (BLUE, RED, GREEN, PINK, SKY), strict=False))
    figure, axes = plt.subplots(3, 2, figsize=(WIDTH, 10.4), layout="constrained", sharex=True)
    for line, (name, title) in zip(axes, MOMENTS.items(), strict=True):
        for panel, what in zip(line, ("cosine", "ratio"), strict=True):
            for rank in ranks:
                low, middle, high = np.array(results["ranks"][rank][f"{name}/stored/{what}"]).T
                panel.fill_between(steps, low, high, color=colours[rank], alpha=0.15, linewidth=0)
                panel.plot(steps, middle, color=colours[rank])
                applied = np.array(results["ranks"][rank][f"{name}/applied/{what}"])[:, 1]
                panel.plot(steps, applied, color=colours[rank], linestyle=":")
            panel.set_title(title, fontsize=10)
            panel.set_ylabel(
                "cosine to the exact" if what == "cosine" else "norm, of the exact one's"
            )
            panel.axhline(1, color="0.6", linewidth=0.8)
            panel.grid(alpha=0.3)
            panel.set_ylim(0, 1.05 if what == "cosine" else 1.6)
    handles = [Line2D([], [], color=colours[rank], label=f"rank {rank}") for rank in ranks]
    handles += [
        Line2D([], [], color="0.3", label="factors as stored, median of matrices"),
        Line2D([], [], color="0.3", linestyle=":", label="as applied, median"),
        Patch(color="0.3", alpha=0.2, label="stored: first to last tenth of matrices"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("training step")
    figure.suptitle(
        f"Low-rank beside exact momentum, {results['matrices']} matrices of an AdamW run of the demo model",
        fontsize=11,
    )
    figure.savefig(folder / "faithfulness.png", dpi=150)
    plt.close(figure)

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 4.6), layout="constrained", sharex=True
    )
    for rank in ranks:
        low, middle, high = np.array(results["ranks"][rank]["outside"]).T
        left.fill_between(steps, low, high, color=colours[rank], alpha=0.15, linewidth=0)
        left.plot(steps, middle, color=colours[rank])
        right.plot(steps, weight_share(middle), color=colours[rank])
        right.plot(steps, middle, color=colours[rank], linestyle="--")
    left.set_title("Gradient outside the tracked subspace", fontsize=10)
    left.set_ylabel("share of the gradient's energy")
    right.set_title("What it weighs in the momentum", fontsize=10)
    right.set_ylabel("share of the total weight")
    for panel in (left, right):
        panel.set(xlabel="training step", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    handles = [Line2D([], [], color=colours[rank], label=f"rank {rank}") for rank in ranks]
    handles += [
        Line2D([], [], color="0.3", label="median; right: the paper's rule"),
        Line2D([], [], color="0.3", linestyle="--", label="right: residual 0.9"),
        Patch(color="0.3", alpha=0.2, label="first to last tenth of matrices"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(folder / "faithfulness_weights.png", dpi=150)
    plt.close(figure)


def page(results: Mapping[str, Any]) -> str:
    """The page of results: medians over the second half of the run."""
    half = len(results["steps"]) // 2

    def middle(rank: str, key: str) -> float:
        return float(np.median(np.array(results["ranks"][rank][key])[half:, 1]))

    moments, weights = [], []
    for rank in results["ranks"]:
        for name, title in MOMENTS.items():
            keys = [
                f"{name}/{what}/{number}"
                for what in ("stored", "applied")
                for number in ("cosine", "ratio")
            ]
            moments.append([rank, title, *(f"{middle(rank, key):.3f}" for key in keys)])
        outside = middle(rank, "outside")
        weights.append([rank, f"{outside:.3f}", f"{float(weight_share(outside)):.3f}"])
    header = ["rank", "momentum", "cosine", "norm ratio", "applied: cosine", "norm ratio"]
    return f"""# How faithful low-rank momentum is

The demo Llama (hidden size 192, {results["matrices"]} matrices) trained for {results["steps"][-1]} steps with
AdamW at {results["learning_rate"]:g}; the factors of LoRA-Pre follow the clipped gradients of its matrices
(the paper's rule, relative damping 1e-4) without affecting the run. "Stored" compares the product of the
factors after a step (for the second moment its square) with the exact momentum of the same decay. "Applied"
compares the momentum in the direction: the previous product plus the current gradient. Medians over all
matrices and the second half of the run.

{describe_circumstances(results["circumstances"])}

{table(header, moments)}

The table gives the gradient energy outside the tracked subspace, 1 - (|P_B G|^2 + |G P_A|^2) / (2 |G|^2), and
that part's share of all the weight that a gradient ever receives. Inside, the gradient is remembered and its
weights add up to 1. Outside, it enters once with 1 - b1 = 0.1. With `residual=0.9` the second number equals
the first.

{table(["rank", "energy outside", "weight of it, paper"], weights)}

![cosine and norm of low-rank momentum](faithfulness.png)

![energy and weight outside the subspace](faithfulness_weights.png)
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs, and writes the JSON file, the page and the pictures; returns the JSON file's content."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faithfulness", description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument(
        "--every", type=int, default=2, help="steps between records, after the 10th"
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    config = TrainConfig(preset="demo", optimizer="adamw", steps=options.steps)
    results = run(options.ranks, config, every=options.every)
    return publish(results, options.output, ["python", "-m", "benchmarks.faithfulness", *arguments])


def publish(results: dict[str, Any], folder: pathlib.Path, command: list[str]) -> dict[str, Any]:
    """Adds the circumstances and writes everything."""
    results = {"circumstances": circumstances(shlex.join(command)), "model": "demo", **results}
    write_results(folder, "faithfulness", results, page(results))
    plot(results, folder)
    return results


def _applied(name: str, product: jax.Array, gradient: jax.Array) -> jax.Array:
    """The momentum in the direction: equations 4 and 8 of Algorithm 1, the accumulator of Algorithm 2."""
    if name == "first":
        return B1 * product + (1 - B1) * gradient
    if name == "second":
        return B2 * product**2 + (1 - B2) * gradient**2
    return MU * product + gradient


def _quantiles(rows: Sequence[np.ndarray]) -> list[list[float]]:
    """First decile, median and last decile of each row, to four digits."""
    return [
        [
            float(f"{value:.4g}")
            for value in np.quantile(np.asarray(row, np.float64), (0.1, 0.5, 0.9))
        ]
        for row in rows
    ]


if __name__ == "__main__":
    main()
