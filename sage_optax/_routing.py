"""SinkGD's direction for the hybrids and other composites."""

from typing import Any

import optax

from layout_optax.hyperparameters import check_number
from layout_optax.layout import LayoutLike
from layout_optax.routing import times
from sage_optax._sinkgd import scale_by_sinkhorn
from sage_optax._sinkhorn import Variant


def sinkgd_direction(
    scale: optax.ScalarOrSchedule, iterations: Any, eps: Any, variant: Variant, layout: LayoutLike
) -> optax.GradientTransformation:
    """Sinkhorn's iterate times ``scale``, a number or a schedule."""
    check_number("sinkhorn_eps", eps, 0)
    return times(scale_by_sinkhorn(iterations, eps, variant=variant, layout=layout), scale)
