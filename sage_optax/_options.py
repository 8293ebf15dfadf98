"""Checks and defaults for the options of SAGE and the hybrids."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

STATIC_ARGS: tuple[str, ...] = ("layout", "mu_dtype", "weight_decay_mask")
"""Arguments that `optax.inject_hyperparams` must not turn into numbers or schedules. optax accepts only names
that the factory has: `sinkgd` has no momentum, so leave out ``"mu_dtype"`` there. Inside `optax.MultiSteps` add
``"iterations"`` where the factory has it, or give it as a float: an injected int is weakly typed at init and
no longer after a step, and JAX compiles the step twice."""


def check_options(damper: Any, eps_mode: Any) -> None:
    """Refuses unknown option values.

    Raises:
      ValueError: with the option and its values.
    """
    if damper not in ("both", "ema", None):
        raise ValueError(f"sage: damper must be 'both', 'ema' or None, got {damper!r}.")
    if eps_mode not in ("absolute", "relative"):
        raise ValueError(f"sage: eps_mode must be 'absolute' or 'relative', got {eps_mode!r}.")


def momentum_dtype(mu_dtype: Any) -> np.dtype | None:
    """Returns the momentum's dtype; None for the parameter's dtype.

    Raises:
      ValueError: if it is neither a float dtype nor int8.
    """
    if mu_dtype is None:
        return None
    if isinstance(mu_dtype, jax.Array):
        raise ValueError(
            "sage: mu_dtype arrived as an array. Under optax.inject_hyperparams a class such as "
            "jnp.bfloat16 is taken for a schedule: pass static_args=STATIC_ARGS, or its name."
        )
    dtype = jax.dtypes.canonicalize_dtype(mu_dtype)
    if not (jnp.issubdtype(dtype, jnp.floating) or dtype == jnp.int8):
        raise ValueError(f"sage: mu_dtype must be None, a float dtype or int8, got {mu_dtype!r}.")
    return dtype
