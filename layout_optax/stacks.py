"""Finds which axes of a leaf hold layers from its path: the first axes, or axis 1 in MaxText."""

from __future__ import annotations

import dataclasses
import re

_STACK = re.compile(r"^(\w+_)?(layers|blocks)$")

# Leaves under MaxText's decoder, without the path components that are layers.
_MAXTEXT_DECODER = re.compile(r"(^|/)decoder/(?=(\w+_)?(layers|blocks)/)")
_MAXTEXT_LEAF = re.compile(
    r"(^|/)\w*(att|Att)\w*/(.*/)?(query|key|value|out|qkv_proj|w[qkv]|wq_[ab]|wkv|wkv_[ab]|o_[ab]_proj"
    r"|in_proj_\w+|out_proj|conv1d)/(kernel|bias)$"
    r"|(^|/)\w*(att|Att)\w*/(.*/)?(\w*sinks|A_log|dt_bias)$"
    r"|(^|/)\w*(att|Att)\w*/(\w+_compressor|indexer)/(.*/)?(\w+_proj/kernel|position_bias)$"
    r"|(^|/)\w*norm\w*/(scale|bias)$"
    r"|(^|/)(\w*mlp\w*|\w*Mlp\w*|\w*([mM]o[eE]|MoE)\w*|\w*experts?)/(.*/)?(wi\w*|wo|gate|shared_expert_gate)"
    r"(/kernel|/bias|_bias)?$"
    r"|(^|/)(mhc_\w+/\w+|layer_scalar|per_expert_scale|\w+_scale(_\d+)?|per_layer_\w+/kernel)$"
)


@dataclasses.dataclass(frozen=True)
class Stack:
    """Axes that hold layers.

    Attributes:
      axes: the axes, ascending; empty for a leaf of one layer.
      guess: the uncertainty about them, or empty.
    """

    axes: tuple[int, ...] = ()
    guess: str = ""

    @property
    def note(self) -> str:
        """The text that `describe` prints for the stack."""
        if not self.axes:
            return ""
        plural = "axes" if len(self.axes) > 1 else "axis"
        return f", layers on {plural} {','.join(map(str, self.axes))}"


def find_stack(path: str, ndim: int) -> Stack:
    """Finds the axes of a leaf that hold layers.

    Each component ``layers`` or ``blocks`` (``dense_layers``, ``scanned_blocks``) without an index adds one
    axis: in front, or on axis 1 if the names are MaxText's, which may nest stacks.

    Example:
      >>> find_stack("layers/mlp/kernel", 3).axes, find_stack("layers/0/mlp/kernel", 2).axes
      ((0,), ())
      >>> find_stack("decoder/layers/mlp/wi_0/kernel", 3).axes
      (1,)
    """
    depth = _depth(path)
    if not depth or not ndim:
        return Stack()
    maxtext = _MAXTEXT_DECODER.search(path)
    if maxtext is None:
        return Stack((0,))
    if _MAXTEXT_LEAF.search(path[maxtext.end() :]):
        return Stack(tuple(range(1, min(1 + depth, ndim))))
    return Stack((0,), "layers are taken for axis 0; MaxText keeps them on axis 1")


def _depth(path: str) -> int:
    """Counts the components of a path that are stacks without an index."""
    components = path.split("/")
    found = 0
    for position, component in enumerate(components[:-1]):
        rest = components[position + 1 :]
        indexed = rest[0].isdigit() or (_STACK.match(rest[0]) and rest[1:] and rest[1].isdigit())
        found += bool(_STACK.match(component) and not indexed)
    return found


__all__ = ["Stack", "find_stack"]
