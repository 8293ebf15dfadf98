"""Reads Levanter's models, Haliax arrays whose modules say which axes are inputs and outputs: haliax.json.

Run with marin-levanter installed: ``JAX_PLATFORMS=cpu python tools/trees/read_haliax.py``.
Nothing is allocated.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
from common import Row, write
from haliax.util import ensure_tuple
from levanter.models import gemma, gpt2, llama, mistral, mixtral, olmo, olmo3, qwen, qwen3_moe

MODELS = {
    "gemma": gemma.GemmaConfig,
    "gemma2": gemma.Gemma2Config,
    "gemma3": gemma.Gemma3Config,
    "gpt2": gpt2.Gpt2Config,
    "llama": llama.LlamaConfig,
    "mistral": mistral.MistralConfig,
    "mixtral": mixtral.MixtralConfig,
    "olmo2": olmo.Olmo2Config,
    "olmo3": olmo3.Olmo3Config,
    "qwen2.5": qwen.QwenConfig,
    "qwen3": qwen.Qwen3Config,
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig,
}
VOCABULARY = hax.Axis("vocab", 32000)


def _linear(node: Any) -> bool:
    return isinstance(node, (hnn.Linear, hnn.MoELinear))


def _axes(node: Any) -> list[list[int]]:
    """Positions of a linear module's input and output axes in its weight."""
    names = [axis.name for axis in node.weight.axes]
    return [
        sorted(names.index(axis.name) for axis in ensure_tuple(group))
        for group in (node.In, node.Out)
    ]


def leaves(config: Any) -> Iterator[Row]:
    """Path, shape, and for a linear module's weight its input and output axes."""
    make = config.model_type.init
    model = eqx.filter_eval_shape(make, VOCABULARY, config, key=jax.random.PRNGKey(0))
    for keys, node in jax.tree_util.tree_leaves_with_path(model, is_leaf=_linear):
        prefix = jax.tree_util.keystr(keys, simple=True, separator="/")
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node):
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                continue  # an option
            suffix = jax.tree_util.keystr(inner, simple=True, separator="/")
            weight = _linear(node) and suffix.startswith("weight")
            path = "/".join(part for part in (prefix, suffix) if part)
            yield [path, list(leaf.shape), _axes(node) if weight else None]


def main() -> None:
    """Writes the file."""
    models = {name: list(leaves(kind())) for name, kind in MODELS.items()}
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("marin-levanter", "marin-haliax")
    ]
    write("haliax", ", ".join(versions), models)


if __name__ == "__main__":
    main()
