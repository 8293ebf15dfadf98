"""Migrates a saved train state to a model of another form: stacked layers or not, other ranks of LoRA-Pre.

Migration averages and guesses nothing: an array without a counterpart in the other form is an error.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.llama.optimizers.registry import optimizer_entry
from examples.llama.training.settings import Settings
from examples.llama.training.step import TrainState
from layout_optax.layout import path_string
from lorapre_optax import resize_ranks

_LAYER = re.compile(r"(^|/)layers/(\d+)(?=/)")

MIGRATIONS = {
    "layers": ("scan_layers",),
    "rank": ("options.rank", "options.table_rank"),
    "schedule": ("steps", "warmup_steps", "final_rate_fraction", "learning_rate"),
}
"""Changes that a resumed run may make on request, by the names of the settings."""


def parse_migrations(text: str | None) -> tuple[str, ...]:
    """Reads names of migrations separated by commas.

    Raises:
        ValueError: A name is unknown.

    >>> parse_migrations("rank, layers")
    ('rank', 'layers')
    """
    names = tuple(filter(None, (part.strip() for part in (text or "").split(","))))
    for name in names:
        if name not in MIGRATIONS:
            raise ValueError(f"unknown migration {name!r}; use {', '.join(MIGRATIONS)}")
    return names


class MigrationError(ValueError):
    """A state has no counterpart in the requested form; the message names the array."""


def migrate_layers(state: Any, like: Any) -> Any:
    """Stacks or unstacks the layers of parameters and of every part of a state that is shaped like them.

    Arrays are matched by path: `layers/0/...` up to `layers/n/...` are the slices along axis 0 of
    `layers/...`. An array without a layer axis (a step count, a placeholder) does not change.

    Args:
        state: A tree of arrays.
        like: The tree of the other form, of `jax.ShapeDtypeStruct`.

    Returns:
        A tree like `like`.

    Raises:
        MigrationError: An array has no counterpart, or one of another shape.

    >>> stacked = {"mu": {"layers": {"w": jnp.arange(6.0).reshape(2, 3)}}, "count": jnp.int32(7)}
    >>> layer = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    >>> like = {"mu": {"layers": {0: layer, 1: layer}}, "count": jax.ShapeDtypeStruct((), jnp.int32)}
    >>> migrate_layers(stacked, like)["mu"]["layers"][1]["w"].tolist()
    [3.0, 4.0, 5.0]
    """
    source = {path_string(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(state)}
    layers: dict[str, dict[int, Any]] = {}
    for path, leaf in source.items():
        if match := _LAYER.search(path):
            layers.setdefault(_stacked_path(path), {})[int(match[2])] = leaf

    def find(keys: Any, wanted: jax.ShapeDtypeStruct) -> Any:
        path = path_string(keys)
        match = _LAYER.search(path)
        if path in source:
            found = source[path]
        elif match and _stacked_path(path) in source:
            found = source[_stacked_path(path)]
            if found.shape[1:] == wanted.shape and found.ndim == len(wanted.shape) + 1:
                found = found[int(match[2])]
        elif path in layers and sorted(layers[path]) == list(range(len(layers[path]))):
            parts = [layers[path][i] for i in range(len(layers[path]))]
            found = parts[0] if parts[0].shape == wanted.shape else _stack(parts)
        else:
            raise MigrationError(
                f"'{path}' is not in the checkpoint, in neither form of its layers"
            )
        return _checked(found, wanted, path)

    return jax.tree_util.tree_map_with_path(find, like)


def migrate_ranks(state: TrainState, settings: Settings, like: TrainState) -> TrainState:
    """Changes the ranks of LoRA-Pre's factors; see `lorapre_optax.resize_ranks`.

    Args:
        state: The train state.
        settings: The settings with the new ranks.
        like: Shapes and dtypes of the train state with the new ranks.

    Raises:
        MigrationError: The optimizer has no low-rank state, or the result does not fit.
    """
    options = settings.options
    tables = options.table_rank
    if "table_rank" not in optimizer_entry(settings.optimizer).options:
        tables = options.rank
    ranks = {"matrix": options.rank, "embedding": tables, "head": tables}
    try:
        opt_state = resize_ranks(state.opt_state, ranks, state.params)
    except ValueError as error:
        raise MigrationError(f"{settings.optimizer}: {error}") from error
    found = {path_string(k): x for k, x in jax.tree_util.tree_leaves_with_path(opt_state)}

    def find(keys: Any, wanted: jax.ShapeDtypeStruct) -> Any:
        path = path_string(keys)
        if path not in found:
            raise MigrationError(f"'{path}' has no counterpart at the old rank")
        return _checked(found[path], wanted, path)

    return state._replace(opt_state=jax.tree_util.tree_map_with_path(find, like.opt_state))


def _stacked_path(path: str) -> str:
    return _LAYER.sub(r"\1layers", path)


def _stack(parts: list[Any]) -> Any:
    """NumPy arrays stay NumPy."""
    return np.stack(parts) if isinstance(parts[0], np.ndarray) else jnp.stack(parts)


def _checked(found: Any, wanted: jax.ShapeDtypeStruct, path: str) -> Any:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise MigrationError(
            f"'{path}' is {found.dtype}{list(found.shape)} in the checkpoint and "
            f"{wanted.dtype}{list(wanted.shape)} here"
        )
    return found
