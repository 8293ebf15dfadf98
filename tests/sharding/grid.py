"""The grid: every kind of parameter times every way to shard it, as one tree, and the transformations."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_optax as lorapre
import sage_optax as sage
from layout_optax import ParamLayout, infer_layout

RANK = 4
KINDS = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
SPECS = {
    "x_y": ("x", "y"),
    "x_": ("x", None),
    "_y": (None, "y"),
    "xy_": (("x", "y"), None),
}
# Shape, and which axes the two parts of a spec go to.
PARAMETERS = {
    "dense/kernel": ((16, 32), (0, 1)),
    "query/kernel": ((16, 8, 4), (0, 1)),
    "out/kernel": ((8, 4, 24), (0, 2)),
    "layers/up/kernel": ((3, 16, 24), (1, 2)),
    "scanned_second/kernel": ((16, 3, 24), (0, 2)),
    "experts/kernel": ((8, 16, 24), (0, 2)),
    "embedding": ((48, 16), (0, 1)),
    "lm_head/kernel": ((16, 40), (0, 1)),
    "norm/scale": ((32,), (0,)),
    "query/bias": ((8, 4), (0, 1)),
}
RULES = [
    ("scanned_second/kernel", ParamLayout("matrix", (2,), (0,))),
    ("query/bias", ParamLayout("vector", (), (0, 1))),
]
LAYOUT = functools.partial(infer_layout, rules=RULES)


def mesh_of(kind: str) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(KINDS[kind],) * 2)


@functools.cache
def quick() -> dict[str, Any]:
    """Compiler options that leave the partitioner as it is and halve the time of code generation."""
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    more = {**options, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x, compiler_options=more).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:  # not every version of XLA has it
        return options
    return more


def full_paths() -> list[str]:
    """The path of every cell's parameter: ``x_y/dense/kernel``."""
    return [f"{spec}/{name}" for spec in SPECS for name in PARAMETERS]


def square_paths(turn: int = 0) -> list[str]:
    """One cell for each kind of parameter, the four specs in turn; four turns make all cells."""
    specs = list(SPECS)
    return [f"{specs[(i + turn) % len(specs)]}/{name}" for i, name in enumerate(PARAMETERS)]


def draw(paths: list[str], seed: int) -> dict[str, jax.Array]:
    """One normal array per cell."""
    rng = np.random.default_rng(seed)
    shape = lambda path: PARAMETERS[path.partition("/")[2]][0]  # noqa: E731
    return {path: jnp.asarray(rng.normal(size=shape(path)), jnp.float32) for path in paths}


def shardings(paths: list[str], mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """The cell's sharding for each parameter."""
    tree = {}
    for path in paths:
        spec, _, name = path.partition("/")
        shape, axes = PARAMETERS[name]
        parts: list[Any] = [None] * len(shape)
        for axis, part in zip(axes, SPECS[spec], strict=False):
            parts[axis] = part
        tree[path] = NamedSharding(mesh, P(*parts))
    return tree


def combination() -> optax.GradientTransformation:
    """What wrappers do to a state: chain, partition, masked, inject_hyperparams and MultiSteps at once."""
    injected = optax.inject_hyperparams(lorapre.lorapre_adamw, static_args=lorapre.STATIC_ARGS)
    ours = optax.partition(
        {
            "low_rank": injected(1e-3, RANK, layout=LAYOUT),
            "sage": sage.sage_hybrid(1e-3, mu_dtype="int8", layout=LAYOUT),
        },
        lambda tree: {path: "sage" if "kernel" in path else "low_rank" for path in tree},
    )
    decayed = lambda tree: {path: path.endswith("kernel") for path in tree}  # noqa: E731
    chained = optax.chain(
        optax.clip_by_global_norm(1.0),
        ours,
        optax.masked(optax.add_decayed_weights(0.1), decayed),
    )
    return optax.MultiSteps(chained, 2).gradient_transformation()


# One step of one kind of mathematics each.
DIRECTIONS = {
    "scale_by_sage": lambda: sage.scale_by_sage(layout=LAYOUT),
    "scale_by_sage_int8": lambda: sage.scale_by_sage(mu_dtype="int8", layout=LAYOUT),
    "scale_by_factored_rms": lambda: sage.scale_by_factored_rms(layout=LAYOUT),
    "scale_by_sinkhorn": lambda: sage.scale_by_sinkhorn(layout=LAYOUT),
    "scale_by_lorapre_adam": lambda: lorapre.scale_by_lorapre_adam(
        RANK, layout=LAYOUT, **lorapre.RECOMMENDED
    ),
    "scale_by_lorapre_lion": lambda: lorapre.scale_by_lorapre_lion(RANK, layout=LAYOUT),
    "scale_by_lorapre_muon": lambda: lorapre.scale_by_lorapre_muon(RANK, layout=LAYOUT),
}
# Compositions of the above.
COMPOSITIONS = {
    "sage": lambda: sage.sage(1e-3, layout=LAYOUT),
    "sinkgd": lambda: sage.sinkgd(1e-3, layout=LAYOUT),
    "sage_hybrid": lambda: sage.sage_hybrid(1e-3, layout=LAYOUT),
    "sinkgd_hybrid": lambda: sage.sinkgd_hybrid(1e-3, layout=LAYOUT),
    "sinkgd_hybrid_factored": lambda: sage.sinkgd_hybrid(
        1e-3, table_rule="factored_rms", layout=LAYOUT
    ),
    "lion_hybrid": lambda: sage.lion_hybrid(1e-3, layout=LAYOUT),
    "low_rank_ema": lambda: lorapre.low_rank_ema(0.9, RANK, layout=LAYOUT),
    "low_rank_trace": lambda: lorapre.low_rank_trace(0.9, RANK, layout=LAYOUT),
    "lorapre_adamw": lambda: lorapre.lorapre_adamw(1e-3, RANK, others="sage", layout=LAYOUT),
    "lorapre_muon": lambda: lorapre.lorapre_muon(1e-3, RANK, table_rank=RANK, layout=LAYOUT),
    "lorapre_muon_factored": lambda: lorapre.lorapre_muon(
        1e-3, RANK, table_rule="factored_rms", layout=LAYOUT
    ),
    "lorapre_sgd": lambda: lorapre.lorapre_sgd(1e-3, RANK, layout=LAYOUT),
    "lorapre_lion": lambda: lorapre.lorapre_lion(1e-3, RANK, layout=LAYOUT),
    "lorapre_sinkgd": lambda: lorapre.lorapre_sinkgd(1e-3, RANK, layout=LAYOUT),
    "combination": combination,
}
