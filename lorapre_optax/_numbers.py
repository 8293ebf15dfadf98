"""Hyperparameters that are numbers: schedules, range checks, and what may not be looked at.

Traced values and schedules (`optax.inject_hyperparams`) have no value at construction and are not checked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.core import Tracer

Number: TypeAlias = float | jax.Array | Callable[[Any], Any]
"""A number, or a schedule: a function of the steps taken so far."""


def at(number: Any, count: Any) -> Any:
    """The value of a number or schedule at a step; None stays None."""
    return number(count) if callable(number) else number


def check_number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises ValueError unless low <= value <= high; None, schedules and tracers pass.

    Example:
      >>> check_number("eps", -1.0, 0)
      Traceback (most recent call last):
        ...
      ValueError: eps must be at least 0, got -1.0.
    """
    if _is_concrete(value) and not low <= float(value) <= high:
        bounds = f"at least {low}" if high == float("inf") else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {bounds}, got {value}.")


def check_decay(name: str, value: Any) -> None:
    """Raises ValueError unless value is in [0, 1); warns where float32 cannot tell sqrt(value) from 1."""
    if not _is_concrete(value):
        return
    decay = float(value)
    if not 0 <= decay < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")
    if np.float32(decay**0.5) == np.float32(1):
        warnings.warn(
            f"{name}={value} is so near 1 that the rate of the factors, 1 - sqrt({name}), vanishes in "
            "float32: the factors will not learn.",
            stacklevel=3,
        )


def check_one_of(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}.")


def _is_concrete(value: Any) -> bool:
    """Whether a hyperparameter is a number that can be looked at now."""
    return value is not None and not callable(value) and not isinstance(value, Tracer)
