"""The error of each precision of LoRA-Pre's products, against float64: cosines, norms, disturbances.

    python -m benchmarks.precision

Accelerators multiply in passes of TF32 or bfloat16. This script emulates each pass on a CPU with operands
rounded as on those devices, and float32 sums, so that no device is needed. It writes precision.json and
precision.md.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import circumstances, describe_circumstances, table, write_results
from layout_optax import ParamLayout
from lorapre_optax import (
    _factors,
    _solves,
    low_rank_ema,
    scale_by_lorapre_adam,
    scale_by_lorapre_muon,
)

BITS = {"TF32": 10, "bfloat16": 7, "float32": 23}
"""Bits of the mantissa after the leading one."""
P, Q = 96, 160
LAYOUT = ParamLayout("matrix", (0,), (1,))
DECAYS = (0.9, 0.95**0.5)


class Setting(NamedTuple):
    """Passes and dtypes of the products.

    Attributes:
        large: Precision of products with a whole matrix.
        exact: Precision of Gram matrices and of products with inverses.
        passes: Passes of the latter: 1 or 3.
    """

    large: str
    exact: str
    passes: int


SETTINGS = {
    "float32 everywhere": Setting("float32", "float32", 1),
    "CUDA before: TF32, inverses in float32": Setting("TF32", "float32", 1),
    "CUDA, float32 gradients: TF32, inverses in three passes": Setting("TF32", "TF32", 3),
    "CUDA, bfloat16 gradients: bfloat16, inverses in three passes": Setting("bfloat16", "TF32", 3),
    "TPU, bfloat16 gradients: bfloat16, inverses in float32": Setting("bfloat16", "float32", 1),
    "not used: bfloat16, three passes of bfloat16": Setting("bfloat16", "bfloat16", 3),
    "not used: one pass of TF32": Setting("TF32", "TF32", 1),
    "not used: one pass of bfloat16": Setting("bfloat16", "bfloat16", 1),
}
DISTURBANCES: dict[str, Callable[..., jax.Array]] = {
    "random sizes from 1e-12 to 1e6": lambda g, key: (
        1e3 * g * 10.0 ** jax.random.uniform(key, (), minval=-12, maxval=6)
    ),
    "zeros": lambda g, key: 0 * g,
    "a million times larger": lambda g, key: 1e6 * g,
    "rank one": lambda g, key: (
        1e-3 * jnp.outer(jnp.sin(jnp.arange(1.0, P + 1)), jnp.cos(jnp.arange(Q))).astype(g.dtype)
    ),
}


def rounded(x: jax.Array, kind: str) -> jax.Array:
    """Rounds to TF32 or bfloat16 and keeps the dtype."""
    return x if kind == "float32" else jax.lax.reduce_precision(x, 8, BITS[kind])


def product(equation: str, a: jax.Array, b: jax.Array, kind: str, passes: int) -> jax.Array:
    """An einsum in passes of a kind; the sums are those of the operands' dtype.

    >>> a = jnp.full((2, 2), 1 / 3)
    >>> exact = a.astype(float) @ a
    >>> error = lambda kind, n: float(abs(product("ij,jk->ik", a, a, kind, n) - 2 / 9).max())
    >>> error("bfloat16", 1) > 100 * error("bfloat16", 3) > 0
    True
    """
    multiply = lambda x, y: jnp.einsum(equation, x, y, precision="highest")  # noqa: E731
    high = [rounded(x, kind) for x in (a, b)]
    if passes == 1:
        return multiply(*high)
    low = [rounded(x - top, kind) for x, top in zip((a, b), high, strict=True)]
    return multiply(low[0], high[1]) + multiply(high[0], low[1]) + multiply(*high)


@contextlib.contextmanager
def emulated(setting: Setting) -> Iterator[None]:
    """A context in which LoRA-Pre's products are traced with a setting."""

    def large(equation, a, b, narrow=None, out_sharding=None, *, narrow_result=False):
        found = product(equation, a, b, setting.large, 1)
        writes_narrow = narrow_result and setting.large == "bfloat16"
        return rounded(found, "bfloat16") if writes_narrow else found

    def exact(equation, a, b, out_sharding=None):
        return product(equation, a, b, setting.exact, setting.passes)

    with (
        mock.patch.object(_factors, "large_product", large),
        mock.patch.object(_factors, "exact_product", exact),
        mock.patch.object(_solves, "exact_product", exact),
    ):
        yield


def gradients(steps: int, rank: int = 12, noise: float = 0.3) -> np.ndarray:
    """A few drifting directions whose sizes fall off, in noise; rounded to bfloat16, in float64."""
    rng = np.random.default_rng(0)
    sizes = 1 / np.arange(1, rank + 1)
    u, v = rng.normal(size=(P, rank)), rng.normal(size=(rank, Q))
    found = []
    for _ in range(steps):
        v = v + 0.05 * rng.normal(size=v.shape)
        found.append(1e-3 * ((u * sizes) @ v + noise * rng.normal(size=(P, Q))))
    return np.asarray(jnp.asarray(np.stack(found), jnp.bfloat16).astype(jnp.float32), np.float64)


def run(tx: Any, grads: jax.Array) -> np.ndarray:
    """The directions of all steps."""
    return np.asarray(jax.jit(lambda grads: _scan(tx, grads))(grads), np.float64)


def _scan(tx: Any, grads: jax.Array) -> jax.Array:
    def step(state, g):
        direction, state = tx.update(g, state)
        return state, direction

    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))


def compare(found: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Cosine and ratio of norms, the worst of the second half of the steps."""
    half = list(zip(found, exact, strict=True))[len(found) // 2 :]
    ratios = [float(np.linalg.norm(x) / np.linalg.norm(y)) for x, y in half]
    return {
        "lost_cosine": 1 - min(_cosine(x, y) for x, y in half),
        "norm_ratio": max(ratios, key=lambda ratio: abs(ratio - 1)),
    }


def exact_average(grads: np.ndarray, decay: float) -> np.ndarray:
    """The full average at every step, over 1 - b^t."""
    average, found = np.zeros_like(grads[0]), []
    for t, g in enumerate(grads, 1):
        average = decay * average + (1 - decay) * g
        found.append(average / (1 - decay**t))
    return np.stack(found)


def optimizers(rank: int) -> dict[str, Any]:
    """The rules to run: an average, Adam and Muon."""
    options: dict[str, Any] = {"layout": LAYOUT, "full_rank_fallback": False}
    return {
        "average": low_rank_ema(DECAYS[0], rank, **options),
        "Adam": scale_by_lorapre_adam(rank, bound=1.0, bias_correction="exact", **options),
        "accumulator of Muon": scale_by_lorapre_muon(rank, ns_steps=0, **options),
    }


def measure_run(rank: int, steps: int) -> dict[str, Any]:
    """Every setting's directions against those in float64, and the average against the exact one."""
    grads = gradients(steps)
    with jax.enable_x64(True):
        exact = {name: run(tx, jnp.asarray(grads)) for name, tx in optimizers(rank).items()}
    full = exact_average(grads, DECAYS[0])
    results: dict[str, Any] = {"float64": {"faithful": compare(exact["average"], full)}}
    for label, setting in SETTINGS.items():
        with emulated(setting):
            found = {
                name: run(tx, jnp.asarray(grads, jnp.float32))
                for name, tx in optimizers(rank).items()
            }
        results[label] = {name: compare(found[name], exact[name]) for name in found}
        results[label]["faithful"] = compare(found["average"], full)
    return results


def measure_disturbances(rank: int, length: int = 100) -> dict[str, Any]:
    """Cosine to the exact average before and 200 steps after a disturbance; whether all was finite."""
    normal = jnp.asarray(gradients(500), jnp.float32)
    disturbed = {}
    for name, disturb in DISTURBANCES.items():
        count = 1 if name.startswith("a million") else length
        changed = jax.vmap(disturb)(
            normal[200 : 200 + count], jax.random.split(jax.random.key(0), count)
        )
        disturbed[name] = normal.at[200 : 200 + count].set(changed)
    results: dict[str, Any] = {}
    for label, setting in SETTINGS.items():
        results[label] = {}
        tx = optimizers(rank)["average"]
        with emulated(setting):
            directions = jax.jit(lambda grads, tx=tx: _scan(tx, grads))
            for name, grads in disturbed.items():
                found = np.asarray(directions(grads), np.float64)
                exact = exact_average(np.asarray(grads, np.float64), DECAYS[0])
                results[label][name] = {
                    "finite": bool(np.all(np.isfinite(found))),
                    "before": _cosine(found[199], exact[199]),
                    "after": _cosine(found[499], exact[499]),
                }
    return results


def measure_newton_schulz() -> dict[str, float]:
    """Error of five iterations against float64, relative to the norm, by dtype."""
    x = np.random.default_rng(0).normal(size=(P, Q))

    def direction(dtype: str, ns_dtype: str) -> np.ndarray:
        """Newton-Schulz of x alone: without history, and of a shape whose factor is 1."""
        tx = scale_by_lorapre_muon(None, 0.0, ns_dtype=ns_dtype, layout=LAYOUT)
        gradient = jnp.asarray(x, dtype)
        return np.asarray(jax.jit(tx.update)(gradient, tx.init(gradient))[0])

    with jax.enable_x64(True):
        exact = direction("float64", "float64")
    errors = {name: direction("float32", name) - exact for name in ("float32", "bfloat16")}
    return {name: float(np.linalg.norm(e) / np.linalg.norm(exact)) for name, e in errors.items()}


def measure_parts(rank: int = 64) -> dict[str, dict[str, float]]:
    """Errors of single products against float64, relative to the norm."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(rank, Q)) * np.linspace(1, 1e-2, rank)[:, None]
    gram = factor @ factor.T
    inverse = np.linalg.inv(gram + 1e-4 * np.trace(gram) / rank * np.eye(rank))
    left = rng.normal(size=(P, rank))
    pairs = {
        "Gram matrix": ("za,Za->zZ", factor, factor),
        "inverse times factor": ("zZ,Za->za", inverse, factor),
        "product of factors": ("pz,za->pa", left, factor),
    }
    kinds = {
        "float32": ("float32", 1),
        "three passes of TF32": ("TF32", 3),
        "three passes of bfloat16": ("bfloat16", 3),
        "TF32": ("TF32", 1),
        "bfloat16": ("bfloat16", 1),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (equation, a, b) in pairs.items():
        a32, b32 = (jnp.asarray(x, jnp.float32) for x in (a, b))
        exact = np.einsum(equation, np.asarray(a32, np.float64), np.asarray(b32, np.float64))
        found[name] = {
            kind: float(
                np.linalg.norm(np.asarray(product(equation, a32, b32, *how), np.float64) - exact)
                / np.linalg.norm(exact)
            )
            for kind, how in kinds.items()
        }
    return found


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = results["parts"]
    kinds = list(next(iter(parts.values())))
    part_rows = [[name, *(f"{row[kind]:.1e}" for kind in kinds)] for name, row in parts.items()]
    names = ("average", "Adam", "accumulator of Muon")
    sections = []
    for rank, rows in results["runs"].items():
        lines = []
        for label, row in rows.items():
            cells = [
                f"{row[name][what]:{form}}" if name in row else "-"
                for name in names
                for what, form in (("lost_cosine", ".0e"), ("norm_ratio", ".4f"))
            ]
            faithful = row["faithful"]
            lines.append(
                [
                    label,
                    *cells,
                    f"{1 - faithful['lost_cosine']:.4f}",
                    f"{faithful['norm_ratio']:.4f}",
                ]
            )
        header = ["products", *(f"{n}: {w}" for n in names for w in ("1 - cosine", "norm"))]
        header += ["to the exact average: cosine", "norm"]
        sections.append(f"### Rank {rank}\n\n{table(header, lines)}")
    disturbed = [
        [
            label,
            *(
                f"{cell['before']:.3f}, {cell['after']:.3f}{'' if cell['finite'] else ', NOT FINITE'}"
                for cell in row.values()
            ),
        ]
        for label, row in results["disturbances"].items()
    ]
    schulz = results["newton_schulz"]
    return f"""# What lower precision costs LoRA-Pre

Products of lower precision are emulated on a CPU: operands are rounded to TF32 or bfloat16 as the devices round
them, sums are float32, and three passes also keep the rounding errors of both operands. All are compared with
float64. The page shows the error of each platform's settings, not their time.

{describe_circumstances(results["circumstances"])}

## Single products

Error relative to the norm; a matrix of {P} x {
        Q
    }, rank 64, rows of the factor from 1 down to 0.01, damping 1e-4.

{table(["product", *kinds], part_rows)}

Newton-Schulz, five iterations of a normal matrix: {schulz["float32"]:.0e} in float32, {
        schulz["bfloat16"]:.0e} in bfloat16.

## Runs

Gradients with a few drifting directions in noise, rounded to bfloat16: {P} x {Q}, {
        results["steps"]
    } steps.
Directions against those of the same rule in float64, the worst of the second half of the steps. The last two
columns compare the low-rank average with the exact one, where low rank itself causes the error. Muon's
accumulator is compared before Newton-Schulz.

{chr(10).join(sections)}

## Disturbances

Rank {
        results["disturbance_rank"]
    }. Cosine of the low-rank average to the exact one before a disturbance (100 steps; one
step for the factor of a million) and 200 steps or more after it.

{table(["products", *DISTURBANCES], disturbed)}
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures and writes ``precision.json`` and ``precision.md``; returns the JSON file's content."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    results = {
        "steps": options.steps,
        "parts": measure_parts(),
        "newton_schulz": measure_newton_schulz(),
        "runs": {str(rank): measure_run(rank, options.steps) for rank in options.ranks},
        "disturbance_rank": options.ranks[0],
        "disturbances": measure_disturbances(options.ranks[0]),
    }
    command = shlex.join(["python", "-m", "benchmarks.precision", *arguments])
    results = {"circumstances": circumstances(command), **results}
    write_results(options.output, "precision", results, page(results))
    return results


if __name__ == "__main__":
    main()
