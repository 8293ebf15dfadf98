"""Checks of hyperparameters: numbers, schedules, and values changed by `optax.inject_hyperparams`.

Traced values and schedules have no value at construction, so the checks let them pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.core import Tracer

from layout_optax.layout import ANY_LEAF

Number: TypeAlias = float | jax.Array | Callable[[Any], Any]
"""A number, or a schedule: a function from the number of steps taken to a number."""

Choice = TypeVar("Choice")


def at(number: Any, count: Any) -> Any:
    """The value of a number or schedule at a step; None stays None.

    Example:
      >>> at(0.5, 3), at(lambda count: 2 * count, 3), at(None, 3)
      (0.5, 6, None)
    """
    return number(count) if callable(number) else number


def in_dtype(dtype: Any, *numbers: Any) -> tuple[Any, ...]:
    """Converts array hyperparameters to one dtype, so that none widens the result; None stays None.

    Python numbers stay as they are, so 1 - b is computed before rounding. NumPy scalars become Python numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> in_dtype(jnp.float32, 0.5, jnp.bfloat16(0.5), np.float64(0.5), None)
      (0.5, Array(0.5, dtype=float32), 0.5, None)
    """

    def cast(number: Any) -> Any:
        if isinstance(number, jax.Array):
            return number.astype(dtype)
        return number.item() if isinstance(number, (np.generic, np.ndarray)) else number

    return tuple(map(cast, numbers))


def check_number(
    name: str, value: Any, low: float, high: float = float("inf"), *, strictly: bool = False
) -> None:
    """Raises ValueError unless ``low <= value <= high``; None, schedules and tracers pass.

    Args:
      name: the argument's name, for the message.
      value: the value to check.
      low: the smallest allowed value.
      high: the largest allowed value; even infinity requires a finite value.
      strictly: whether ``low`` itself is refused.

    Raises:
      ValueError: for a value outside the range, NaN or infinity.
      TypeError: for a value that is not a number, such as a string.

    Example:
      >>> check_number("eps", -1.0, 0)
      Traceback (most recent call last):
        ...
      ValueError: eps must be at least 0, got -1.0.
    """
    if not _is_concrete(value):
        return
    number = _as_float(name, value)
    inside = low < number <= high if strictly else low <= number <= high
    if not inside or not np.isfinite(number):
        least = f"above {low}" if strictly else f"at least {low}"
        raise ValueError(
            f"{name} must be {least if high == float('inf') else f'in [{low}, {high}]'}, got {value}."
        )


def check_decay(name: str, value: Any) -> None:
    """Raises ValueError unless value is in [0, 1); None, schedules and tracers pass."""
    if _is_concrete(value) and not 0 <= _as_float(name, value) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_factor_decay(name: str, value: Any) -> None:
    """Like `check_decay`, for the decay of factors: warns where float32 rounds sqrt(value) to 1."""
    check_decay(name, value)
    if _is_concrete(value) and np.float32(float(value) ** 0.5) == np.float32(1):
        warnings.warn(
            f"{name}={value} is so near 1 that the rate of the factors, 1 - sqrt({name}), vanishes in "
            "float32: the factors will not learn.",
            stacklevel=3,
        )


def check_rate(name: str, value: Any) -> None:
    """Raises unless a learning rate, or another factor, is a finite number or a schedule.

    Raises:
      ValueError: for NaN and infinity.
      TypeError: for None, a string and any other value that is not a number.

    Example:
      >>> check_rate("learning_rate", "1e-3")
      Traceback (most recent call last):
        ...
      TypeError: learning_rate must be a number or a schedule, got '1e-3'.
    """
    if value is None:
        raise TypeError(f"{name} must be a number or a schedule, got None.")
    if _is_concrete(value) and not np.isfinite(_as_float(name, value)):
        raise ValueError(f"{name} must be finite, got {value}.")


def check_adam(b1: Any, b2: Any, eps: Any, *, prefix: str = "") -> None:
    """Raises unless Adam can use the numbers. ``prefix`` begins the arguments' names in messages.

    Raises:
      ValueError: for decays outside [0, 1) and an eps that is negative or not finite. An array narrower than
        float32 may hold 1, since rounding can produce it.
      TypeError: for an argument that is not a number.
    """
    for name, value in ((f"{prefix}b1", b1), (f"{prefix}b2", b2)):
        # `optax.inject_hyperparams` gives numbers the dtype of the parameters: 0.999 is 1 in bfloat16.
        if isinstance(value, jax.Array) and value.dtype.itemsize < 4:
            check_number(name, value, 0, 1)
        else:
            check_decay(name, value)
    check_number(f"{prefix}eps", eps, 0)


def float_dtype(name: str, dtype: Any) -> Any:
    """Returns the dtype that an option names, as a JAX dtype; None for None.

    Args:
      name: the option's name, for the message.
      dtype: a floating-point dtype or its name, or None.

    Raises:
      ValueError: for a dtype that is not floating-point; also for an array, which `optax.inject_hyperparams`
        makes of a dtype class.

    Example:
      >>> float_dtype("factor_dtype", "bfloat16")
      dtype(bfloat16)
      >>> float_dtype("factor_dtype", "int8")
      Traceback (most recent call last):
        ...
      ValueError: factor_dtype must be None or a float dtype by its name, such as 'bfloat16', got 'int8'.
    """
    if dtype is None:
        return None
    if isinstance(dtype, jax.Array):
        raise ValueError(
            f"{name} must be None or a float dtype by its name: {name} arrived as an array. Under "
            "optax.inject_hyperparams a class such as jnp.bfloat16 is taken for a schedule: pass "
            "static_args=STATIC_ARGS, or its name."
        )
    try:
        found = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jax.numpy.issubdtype(found, np.floating):
        raise ValueError(
            f"{name} must be None or a float dtype by its name, such as 'bfloat16', got {dtype!r}."
        )
    return found


def check_one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}.")


def choose(name: str, value: Any, choices: Mapping[Any, Choice]) -> Choice:
    """Returns the choice that an option names.

    Raises:
      ValueError: if the option names none of the choices.
    """
    check_one_of(name, value, tuple(choices))
    return choices[value]


def check_layout(layout: Any, params: Any) -> None:
    """Refuses a layout that `optax.inject_hyperparams` has called with a step count.

    Raises:
      ValueError: if that is visible from the layout; the message says which argument to pass.
    """
    of_a_number = (
        layout is not ANY_LEAF and layout == ANY_LEAF and any(map(np.ndim, jax.tree.leaves(params)))
    )
    if isinstance(layout, jax.Array) or of_a_number:
        raise ValueError(_CALLED.format("layout"))


def check_mask(weight_decay_mask: Any) -> None:
    """Refuses a mask that `optax.inject_hyperparams` has called with a step count.

    Raises:
      ValueError: if that is visible from the mask; the message says which argument to pass.
    """
    if isinstance(weight_decay_mask, (jax.Array, bool, np.bool_)):
        raise ValueError(_CALLED.format("weight_decay_mask"))


_CALLED = (
    "{} arrived as what it gives for a single number. Under optax.inject_hyperparams a callable is "
    "taken for a schedule: pass static_args=STATIC_ARGS."
)


def _is_concrete(value: Any) -> bool:
    """Whether a hyperparameter is a number whose value is known now."""
    return value is not None and not callable(value) and not isinstance(value, Tracer)


def _as_float(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes, bool, np.bool_)):
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number or a schedule, got {value!r}.") from error
