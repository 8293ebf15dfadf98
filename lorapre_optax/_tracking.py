"""What every low-rank momentum here shares: its state, its options, and one step of many moments.

The transformations in `_momentum`, `_adam` and `_muon` choose targets and read-outs; the way from a tree
of gradients to factored and full moments and back is here, once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from layout_optax.axes import compute_dtype, zeros_without
from layout_optax.hyperparameters import Number, at, check_number, check_one_of
from layout_optax.layout import LayoutLike, ParamLayout, PyTree
from layout_optax.leaves import LayoutLeaves, flatten_with_layout
from lorapre_optax import _factors
from lorapre_optax._batching import Done, Task, advance
from lorapre_optax._factors import DampingKind
from lorapre_optax._rank import RankLike, leaf_rank
from lorapre_optax._subspace import gradient_rights

InitialSubspace: TypeAlias = Literal["normal", "gradient"]
Value: TypeAlias = jax.Array | float


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


def blend(
    leaves: LayoutLeaves,
    state: LowRankState,
    done: Sequence[Done | None],
    targets: Sequence[jax.Array | None],
    fresh: Sequence[jax.Array | None],
    decay: Value,
    count: jax.Array,
    residual: Value | None,
) -> list[jax.Array | None]:
    """``decay * (previous moment) + fresh``, from factors or from a full moment, leaf by leaf."""
    moments: list[jax.Array | None] = []
    for layout, old, target, new, each in zip(
        leaves.layouts, leaves.align(state.full), targets, fresh, done, strict=True
    ):
        if layout is None or target is None or new is None:
            moments.append(None)
        elif each is None:
            moments.append(decay * old.astype(target.dtype) + new)
        else:
            extra = residual_term(each, layout, target, decay, count, residual)
            moments.append(decay * each.product + new + extra)
    return moments


def residual_term(
    done: Done,
    layout: ParamLayout,
    target: jax.Array,
    decay: Value,
    count: jax.Array,
    residual: Value | None,
) -> jax.Array | float:
    """The term kappa (1 - b^(t-1)) (T - (P_B T + T P_A) / 2), or 0 where there is no kappa.

    The history holds weight b (1 - b^(t-1)) at step t, so with kappa = b the part outside gets exactly
    the weight of the part inside, and nothing at t = 1, where there is no history to make up for.
    """
    if residual is None:
        return 0.0
    weight = residual * (1 - jnp.asarray(decay, target.dtype) ** (count - 1).astype(target.dtype))
    return weight * _factors.residual(target, done.prepared, done.step, layout)


def initialiser(
    tracking: Tracking, layout: LayoutLike, seed: int = 0
) -> Callable[[PyTree], LowRankState]:
    """The ``init`` of one low-rank moment; ``seed`` tells the moments of one optimizer apart."""

    def init_fn(params) -> LowRankState:
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
    moments: Sequence[tuple[LowRankState, Sequence[jax.Array | None], Any]],
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
    damping = at(tracking.damping, moments[0][0].count)
    done = advance(tasks, damping, tracking.damping_kind)
    for (which, position), each in zip(places, done, strict=True):
        results[which][position] = each
    return results


def next_state(
    leaves: LayoutLeaves,
    state: LowRankState,
    count: jax.Array,
    done: Sequence[Done | None],
    moments: Sequence[jax.Array | None],
) -> LowRankState:
    """The state with new factors, or new full moments where there are none, each in the dtype it had."""

    def renew(old, new):
        return leaves.unflatten(
            [
                node
                if value is None or isinstance(node, optax.MaskedNode)
                else value.astype(node.dtype)
                for node, value in zip(leaves.align(old), new, strict=True)
            ]
        )

    lefts = [None if each is None else each.step.left for each in done]
    rights = [None if each is None else each.step.right for each in done]
    return LowRankState(
        count, renew(state.left, lefts), renew(state.right, rights), renew(state.full, moments)
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


def coupled_gamma(decay: Value) -> Value:
    """1 - sqrt(decay): each of two factors takes half of the decay. Written without cancellation."""
    return (1 - decay) / (1 + decay**0.5)


def bias_weight(decay: Value, count: jax.Array, dtype: Any) -> jax.Array:
    """1 - decay^count."""
    return 1 - jnp.asarray(decay, dtype) ** count.astype(dtype)
