"""Measures and draws the pictures of the explained pages.

    python -m benchmarks.figures

trains the demo model twice, with SAGE-Hybrid and with AdamW, and writes explained.json, explained.md and the
pictures to docs/results. `--draw-only` redraws from the JSON file.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from benchmarks.common import circumstances, describe_circumstances, table, write_results
from benchmarks.figures import cosine, damper, sinkhorn, spectrum
from benchmarks.figures.observe import steps_of
from examples.llama.data.dataset import Dataset
from examples.llama.model.config import LlamaConfig
from examples.llama.training.config import TrainConfig


def measure(
    steps: int, *, model: LlamaConfig | None = None, dataset: Dataset | None = None, **fields: Any
) -> dict[str, Any]:
    """Both runs.

    Args:
      steps: of each; columns and spectra are shown after two thirds of them.
      model: a shape to use instead of the demo's.
      dataset: prepared data to use instead of reading it.
      **fields: of `TrainConfig`, for both runs.
    """
    chosen = max(1, 2 * steps // 3)

    def run(optimizer: str) -> Any:
        config = TrainConfig(**{"preset": "demo", "optimizer": optimizer, "steps": steps, **fields})
        return steps_of(config, model=model, dataset=dataset)

    seen = list(_lean(run("sage_hybrid"), keep=chosen))
    curves = sorted({1, *(max(1, steps * part // 15) for part in (1, 2, 5, 10, 15))})
    return {
        "model": "demo",
        "learning_rate": seen[0].learning_rate,
        "corpus_sha256": seen[0].corpus_sha256,
        "damper": damper.measure(seen, chosen),
        "sinkhorn": sinkhorn.measure(seen, chosen),
        "spectrum": spectrum.measure(run("adamw"), curves, every=2),
    }


def _lean(run: Any, keep: int) -> Any:
    """A run that yields the gradients of embedding, head and vectors only, except at one step."""
    for seen in run:
        if seen.step != keep:
            layers = {**seen.gradients["layers"]}
            for name in ("mlp", "self_attn"):
                layers[name] = jax.tree.map(lambda _: optax.MaskedNode(), layers[name])
            seen = seen._replace(gradients={**seen.gradients, "layers": layers})
        yield seen


def draw(results: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Writes the pictures; momentum_cosine.png only if the numbers of `benchmarks.faithfulness` exist."""
    damper.plot(results["damper"], folder / "sage_damper.png")
    sinkhorn.plot(results["sinkhorn"], folder / "sinkhorn_sweeps.png")
    spectrum.plot(results["spectrum"], folder / "momentum_spectrum.png")
    faithfulness = folder / "faithfulness.json"
    if faithfulness.exists():
        cosine.plot(json.loads(faithfulness.read_text()), folder / "momentum_cosine.png")


def page(results: Mapping[str, Any]) -> str:
    """The page of results."""
    steps = results["damper"]["steps"][-1]
    sweeps = results["sinkhorn"]
    norms = [
        [count, f"{rows[1]:.3g}", f"{columns[1]:.3g}"]
        for count, rows, columns in zip(
            sweeps["sweeps"], sweeps["rows"], sweeps["columns"], strict=True
        )
    ]
    stable = [[name, f"{value:.1f}"] for name, value in sweeps["stable_rank"].items()]
    head = ["role", "median H", "first tenth", "smallest", "damped", "this step's term"]
    return f"""# Damper, sweeps and spectra on real gradients

These are the numbers of the pictures of [SAGE](../sage.md), [SinkGD](../sinkgd.md) and
[LoRA-Pre](../lorapre_explained.md), from the demo Llama (hidden size 192) trained for {steps} steps, once with
SAGE-Hybrid (rate {results["learning_rate"]:g}), once with AdamW. Gradients are clipped, as the optimizers see
them.

{describe_circumstances(results["circumstances"])}

## The damper

H over the columns of a role, medians over the second half of the run. "Damped": H below 1. "This step's
term": the instantaneous term is the smaller of the two.

{table(head, damper.summary(results["damper"]))}

![the damper over a run, and against the size of a column](sage_damper.png)

## Sinkhorn's sweeps

Largest over smallest norm of the rows and of the columns of a matrix's gradient at step {sweeps["chosen"]},
median over all matrices.

{table(["sweeps", "rows", "columns"], norms)}

The stable rank of directions, squared Frobenius over squared spectral norm, of at most 192:

{table(["direction", "stable rank"], stable)}

![spread of norms by sweeps, and singular values](sinkhorn_sweeps.png)

## The spectrum of momentum

The smallest rank that holds a share of the energy (the squared Frobenius norm), of at most 192: medians over
all matrices and the second half of AdamW's run. The first moment has b1 = {spectrum.B1}; the average of |G|
decays by sqrt({spectrum.B2}).

{table(["", *(f"{share:.0%}" for share in spectrum.SHARES)], spectrum.summary(results["spectrum"]))}

![spectrum of momentum during training](momentum_spectrum.png)
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures unless told not to, writes and draws; returns the JSON file's content."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument("--draw-only", action="store_true", help="from the stored numbers")
    options = parser.parse_args(arguments)
    stored = options.output / "explained.json"
    if options.draw_only:
        results = json.loads(stored.read_text())
    else:
        command = shlex.join(["python", "-m", "benchmarks.figures", *arguments])
        results = measure(options.steps)
        results = {"circumstances": circumstances(command), **results}
    write_results(options.output, "explained", results, page(results))
    draw(results, options.output)
    return results


if __name__ == "__main__":
    main()
