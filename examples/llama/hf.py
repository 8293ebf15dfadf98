"""Reads Hugging Face Llama checkpoints: `config.json` and safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors

from examples.llama.model import Params, abstract
from examples.llama.presets import LlamaConfig, RopeScaling

TENSORS: dict[str, tuple[str, bool]] = {
    "embed_tokens/embedding": ("model.embed_tokens.weight", False),
    "layers/input_layernorm/scale": ("model.layers.{layer}.input_layernorm.weight", False),
    "layers/self_attn/q_proj/kernel": ("model.layers.{layer}.self_attn.q_proj.weight", True),
    "layers/self_attn/k_proj/kernel": ("model.layers.{layer}.self_attn.k_proj.weight", True),
    "layers/self_attn/v_proj/kernel": ("model.layers.{layer}.self_attn.v_proj.weight", True),
    "layers/self_attn/o_proj/kernel": ("model.layers.{layer}.self_attn.o_proj.weight", True),
    "layers/post_attention_layernorm/scale": (
        "model.layers.{layer}.post_attention_layernorm.weight",
        False,
    ),
    "layers/mlp/gate_proj/kernel": ("model.layers.{layer}.mlp.gate_proj.weight", True),
    "layers/mlp/up_proj/kernel": ("model.layers.{layer}.mlp.up_proj.weight", True),
    "layers/mlp/down_proj/kernel": ("model.layers.{layer}.mlp.down_proj.weight", True),
    "norm/scale": ("model.norm.weight", False),
    "lm_head/kernel": ("lm_head.weight", True),
}
"""Our path (of the scanned form) to the checkpoint's name and whether the matrix is transposed."""

# Constants that old checkpoints stored beside the parameters.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def read_config(folder: str | Path) -> LlamaConfig:
    """Reads the shape of a Hugging Face Llama from its `config.json`.

    The rotary settings may be old (`rope_theta` and `rope_scaling`) or new (`rope_parameters`).

    Args:
        folder: Folder that holds `config.json`.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: Another architecture, biases, an unknown activation or rotary type, or a
            missing field; the message names it.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("model_type") != "llama":
        raise ValueError(
            f"{path}: model_type is {fields.get('model_type')!r} "
            f"(architectures {fields.get('architectures')}); only 'llama' can be read"
        )
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if fields.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name} is {fields[name]!r}; only {wanted!r} can be read")

    def required(name: str) -> Any:
        if fields.get(name) is None:
            raise ValueError(f"{path}: the field {name!r} is missing")
        return fields[name]

    theta, scaling = _read_rope(fields, path)
    return LlamaConfig(
        vocab_size=required("vocab_size"),
        hidden_size=required("hidden_size"),
        intermediate_size=required("intermediate_size"),
        num_layers=required("num_hidden_layers"),
        num_heads=required("num_attention_heads"),
        num_kv_heads=fields.get("num_key_value_heads") or required("num_attention_heads"),
        head_dim=fields.get("head_dim") or 0,
        tie_embeddings=fields.get("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        init_std=fields.get("initializer_range", 0.02),
        max_seq_len=fields.get("max_position_embeddings", 2048),
    )


def load_params(folder: str | Path, config: LlamaConfig, scan_layers: bool = True) -> Params:
    """Reads a checkpoint's parameters into the pure dict of `examples.llama.model.create`.

    Args:
        folder: Folder with `model.safetensors`, or with `model.safetensors.index.json` and the
            files that it names.
        config: The shape, usually from `read_config`.
        scan_layers: Which form of the dict to fill.

    Returns:
        Nested dict of float32 NumPy arrays (other floating dtypes are converted). One tensor at
        a time is held beside the result.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A tensor is missing, unknown or of another shape; the message names it.
    """
    expected = _slots(config, scan_layers)
    params: Params = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype), abstract(config, scan_layers=scan_layers)
    )
    seen: set[str] = set()
    repeated_head: np.ndarray | None = None  # some tied checkpoints store the head as well
    for name, array, file in _tensors(Path(folder)):
        if _IGNORED.fullmatch(name):
            continue
        if name == "lm_head.weight" and config.tie_embeddings:
            repeated_head = array
            continue
        if name not in expected:
            raise ValueError(f"{file}: unexpected tensor {name!r} for this configuration")
        slot = expected[name]
        target = slot.find(params)
        array = array.T if slot.transposed else array
        if array.shape != target.shape:
            got, wanted = (a.T.shape if slot.transposed else a.shape for a in (array, target))
            raise ValueError(
                f"{file}: tensor {name!r} has shape {got}, the configuration wants {wanted}"
            )
        target[...] = array
        seen.add(name)
    missing = [name for name in expected if name not in seen]
    if missing:
        raise ValueError(
            f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are)"
        )
    if repeated_head is not None and not np.array_equal(
        repeated_head, params["embed_tokens"]["embedding"]
    ):
        raise ValueError(
            f"{folder}: tensor 'lm_head.weight' differs from the embedding, "
            "but the configuration ties them"
        )
    return params


class _Slot(NamedTuple):
    """Where one tensor of a checkpoint goes."""

    path: tuple[str | int, ...]
    layer: int | None
    transposed: bool

    def find(self, params: Params) -> np.ndarray:
        """The array, or the view of one layer of it, that the tensor fills."""
        leaf: Any = params
        for key in self.path:
            leaf = leaf[key]
        return leaf if self.layer is None else leaf[self.layer]


def _slots(config: LlamaConfig, scan_layers: bool) -> dict[str, _Slot]:
    """Every tensor name that a checkpoint of this shape holds, and its place."""
    slots: dict[str, _Slot] = {}
    for path, (template, transposed) in TENSORS.items():
        first, *rest = path.split("/")
        if first == "lm_head" and config.tie_embeddings:
            continue
        if first != "layers":
            slots[template] = _Slot((first, *rest), None, transposed)
            continue
        for layer in range(config.num_layers):
            place = (first, *rest) if scan_layers else (first, layer, *rest)
            slots[template.format(layer=layer)] = _Slot(
                place, layer if scan_layers else None, transposed
            )
    return slots


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray, Path]]:
    """Yields name, float32 array and file of every tensor, in the order of the names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no {file.name} in {folder}")
    for file in files:
        # The flax reader knows bfloat16, which NumPy alone does not.
        with safetensors.safe_open(file, framework="flax") as opened:
            for name in sorted(opened.keys()):
                yield name, np.asarray(opened.get_tensor(name)).astype(np.float32), file


def _read_rope(fields: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"{path}: rope_type is {kind!r}; only 'default' and 'llama3' can be read")
    names = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    for name in names:
        if name not in rope:
            raise ValueError(f"{path}: the rotary field {name!r} is missing")
    return float(theta), RopeScaling(**{name: rope[name] for name in names})
