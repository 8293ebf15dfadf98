"""Memory of an optimizer's step besides the parameters: state, temporaries, traffic. Compiled, never run.

    python -m benchmarks.steps.memory --presets galore_60m,sage_1.3b --dtypes float32,bfloat16

Nothing of the model is allocated, so any preset can be measured on any machine. Measured cells are kept in
memory.json; a restart continues, and `--again` measures the named optimizers anew.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.common import bytes_accessed, circumstances, describe_circumstances, table
from benchmarks.peers import register_peers
from benchmarks.steps.updates import VARIANTS, Store, Update, device_name, operations
from examples.llama.reporting.summary import size

KEYS = ("preset", "dtype", "variant", "device")
PRESETS = ("galore_60m", "galore_350m", "galore_1b", "sage_1.3b")
TARGET = 2.0
"""Upper aim for an update's temporaries, in largest leaves (float32), without Gram chunks."""


def measure(preset: str, dtype: str, key: str) -> dict[str, Any]:
    """All figures of one optimizer on one model."""
    update = Update(preset, key, dtype)
    compiled, seconds = update.compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("memory: this backend has no memory analysis.")
    return {
        "preset": preset,
        "dtype": dtype,
        "variant": key,
        "device": device_name(),
        "label": update.label,
        "rank": update.rank,
        "scan_layers": update.scan_layers,
        "parameters": update.parameter_count,
        "state_bytes": update.state_bytes,
        "largest_leaf_bytes": update.largest_leaf_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes,
        "temporary_bytes_least": _scheduled_for_memory(update),
        "aliased_bytes": analysis.alias_size_in_bytes,
        "bytes_accessed": bytes_accessed(
            update.function, update.params, update.state, update.params
        ),
        "compile_seconds": seconds,
        **operations(compiled.as_text()),
    }


def _scheduled_for_memory(update: Update) -> int:
    """Temporaries if XLA orders operations to need little memory, as it does on accelerators by default.

    XLA:CPU by default orders them so that as many as possible can run at once.
    """
    if jax.default_backend() != "cpu":
        return update.compile()[0].memory_analysis().temp_size_in_bytes
    compiled, _ = update.compile({"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"})
    return compiled.memory_analysis().temp_size_in_bytes


def page(content: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = [
        f"""# Memory and traffic of one optimizer step

`update` and `apply_updates` on a Llama's parameters, compiled with parameters and state donated. State comes
from abstract evaluation and temporaries from XLA's memory analysis, in total and as a multiple of the largest
parameter in float32 (with stacked layers a whole stack, or the embedding). By default XLA:CPU orders
operations so that many can run at once, which keeps temporaries alive longer; "ordered" are those of the same
program ordered to need little memory (`xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED`), as on
accelerators. The aim is at most {TARGET:g} times the largest parameter, without the Gram chunks of low-rank
factors; higher values are bold. Bytes per parameter that operations read and write come from XLA's cost
analysis: loops with a fixed number of rounds are unrolled for it, bodies of other loops count once, and reads
and writes inside a library fusion of XLA:CPU do not count. AdamW in float32 needs 28: parameter, gradient and
two moments are read, three of them written; XLA:CPU reads once more what its fusions do not share. Fusions and
library calls (LAPACK, matrix products, XLA:CPU's own library) are those of the compiled program. GaLore's row
uses unstacked layers, which it needs, so its largest parameter is an embedding or head.

{describe_circumstances(content["circumstances"])}
"""
    ]
    groups = dict.fromkeys((c["device"], c["preset"], c["dtype"]) for c in content["cells"])
    for group in groups:
        cells = [c for c in content["cells"] if (c["device"], c["preset"], c["dtype"]) == group]
        cells.sort(key=lambda c: VARIANTS.index(c["variant"]) if c["variant"] in VARIANTS else 99)
        device, preset, dtype = group
        rows = [
            [
                c["label"],
                "-" if c["rank"] is None else c["rank"],
                size(c["state_bytes"]),
                size(c["temporary_bytes"]),
                _marked(c["temporary_bytes"] / c["largest_leaf_bytes"]),
                size(c["temporary_bytes_least"]),
                _marked(c["temporary_bytes_least"] / c["largest_leaf_bytes"]),
                f"{c['bytes_accessed'] / c['parameters']:.1f}",
                c["fusions"],
                c["library_calls"],
                c["loops"],
            ]
            for c in cells
        ]
        header = ["optimizer", "rank", "state", "temporaries", "largest parameters"]
        header += ["ordered", "largest parameters"]
        header += ["bytes a parameter", "fusions", "library calls", "loops"]
        parts.append(f"## {preset}, {dtype}, {device}\n\n{table(header, rows)}\n")
    return "\n".join(parts)


def _marked(multiple: float) -> str:
    return f"{multiple:.2f}" if round(multiple, 2) <= TARGET else f"**{multiple:.2f}**"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the missing cells and writes memory.json and memory.md.

    Args:
      arguments: command line, without the program's name.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", default="galore_60m,galore_350m,sage_1.3b")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--optimizers", default=",".join(VARIANTS))
    parser.add_argument("--again", default="", help="optimizers to measure anew")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/results"))
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    command = shlex.join(["python", "-m", "benchmarks.steps.memory", *given])
    register_peers()
    store = Store(options.out / "memory.json", KEYS)
    again = options.again.split(",")
    for preset in options.presets.split(","):
        for dtype in options.dtypes.split(","):
            for key in options.optimizers.split(","):
                known = store.find(preset=preset, dtype=dtype, variant=key, device=device_name())
                if known is None or key in again:
                    cell = measure(preset, dtype, key)
                    store.put(cell, circumstances(command))
                    times = cell["temporary_bytes"] / cell["largest_leaf_bytes"]
                    print(f"{preset} {dtype} {key}: {times:.2f} largest parameters", flush=True)
    (options.out / "memory.md").write_text(page(store.content))


if __name__ == "__main__":
    main()
