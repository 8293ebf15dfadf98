"""Matrix products at the precision that each needs, chosen at lowering for the platform."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import DotAlgorithmPreset
from jax.sharding import NamedSharding

from layout_optax.axes import compute_dtype
from layout_optax.hyperparameters import float_dtype


class Narrow(NamedTuple):
    """A dtype below float32 for the operands of some products; sums stay float32.

    Attributes:
      dtype: dtype of the operands.
      everywhere: whether to round on a CPU too, where it saves nothing, or on accelerators only.
    """

    dtype: Any
    everywhere: bool


def narrow_operands(name: str, option: Any, dtype: Any) -> Narrow | None:
    """Chooses the rounding for a leaf's dtype: as the option says, by default bfloat16 for bfloat16.

    Args:
      name: the option's name, for messages.
      option: a float dtype or its name; None for the default.
      dtype: the gradient's dtype.

    Returns:
      The dtype to round to, or None for no rounding.

    Raises:
      ValueError: if the option is not a float dtype.

    Example:
      >>> narrow_operands("product_dtype", None, jnp.bfloat16)
      Narrow(dtype=dtype(bfloat16), everywhere=False)
      >>> narrow_operands("product_dtype", "float32", jnp.bfloat16) is None
      True
    """
    if option is None:
        bfloat16 = jnp.dtype(jnp.bfloat16)
        return Narrow(bfloat16, False) if jnp.dtype(dtype) == bfloat16 else None
    wanted = float_dtype(name, option)
    return Narrow(wanted, True) if wanted.itemsize < compute_dtype(dtype).itemsize else None


def large_product(
    equation: str,
    a: jax.Array,
    b: jax.Array,
    narrow: Narrow | None = None,
    out_sharding: NamedSharding | None = None,
    *,
    narrow_result: bool = False,
) -> jax.Array:
    """An einsum with a parameter as operand or result, at default precision; the result is as wide as ``a``.

    ``narrow_result`` writes the result in the narrow dtype, for results as large as a parameter.
    """

    def as_they_are(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(equation, a, b, out_sharding=out_sharding)

    def rounded(a: jax.Array, b: jax.Array) -> jax.Array:
        assert narrow is not None
        return jnp.einsum(
            equation,
            a.astype(narrow.dtype),
            b.astype(narrow.dtype),
            preferred_element_type=narrow.dtype if narrow_result else a.dtype,
            out_sharding=out_sharding,
        ).astype(a.dtype)

    if narrow is None:
        return as_they_are(a, b)
    if narrow.everywhere:
        return rounded(a, b)
    return jax.lax.platform_dependent(a, b, cpu=as_they_are, default=rounded)


def exact_product(
    equation: str, a: jax.Array, b: jax.Array, out_sharding: NamedSharding | None = None
) -> jax.Array:
    """An einsum with nearly all of float32's digits.

    On CUDA it uses three passes of TF32, which keep 22 bits of each operand, instead of float32 outside the
    tensor cores. Fewer digits do harm (docs/results/precision.md): one pass of TF32 makes momentum 16 % too
    long, and three passes of bfloat16 make it 0.6 % too short, so a TPU uses all six.
    """

    def at(precision: Any):
        return lambda a, b: jnp.einsum(
            equation, a, b, precision=precision, out_sharding=out_sharding
        )

    if a.dtype != jnp.float32:
        return at("highest")(a, b)
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=at("highest"),
        cuda=at(DotAlgorithmPreset.TF32_TF32_F32_X3),
        default=at("highest"),
    )
