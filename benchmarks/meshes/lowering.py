"""Compiles whole fine-tuning steps of Llama-3.1-8B for a simulated mesh from shapes, and reports their memory.

    python -m benchmarks.meshes.lowering

Each method's step is lowered for eight virtual CPU devices (fsdp=8) and compiled; nothing is allocated. The
bytes are those of XLA's memory analysis for one device. A finished method is not repeated.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.common import circumstances, describe_circumstances, table
from examples.llama.devices.processes import simulate_devices
from examples.llama.finetuning.program import FromModel
from examples.llama.finetuning.run import FinetuneConfig, trainer_config, tuned
from examples.llama.model.config import LlamaConfig, preset
from examples.llama.reporting.files import read_json, write_json
from examples.llama.training.config import resolve
from examples.llama.training.program import Program

METHODS = ("adamw", "lorapre_adamw", "sage_hybrid", "lora")
SETTING = {"preset": "llama3.1_8b", "devices": 8, "rows": 8, "seq_len": 512, "rank": 8}
GIB = 2**30


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=pathlib.Path, default=pathlib.Path("docs/results"))
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--report", action="store_true", help="write the page only")
    given = parser.parse_args(arguments)
    path = given.results / "lowering_8b.json"
    data = read_json(path) or {"setting": SETTING, "methods": {}}
    if not given.report:
        simulate_devices(SETTING["devices"])
        for method in given.methods:
            if method in data["methods"]:
                continue
            data["methods"][method] = measure(method, preset(SETTING["preset"]))
            data["circumstances"] = circumstances("python -m benchmarks.meshes.lowering")
            write_json(path, data)
            print(method, data["methods"][method], flush=True)
    (given.results / "lowering_8b.md").write_text(page(data), encoding="utf-8")
    return 0


def measure(
    method: str,
    model: LlamaConfig,
    *,
    devices: int = SETTING["devices"],
    rows: int = SETTING["rows"],
    seq_len: int = SETTING["seq_len"],
) -> dict[str, Any]:
    """Compiles one method's step; the bytes are of one device."""
    config = FinetuneConfig(
        model="model",
        data="data",
        method=method,
        rank=SETTING["rank"],
        learning_rate=1e-4,  # not every method has a default, and the program is the same at any
        batch_size=rows,
        seq_len=seq_len,
        compute_dtype="bfloat16",
        remat=True,
        mesh=f"fsdp={devices}",
    )
    settings = resolve(trainer_config(config, 1000), model)

    def load(**_: Any) -> Any:
        raise AssertionError("nothing is read")

    source = FromModel(tuned(config), load)
    program = Program(settings, source)
    started = time.perf_counter()
    lowered = program.lower()
    lowering = time.perf_counter() - started
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("this backend has no memory analysis")
    placement = program.placement
    assert placement is not None
    state, frozen = program.abstract_state, program.abstract_frozen
    return {
        "trained_parameters": program.parameter_count(),
        "model_parameters": source.model_parameter_count(settings),
        "trained_bytes": placement.bytes_per_device(state.params, program.state_shardings.params),
        "frozen_bytes": placement.bytes_per_device(frozen, placement.params(frozen)),
        "optimizer_state_bytes": program.state_bytes_per_device(),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "lowering_seconds": lowering,
        "compile_seconds": time.perf_counter() - started - lowering,
    }


def page(data: Mapping[str, Any]) -> str:
    """The page about the results, from the stored numbers only."""
    made = data["setting"]
    rows = []
    for method in METHODS:
        cell = data["methods"].get(method)
        if cell is None:
            rows.append([method, "missing", *[""] * 6])
            continue
        total = (
            cell["argument_bytes"]
            + cell["output_bytes"]
            - cell["aliased_bytes"]
            + cell["temporary_bytes"]
        )
        rows.append(
            [
                method,
                f"{cell['trained_parameters']:,}",
                *(
                    f"{cell[name] / GIB:.3f}"
                    for name in (
                        *("trained_bytes", "frozen_bytes", "optimizer_state_bytes"),
                        *("argument_bytes", "temporary_bytes"),
                    )
                ),
                f"{total / GIB:.3f}",
            ]
        )
    header = [
        *("method", "trained parameters", "trained, GiB", "frozen, GiB", "optimizer state, GiB"),
        *("arguments, GiB", "temporaries, GiB", "all, GiB"),
    ]
    return "\n".join(
        [
            "# The whole fine-tuning step of Llama-3.1-8B, compiled without allocating",
            "",
            f"`{made['preset']}` on {made['devices']} simulated devices, fsdp={made['devices']}: "
            f"{made['rows']} packed rows of {made['seq_len']} tokens, rank {made['rank']}, float32 parameters, "
            "bfloat16 compute, rematerialised blocks. Attention and MLP matrices are trained (`lora`: adapters "
            "of them); embedding, head and norms are frozen. Bytes are of one device. Trained, frozen and "
            "optimizer state are sums over shards; arguments (these and the batch), temporaries (gradients, "
            "activations, gathered weights) and all (arguments, results that reuse no argument, temporaries) "
            "are XLA's own figures for its CPU backend, which keeps some of what is bfloat16 in float32; other "
            "backends will differ in them.",
            "",
            table(header, rows),
            "",
            describe_circumstances(data["circumstances"]) if "circumstances" in data else "",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
