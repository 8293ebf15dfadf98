"""Low-rank adapters of a frozen Llama: LoRA, rsLoRA and DoRA, and merging them into its kernels.

A projection W (in, out) becomes W + s A B with A (in, r), B (r, out) and s = alpha / r (LoRA, arXiv:2106.09685)
or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732). DoRA (arXiv:2402.09353) also trains the length m of each output's
column: m (W + s A B) / ||W + s A B||, where the norm counts as a constant in the gradient (its section 4.3).
A starts at random, B at zero and m at ||W||, so that training starts from the unchanged model.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.llama.model.blocks import Block, Constrain, flat_dot_general, unconstrained
from examples.llama.model.config import LlamaConfig
from examples.llama.model.llama import Llama, Params

AdapterKind = Literal["lora", "rslora", "dora"]
TARGETS: tuple[str, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter's configuration; hashable, so that it can be a static argument.

    Attributes:
        kind: LoRA, rsLoRA or DoRA.
        rank: r.
        alpha: Numerator of the scale s.
        targets: Projections with an adapter, some of `TARGETS`.

    Raises:
        ValueError: The rank or alpha is not positive, or a target is unknown.

    >>> AdapterSpec("lora", rank=8, alpha=16.0).scale, AdapterSpec("rslora", rank=4, alpha=16.0).scale
    (2.0, 8.0)
    """

    kind: AdapterKind = "lora"
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "rslora", "dora"):
            raise ValueError(f"unknown adapter {self.kind!r}; they are lora, rslora, dora")
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(
                f"an adapter's rank and alpha must be positive, got {self.rank} and {self.alpha}"
            )
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"adapter targets {self.targets}: choose among {', '.join(TARGETS)}")

    @property
    def scale(self) -> float:
        """s, the factor on A B."""
        return self.alpha / (self.rank**0.5 if self.kind == "rslora" else self.rank)


def check_rank(config: LlamaConfig, spec: AdapterSpec) -> None:
    """Refuses a rank above the sizes of the targets, before anything is allocated.

    Raises:
        ValueError: The rank exceeds the smaller side of a target; the message names it.
    """
    for name, (width, other) in target_sides(config, spec).items():
        if spec.rank > min(width, other):
            raise ValueError(
                f"--rank {spec.rank} is more than {name} has: its kernel is {width} by {other}, so the rank "
                f"must be at most {min(width, other)}"
            )


def adapter_notes(config: LlamaConfig, spec: AdapterSpec) -> list[str]:
    """Warns if the adapter has as many numbers as the kernel on some targets.

    >>> from examples.llama.model.config import preset
    >>> adapter_notes(preset("demo"), AdapterSpec(rank=8))
    []
    """
    sides = target_sides(config, spec)
    useless = [(p, q) for p, q in sides.values() if spec.rank * (p + q) >= p * q]
    if not useless:
        return []
    p, q = min(useless, key=min)
    most = (p * q - 1) // (p + q)
    return [
        f"Note: rank {spec.rank} saves nothing on {len(useless)} of {len(sides)} kinds of matrices; the "
        f"adapters hold as many numbers as the kernels. On {p} x {q} a rank saves up to {most}."
    ]


def target_sides(config: LlamaConfig, spec: AdapterSpec) -> dict[str, tuple[int, int]]:
    """The sides of the kernels that get an adapter, the model's width first."""
    width, heads = config.hidden_size, config.num_heads * config.head_dim
    kv, inner = config.num_kv_heads * config.head_dim, config.intermediate_size
    sides = {"q_proj": heads, "o_proj": heads, "k_proj": kv, "v_proj": kv}
    return {name: (width, sides.get(name, inner)) for name in spec.targets}


class AdaptedLinear(nnx.Module):
    """A projection with an adapter. Its kernel keeps its path and gets `lora` and `magnitude` as siblings.

    Args:
        base: The projection.
        spec: The adapter.
        rngs: Random numbers for A.
    """

    def __init__(self, base: nnx.Linear, spec: AdapterSpec, rngs: nnx.Rngs) -> None:
        self.kernel = base.kernel
        self.dtype = base.dtype
        self.scale = spec.scale
        self.lora = nnx.LoRA(
            base.in_features, spec.rank, base.out_features, dtype=base.dtype, rngs=rngs
        )
        if spec.kind == "dora":
            self.magnitude = nnx.Param(jnp.linalg.norm(base.kernel[...], axis=0))
        self.dora = spec.kind == "dora"

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (..., in) to (..., out) without forming A B or its sum with the kernel."""
        kernel = self.kernel[...].astype(self.dtype)
        y = flat_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        y = y + self.scale * self.lora(x)
        if self.dora:
            lengths = column_norms(
                self.kernel[...], self.lora.lora_a[...], self.lora.lora_b[...], self.scale
            )
            y = y * (self.magnitude[...] / jax.lax.stop_gradient(lengths)).astype(y.dtype)
        return y


def column_norms(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """||W + s A B|| of each column, float32 (out,), without forming A B.

    It is the square root of ||W||^2 + 2 s diag(W^T A B) + s^2 diag(B^T A^T A B).
    """
    kernel, a, b = (x.astype(jnp.float32) for x in (kernel, a, b))
    highest = jax.lax.Precision.HIGHEST
    cross = jnp.sum(jnp.matmul(a.T, kernel, precision=highest) * b, axis=0)
    gram = jnp.matmul(a.T, a, precision=highest)
    own = jnp.sum(b * jnp.matmul(gram, b, precision=highest), axis=0)
    squared = jnp.sum(kernel * kernel, axis=0) + 2 * scale * cross + scale**2 * own
    return jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))


def adapted_structure(
    config: LlamaConfig,
    spec: AdapterSpec,
    *,
    scan_layers: bool = True,
    remat: bool = False,
    dtype: DTypeLike = jnp.float32,
    constrain: Constrain = unconstrained,
) -> nnx.GraphDef[Llama]:
    """`examples.llama.model.llama.structure` with adapters, for the parameters of `merge_trees`."""

    def make() -> Llama:
        model = Llama(
            config, scan_layers=scan_layers, remat=remat, dtype=dtype, constrain=constrain
        )
        block = partial(_adapted_block, config, spec, dtype, constrain)
        if scan_layers:
            model.layers = nnx.vmap(block)(jax.random.split(jax.random.key(0), config.num_layers))
        else:
            model.layers = nnx.List([block(jax.random.key(0)) for _ in range(config.num_layers)])
        return model

    return nnx.split(nnx.eval_shape(make))[0]


def init_adapters(params: Params, spec: AdapterSpec, seed: int | jax.Array) -> Params:
    """The adapters' initial parameters for a frozen model.

    Args:
        params: The model's pure dict, of either form.
        spec: The adapter.
        seed: Seed of A.

    Returns:
        The nested dict of `lora/lora_a`, `lora/lora_b` and with DoRA `magnitude` under each target's
        path, float32. Stacked and single layers give the same values.

    >>> from examples.llama.model.llama import create
    >>> from examples.llama.model.config import preset
    >>> params = create(preset("demo", vocab_size=32, hidden_size=16, num_layers=2))[1]
    >>> adapters = init_adapters(params, AdapterSpec(rank=4), 0)
    >>> adapters["layers"]["mlp"]["down_proj"]["lora"]["lora_b"].shape
    (2, 4, 16)
    """
    key = jax.random.key(seed)
    adapters: dict[Any, Any] = {}
    for path, kernel in target_kernels(params, spec).items():
        layer = re.match(r"layers/(\d+)/", path)
        number = TARGETS.index(path.split("/")[-2])
        draw = partial(_init_adapter, spec, jax.random.fold_in(key, number))
        if layer is not None:
            leaves = draw(int(layer[1]), kernel)
        else:
            leaves = jax.vmap(draw)(jnp.arange(kernel.shape[0]), kernel)
        place = adapters
        for name in path.split("/")[:-1]:
            place = place.setdefault(int(name) if name.isdigit() else name, {})
        place.update(leaves)
    return adapters


def merge_adapters(params: Params, adapters: Params, spec: AdapterSpec) -> Params:
    """Parameters of the plain model that computes the same as the adapted one.

    Args:
        params: The frozen model's parameters.
        adapters: From `init_adapters` and training.
        spec: The adapter.

    Returns:
        `params` with each target's kernel replaced; the sums are float32.
    """

    def merged(path: Any, kernel: Any) -> Any:
        names = _names(path)
        if names[-1] != "kernel" or names[-2] not in spec.targets:
            return kernel
        place: Any = adapters
        for name in names[:-1]:
            place = place[name]
        return _merged_kernel(
            kernel,
            place["lora"]["lora_a"],
            place["lora"]["lora_b"],
            place.get("magnitude"),
            spec.scale,
        )

    return jax.tree_util.tree_map_with_path(merged, params)


def target_kernels(params: Params, spec: AdapterSpec) -> dict[str, Any]:
    """The kernels with an adapter, by path."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = {"/".join(map(str, _names(path))): leaf for path, leaf in flat}
    return {p: leaf for p, leaf in paths.items() if p.split("/")[-2] in spec.targets}


@partial(jax.jit, static_argnums=4)
def _merged_kernel(kernel: Any, a: Any, b: Any, magnitude: Any, scale: float) -> jax.Array:
    """W + s A B of one layer or of a stack of them, with columns of the given length."""
    kernel = jnp.asarray(kernel)
    total = kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if magnitude is not None:
        lengths = jnp.linalg.norm(total, axis=-2, keepdims=True)
        total = total * (magnitude[..., None, :] / lengths)
    return total.astype(kernel.dtype)


def _init_adapter(spec: AdapterSpec, key: jax.Array, layer: Any, kernel: Any) -> Params:
    features_in, features_out = kernel.shape
    rngs = nnx.Rngs(jax.random.fold_in(key, layer))
    lora = nnx.LoRA(features_in, spec.rank, features_out, rngs=rngs)
    leaves: Params = {"lora": {"lora_a": lora.lora_a[...], "lora_b": lora.lora_b[...]}}
    if spec.kind == "dora":
        leaves["magnitude"] = jnp.linalg.norm(jnp.asarray(kernel, jnp.float32), axis=0)
    return leaves


def _adapted_block(
    config: LlamaConfig, spec: AdapterSpec, dtype: DTypeLike, constrain: Constrain, key: jax.Array
) -> Block:
    rngs = nnx.Rngs(key)
    block = Block(config, dtype, rngs, constrain)
    for part in (block.self_attn, block.mlp):
        for name in spec.targets:
            if hasattr(part, name):
                setattr(part, name, AdaptedLinear(getattr(part, name), spec, rngs))
    return block


def _names(path: Any) -> list[Any]:
    return [key.key if hasattr(key, "key") else key.idx for key in path]
