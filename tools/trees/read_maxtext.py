"""Reads MaxText's models, scanned and not, with its own Muon dimension numbers: maxtext.json.

Run with MaxText installed: ``JAX_PLATFORMS=cpu python tools/trees/read_maxtext.py``. Nothing is allocated.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

import jax
from common import Row, write
from flax import nnx
from maxtext.configs import pyconfig
from maxtext.utils import maxtext_utils, model_creation_utils, muon_utils
from maxtext.utils.globals import MAXTEXT_PKG_DIR

MODELS = [
    "gemma-2b",
    "gemma2-2b",
    "gemma3-4b",
    "gemma4-26b",
    "gemma4-31b",
    "gemma4-e2b",
    "qwen2.5-7b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "qwen3-next-80b-a3b",
    "qwen3.5-35b-a3b",
    "llama3-8b",
    "llama3.1-8b",
    "llama4-17b-16e",
    "llama4-17b-128e",
    "deepseek2-16b",
    "deepseek3-671b",
    "deepseek4-284b",
    "mixtral-8x7b",
    "mistral-7b",
    "gpt-oss-20b",
    "gpt3-6b",
    "olmo3-7b",
]
UNSCANNED_ONLY = {"gemma4-e2b"}  # MaxText refuses to scan it


def leaves(name: str, scanned: bool) -> Iterator[Row]:
    """Path, shape, and MaxText's reduction and output axes (None: AdamW) of a model's parameters."""
    options = [
        f"model_name={name}",
        f"scan_layers={scanned}",
        "attention=dot_product",
        "skip_jax_distributed_system=True",
    ]
    config = pyconfig.initialize(
        [None, os.path.join(MAXTEXT_PKG_DIR, "configs", "base.yml"), *options]
    )
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    _, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1])
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(str(key.key) for key in keys)
        numbers = muon_utils.transform_logic(path, leaf.shape)
        axes = None
        if numbers is not None:
            axes = [
                sorted(axis % leaf.ndim for axis in group)
                for group in (numbers.reduction_axis, numbers.output_axis)
            ]
        yield ["/".join(path), list(leaf.shape), axes]


def main() -> None:
    """Writes the file."""
    models = {
        f"{name}, {'scanned' if scanned else 'not scanned'}": list(leaves(name, scanned))
        for name in MODELS
        for scanned in (True, False)
        if not (scanned and name in UNSCANNED_ONLY)
    }
    write("maxtext", f"maxtext {importlib.metadata.version('maxtext')}", models)


if __name__ == "__main__":
    main()
