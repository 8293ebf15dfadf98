"""From a leaf's path and shape to its layout: the user's rules, then presets for the common model styles.

Presets know Flax NNX and Linen (``kernel`` is (in, out)), Hugging Face and Equinox (``weight`` is
(out, in)) and MaxText (scanned layers on axis 1). Inference looks at one leaf at a time, so it gives the
same answer on the whole tree and on the masked trees inside `optax.partition`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
import optax

from layout_optax.layout import (
    LayoutLike,
    ParamLayout,
    PyTree,
    Role,
    as_layout,
    is_empty,
    path_string,
)

Rule: TypeAlias = tuple[str, "ParamLayout | Role | None"]
"""A regular expression searched in the leaf's path, and its layout, its role, or None (not ours)."""

KERNEL = ParamLayout("matrix", (-1,), (-2,))
WEIGHT = ParamLayout("matrix", (-2,), (-1,))
VECTOR = ParamLayout("vector", (), (-1,))
SCALAR = ParamLayout("vector", (), ())
EMBEDDING = ParamLayout("embedding", (-2,), (-1,))
HEAD_KERNEL = ParamLayout("head", (-1,), (-2,))
HEAD_WEIGHT = ParamLayout("head", (-2,), (-1,))

_BY_ROLE: Mapping[str, ParamLayout] = {
    "embedding": EMBEDDING,
    "head": HEAD_KERNEL,
    "matrix": KERNEL,
    "vector": VECTOR,
}


@dataclasses.dataclass(frozen=True)
class Inferred:
    """A leaf's layout (None: not ours) and, for `describe`, why it was chosen."""

    layout: ParamLayout | None
    assumed: str


@dataclasses.dataclass(frozen=True)
class _Preset:
    """Layouts of the leaves whose path matches, by their number of axes without the layer stack."""

    name: str
    pattern: re.Pattern[str]
    layouts: Mapping[int, ParamLayout]
    unless: re.Pattern[str] | None = None

    def find(self, path: str, ndim: int) -> ParamLayout | None:
        """The layout for this path and number of axes, or None."""
        if self.unless is not None and self.unless.search(path):
            return None
        return self.layouts.get(ndim) if self.pattern.search(path) else None


def _preset(name: str, pattern: str, layouts: Mapping[int, ParamLayout], unless: str | None = None):
    return _Preset(
        name, re.compile(pattern), layouts, None if unless is None else re.compile(unless)
    )


_VECTORS = {0: SCALAR, 1: VECTOR, 2: VECTOR}
_MLP_OR_EXPERTS = r"(?i)(^|/)(mlp|ffn|feed_forward|\w*moe\w*|experts?)(_\d+)?(/|$)"
_MAXTEXT = r"(^|/)decoder/(\w+_)?layers/(.*/)?"

# MaxText keeps the scanned layers on axis 1, so its rules count all axes.
_MAXTEXT_PRESETS = (
    _preset(
        "MaxText experts, layers on axis 1", _MAXTEXT + r"MoeBlock_\d+/(wi\w*|wo)$", {4: KERNEL}
    ),
    _preset(
        "MaxText, layers on axis 1",
        _MAXTEXT + r"\w*attention\w*/(query|key|value)/kernel$",
        {4: ParamLayout("matrix", (2, 3), (0,))},
    ),
    _preset(
        "MaxText, layers on axis 1",
        _MAXTEXT + r"\w*attention\w*/out/kernel$",
        {4: ParamLayout("matrix", (3,), (0, 2))},
    ),
    _preset(
        "MaxText, layers on axis 1",
        _MAXTEXT + r"(\w*mlp\w*/(wi\w*|wo)|MoeBlock_\d+/gate)/kernel$",
        {3: ParamLayout("matrix", (2,), (0,))},
    ),
    _preset(
        "MaxText, layers on axis 1",
        _MAXTEXT + r"\w*attention\w*/(query|key|value)/bias$",
        {3: ParamLayout("vector", (), (0, 2))},
    ),
    _preset(
        "MaxText, layers on axis 1",
        _MAXTEXT + r"((pre|post)_self_attention_\w*norm\w*|\w*norm\w*)/(scale|bias)$",
        {2: ParamLayout("vector", (), (0,))},
    ),
    _preset(
        "MaxText, layers on axis 1",
        _MAXTEXT + r"(out|wi\w*|wo)/bias$",
        {2: ParamLayout("vector", (), (0,))},
    ),
)

# Everything else; the first match wins.
_PRESETS = (
    _preset(
        "attention bias (heads, head_dim)",
        r"(^|/)(query|key|value|[qkv]_proj|[qkv])/bias$",
        {1: VECTOR, 2: ParamLayout("vector", (), (-2, -1))},
    ),
    _preset(
        "vector by name",
        r"(?i)(^|/)([^/]*norm[^/]*|ln_?\d*|ln_\w+|scale|bias|gamma|beta)(/(scale|bias|weight|gamma|beta))?$",
        _VECTORS,
    ),
    _preset(
        "head weight (vocabulary, features)",
        r"(?i)((^|/)(lm_head|logits_dense|unembed\w*|output_head|head)|^(params/|model/)*output)/weight$",
        {2: HEAD_WEIGHT},
    ),
    _preset(
        "head kernel (features, vocabulary)",
        r"(?i)((^|/)(lm_head|logits_dense|unembed\w*|output_head|head)|^(params/|model/)*output)(/kernel|/w)?$",
        {2: HEAD_KERNEL},
    ),
    _preset(
        "embedding (vocabulary, features)",
        r"(?i)(^|/)([^/]*embed[^/]*|wte|wpe)(/\w+)?$",
        {2: EMBEDDING},
    ),
    _preset(
        "experts (..., out, in)",
        r"(?i)(^|/)(\w*experts?\w*|\w*moe\w*)/(.*/)?weight$",
        {2: WEIGHT, 3: WEIGHT},
    ),
    _preset(
        "experts (..., in, out)",
        r"(?i)(^|/)(\w*experts?\w*|\w*moe\w*)/",
        {2: KERNEL, 3: KERNEL},
    ),
    _preset("weight (out, in)", r"(^|/)weight$", {2: WEIGHT}),
    _preset(
        "DenseGeneral (features, heads, head_dim)",
        r"(^|/)(query|key|value|[qkv]_proj|[qkv]|att\w*/(.*/)?w[qkv])(/kernel|/w)?$",
        {3: ParamLayout("matrix", (-2, -1), (-3,))},
        unless=_MLP_OR_EXPERTS,
    ),
    _preset(
        "DenseGeneral (heads, head_dim, features)",
        r"(^|/)(out|o_proj|out_proj|o|att\w*/(.*/)?(wo|output))(/kernel|/w)?$",
        {3: ParamLayout("matrix", (-1,), (-3, -2))},
        unless=_MLP_OR_EXPERTS,
    ),
    _preset("kernel (in, out)", r"(^|/)(kernel|w)$", {2: KERNEL}),
    _preset(
        "matrix (in, out), vectors", r"(?<!kernel)(?<!weight)$", {0: SCALAR, 1: VECTOR, 2: KERNEL}
    ),
    _preset("vector", r"(^|/)weight$", {0: SCALAR, 1: VECTOR}),
)

_STACK = re.compile(r"^(\w+_)?(layers|blocks)$")


def stack_axes(path: str) -> int:
    """How many leading axes a layer stack adds: 1 under ``layers`` or ``blocks`` without an index, else 0.

    Example:
      >>> stack_axes("layers/mlp/kernel"), stack_axes("layers/0/mlp/kernel"), stack_axes("layers_0/w")
      (1, 0, 0)
    """
    components = path.split("/")
    for position, component in enumerate(components[:-1]):
        if _STACK.match(component) and not components[position + 1].isdigit():
            return 1
    return 0


def infer_leaf(keys: Sequence[Any], shape: tuple[int, ...], rules: Sequence[Rule] = ()) -> Inferred:
    """The layout of one leaf from its key path and shape.

    Args:
      keys: the leaf's key path, as `jax.tree_util.tree_flatten_with_path` gives it.
      shape: the leaf's shape.
      rules: the user's rules; the first whose pattern is found in the path decides.

    Raises:
      ValueError: if nothing explains the leaf; the message gives its path and the rule to add.
    """
    named = any(_is_name(key) for key in keys)
    return _infer(path_string(keys), named, tuple(shape), tuple(rules))


@functools.lru_cache(
    maxsize=65536
)  # a hybrid asks at every leaf for its role, its rate and its direction
def _infer(path: str, named: bool, shape: tuple[int, ...], rules: tuple[Rule, ...]) -> Inferred:
    """`infer_leaf` of a path, which tries the rules once for a leaf of a model."""
    ndim = len(shape)
    for pattern, value in rules:
        if re.search(pattern, path):
            return Inferred(_read_rule(pattern, value, path, ndim), f"rule {pattern!r}")
    if not named:
        layouts = {0: SCALAR, 1: VECTOR}
        return Inferred(layouts.get(ndim, KERNEL).resolve(ndim), "unnamed: last two axes (in, out)")
    for preset in _MAXTEXT_PRESETS:
        if (layout := preset.find(path, ndim)) is not None:
            return Inferred(layout.resolve(ndim), preset.name)
    stacked = min(stack_axes(path), ndim)
    for preset in _PRESETS:
        if (layout := preset.find(path, ndim - stacked)) is not None:
            suffix = ", layers on axis 0" if stacked else ""
            return Inferred(layout.resolve(ndim, path), preset.name + suffix)
    raise ValueError(_unexplained(path, shape, stacked))


def infer_layout(params: PyTree, rules: Sequence[Rule] = ()) -> PyTree:
    """Infers the `ParamLayout` of every parameter from its path and shape.

    To give a transformation rules of your own, pass
    ``layout=functools.partial(infer_layout, rules=[...])``.

    Two readings are assumptions that `describe` prints: a leaf under a ``layers`` or ``blocks`` component
    that carries no index is a stack with one more leading axis, and MaxText's ``decoder/layers`` keeps
    that axis second. A gate and an up projection fused in one axis cannot be expressed: they are one
    matrix here.

    Args:
      params: a pytree of arrays or `jax.ShapeDtypeStruct`.
      rules: ``(pattern, layout)`` pairs, tried before the presets, first match wins. The pattern is a
        regular expression searched in the path (``layers/0/mlp/up/kernel``); the layout is a
        `ParamLayout` (negative axes leave leading axes to the batch), a role, or None: not ours,
        which the hybrids give to AdamW.

    Returns:
      A tree like ``params`` with a `ParamLayout` at each leaf, ``optax.MaskedNode()`` where not ours.

    Raises:
      ValueError: for a named leaf that no rule explains, with its path and the rule to add.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = infer_layout({"lm_head": {"kernel": jnp.ones((8, 100))}})
      >>> tree["lm_head"]["kernel"]
      ParamLayout(role='head', row_axes=(1,), column_axes=(0,))
    """

    def infer(keys, leaf):
        if is_empty(leaf):
            return leaf
        return infer_leaf(keys, np.shape(leaf), rules).layout or optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(infer, params, is_leaf=is_empty)


def _is_name(key: Any) -> bool:
    """Whether a key of a path is a word, as against a position in a list."""
    name = path_string((key,))
    return bool(name) and not name.lstrip("-").isdigit()


def _read_rule(pattern: str, value: Any, path: str, ndim: int) -> ParamLayout | None:
    if isinstance(value, str):
        if value not in _BY_ROLE:
            raise ValueError(
                f"rule {pattern!r}: unknown role {value!r}; use one of {tuple(_BY_ROLE)}, a "
                "ParamLayout, or None."
            )
        value = SCALAR if value == "vector" and ndim == 0 else _BY_ROLE[value]
    layout = as_layout(value, path)
    return None if layout is None else layout.resolve(ndim, path)


def _unexplained(path: str, shape: tuple[int, ...], stacked: int) -> str:
    assumed = (
        " (read as stacked on axis 0: its 'layers' or 'blocks' has no index)" if stacked else ""
    )
    return (
        f"layout: no rule explains '{path}' of shape {shape}{assumed}. Say which axes are its rows "
        "(outputs) and columns (inputs); the others are batch axes: "
        f"layout=functools.partial(infer_layout, rules=[(r'{re.escape(path)}$', "
        "ParamLayout('matrix', row_axes=(-1,), column_axes=(-2,)))]), or None instead of the layout to "
        "leave it to AdamW."
    )


__all__ = ["Inferred", "LayoutLike", "Rule", "infer_layout", "infer_leaf", "stack_axes"]
