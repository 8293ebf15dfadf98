"""Roles, row and column axes, state memory and state shardings of parameters, for optax transformations."""

from layout_optax.boxes import unboxed as unboxed
from layout_optax.describe import describe as describe
from layout_optax.doubts import LayoutWarning as LayoutWarning
from layout_optax.inference import infer_layout as infer_layout
from layout_optax.layout import ANY_LEAF as ANY_LEAF
from layout_optax.layout import ParamLayout as ParamLayout
from layout_optax.leaves import resolve_layout as resolve_layout
from layout_optax.memory import MemoryReport as MemoryReport
from layout_optax.memory import memory_report as memory_report
from layout_optax.memory import state_bytes as state_bytes
from layout_optax.routing import WholeModel as WholeModel
from layout_optax.routing import adam_direction as adam_direction
from layout_optax.routing import by_role as by_role
from layout_optax.sharding import state_shardings as state_shardings

__version__ = "0.2.0"  # pyproject.toml and CITATION.cff carry it too; a test compares them

__all__ = [
    "ANY_LEAF",
    "LayoutWarning",
    "MemoryReport",
    "ParamLayout",
    "WholeModel",
    "adam_direction",
    "by_role",
    "describe",
    "infer_layout",
    "memory_report",
    "resolve_layout",
    "state_bytes",
    "state_shardings",
    "unboxed",
]
