"""Reads the safetensors files of Hugging Face Llama folders into sharded parameters."""

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

from examples.llama.model.config import LlamaConfig
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
"""Parameter path (scanned form) -> the checkpoint's name, and whether the matrix is transposed."""

# Constants that old checkpoints store besides the parameters.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_FLOATING = ("F64", "F32", "F16", "BF16")


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

    All names and shapes are checked first. Then one parameter after the other is made, a stacked one layer by
    layer. With `shardings` each process reads only the parts of its own devices, directly from the files. Apart
    from the result, the host never holds more than one parameter's part.

    Args:
        folder: Folder with `model.safetensors`, or with `model.safetensors.index.json` and the
            files that it names.
        config: The shape, usually from `read_config`.
        scan_layers: The form of the dict to fill.
        shardings: A `jax.sharding.Sharding` for every leaf of the dict, or None.
        dtype: Dtype of the parameters; other floating dtypes are converted.
        wanted: Paths to read; the dict then holds only these. None reads all.

    Returns:
        Nested dict of `jax.Array` with these shardings, or of NumPy arrays without shardings.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or a tensor is missing, unknown, misshapen, not floating-point or not
            finite;
            the message names it.
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
                # Before the next one is read, so that the host never holds two.
                jax.block_until_ready(arrays[-1])
    return select(tree.unflatten(arrays), wanted or (lambda _: True))


def tensor_names(path: str, num_layers: int) -> tuple[list[str], bool, bool]:
    """The tensors of a checkpoint that form one parameter.

    Args:
        path: The parameter's path, with a layer's number only in the unscanned form.
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
    """The source of one parameter."""

    def __init__(self, path: Any, shape: tuple[int, ...], num_layers: int):
        self.path = path_string(path)
        self.shape = shape
        self.names, self.stacked, self.transposed = tensor_names(self.path, num_layers)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the files."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape

    def read(self, tensors: _Tensors, dtype: np.dtype, index: Any) -> np.ndarray:
        """The part of the parameter that a tuple of slices, one per axis, selects."""
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
            files = _indexed_files(index)
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        self._opened: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        for file in (folder / name for name in files):
            if not file.is_file():
                raise FileNotFoundError(f"no {file.name} in {folder}")
        for file in (folder / name for name in files):
            try:
                opened = self._stack.enter_context(safetensors.safe_open(file, framework="numpy"))
            except (safetensors.SafetensorError, OSError) as error:
                self._stack.close()
                raise ValueError(
                    f"{file} is cut short or damaged ({_first_line(error)}); download it again"
                ) from error
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                self.file_of[name], self._opened[name] = file, opened

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return tuple(self._opened[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's dtype by the file's name: F32, BF16, I32."""
        return self._opened[name].get_slice(name).get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor, in its own dtype.

        Raises:
            ValueError: The part is not finite.
        """
        part = self._opened[name].get_slice(name)[index]
        if not np.isfinite(part).all():
            raise ValueError(
                f"{self.file_of[name]}: tensor {name!r} has values that are not finite; the weights are "
                "damaged, or the training that made them diverged"
            )
        return part


def _indexed_files(index: Path) -> list[str]:
    """The files in an index, all from the index's own folder.

    Raises:
        ValueError: The index cannot be read or names something else.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} is no index of safetensors files ({_first_line(error)}); download it again"
        ) from error
    for name in names:
        plain = isinstance(name, str) and not set(name) & {"/", "\\", "\0"}
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names {name!r}; it may name safetensors files of its own folder only"
            )
    return sorted(names)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check(tensors: _Tensors, sources: Sequence[_Source], config: LlamaConfig) -> None:
    """Raises ValueError unless the folder holds every tensor, no other, and each with its shape."""
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
        if tensors.dtype(name) not in _FLOATING:
            raise ValueError(
                f"{file}: tensor {name!r} is {tensors.dtype(name)}; only {', '.join(_FLOATING)} can be read"
            )
    missing = [name for name in shapes if name not in tensors.file_of]
    if missing:
        raise ValueError(
            f"{tensors.folder}: tensor {missing[0]!r} is missing "
            f"({len(missing)} of {len(shapes)} are)"
        )
    if config.tie_embeddings and "lm_head.weight" in tensors.file_of:
        # Some tied checkpoints store the head too.
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
