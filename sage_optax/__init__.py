"""SAGE, SinkGD and their hybrids as optax transformations."""

from layout_optax import ParamLayout
from sage_optax._sage import STATIC_ARGS, SageState, sage, sage_damper, scale_by_sage

__all__ = ["STATIC_ARGS", "ParamLayout", "SageState", "sage", "sage_damper", "scale_by_sage"]
