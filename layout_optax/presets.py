"""Path patterns with layouts for the leaf names of each framework.

A preset gives the layout of one layer, and `layout_optax.stacks` finds the axes that hold layers. `DEFAULT`
tries all groups, the more specific patterns first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from layout_optax.layout import ParamLayout

KERNEL = ParamLayout("matrix", (-1,), (-2,))
WEIGHT = ParamLayout("matrix", (-2,), (-1,))
VECTOR = ParamLayout("vector", (), (-1,))
SCALAR = ParamLayout("vector", (), ())
EMBEDDING = ParamLayout("embedding", (-2,), (-1,))
HEAD_KERNEL = ParamLayout("head", (-1,), (-2,))
HEAD_WEIGHT = ParamLayout("head", (-2,), (-1,))

_HEADS_OUT = ParamLayout("matrix", (-2, -1), (-3,))  # (features, heads, head_dim)
_HEADS_IN = ParamLayout("matrix", (-1,), (-3, -2))  # (heads, head_dim, features)
_HEADS_FIRST = ParamLayout("matrix", (-3, -1), (-2,))  # (heads, features, head_dim)
_VECTORS = {0: SCALAR, 1: VECTOR, 2: VECTOR}

Grade: TypeAlias = Literal["name", "general", "shape"]
ByShape: TypeAlias = Callable[[tuple[int, ...]], ParamLayout]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Layouts of the leaves whose path matches, by their number of axes without layer stacks.

    Attributes:
      name: the text that `describe` prints.
      pattern: a regular expression searched in the path.
      layouts: for each number of axes a layout, or a function from the leaf's shape to one.
      unless: a pattern of paths that are left to later presets.
      keyless: whether the preset is for arrays in a node that does not name its children, as in Haliax.
      guess: the uncertainty about the layout, for a warning; empty if the names are unambiguous.
      grade: what decides: ``"name"``, the general name of a matrix (``"general"``), or ``"shape"`` alone.
    """

    name: str
    pattern: re.Pattern[str]
    layouts: Mapping[int, ParamLayout | ByShape]
    unless: re.Pattern[str] | None = None
    keyless: bool = False
    guess: str = ""
    grade: Grade = "name"

    def find(self, path: str, shape: tuple[int, ...], keyless: bool) -> ParamLayout | None:
        """The layout for this path and the shape of one layer, or None."""
        if self.keyless and not keyless:
            return None
        found = self.layouts.get(len(shape))
        if found is None or not self.pattern.search(path):
            return None
        if self.unless is not None and self.unless.search(path):
            return None
        return found if isinstance(found, ParamLayout) else found(shape)


def _preset(
    name: str,
    pattern: str,
    layouts: Mapping[int, ParamLayout | ByShape],
    unless: str | None = None,
    *,
    keyless: bool = False,
    guess: str = "",
    grade: Grade = "name",
) -> Preset:
    other = None if unless is None else re.compile(unless)
    return Preset(name, re.compile(pattern), layouts, other, keyless, guess, grade)


def _longer_axis_out(shape: tuple[int, ...]) -> ParamLayout:
    """The layout of a gate whose axes come in either order: the longer axis is the hidden one, the output."""
    return WEIGHT if shape[-2] > shape[-1] else KERNEL


_ATTENTION = r"(^|/)\w*(att|Att)\w*/(.*/)?"
_EXPERTS = r"(?i)(^|/)(\w*experts?\w*|\w*moe\w*)/"
_MLP_OR_EXPERTS = (  # but not layers named after their experts: moe_layers/self_attention
    r"(?i)(^|/)(mlp|ffn|feed_forward|\w*mlp|\w*moe\w*|experts?)(_\d+)?(/(?!(.*/)?\w*att\w*/)|$)"
)
EXPERTS = re.compile(_MLP_OR_EXPERTS)
"""Paths of multilayer perceptrons and experts, whose third axis counts experts."""
_HEAD = r"(?i)((^|/)(lm_head|logits_dense|unembed\w*|output_head|head)|^(params/|model/)*output)"

HALIAX = (
    _preset(
        "Haliax bias or norm of heads",
        r"(^|/)([qkv]_proj/bias|[qk]_norm/weight)$",
        {2: ParamLayout("vector", (), (-2, -1)), 3: ParamLayout("vector", (), (-3, -2, -1))},
        keyless=True,
    ),
    _preset(
        "Haliax bias (qkv, heads, head_dim)",
        r"(^|/)c_attn/bias$",
        {3: ParamLayout("vector", (), (-2, -1))},
        keyless=True,
    ),
    _preset(
        "Haliax weight (heads, head_dim, features)",
        r"(^|/)[qkv]_proj/weight$",
        {3: ParamLayout("matrix", (0, 1), (2,)), 4: ParamLayout("matrix", (0, 1, 2), (3,))},
        keyless=True,
    ),
    _preset(
        "Haliax weight (features, heads, head_dim)",
        r"(^|/)(o_proj|out_proj)/weight$",
        {3: ParamLayout("matrix", (0,), (1, 2))},
        keyless=True,
    ),
    _preset(
        "Haliax weight (features, qkv, heads, head_dim)",
        r"(^|/)c_attn/weight$",
        {4: ParamLayout("matrix", (2, 3), (0,))},
        keyless=True,
    ),
    _preset(
        "Haliax weight (in, out)",
        r"(^|/)(c_attn|c_fc|c_proj)/weight$",
        {2: KERNEL, 3: _HEADS_IN},
        keyless=True,
    ),
    _preset(
        "Haliax experts (experts, in, out)",
        _EXPERTS + r"(.*/)?weight$",
        {3: KERNEL},
        keyless=True,
    ),
)
"""Haliax as in Levanter: `Linear` puts the output first, `MoELinear` and GPT-2 the input."""

QWIX = (
    _preset("LoRA factor (..., rank)", r"(^|/)\w*lora_a$", {2: KERNEL, 3: _HEADS_IN}),
    _preset(
        "LoRA factor (rank, ...)",
        r"(^|/)\w*lora_b$",
        {
            2: KERNEL,
            3: ParamLayout("matrix", (1, 2), (0,)),
            4: ParamLayout("matrix", (1, 2, 3), (0,)),
        },
    ),
)
"""Qwix's LoRA factors as Tunix trains them: ``w_lora_a``, ``kernel_lora_b``."""

TUNIX = (
    _preset(
        "embedding of every layer (vocabulary, layers, features)",
        r"(^|/)per_layer_input_embedding$",
        {3: ParamLayout("embedding", (0,), (1, 2))},
    ),
    _preset(
        "projection to every layer (features, layers, features)",
        r"(^|/)per_layer_model_projection/w$",
        {3: _HEADS_OUT},
    ),
    _preset("Einsum (heads, features, head_dim)", r"(^|/)[qkv]_einsum(/w)?$", {3: _HEADS_FIRST}),
    _preset(
        "Einsum (k and v, heads, features, head_dim)",
        r"(^|/)q?kv_einsum(/w)?$",
        {4: _HEADS_FIRST},
    ),
    _preset("Einsum (heads, head_dim, features)", r"(^|/)attn_vec_einsum(/w)?$", {3: _HEADS_IN}),
    _preset(
        "gate and up of experts (experts, 2, hidden, features)",
        r"(^|/)moe/gating_einsum(/w)?$",
        {4: WEIGHT},
    ),
    _preset(
        "gate and up, the hidden axis is the longer",
        r"(^|/)gating_einsum(/w)?$",
        {3: _longer_axis_out},
    ),
    _preset("experts (experts, in, out)", r"(^|/)moe/linear$", {3: KERNEL}),
    _preset("experts (experts, in, out)", r"(^|/)mlp/(gate|up|down)_proj$", {3: KERNEL}),
)
"""Tunix and Google DeepMind's Gemma: einsums with heads first, experts as bare parameters."""

MAXTEXT = (
    _preset(
        "state space, convolution or gate of one output, entry by entry",
        r"(^|/)(conv1d|shared_expert_gate)/(kernel|weight)$",
        {2: ParamLayout("vector", (), (0, 1)), 3: ParamLayout("vector", (), (0, 1, 2))},
    ),
    _preset(
        "vector by name",
        r"(^|/)(\w+_bias|A_log|dt_bias|\w*sinks|\w+_scal(e|ar)(_\d+)?|\w+_beta|hc_base)$",
        _VECTORS,
    ),
    _preset("groups (groups, in, out)", r"(^|/)o_a_proj/kernel$", {3: KERNEL}),
    _preset(
        "experts (experts, in, out)",
        r"(?i)(^|/)(\w*moe\w*|GptOssMlp|routed_experts)/(.*/)?(wi\w*|wo|gate_up_proj|down_proj)$",
        {3: KERNEL},
    ),
    _preset(
        "DenseGeneral (features, heads, head_dim)",
        _ATTENTION + r"(wq|wq_b|wkv|wkv_b|qkv_proj)/kernel$",
        {3: _HEADS_OUT},
    ),
    _preset(
        "attention bias (qkv, heads, head_dim)",
        r"(^|/)qkv_proj/bias$",
        {3: ParamLayout("vector", (), (-2, -1))},
    ),
    _preset(
        "DenseGeneral (features, qkv, heads, head_dim)",
        _ATTENTION + r"qkv_proj/kernel$",
        {4: ParamLayout("matrix", (2, 3), (0,))},
    ),
)
"""MaxText's own names, scanned or not; its other names are Flax's."""

HUGGING_FACE = (
    _preset(
        "Llama 4's experts (experts, in, out)",
        r"(^|/)feed_forward/experts/(gate_up|down)_proj$",
        {3: KERNEL},
    ),
    _preset(
        "experts (experts, out, in)",
        r"(^|/)experts/(gate_up|down)_proj$",
        {3: WEIGHT},
        guess="GPT-OSS has its experts as (experts, in, out), under the same names",
    ),
)
"""Hugging Face's experts, which share one parameter."""

NAMES = (
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
    _preset(  # EasyDeL's RMSNorm
        "vector by name", r"(?i)(^|/)([^/]*norm[^/]*|ln_?\d*|ln_\w+)/kernel$", {1: VECTOR}
    ),
    _preset("head weight (vocabulary, features)", _HEAD + r"/weight$", {2: HEAD_WEIGHT}),
    _preset("head kernel (features, vocabulary)", _HEAD + r"(/kernel|/w)?$", {2: HEAD_KERNEL}),
    _preset(
        "embedding (vocabulary, features)",
        r"(?i)(^|/)([^/]*embed[^/]*|wte|wpe)(/\w+)?$",
        {2: EMBEDDING},
    ),
)
"""Names that all frameworks share: biases, norms, heads, embeddings."""

FLAX = (
    _preset(
        "experts (..., in, out)",
        _EXPERTS,
        {2: KERNEL, 3: KERNEL},
        unless=r"(?i)(^|/)(weight$|\w*att\w*/)",
    ),
    _preset(
        "DenseGeneral (features, heads, head_dim)",
        r"(^|/)(query|key|value|[qkv]_proj|[qkv]|att\w*/(.*/)?w[qkv])(/kernel|/w)?$",
        {3: _HEADS_OUT},
        unless=_MLP_OR_EXPERTS,
    ),
    _preset(
        "DenseGeneral (heads, head_dim, features)",
        r"(^|/)(out|o_proj|out_proj|o|att\w*/(.*/)?(wo|output))(/kernel|/w)?$",
        {3: _HEADS_IN},
        unless=_MLP_OR_EXPERTS,
    ),
    _preset("kernel (in, out)", r"(^|/)(kernel|w)$", {2: KERNEL}, grade="general"),
)
"""Flax NNX and Linen, EasyDeL, MaxText: a kernel is (in, out); attention uses DenseGeneral."""

WEIGHTS = (
    _preset("experts (..., out, in)", _EXPERTS + r"(.*/)?weight$", {2: WEIGHT, 3: WEIGHT}),
    _preset("weight (out, in)", r"(^|/)weight$", {2: WEIGHT}, grade="general"),
    _preset("vector", r"(^|/)weight$", {0: SCALAR, 1: VECTOR}),
)
"""Hugging Face, Equinox and Haliax: a weight is (out, in)."""

GENERAL = (
    _preset("vector", r"(?<!kernel)(?<!weight)$", {0: SCALAR, 1: VECTOR}),
    _preset("matrix (in, out)", r"(?<!kernel)(?<!weight)$", {2: KERNEL}, grade="shape"),
)
"""Leaves whose names say nothing."""

DEFAULT = (*HALIAX, *QWIX, *TUNIX, *MAXTEXT, *HUGGING_FACE, *NAMES, *FLAX, *WEIGHTS, *GENERAL)
"""All presets; the first match wins."""
