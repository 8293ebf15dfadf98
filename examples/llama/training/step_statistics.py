"""Statistics of a step: the size of the update, SAGE's damper, and the content of LoRA-Pre's factors.

All of them are computed on the device, inside the detailed form of the train step, which runs only at log
intervals.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.llama.training.step import StepRecord
from layout_optax import resolve_layout
from lorapre_optax import lorapre_metrics
from sage_optax import SageState, sage_damper

SMALL_SCALE = 100.0
"""A column's S counts as small below this multiple of eps: eps then damps it by 1 % or more."""


def make_statistics(
    damper_arguments: Mapping[str, Any] | None = None,
) -> Callable[[StepRecord], dict[str, jax.Array]]:
    """Makes the statistics function of a train step from the three functions of this module."""

    def statistics(record: StepRecord) -> dict[str, jax.Array]:
        return {
            **update_statistics(record.params, record.updates),
            **damper_statistics(
                record.gradients, record.old_state, record.new_state, **(damper_arguments or {})
            ),
            **low_rank_statistics(record.gradients, record.old_state, record.updates),
        }

    return statistics


def update_statistics(params: Any, updates: Any) -> dict[str, jax.Array]:
    """Size of the update by role.

    Args:
        params: The parameters before the update.
        updates: The sum that the step adds to them, with learning rate, decay and sign.

    Returns:
        For each role that occurs, float32 scalars: `update/ROLE/rms`, `update/ROLE/max` (largest
        magnitude) and `update/ROLE/relative`, the rms over the rms of the role's parameters.

    >>> numbers = update_statistics({"norm": {"scale": jnp.ones(4)}}, {"norm": {"scale": jnp.full(4, -0.5)}})
    >>> {name: float(value) for name, value in numbers.items()}
    {'update/vector/rms': 0.5, 'update/vector/max': 0.5, 'update/vector/relative': 0.5}
    """
    groups = defaultdict(list)
    layouts = jax.tree.leaves(resolve_layout(None, params))
    for layout, param, update in zip(
        layouts, jax.tree.leaves(params), jax.tree.leaves(updates), strict=True
    ):
        groups[layout.role].append((param.astype(jnp.float32), update.astype(jnp.float32)))
    numbers = {}
    for role, pairs in sorted(groups.items()):
        update_rms = _rms([update for _, update in pairs])
        param_rms = _rms([param for param, _ in pairs])
        numbers[f"update/{role}/rms"] = update_rms
        numbers[f"update/{role}/max"] = _max([jnp.abs(update) for _, update in pairs])
        numbers[f"update/{role}/relative"] = update_rms / jnp.where(param_rms > 0, param_rms, 1.0)
    return numbers


def damper_statistics(
    gradients: Any, old_state: Any, new_state: Any, **arguments: Any
) -> dict[str, jax.Array]:
    """Statistics of SAGE's damper, by role; empty if the state holds no SAGE scale.

    Args:
        gradients: The gradient that the optimizer saw.
        old_state: Its state before the update.
        new_state: Its state after the update.
        **arguments: The optimizer's `b2`, `eps`, `damper` and `eps_mode` if they differ from
            SAGE's defaults.

    Returns:
        For each role under SAGE, float32 scalars over all of its columns: `damper/ROLE/mean` and
        `damper/ROLE/min` of H, `damper/ROLE/damped_share` (H below 1) and
        `damper/ROLE/small_scale_share` (bias-corrected S below 100 eps).
    """
    b2, eps = arguments.get("b2", 0.99), arguments.get("eps", 1e-8)
    groups = defaultdict(list)
    for old, new in zip(sage_states(old_state), sage_states(new_state), strict=True):
        own = jax.tree.map(
            lambda place, gradient: place if isinstance(place, optax.MaskedNode) else gradient,
            old.magnitude,
            gradients,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        layouts = jax.tree.leaves(resolve_layout(None, own))
        dampers = jax.tree.leaves(sage_damper(own, old, **arguments))
        correction = 1.0 - jnp.asarray(b2, jnp.float32) ** new.count
        scales = [scale / correction for scale in jax.tree.leaves(new.magnitude)]
        for layout, damper, scale in zip(layouts, dampers, scales, strict=True):
            groups[layout.role].append((damper, scale))
    numbers = {}
    for role, pairs in sorted(groups.items()):
        dampers, scales = ([pair[i] for pair in pairs] for i in (0, 1))
        numbers[f"damper/{role}/mean"] = _mean(dampers)
        numbers[f"damper/{role}/min"] = -_max([-damper for damper in dampers])
        numbers[f"damper/{role}/damped_share"] = _mean([damper < 1 for damper in dampers])
        numbers[f"damper/{role}/small_scale_share"] = _mean(
            [scale < SMALL_SCALE * eps for scale in scales]
        )
    return numbers


def low_rank_statistics(gradients: Any, old_state: Any, updates: Any) -> dict[str, jax.Array]:
    """The share of the gradient that LoRA-Pre's factors hold; empty if no first moment has factors.

    Args:
        gradients: The gradient that the optimizer saw.
        old_state: Its state before the update.
        updates: The sum that the step adds to the parameters.

    Returns:
        For each parameter with factors, scalars over its stack of matrices: `lorapre/PATH/energy_share`
        (the mean) and `lorapre/PATH/energy_share_min` (see `lorapre_optax.lorapre_metrics`),
        `lorapre/PATH/update_rms` and `lorapre/PATH/update_max`.
    """
    numbers = {}
    for path, found in lorapre_metrics(old_state, gradients, updates).items():
        numbers[f"lorapre/{path}/energy_share"] = jnp.mean(found["energy_share"])
        numbers[f"lorapre/{path}/energy_share_min"] = jnp.min(found["energy_share"])
        numbers[f"lorapre/{path}/update_rms"] = _rms([found["update_rms"]])
        numbers[f"lorapre/{path}/update_max"] = jnp.max(found["update_max"])
    return numbers


def sage_states(opt_state: Any) -> Iterator[SageState]:
    """The `SageState`s with a damper's scale inside a nested optimizer state, in a fixed order."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, SageState))
    for node in nodes:
        if isinstance(node, SageState) and jax.tree.leaves(node.magnitude):
            yield node


def _mean(arrays: list[jax.Array]) -> jax.Array:
    total = sum(jnp.sum(array, dtype=jnp.float32) for array in arrays)
    return jnp.asarray(total / sum(array.size for array in arrays), jnp.float32)


def _rms(arrays: list[jax.Array]) -> jax.Array:
    return jnp.sqrt(_mean([jnp.square(array) for array in arrays]))


def _max(arrays: list[jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack([jnp.max(array) for array in arrays]))
