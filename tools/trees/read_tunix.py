"""Reads Tunix's models, and the LoRA factors that Qwix adds to them: tunix.json.

Run with google-tunix installed: ``JAX_PLATFORMS=cpu python tools/trees/read_tunix.py``. Nothing is allocated.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import jax
import qwix
from common import Row, write
from flax import nnx
from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma4 import model as gemma4
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

MODELS = {
    "gemma_2b": (gemma.Gemma, gemma.ModelConfig.gemma_2b),
    "gemma_7b": (gemma.Gemma, gemma.ModelConfig.gemma_7b),
    "gemma2_2b": (gemma.Gemma, gemma.ModelConfig.gemma2_2b),
    "gemma3_4b_pt": (gemma3.Gemma3, gemma3.ModelConfig.gemma3_4b_pt),
    "gemma4_26b_a4b": (gemma4.Gemma4, gemma4.ModelConfig.gemma4_26b_a4b),
    "gemma4_31b": (gemma4.Gemma4, gemma4.ModelConfig.gemma4_31b),
    "gemma4_e2b": (gemma4.Gemma4, gemma4.ModelConfig.gemma4_e2b),
    "llama3p1_8b": (llama3.Llama3, llama3.ModelConfig.llama3p1_8b),
    "llama3p2_1b": (llama3.Llama3, llama3.ModelConfig.llama3p2_1b),
    "qwen2p5_7b": (qwen2.Qwen2, qwen2.ModelConfig.qwen2p5_7b),
    "qwen3_8b": (qwen3.Qwen3, qwen3.ModelConfig.qwen3_8b),
    "qwen3_30b_a3b": (qwen3.Qwen3, qwen3.ModelConfig.qwen3_30b_a3b),
}
LORA = ("gemma2_2b", "gemma3_4b_pt", "gemma4_e2b", "llama3p1_8b", "qwen2p5_7b", "qwen3_8b")
ADAPTED = r".*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|\w*einsum)"


def leaves(name: str, adapted: bool) -> Iterator[Row]:
    """Path and shape of a model's parameters, or of its Qwix factors alone."""
    kind, config = MODELS[name]

    def make() -> nnx.Module:
        model = kind(config(), rngs=nnx.Rngs(0))
        if not adapted:
            return model
        provider = qwix.LoraProvider(module_path=ADAPTED, rank=8, alpha=8)
        return qwix.apply_lora_to_model(
            model, provider, rngs=nnx.Rngs(0), **model.get_model_input()
        )

    state = nnx.state(nnx.eval_shape(make), nnx.LoRAParam if adapted else nnx.Param)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(state)):
        yield ["/".join(str(key.key) for key in keys), list(leaf.shape)]


def main() -> None:
    """Writes the file."""
    models = {name: list(leaves(name, adapted=False)) for name in MODELS}
    models |= {f"{name}, Qwix factors": list(leaves(name, adapted=True)) for name in LORA}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("google-tunix", "qwix")]
    write("tunix", ", ".join(versions), models)


if __name__ == "__main__":
    main()
