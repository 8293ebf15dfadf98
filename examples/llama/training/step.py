"""One training step as a pure function of arrays: gradients, clipping, update. No files, no clocks.

A step whose loss or gradient is not finite changes neither parameters nor optimizer state. The peak learning
rate is an operand, not a constant, so a search over learning rates compiles once. The other ingredients of the
step are static.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any
Batch = Any
"""An array, or a dictionary of arrays, with sequences on the first axis."""
LossFn = Callable[[Params, Batch], tuple[jax.Array, jax.Array]]
"""From parameters and a batch to the mean loss and the number of predicted tokens."""
MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]
StatisticsFn = Callable[["StepRecord"], dict[str, jax.Array]]


class TrainState(NamedTuple):
    """The state that a step changes.

    Attributes:
        params: The parameters.
        opt_state: The optimizer's state.
        step: int32 scalar, the number of steps taken, skipped ones included.
        skipped: int32 scalar, the number of steps whose update was skipped.
    """

    params: Params
    opt_state: Any
    step: jax.Array
    skipped: jax.Array


class StepMetrics(NamedTuple):
    """The report of every step, on the device: float32 scalars and one bool.

    Attributes:
        loss: Mean loss of the step's tokens, before the update.
        grad_norm: Global norm of the gradient, before clipping.
        learning_rate: The rate of this step's update.
        skipped: Whether the update was skipped because the loss or the norm is not finite, a bool.
    """

    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array


class StepRecord(NamedTuple):
    """The inputs of a step's statistics.

    Attributes:
        params: The parameters before the update.
        updates: The sum that the step adds to them.
        gradients: The clipped gradient, as the optimizer sees it.
        old_state: The optimizer's state before the update.
        new_state: The optimizer's state after the update.
    """

    params: Params
    updates: Params
    gradients: Params
    old_state: Any
    new_state: Any


def warmup_cosine(steps: int, warmup_steps: int, final_fraction: float) -> optax.Schedule:
    """A linear warm-up from 0 to 1, then a cosine to `final_fraction`, as a factor of the peak.

    The first step's learning rate is `1 / (warmup_steps + 1)` of the peak, because a step at 0 would change
    nothing. The last step's learning rate is just above the end of the cosine.

    >>> schedule = warmup_cosine(steps=10, warmup_steps=1, final_fraction=0.1)
    >>> [round(float(schedule(count)), 2) for count in (0, 1, 10)]
    [0.5, 1.0, 0.1]
    """
    start = 1.0 / (warmup_steps + 1)
    return optax.warmup_cosine_decay_schedule(
        start, 1.0, warmup_steps, max(steps, warmup_steps + 1), final_fraction
    )


def init_state(params: Params, make_optimizer: MakeOptimizer) -> TrainState:
    """The state before the first step; it does not depend on the learning rate."""
    tx = make_optimizer(optax.constant_schedule(0.0))
    return TrainState(params, tx.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def make_train_step(
    loss_fn: LossFn,
    make_optimizer: MakeOptimizer,
    schedule: optax.Schedule,
    *,
    clip_norm: float | None = None,
    accumulate: int = 1,
    statistics: StatisticsFn | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics, dict[str, jax.Array]]]:
    """Makes the function of one optimizer step.

    Args:
        loss_fn: See `LossFn`.
        make_optimizer: From a learning-rate schedule to the optimizer.
        schedule: The learning rate as a share of the peak, from the step count.
        clip_norm: Global gradient norm to clip to, or None.
        accumulate: Number of equal parts whose gradients are summed before the update.
        statistics: Further numbers to report, or None.

    Returns:
        A function of `TrainState`, a batch and the peak rate (a scalar) that gives the next state,
        `StepMetrics` and the statistics (an empty dict without `statistics`).
    """

    def train_step(state: TrainState, batch: Batch, peak: jax.Array):
        loss, gradients = accumulated_gradients(loss_fn, state.params, batch, accumulate)
        grad_norm = optax.tree.norm(gradients)
        if clip_norm is not None:
            clip = optax.clip_by_global_norm(clip_norm)
            gradients, _ = clip.update(gradients, optax.EmptyState())
        tx = make_optimizer(lambda count: peak * schedule(count))
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        record = StepRecord(state.params, updates, gradients, state.opt_state, opt_state)
        numbers = {} if statistics is None else statistics(record)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = _either(finite, (params, opt_state), (state.params, state.opt_state))
        # The optimizer counts its updates and takes its learning rate from that count.
        rate = jnp.asarray(peak * schedule(state.step - state.skipped), jnp.float32)
        skipped = state.skipped + jnp.logical_not(finite)
        metrics = StepMetrics(loss, grad_norm, rate, jnp.logical_not(finite))
        return TrainState(params, opt_state, state.step + 1, skipped), metrics, numbers

    return train_step


def accumulated_gradients(
    loss_fn: LossFn, params: Params, batch: Batch, accumulate: int = 1
) -> tuple[jax.Array, Params]:
    """The loss and gradient of a batch, computed in `accumulate` equal parts one after the other.

    Parts are weighted by their number of predicted tokens and added in float32 (float64 for float64
    parameters), so the result equals that of the whole batch up to rounding.

    Args:
        loss_fn: See `LossFn`.
        params: The parameters.
        batch: Arrays whose first axis is B, the number of sequences.
        accumulate: Number of parts; divides B.

    Returns:
        The mean loss, a float32 scalar, and the gradient in the parameters' dtypes.

    Raises:
        ValueError: The batch does not divide.

    >>> loss = lambda w, x: (jnp.mean((w - x) ** 2), jnp.asarray(x.size, jnp.float32))
    >>> whole, parts = (accumulated_gradients(loss, 0.0, jnp.arange(8.0), n) for n in (1, 4))
    >>> float(whole[1]), float(parts[1])
    (-7.0, -7.0)
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate == 1:
        (loss, _), gradients = value_and_grad(params, batch)
        return loss, gradients
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % accumulate:
        raise ValueError(f"a batch of {rows} sequences does not divide into {accumulate} parts")
    # Every accumulate-th sequence: on a mesh each part then spans all devices like the batch.
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch
    )

    def add_part(carry, part):
        total_loss, total_weight, sums = carry
        (loss, weight), gradients = value_and_grad(params, part)
        sums = jax.tree.map(lambda s, g: s + weight * g.astype(s.dtype), sums, gradients)
        return (total_loss + weight * loss, total_weight + weight, sums), None

    def zeros(leaf):
        return jnp.zeros_like(leaf, dtype=jnp.promote_types(jnp.result_type(leaf), jnp.float32))

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jax.tree.map(zeros, params))
    (total_loss, total_weight, sums), _ = jax.lax.scan(add_part, start, parts)
    weight = jnp.where(total_weight > 0, total_weight, 1.0)
    gradients = jax.tree.map(lambda s, p: (s / weight).astype(jnp.result_type(p)), sums, params)
    return total_loss / weight, gradients


def _either(condition: jax.Array, new: Any, old: Any) -> Any:
    """Selects the new tree or the old one.

    A select and not a branch: it fuses with the loops that write the new arrays into the donated old ones, so
    that no second copy is needed and the arithmetic before it does not change.
    """
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def make_evaluation(loss_fn: LossFn) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Makes a function that adds one batch to a running sum of token losses.

    Returns:
        A function of parameters, a batch and the pair (summed loss, number of tokens) that gives the
        next pair; the mean over tokens is their ratio after the last batch.
    """

    def evaluate(params: Params, batch: Batch, sums: tuple[jax.Array, jax.Array]):
        loss, weight = loss_fn(params, batch)
        return sums[0] + loss * weight, sums[1] + weight

    return evaluate
