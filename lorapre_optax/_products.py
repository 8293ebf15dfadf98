"""Matrix products at the precision that each needs, chosen when a program is lowered for its platform."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import DotAlgorithmPreset
from jax.sharding import NamedSharding

from layout_optax.axes import compute_dtype
from layout_optax.hyperparameters import float_dtype


class Narrow(NamedTuple):
    """A dtype below float32 that the operands of some products are rounded to; sums stay float32.

    Attributes:
      dtype: of the operands.
      everywhere: on a CPU too, where a narrow product saves nothing; else on accelerators alone.
    """

    dtype: Any
    everywhere: bool


def narrow_operands(name: str, option: Any, dtype: Any) -> Narrow | None:
    """How to round for a leaf of some dtype: as the option says, by default bfloat16 for bfloat16.

    Args:
      name: of the option, for messages.
      option: a float dtype or its name; None for the default.
      dtype: of the gradient.

    Returns:
      None where operands stay as they are.

    Raises:
      ValueError: if the option is no float dtype.

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
    """An einsum with a parameter at one end, at the default precision; the result is as wide as ``a``.

    ``narrow_result`` writes it in the narrow dtype: for one that is as large as a parameter.
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

    On CUDA three passes of TF32, which keep 22 bits of each operand, in place of float32 outside the tensor
    cores. Fewer digits do harm (docs/results/precision.md): one pass of TF32 makes momentum 16 % too long,
    three passes of bfloat16 make it 0.6 % too short, so a TPU takes all of its six.
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
