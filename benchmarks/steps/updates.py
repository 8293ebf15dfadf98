"""The compiled update of one optimizer on a real model's parameters, and XLA's figures for it.

Shared by `benchmarks.steps.step_time` and `benchmarks.steps.memory`.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.llama.model.config import preset
from examples.llama.model.llama import abstract
from examples.llama.optimizers.options import OptimizerOptions
from examples.llama.optimizers.rates import default_rank, parse_rates
from examples.llama.optimizers.registry import make_optimizer, optimizer_entry
from examples.llama.optimizers.variants import Variant, parse_variant
from layout_optax.layout import ROLES
from layout_optax.memory import tree_bytes

RATE, DECAY = 1e-5, 0.01
VARIANTS = (
    "adamw",
    "lion",
    "adafactor",
    "muon",
    "galore",
    "sage_hybrid",
    "sage_hybrid_int8",
    "lion_hybrid",
    "sinkgd_hybrid",
    "lorapre_adamw",
    "lorapre_adamw:options=recommended",
    "lorapre_sinkgd",
    "lorapre_muon",
    "lorapre_lion",
    "products",
)
"""The default variants; AdamW against itself shows the noise, `products` LoRA-Pre Adam's lower bound."""


class Update:
    """One optimizer's update and apply on a preset's parameters, parameters and state donated.

    Args:
        preset_name: The model's shape.
        key: The optimizer, with options (`examples.llama.optimizers.variants`).
        dtype: Dtype of parameters and gradients.
        scan_layers: Whether layers are stacked; by default yes, unless the optimizer refuses stacked layers.

    Attributes:
        params: The parameters' shapes.
        state: The state's shapes.
        scan_layers: See above.

    >>> update = Update("demo", "adamw")
    >>> update.state_bytes == 8 * update.parameter_count + 4
    True
    """

    def __init__(
        self, preset_name: str, key: str, dtype: str = "float32", scan_layers: bool | None = None
    ):
        variant, model = parse_variant(key), preset(preset_name)
        entry = optimizer_entry(variant.optimizer)
        self.scan_layers = not entry.needs_unscanned if scan_layers is None else scan_layers
        self.rank = variant.options.get("rank") if entry.has_rank else None
        if entry.has_rank and self.rank is None:
            self.rank = default_rank(preset_name, model.hidden_size)
        self.label = variant.label
        self.tx = make_optimizer(
            variant.optimizer, RATE, variant_options(variant, self.rank, DECAY)
        )
        self.params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)),
            abstract(model, scan_layers=self.scan_layers),
        )
        self.state = jax.eval_shape(self.tx.init, self.params)

    @property
    def parameter_count(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state."""
        return tree_bytes(self.state)

    @property
    def largest_leaf_bytes(self) -> int:
        """Bytes of the largest parameter in float32, in which all rules compute."""
        return 4 * max(leaf.size for leaf in jax.tree.leaves(self.params))

    def function(self, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        """The next parameters and state."""
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def compile(self, options: dict[str, str | bool] | None = None) -> tuple[Any, float]:
        """The compiled function, with parameters and state donated, and its compile seconds.

        Tracing, lowering and compiling start from nothing at every call.

        Args:
            options: XLA's options, besides those of the environment.
        """
        # A new function, because jit would find the trace of the last one.
        jitted = jax.jit(lambda *args: self.function(*args), donate_argnums=(0, 1))
        started = time.perf_counter()
        compiled = jitted.lower(self.params, self.state, self.params).compile(options)
        return compiled, time.perf_counter() - started


def variant_options(variant: Variant, rank: int | None, weight_decay: float) -> OptimizerOptions:
    """The settings of a variant.

    >>> from examples.llama.optimizers.variants import parse_variant
    >>> variant_options(parse_variant("adamw:matrix_rate=0.25"), None, 0.1).role_multipliers
    {'matrix': 0.25}
    """
    fields = variant.fields()
    del fields["optimizer"]
    if rank is not None:
        fields["rank"] = rank
    if "role_multipliers" in fields:
        fields["role_multipliers"] = parse_rates(fields["role_multipliers"], ROLES, "role")
    return OptimizerOptions(weight_decay=weight_decay, **fields)


def random_tree(shapes: Any, size: float, seed: int = 0) -> Any:
    """Normal numbers of a given standard deviation on the default device, leaf by leaf."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, np.float32)
        values *= np.float32(size)
        # Wait, because otherwise the float32 numbers of all leaves would exist at once.
        return jax.block_until_ready(jnp.asarray(values, leaf.dtype))

    return jax.tree.map(draw, shapes)


def operations(text: str) -> dict[str, int]:
    """Counts the kernels and calls that a compiled program launches, from its HLO text.

    Returns:
        `fusions`: fused kernels that XLA writes itself; `library_calls`: calls of a library (custom calls,
          fusions of
        kind Custom, and the products and sorts outside of fusions); `loops`: while loops, whose bodies count
        once.

    >>> operations('''
    ... %fused_computation (p: f32[4,4]) -> f32[4,4] {
    ...   ROOT %d = f32[4,4]{1,0} dot(%p, %p)
    ... }
    ... ENTRY %main (p: f32[4,4]) -> f32[4,4] {
    ...   %a = f32[4,4]{1,0} fusion(%p), kind=kLoop, calls=%fused_computation
    ...   %b = (f32[4,4]{1,0}, s32[]) custom-call(%a), custom_call_target="lapack_spotrf_ffi"
    ...   ROOT %c = f32[4,4]{1,0} dot(%a, %a)
    ... }''')
    {'fusions': 1, 'library_calls': 2, 'loops': 0}
    """
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        opened = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if opened and not line.startswith(" "):
            name = opened.group(1)
        bodies.setdefault(name, []).append(line)
    inside = set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", text))
    lines = [line for name, body in bodies.items() if name not in inside for line in body]
    fusions = [line for line in lines if re.search(r"\bfusion\(", line)]
    library = [line for line in fusions if "kind=kCustom" in line]
    calls = [line for line in lines if re.search(r"= .*\b(custom-call|dot|sort|topk)\(", line)]
    return {
        "fusions": len(fusions) - len(library),
        "library_calls": len(library) + len(calls),
        "loops": sum(bool(re.search(r"\bwhile\(", line)) for line in lines),
    }


class Store:
    """Measured cells in a JSON file, written after each; some of its fields identify a cell.

    Args:
        path: The file; it need not exist.
        keys: Names of the fields that identify the cell.
    """

    def __init__(self, path: pathlib.Path, keys: Sequence[str]):
        self.path, self.keys = path, tuple(keys)
        self.content: dict[str, Any] = {"circumstances": {}, "cells": []}
        if path.exists():
            self.content = json.loads(path.read_text())

    @property
    def cells(self) -> list[dict[str, Any]]:
        """All cells."""
        return self.content["cells"]

    def find(self, **fields: Any) -> dict[str, Any] | None:
        """The cell with these fields, or None."""
        for cell in self.cells:
            if all(cell[key] == fields[key] for key in self.keys):
                return cell
        return None

    def put(self, cell: dict[str, Any], facts: dict[str, Any]) -> None:
        """Adds a cell, or replaces the one with the same fields, and writes the file."""
        kept = [c for c in self.cells if any(c[key] != cell[key] for key in self.keys)]
        self.content["cells"] = [*kept, cell]
        self.write(facts)

    def write(self, facts: dict[str, Any]) -> None:
        """Writes the file with these circumstances.

        It is renamed into place, so a process that is killed during the write leaves the last file whole.
        """
        self.content["circumstances"] = facts
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self.path)


def device_name() -> str:
    """The device's kind, since one file holds the results of several devices."""
    return jax.devices()[0].device_kind


def compile_ratio(
    update: Update, baseline: Update, pairs: int
) -> tuple[float, list[float], list[float]]:
    """Compiles two updates in turns; returns the median ratio of the seconds, and the seconds of both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    both: tuple[Callable[[], tuple[Any, float]], ...] = (update.compile, baseline.compile)
    for number in range(pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds[which].append(both[which]()[1])
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    return float(np.median(ratios)), *seconds
