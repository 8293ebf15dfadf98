"""Selects the trained parameters: rules on paths, and functions that split and join the parameter tree."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax

from layout_optax.layout import path_string

Params = dict[Any, Any]

SUBSETS: dict[str, tuple[str, ...]] = {
    "matrices": ("layers/*kernel",),
    "all": ("*",),
}
"""Named subsets: the attention and MLP matrices (the LoRA-Pre protocol), or everything."""


def trainable_patterns(text: str) -> tuple[str, ...]:
    """Reads a name of `SUBSETS`, or patterns of paths with `*`, separated by commas.

    Raises:
        ValueError: There is none.

    >>> trainable_patterns("matrices"), trainable_patterns("layers/self_attn/*, norm/scale")
    (('layers/*kernel',), ('layers/self_attn/*', 'norm/scale'))
    """
    if text in SUBSETS:
        return SUBSETS[text]
    patterns = tuple(filter(None, (part.strip() for part in text.split(","))))
    if not patterns:
        raise ValueError(f"trainable: name one of {', '.join(SUBSETS)}, or patterns of paths")
    return patterns


def split_params(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """Splits parameters into those that match a pattern and the rest, both without empty branches.

    Args:
        params: A nested dict of arrays or shapes.
        patterns: Patterns of whole paths for `fnmatch`.

    Returns:
        The matching part and the rest.

    Raises:
        ValueError: A pattern matches nothing; the message lists the paths.

    >>> split_params({"a": {"x": 1, "y": 2}, "b": 3}, ["a/x"])
    ({'a': {'x': 1}}, {'a': {'y': 2}, 'b': 3})
    """
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [path_string(path) for path, _ in flat]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            raise ValueError(
                f"trainable: no parameter matches {pattern!r}; they are {', '.join(paths)}"
            )

    def matches(path: str) -> bool:
        return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)

    return select(params, matches), select(params, lambda path: not matches(path))


def select(params: Params, wanted: Callable[[str], bool]) -> Params:
    """The leaves at the wanted paths, in the same places."""
    kept: Params = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        if wanted(path_string(path)):
            place = kept
            for key in path[:-1]:
                place = place.setdefault(key.key, {})
            place[path[-1].key] = leaf
    return kept


def merge_trees(left: Params, right: Params) -> Params:
    """Joins two nested dicts that share no leaf.

    Raises:
        ValueError: They share a leaf.

    >>> merge_trees({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})
    {'a': {'x': 1, 'y': 2}, 'b': 3}
    """
    merged = dict(left)
    for key, value in right.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(merged[key], dict) and isinstance(value, dict):
            merged[key] = merge_trees(merged[key], value)
        else:
            raise ValueError(f"both trees hold {key!r}")
    return merged
