"""SAGE: Lion's sign momentum times a per-column damper that never exceeds one.

Paper: Lee and Kim, "SAGE: Sign-Adaptive Gradient for Memory-Efficient LLM Optimization", arXiv:2604.07663.
The state of an embedding of shape (V, d) is one momentum and d floats. The functions on arrays do one step of
one leaf; the transformation handles state and trees.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from layout_optax.axes import (
    close_statistic,
    compute_dtype,
    open_statistic,
    shape_without,
    zero_statistic,
    zeros_without,
)
from layout_optax.boxes import refuse_boxes
from layout_optax.fit import check_shapes, check_state_type
from layout_optax.hyperparameters import (
    at,
    check_decay,
    check_layout,
    check_mask,
    check_number,
    check_rate,
    in_dtype,
)
from layout_optax.layout import LayoutLike, ParamLayout, is_empty
from layout_optax.leaves import LayoutLeaves, flatten_with_layout
from layout_optax.promotion import in_gradient_dtype
from layout_optax.routing import decayed_weights, scale_by_rate
from sage_optax._damper import Damper, EpsMode, lion_step, sage_damping
from sage_optax._int8 import decode, encode
from sage_optax._options import check_options, momentum_dtype
from sage_optax._rows import with_row_damper


class SageState(NamedTuple):
    r"""State of `scale_by_sage`; trees are shaped like the parameters.

    Unmanaged leaves hold ``optax.MaskedNode()``.

    Attributes:
      count: int32 scalar, the number of updates so far.
      mu: the momentum m in ``mu_dtype``, or its int8 codes.
      magnitude: S before bias correction, the running mean of \|g\| over rows: the parameter's shape without
        row axes, float32 (float64 for float64 parameters). None if ``damper`` is None.
      mu_row_max: float32 scales of the int8 codes, the parameter's shape without column axes. None unless
        ``mu_dtype`` is int8.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mu: Any
    magnitude: Any
    mu_row_max: Any


def scale_by_sage(
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    damper: Damper = "both",
    eps_mode: EpsMode = "absolute",
    mu_dtype: Any = None,
    row_damper: optax.ScalarOrSchedule | None = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales updates by SAGE (arXiv:2604.07663, section 3), without learning rate or weight decay.

    Per parameter, with :math:`\operatorname{rms}` over its columns:

    .. math::
      s &= \operatorname{mean}_{rows} |g|, \quad S \leftarrow b_2 S + (1 - b_2) s, \quad
        \hat S = S / (1 - b_2^t) \\
      H &= \min\left(\frac{\operatorname{rms}(\hat S)}{\hat S + \varepsilon},
        \frac{\operatorname{rms}(s)}{s + \varepsilon}, 1\right) \\
      u &= \operatorname{sign}(b_1 m + (1 - b_1) g) \, H, \quad
        \text{then } m \leftarrow b_2 m + (1 - b_2) g

    A vector has no rows, so s is \|g\|. Only S is bias corrected. As in the paper, the sign uses the OLD
    momentum. The authors' released code updates m first, which is this rule with ``b1 * b2`` in place of ``b1``
    (0.891 for the defaults); pass that value to reproduce it.

    0 <= H <= 1. With ``damper="both"``, H is 0 in every column if the step's gradient is exactly zero, so
    nothing moves then even if m is not zero.

    Statistics and averages are computed in float32 at least. With ``damper=None`` the arithmetic is that of
    `optax.lion` in the gradient's own dtype, and the result equals `optax.lion`'s bit for bit.

    A NaN or infinite gradient makes the update and S of the whole leaf non-finite, since H takes an rms over
    columns. Wrap the optimizer in `optax.apply_if_finite` to skip such steps.

    Args:
      b1: weight of the old momentum in the sign, in [0, 1).
      b2: decay of momentum and magnitude, in [0, 1).
      eps: offset of the damper's denominators, positive. b1, b2 and eps may be schedules; the bias correction
        then uses the current b2.
      damper: ``"both"`` uses both terms and ``"ema"`` drops the instantaneous term. None sets H = 1, which is
        Lion and keeps no magnitude.
      eps_mode: ``"absolute"``, as in the paper, has the gradient's units: with s = 1e-8 everywhere H is 0.5.
        ``"relative"`` multiplies eps by the rms, which makes H independent of the gradient's scale.
      mu_dtype: dtype of the momentum: None for the parameter's, a float dtype, or int8. int8 takes one byte per
        entry and one float32 per row, with square-root levels and unbiased stochastic rounding. In int8 a
        non-finite gradient entry makes the momentum of its whole row non-finite.
      row_damper: None for the paper's rule; an exponent p in (0, 1], or a schedule of it, for this repository's
        extension, which moves rows with small gradients less, such as those of rare tokens. With q the running
        mean (decay b2) of \|g\| over a row's columns, and the rms over the rows, u is multiplied by

        .. math:: R = \min\left(\frac{q}{\operatorname{rms}(q)}, 1\right)^p

        0 <= R <= 1 at any scale of the gradient; R is 1 for a vector, which is a single row. It takes one float
        per row. docs/results/recipes.md measures its effect.
      layout: see `layout_optax.LayoutLike`. Unmanaged leaves pass through.

    Returns:
      A transformation with state `SageState`. With ``row_damper`` the state holds that as ``sage``, and q as
      ``row_magnitude``. Updates have the gradient's dtype.

    Raises:
      ValueError: for an unknown ``damper`` or ``eps_mode``, numbers out of range, or an unusable ``mu_dtype``.

    Example:
      >>> tx = scale_by_sage()
      >>> grads = {"embedding": jnp.array([[1.0, -2.0], [3.0, 0.0]])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> print(updates["embedding"].round(3))  # columns of mean 2 and 1: H = sqrt(2.5) / 2 and 1
      [[ 0.791 -1.   ]
       [ 0.791  0.   ]]
      >>> state.magnitude["embedding"].shape
      (2,)
    """
    check_options(damper, eps_mode)
    check_decay("b1", b1)
    check_decay("b2", b2)
    check_number("eps", eps, 0, strictly=True)
    dtype = momentum_dtype(mu_dtype)
    int8 = dtype == jnp.int8

    def init_fn(params: optax.Params) -> SageState:
        refuse_boxes(params)
        check_layout(layout, params)
        ours = flatten_with_layout(layout, params)
        ours.check_trainable()

        def zero_magnitude(path, layout, param):
            return zero_statistic(param, layout.row_axes, compute_dtype(param.dtype))

        return SageState(
            count=jnp.zeros([], jnp.int32),
            mu=ours.map(lambda _, layout, p: zeros_without(p, (), dtype or p.dtype)),
            magnitude=None if damper is None else ours.map(zero_magnitude),
            mu_row_max=(
                ours.map(lambda _, layout, p: zero_statistic(p, layout.column_axes, jnp.float32))
                if int8
                else None
            ),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, SageState]:
        del params, extra_args
        check_state_type("scale_by_sage", state, SageState)
        _check_kept(state, damper, int8)
        ours = flatten_with_layout(layout, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        numbers = tuple(at(number, state.count) for number in (b1, b2, eps))

        def step(path, layout, g, mu, magnitude, row_max):
            _check_leaf(path, layout, g, mu, magnitude, row_max)
            if not g.size:
                return _Leaf(g, mu, magnitude, row_max)
            narrow = g.dtype
            rate1, rate2, offset = numbers
            if damper is not None or int8:  # otherwise use optax.lion's own arithmetic
                if int8:
                    row_max = open_statistic(row_max, g, layout.column_axes)
                    mu = decode(mu, row_max, layout)
                wide = max(
                    compute_dtype(narrow), compute_dtype(mu.dtype), key=lambda each: each.itemsize
                )
                g, mu = g.astype(wide), mu.astype(wide)
                rate1, rate2, offset = in_dtype(wide, *numbers)
            direction, mu = lion_step(g, mu, rate1, rate2)
            if damper is not None:
                magnitude = open_statistic(magnitude, g, layout.row_axes)
                damping, magnitude = sage_damping(
                    g, magnitude, layout, count, rate2, offset, damper, eps_mode
                )
                magnitude = close_statistic(magnitude, g, layout.row_axes)
                direction = direction * damping
            if int8:
                mu, row_max = encode(mu, path, layout, count)
                row_max = close_statistic(row_max, g, layout.column_axes)
            return _Leaf(direction.astype(narrow), mu, magnitude, row_max)

        steps = ours.map(step, *(_or_nones(ours, tree) for tree in state[1:]))

        def collect(field: str, like: Any) -> Any:
            """Collects one field of all leaves into a tree, in the dtypes of the old state."""
            if like is None:
                return None
            return ours.map(
                lambda _, layout, g, leaf, old: getattr(leaf, field).astype(old.dtype), steps, like
            )

        directions = ours.map(lambda _, layout, g, leaf: leaf.direction, steps, other="leaf")
        return directions, SageState(
            count, *(collect(field, getattr(state, field)) for field in SageState._fields[1:])
        )

    transformation = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    if row_damper is None:
        return transformation
    return with_row_damper(transformation, row_damper, b2, layout)


def sage(
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-8,
    *,
    damper: Damper = "both",
    eps_mode: EpsMode = "absolute",
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    weight_decay_mask: Any = None,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """SAGE on every parameter, with decoupled weight decay ("SAGE-Pure" in the paper).

    The paper trains with `sage_hybrid`. SAGE alone does badly on matrices (perplexity 116 against 30 at 270M).
    Every parameter moves by at most ``learning_rate * (1 + weight_decay * |p|)``.

    Args:
      learning_rate: a number or a schedule.
      b1: see `scale_by_sage`.
      b2: see `scale_by_sage`.
      eps: see `scale_by_sage`.
      damper: see `scale_by_sage`.
      eps_mode: see `scale_by_sage`.
      mu_dtype: see `scale_by_sage`.
      weight_decay: multiplied by the learning rate and the parameter, as in `optax.adamw`.
      weight_decay_mask: tree of booleans, or a callable from parameters to one; None decays everything.
      layout: see `scale_by_sage`.

    Returns:
      The transformation; with `optax.inject_hyperparams` pass ``static_args=STATIC_ARGS``.

    Raises:
      ValueError: see `scale_by_sage`.

    Example:
      >>> tx = sage(1e-3, weight_decay=0.0)
      >>> params = {"norm": {"scale": jnp.ones(4)}}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> print(updates["norm"]["scale"])
      [-0.001 -0.001 -0.001 -0.001]
    """
    check_mask(weight_decay_mask)
    check_rate("learning_rate", learning_rate)
    check_number("weight_decay", weight_decay, 0)
    return in_gradient_dtype(
        optax.chain(
            scale_by_sage(
                b1, b2, eps, damper=damper, eps_mode=eps_mode, mu_dtype=mu_dtype, layout=layout
            ),
            decayed_weights(weight_decay, weight_decay_mask),
            scale_by_rate(learning_rate),
        )
    )


def sage_damper(
    updates: optax.Updates,
    state: SageState,
    *,
    b2: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-8,
    damper: Literal["both", "ema"] = "both",
    eps_mode: EpsMode = "absolute",
    layout: LayoutLike = None,
) -> Any:
    """Returns the damper H that `scale_by_sage` applies to a gradient, for logging.

    Args:
      updates: the gradients of a step.
      state: the `SageState` BEFORE that step, with a magnitude.
      b2: the argument of `scale_by_sage`.
      eps: the argument of `scale_by_sage`.
      damper: the argument of `scale_by_sage`.
      eps_mode: the argument of `scale_by_sage`.
      layout: the argument of `scale_by_sage`.

    Returns:
      A tree like ``state.magnitude``: H per batch and column entry, between 0 and 1. Leaves without SAGE state
      hold ``optax.MaskedNode()``.

    Raises:
      ValueError: if the state keeps no magnitude, or for unknown options.

    Example:
      >>> grads = {"embedding": jnp.array([[1.0, -2.0], [3.0, 0.0]])}
      >>> print(sage_damper(grads, scale_by_sage().init(grads))["embedding"].round(3))
      [0.791 1.   ]
    """
    check_state_type("sage_damper", state, SageState)
    if state.magnitude is None or damper is None:
        raise ValueError("sage_damper: damper=None keeps no magnitude; its H is 1 everywhere.")
    check_options(damper, eps_mode)
    ours = flatten_with_layout(layout, updates)
    count = jnp.asarray(optax.safe_increment(state.count))
    decay, offset = at(b2, state.count), at(eps, state.count)

    def damping(path, layout, g, magnitude):
        if is_empty(magnitude):
            return optax.MaskedNode()
        if not g.size:
            return jnp.zeros_like(magnitude)
        check_shapes(path, g.shape, magnitude, shape_without(g.shape, layout.row_axes))
        g = g.astype(compute_dtype(g.dtype))
        magnitude = open_statistic(magnitude, g, layout.row_axes)
        found, _ = sage_damping(g, magnitude, layout, count, decay, offset, damper, eps_mode)
        return jnp.squeeze(found, layout.row_axes)

    return ours.map(damping, state.magnitude)


class _Leaf(NamedTuple):
    """The result of one step of one leaf."""

    direction: jax.Array
    mu: jax.Array
    magnitude: jax.Array | None
    mu_row_max: jax.Array | None


def _check_kept(state: SageState, damper: Damper, int8: bool) -> None:
    """Refuses a state made with another ``damper`` or with another kind of momentum."""
    for option, kept, wanted in (
        ("damper", state.magnitude, damper is not None),
        ('mu_dtype="int8"', state.mu_row_max, int8),
    ):
        if (kept is not None) != wanted:
            has, needs = ("no", "one") if wanted else ("one", "none")
            raise ValueError(
                f"scale_by_sage: the state has {has} field for {option}, but this optimizer needs {needs}. "
                "Make the optimizer with the options of the run that saved the state, or start the state anew."
            )


def _check_leaf(path: str, layout: ParamLayout, g: jax.Array, mu: Any, *others: Any) -> None:
    """Refuses a leaf's state that does not have its gradient's shape."""
    check_shapes(path, g.shape, mu, g.shape)
    for kept, axes in zip(others, (layout.row_axes, layout.column_axes), strict=True):
        if kept is not None:
            check_shapes(path, g.shape, kept, shape_without(g.shape, axes))


def _or_nones(ours: LayoutLeaves, tree: Any) -> Any:
    """A state field, or None at every leaf if the state does not keep it."""
    return ours.map(lambda *_: None) if tree is None else tree
