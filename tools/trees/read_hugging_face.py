"""Reads Hugging Face models, whose linear modules say which axes are inputs and outputs: hugging_face.json.

Run with transformers and torch installed: ``python tools/trees/read_hugging_face.py``. Nothing is allocated.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import torch
import transformers
from common import Row, write

LAYERS = 4  # every kind of layer comes within the first four
MODELS = {
    "Gemma": {},
    "Gemma2": {},
    "Gemma3": {"text": True},
    "Gemma4": {
        "text": True,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "num_global_key_value_heads": 2,
    },
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": {},
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
    """Path, shape, and for a linear module's weight its input and output axes."""
    config = getattr(transformers, f"{name}{'Text' if text else ''}Config")()
    config.num_hidden_layers = LAYERS
    for option, value in options.items():
        setattr(config, option, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:LAYERS]
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for path, parameter in model.named_parameters():
        yield [path, list(parameter.shape), [[1], [0]] if path in linear else None]


def main() -> None:
    """Writes the file."""
    models = {name: list(leaves(name, **options)) for name, options in MODELS.items()}
    write("hugging_face", f"transformers {importlib.metadata.version('transformers')}", models)


if __name__ == "__main__":
    main()
