"""SAGE, SinkGD and their hybrids as optax transformations."""

from layout_optax import ParamLayout, describe, state_shardings, unboxed
from layout_optax import __version__ as __version__
from sage_optax._factored_rms import FactoredRmsState, scale_by_factored_rms
from sage_optax._hybrid import lion_hybrid, sage_hybrid, sinkgd_hybrid
from sage_optax._options import STATIC_ARGS
from sage_optax._recommended import RECOMMENDED_SINKGD as RECOMMENDED_SINKGD
from sage_optax._recommended import RECOMMENDED_WITH_MUON as RECOMMENDED_WITH_MUON
from sage_optax._sage import SageState, sage, sage_damper, scale_by_sage
from sage_optax._sinkgd import scale_by_sinkhorn, sinkgd

__all__ = [
    "RECOMMENDED_SINKGD",
    "RECOMMENDED_WITH_MUON",
    "STATIC_ARGS",
    "FactoredRmsState",
    "ParamLayout",
    "SageState",
    "describe",
    "lion_hybrid",
    "sage",
    "sage_damper",
    "sage_hybrid",
    "scale_by_factored_rms",
    "scale_by_sage",
    "scale_by_sinkhorn",
    "sinkgd",
    "sinkgd_hybrid",
    "state_shardings",
    "unboxed",
]
