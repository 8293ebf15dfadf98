"""Whole models as frameworks name them: paths and shapes read by tools/trees, kept in tests/layout/trees."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FOLDER = pathlib.Path(__file__).parent / "trees"


class Leaf(NamedTuple):
    """A leaf: ``numbers`` are the input and output axes that the framework itself gives, or None."""

    path: str
    shape: tuple[int, ...]
    numbers: tuple[tuple[int, ...], tuple[int, ...]] | None


@jax.tree_util.register_pytree_node_class
class Keyless:
    """A node of one array that names no child, as Haliax's ``NamedArray``."""

    def __init__(self, array: Any):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children[0])


def models(framework: str) -> dict[str, list[Leaf]]:
    """The models of one file by name."""
    read = json.loads((FOLDER / f"{framework}.json").read_text())["models"]
    return {name: [_leaf(*row) for row in rows] for name, rows in read.items()}


def _leaf(path: str, shape: Sequence[int], numbers: Any = None) -> Leaf:
    axes = None if numbers is None else tuple(tuple(group) for group in numbers)
    return Leaf(path, tuple(shape), axes)  # pyright: ignore[reportArgumentType]


def tree(leaves: Sequence[Leaf]) -> dict[str, Any]:
    """The model as nested dictionaries of shapes; a path that ends in /0 ends in a keyless node."""
    root: dict[str, Any] = {}
    for path, shape, _ in leaves:
        *parts, last = path.removesuffix("/0").split("/")
        node = root
        for part in parts:
            node = node.setdefault(part, {})
        array = jax.ShapeDtypeStruct(shape, jnp.float32)
        node[last] = Keyless(array) if path.endswith("/0") else array
    return root
