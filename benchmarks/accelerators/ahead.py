"""Compiles the updates for CUDA and TPU with XLA's own compilers, on a machine that has neither.

    python -m benchmarks.accelerators.ahead --platform cuda

JAX compiles ahead of time for a device from its description. That needs only the platform's plugin: the
packages jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12, or libtpu. A machine without CUDA needs
JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment. Libraries cannot be tried out without a device, so XLA
takes its default for each product. Rows are kept in ahead.json; a restart continues. Compile seconds are the
processor's, of all threads, so that a busy machine changes them little.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.accelerators.traffic import moved_bytes, moves, reads, writes
from benchmarks.common import circumstances, describe_circumstances, table
from benchmarks.peers import register_peers
from benchmarks.steps.updates import Store, Update, operations
from layout_optax import ParamLayout
from sage_optax import scale_by_sinkhorn

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 149978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H200"
"""
"""XLA's description of one H200."""

OPTIMIZERS = (
    *("adamw", "sage_hybrid", "sage_hybrid:sinkhorn_iterations=1", "lorapre_adamw"),
    *("lorapre_adamw:options=recommended", "lorapre_muon", "muon"),
)
KEYS = ("what", "platform", "name", "dtype")
LAST = ParamLayout("matrix", (1,), (2,))
FIRST = ParamLayout("matrix", (2,), (1,))


def target(platform: str) -> SingleDeviceSharding:
    """A described device."""
    if platform == "cuda":
        options = {"target_config": H200, "topology": "1x1x1"}
        found = topologies.get_topology_desc("h200", "cuda", **options)
    else:
        found = topologies.get_topology_desc("v5e:2x2", "tpu")
    return SingleDeviceSharding(found.devices[0])


def compiled(function: Any, where: SingleDeviceSharding, *args: Any, **options: Any) -> Any:
    """The function compiled for the device, and the processor's seconds from tracing to the end."""
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), args)
    started = _processor_seconds()
    found = jax.jit(lambda *args: function(*args), **options).lower(*given).compile()
    return found, _processor_seconds() - started


def _processor_seconds() -> float:
    """User seconds of this process and of those that it started and that have ended."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(each).ru_utime for each in whose)


def measure_update(
    where: SingleDeviceSharding, preset: str, name: str, dtype: str
) -> dict[str, Any]:
    """Traffic, temporaries, kernels and compile seconds of an optimizer's update and apply.

    AdamW is compiled just before, for the ratio of the seconds.
    """
    update = Update(preset, name, dtype)
    (_, baseline), (found, seconds) = (
        compiled(each.function, where, each.params, each.state, each.params, donate_argnums=(0, 1))
        for each in (Update(preset, "adamw", dtype), update)
    )
    launched = operations(found.as_text())
    matrices = [leaf.size for leaf in jax.tree.leaves(update.params) if leaf.ndim > 2]
    moved = moves(found.as_text(), min(matrices))
    return {
        "preset": preset,
        "bytes": moved_bytes(moved) / update.parameter_count,
        "temporaries": found.memory_analysis().temp_size_in_bytes / update.largest_leaf_bytes,
        "kernels": launched["fusions"] + launched["library_calls"],
        "seconds": seconds,
        "to_adamw": seconds / baseline,
    }


def measure_sinkhorn(where: SingleDeviceSharding, dtype: str, **options: Any) -> dict[str, Any]:
    """Reads, writes and bytes per entry of five sweeps over a stack, and the sizes of its temporaries."""
    shape = (24, 1024, 2736)
    size = 24 * 1024 * 2736
    tx = scale_by_sinkhorn(**options)
    g = jax.ShapeDtypeStruct(shape, dtype)
    found, seconds = compiled(lambda g: tx.update(g, tx.init(g))[0], where, g)
    moved = moves(found.as_text(), size)
    return {
        "reads": reads(moved),
        "writes": writes(moved),
        "bytes": moved_bytes(moved) / size,
        "temporaries": found.memory_analysis().temp_size_in_bytes / (4 * size),
        "seconds": seconds,
    }


def measure_shapes(where: SingleDeviceSharding, leaves: int, shapes: int) -> dict[str, Any]:
    """Compile seconds of Sinkhorn on some leaves of some distinct shapes, and of AdamW-like work on them."""
    tree = {
        str(i): jax.ShapeDtypeStruct((8, 256 + 128 * (i % shapes), 512), jnp.bfloat16)
        for i in range(leaves)
    }
    tx = scale_by_sinkhorn(layout=FIRST)
    _, seconds = compiled(lambda g: tx.update(g, tx.init(g))[0], where, tree)
    return {"leaves": leaves, "shapes": shapes, "seconds": seconds}


def page(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = {what: [] for what in ("sinkhorn", "update", "shapes")}
    for cell in content["cells"]:
        rows[cell["what"]].append(cell)
    sinkhorn = [
        [
            f"{c['name']}, {c['dtype']}",
            c["platform"],
            c["reads"],
            c["writes"],
            f"{c['bytes']:.0f}",
            f"{c['temporaries']:.2f}",
            f"{c['seconds']:.1f}",
        ]
        for c in rows["sinkhorn"]
    ]
    adamw = {(c["platform"], c["dtype"]): c for c in rows["update"] if c["name"] == "adamw"}
    updates = [
        [
            c["name"],
            c["platform"],
            c["dtype"],
            f"{c['bytes']:.1f}",
            f"{c['bytes'] / adamw[c['platform'], c['dtype']]['bytes']:.2f}",
            f"{c['temporaries']:.2f}",
            c["kernels"],
            f"{c['seconds']:.1f}",
            f"{c['to_adamw']:.1f}",
        ]
        for c in rows["update"]
    ]
    shapes = [
        [c["platform"], c["leaves"], c["shapes"], f"{c['seconds']:.1f}"] for c in rows["shapes"]
    ]
    preset = next((c["preset"] for c in rows["update"]), "-")
    return f"""# Compiled for an accelerator without one

XLA's compilers for CUDA (an H200 as it describes itself) and TPU (v5e) run here ahead of time on a machine
that has neither, so this page has no times on a device. It counts the arrays as large as the gradient, or as
the smallest stack of matrices, that the compiled program reads and writes, and the temporaries that it
allocates. A rule with little arithmetic takes as long as its memory traffic; AdamW ran at the memory's speed
([measured](accelerator.md)). For an optimizer that multiplies matrices, bytes are only part of the cost.
Compile seconds are the processor's user seconds, in all threads, from tracing to the end.

{describe_circumstances(content["circumstances"])}

## Sinkhorn

One gradient of 24 x 1024 x 2736, in bytes per entry; temporaries in float32 gradients. "Rows first" sums over
the middle axis first, as for a Flax kernel. The minimum is 11 reads and one write for five sweeps. XLA:CUDA
reads once more, because it computes three sums over an axis that is not the last in two kernels.

{
        table(
            [
                "gradient",
                "platform",
                "reads",
                "writes",
                "bytes",
                "temporaries",
                "compile, s",
            ],
            sinkhorn,
        )
    }

## Updates

`update` and `apply_updates` of {
        preset
    }, donated. Bytes per parameter, for stacks only; temporaries in largest
float32 leaves. Kernels are those of the program's text, so those of a loop or of a branch count once. AdamW is
compiled again before each row, for the ratio of the seconds.

{
        table(
            [
                *("optimizer", "platform", "dtype", "bytes", "to AdamW", "temporaries"),
                *("kernels", "compile, s", "to AdamW"),
            ],
            updates,
        )
    }

## Compile seconds by number of shapes

Sinkhorn, five sweeps, bfloat16. XLA optimizes the program of every leaf, but generates equal kernels once.

{table(["platform", "leaves", "distinct shapes", "compile, s"], shapes)}

The target for an update is twice AdamW's compile seconds. It is missed; the last column of the table of updates
shows by how much. XLA:CUDA spends most of its passes' time on choosing fusions for the arithmetic of each
leaf's vectors, and it inlines a function that is called once per leaf before those passes. Two forms with
shorter programs were compiled and not adopted, because a step runs far more often than it compiles. A loop over
the sweeps launches 42 kernels for a leaf of five sweeps instead of 27. Stacks of equal leaves' vectors add a
kernel for most slices.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the missing rows and writes ``ahead.json`` and ``ahead.md``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerators.ahead", description=__doc__
    )
    parser.add_argument("--platform", choices=("cuda", "tpu"), default="cuda")
    parser.add_argument("--preset", default="galore_350m")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS))
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    register_peers()
    where = target(options.platform)
    # The compiler's own start is in nobody's seconds.
    compiled(jnp.sin, where, jax.ShapeDtypeStruct((8,), jnp.float32))
    jobs: list[tuple[dict[str, Any], Any]] = []
    for dtype in options.dtypes:
        for name, layout in (("rows first", FIRST), ("columns first", LAST)):
            cell = {"what": "sinkhorn", "name": name, "dtype": dtype}
            jobs.append((cell, lambda d=dtype, y=layout: measure_sinkhorn(where, d, layout=y)))
    narrow = {"layout": FIRST, "vectors_dtype": "bfloat16"}
    cell = {"what": "sinkhorn", "name": "vectors_dtype bfloat16", "dtype": "float32"}
    jobs.append((cell, lambda: measure_sinkhorn(where, "float32", **narrow)))
    for leaves, shapes in ((1, 1), (4, 1), (4, 4), (8, 1), (8, 8)):
        cell = {"what": "shapes", "name": f"{leaves}, {shapes}", "dtype": "bfloat16"}
        jobs.append((cell, lambda n=leaves, k=shapes: measure_shapes(where, n, k)))
    for dtype in options.dtypes:
        for name in options.optimizers:
            cell = {"what": "update", "name": name, "dtype": dtype}
            measure = lambda n=name, d=dtype: measure_update(where, options.preset, n, d)  # noqa: E731
            jobs.append((cell, measure))
    command = shlex.join(["python", "-m", "benchmarks.accelerators.ahead", *arguments])
    store = Store(options.output / "ahead.json", KEYS)
    for cell, measure in jobs:
        cell = {"platform": options.platform, **cell}
        if store.find(**cell) is None:
            store.put({**cell, **measure()}, circumstances(command))
            (options.output / "ahead.md").write_text(page(store.content))
            print(cell, flush=True)


if __name__ == "__main__":
    main()
