"""Momentum as two thin factors: the low-rank EMA and trace that every optimizer here is built on.

An EMA ``m <- b m + (1-b) g`` is one gradient step of size 1-b on 1/2 ||m - g||^2, so momentum is a linear model
trained online. LoRA-Pre keeps that model as a product B A and trains each factor by a Newton step towards a
target. What the target is (the gradient, its absolute value, the gradient over 1-mu) and what is read from the
product is all that Adam's two moments, Muon's accumulator and heavy-ball momentum differ in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from layout_optax.axes import compute_dtype, zeros_without
from layout_optax.roles import LayoutLeaves, LayoutLike, ParamLayout, PyTree, flatten_with_layout
from lorapre_optax import _factors
from lorapre_optax._batching import Done, Task, advance
from lorapre_optax._factors import DampingKind
from lorapre_optax._rank import RankLike, leaf_rank
from lorapre_optax._subspace import gradient_rights
from lorapre_optax._validation import check_decay, check_number, check_one_of

InitialSubspace: TypeAlias = Literal["normal", "gradient"]
Number: TypeAlias = jax.Array | float


class LowRankState(NamedTuple):
    """A moment of every parameter, as factors or in full. Trees shaped like the parameters.

    Attributes:
      count: steps taken, int32.
      left: factors B, zero at the start: the parameter's batch and row axes with the rank second to last;
        ``MaskedNode`` where the moment is full or the leaf is not ours.
      right: factors A: batch and column axes with the rank second to last; ``MaskedNode`` likewise.
      full: full moments of the leaves without factors; ``MaskedNode`` elsewhere.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    left: PyTree
    right: PyTree
    full: PyTree


@dataclasses.dataclass(frozen=True)
class Tracking:
    """How factors follow their target; the options that every low-rank momentum shares.

    Attributes:
      rank: see `lorapre_optax.RankLike`.
      damping: of the r x r systems. The paper's value is not known.
      damping_kind: ``"relative"``: damping * trace(gram) / r is added to each diagonal, so that the size
        of gradients does not matter, and the factors are kept balanced. ``"absolute"``: damping itself,
        factors left as the rule makes them; for parity with other implementations.
      initial_subspace: ``"normal"`` (paper) or ``"gradient"``, see `lorapre_optax._subspace`.
      factor_dtype: storage dtype of factors and full moments; None for float32 (float64 for float64).
        Arithmetic is in float32 or wider regardless.
      full_rank_fallback: keep a full moment where r (p + q) >= p q.
    """

    rank: RankLike
    damping: Number = 1e-4
    damping_kind: DampingKind = "relative"
    initial_subspace: InitialSubspace = "normal"
    factor_dtype: Any = None
    full_rank_fallback: bool = True

    def __post_init__(self):
        """Refuses options that cannot be meant."""
        check_number("damping", self.damping, 0)
        check_one_of("damping_kind", self.damping_kind, ("relative", "absolute"))
        check_one_of("initial_subspace", self.initial_subspace, ("normal", "gradient"))


def low_rank_ema(
    decay: Number,
    rank: RankLike,
    *,
    target: Callable[[jax.Array], jax.Array] | None = None,
    gamma: Number | None = None,
    residual: Number | None = None,
    debias: bool = True,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """An exponential moving average of the updates whose history is kept as two thin factors.

    In place of the updates G it returns (equations 4 to 6 of the paper's Algorithm 1)::

        m  = b B A + (1-b) T              T = target(G), and the PREVIOUS factors
        B' = (1-g) B + g T A^T (A A^T)^-1
        A' = (1-g) A + g (B^T B)^-1 B^T T

    over 1 - b^t with ``debias``. The fresh T enters in full: only the past is compressed. NaN or Inf in an
    update reaches the factors; wrap the chain in `optax.apply_if_finite` where that can happen.

    Args:
      decay: b in [0, 1).
      rank: an int, a fraction of the smaller side, a mapping from roles or path patterns, or a function;
        see `lorapre_optax.RankLike`. Leaves without factors get `optax.ema`.
      target: element-wise map of the updates (``jnp.abs``, a multiple); None for the identity.
      gamma: g; None couples it to the decay, 1 - g = sqrt(b), since two factors decay together.
      residual: kappa in [0, b], None for the paper's rule. Adds kappa (1 - b^(t-1)) times the part of T
        that the factors cannot hold, T - (P_B T + T P_A) / 2; kappa = b gives it the weight that T
        inside the tracked subspace gathers over time.
      debias: divide by 1 - b^t, as `optax.ema` does.
      damping: of the r x r systems, see ``damping_kind``.
      damping_kind: ``"relative"`` (times trace / r of each system) or ``"absolute"``.
      initial_subspace: ``"normal"`` (paper) or ``"gradient"``: from the first update.
      factor_dtype: storage dtype of the state; None for float32 (float64 for float64 parameters).
      full_rank_fallback: keep a full moment where factors would not be smaller.
      layout: see `layout_optax.ParamLayout`; None infers it.

    Returns:
      A transformation with state `LowRankState`. Updates keep their dtype.

    Raises:
      ValueError: for numbers out of range, at construction where they are concrete.

    Example:
      >>> params = {"mlp": {"kernel": jnp.ones((24, 40))}}
      >>> tx = low_rank_ema(0.9, rank=4)
      >>> state = tx.init(params)
      >>> state.left["mlp"]["kernel"].shape, state.right["mlp"]["kernel"].shape
      ((4, 40), (4, 24))
      >>> updates, state = tx.update(params, state)
      >>> round(float(updates["mlp"]["kernel"][0, 0]), 5)  # step 1 is the update itself
      1.0
    """
    check_decay("decay", decay)
    tracking = Tracking(
        rank, damping, damping_kind, initial_subspace, factor_dtype, full_rank_fallback
    )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = flatten_with_layout(layout, updates)
        targets = in_compute_dtype(leaves, target)
        fresh = [None if t is None else (1 - decay) * t for t in targets]
        moments, state = follow(
            leaves, state, tracking, targets, fresh, decay, gamma=gamma, residual=residual
        )
        if debias:
            moments = [
                None if m is None else m / bias_weight(decay, state.count, m.dtype) for m in moments
            ]
        return as_updates(leaves, moments), state

    return optax.GradientTransformationExtraArgs(initialiser(tracking, layout), update_fn)


def low_rank_trace(
    decay: Number,
    rank: RankLike,
    *,
    nesterov: bool = False,
    gamma: Number | None = None,
    residual: Number | None = None,
    damping: Number = 1e-4,
    damping_kind: DampingKind = "relative",
    initial_subspace: InitialSubspace = "normal",
    factor_dtype: Any = None,
    full_rank_fallback: bool = True,
    layout: LayoutLike = None,
) -> optax.GradientTransformationExtraArgs:
    """The accumulator ``m = mu m + G`` (heavy ball, Muon) whose history is kept as two thin factors.

    Its fixed point is G / (1-mu), so it is the low-rank EMA of the target T = G / (1-mu) (Algorithm 2)::

        m  = mu B A + G
        B' = d B + (1-d)/(1-mu) G A^T (A A^T)^-1          d = sqrt(mu)
        A' = d A + (1-d)/(1-mu) (B^T B)^-1 B^T G

    Args:
      decay: mu in [0, 1).
      rank: see `low_rank_ema`. Leaves without factors get `optax.trace`.
      nesterov: return G + mu m instead of m.
      gamma: 1 - d; None couples it as above.
      residual: kappa in [0, mu], see `low_rank_ema`.
      damping: see `low_rank_ema`.
      damping_kind: see `low_rank_ema`.
      initial_subspace: see `low_rank_ema`.
      factor_dtype: see `low_rank_ema`.
      full_rank_fallback: see `low_rank_ema`.
      layout: see `low_rank_ema`.

    Returns:
      A transformation with state `LowRankState`. Updates keep their dtype.

    Example:
      >>> tx = low_rank_trace(0.95, rank={"matrix": 8, "head": None})
      >>> state = tx.init({"q": {"kernel": jnp.ones((64, 32))}, "norm": {"scale": jnp.ones(32)}})
      >>> state.full["norm"]["scale"].shape, state.right["q"]["kernel"].shape
      ((32,), (8, 64))
    """
    check_decay("decay", decay)
    tracking = Tracking(
        rank, damping, damping_kind, initial_subspace, factor_dtype, full_rank_fallback
    )

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = flatten_with_layout(layout, updates)
        moments, state = accumulate(
            leaves, state, tracking, decay, nesterov=nesterov, gamma=gamma, residual=residual
        )
        return as_updates(leaves, moments), state

    return optax.GradientTransformationExtraArgs(initialiser(tracking, layout), update_fn)


def accumulate(
    leaves: LayoutLeaves,
    state: LowRankState,
    tracking: Tracking,
    decay: Number,
    *,
    nesterov: bool,
    gamma: Number | None,
    residual: Number | None,
) -> tuple[list[jax.Array | None], LowRankState]:
    """The trace of the updates in ``leaves``, in float32 or wider, and the next state."""
    grads = in_compute_dtype(leaves)
    targets = [None if g is None else g / (1 - decay) for g in grads]
    moments, state = follow(
        leaves, state, tracking, targets, grads, decay, gamma=gamma, residual=residual
    )
    if nesterov:
        moments = [
            None if m is None or g is None else g + decay * m
            for m, g in zip(moments, grads, strict=True)
        ]
    return moments, state


def follow(
    leaves: LayoutLeaves,
    state: LowRankState,
    tracking: Tracking,
    targets: Sequence[jax.Array | None],
    fresh: Sequence[jax.Array | None],
    decay: Number,
    *,
    gamma: Number | None,
    residual: Number | None,
) -> tuple[list[jax.Array | None], LowRankState]:
    """``decay * (previous moment) + fresh`` of every leaf, and the next state."""
    count = jnp.asarray(optax.safe_increment(state.count))
    gamma = coupled_gamma(decay) if gamma is None else gamma
    (done,) = advance_states(leaves, [(state, targets, gamma)], tracking)
    moments: list[jax.Array | None] = []
    full: list[jax.Array | None] = []
    for layout, old, target, new, each in zip(
        leaves.layouts, leaves.align(state.full), targets, fresh, done, strict=True
    ):
        if layout is None or target is None or new is None:
            moments.append(None)
            full.append(None)
        elif each is None:
            moments.append(decay * old.astype(target.dtype) + new)
            full.append(moments[-1])
        else:
            moments.append(
                decay * each.product
                + new
                + residual_term(each, layout, target, decay, count, residual)
            )
            full.append(None)
    return moments, next_state(leaves, state, count, done, full)


def residual_term(
    done: Done,
    layout: ParamLayout,
    target: jax.Array,
    decay: Number,
    count: jax.Array,
    residual: Number | None,
) -> jax.Array | float:
    """The term kappa (1 - b^(t-1)) (T - (P_B T + T P_A) / 2), or 0 where there is no kappa.

    The history holds weight b (1 - b^(t-1)) at step t, so with kappa = b the part outside gets exactly
    the weight of the part inside, and nothing at t = 1, where there is no history to make up for.
    """
    if residual is None:
        return 0.0
    weight = residual * (1 - jnp.asarray(decay, target.dtype) ** (count - 1).astype(target.dtype))
    return weight * _factors.residual(target, done.prepared, done.step, layout)


def initialiser(tracking: Tracking, layout: LayoutLike, seed: int = 0) -> optax.TransformInitFn:
    """The ``init`` of one low-rank moment; ``seed`` tells the moments of one optimizer apart."""

    def init_fn(params: PyTree) -> LowRankState:
        leaves = flatten_with_layout(layout, params)

        def parts(path, leaf_layout, leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"'{path}' has dtype {leaf.dtype}: momentum needs real floating-point "
                    "parameters. Mask the leaf out (optax.masked) or give it to another optimizer."
                )
            dtype = tracking.factor_dtype
            dtype = compute_dtype(leaf.dtype) if dtype is None else dtype
            rank = leaf_rank(
                tracking.rank,
                path,
                leaf_layout,
                leaf.shape,
                fallback=tracking.full_rank_fallback,
            )
            if rank is None:
                return optax.MaskedNode(), optax.MaskedNode(), zeros_without(leaf, (), dtype)
            factors = _factors.init_factors(path, leaf, leaf_layout, rank, dtype, seed)
            return *factors, optax.MaskedNode()

        rows = [
            (optax.MaskedNode(),) * 3 if ours is None else parts(path, ours, leaf)
            for path, ours, leaf in zip(leaves.paths, leaves.layouts, leaves.leaves, strict=True)
        ]
        left, right, full = (leaves.unflatten([row[i] for row in rows]) for i in range(3))
        return LowRankState(jnp.zeros([], jnp.int32), left, right, full)

    return init_fn


def advance_states(
    leaves: LayoutLeaves,
    moments: Sequence[tuple[LowRankState, Sequence[jax.Array | None], Number]],
    tracking: Tracking,
) -> list[list[Done | None]]:
    """One Newton step of several moments (state, targets, gamma) at once; None for leaves without factors."""
    tasks: list[Task] = []
    places: list[tuple[int, int]] = []
    for which, (state, targets, gamma) in enumerate(moments):
        nodes = zip(
            leaves.layouts,
            targets,
            leaves.align(state.left),
            leaves.align(state.right),
            strict=True,
        )
        for position, (layout, target, left, right) in enumerate(nodes):
            if layout is not None and target is not None and not isinstance(left, optax.MaskedNode):
                tasks.append(Task(layout, target, left, right.astype(target.dtype), gamma))
                places.append((which, position))
    if tracking.initial_subspace == "gradient" and tasks:
        rights = jax.lax.cond(
            moments[0][0].count == 0,
            lambda: gradient_rights([leaves.paths[position] for _, position in places], tasks),
            lambda: [task.right for task in tasks],
        )
        tasks = [task._replace(right=right) for task, right in zip(tasks, rights, strict=True)]
    results: list[list[Done | None]] = [[None] * len(leaves.leaves) for _ in moments]
    done = advance(tasks, tracking.damping, tracking.damping_kind)
    for (which, position), each in zip(places, done, strict=True):
        results[which][position] = each
    return results


def next_state(
    leaves: LayoutLeaves,
    state: LowRankState,
    count: jax.Array,
    done: Sequence[Done | None],
    full: Sequence[jax.Array | None],
) -> LowRankState:
    """The state with new factors and full moments, every leaf in the dtype it had."""

    def renew(old, new):
        return [
            node if value is None else value.astype(node.dtype)
            for node, value in zip(leaves.align(old), new, strict=True)
        ]

    return LowRankState(
        count,
        leaves.unflatten(renew(state.left, [None if d is None else d.step.left for d in done])),
        leaves.unflatten(renew(state.right, [None if d is None else d.step.right for d in done])),
        leaves.unflatten(renew(state.full, full)),
    )


def in_compute_dtype(
    leaves: LayoutLeaves, target: Callable[[jax.Array], jax.Array] | None = None
) -> list[jax.Array | None]:
    """Our leaves in float32 or wider, mapped; None where a leaf is not ours."""
    return [
        None
        if layout is None
        else (target or (lambda x: x))(jnp.asarray(leaf).astype(compute_dtype(leaf.dtype)))
        for layout, leaf in zip(leaves.layouts, leaves.leaves, strict=True)
    ]


def as_updates(leaves: LayoutLeaves, values: Sequence[jax.Array | None]) -> PyTree:
    """A tree of updates in the leaves' dtypes; leaves that are not ours pass through."""
    return leaves.unflatten(
        [
            leaf if value is None else value.astype(leaf.dtype)
            for leaf, value in zip(leaves.leaves, values, strict=True)
        ]
    )


def coupled_gamma(decay: Number) -> Number:
    """1 - sqrt(decay): each of two factors takes half of the decay. Written without cancellation."""
    return (1 - decay) / (1 + decay**0.5)


def bias_weight(decay: Number, count: jax.Array, dtype: Any) -> jax.Array:
    """1 - decay^count."""
    return 1 - jnp.asarray(decay, dtype) ** count.astype(dtype)
