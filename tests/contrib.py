"""Which cases of optax's own suite for contributed optimizers `make test` leaves to `make test-all`."""

from __future__ import annotations

import unittest


def is_repeated(suite: type[unittest.TestCase], name: str) -> bool:
    """Whether the suite has another case of the same kind that asks more of the optimizer.

    The target of mixed tensors has the vectors and the matrices of the other three targets. A state's dtype
    is most at risk in float16 and under x64, an update's in bfloat16. Without a wrapper ``wrap`` says nothing.
    """
    case = getattr(suite, name).__x_params_repr__
    if "target=" in case:
        return "_setup_mixed_tensor_target" not in case
    return any(part in case for part in ("wrap=True", "dtype='float32'", "bfloat16'>", "float32'>"))
