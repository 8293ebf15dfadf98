"""What each parameter is, which axes are its rows and columns, and where its optimizer state lives."""

from layout_optax.roles import ParamLayout as ParamLayout
from layout_optax.rules import infer_layout as infer_layout

__all__ = ["ParamLayout", "infer_layout"]
