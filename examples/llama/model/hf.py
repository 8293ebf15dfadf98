"""Reads Hugging Face Llama folders: `config.json`, and safetensors files into sharded parameters."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import safetensors
from jax.typing import DTypeLike

from examples.llama.model.config import LlamaConfig, RopeScaling
from examples.llama.model.llama import Params, abstract
from examples.llama.model.subtrees import select
from layout_optax.layout import path_string

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


def load_params(
    folder: str | Path,
    config: LlamaConfig,
    scan_layers: bool = True,
    *,
    shardings: Any = None,
    dtype: DTypeLike = np.float32,
    wanted: Callable[[str], bool] | None = None,
) -> Params:
    """Reads a checkpoint's parameters into the pure dict of `examples.llama.model.llama.create`.

    Names and shapes are all checked before anything is read. Then one parameter after the other is
    made, a stacked one layer by layer. With `shardings` each process reads only the parts that its
    own devices hold, straight from the files; beside the result no more than one parameter's part
    is ever held on the host.

    Args:
        folder: Folder with `model.safetensors`, or with `model.safetensors.index.json` and the
            files that it names.
        config: The shape, usually from `read_config`.
        scan_layers: Which form of the dict to fill.
        shardings: A `jax.sharding.Sharding` for every leaf of the dict, or None.
        dtype: Dtype of the parameters; other floating dtypes are converted.
        wanted: Which paths to read; the dict then holds these alone. All when None.

    Returns:
        Nested dict of `jax.Array` with these shardings; without them, of NumPy arrays.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A tensor is missing, unknown or of another shape; the message names it.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract(config, scan_layers=scan_layers))
    places = [shardings] * len(leaves) if shardings is None else tree.flatten_up_to(shardings)
    sources = [_Source(path, leaf.shape, config.num_layers) for path, leaf in leaves]
    arrays = []
    with _Tensors(Path(folder)) as tensors:
        _check(tensors, sources, config)
        for source, sharding in zip(sources, places, strict=True):
            if wanted is not None and not wanted(source.path):
                arrays.append(None)
                continue
            read = partial(source.read, tensors, np.dtype(dtype))
            if sharding is None:
                arrays.append(read(tuple(slice(None) for _ in source.shape)))
            else:
                arrays.append(jax.make_array_from_callback(source.shape, sharding, read))
                # Before the next one is read, so that not two are on the host at a time.
                jax.block_until_ready(arrays[-1])
    return select(tree.unflatten(arrays), wanted or (lambda _: True))


def tensor_names(path: str, num_layers: int) -> tuple[list[str], bool, bool]:
    """The tensors of a checkpoint that make up one parameter.

    Args:
        path: The parameter's path; a layer's number stands in it in the unscanned form only.
        num_layers: Number of layers.

    Returns:
        Their names, whether they are stacked on axis 0, and whether each is transposed.

    >>> tensor_names("layers/mlp/up_proj/kernel", 2)[0]
    ['model.layers.0.mlp.up_proj.weight', 'model.layers.1.mlp.up_proj.weight']
    >>> tensor_names("layers/1/input_layernorm/scale", 2)
    (['model.layers.1.input_layernorm.weight'], False, False)
    """
    number = re.match(r"layers/(\d+)/", path)
    template, transposed = TENSORS[re.sub(r"^layers/\d+/", "layers/", path)]
    if number is not None:
        return [template.format(layer=number[1])], False, transposed
    if path.startswith("layers/"):
        return [template.format(layer=i) for i in range(num_layers)], True, transposed
    return [template], False, transposed


class _Source:
    """Where one parameter comes from."""

    def __init__(self, path: Any, shape: tuple[int, ...], num_layers: int):
        self.path = path_string(path)
        self.shape = shape
        self.names, self.stacked, self.transposed = tensor_names(self.path, num_layers)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor as it is stored."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def read(self, tensors: _Tensors, dtype: np.dtype, index: Any) -> np.ndarray:
        """The part of the parameter that a tuple of slices selects, one for each axis."""
        if not self.stacked:
            return self._tensor(tensors, self.names[0], index).astype(dtype)
        names = self.names[index[0]]
        sizes = [
            len(range(*one.indices(size))) for one, size in zip(index, self.shape, strict=True)
        ]
        part = np.empty(sizes, dtype)
        for row, name in enumerate(names):
            part[row] = self._tensor(tensors, name, index[1:])
        return part

    def _tensor(self, tensors: _Tensors, name: str, index: tuple[slice, ...]) -> np.ndarray:
        array = tensors.read(name, index[::-1] if self.transposed else index)
        return array.T if self.transposed else array


class _Tensors:
    """The tensors of a folder by name, opened but not read; a context manager."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self._opened: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        for file in (folder / name for name in files):
            if not file.is_file():
                raise FileNotFoundError(f"no {file.name} in {folder}")
        for file in (folder / name for name in files):
            opened = self._stack.enter_context(safetensors.safe_open(file, framework="numpy"))
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                self.file_of[name], self._opened[name] = file, opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._opened[name].get_slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor, in its own dtype."""
        return self._opened[name].get_slice(name)[index]


def _check(tensors: _Tensors, sources: Sequence[_Source], config: LlamaConfig) -> None:
    """Raises ValueError unless the folder holds every tensor, no other, and each in its shape."""
    shapes = {name: source.tensor_shape for source in sources for name in source.names}
    for name, file in sorted(tensors.file_of.items()):
        if _IGNORED.fullmatch(name) or (name == "lm_head.weight" and config.tie_embeddings):
            continue
        if name not in shapes:
            raise ValueError(f"{file}: unexpected tensor {name!r} for this configuration")
        if tensors.shape(name) != shapes[name]:
            raise ValueError(
                f"{file}: tensor {name!r} has shape {tensors.shape(name)}, "
                f"the configuration wants {shapes[name]}"
            )
    missing = [name for name in shapes if name not in tensors.file_of]
    if missing:
        raise ValueError(
            f"{tensors.folder}: tensor {missing[0]!r} is missing "
            f"({len(missing)} of {len(shapes)} are)"
        )
    if config.tie_embeddings and "lm_head.weight" in tensors.file_of:
        # Some tied checkpoints store the head as well.
        table = "model.embed_tokens.weight"
        size, step = config.vocab_size, 4096
        rows = [slice(i, min(i + step, size)) for i in range(0, size, step)]
        if tensors.shape("lm_head.weight") != shapes[table] or not all(
            np.array_equal(
                tensors.read("lm_head.weight", (part, slice(None))),
                tensors.read(table, (part, slice(None))),
            )
            for part in rows
        ):
            raise ValueError(
                f"{tensors.folder}: tensor 'lm_head.weight' differs from the embedding, "
                "but the configuration ties them"
            )


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
