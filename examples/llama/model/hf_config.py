"""Reads a model's shape from a Hugging Face `config.json`, and names fields that cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from examples.llama.model.config import LlamaConfig, RopeScaling

_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
    "max_seq_len": "max_position_embeddings",
}
"""Field names here and in the file, where they differ."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def read_config(folder: str | Path) -> LlamaConfig:
    """Reads the shape of a Hugging Face Llama from its `config.json`.

    The rotary settings may be old (`rope_theta` and `rope_scaling`) or new (`rope_parameters`).

    Args:
        folder: Folder that holds `config.json`.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: Another architecture, biases, quantized weights, an unknown activation or rotary type,
            or a field that is missing or of the wrong kind; the message names it.
    """
    path = Path(folder) / "config.json"
    fields = read_fields(path)
    if fields.get("model_type") != "llama":
        raise ValueError(
            f"{path}: model_type is {fields.get('model_type')!r} "
            f"(architectures {fields.get('architectures')}); only 'llama' can be read"
        )
    for name, wanted in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if fields.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name} is {fields[name]!r}; only {wanted!r} can be read")
    if fields.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is set; only plain weights can be read")
    theta, scaling = _read_rope(fields, path)
    return _shape(fields, path, rope_theta=theta, rope_scaling=scaling)


def read_shape(folder: str | Path) -> tuple[LlamaConfig, str]:
    """Reads the sizes of any decoder as a Llama of these sizes, for planning, not for loading.

    Args:
        folder: Folder that holds `config.json`.

    Returns:
        The shape, and its `model_type`.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: The model has experts, or a size is missing or of the wrong kind; the message names it.
    """
    path = Path(folder) / "config.json"
    fields = read_fields(path)
    if isinstance(fields.get("text_config"), dict):  # a multimodal model
        fields = {"model_type": fields.get("model_type"), **fields["text_config"]}
    for name in _EXPERTS:
        if fields.get(name):
            raise ValueError(
                f"{path}: {name} is {fields[name]!r}; models of experts cannot be planned"
            )
    return _shape(fields, path), str(fields.get("model_type"))


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a `config.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        fields = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an object with fields")
    return fields


def _shape(fields: dict[str, Any], path: Path, **rope: Any) -> LlamaConfig:
    def size(name: str, default: int | None = None) -> int:
        return int(_number(fields, name, path, default, whole=True))

    heads = size("num_attention_heads")
    tied = fields.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings must be true or false, got {tied!r}")
    try:
        return LlamaConfig(
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"),
            num_layers=size("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", 0),
            tie_embeddings=tied,
            rms_norm_eps=_number(fields, "rms_norm_eps", path, 1e-6),
            init_std=_number(fields, "initializer_range", path, 0.02),
            max_seq_len=size("max_position_embeddings", 2048),
            **rope,
        )
    except ValueError as error:
        message = str(error)
        for ours, theirs in _KEYS.items():
            message = message.replace(ours, theirs)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from error


def _number(
    fields: dict[str, Any], name: str, path: Path, default: float | None, *, whole: bool = False
) -> float:
    """A finite number, or its default if the field is absent or null."""
    value = fields.get(name)
    if value is None:
        if default is None:
            raise ValueError(f"{path}: the field {name!r} is missing")
        return default
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        kind = "a whole number" if whole else "a finite number"
        raise ValueError(f"{path}: {name} must be {kind}, got {value!r}")
    return value


def _read_rope(fields: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    name = "rope_parameters" if fields.get("rope_parameters") else "rope_scaling"
    rope = fields.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: {name} must be an object, got {rope!r}")
    within = rope if rope.get("rope_theta") is not None else fields
    theta = float(_number(within, "rope_theta", path, 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"{path}: rope_type is {kind!r}; only 'default' and 'llama3' can be read")
    names = (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    )
    values: dict[str, Any] = {}
    for name in names:
        if name not in rope:
            raise ValueError(f"{path}: the rotary field {name!r} is missing")
        whole = name == names[-1]
        values[name] = _number(rope, name, path, None, whole=whole)
    return theta, RopeScaling(**values)
