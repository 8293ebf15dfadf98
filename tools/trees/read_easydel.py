"""Reads EasyDeL's models: easydel.json.

Run with easydel, pillow and torch installed: ``JAX_PLATFORMS=cpu python tools/trees/read_easydel.py``.
Nothing is allocated.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import easydel
import jax
import jax.numpy as jnp
from common import Row, write
from flax import nnx

LAYERS = 4  # every kind of layer comes within the first four
MODELS = {
    "Gemma": {},
    "Gemma2": {},
    "Gemma3": {"text": True},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": {"mlp_only_layers": []},
    "Qwen3Next": {},
    "Llama": {},
    "Llama4": {"text": True},
    "DeepseekV2": {"first_k_dense_replace": 1},
    "DeepseekV3": {"first_k_dense_replace": 1},
    "Mixtral": {},
    "GptOss": {},
    "Olmo3": {},
}


def leaves(name: str, text: bool = False, **options: object) -> Iterator[Row]:
    """Path and shape of a model's parameters."""
    kind = getattr(easydel, f"{name}{'Text' if text else ''}Config")
    config = kind(num_hidden_layers=LAYERS, **options)
    model = getattr(easydel, f"{name}ForCausalLM").lazy_init(
        config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield ["/".join(str(key.key) for key in keys), list(leaf.shape)]


def main() -> None:
    """Writes the file."""
    models = {name: list(leaves(name, **options)) for name, options in MODELS.items()}
    write("easydel", f"easydel {importlib.metadata.version('easydel')}", models)


if __name__ == "__main__":
    main()
