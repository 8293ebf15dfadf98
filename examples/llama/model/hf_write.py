"""Writes Hugging Face Llama folders: `config.json` and safetensors files of a limited size."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from huggingface_hub import split_state_dict_into_shards_factory

from examples.llama.model.config import LlamaConfig
from examples.llama.model.hf import tensor_names
from examples.llama.model.llama import Params, abstract

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
"""Files of a tokenizer to copy unchanged; the first is required, the others may be absent."""

_COPIED = (*TOKENIZER_FILES, "generation_config.json")

Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def save_folder(
    folder: str | Path,
    config: LlamaConfig,
    params: Params,
    *,
    dtype: Dtype = "float32",
    max_file_bytes: int = 5 * 10**9,
    base: str | Path | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes parameters as a folder that `transformers`, and `read_config` and `load_params`, load.

    The host holds one file's tensors at a time. If there is more than one file, the index is written last. The
    rotary settings are written as `rope_theta` and `rope_scaling`, which every version of `transformers` reads.

    Args:
        folder: The folder; made if it is missing.
        config: The model's shape.
        params: Parameters of either form, NumPy or JAX; sharded ones must be fully addressable.
        dtype: Dtype to store.
        max_file_bytes: Largest size of a safetensors file; a larger tensor gets its own file.
        base: The Hugging Face folder of the base model. The fields of its `config.json` and
            `generation_config.json` besides the shape (special tokens) are kept.
        tokenizer: A `tokenizer.json`, or the folder with it and its companions, to copy.
        overwrite: Whether to replace a model in the folder.

    Returns:
        The files written, `config.json` first.

    Raises:
        FileExistsError: The folder holds a model and `overwrite` is not set.
        FileNotFoundError: There is no such tokenizer.
        ValueError: A parameter is missing, unknown, of another shape or not finite; the message names it.

    >>> import tempfile
    >>> from examples.llama.model.llama import create
    >>> from examples.llama.model.config import preset
    >>> config = preset("demo", vocab_size=32, hidden_size=16, num_layers=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in save_folder(folder, config, create(config)[1])]
    ['config.json', 'model.safetensors']
    """
    folder = Path(folder)
    tensors = list(_tensors(config, params))
    files = _files(tensors, np.dtype(_DTYPES[dtype]).itemsize, max_file_bytes)
    old = [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]
    if old and not overwrite:
        raise FileExistsError(
            f"{folder} holds a model; give another folder, or --overwrite to replace it"
        )
    copies = [] if tokenizer is None else _tokenizer_files(Path(tokenizer))
    folder.mkdir(parents=True, exist_ok=True)
    # Everything is written beside the old files first, so an error leaves them unchanged.
    place = folder / f".{uuid.uuid4().hex}.part"
    place.mkdir()
    try:
        written = [place / "config.json"]
        _write_json(written[0], _config_fields(config, dtype, base))
        if base is not None and (Path(base) / "generation_config.json").is_file():
            written.append(_copy(Path(base) / "generation_config.json", place))
        written += [_copy(path, place) for path in copies]
        for name, part in files.items():
            arrays = {tensor.name: tensor.fetch(_DTYPES[dtype]) for tensor in part}
            safetensors.numpy.save_file(arrays, place / name, metadata={"format": "pt"})
            written.append(place / name)
        if len(files) > 1:
            total = sum(tensor.size for tensor in tensors) * np.dtype(_DTYPES[dtype]).itemsize
            weight_map = {tensor.name: name for name, part in files.items() for tensor in part}
            written.append(place / "model.safetensors.index.json")
            _write_json(written[-1], {"metadata": {"total_size": total}, "weight_map": weight_map})
        for path in old:
            path.unlink()
        for path in reversed(written):  # config.json, which makes the folder a model, last
            path.chmod(_mode())
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(place)
    return [folder / path.name for path in written]


class _Tensor(NamedTuple):
    """One tensor to write, fetched together with its file."""

    name: str
    leaf: Any
    layer: int | None
    transposed: bool

    @property
    def size(self) -> int:
        return self.leaf.size // (1 if self.layer is None else self.leaf.shape[0])

    def fetch(self, dtype: Any) -> np.ndarray:
        array = np.asarray(self.leaf) if self.layer is None else _layer(self.leaf, self.layer)
        with np.errstate(over="ignore"):  # an error below
            stored = np.ascontiguousarray(array.T if self.transposed else array, dtype)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"the tensor {self.name!r} is not finite in {np.dtype(dtype)}; nothing was written"
            )
        return stored


def _mode() -> int:
    """The mode of a new file under the user's umask: safetensors makes files for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _layer(leaf: Any, layer: int) -> np.ndarray:
    """One layer of a stacked parameter, on the host."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf[layer])
    # From the shards: indexing an array that is sharded over layers would need a collective.
    array = np.empty(leaf.shape[1:], leaf.dtype)
    for shard in leaf.addressable_shards:
        held = range(*shard.index[0].indices(leaf.shape[0]))
        if shard.replica_id == 0 and layer in held:
            array[shard.index[1:]] = np.asarray(shard.data[held.index(layer)])
    return array


def _tensors(config: LlamaConfig, params: Params) -> Iterator[_Tensor]:
    """All tensors, layer by layer, so that neighbours in the model share a file."""
    scan_layers = "self_attn" in params["layers"]
    wanted = _by_path(abstract(config, scan_layers=scan_layers))
    given = _by_path(params)
    for path in sorted(wanted.keys() ^ given.keys()):
        problem = "is missing" if path in wanted else "is unknown to this configuration"
        raise ValueError(f"the parameter {path!r} {problem}")
    found: list[tuple[int, _Tensor]] = []
    for path, leaf in given.items():
        if leaf.shape != wanted[path].shape:
            raise ValueError(
                f"the parameter {path!r} has shape {leaf.shape}, the configuration wants "
                f"{wanted[path].shape}"
            )
        names, stacked, transposed = tensor_names(path, config.num_layers)
        for row, name in enumerate(names):
            tensor = _Tensor(name, leaf, row if stacked else None, transposed)
            found.append((_place(name), tensor))
    for _, tensor in sorted(found, key=lambda item: (item[0], item[1].name)):
        yield tensor


def _place(name: str) -> int:
    """The embedding first, then layer after layer, then the final norm and the head."""
    if ".layers." in name:
        return int(name.split(".")[2])
    return -1 if "embed_tokens" in name else 10**9


def _files(tensors: list[_Tensor], itemsize: int, max_file_bytes: int) -> dict[str, list[_Tensor]]:
    """The tensors of each file, by file name."""
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes must be positive, got {max_file_bytes}")
    named = {tensor.name: tensor for tensor in tensors}
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda tensor: tensor.size * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_file_bytes,
    )
    return {
        file: [named[name] for name in names] for file, names in split.filename_to_tensors.items()
    }


def _config_fields(config: LlamaConfig, dtype: str, base: str | Path | None) -> dict[str, Any]:
    """The content of config.json; fields of the base that are not about the shape are kept."""
    kept = {}
    if base is not None:
        kept = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
        for name in ("rope_parameters", "dtype", "_name_or_path", "transformers_version"):
            kept.pop(name, None)
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **vars(config.rope_scaling)}
    return {
        **kept,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": dtype,
    }


def _tokenizer_files(path: Path) -> list[Path]:
    path = path.expanduser()
    if path.is_file():
        return [path]
    if not (path / TOKENIZER_FILES[0]).is_file():
        raise FileNotFoundError(f"no {TOKENIZER_FILES[0]} in {path}")
    return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]


def _copy(path: Path, folder: Path) -> Path:
    # A tokenizer given as a file may have another name.
    target = folder / (path.name if path.name in _COPIED else TOKENIZER_FILES[0])
    if not (target.exists() and target.samefile(path)):
        shutil.copyfile(path, target)
    return target


def _by_path(tree: Any) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
