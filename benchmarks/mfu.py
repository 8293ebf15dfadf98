"""Measures model FLOPs utilisation of training by optimizer. It needs only JAX, optax and Flax.

    python -m benchmarks.mfu --presets galore_350m --optimizers adamw,sage_hybrid --profile out/profile

A row is the trainer's whole step, its loss and clipping included, on random tokens. Measured rows are kept in
mfu.json. `--profile FOLDER` writes a trace of three steps of each row for XProf and Perfetto.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.common import circumstances, table
from benchmarks.peers import register_peers
from benchmarks.steps.programs import trainer_settings
from benchmarks.steps.updates import Store, Update, device_name, random_tree
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import abstract
from examples.llama.optimizers.variants import parse_variant
from examples.llama.training.program import Program

KEYS = ("preset", "dtype", "variant", "batch_size", "seq_len", "device")
PRESETS = {"galore_130m": 64, "galore_350m": 32, "galore_1b": 16}
"""The presets measured by default, and the sequences per step."""
OPTIMIZERS = ("adamw", "sage_hybrid", "lorapre_adamw", "muon", "lorapre_muon")

_HOPPER = "NVIDIA H100/H200 datasheets, half of the figure with sparsity"
PEAKS = (
    ("H200", 989.0, _HOPPER),
    ("H100 PCIe", 756.0, _HOPPER),
    ("H100", 989.0, _HOPPER),
    ("A100", 312.0, "NVIDIA A100 datasheet, without sparsity"),
    ("TPU v4", 275.0, "Google Cloud, TPU v4"),
    ("TPU v5 lite", 197.0, "Google Cloud, TPU v5e"),
    ("TPU v5e", 197.0, "Google Cloud, TPU v5e"),
    ("TPU v5", 459.0, "Google Cloud, TPU v5p"),
    ("TPU v6", 918.0, "Google Cloud, TPU v6e"),
)
"""Part of a device's name, dense bfloat16 TFLOP/s of one device by its maker, and the source."""


def peak_tflops(device: str, given: float | None = None) -> float:
    """Dense bfloat16 TFLOP/s of a device: the given value, or its maker's.

    Raises:
        ValueError: The device is not in `PEAKS` and nothing is given.

    >>> peak_tflops("NVIDIA H100 80GB HBM3"), peak_tflops("TPU v5 lite"), peak_tflops("cpu", 0.1)
    (989.0, 197.0, 0.1)
    """
    if given is not None:
        return given
    for name, peak, _ in PEAKS:
        if name.lower() in device.lower():
            return peak
    raise ValueError(f"no peak is known for the device {device!r}; give --peak-tflops")


def step_flops(model: LlamaConfig, batch_size: int, seq_len: int) -> float:
    """Floating-point operations that a step of a model needs, for any implementation.

    Six per entry of every matrix and token (two forward, four backward), with the head and without the
    embedding's lookup, and attention's two products over the half of the square that a causal model sees.
    Recomputation and the optimizer do not count.

    >>> model = LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=8, num_layers=1,
    ...                     num_heads=1, num_kv_heads=1)
    >>> step_flops(model, 1, 2) == 2 * (6 * (4 * 16 + 3 * 32 + 40) + 6 * 2 * 4)
    True
    """
    leaves = jax.tree.leaves(abstract(model)["layers"])
    matrices = sum(leaf.size for leaf in leaves if leaf.ndim == 3)
    matrices += model.hidden_size * model.vocab_size
    attention = model.num_layers * seq_len * model.num_heads * model.head_dim
    return 6.0 * batch_size * seq_len * (matrices + attention)


class Step:
    """A trainer's step and the update alone, ready to compile.

    Args:
        preset: The model's shape.
        key: The optimizer, with options.
        dtype: Dtype of the matrix products; parameters are float32.
        batch_size: Sequences per step.
        seq_len: Predicted tokens per sequence.
    """

    def __init__(self, preset: str, key: str, dtype: str, batch_size: int, seq_len: int):
        settings = trainer_settings(
            preset, key, compute_dtype=dtype, batch_size=batch_size, seq_len=seq_len
        )
        self.fields = dict(zip(KEYS, (preset, dtype, key, batch_size, seq_len), strict=False))
        self.fields["device"] = device_name()
        self.label = parse_variant(key).label
        self.program = Program(settings)
        self.update = Update(preset, key)

    def compile(self) -> Any:
        """Compiles both; returns the update's function."""
        self.program.compile()
        return self.update.compile()[0]

    def measure(
        self, update: Any, steps: int, peak: float, profile: pathlib.Path | None = None
    ) -> dict[str, Any]:
        """Times some consecutive steps, with the host ahead of the device, and then the update alone.

        Args:
            update: The result of `compile`.
            steps: Steps of each of three stretches.
            peak: The device's TFLOP/s.
            profile: Folder for a trace of three more steps.
        """
        settings, program = self.program.settings, self.program
        rng = np.random.default_rng(0)
        shape = (settings.batch_size, settings.seq_len + 1)
        tokens = rng.integers(0, settings.model.vocab_size, shape).astype(np.int32)
        state = program.init(0)

        def stretch(state: Any, count: int) -> tuple[Any, float]:
            jax.block_until_ready(state)
            started = time.perf_counter()
            for _ in range(count):
                state, _, _ = program.step(state, {"tokens": tokens}, 1e-5)
            jax.block_until_ready(state)
            return state, (time.perf_counter() - started) / count

        state, _ = stretch(state, 2)
        seconds = []
        for _ in range(3):
            state, one = stretch(state, steps)
            seconds.append(one)
        if profile is not None:
            with jax.profiler.trace(str(profile), create_perfetto_trace=True):
                state, _ = stretch(state, 3)
        params, opt_state = state.params, state.opt_state
        if jax.tree.structure(opt_state) != jax.tree.structure(self.update.state):
            opt_state = jax.jit(self.update.tx.init)(params)
        del state
        alone = _update_seconds(update, params, opt_state, self.update, steps)
        step = statistics.median(seconds)
        flops = step_flops(settings.model, settings.batch_size, settings.seq_len)
        return {
            **self.fields,
            "label": self.label,
            "step_seconds": step,
            "tokens_per_second": settings.tokens_per_step / step,
            "step_flops": flops,
            "peak_tflops": peak,
            "mfu": flops / step / (peak * 1e12),
            "update_seconds": alone,
            "update_share": alone / step,
        }


def _update_seconds(function: Any, params: Any, state: Any, update: Update, steps: int) -> float:
    grads = random_tree(update.params, 1e-3, seed=1)
    seconds = []
    for number in range(4):
        jax.block_until_ready((params, state))
        started = time.perf_counter()
        for _ in range(steps):
            params, state = function(params, state, grads)
        jax.block_until_ready((params, state))
        if number:
            seconds.append((time.perf_counter() - started) / steps)
    return statistics.median(seconds)


def rows_table(cells: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    rows = [
        [
            cell["preset"],
            cell["dtype"],
            cell["label"],
            f"{cell['batch_size']} x {cell['seq_len']}",
            f"{1e3 * cell['step_seconds']:.4g}",
            f"{cell['tokens_per_second']:,.0f}",
            f"{100 * cell['mfu']:.1f} %",
            f"{100 * cell['update_share']:.1f} %",
        ]
        for cell in cells
    ]
    header = ["model", "dtype", "optimizer", "tokens", "step, ms", "tokens/s", "MFU", "optimizer"]
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the missing rows, writes mfu.json and prints the table.

    Args:
        arguments: command line, without the program's name.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--dtypes", default="bfloat16", help="of the matrix products")
    parser.add_argument("--batch-size", type=int, help="by default 64, 32 and 16, by preset")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="steps of a stretch")
    parser.add_argument("--peak-tflops", type=float, help="of a device that is not in the table")
    parser.add_argument("--profile", type=pathlib.Path, help="folder for traces")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("docs/results/accelerator")
    )
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        peak = peak_tflops(device_name(), options.peak_tflops)
    except ValueError as error:
        parser.error(str(error))
    register_peers()
    facts = circumstances(shlex.join(["python", "-m", "benchmarks.mfu", *given]))
    store = Store(options.out / "mfu.json", KEYS)
    for preset in options.presets.split(","):
        for dtype in options.dtypes.split(","):
            for key in options.optimizers.split(","):
                batch_size = options.batch_size or PRESETS.get(preset, 16)
                step = Step(preset, key, dtype, batch_size, options.seq_len)
                if store.find(**step.fields) is not None and options.profile is None:
                    continue
                profile = options.profile and options.profile / f"{preset}_{key}".replace(":", "_")
                store.put(step.measure(step.compile(), options.steps, peak, profile), facts)
    print(rows_table(store.cells))


if __name__ == "__main__":
    main()
