"""Counts the data that one update moves between eight devices, from compiled HLO: ours beside optax's.

Nothing runs, so neither hardware nor load matters; the counts are those of XLA's partitioner for CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapre_optax as lorapre
import sage_optax as sage
from benchmarks.common import circumstances, describe_circumstances, table, write_results
from benchmarks.meshes.hlo import Collective, collectives
from examples.llama.devices.mesh import with_sharding
from layout_optax import state_shardings

RANK = 16
MESH = (2, 4)
KINDS = {"Explicit": AxisType.Explicit, "Auto": AxisType.Auto}
LEAF = ((1024, 2048), P("x", "y"))
STACK = ((8, 1024, 2048), P(None, "x", "y"))


@dataclass(frozen=True)
class Case:
    """One transformation on one parameter.

    Attributes:
      make: makes the transformation.
      shape: the parameter's shape.
      spec: the parameter's spec.
      mesh: sizes of the axes x and y.
      on_explicit: False wraps the update in `jax.sharding.auto_axes` on an Explicit mesh, where it fails.
    """

    make: Callable[[], optax.GradientTransformation]
    shape: tuple[int, ...] = LEAF[0]
    spec: P = LEAF[1]
    mesh: tuple[int, int] = MESH
    on_explicit: bool = True


def _stacked(make: Callable[[], optax.GradientTransformation], on_explicit: bool = True) -> Case:
    return Case(make, *STACK, on_explicit=on_explicit)


def _optax_muon(name: str, first: int) -> optax.GradientTransformation:
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=first, output_axis=first + 1)
    return optax.contrib.scale_by_muon(weight_dimension_numbers={name: {"kernel": numbers}})


def _later_steps() -> optax.GradientTransformation:
    """The recommended options without the search for a subspace, which runs only in step 1."""
    options = {**lorapre.RECOMMENDED, "initial_subspace": "normal"}
    return lorapre.scale_by_lorapre_adam(RANK, **options)


CASES: Mapping[str, Case] = {
    "SAGE": Case(sage.scale_by_sage),
    "SAGE, int8 momentum": Case(lambda: sage.scale_by_sage(mu_dtype="int8")),
    "SinkGD, 5 iterations": Case(sage.scale_by_sinkhorn),
    "one low-rank moment": Case(lambda: lorapre.low_rank_ema(0.9, RANK)),
    "LoRA-Pre Adam, the paper's": Case(lambda: lorapre.scale_by_lorapre_adam(RANK)),
    "LoRA-Pre Adam, recommended, first step": Case(
        lambda: lorapre.scale_by_lorapre_adam(RANK, **lorapre.RECOMMENDED)
    ),
    "LoRA-Pre Adam, recommended, later steps": Case(_later_steps),
    "LoRA-Pre Adam, recommended, later steps, fsdp=8": Case(
        _later_steps, spec=P("x", None), mesh=(8, 1)
    ),
    "LoRA-Pre Adam, recommended, later steps, tensor=8": Case(
        _later_steps, spec=P(None, "y"), mesh=(1, 8)
    ),
    "LoRA-Pre Lion": Case(lambda: lorapre.scale_by_lorapre_lion(RANK)),
    "LoRA-Pre Muon": Case(lambda: lorapre.scale_by_lorapre_muon(RANK)),
    "LoRA-Pre Muon, whole matrices": Case(
        lambda: lorapre.scale_by_lorapre_muon(RANK, whole_matrices=True)
    ),
    "optax Muon": Case(lambda: _optax_muon("up", 0), on_explicit=False),
    "optax GaLore, a step with SVD": Case(
        lambda: (
            optax.contrib.scale_by_galore(RANK, update_proj_gap=1)
            if hasattr(optax.contrib, "scale_by_galore")
            else optax.contrib.galore(1e-3, rank=RANK, update_proj_gap=1)
        ),
        on_explicit=False,
    ),
    "8 layers: LoRA-Pre Muon": _stacked(lambda: lorapre.scale_by_lorapre_muon(RANK)),
    "8 layers: LoRA-Pre Muon, whole matrices": _stacked(
        lambda: lorapre.scale_by_lorapre_muon(RANK, whole_matrices=True)
    ),
    "8 layers: optax Muon": _stacked(lambda: _optax_muon("layers", 1), on_explicit=False),
}


def program(case: Case, kind: AxisType) -> str:
    """The compiled HLO text of one update, as in the documentation."""
    mesh = jax.make_mesh(case.mesh, ("x", "y"), axis_types=(kind, kind))
    name = "layers" if len(case.shape) == 3 else "up"
    placed = {name: {"kernel": NamedSharding(mesh, case.spec)}}
    tx = case.make()
    plain = {name: {"kernel": jax.ShapeDtypeStruct(case.shape, jnp.float32)}}
    params = jax.tree.map(with_sharding, plain, placed)
    shardings = state_shardings(tx, plain, placed)
    state = jax.tree.map(with_sharding, jax.eval_shape(tx.init, plain), shardings)
    update: Any = tx.update
    out = (placed, shardings)
    wrapped = kind == AxisType.Explicit and not case.on_explicit
    if wrapped:
        update = jax.sharding.auto_axes(update, out_sharding=out)
    with jax.set_mesh(mesh) if wrapped else contextlib.nullcontext():
        compiled = jax.jit(update, out_shardings=out).lower(params, state, params).compile()
    text = compiled.as_text()
    if text is None:
        raise RuntimeError("program: this backend does not give the text of a compiled program.")
    return text


def measure(case: Case, kind: AxisType) -> dict[str, Any]:
    """Elements moved, the largest operation, and all operations."""
    found = collectives(program(case, kind))
    return {
        "elements": sum(each.moved for each in found),
        "largest": max((each.elements for each in found), default=0),
        "parameter": math.prod(case.shape),
        "operations": [
            {"kind": each.kind, "elements": each.elements, "times": each.times} for each in found
        ],
    }


def summary(found: Sequence[Collective] | Sequence[Mapping[str, Any]]) -> str:
    """Operations by kind with the number of executions: ``all-reduce 12, all-gather 2``."""
    times: dict[str, int] = {}
    for each in found:
        kind, count = (
            (each.kind, each.times)
            if isinstance(each, Collective)
            else (each["kind"], each["times"])
        )
        times[kind] = times.get(kind, 0) + count
    return ", ".join(f"{kind} {count}" for kind, count in sorted(times.items())) or "none"


def page(results: Mapping[str, Any]) -> str:
    """The page about the numbers."""
    rows = []
    for name, kinds in results["cases"].items():
        for kind, case in kinds.items():
            rows.append(
                [
                    name,
                    kind + (" (auto_axes)" if case["wrapped"] else ""),
                    f"{case['elements']:,}",
                    f"{case['elements'] / case['parameter']:.2%}",
                    f"{case['largest']:,}",
                    summary(case["operations"]),
                ]
            )
    header = ["update", "mesh axes", "elements", "of the parameter", "largest", "executions"]
    return f"""# What an update moves between devices

One parameter of 1024 x 2048 on a 2 x 4 mesh as `P('x', 'y')`, or 8 layers of it as `P(None, 'x', 'y')`;
`fsdp=8` means `P('x', None)` on 8 x 1 and `tensor=8` `P(None, 'y')` on 1 x 8. The rank is {RANK}. Elements are
counted on one device, over the collectives of the compiled update: the larger side of each, times the trip
counts of the enclosing loops ([`meshes/hlo.py`](../../benchmarks/meshes/hlo.py)). The gradient's own reduction
over the batch is not counted. optax's Muon and GaLore raise `ShardingTypeError` on Explicit axes and run
there inside `jax.sharding.auto_axes`. Nothing is timed.

{describe_circumstances(results["circumstances"])}

{table(header, rows)}

LoRA-Pre Adam's recommended options search a subspace in step 1; later steps skip it. Under `fsdp=8` two
moments of rank r move 4 r / d of a matrix whose axis of length d is sharded: the factor along the other axis
lies in eight parts of its rank between steps; a step gathers it, and adds its change up over all devices. Both
are needed as long as no device keeps that factor whole. At rank {RANK} and d = 1024 that is 6.25 %, at d = 4096
1.6 %.

`whole_matrices=True` moves each shard four times (two mesh axes, there and back) if there is a stack to
distribute. A single matrix is gathered, which saves traffic and repeats the arithmetic on all eight devices.
"""


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles, counts and writes ``collectives.json`` and ``collectives.md``.

    Args:
      arguments: command line, without the program's name.

    Returns:
      The JSON file's content.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.meshes.collectives", description=__doc__
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    cases: dict[str, dict[str, Any]] = {}
    for name in options.cases:
        cases[name] = {}
        for label, kind in KINDS.items():
            case = measure(CASES[name], kind)
            case["wrapped"] = label == "Explicit" and not CASES[name].on_explicit
            cases[name][label] = case
            print(f"{name}, {label}: {case['elements']:,}", flush=True)
    command = shlex.join(["python", "-m", "benchmarks.meshes.collectives", *arguments])
    results = {"circumstances": circumstances(command), "cases": cases}
    write_results(options.output, "collectives", results, page(results))
    return results


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
